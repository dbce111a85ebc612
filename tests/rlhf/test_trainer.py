"""A real tiny run: invariants of the first step, optimizer, rewards, checkpoints, refusals."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    build_config,
    build_tokenizer,
    count_w5,
    prompts,
    save_policy,
    save_reward_model,
)
from datasets import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from trl import RewardConfig, RewardTrainer

from common.errors import UserError
from common.generation import generate_answers
from common.reward_gpt import logprob_scorer
from common.stage import train_or_resume
from rlhf.config import PPOConfig
from rlhf.critic import plain_policy
from rlhf.score import TokenScorer, turn_suffix
from rlhf.trainer import PPOTrainer

Build = Callable[..., PPOTrainer]


def logs(trainer: PPOTrainer) -> list[dict[str, float]]:
    return [line for line in trainer.state.log_history if "score" in line]


def test_first_step_ratio_is_one(build: Build, reward_path: str) -> None:
    """Broken once: rollout forwarded at another temperature than the update."""
    trainer = build(reward_funcs=reward_path, num_mini_batches=1, num_updates=1)
    trainer.train()
    (line,) = logs(trainer)
    for name in ("logratio", "approx_kl", "clipfrac", "kl"):
        assert line[name] == 0.0, name
    assert line["entropy"] > 0.5 and line["length"] > 1


def test_dropout_is_off(build: Build, tmp_path: Path) -> None:
    """Broken once: attention dropout, which is no layer but a number, left on (log-ratio 0.1)."""
    model = Qwen3ForCausalLM(Qwen3Config(**build_config(16).to_dict() | {"attention_dropout": 0.5}))
    model.save_pretrained(tmp_path / "policy")
    build_tokenizer(16).save_pretrained(tmp_path / "policy")
    build(str(tmp_path / "policy"), num_updates=1).train()


def test_dropout_layers_are_off(build: Build, tmp_path: Path) -> None:
    """GPT-2 has them, in the policy and in the critic made of it. Broken once: left on."""
    sizes = {"vocab_size": 16, "n_positions": 128, "n_embd": 32, "n_layer": 1, "n_head": 2}
    special = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    config = GPT2Config(**sizes, **special, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "policy")
    build_tokenizer(16).save_pretrained(tmp_path / "policy")
    trainer = build(str(tmp_path / "policy"), num_updates=1)
    layers = [m for m in trainer.model.modules() if isinstance(m, torch.nn.Dropout)]
    assert len(layers) == 2 * 3 and not any(layer.p for layer in layers)
    trainer.train()


def test_optimizer_steps_and_one_log_an_update(build: Build) -> None:
    """Broken once: callback that defers logs removed (a log per optimizer step).

    32 prompts, 16 an update: the fourth update ends the second pass over the data.
    """
    trainer = build(num_updates=4, num_ppo_epochs=3)
    steps = []
    trainer.train_dataset = trainer.train_dataset.select(range(32))
    create = trainer.create_optimizer

    def counted(model: Any = None) -> torch.optim.Optimizer:
        optimizer = create(model)
        optimizer.register_step_post_hook(lambda *_: steps.append(trainer.state.global_step))
        return optimizer

    trainer.create_optimizer = counted
    trainer.train()
    assert len(steps) == trainer.state.global_step == 4 * 3 * 2
    assert [line["step"] for line in logs(trainer)] == [6, 12, 18, 24]


def test_critic_has_its_own_learning_rate_and_clip(build: Build) -> None:
    """Broken once: one clip over both; critic left in the policy's groups."""
    trainer = build(learning_rate=0.0, critic_learning_rate=1e-2, num_updates=1)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and all(n.startswith("critic.") for n in moved)
    groups = trainer.optimizer.param_groups
    assert sorted({g["lr"] for g in groups}) == [0.0, 1e-2]
    count = sum(len(g["params"]) for g in groups)
    assert count == len(list(trainer.model.parameters()))
    for which, scale in (("policy", 100.0), ("critic", 3.0)):
        for name, p in trainer.model.named_parameters():
            if name.startswith("critic.") == (which == "critic"):
                p.grad = torch.full_like(p, scale)
    norm = trainer._clip_grad_norm(trainer.model)
    sizes = {"policy": 0.0, "critic": 0.0}
    for name, p in trainer.model.named_parameters():
        sizes["critic" if name.startswith("critic.") else "policy"] += float(p.grad.square().sum())
    assert norm > 1e3
    assert sizes == pytest.approx({"policy": 1.0, "critic": 1.0}, rel=1e-3)


def test_missing_eos_costs_the_penalty(build: Build) -> None:
    """Broken once: penalty on every completion; on finished ones."""
    dataset = Dataset.from_dict({"prompt": ["w4 w5"] * 16})
    trainer = build(dataset=dataset, missing_eos_penalty=2.5, beta=0.0, score_mean=0.5, score_std=2)
    fixed = [[5, 1], [5, 5, 5, 5]] * 8
    trainer._generate = lambda prompts: ([[4, 5]] * 16, fixed, [""] * 16)
    trainer.model.train()
    rollout, _ = trainer._generate_and_score_completions(list(dataset))
    rewards = rollout.rewards.sum(1)[:2].tolist()
    assert rewards == pytest.approx([(0.5 - 0.5) / 2, (1.0 - 0.5) / 2 - 2.5])
    assert trainer._metrics["train"]["eos_rate"] == [0.5]
    assert trainer._metrics["train"]["score"] == [0.75]


def test_several_rewards_weights_and_unscorable_rows(build: Build) -> None:
    """Of weight 0 a reward makes nothing scorable. Broken once: None scored as 0; weights ignored;
    a held-out reward's number taken for one.
    """

    def sometimes(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if ids[0] == 6 else 1.0 for ids in completion_ids]

    def never(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
        return [None if ids[0] == 6 else ids.count(5) for ids in completion_ids]

    def held_out(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [7.0] * len(completion_ids)

    trainer = build(
        reward_funcs=[sometimes, never, held_out],
        reward_weights=[0.5, 2.0, 0.0],
        beta=0.0,
    )
    fixed = [[5, 5, 1], [6, 1]] * 8
    trainer._generate = lambda prompts: ([[4]] * 16, fixed, [""] * 16)
    trainer.model.train()
    rollout, _ = trainer._generate_and_score_completions([{"prompt": "w4"}] * 16)
    assert float(rollout.rewards[0].sum()) == 0.5 + 2.0 * 2
    assert rollout.train_mask.sum(1).tolist()[:2] == [3, 0]
    assert trainer._metrics["train"]["score"] == [4.5]
    trainer._estimate_advantages(rollout)
    assert not rollout.advantages[1].any()


@pytest.mark.parametrize("conversational", [True, False])
@pytest.mark.parametrize("newline", [True, False])
def test_reward_model_sees_what_it_was_trained_on(
    reward_path: str, tmp_path: Path, conversational: bool, newline: bool
) -> None:
    """Token ids and score equal RewardTrainer's own.

    Broken once: EOS left off the scored tokens (trap 1); template's tail after EOS left off.
    """
    tokenizer = build_tokenizer(16)
    if newline:
        tokenizer.chat_template = tokenizer.chat_template.replace("' <eos>'", "' <eos> w15'")
    model = AutoModelForSequenceClassification.from_pretrained(reward_path)
    texts = [("w4 w5", "w6 w7 w8"), ("w9", "w10"), ("w4 w4 w5", "w11 w6")]
    rows: list[dict[str, Any]] = []
    for prompt, answer in texts:
        if conversational:
            user, reply = [{"role": "user", "content": prompt}], {"role": "assistant"}
            chosen = [{**reply, "content": answer}]
            rows.append({"prompt": user, "chosen": chosen, "rejected": chosen})
        else:
            rows.append({"prompt": prompt, "chosen": " " + answer, "rejected": " " + answer})
    theirs = RewardTrainer(
        model=model,
        args=RewardConfig(str(tmp_path), use_cpu=True, bf16=False, report_to="none"),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = theirs.data_collator([theirs.train_dataset[i] for i in range(3)])
    suffix = turn_suffix(tokenizer) if conversational else []
    scorer = TokenScorer(model, tokenizer, suffix, batch_size=2)
    prompt_ids, completion_ids = [], []
    for prompt, answer in texts:
        if conversational:
            message = [{"role": "user", "content": prompt}]
            encoded = tokenizer.apply_chat_template(
                message, add_generation_prompt=True, return_dict=True
            )
            prompt_ids.append(encoded["input_ids"])
        else:
            prompt_ids.append(tokenizer(prompt)["input_ids"])
        completion_ids.append(tokenizer(answer)["input_ids"] + [1])
    for i in range(3):
        length = int(batch["attention_mask"][i].sum())
        assert scorer.tokens(prompt_ids[i], completion_ids[i]) == (
            batch["input_ids"][i, :length].tolist()
        )
    with torch.no_grad():
        expected = model.eval()(
            input_ids=batch["input_ids"][:3], attention_mask=batch["attention_mask"][:3]
        ).logits[:, 0]
    scores = torch.tensor(scorer(prompt_ids=prompt_ids, completion_ids=completion_ids))
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-6)


def test_critic_starts_as_the_reward_model(build: Build, reward_path: str) -> None:
    """Value after the last token but one = its normalised score of that text.

    Broken once: values not normalised; head left random.
    """
    trainer = build(reward_funcs=reward_path, score_mean=0.3, score_std=2.0)
    ids = torch.tensor([[4, 5, 6, 7]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    where = {"input_ids": ids, "prompt_lengths": torch.tensor([2]), "completion_mask": mask}
    _, _, values = trainer.model(**where)
    reward_model = AutoModelForSequenceClassification.from_pretrained(reward_path)
    score = reward_model(input_ids=ids[:, :3]).logits[0, 0]
    torch.testing.assert_close(values[0, 1], (score - 0.3) / 2.0)
    without = build()
    assert not without.model(**where)[2].any()


def test_critic_starts_as_the_weighted_reward_that_is_trained_on(
    build: Build, reward_path: str, tmp_path: Path
) -> None:
    """A held-out model (weight 0) comes first. Broken once: the first model, at weight 1."""
    held_out = save_reward_model(tmp_path / "held_out", seed=7)
    trainer = build(
        reward_funcs=[held_out, reward_path],
        reward_weights=[0.0, -3.0],
        score_mean=0.3,
        score_std=2.0,
    )
    ids = torch.tensor([[4, 5, 6, 1]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    where = {"input_ids": ids, "prompt_lengths": torch.tensor([2]), "completion_mask": mask}
    reward_model = AutoModelForSequenceClassification.from_pretrained(reward_path)
    score = reward_model(input_ids=ids[:, :3]).logits[0, 0]
    torch.testing.assert_close(trainer.model(**where)[2][0, 1], (-3 * score - 0.3) / 2.0)


def test_critic_beside_other_rewards_starts_at_zero(build: Build, reward_path: str) -> None:
    """The mean is known of their sum alone. Broken once: the model's score less the sum's mean."""
    trainer = build(reward_funcs=[reward_path, count_w5], score_mean=5.0)
    where = {"prompt_lengths": torch.tensor([2]), "completion_mask": torch.ones(1, 2).bool()}
    assert not trainer.model(input_ids=torch.tensor([[4, 5, 6, 1]]), **where)[2].any()


def test_critic_of_a_score_beside_logprobs_starts_at_zero(build: Build, policy_path: str) -> None:
    """The head is a part of that score: without the other it is far off, where whole scores have
    mean 0. Broken once: the head copied, on the whole score's scale.
    """
    reward_model = logprob_scorer(policy_path, [3])
    torch.nn.init.normal_(reward_model.score.weight)
    trainer = build(reward_funcs=reward_model, score_mean=0.3, score_std=2.0)
    where = {"prompt_lengths": torch.tensor([2]), "completion_mask": torch.ones(1, 2).bool()}
    assert not trainer.model(input_ids=torch.tensor([[4, 5, 6, 1]]), **where)[2].any()
    theirs, ours = reward_model.base_model, trainer.model.critic.model.base_model
    assert torch.equal(ours.layers[0].mlp.up_proj.weight, theirs.layers[0].mlp.up_proj.weight)


def test_a_checkpoints_own_sampling_is_left_out(tmp_path: Path) -> None:
    """PPO trains the distribution that it samples. Broken once: min_p, a ban on repetition and
    others went into rollouts, top_p and penalties into what is measured."""
    path = save_policy(tmp_path / "policy")
    policy: Any = AutoModelForCausalLM.from_pretrained(path)
    policy.generation_config.update(do_sample=True, min_p=0.9, top_p=0.01, no_repeat_ngram_size=1)
    policy.save_pretrained(path)
    trainer = PPOTrainer(
        model=path,
        reward_funcs=count_w5,
        args=PPOConfig(str(tmp_path / "out"), use_cpu=True, max_completion_length=6),
        train_dataset=prompts(64),
    )
    said = [ids for ids in trainer._generate([f"w{w}" for w in range(4, 16)] * 10)[1]]
    assert len({ids[0] for ids in said}) > 8
    assert any(len(set(ids)) < len(ids) for ids in said)
    answers = generate_answers(
        policy, build_tokenizer(16), ["w5"], max_new_tokens=1, temperature=1.0, samples=120
    )
    assert len(set(answers[0])) > 8 and policy.generation_config.min_p == 0.9


def test_resume_is_bit_exact(build: Build, tmp_path: Path, reward_path: str) -> None:
    """From a checkpoint inside an epoch and from one at its end; critic, optimizer, RNG, data.

    Broken once: critic not restored; order of prompts not tied to the epoch.
    """
    settings = {
        "reward_funcs": reward_path,
        "num_updates": 4,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": None,
        "output_dir": str(tmp_path / "run"),
    }
    whole = build(**settings)
    whole.train()
    saved = sorted(p.name for p in (tmp_path / "run").glob("checkpoint-*"))
    assert saved == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-8"]
    for step in (2, 4):
        resumed = build(**settings)
        resumed.train(resume_from_checkpoint=str(tmp_path / "run" / f"checkpoint-{step}"))
        for name, p in whole.model.state_dict().items():
            assert torch.equal(p, resumed.model.state_dict()[name]), (step, name)
        for ours, theirs in zip(logs(whole), logs(resumed), strict=True):
            assert ours["score"] == theirs["score"]


@pytest.mark.parametrize("budget", [None, 1e-9])
def test_a_run_that_has_ended_takes_no_step(
    build: Build, tmp_path: Path, budget: float | None
) -> None:
    """In the middle of an epoch, by its steps or a budget of KL; a checkpoint cut short is passed
    over, and seconds are counted on. Broken once: transformers looks for the end after a step, so
    an update more was taken; and by a clock that starts at 0."""
    settings = {"num_updates": 3, "save_strategy": "steps", "save_steps": 2, "kl_budget": budget}
    settings |= {"lr_scheduler_type": "constant", "learning_rate": 1e-2}
    whole = build(**settings, dataset=prompts(40))
    train_or_resume(whole, tmp_path / "out")
    steps = whole.state.global_step
    assert steps == (6 if budget is None else 4)
    (tmp_path / "out" / "checkpoint-99").mkdir()
    (tmp_path / "out" / "checkpoint-99" / "trainer_state.json").write_text('{"epoch": ')
    [last] = (tmp_path / "out").glob(f"checkpoint-{steps}/trainer_state.json")
    state = json.loads(last.read_text())
    state["stateful_callbacks"]["Stopwatch"]["attributes"]["before"] = 1000.0
    last.write_text(json.dumps(state))
    again = build(**settings, dataset=prompts(40))
    seconds = train_or_resume(again, tmp_path / "out")
    assert again.state.global_step == steps and seconds >= 1000
    for name, p in whole.model.state_dict().items():
        assert torch.equal(p, again.model.state_dict()[name]), name


def test_saved_policy_is_clean(build: Build, tmp_path: Path) -> None:
    """Broken once: critic's weights in the policy's file."""
    trainer = build(num_updates=1, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / "out" / "checkpoint-2"):
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert type(model) is Qwen3ForCausalLM
        assert not info["unexpected_keys"] and not info["missing_keys"]
        for name, p in model.state_dict().items():
            assert torch.equal(p, trainer.model.state_dict()[name])
    value_model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out" / "checkpoint-2" / "value_model"
    )
    assert torch.equal(value_model.score.weight, trainer.model.critic.model.score.weight)
    assert any(name.startswith("critic.") for name in trainer.model.state_dict())
    plain, ids = plain_policy(trainer.model), torch.tensor([[4, 5, 6]])
    assert plain.state_dict().keys() == model.state_dict().keys()
    assert torch.equal(plain(input_ids=ids).logits, trainer.model(input_ids=ids).logits)


def test_evaluation_and_conversational_prompts(build: Build, reward_path: str) -> None:
    """Broken once: evaluation left the metrics in the training log."""
    trainer = build(
        reward_funcs=[reward_path, count_w5],
        dataset=prompts(32, conversational=True),
        extra={"eval_dataset": prompts(8, conversational=True)},
        eval_strategy="steps",
        eval_steps=1,
    )
    trainer.train()
    evals = [line for line in trainer.state.log_history if "eval_score" in line]
    assert [line["step"] for line in evals] == [2, 4]
    assert all(math.isfinite(line["eval_kl"]) and line["eval_length"] > 0 for line in evals)
    assert {"rewards/count_w5/mean", "explained_variance"} <= logs(trainer)[0].keys()


def test_lora(build: Build, tmp_path: Path) -> None:
    """Adapter and critic train, the base does not, and without adapter it is the reference.

    Broken once: reference taken with the adapter on (kl stays 0).
    """
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    trainer = build(extra={"peft_config": config}, learning_rate=3e-2, num_updates=3)
    base = {n: p.clone() for n, p in trainer.model.named_parameters() if "base_layer" in n}
    trainer.train()
    assert logs(trainer)[0]["kl"] == 0.0 and logs(trainer)[-1]["kl"] != 0.0
    for name, p in trainer.model.named_parameters():
        assert name not in base or torch.equal(p, base[name])
    plain, ids = plain_policy(trainer.model), torch.tensor([[4, 5, 6]])
    with torch.no_grad():
        ours, theirs = plain(input_ids=ids).logits, trainer.model(input_ids=ids).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    trainer.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def test_refusals(build: Build, tmp_path: Path) -> None:
    """Each in one line that names the value. Broken once: check of pad and eos removed."""
    tokenizer = build_tokenizer(16)
    tokenizer.pad_token = tokenizer.eos_token
    with pytest.raises(UserError, match=r"pad token \('<eos>'\)"):
        build(extra={"processing_class": tokenizer})
    with pytest.raises(UserError, match="has 15 prompts, an update takes 16"):
        build(dataset=prompts(15))
    with pytest.raises(UserError, match=r"max_steps \(3\) must be a multiple"):
        build(num_updates=None, max_steps=3)
    with pytest.raises(UserError, match=r"epsilon \(0.3\) follows from clip_range \(0.2\)"):
        build(epsilon=0.3)
    with pytest.raises(UserError, match=r"top_p \(0.9\)"):
        build(top_p=0.9)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sync_ref_model": True}, r"sync_ref_model \(True\): PPO's reference stays as it was"),
        ({"generation_kwargs": {"top_k": 1}}, r"generation_kwargs \(.*PPO trains the distribution"),
        ({"chat_template_kwargs": {"brief": True}}, r"chat_template_kwargs \(.*write them into it"),
        ({"max_completion_length": None}, r"max_completion_length \(None\) must be a whole number"),
        ({"kl_budget": -1.0}, r"kl_budget \(-1.0\) must be above 0"),
        ({"vf_coef": -1.0}, r"vf_coef \(-1.0\) must be 0 or more"),
        ({"clip_range_value": -0.2}, r"clip_range_value \(-0.2\) must be 0 or more"),
        ({"missing_eos_penalty": -1.0}, r"missing_eos_penalty \(-1.0\) must be 0 or more"),
        ({"reward_clip_range": (5.0, -5.0)}, r"reward_clip_range \(.* a lower bound and a higher"),
        (
            {"num_updates": None, "num_train_epochs": 1.5},
            r"num_train_epochs \(1.5\) may end inside",
        ),
    ],
)
def test_settings_that_would_train_something_else(
    build: Build, settings: dict[str, Any], message: str
) -> None:
    """Broken once: all of these ran."""
    with pytest.raises(UserError, match=message):
        build(**settings)


def test_config_counts() -> None:
    """Broken once: max_steps set to num_updates."""
    config = PPOConfig(
        per_device_train_batch_size=8,
        gradient_accumulation_steps=2,
        num_mini_batches=4,
        num_ppo_epochs=3,
        num_updates=5,
        use_cpu=True,
        report_to="none",
    )
    assert config.generation_batch_size == 8 * 2 * 4
    assert config.max_steps == 5 * 12 and config.micro_steps_per_update == 24
    assert config.bf16 is False and config.num_generations == 1


def test_truncated_completions_can_be_left_out(build: Build) -> None:
    """Broken once: the setting read by nothing."""
    for masked, tokens in ((False, [2, 4]), (True, [2, 0])):
        trainer = build(mask_truncated_completions=masked)
        trainer._generate = lambda _: ([[4, 5]] * 16, [[5, 1], [5, 5, 5, 5]] * 8, [""] * 16)
        rollout, _ = trainer._generate_and_score_completions([{"prompt": "w4 w5"}] * 16)
        assert rollout.train_mask.sum(1).tolist() == tokens * 8


def test_advantages_are_whitened_or_as_they_are(build: Build, reward_path: str) -> None:
    """As they are, they are what the returns are above the values. Broken once: always whitened."""
    for whitened in (False, True):
        trainer = build(reward_funcs=reward_path, normalize_advantages=whitened)
        trainer.model.train()
        rollout, _ = trainer._generate_and_score_completions(list(trainer.train_dataset)[:16])
        trainer._estimate_advantages(rollout)
        mask = rollout.train_mask
        plain = (rollout.returns - rollout.values)[mask]
        expected = (plain - plain.mean()) / plain.std(correction=0) if whitened else plain
        torch.testing.assert_close(rollout.advantages[mask], expected, rtol=1e-4, atol=1e-5)


def test_critic_can_start_at_zero(build: Build, reward_path: str) -> None:
    """On the reward model's trunk all the same. Broken once: the head copied."""
    trainer = build(reward_funcs=reward_path, critic_head="zero", score_mean=0.3, score_std=2.0)
    where = {"prompt_lengths": torch.tensor([2]), "completion_mask": torch.ones(1, 2).bool()}
    assert not trainer.model(input_ids=torch.tensor([[4, 5, 6, 1]]), **where)[2].any()
    theirs = AutoModelForSequenceClassification.from_pretrained(reward_path).base_model
    ours = trainer.model.critic.model.base_model.state_dict()
    assert all(torch.equal(ours[name], p) for name, p in theirs.state_dict().items())
