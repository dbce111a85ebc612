"""An untrained GPT of toy size with its tokenizer, saved as a stage leaves one."""

from pathlib import Path

from common.gpt import build_config, build_gpt
from common.tokenizer import model_vocab_size, train_bpe


def save_toy(path: Path, shape: str = "modern", weights: float = 0.02) -> Path:
    """Byte-level tokens, nearly one a character; room for 2,048; `weights` is their deviation."""
    tokenizer = train_bpe(["How many are there? There are many. " * 9], 320)
    config = build_config(
        shape,  # type: ignore[arg-type]
        vocab_size=model_vocab_size(tokenizer),
        block_size=2048,
        num_hidden_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.initializer_range = weights
    build_gpt(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
