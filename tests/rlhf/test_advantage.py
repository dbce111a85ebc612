"""KL reward, GAE and whitening against slow loops and figures worked by hand."""

import torch

from rlhf.advantage import (
    gae,
    masked_moments,
    normalise_scores,
    token_rewards,
    whiten,
)


def prefix_mask(lengths: list[int], steps: int) -> torch.Tensor:
    return torch.arange(steps) < torch.tensor(lengths)[:, None]


def test_gae_equals_the_explicit_double_sum() -> None:
    """Broken once: V after the last token taken from the padding instead of 0."""
    torch.manual_seed(0)
    lengths, steps, gamma, lam = [5, 1, 3, 0], 5, 0.9, 0.8
    rewards, values = torch.randn(4, steps), torch.randn(4, steps)
    mask = prefix_mask(lengths, steps)
    advantages, returns = gae(rewards * mask, values, mask, gamma, lam)
    for b, length in enumerate(lengths):
        for t in range(steps):
            expected = 0.0
            for k in range(t, length):
                following = float(values[b, k + 1]) if k + 1 < length else 0.0
                delta = float(rewards[b, k]) + gamma * following - float(values[b, k])
                expected += (gamma * lam) ** (k - t) * delta
            assert abs(float(advantages[b, t]) - expected) < 1e-5
            wanted = expected + float(values[b, t]) if t < length else 0.0
            assert abs(float(returns[b, t]) - wanted) < 1e-5


def test_lambda_one_returns_are_rewards_to_go() -> None:
    """Broken once: lambda left out of the recursion."""
    mask = prefix_mask([3], 4)
    _, returns = gae(torch.tensor([[1.0, 2.0, 4.0, 0.0]]), torch.randn(1, 4), mask, 1.0, 1.0)
    torch.testing.assert_close(returns, torch.tensor([[7.0, 6.0, 4.0, 0.0]]))


def test_score_sits_on_the_last_real_token() -> None:
    """Broken once: score placed one past the end (TRL 1.12), and at the last column."""
    mask = prefix_mask([2, 4, 1], 4)  # finished by EOS, truncated, EOS at once
    scores = torch.tensor([1.0, 2.0, 3.0])
    rewards = token_rewards(scores, torch.zeros(3, 4), None, mask, 0.1)
    expected = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 2], [3, 0, 0, 0]])
    torch.testing.assert_close(rewards, expected.float())


def test_kl_penalty_counts_completion_tokens_only() -> None:
    """Broken once: penalty of the padding kept; sign turned."""
    mask = prefix_mask([2], 3)
    logprobs, ref = torch.tensor([[-1.0, -2.0, -9.0]]), torch.tensor([[-1.5, -3.0, -1.0]])
    rewards = token_rewards(torch.tensor([2.0]), logprobs, ref, mask, 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 1.9, 0.0]]))


def test_k1_is_the_exact_kl_in_the_mean() -> None:
    """Broken once: k2 = log-ratio squared / 2 in its place, which is biased."""
    torch.manual_seed(0)
    policy, ref = torch.randn(5).log_softmax(-1), torch.randn(5).log_softmax(-1)
    exact = (policy.exp() * (policy - ref)).sum()
    mask = torch.ones(5, 1, dtype=torch.bool)
    per_token = -token_rewards(torch.zeros(5), policy[:, None], ref[:, None], mask, 1.0)
    torch.testing.assert_close((policy.exp() * per_token[:, 0]).sum(), exact)
    samples = torch.multinomial(policy.exp(), 200_000, replacement=True)
    estimate = per_token[samples, 0]
    error = estimate.std() / len(samples) ** 0.5
    assert abs(estimate.mean() - exact) < 4 * error


def test_scores_are_normalised_then_clipped() -> None:
    """Broken once: clipped before dividing."""
    scores = normalise_scores(torch.tensor([3.0, 100.0]), 1.0, 2.0, (-10.0, 10.0))
    assert scores.tolist() == [1.0, 10.0]


def test_whitening_over_two_processes_equals_one() -> None:
    """Broken once: each process used its own moments (TRL 1.12); padding counted."""
    torch.manual_seed(0)
    x, mask = torch.randn(6, 5) * 3 + 1, prefix_mask([5, 2, 1, 4, 3, 5], 5)
    moments = masked_moments(x[:2], mask[:2]) + masked_moments(x[2:], mask[2:])
    parts = torch.cat([whiten(x[:2], mask[:2], moments), whiten(x[2:], mask[2:], moments)])
    kept = x[mask]
    expected = (kept - kept.mean()) / kept.std(correction=0)
    torch.testing.assert_close(parts[mask], expected, rtol=1e-5, atol=1e-5)
    assert not parts[~mask].any()
