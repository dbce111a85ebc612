"""PPO's two clipped losses, per token, and the figures that tell how they go.

Pure functions on (B, T) grids. They return one loss a token; who sums divides by the tokens of the
whole optimizer step, so that any split into micro-batches gives the same gradient.
"""

import torch
from torch import Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)) with r = pi / pi_old (arXiv 1707.06347).

    Args:
        logprobs: (B, T) float, of the policy being trained.
        old_logprobs: (B, T) float, of the policy that sampled.
        advantages: (B, T) float.
        clip_low: how far below 1 the ratio may gain.
        clip_high: how far above.

    Returns:
        (B, T) float.
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    return torch.maximum(-advantages * ratio, -advantages * clipped)


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip_range: float) -> Tensor:
    """Half the squared error, the worse of it with and without clipping around the old values.

    Args:
        values: (B, T) float, of the critic being trained.
        old_values: (B, T) float, of the critic at rollout.
        returns: (B, T) float, the targets.
        clip_range: how far a value may move from its old one; 0 = no clip.

    Returns:
        (B, T) float.
    """
    loss = (values - returns).square()
    if clip_range > 0:
        clipped = old_values + (values - old_values).clamp(-clip_range, clip_range)
        loss = torch.maximum(loss, (clipped - returns).square())
    return 0.5 * loss


@torch.no_grad()
def policy_stats(
    logprobs: Tensor, old_logprobs: Tensor, clip_low: float, clip_high: float
) -> dict[str, Tensor]:
    """Per-token figures, (B, T) each: logratio, approx_kl (k3 of old against new), clipfrac."""
    logratio = logprobs - old_logprobs
    ratio = logratio.exp()
    return {
        "logratio": logratio,
        "approx_kl": ratio - 1 - logratio,
        "clipfrac": ((ratio < 1 - clip_low) | (ratio > 1 + clip_high)).to(logprobs.dtype),
    }
