"""How a trainer's policy samples: faster than transformers' loop, by the same probabilities."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from common.decoding import sample_unended
from common.device import has_bf16
from common.generation import plain_sampling
from common.graph_decoding import GraphSampler
from common.sharded import SHARDED
from rlhf.critic import plain_policy, take_weights


def sample_fast(trainer: Any, graph: bool) -> None:
    """Let a trainer's policy sample by its own probabilities, by `sample_unended` or a graph.

    An answer ends by the tokenizer's end token alone, as the chat template writes it and as answers
    are scored and measured; TRL would end it by every one that the checkpoint lists.

    By neither where processes share its weights: there all must take each forward pass, so none
    ends before the others.
    """
    policy = trainer.model
    policy.generation_config = plain_sampling(policy.generation_config)
    trainer.eos_token_ids = [trainer.processing_class.eos_token_id]
    trainer.generation_config.eos_token_id = trainer.eos_token_ids
    if trainer.accelerator.distributed_type not in SHARDED:
        sample = graph_sampler(policy) if graph else sample_unended
        policy.generate = partial(policy.generate, custom_generate=sample)


def graph_sampler(policy: Any) -> Callable[..., Tensor]:
    """A `custom_generate` that replays a graph of a copy, in bfloat16 where that is fast.

    The copy halves what a step reads and takes the policy's weights before each rollout. A rollout
    is trained on by the log-probabilities that the policy itself gives it.
    """
    plain: Any = plain_policy(policy)
    plain = plain.to(torch.bfloat16) if has_bf16() else plain
    sampler = GraphSampler()

    def sample(model: Any, input_ids: Tensor, *rules: Any, **named: Any) -> Tensor:
        take_weights(plain, policy)
        return sampler(plain, input_ids, *rules, **named)

    return sample
