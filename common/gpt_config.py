"""The configuration of a GPT to build from a blank page, checked before any weight is made."""

from typing import Literal

from transformers import GPT2Config, PreTrainedConfig, Qwen3Config

from common.errors import UserError

ROPE_THETA = 10_000.0  # RoPE's own; contexts beyond some 8k tokens want more


def build_config(
    shape: Literal["modern", "lesson"],
    *,
    vocab_size: int,
    block_size: int,
    num_hidden_layers: int,
    hidden_size: int,
    num_attention_heads: int,
    num_key_value_heads: int | None = None,
    intermediate_size: int | None = None,
    tie_word_embeddings: bool = True,
    dropout: float = 0.0,
    pad_token_id: int,
    bos_token_id: int,
    eos_token_id: int,
) -> PreTrainedConfig:
    """Return a Qwen3Config ("modern") or a GPT2Config ("lesson") for `common.gpt.build_gpt`.

    Args:
        shape: "modern" (`common/gpt.py`) or "lesson" (`common/lesson_gpt.py`).
        vocab_size: tokens; a multiple of 64 runs fastest.
        block_size: the longest context, in tokens.
        num_hidden_layers: blocks.
        hidden_size: width of the residual stream; a head is hidden_size / num_attention_heads wide.
        num_attention_heads: queries a token asks.
        num_key_value_heads: keys they share, modern only; None: one each.
        intermediate_size: width of the MLP; None: the multiple of 64 nearest 8/3 hidden_size
            (modern), 4 hidden_size (lesson): as many weights either way.
        tie_word_embeddings: the head's matrix is the embedding's.
        dropout: of embeddings, attention and both branches of a block.
        pad_token_id: must differ from eos, for scores are read at the last token that is not pad.
        bos_token_id: begins a document.
        eos_token_id: ends a document, and stops `generate`.

    Raises:
        UserError: naming the value that cannot be and what to put in its place.
    """
    sizes = {
        "vocab_size": vocab_size,
        "block_size": block_size,
        "num_hidden_layers": num_hidden_layers,
        "hidden_size": hidden_size,
        "num_attention_heads": num_attention_heads,
    }
    if intermediate_size is not None:
        sizes["intermediate_size"] = intermediate_size
    special = {"pad_token_id": pad_token_id, "bos_token_id": bos_token_id}
    special["eos_token_id"] = eos_token_id
    kv_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
    _check_sizes(sizes, dropout)
    _check_special_tokens(special, vocab_size)
    if shape == "lesson":
        if kv_heads != num_attention_heads:
            raise UserError(f"num_key_value_heads ({kv_heads}) is for shape modern: leave it out")
        return GPT2Config(
            vocab_size=vocab_size,
            n_positions=block_size,
            n_layer=num_hidden_layers,
            n_embd=hidden_size,
            n_head=num_attention_heads,
            n_inner=intermediate_size,
            embd_pdrop=dropout,
            attn_pdrop=dropout,
            resid_pdrop=dropout,
            tie_word_embeddings=tie_word_embeddings,
            pad_token_id=pad_token_id,
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
        )
    if shape != "modern":
        raise UserError(f"shape ({shape}) must be modern or lesson")
    _check_modern_heads(hidden_size, num_attention_heads, kv_heads)
    config = Qwen3Config(
        vocab_size=vocab_size,
        max_position_embeddings=block_size,
        num_hidden_layers=num_hidden_layers,
        hidden_size=hidden_size,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=kv_heads,
        head_dim=hidden_size // num_attention_heads,
        intermediate_size=intermediate_size or max(64, 64 * round(hidden_size * 8 / 3 / 64)),
        attention_dropout=dropout,
        tie_word_embeddings=tie_word_embeddings,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        pad_token_id=pad_token_id,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
    )
    if dropout:
        config.resid_pdrop = dropout  # Qwen3 itself has none: plain transformers passes it over
    return config


def _check_sizes(sizes: dict[str, int], dropout: float) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise UserError(f"{name} ({size}) must be at least 1")
    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if hidden % heads:
        nearest = max(1, round(hidden / heads)) * heads
        raise UserError(
            f"hidden_size ({hidden}) must be a multiple of num_attention_heads ({heads}); "
            f"nearest is {nearest}"
        )
    if not 0.0 <= dropout < 1.0:
        raise UserError(f"dropout ({dropout}) must be at least 0 and below 1; 0 turns it off")


def _check_special_tokens(special: dict[str, int], vocab_size: int) -> None:
    for name, token in special.items():
        if not 0 <= token < vocab_size:
            raise UserError(
                f"{name} ({token}) must be one of the vocabulary's ids, 0 to {vocab_size - 1}"
            )
    if special["pad_token_id"] == special["eos_token_id"]:
        token = special["pad_token_id"]
        raise UserError(f"pad_token_id and eos_token_id are both {token}: give pad its own token")


def _check_modern_heads(hidden_size: int, heads: int, kv_heads: int) -> None:
    head_dim = hidden_size // heads
    if head_dim % 2:
        raise UserError(
            f"hidden_size / num_attention_heads ({head_dim}) must be even, for its halves turn as "
            f"pairs; hidden_size {(head_dim + 1) * heads} will do"
        )
    if kv_heads < 1 or heads % kv_heads:
        raise UserError(
            f"num_key_value_heads ({kv_heads}) must divide num_attention_heads ({heads}); "
            "1 always does"
        )
