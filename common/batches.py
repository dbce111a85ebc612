"""Conversations as padded batches of ids, for sampling and for scoring."""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

Chat = list[dict[str, str]]
BATCH = 256


def render(
    tokenizer: PreTrainedTokenizerBase, chats: list[Chat], *, ask: bool = False
) -> list[list[int]]:
    """Ids of each conversation by the chat template; `ask` opens the assistant's next turn."""
    if not chats:
        return []
    rows: Any = tokenizer.apply_chat_template(chats, add_generation_prompt=ask, return_dict=False)
    return rows


def by_length(
    rows: list[list[int]], size: int = BATCH, max_tokens: int | None = None
) -> Iterator[list[int]]:
    """Places of rows, shortest first, in batches of at most `size`: little is padded.

    With `max_tokens` a batch has no more of them, padding included, unless it is of one row.
    """
    batch: list[int] = []
    for place in sorted(range(len(rows)), key=lambda place: len(rows[place])):
        tokens = len(rows[place]) * (len(batch) + 1)
        if len(batch) == size or (batch and max_tokens and tokens > max_tokens):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def pad(
    rows: list[list[int]], pad_token_id: int, side: Literal["left", "right"], device: torch.device
) -> tuple[Tensor, Tensor]:
    """(B, T) int64 ids and their (B, T) int64 mask, 1 = real."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad_token_id)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        where = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[place, where] = torch.tensor(row)
        mask[place, where] = 1
    return ids.to(device), mask.to(device)
