"""Details of PPO that no other file's test would catch; docs/rlhf.md has the whole list."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_config, build_tokenizer, count_w5, prompts
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GraniteConfig,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from common.errors import UserError
from rlhf.critic import check_plain_logits
from rlhf.loss import policy_stats
from rlhf.trainer import PPOTrainer

Build = Callable[..., PPOTrainer]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_training_sees_the_distribution_that_was_sampled(
    build: Build, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log-probabilities of the rollout are those by which `generate` itself drew the tokens.

    Broken once: temperature left out of training.
    """
    trainer = build(temperature=temperature, num_updates=1)
    drawn, multinomial = [], torch.multinomial

    def recorded(probabilities: torch.Tensor, count: int) -> torch.Tensor:
        tokens = multinomial(probabilities, count)
        drawn.append(probabilities.log().gather(1, tokens)[:, 0])
        return tokens

    monkeypatch.setattr(torch, "multinomial", recorded)
    trainer.model.train()
    rollout, _ = trainer._generate_and_score_completions(list(trainer.train_dataset)[:16])
    mask = rollout.completion_mask
    assert len(drawn) == mask.shape[1] and len(drawn[0]) == 16
    for t, expected in enumerate(drawn):  # of the rows that go on, in their order
        found = rollout.logprobs[:, t][mask[:, t]]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_reward_model_is_only_asked(build: Build, tmp_path: Path) -> None:
    """In eval mode, without gradients, its weights never touched. Broken once: left in train."""
    config = build_config(16).to_dict() | {"attention_dropout": 0.5, "num_labels": 1}
    model = Qwen3ForSequenceClassification(Qwen3Config(**config)).train()
    model.config.name_or_path = "noisy"
    before = {name: p.clone() for name, p in model.state_dict().items()}
    trainer = build(reward_funcs=model)
    scorer, ids = trainer.reward_funcs[0], [[4, 5], [6]]
    assert scorer(prompt_ids=ids, completion_ids=ids) == scorer(prompt_ids=ids, completion_ids=ids)
    trainer.train()
    for name, p in model.named_parameters():
        assert p.grad is None and torch.equal(p, before[name])
    assert not model.training


def test_learning_rate_warms_up_and_falls(build: Build) -> None:
    """8 steps, 4 of warm-up, linear to 0: as logged after each update of 2 steps.

    Broken once: max_steps counted with twice the passes over a rollout.
    """
    trainer = build(num_updates=4, learning_rate=8e-3, lr_scheduler_type="linear", warmup_steps=4)
    trainer.train()
    rates = [line["learning_rate"] for line in trainer.state.log_history if "score" in line]
    # Trainer logs the rate of the step just taken: steps 2, 4, 6, 8 have rates 1/4, 3/4, 3/4, 1/4
    assert rates == pytest.approx([2e-3, 6e-3, 6e-3, 2e-3])


@pytest.mark.parametrize("on", [False, True])
def test_activation_checkpointing_reaches_policy_and_critic(build: Build, on: bool) -> None:
    """Each layer runs again in the backward pass, if asked to. Broken once: flag not passed on."""
    trainer = build(activation_checkpointing=on, num_updates=1)
    calls = {"policy": 0, "critic": 0}

    def counter(which: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            calls[which] += torch.is_grad_enabled()

        return count

    trainer.model.model.layers[0].mlp.register_forward_pre_hook(counter("policy"))
    trainer.model.critic.model.model.layers[0].mlp.register_forward_pre_hook(counter("critic"))
    trainer.train()
    assert calls == {"policy": 8 if on else 4, "critic": 8 if on else 4}  # 4 micro-batches


def test_k3_is_the_exact_kl_in_the_mean() -> None:
    """approx_kl over samples of the old policy is KL(old || new), and never negative.

    Broken once: logratio of old to new in place of new to old.
    """
    torch.manual_seed(0)
    old, new = torch.randn(5).log_softmax(-1), torch.randn(5).log_softmax(-1)
    k3 = policy_stats(new, old, 0.2, 0.2)["approx_kl"]
    torch.testing.assert_close((old.exp() * k3).sum(), (old.exp() * (old - new)).sum())
    assert (k3 >= 0).all()


def test_metrics_count_real_tokens_only(build: Build) -> None:
    """Each figure of the log against numpy on plain forward passes over single rows.

    Broken once: entropy divided by completions.
    """
    seen: list[Any] = []
    trainer = build(num_updates=2, beta=0.3, seed=3)
    estimate = trainer._estimate_advantages

    def watch(rollout: Any) -> None:
        estimate(rollout)
        state = {name: p.clone() for name, p in trainer.model.state_dict().items()}
        seen.append((rollout, state))

    trainer._estimate_advantages = watch
    trainer.train()
    rollout, state = seen[1]
    line = [line for line in trainer.state.log_history if "score" in line][1]
    policy = AutoModelForCausalLM.from_pretrained(trainer.model.name_or_path)
    reference = AutoModelForCausalLM.from_pretrained(trainer.model.name_or_path)
    policy.load_state_dict({n: p for n, p in state.items() if not n.startswith("critic.")})
    figures: dict[str, list[Any]] = {
        "kl": [],
        "entropy": [],
        "length": [],
        "ended": [],
        "score": [],
    }
    for b in range(16):
        start, end = int(rollout.prompt_lengths[b]), int(rollout.lengths[b])
        ids = rollout.input_ids[b : b + 1, :end]
        rows = []
        for model in (policy, reference):
            with torch.no_grad():
                logits = model(input_ids=ids).logits[0, start - 1 : end - 1]
            rows.append(logits.double().log_softmax(-1).numpy())
        tokens = ids[0, start:].numpy()
        picked = [row[np.arange(len(tokens)), tokens] for row in rows]
        figures["kl"].append(np.sum(picked[0] - picked[1]))
        figures["entropy"].extend(-np.sum(np.exp(rows[0]) * rows[0], -1))
        figures["length"].append(len(tokens))
        figures["ended"].append(tokens[-1] == 1)
        figures["score"].append(np.mean(tokens == 5))
    expected = {name: float(np.mean(values)) for name, values in figures.items()}
    expected["eos_rate"] = expected.pop("ended")
    expected["score_std"] = float(np.std(figures["score"]))
    penalised = expected["score"] - (1 - expected["eos_rate"])
    expected["reward"] = penalised - 0.3 * expected["kl"]
    expected["score_length_correlation"] = np.corrcoef(figures["score"], figures["length"])[0, 1]
    for name, value in expected.items():
        assert line[name] == pytest.approx(value, rel=1e-3, abs=1e-5), name


def test_a_reward_that_pays_for_tokens_shows(build: Build) -> None:
    """Broken once: correlation taken with the score's own square."""

    def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [3.0 * len(ids) for ids in completion_ids]

    def alike(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [1.0] * len(completion_ids)

    for func, expected in ((length, 1.0), (alike, 0.0)):
        trainer = build(reward_funcs=func, num_updates=1, per_device_train_batch_size=8)
        trainer.train()
        (line,) = [line for line in trainer.state.log_history if "score" in line]
        assert line["score_length_correlation"] == pytest.approx(expected, abs=1e-5)


def test_every_sample_once_an_epoch_in_a_new_order(build: Build) -> None:
    """As trained on, three epochs of one rollout. Broken once: later epochs on one plan."""
    trainer = build(num_updates=1, num_ppo_epochs=3)
    seen: list[tuple[int, ...]] = []
    loss = trainer.compute_loss

    def watch(model: Any, inputs: Any, **rest: Any) -> torch.Tensor:
        rows = inputs.rollout.returns[:, 0].tolist()
        seen.append(tuple(rows))
        return loss(model, inputs, **rest)

    trainer.compute_loss = watch
    trainer.train()
    assert len(seen) == 3 * 4
    epochs = [seen[:4], seen[4:8], seen[8:]]
    everything = sorted(trainer._rollout.returns[:, 0].tolist())
    for epoch in epochs:
        assert sorted(x for rows in epoch for x in rows) == everything
    assert epochs[0] != epochs[1] != epochs[2]


def test_prompts_of_any_length_are_kept_whole(build: Build) -> None:
    """Prompt ids of the rollout are the tokenizer's, beginning to end.

    Broken once: first token cut off.
    """
    trainer = build(reward_funcs=count_w5)
    rows = list(prompts(16))
    rollout, _ = trainer._generate_and_score_completions(rows)
    tokenizer = build_tokenizer(16)
    for b, row in enumerate(rows):
        ids = tokenizer(row["prompt"])["input_ids"]
        assert rollout.input_ids[b, : int(rollout.prompt_lengths[b])].tolist() == ids


TINY: dict[str, Any] = {
    "vocab_size": 16,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize(
    ("config", "plain"),
    [
        (Gemma2Config(**TINY, head_dim=8), {"final_logit_softcapping": None}),
        (CohereConfig(**TINY), {"logit_scale": 1.0}),
        (GraniteConfig(**TINY, logits_scaling=2.0), {"logits_scaling": 1.0}),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_logits_that_are_capped_or_scaled_are_refused(config: Any, plain: dict[str, Any]) -> None:
    """However small they still are. Broken once: compared as they are, where a cap of 30 shows no
    difference; the scale left out of one side, that refuses everybody.
    """
    torch.manual_seed(0)
    with pytest.raises(UserError, match="transforms its logits"):
        check_plain_logits(AutoModelForCausalLM.from_config(config))
    config.update(plain)
    check_plain_logits(AutoModelForCausalLM.from_config(config))
