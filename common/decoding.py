"""Sampling in which a row that has ended takes no more time.

`generate` of transformers goes on with every row of a batch until its last one ends, though all
that comes of the others is padding. Of answers whose lengths differ that is half of the work or
more. Here a row leaves the batch and the cache as it ends; what is drawn has the same distribution.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Layers of which `batch_select_indices` selects all there is; others keep states that it leaves.
ROWS = (DynamicLayer, DynamicSlidingWindowLayer)


def sample_unended(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    **model_kwargs: Any,
) -> Any:
    """A `custom_generate` for transformers' `generate`, greedy or drawn; its rules and limits.

    Where rows cannot leave (a cache of fixed size, of recurrent states, or none) it is
    transformers' own loop.

    Args:
        input_ids: (B, P), padded on the left; the rest as `generate` passes it.

    Returns:
        (B, P + S) ids, S the longest row's steps; after its end a row has padding.
    """
    cache, mask = model_kwargs.get("past_key_values"), prompt_mask(input_ids, model_kwargs)
    if type(cache) is not DynamicCache or any(type(layer) not in ROWS for layer in cache.layers):
        rules = logits_processor, stopping_criteria, generation_config
        return model._sample(input_ids, *rules, **model_kwargs)
    rows, length = input_ids.shape
    shape = rows, generation_config.max_length
    sequences = input_ids.new_full(shape, generation_config.pad_token_id)
    sequences[:, :length] = input_ids
    left = torch.arange(rows, device=input_ids.device)  # rows that have not ended
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    new = input_ids
    while len(left):
        outputs = model(
            input_ids=new,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        scores = logits_processor(sequences[left, :length], outputs.logits[:, -1].float())
        new = draw(scores, generation_config.do_sample)
        sequences[left, length] = new[:, 0]
        length += 1
        stay = (~stopping_criteria(sequences[left, :length], None)).nonzero()[:, 0]
        if len(stay) < len(left):
            cache.batch_select_indices(stay)
            left, new, mask, positions = left[stay], new[stay], mask[stay], positions[stay]
        mask = torch.cat([mask, mask.new_ones(len(left), 1)], 1)
        positions = positions[:, -1:] + 1
    return sequences[:, :length]


def prompt_mask(input_ids: Tensor, model_kwargs: dict[str, Any]) -> Tensor:
    """Which of the prompts' tokens are not padding, (B, P); `generate` passes none if all are."""
    mask: Tensor | None = model_kwargs.get("attention_mask")
    return torch.ones_like(input_ids) if mask is None else mask


def draw(scores: Tensor, do_sample: bool) -> Tensor:
    """The next token of each row by its scores (B, V), (B, 1): drawn, or the likeliest."""
    if do_sample:
        return torch.multinomial(scores.softmax(-1), 1)
    return scores.argmax(-1, keepdim=True)
