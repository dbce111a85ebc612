"""The lesson's GPT: the model of Karpathy's "Let's build GPT", as OpenAI shipped it in GPT-2.

Learned positions, LayerNorm before each sublayer, GELU, dropout. Names and mathematics are GPT-2's
(https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf),
so `save_pretrained` writes a checkpoint that plain transformers reads. Build it with
`common.gpt.build_config("lesson", ...)`; the modern shape is in `common/gpt.py`.
"""

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    GPT2Config,
)
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.cache_utils import Cache
from transformers.modeling_layers import (
    GenericForSequenceClassification,
    GradientCheckpointingLayer,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D
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


class LessonAttention(nn.Module):
    """Causal self-attention; one matrix gives queries, keys and values.

    `Conv1D` is a linear layer with its matrix transposed: how OpenAI stored it, kept for the names.
    """

    def __init__(self, config: GPT2Config, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.n_embd // config.n_head
        self.is_causal = True
        self.scaling = self.head_dim**-0.5 if config.scale_attn_weights else 1.0
        if config.scale_attn_by_inverse_layer_idx:
            self.scaling /= layer_idx + 1
        self.c_attn = Conv1D(3 * config.n_embd, config.n_embd)
        self.c_proj = joins_stream(Conv1D(config.n_embd, config.n_embd))
        self.resid_dropout = nn.Dropout(config.resid_pdrop)

    def forward(
        self, x: Tensor, mask: Tensor | None, cache: Cache | None, **kwargs: object
    ) -> tuple[Tensor, Tensor | None]:
        """Mix x (B, T, H) over time; also return the weights where the implementation has them."""
        B, T, H = x.shape
        q, k, v = (
            part.view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, heads, T, D)
            for part in self.c_attn(x).split(H, dim=-1)
        )
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx)  # (B, heads, S, D)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, explicit_attention
        )
        dropout = self.config.attn_pdrop if self.training else 0.0
        y, weights = attend(self, q, k, v, mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.resid_dropout(self.c_proj(y.reshape(B, T, H))), weights


class LessonMLP(nn.Module):
    """Each token thinks for itself, in four times the width."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        width = config.n_inner or 4 * config.n_embd
        self.c_fc = Conv1D(width, config.n_embd)
        self.c_proj = joins_stream(Conv1D(config.n_embd, width))
        # "gelu_new" is spelled out operation by operation in transformers: the same in one kernel
        gelu = config.activation_function == "gelu_new"
        self.act = nn.GELU("tanh") if gelu else ACT2FN[config.activation_function]
        self.dropout = nn.Dropout(config.resid_pdrop)

    def forward(self, x: Tensor) -> Tensor:
        """Transform x (B, T, H)."""
        return self.dropout(self.c_proj(self.act(self.c_fc(x))))


class LessonBlock(GradientCheckpointingLayer):
    """Communication, then computation, each added to the residual stream."""

    def __init__(self, config: GPT2Config, layer_idx: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.attn = LessonAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.mlp = LessonMLP(config)

    def forward(
        self, x: Tensor, mask: Tensor | None, past_key_values: Cache | None, **kwargs: object
    ) -> Tensor:
        """Pass x (B, T, H) on."""
        x = x + self.attn(self.ln_1(x), mask, past_key_values, **kwargs)[0]
        return x + self.mlp(self.ln_2(x))


class LessonBase(GPTBase):
    """What the lesson's backbone and heads share."""

    config: GPT2Config
    config_class = GPT2Config
    base_model_prefix = "transformer"
    _input_embed_layer = "wte"
    _no_split_modules = ["LessonBlock"]
    _can_record_outputs = {"hidden_states": LessonBlock, "attentions": LessonAttention}
    # causal masks that old GPT-2 checkpoints hold as weights
    _keys_to_ignore_on_load_unexpected = [r"attn\.bias", r"attn\.masked_bias"]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Conv1D):
            init.normal_(module.weight, std=self.config.initializer_range)
            init.zeros_(module.bias)
        super()._init_weights(module)


@loads_as("GPT2Model", AutoModel)
class LessonGPTModel(LessonBase):
    """The backbone: tokens in, hidden states out."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        if config.add_cross_attention or config.reorder_and_upcast_attn:
            raise UserError(
                "this GPT-2 has no cross-attention and no upcast attention, which the checkpoint "
                "asks for: start from another checkpoint"
            )
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.n_positions, config.n_embd)
        self.drop = nn.Dropout(config.embd_pdrop)
        self.h = nn.ModuleList(LessonBlock(config, i) for i in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, eps=config.layer_norm_epsilon)
        self.gradient_checkpointing = False
        self.post_init()

    def positions(self, x: Tensor, attention_mask: Tensor | None, cache: Cache | None) -> Tensor:
        """Where each token of x (B, T, H) stands, (B or 1, T): padding on the left is not counted.

        For the mask [0, 0, 1, 1, 1]: [0, 0, 0, 1, 2].
        """
        T, block_size = x.shape[1], self.config.n_positions
        if attention_mask is not None and attention_mask.ndim == 2:
            return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]
        seen = cache.get_seq_length() if cache is not None else 0
        if seen + T > block_size:
            raise UserError(
                f"{seen + T} tokens are more than this model's block_size ({block_size}): "
                "shorten the text, or train a model with a larger block_size"
            )
        return torch.arange(T, device=x.device)[None] + seen

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
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, H)
        use_cache, cache = self.start_cache(use_cache, past_key_values)
        mask = build_mask(self.config, x, attention_mask, position_ids, cache)
        if position_ids is None:
            position_ids = self.positions(x, attention_mask, cache)
        x = residual_stream(self.drop(x + self.wpe(position_ids)))
        for block in self.h:
            x = block(x, mask, past_key_values=cache, position_ids=position_ids, **kwargs)
        return BaseModelOutputWithPast(
            last_hidden_state=self.ln_f(x), past_key_values=cache if use_cache else None
        )


@loads_as("GPT2LMHeadModel", AutoModelForCausalLM)
class LessonGPT(CausalHead, LessonBase, GenerationMixin):
    """The lesson's GPT: `forward` is `CausalHead`'s, `generate` is transformers'."""

    _tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}

    def __init__(self, config: GPT2Config) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"  # which transformers cannot tell from GPT-2's name
        self.transformer = LessonGPTModel(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        self.post_init()


@loads_as("GPT2ForSequenceClassification", AutoModelForSequenceClassification)
class LessonGPTForSequenceClassification(GenericForSequenceClassification, LessonBase):
    """The reward model: one score a sequence, read off its last token that is not padding."""

    base_model_prefix = "transformer"
