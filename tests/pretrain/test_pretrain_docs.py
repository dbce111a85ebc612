"""docs/pretrain.md names functions, tests and figures that exist."""

import re
from pathlib import Path

import pytest

from common.token_file import TokenFile, write_token_file
from common.tokenizer import train_characters
from pretrain.__main__ import make_model
from pretrain.config import ModelConfig, PretrainConfig
from pretrain.trackers import make_accelerator
from pretrain.train import train
from tests.pages import ROOT, check_names

PAGE = (ROOT / "docs" / "pretrain.md").read_text(encoding="utf-8")


def test_functions_and_tests_exist() -> None:
    """Broken once: a function and a test renamed in the page."""
    tests = ROOT / "tests"
    check_names(PAGE, "pretrain|common", 15, tests / "pretrain", tests / "common")
    for file in re.findall(r"`(\w+/\w+\.\w+)`", PAGE):
        assert (ROOT / file).exists(), file


def test_every_logged_figure_is_defined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken once: a row taken out of the page's table."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tokenizer = train_characters(["the cat sat"])
    write_token_file(["the cat sat"] * 60, tokenizer, tmp_path / "train.bin", documents=True)
    file = TokenFile(tmp_path / "train.bin")
    sizes = ModelConfig(block_size=16, num_hidden_layers=1, hidden_size=16, num_attention_heads=2)
    config = PretrainConfig(output_dir=str(tmp_path), data="x", max_steps=1, bf16=False)
    logged: dict[str, float] = {}
    accelerator = make_accelerator(config)
    monkeypatch.setattr(accelerator, "log", lambda values, step: logged.update(values))
    found = train(make_model(sizes, tokenizer), file, file, config, accelerator)
    written = (tmp_path / "metrics.jsonl").read_text(encoding="utf-8")
    names = {*logged, *found, *re.findall(r'"(\w+)":', written)}
    assert len(names) > 10
    defined = set(re.findall(r"`(\w+)`", PAGE.split("## Following a run")[1]))
    assert names <= defined, names - defined
