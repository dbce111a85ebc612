"""Sampling on a GPU in which a step is one launch, not hundreds.

A decoding step is many small kernels, and Python starts them more slowly than a GPU ends them. Here
the step is recorded once as a CUDA graph, over buffers that stay where they are, and then replayed:
keys and values of fixed size, the newest token, its position, what it may look at. On a CPU the
same code runs unrecorded, so that it can be tested there; `common/decoding.py` is faster there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache

from common.decoding import draw, prompt_mask

SLOTS = 64  # cache lengths are multiples, so that batches of like lengths share a recording
HIDDEN = -1e4  # added to a score: e to that is 0, and no type makes an infinity of it
CHECKED_EVERY = 8  # steps; asking whether all rows have ended waits for the GPU


@dataclass
class Recording:
    """A step's buffers and the step itself, for one batch size B and cache length S."""

    cache: StaticCache
    tokens: Tensor  # (B, 1), the newest
    positions: Tensor  # (B, 1)
    mask: Tensor  # (B, 1, 1, S), added to the scores: 0 for what may be looked at
    logits: Tensor  # (B, V), what the step leaves
    step: Callable[[], None]


class GraphSampler:
    """A `custom_generate` for transformers' `generate`, greedy or drawn; its rules and limits.

    One model's recordings are kept for as long as the sampler: its weights may change in place
    between calls, and are read where they are.
    """

    def __init__(self) -> None:
        self.recordings: dict[tuple[int, int], Recording] = {}

    @torch.no_grad()
    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        **model_kwargs: Any,
    ) -> Tensor:
        """Sample as `sample_unended` does; rows that have ended are padded until all have.

        Args:
            model: the same in every call.
            input_ids: (B, P), padded on the left; the rest as `generate` passes it.

        Returns:
            (B, P + T) ids; some columns at the end may be padding alone.
        """
        rows, width = input_ids.shape
        limit = generation_config.max_length
        sequences = input_ids.new_full((rows, limit), generation_config.pad_token_id)
        sequences[:, :width] = input_ids
        ended = torch.zeros(rows, dtype=torch.bool, device=input_ids.device)
        slots = -(-limit // SLOTS) * SLOTS
        if (rows, slots) not in self.recordings:
            self.recordings[rows, slots] = record(model, rows, slots)
        at = self.recordings[rows, slots]
        logits = prefill(model, at, input_ids, prompt_mask(input_ids, model_kwargs))
        length = width
        while True:
            scores = logits_processor(sequences[:, :length], logits.float())
            new = draw(scores, generation_config.do_sample)
            new = new.masked_fill(ended[:, None], generation_config.pad_token_id)
            sequences[:, length] = new[:, 0]
            length += 1
            ended |= stopping_criteria(sequences[:, :length], None)
            if length == limit or ((length - width) % CHECKED_EVERY == 0 and ended.all()):
                return sequences[:, :length]
            at.tokens.copy_(new)
            at.positions += 1
            at.mask[..., length - 1] = 0
            at.step()
            logits = at.logits


def prefill(model: Any, at: Recording, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """Read the prompts into the cache; logits of what follows, (B, V).

    Args:
        model: the one that `at` was recorded of.
        at: its buffers are made ready for the first step.
        input_ids: (B, P), padded on the left.
        attention_mask: (B, P), 0 for padding.
    """
    rows, width = input_ids.shape
    known = attention_mask.bool()[:, None, None, :]  # (B, 1, 1, P)
    causal = torch.ones(width, width, dtype=torch.bool, device=input_ids.device).tril()
    mask = at.mask.new_full((rows, 1, width, at.mask.shape[-1]), HIDDEN)
    mask[..., :width].masked_fill_(known & causal, 0)
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0)
    at.cache.reset()
    outputs = model(
        input_ids=input_ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=at.cache,
        use_cache=True,
        logits_to_keep=1,
    )
    at.mask.fill_(HIDDEN)
    at.mask[..., :width].masked_fill_(known, 0)
    at.positions.copy_(positions[:, -1:])
    return outputs.logits[:, -1]


def record(model: Any, rows: int, slots: int) -> Recording:
    """Buffers for `rows` rows of up to `slots` tokens; on a GPU the step as a graph over them."""
    device, dtype = model.device, model.dtype
    zeros = torch.zeros(rows, 1, dtype=torch.long, device=device)
    at = Recording(
        cache=StaticCache(model.config, max_cache_len=slots),
        tokens=zeros,
        positions=zeros.clone(),
        mask=torch.zeros(rows, 1, 1, slots, dtype=dtype, device=device),
        logits=torch.zeros(rows, model.config.vocab_size, device=device),
        step=lambda: None,
    )

    # Autocast keeps its copies of the weights until it ends; a recorded step would read them after
    kind = device.type
    low, casts = torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)

    def step() -> None:
        with torch.autocast(kind, low, enabled=casts, cache_enabled=False):
            outputs = model(
                input_ids=at.tokens,
                attention_mask=at.mask,
                position_ids=at.positions,
                past_key_values=at.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        at.logits.copy_(outputs.logits[:, -1])

    at.step = step
    if device.type == "cuda":
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):  # what allocates at the first call must not be recorded
            step()
            step()
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step()
        at.step = graph.replay
    return at
