"""A rollout: prompts and sampled completions, joined, right-padded, cut into micro-batches.

Prompt and completion sit side by side, all padding at the right, where a causal model cannot see
it: no attention mask, no left padding, positions from 0 in any model. Completion tokens live on a
(B, T) grid. Token t of row b is `input_ids[b, prompt_lengths[b] + t]`, chosen in the state before
it, at column `prompt_lengths[b] + t - 1`.
"""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Rollout:
    """Tokens of B samples and what was computed on them; grids are (B, T), filled as they come."""

    input_ids: Tensor  # (B, L) long
    prompt_lengths: Tensor  # (B,) long
    completion_mask: Tensor  # (B, T) bool, real completion tokens, EOS included
    train_mask: Tensor  # (B, T) bool, those that count in the loss
    logprobs: Tensor  # (B, T) of the policy that sampled
    ref_logprobs: Tensor  # (B, T)
    entropy: Tensor  # (B, T)
    values: Tensor  # (B, T)
    rewards: Tensor  # (B, T) KL penalty included
    advantages: Tensor  # (B, T)
    returns: Tensor  # (B, T)

    @property
    def lengths(self) -> Tensor:
        """Tokens of prompt and completion, (B,) long."""
        return self.prompt_lengths + self.completion_mask.sum(1)

    def select(self, rows: Tensor) -> "Rollout":
        """The samples `rows`, (b,) long, with every column that is only padding cut off."""
        width = int(self.lengths[rows].max())
        steps = int(self.completion_mask[rows].sum(1).max())
        fields = {f.name: getattr(self, f.name)[rows] for f in dataclasses.fields(self)}
        for name, tensor in fields.items():
            if tensor.dim() == 2:
                fields[name] = tensor[:, : width if name == "input_ids" else steps]
        return Rollout(**fields)

    def fill(self, name: str, rows: Tensor, part: Tensor) -> None:
        """Write a selection's grid, (b, t) with t <= T, back to its rows."""
        getattr(self, name)[rows, : part.shape[1]] = part


def join(
    prompt_ids: list[list[int]],
    completion_ids: list[list[int]],
    pad_token_id: int,
    device: torch.device | str = "cpu",
) -> Rollout:
    """Lay out B prompts and their completions, given as token ids, as an empty rollout."""
    joined = [torch.tensor(p + c) for p, c in zip(prompt_ids, completion_ids, strict=True)]
    input_ids = torch.nn.utils.rnn.pad_sequence(
        joined, batch_first=True, padding_value=pad_token_id
    )
    lengths = torch.tensor([len(c) for c in completion_ids], device=device)
    mask = torch.arange(int(lengths.max()), device=device) < lengths[:, None]  # (B, T)
    grids = [torch.zeros(mask.shape, device=device) for _ in range(7)]
    prompt_lengths = torch.tensor([len(p) for p in prompt_ids], device=device)
    return Rollout(input_ids.to(device), prompt_lengths, mask, mask.clone(), *grids)


def plan_micro_batches(
    lengths: Tensor, num_mini_batches: int, micro_batch_size: int
) -> list[list[Tensor]]:
    """Draw an epoch: each sample once, in random mini-batches, each cut by length.

    Sorting inside a mini-batch keeps padding low and does not change what the optimizer step sums.
    Example: 8 samples, 2 mini-batches, micro-batches of 2 -> 2 lists of 2 tensors of 2 rows.

    Args:
        lengths: (B,) long, tokens of each sample.
        num_mini_batches: optimizer steps; divides B.
        micro_batch_size: samples a forward pass.

    Returns:
        For each mini-batch, its micro-batches' rows, (micro_batch_size,) long each.
    """
    order = torch.randperm(len(lengths)).to(lengths.device)
    plan = []
    for rows in order.chunk(num_mini_batches):
        rows = longest_first(rows, lengths)
        plan.append(list(rows.split(micro_batch_size)))
    return plan


def plan_reading(lengths: Tensor, plan: list[list[Tensor]], batch_size: int) -> list[Tensor]:
    """The batches in which a rollout is read, without gradients, before it is trained on.

    The first mini-batch as it will be trained on, so that its ratio is exactly 1; the others
    together, by length, `batch_size` rows at a time.

    Args:
        lengths: (B,) long, tokens of each sample.
        plan: of the first epoch, as of `plan_micro_batches`.
        batch_size: samples a forward pass.
    """
    first, *others = plan
    if not others:
        return first
    rows = torch.cat([rows for mini_batch in others for rows in mini_batch])
    rows = longest_first(rows, lengths)
    return [*first, *rows.split(batch_size)]


def longest_first(rows: Tensor, lengths: Tensor) -> Tensor:
    """The samples `rows` by their `lengths`, so that those that go together need little padding."""
    return rows[lengths[rows].argsort(descending=True, stable=True)]
