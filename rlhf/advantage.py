"""From scores and log-probabilities to advantages: KL penalty, GAE, whitening.

Pure functions on right-padded (B, T) grids of completion tokens; a mask is True where a token
counts.
"""

import torch
from torch import Tensor


def normalise_scores(
    scores: Tensor, mean: float, std: float, clip: tuple[float, float] | None
) -> Tensor:
    """Scores (B,) on the unit scale of the starting policy: (score - mean) / std, clipped."""
    scores = (scores - mean) / std
    return scores if clip is None else scores.clamp(*clip)


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    mask: Tensor,
    kl_coef: float,
) -> Tensor:
    """Per-token rewards: the KL penalty everywhere, the score on the last real token.

    The penalty is k1, log pi(a|s) - log pi_ref(a|s): its mean over samples of pi is the KL.
    Example: mask [1, 1, 0], score 2, log-ratios [0.5, 1, -], kl_coef 0.1 -> [-0.05, 1.9, 0].

    Args:
        scores: (B,) float, one per completion.
        logprobs: (B, T) float, of the policy that sampled.
        ref_logprobs: (B, T) float, of the reference; None = no penalty.
        mask: (B, T) bool, completion tokens, EOS included.
        kl_coef: weight of the penalty.

    Returns:
        (B, T) float, zero outside the mask.
    """
    rewards = torch.zeros_like(logprobs)
    if ref_logprobs is not None:
        rewards = -kl_coef * (logprobs - ref_logprobs)
    steps = torch.arange(mask.shape[1], device=mask.device)
    last = mask & (steps == mask.sum(1, keepdim=True) - 1)  # (B, T)
    return torch.where(mask, rewards, 0.0) + torch.where(last, scores[:, None], 0.0)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation; the value after the last real token is 0.

    delta_t = r_t + gamma V_{t+1} - V_t;  A_t = delta_t + gamma lambda A_{t+1}  (arXiv 1506.02438).

    Args:
        rewards: (B, T) float.
        values: (B, T) float, V of the state in which token t was chosen.
        mask: (B, T) bool, True on a prefix of each row.
        gamma: discount.
        gae_lambda: lambda.

    Returns:
        advantages and returns (advantages + values), (B, T) float, zero outside the mask.
    """
    values = torch.where(mask, values, 0.0)
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])  # (B,)
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        next_advantage = torch.where(mask[:, t], delta + gamma * gae_lambda * next_advantage, 0.0)
        next_value = values[:, t]
        advantages[:, t] = next_advantage
    return advantages, advantages + values


def adapted_kl_coef(
    kl_coef: float, kl: float, target: float, completions: int, horizon: int
) -> float:
    """The KL coefficient of the next update, nearer to the one that holds KL at its target.

    e = clip(kl / target - 1, -0.2, 0.2);  next = kl_coef (1 + e completions / horizon)
    (arXiv 1909.08593, section 2.2; `lm-human-preferences`, `AdaptiveKLController`).
    Example: kl 12 of a target of 10, 1,000 of a horizon of 10,000 -> 0.1 becomes 0.102.

    Args:
        kl_coef: of the update just taken.
        kl: of its rollout, nats a completion.
        target: where kl should be, above 0.
        completions: of the rollout, over all processes.
        horizon: completions over which a coefficient moves by the whole (clipped) error.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * completions / horizon)


def masked_moments(x: Tensor, mask: Tensor) -> Tensor:
    """Count, sum and sum of squares of the masked entries, (3,) float64.

    Moments of several processes add up, so their sum gives the mean and variance of all.
    """
    kept = x[mask].double()
    return torch.stack([kept.new_tensor(kept.numel()), kept.sum(), kept.square().sum()])


def mean_and_variance(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and population variance, () float64 each, from `masked_moments`."""
    count, total, squares = moments
    mean = total / count.clamp(min=1)
    return mean, (squares / count.clamp(min=1) - mean.square()).clamp(min=0)


def whiten(x: Tensor, mask: Tensor, moments: Tensor) -> Tensor:
    """Shift and scale (B, T) to mean 0 and variance 1 under `moments`; zero outside the mask."""
    mean, variance = mean_and_variance(moments)
    whitened = (x - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened, 0.0).to(x.dtype)
