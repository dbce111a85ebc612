"""Talking to a model: as it is measured."""

import sys
from pathlib import Path

import pytest
import torch
from transformers.generation import logits_process

from common import chat
from common.errors import UserError
from tests.toy import save_toy


def test_draws_as_all_that_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken once: `generate` takes the 50 likeliest tokens alone, unless told."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a warper of other probabilities than the model's own")

    save_toy(tmp_path / "sft", weights=0.2)
    for warper in ("TopKLogitsWarper", "TopPLogitsWarper"):
        monkeypatch.setattr(getattr(logits_process, warper), "__init__", refuse)
    asked = iter(["How many?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(asked))
    options = ["--temperature", "1", "--max_new_tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["chat", str(tmp_path), *options])
    torch.manual_seed(0)
    chat.main()
    said = capsys.readouterr().out.splitlines()
    assert "ask away" in said[0] and "".join(said[1:])


@pytest.mark.parametrize("option", [["--temperature", "nan"], ["--max_new_tokens", "0"]])
def test_bounds(option: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken once: NaN was a temperature."""
    monkeypatch.setattr(sys, "argv", ["chat", "nowhere", *option])
    with pytest.raises(UserError, match=rf"{option[0][2:]} \({option[1]}\)"):
        chat.main()
