"""A critic that is one layer on the policy's own trunk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import count_w5, prompts
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from rlhf.critic import plain_policy
from rlhf.trainer import MicroBatch, PPOTrainer

Build = Callable[..., PPOTrainer]


def with_random_head(trainer: PPOTrainer) -> PPOTrainer:
    torch.manual_seed(5)
    torch.nn.init.normal_(trainer.model.critic.score.weight, std=0.5)
    return trainer


def test_value_is_read_where_the_token_is_chosen(build: Build) -> None:
    """On the last hidden states of a plain forward over each row alone, without padding.

    Broken once: states of the chosen tokens themselves, one to the right.
    """
    trainer = with_random_head(build(share_trunk=True))
    assert sum(p.numel() for p in trainer.model.critic.parameters()) == 32 + 1
    ids = torch.tensor([[4, 5, 6, 7, 1], [8, 9, 1, 0, 0]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    where = {"input_ids": ids, "prompt_lengths": torch.tensor([2, 2]), "completion_mask": mask}
    values = trainer.model(**where)[2]
    plain = AutoModelForCausalLM.from_pretrained(trainer.model.name_or_path)
    head = trainer.model.critic.score
    for b, length in enumerate((3, 1)):
        row = ids[b : b + 1, : 2 + length]
        states = plain(input_ids=row, output_hidden_states=True).hidden_states[-1][0]
        expected = states[1 : 1 + length] @ head.weight[0] + head.bias
        torch.testing.assert_close(values[b, :length], expected, rtol=1e-4, atol=1e-5)
        assert not values[b, length:].any()


def gradients(trainer: PPOTrainer, part: MicroBatch, policy: float, value: float) -> Any:
    """Of the loss with the policy's and the critic's part weighted, by parameter."""
    trainer.model.zero_grad()
    trainer.args.vf_coef = value
    advantages = part.rollout.advantages
    part.rollout.advantages = policy * advantages
    trainer.compute_loss(trainer.model, part).backward()
    part.rollout.advantages = advantages
    return {n: p.grad.clone() for n, p in trainer.model.named_parameters() if p.grad is not None}


def test_both_losses_reach_the_trunk(build: Build) -> None:
    """Each of them alone moves every layer, and together they add up.

    Broken once: states detached before the head.
    """
    trainer = with_random_head(build(share_trunk=True, reward_funcs=count_w5))
    trainer.model.train()
    rollout, plan = trainer._generate_and_score_completions(list(prompts(16)))
    trainer._estimate_advantages(rollout)
    part = next(trainer._cut(rollout, plan, is_first_epoch=True))
    both = gradients(trainer, part, 1.0, 0.3)
    policy, value = gradients(trainer, part, 1.0, 0.0), gradients(trainer, part, 0.0, 0.3)
    for layer in (0, 1):
        name = f"model.layers.{layer}.mlp.down_proj.weight"
        assert policy[name].abs().max() > 1e-6 and value[name].abs().max() > 1e-6
    for name, gradient in both.items():
        torch.testing.assert_close(gradient, policy[name] + value[name], rtol=1e-4, atol=1e-6)


def test_saved_policy_is_plain_and_a_resumed_run_the_same(build: Build, tmp_path: Path) -> None:
    """Head, optimizer and all. Broken once: head not restored; head in the policy's file."""
    settings: dict[str, Any] = {
        "share_trunk": True,
        "num_updates": 3,
        "critic_learning_rate": 3e-2,
        "save_strategy": "steps",
        "save_steps": 2,
        "output_dir": str(tmp_path / "run"),
    }
    whole = build(**settings)
    assert not whole.model.critic.score.weight.any()
    whole.train()
    assert whole.model.critic.score.weight.all()
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "run" / "checkpoint-6", output_loading_info=True
    )
    assert type(model) is Qwen3ForCausalLM
    assert not info["unexpected_keys"] and not info["missing_keys"]
    for name, p in model.state_dict().items():
        assert torch.equal(p, whole.model.state_dict()[name])
    assert plain_policy(whole.model).state_dict().keys() == model.state_dict().keys()
    resumed = build(**settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    for name, p in whole.model.state_dict().items():
        assert torch.equal(p, resumed.model.state_dict()[name]), name


@pytest.mark.parametrize("learning_rate", [0.0, 1e-3])
def test_the_head_alone_is_the_critic_to_the_optimizer(build: Build, learning_rate: float) -> None:
    """Its learning rate and clip are the critic's. Broken once: head at the policy's rate."""
    trainer = build(share_trunk=True, learning_rate=learning_rate, critic_learning_rate=1e-2)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    head = {"critic.score.weight", "critic.score.bias"}
    assert moved == (before.keys() if learning_rate else head)


def test_lora_with_a_shared_trunk(build: Build) -> None:
    """The adapter learns values, the reference stays without it. Broken once: no head built."""
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    trainer = build(share_trunk=True, extra={"peft_config": config}, learning_rate=3e-2)
    trainer.train()
    lines = [line for line in trainer.state.log_history if "score" in line]
    assert lines[0]["kl"] == 0.0 and lines[-1]["kl"] != 0.0
    assert trainer.model.critic.score.weight.any()
    assert not any("critic" in name for name in plain_policy(trainer.model).state_dict())
