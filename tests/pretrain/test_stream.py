"""The text's tokenizer, and a stream's tokens on disk: whose they are, and who writes them."""

from pathlib import Path

import pytest

from common.errors import UserError
from common.tokenizer import train_bpe
from pretrain.config import ModelConfig
from pretrain.stream import make_tokenizer

TEXTS = [f"document {n} of many {'words ' * (n % 5)}" for n in range(60)]


def save_tokenizer(folder: Path, text: str = "a cat", **tokens: str | None) -> Path:
    """A BPE of `text`, with special tokens of other names or none."""
    tokenizer = train_bpe([text], 320)
    for name, token in tokens.items():
        setattr(tokenizer, name, token)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("missing", ["eos_token", "pad_token"])
def test_a_tokenizer_without_a_token_that_is_needed(tmp_path: Path, missing: str) -> None:
    """Broken by a TypeError: of None as an id of the text, or in the model's configuration."""
    folder = str(save_tokenizer(tmp_path / "theirs", **{missing: None, "bos_token": None}))
    said = rf"theirs\) has no {missing}: .* in {folder}/tokenizer_config.json"
    for documents in (True, False):
        with pytest.raises(UserError, match=said):
            make_tokenizer(ModelConfig(tokenizer=folder), [], documents=documents)
    parent = ModelConfig(model_name_or_path="theirs", tokenizer=folder)
    make_tokenizer(parent, [], documents=False)  # a text of one piece ends nowhere
    if missing == "eos_token":
        with pytest.raises(UserError, match=said):
            make_tokenizer(parent, [], documents=True)
