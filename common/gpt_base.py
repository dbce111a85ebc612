"""What the two shapes of the GPT share: attention step by step, the mask, the head.

Read `common/gpt.py` first; `common/lesson_gpt.py` is the other shape. Each class bears a name of
its own here and transformers' name on disk, so that a checkpoint needs none of this code.
"""

import sys
from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.masking_utils import create_causal_mask
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils import can_return_tuple

AutoClass = type[AutoModel | AutoModelForCausalLM | AutoModelForSequenceClassification]
ModelClass = TypeVar("ModelClass", bound=type[PreTrainedModel])
Projection = TypeVar("Projection", bound=nn.Module)


def loads_as(name: str, auto_class: AutoClass) -> Callable[[ModelClass], ModelClass]:
    """Class decorator: saved as transformers' class `name`, and loaded in its place here.

    `__name__` is what `save_pretrained` writes as the checkpoint's architecture. The Auto classes
    go by their registry, but TRL looks the name up in the transformers package: hence `setattr`.
    transformers replaces its own module object when `processing_utils` is loaded, so TRL, if it
    came before us, may hold the old one.
    """

    def register(cls: ModelClass) -> ModelClass:
        cls.__name__ = name
        auto_class.register(cls.config_class, cls, exist_ok=True)
        setattr(sys.modules["transformers"], name, cls)
        if "trl.trainer.utils" in sys.modules:
            setattr(sys.modules["trl.trainer.utils"].transformers, name, cls)
        return cls

    return register


def joins_stream(projection: Projection) -> Projection:
    """Mark the last projection of a branch: its weights start smaller (`GPTBase._init_weights`)."""
    projection.joins_stream = True  # type: ignore[assignment]  # a flag, not a weight
    return projection


def residual_stream(x: Tensor) -> Tensor:
    """The embeddings (B, T, H), to which every block adds; bfloat16 under a GPU's autocast.

    Autocast's products are bfloat16 but would be added up in the embeddings' float32: half the
    bytes to move, and 6% more tokens a second at GPT-2's smallest size (docs/pretrain.md).
    """
    narrow = x.is_cuda and torch.is_autocast_enabled("cuda")
    return x.to(torch.get_autocast_dtype("cuda")) if narrow else x


def explicit_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[Tensor, Tensor]:
    """softmax(q k^T / sqrt(D)) v, step by step: `attn_implementation="eager"`.

    Takes (B, heads, T, D) queries, (B, kv_heads, S, D) keys and values and an additive
    (B, 1, T, S) mask; returns (B, T, heads, D) and the (B, heads, T, S) weights.
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(-2, -1) * scaling  # (B, heads, T, S)
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def build_mask(
    config: PreTrainedConfig,
    x: Tensor,
    attention_mask: Tensor | dict[str, Tensor | None] | None,
    position_ids: Tensor | None,
    cache: Cache | None,
) -> Tensor | None:
    """Who may look at whom, (B, 1, T, S); None where PyTorch's kernel needs no telling.

    Causal, blind to padding, and blind across packed documents: with no `attention_mask`,
    `position_ids` that restart begin a new one. The common cases cost nothing: whole rows without
    padding, and the one new token of a decoding step, which sees all that is cached.
    """
    if isinstance(attention_mask, dict):  # made beforehand by `generate` for a static cache
        return attention_mask["full_attention"]
    if type(cache) is DynamicCache and cache.get_seq_length() == 0:
        cache = None  # nothing to see in it, and transformers looks for packing only without one
    if config._attn_implementation == "sdpa":
        if cache is None and attention_mask is None and position_ids is None:
            return None
        one_step = type(cache) is DynamicCache and x.shape[1] == 1
        if one_step and attention_mask is not None and attention_mask.ndim == 2:
            return None if attention_mask.all() else attention_mask[:, None, None, :].bool()
    # a flex BlockMask, where the attention implementation is flex: a tensor to us
    return cast("Tensor | None", create_causal_mask(config, x, attention_mask, cache, position_ids))


class GPTBase(PreTrainedModel):
    """What transformers must know of both shapes, and how their weights start."""

    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal(0, 0.02); smaller where a branch joins the residual stream, as in GPT-2.

        The stream sums 2 branches a layer: dividing by sqrt(2 layers) keeps its variance the same
        at any depth. `init` leaves alone the weights that `from_pretrained` has just loaded.
        """
        super()._init_weights(module)
        if getattr(module, "joins_stream", False):
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            init.normal_(module.get_parameter("weight"), std=std)

    def start_cache(self, use_cache: bool | None, cache: Cache | None) -> tuple[bool, Cache | None]:
        """Whether to cache, and the cache; by default not in training, where it is a waste."""
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        return use_cache, cache


class CausalHead:
    """The language model: backbone, then a logit for every word of the vocabulary."""

    @can_return_tuple
    def forward(
        self: PreTrainedModel,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: object,
    ) -> CausalLMOutputWithPast:
        """Return next-token logits (B, T, V) and, given `labels`, the loss.

        Args:
            input_ids: (B, T) int64, or `inputs_embeds` (B, T, H) in its place.
            attention_mask: (B, S) 1 for tokens, 0 for padding on either side; S counts the cached.
            position_ids: (B, T) int64; needed only where documents are packed into one row.
            past_key_values: the cache to read and extend.
            labels: (B, T) int64, -100 = ignored. Shifted in here: pass `input_ids` themselves.
            use_cache: return the cache; by default, outside training.
            logits_to_keep: only the last so many positions (0 = all), or these positions.
            **kwargs: passed on to the attention and the loss (`num_items_in_batch`).
        """
        outputs = self.base_model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        hidden = slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)
        logits = self.lm_head(hidden)  # (B, T, V)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
