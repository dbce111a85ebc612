"""Every invariant stops a run that breaks it, and says what and where."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import count_w5

import rlhf.trainer
from rlhf.advantage import token_rewards
from rlhf.callbacks import WeightGuard
from rlhf.invariants import BITS_AT_ONCE, BrokenInvariant, check_same_policy, checksums
from rlhf.rollout import join
from rlhf.trainer import PPOTrainer

Build = Callable[..., PPOTrainer]


def test_rollout_and_first_mini_batch_are_one_policy(build: Build) -> None:
    """Broken once: check removed."""
    trainer = build()
    estimate = trainer._estimate_advantages

    def tamper(rollout: Any) -> None:
        estimate(rollout)
        rollout.logprobs += 0.01

    trainer._estimate_advantages = tamper
    told = "rollout and first mini-batch differ at update 1, process 0: logratio 1.00e-02, clipfrac"
    with pytest.raises(BrokenInvariant, match=told):
        trainer.train()


@pytest.mark.parametrize("bf16", [False, True])
def test_dropout_in_the_update_is_caught_in_any_precision(build: Build, bf16: bool) -> None:
    """Broken once: only the largest log-ratio held, to 0.5 (bfloat16 let dropout pass)."""
    trainer = build(bf16=bf16)
    forward = trainer.model.forward

    def dropping(**batch: Any) -> Any:
        outputs = forward(**batch)
        if torch.is_grad_enabled():
            outputs = (outputs[0] + 0.1 * torch.randn_like(outputs[0]), *outputs[1:])
        return outputs

    trainer.model.forward = dropping
    with pytest.raises(BrokenInvariant, match="rollout and first mini-batch differ"):
        trainer.train()


def test_tolerances() -> None:
    """Rounding passes, NaN and a clipped ratio do not. Broken once: `>` in place of `not <=`."""
    mask = torch.tensor([[True, True, False]])
    old = torch.tensor([[-1.0, -2.0, 0.0]])

    def check(new: list[float], dtype: torch.dtype) -> None:
        check_same_policy(torch.tensor([new]), old, mask, (0.2, 0.2), dtype, "a and b", "update 1")

    check([-1.0 + 2e-6, -2.0, 9.0], torch.float32)  # as torch.compile rounds; padding is no token
    check([-1.0 + 0.02, -2.0, 0.0], torch.bfloat16)
    for new, dtype in (
        ([-1.0 + 1e-3, -2.0, 0.0], torch.float32),
        ([float("nan"), -2.0, 0.0], torch.float32),
        ([-1.0 + 0.3, -2.0, 0.0], torch.bfloat16),
    ):
        with pytest.raises(BrokenInvariant, match="a and b differ at update 1"):
            check(new, dtype)


def test_policy_starts_as_the_reference(build: Build) -> None:
    """Broken once: check removed."""
    trainer = build()
    with torch.no_grad():
        trainer.ref_model.model.norm.weight *= 1.5
    with pytest.raises(BrokenInvariant, match="policy and reference differ at update 1"):
        trainer.train()


def one_past_the_end(*where: Any) -> torch.Tensor:
    """What TRL 1.12 did: the score on the first padding token."""
    scores, logprobs, ref_logprobs, mask, kl_coef = where
    rewards = token_rewards(torch.zeros_like(scores), logprobs, ref_logprobs, mask, kl_coef)
    place = mask.sum(1).clamp(max=mask.shape[1] - 1)
    rewards[torch.arange(len(scores)), place] += scores
    return rewards


def on_the_prompt(*where: Any) -> torch.Tensor:
    rewards = token_rewards(*where)
    return rewards.flip(1)


@pytest.mark.parametrize("wrong", [one_past_the_end, on_the_prompt])
def test_score_is_on_the_last_token(
    build: Build, monkeypatch: pytest.MonkeyPatch, wrong: Callable[..., torch.Tensor]
) -> None:
    """Broken once: check removed."""
    monkeypatch.setattr(rlhf.trainer, "token_rewards", wrong)
    trainer = build(reward_funcs=lambda completion_ids, **_: [2.0] * len(completion_ids))
    fixed = [[5, 1], [6, 7, 8]] * 8  # finished and cut off
    trainer._generate = lambda prompts: ([[4, 5]] * 16, fixed, [""] * 16)
    with pytest.raises(BrokenInvariant, match=r"is not on its last token .* update 1, process 0"):
        trainer.train()


def test_tokens_are_those_that_were_sampled(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    """Completions read one token late. Broken once: tokens not compared."""

    def late(prompt_ids: Any, completion_ids: Any, *rest: Any) -> Any:
        rollout = join(prompt_ids, [[4, *ids] for ids in completion_ids], *rest)
        rollout.completion_mask[:, -1] = False
        return rollout

    monkeypatch.setattr(rlhf.trainer, "join", late)
    with pytest.raises(BrokenInvariant, match=r"is not on its last token"):
        build(num_updates=1, max_completion_length=1, missing_eos_penalty=0.0).train()


def test_reference_stays_as_it_was(build: Build) -> None:
    """Broken once: checksum taken after the change; only its last weight summed."""

    def meddle(**columns: Any) -> list[float]:
        if trainer.state.global_step == 2:
            with torch.no_grad():
                trainer.ref_model.model.layers[0].mlp.up_proj.weight[3, 5] += 1e-6
        return count_w5(**columns)

    trainer = build(reward_funcs=meddle)
    told = r"the reference's model.layers.0.mlp.up_proj.weight changed, at end of update 2"
    with pytest.raises(BrokenInvariant, match=told):
        trainer.train()


def test_with_an_adapter_the_base_is_the_reference(build: Build) -> None:
    """Broken once: all parameters summed, so that training itself was a breach."""
    from peft import LoraConfig

    config = LoraConfig(r=4, target_modules=["q_proj"])
    trainer = build(extra={"peft_config": config})
    trainer.train()
    guard = WeightGuard(trainer)
    where = trainer.args, trainer.state, trainer.control
    guard.on_train_begin(*where)
    guard.on_step_end(*where)
    with torch.no_grad():
        trainer.model.get_base_model().model.norm.weight[0] += 1e-6
    with pytest.raises(BrokenInvariant, match=r"norm.weight changed"):
        guard.on_step_end(*where)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_checksum_sees_one_bit(dtype: torch.dtype) -> None:
    """Broken once: values summed, not bits."""
    model = torch.nn.Linear(64, 64).to(dtype)
    before = checksums(model)
    assert before.keys() == {"weight", "bias"}
    bits = model.weight.detach().view(torch.int32 if dtype == torch.float32 else torch.int16)
    bits[1, 2] ^= 1
    now = checksums(model)
    assert now["weight"] != before["weight"] and now["bias"] == before["bias"]


def test_checksum_sees_order_and_buffers() -> None:
    """Broken once: bits summed without their places; parts' places left out; buffers left out.

    The elements that change places have no bits in their lower halves, as of loaded bfloat16, and
    lie a power of two apart.
    """
    model = torch.nn.BatchNorm1d(2 * BITS_AT_ONCE).float()
    torch.nn.init.normal_(model.weight)
    with torch.no_grad():
        model.weight.copy_(model.weight.bfloat16())
    model.register_buffer("cached", torch.zeros(1), persistent=False)
    before = checksums(model)
    assert before.keys() == {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}
    for distance in (1, 1 << 15, BITS_AT_ONCE):
        rows = model.weight.detach()
        swapped = rows[[distance, 0]]
        assert swapped[0] != swapped[1]
        rows[[0, distance]] = swapped
        now = checksums(model)
        assert now.pop("weight") != before["weight"]
        assert now.items() <= before.items()
        rows[[0, distance]] = swapped.flip(0)
    assert checksums(model) == before
    model.running_var[3] += 1e-6
    assert checksums(model)["running_var"] != before["running_var"]
    assert checksums(model, trainable=False).keys() == before.keys() - {"weight", "bias"}
