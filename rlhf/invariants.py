"""What must hold in every PPO run, checked while it runs; a breach stops it in one line.

| holds | checked |
|---|---|
| pad differs from end-of-text | before the start (`rlhf.prompts.check_inputs`) |
| policy = rollout's policy: ratio 1, clip fraction 0, KL 0 | first optimizer step on a rollout |
| policy = reference: KL 0 | the first update of a run |
| the score sits on the last real token | every rollout |
| the reference's weights are those of the start | every update |
| all processes have the same weights | every update, unless they are sharded |
"""

from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from common.sharded import SHARDED
from rlhf.loss import policy_stats
from rlhf.rollout import Rollout

BITS_AT_ONCE = 1 << 20  # elements of a weight, which are eight bytes each while they are summed
SAME_WIDTH = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class BrokenInvariant(RuntimeError):
    """A run that would train on something wrong; the message says what, and where."""


@dataclass(frozen=True)
class Tolerance:
    """How far two forward passes of the same weights on the same tokens may differ.

    Eager passes agree to the last bit in float32 and in bfloat16, with and without activation
    checkpointing. torch.compile makes one kernel with gradients and another without. Measured
    (4 layers, 24 tokens, CPU): largest log-ratio 1.9e-6 in float32, 0.057 in bfloat16, there with a
    mean of 4.6e-4. One token of bfloat16 is allowed 0.5, that is two logits between 16 and 32 being
    two steps (2 x 0.125) apart, but the means are held far below what dropout or another
    temperature gives (approx_kl 0.01 and more).
    """

    logratio: float
    clipfrac: float
    approx_kl: float


TOLERANCES = {
    torch.float32: Tolerance(1e-4, 0.0, 1e-6),  # approx_kl itself rounds at 1e-7
    torch.bfloat16: Tolerance(0.5, 0.01, 1e-3),
    torch.float16: Tolerance(0.1, 0.01, 1e-4),
}


def check_same_policy(
    logprobs: Tensor,
    others: Tensor,
    mask: Tensor,
    clip: tuple[float, float],
    dtype: torch.dtype,
    which: str,
    where: str,
) -> None:
    """Two policies that must be one: log-ratio, clip fraction and KL are 0.

    Args:
        logprobs: (B, T) float.
        others: (B, T) float, of the same tokens.
        mask: (B, T) bool.
        clip: how far below and above 1 a ratio counts as clipped.
        dtype: of the forward passes.
        which: the two policies, for the message.
        where: for the message.
    """
    if not mask.any():
        return
    stats = policy_stats(logprobs[mask], others[mask], *clip)
    allowed = TOLERANCES[dtype]
    found = {
        "logratio": stats["logratio"].abs().max().item(),
        "clipfrac": stats["clipfrac"].mean().item(),
        "approx_kl": stats["approx_kl"].mean().item(),
    }
    if any(not value <= getattr(allowed, name) for name, value in found.items()):  # NaN is broken
        figures = ", ".join(f"{name} {value:.2e}" for name, value in found.items())
        raise BrokenInvariant(
            f"{which} differ at {where}: {figures} instead of 0 "
            "(dropout, temperature, precision or weights)"
        )


def check_score_position(
    rollout: Rollout,
    completion_ids: list[list[int]],
    scores: Tensor,
    kl_coef: float,
    where: str,
) -> None:
    """The rewards without the KL penalty are the scores, each on its completion's last token.

    Args:
        rollout: with log-probabilities of policy and reference, and rewards.
        completion_ids: B lists, as they were sampled.
        scores: (B,) float.
        kl_coef: weight of the penalty.
        where: for the message.
    """
    penalty = kl_coef * (rollout.logprobs - rollout.ref_logprobs)
    rest = rollout.rewards + penalty * rollout.completion_mask  # (B, T)
    rows = torch.arange(len(scores), device=scores.device)
    last = torch.tensor([len(ids) - 1 for ids in completion_ids], device=scores.device)
    on_last = rest[rows, last]
    rest[rows, last] = 0.0
    tokens = rollout.input_ids[rows, rollout.prompt_lengths + last]
    sampled = torch.tensor([ids[-1] for ids in completion_ids], device=scores.device)
    rounding = 1e-5 * (1 + scores.abs() + penalty.abs().amax(1))
    good = (on_last - scores).abs() <= rounding
    good &= (rest.abs().amax(1) <= rounding) & (tokens == sampled)
    if not good.all():
        row = int((~good).nonzero()[0])
        raise BrokenInvariant(
            f"score {scores[row]:.4g} of completion {row} is not on its last token "
            f"({int(last[row]) + 1} of {rest.shape[1]}) at {where}: {on_last[row]:.4g} is there"
        )


def checksums(model: nn.Module, trainable: bool | None = None) -> dict[str, Tensor]:
    """For each parameter and each buffer that is saved a figure of its bits, () int64, exact.

    Args:
        model: whose parameters; of sharded ones, the shards that are here.
        trainable: only those that train, or only those that don't; None = all.
    """
    state = model.state_dict(keep_vars=True)
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: checksum(tensor.detach())
        for name, tensor in named.items()
        if name in state and trainable in (None, tensor.requires_grad)
    }


def checksum(tensor: Tensor) -> Tensor:
    """Sum of its elements' bits, as integers, times 1, 3, 5, ..., () int64.

    It changes with any one element, and with any two that change places.
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    bits = local.contiguous().view(SAME_WIDTH[local.element_size()]).flatten()
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for place, part in enumerate(bits.split(BITS_AT_ONCE)):
        first = 2 * place * BITS_AT_ONCE + 1
        weights = torch.arange(first, first + 2 * len(part), 2, device=bits.device)
        total += (part * weights).sum()
    return total


def check_unchanged(before: dict[str, Tensor], now: dict[str, Tensor], where: str) -> None:
    """The frozen weights are those of the start."""
    if not before:
        return
    changed = torch.stack(list(before.values())) != torch.stack(list(now.values()))
    if changed.any():
        name = list(before)[int(changed.nonzero()[0])]
        raise BrokenInvariant(f"the reference's {name} changed, at {where}: it must stay frozen")


def check_processes_agree(accelerator: Accelerator, now: dict[str, Tensor], where: str) -> None:
    """Every process has the same weights; sharded ones are not compared."""
    if accelerator.num_processes == 1 or accelerator.distributed_type in SHARDED:
        return
    sums = accelerator.gather(torch.stack(list(now.values()))[None])  # (processes, parameters)
    differs = (sums != sums[0]).any(0)
    if differs.any():
        name = list(now)[int(differs.nonzero()[0])]
        raise BrokenInvariant(f"processes have different weights in {name}, at {where}")
