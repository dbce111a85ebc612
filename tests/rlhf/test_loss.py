"""The clipped losses in closed form."""

import torch

from rlhf.loss import policy_loss, policy_stats, value_loss


def grad_of_logprob(ratio: float, advantage: float) -> float:
    logprobs = torch.tensor([[ratio]]).log().requires_grad_()
    policy_loss(logprobs, torch.zeros(1, 1), torch.tensor([[advantage]]), 0.2, 0.2).sum().backward()
    return float(logprobs.grad)


def test_policy_gradient_stops_only_where_the_ratio_already_gained() -> None:
    """Broken once: minimum instead of maximum of the two losses."""
    cases = [(1.0, 1, -1.0), (1.5, 1, 0.0), (1.5, -1, 1.5), (0.5, -1, 0.0), (0.5, 1, -0.5)]
    for ratio, advantage, expected in cases:
        assert abs(grad_of_logprob(ratio, advantage) - expected) < 1e-6, (ratio, advantage)


def test_asymmetric_clip() -> None:
    """Broken once: low and high swapped."""
    old, advantages = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]])
    loss = policy_loss(torch.tensor([[2.0, 0.5]]).log(), old, advantages, 0.1, 0.3)
    torch.testing.assert_close(loss, torch.tensor([[-1.3, 0.9]]))


def test_value_clip_is_around_old_values_and_takes_the_worse() -> None:
    """Broken once: clip around the returns; minimum of both."""
    values, old = torch.tensor([[1.0, 1.0, 0.1]]), torch.tensor([[0.0, 0.0, 0.0]])
    returns = torch.tensor([[2.0, 0.0, 1.0]])
    loss = value_loss(values, old, returns, 0.2)
    # clipped values 0.2, 0.2, 0.1; errors 1 or 1.8 -> 1.8; 1 or 0.2 -> 1; 0.9
    expected = 0.5 * torch.tensor([[1.8**2, 1.0, 0.9**2]])
    torch.testing.assert_close(loss, expected)
    plain = value_loss(values, old, returns, 0.0)
    torch.testing.assert_close(plain, 0.5 * torch.tensor([[1.0, 1.0, 0.81]]))


def test_stats() -> None:
    """Broken once: clip fraction of one side only."""
    logprobs = torch.tensor([[2.0, 0.5, 1.1, 1.0]]).log()
    stats = policy_stats(logprobs, torch.zeros(1, 4), 0.2, 0.2)
    assert stats["clipfrac"].tolist() == [[1, 1, 0, 0]]
    expected = torch.tensor([[2 - 1 - 0.6931472, 0.5 - 1 + 0.6931472]])
    torch.testing.assert_close(stats["approx_kl"][:, :2], expected)
    assert float(stats["approx_kl"].min()) >= 0
