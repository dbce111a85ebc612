"""The GPT, in full: the modern shape, and how to build it or the lesson's (`common/lesson_gpt.py`).

    config = build_config("modern", vocab_size=512, block_size=256, num_hidden_layers=4,
                          hidden_size=128, num_attention_heads=4,
                          pad_token_id=0, bos_token_id=1, eos_token_id=2)
    model = build_gpt(config)
    loss = model(input_ids, labels=input_ids).loss

Against "Let's build GPT": positions are a rotation of queries and keys instead of a learned table
(RoPE, arXiv:2104.09864); LayerNorm loses its mean and bias (RMSNorm, arXiv:1910.07467); queries and
keys are normalised (arXiv:2010.04245) and several queries share one key (arXiv:2305.13245); the MLP
is gated (SwiGLU, arXiv:2002.05202). Names and mathematics are Qwen3's: `save_pretrained` writes a
checkpoint that plain transformers reads. Importing this module makes `AutoModelForCausalLM` and
TRL, given a Qwen3 or GPT-2 checkpoint, load the classes written here.
"""

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    GPT2Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.output_capturing import capture_outputs

from common.errors import UserError
from common.gpt_base import (
    CausalHead,
    GPTBase,
    build_mask,
    explicit_attention,
    joins_stream,
    loads_as,
    residual_stream,
)
from common.gpt_config import build_config
from common.lesson_gpt import LessonGPT, LessonGPTForSequenceClassification

__all__ = [
    "GPT",
    "GPTForSequenceClassification",
    "LessonGPT",
    "LessonGPTForSequenceClassification",
    "build_config",
    "build_gpt",
]

# PyTorch says so of RMSNorm, whose weights stay in float32 under autocast, as they are meant to.
warnings.filterwarnings("ignore", "Mismatch dtype between input and weight")


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, over the last dimension."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x (..., size)."""
        by_hand = x.is_cpu and x.dtype != torch.float64 and torch.is_grad_enabled()
        if by_hand and not torch.compiler.is_compiling():
            return NormByHand.apply(x, self.weight, self.eps)
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


class NormByHand(torch.autograd.Function):
    """`F.rms_norm`, to the bit, with its gradient in one go.

    PyTorch has a kernel for it on GPUs; on a CPU it goes back through each operation, which takes
    nearly twice as long, forward included (docs/log.md). A second derivative is an error.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Return n * weight, of n = x / sqrt(mean(x^2) + eps), for x (..., size)."""
        wide = x.float()
        scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        normal = wide * scale
        ctx.save_for_backward(normal, scale, weight)
        return (normal * weight).type_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, None]:
        """Of x (g - n mean(g n)) * scale, where g is the gradient of n; of the weight its sum."""
        normal, scale, weight = ctx.saved_tensors
        gradient = gradients[0].float()
        inner = gradient * weight
        along = (inner * normal).mean(-1, keepdim=True)
        of_weight = None  # of a frozen one
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * normal).flatten(0, -2).sum(0)
        return inner.addcmul_(normal, along, value=-1).mul_(scale), of_weight, None


@torch.library.custom_op("folio::rotary_angles", mutates_args=())
def rotary_angles(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, (B, T, 1, D) float32, by which `rotate` turns a head at each position.

    Pair i of a head's D/2 pairs turns by position * theta^(-2i/D): the first pair fast, the last
    slowly, so that q . k depends on the distance between two tokens and not on where they stand.

    An operator to torch.compile, which would otherwise compute a cosine anew for each number of
    each head and layer that is turned by it: a third of a step on a CPU (docs/log.md).
    """
    twice_i = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32)
    speed = 1.0 / theta ** (twice_i / head_dim)  # (D/2,)
    angles = position_ids[:, :, None, None].float() * speed  # (B, T, 1, D/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


@rotary_angles.register_fake
def _(position_ids: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """What the compiler must know: the sizes."""
    sizes = *position_ids.shape, 1, head_dim
    angles = torch.empty(sizes, dtype=torch.float32, device=position_ids.device)
    return angles, torch.empty_like(angles)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of x (B, T, heads, D) by its angle.

    (a, b) becomes (a cos - b sin, b cos + a sin): `sin` carries the signs.
    """
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((b, a), dim=-1) * sin


class Attention(nn.Module):
    """Causal self-attention: every token gathers from those before it what it asks for."""

    def __init__(self, config: Qwen3Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads or heads
        self.num_key_value_groups = heads // kv_heads  # read by the attention implementations
        self.is_causal = True
        hidden, bias = config.hidden_size, config.attention_bias
        q_size, kv_size = heads * config.head_dim, kv_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, q_size, bias=bias)
        self.k_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.v_proj = nn.Linear(hidden, kv_size, bias=bias)
        self.o_proj = joins_stream(nn.Linear(q_size, hidden, bias=bias))
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: Cache | None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """Mix x (B, T, H) over time; also return the weights where the implementation has them."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim)  # (B, T, heads, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim)  # (B, T, kv_heads, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim)
        q, k = (rotate(norm(x), *rotary) for norm, x in ((self.q_norm, q), (self.k_norm, k)))
        q, k = q.to(v.dtype), k.to(v.dtype)  # under autocast angles are float32, products are not
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, T, D)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (B, kv_heads, S, D)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, explicit_attention
        )
        dropout = self.config.attention_dropout if self.training else 0.0
        scaling = self.head_dim**-0.5
        y, weights = attend(self, q, k, v, mask, dropout=dropout, scaling=scaling, **kwargs)
        return self.o_proj(y.reshape(B, T, -1)), weights  # (B, T, H)


class MLP(nn.Module):
    """Each token thinks for itself; one projection gates the other."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        hidden, width = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = joins_stream(nn.Linear(width, hidden, bias=False))
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        """Transform x (B, T, H)."""
        return self.down_proj(self.act(self.gate_proj(x)) * self.up_proj(x))


def branch_dropout(config: Qwen3Config) -> nn.Dropout:
    """Dropout of the embeddings and of what a branch adds; a Qwen3 checkpoint has none."""
    return nn.Dropout(getattr(config, "resid_pdrop", 0.0))


class Block(GradientCheckpointingLayer):
    """Communication, then computation, each added to the residual stream."""

    def __init__(self, config: Qwen3Config, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer_idx)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)
        self.dropout = branch_dropout(config)

    def forward(
        self,
        x: Tensor,
        rotary: tuple[Tensor, Tensor],
        mask: Tensor | None,
        past_key_values: Cache | None,
        **kwargs: object,
    ) -> Tensor:
        """Pass x (B, T, H) on."""
        y, _ = self.self_attn(self.input_layernorm(x), rotary, mask, past_key_values, **kwargs)
        x = x + self.dropout(y)
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class ModernBase(GPTBase):
    """What the modern shape's backbone and heads share."""

    config: Qwen3Config
    config_class = Qwen3Config
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _can_record_outputs = {"hidden_states": Block, "attentions": Attention}


@loads_as("Qwen3Model", AutoModel)
class GPTModel(ModernBase):
    """The backbone: tokens in, hidden states out."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        rope = dict(config.rope_parameters or {})
        if rope["rope_type"] != "default" or "sliding_attention" in (config.layer_types or []):
            raise UserError(
                f"the checkpoint has {rope['rope_type']} rotary positions and {config.layer_types} "
                "layers, this GPT default ones and full_attention only: start from another"
            )
        self.rope_theta = float(rope["rope_theta"])
        self.embed_tokens = nn.Embedding(
            config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id
        )
        self.dropout = branch_dropout(config)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: object,
    ) -> BaseModelOutputWithPast:
        """Return the last hidden states (B, T, H); arguments as in `CausalHead.forward`."""
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, H)
        use_cache, cache = self.start_cache(use_cache, past_key_values)
        mask = build_mask(self.config, x, attention_mask, position_ids, cache)
        if position_ids is None:
            seen = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(x.shape[1], device=x.device)[None] + seen  # (1, T)
        cos, sin = rotary_angles(position_ids, self.config.head_dim, self.rope_theta)
        rotary = cos.to(x.dtype), sin.to(x.dtype)
        x = residual_stream(self.dropout(x))
        for block in self.layers:
            x = block(x, rotary, mask, past_key_values=cache, position_ids=position_ids, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=cache if use_cache else None
        )


@loads_as("Qwen3ForCausalLM", AutoModelForCausalLM)
class GPT(CausalHead, ModernBase, GenerationMixin):
    """The modern GPT: `forward` is `CausalHead`'s, `generate` is transformers'."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__(config)
        self.model = GPTModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()


@loads_as("Qwen3ForSequenceClassification", AutoModelForSequenceClassification)
class GPTForSequenceClassification(GenericForSequenceClassification, ModernBase):
    """The reward model: one score a sequence, read off its last token that is not padding."""


def build_gpt(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a GPT of either shape with fresh weights; seed torch first to have the same again.

    Raises:
        UserError: the configuration is not one of `build_config`'s.
    """
    if isinstance(config, Qwen3Config):
        model: PreTrainedModel = GPT(config)
    elif isinstance(config, GPT2Config):
        model = LessonGPT(config)
    else:
        raise UserError(f"model_type ({config.model_type}) must be qwen3 or gpt2: use build_config")
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.generation_config, name, getattr(config, name))
    return model
