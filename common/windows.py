"""Which stretches of a token file a step trains on, and which the evaluation reads.

Both are pure functions, so a resumed run and any number of processes see the same data.
"""

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from common.token_file import JoinedTokens, TokenFile

Tokens = NDArray[np.unsignedinteger] | JoinedTokens
LOOKED_THROUGH = 1 << 22  # tokens at a time, so that memory does not grow with the text
LOOKED_BACK = 64  # windows in which a document's beginning is looked for


def training_starts(
    token_count: int, block_size: int, step: int, batch_size: int, seed: int
) -> NDArray[np.int64]:
    """Where the windows of a step start: (batch_size,) int64.

    Every epoch cuts the file into windows of `block_size` (+ 1 for the last target) from a new
    random offset and goes through them in a new random order.
    """
    windows = (token_count - 1) // block_size - 1  # one less: room for the offset
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array(
        [_epoch(windows, block_size, int(p) // windows, seed)[int(p) % windows] for p in places]
    )


@lru_cache(maxsize=2)
def _epoch(windows: int, block_size: int, epoch: int, seed: int) -> NDArray[np.int64]:
    generator = np.random.default_rng([seed, epoch])
    offset = int(generator.integers(block_size))
    return generator.permutation(windows) * block_size + offset


def back_to_beginnings(
    tokens: Tokens, starts: NDArray[np.int64], block_size: int, bos_token_id: int
) -> NDArray[np.int64]:
    """Each start moved back to a whole number of windows behind its document's beginning: (B,).

    A window that begins inside a document shows facts whose name was cut off, which cannot be
    learned, only guessed. Of a long document every whole window is read in every epoch, and what is
    left at its end, like a short document, as often as it is long. Text without documents, and what
    is more than `LOOKED_BACK` windows behind its beginning, stays where it is.

    With bos 1, tokens 1 8 9 8 7 1 8 and windows of 3, starts 2, 4 and 6 become 0, 3 and 5.
    """
    moved = starts.copy()
    for row, start in enumerate(starts):
        stretch = np.asarray(tokens[max(0, start + 1 - LOOKED_BACK * block_size) : start + 1])
        begins = np.flatnonzero(stretch == bos_token_id)
        if len(begins):
            moved[row] -= (len(stretch) - 1 - begins[-1]) % block_size
    return moved


def document_begins(tokens: Tokens, bos_token_id: int) -> NDArray[np.int64]:
    """Where documents begin in the whole text: (documents,) int64."""
    found = [
        first + np.flatnonzero(tokens[first : first + LOOKED_THROUGH] == bos_token_id)
        for first in range(0, len(tokens), LOOKED_THROUGH)
    ]
    return np.concatenate(found)


def source_documents(
    file: TokenFile, starts: NDArray[np.int64], block_size: int, bos_token_id: int
) -> list[int]:
    """Which documents the windows at `starts` touch, counted from 0; none in one stream of text.

    Documents of 3 tokens each: a window of 3 at token 2 has targets up to 5, in 0 and 1.
    """
    begins = document_begins(file.tokens, bos_token_id)
    if not len(begins):
        return []
    begins = begins[:: len(begins) // file.info.documents]  # every second, where eos is bos too
    first = np.searchsorted(begins, starts, side="right") - 1
    last = np.searchsorted(begins, starts + block_size, side="right") - 1  # of the last target
    return sorted({n for a, b in zip(first, last, strict=True) for n in range(a, b + 1)})


def document_positions(inputs: torch.Tensor, bos_token_id: int) -> torch.Tensor:
    """Where each token stands in its document, counted within the row: (B, T) int64.

    Given to the model as `position_ids`, they keep attention inside a document: where positions
    restart, transformers' masks (and `common.gpt_base.build_mask`) begin a new block. A row that
    begins inside a document counts from its own first token.

    With bos 1, the rows 8 9 1 8 and 1 8 9 8 give 0 1 0 1 and 0 1 2 3.
    """
    places = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)  # (B, T)
    begins = torch.where(inputs == bos_token_id, places, 0)
    return places - begins.cummax(dim=-1).values


def evaluation_spans(tokens: Tokens, block_size: int, bos_token_id: int) -> list[tuple[int, int]]:
    """Spans (first input, end of inputs) in which every token but the first is a target once.

    A span ends where a document begins, if one does within `block_size`, so that documents that
    fit are read from their own beginning; a text without documents is cut every `block_size`.
    """
    begins = document_begins(tokens, bos_token_id)
    spans, start, last = [], 0, len(tokens) - 1
    while start < last:
        end = min(start + block_size, last)
        if end < last:
            inside = begins[np.searchsorted(begins, end, side="right") - 1] if len(begins) else 0
            end = int(inside) if inside > start else end
        spans.append((start, end))
        start = end
    return spans
