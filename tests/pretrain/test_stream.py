"""The text's tokenizer, and a stream's tokens on disk: whose they are, and who writes them."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from common.errors import UserError
from common.mixture import Source
from common.tokenizer import train_bpe
from pretrain.config import ModelConfig, PretrainConfig
from pretrain.stream import TokenStream, make_tokenizer

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


def stream(folder: Path, tokenizer: str = "bpe") -> TokenStream:
    """Of `TEXTS`, into `folder`/shards."""
    data, shards = folder / "text.jsonl", folder / "shards"
    if not data.exists():
        data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    config = PretrainConfig(
        output_dir="out", data=str(data), shards_dir=str(shards), validation_fraction=0.2
    )
    model_config = ModelConfig(tokenizer=tokenizer, vocab_size=320)
    return TokenStream([Source(str(data))], model_config, config)


@pytest.mark.parametrize("new", [{"text": "the dog ate"}, {"eos_token": "<|user|>"}])
def test_another_tokenizer_in_its_place(tmp_path: Path, new: dict[str, str]) -> None:
    """By other merges, and by another end of a document. Broken by the old shards, silently."""
    folder = save_tokenizer(tmp_path / "theirs")
    stream(tmp_path, str(folder)).prepare()
    stream(tmp_path, str(folder)).prepare()
    save_tokenizer(folder, **new)
    said = "shards holds tokens of another tokenizer than .*theirs has now: give another --shards_"
    with pytest.raises(UserError, match=said):
        stream(tmp_path, str(folder)).prepare()
    index = json.loads((tmp_path / "shards" / "index.json").read_text())
    unfinished = index | {"complete": False, "shards": []}
    (tmp_path / "shards" / "index.json").write_text(json.dumps(unfinished))
    with pytest.raises(UserError, match=said):
        stream(tmp_path, str(folder)).prepare()
    assert json.loads((tmp_path / "shards" / "index.json").read_text()) == unfinished


def test_another_tokenizer_beside_the_tokens(tmp_path: Path) -> None:
    """Broken by samples in other words than those that were trained on."""
    stream(tmp_path).prepare()
    save_tokenizer(tmp_path / "shards")
    with pytest.raises(UserError, match="is not the one that wrote its tokens"):
        stream(tmp_path).open()


def test_one_process_writes(tmp_path: Path) -> None:
    """Others are told so, and read at once what is complete.

    Broken by a second run that removed the first one's unfinished files.
    """
    (tmp_path / "shards").mkdir()
    other = os.open(tmp_path / "shards", os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match=r"at work there; .* give another --shards_dir"):
        stream(tmp_path).prepare()
    assert not list((tmp_path / "shards").iterdir())
    fcntl.flock(other, fcntl.LOCK_UN)
    stream(tmp_path).prepare()
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # let go of, though this process lives
    stream(tmp_path).prepare()
    os.close(other)
