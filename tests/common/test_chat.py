"""Talking to a model: as it is trained and measured."""

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from transformers.generation import logits_process

from common import chat
from common.errors import UserError
from tests.toy import save_toy


def test_asks_as_is_trained_and_draws_as_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Broken once: `generate` takes the 50 likeliest tokens alone, unless told. And by a question
    that the template does not render.
    """

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a warper of other probabilities than the model's own")

    monkeypatch.chdir(tmp_path)
    folder = Path("out/arden/sft")
    save_toy(folder, weights=0.2)
    for warper in ("TopKLogitsWarper", "TopPLogitsWarper"):
        monkeypatch.setattr(getattr(logits_process, warper), "__init__", refuse)
    asked = iter(["How many?", ""])
    monkeypatch.setattr("builtins.input", lambda _: next(asked))
    read: list[list[int]] = []
    put = chat.TextStreamer.put
    monkeypatch.setattr(
        chat.TextStreamer,
        "put",
        lambda self, ids: [read.append(ids.flatten().tolist()), put(self, ids)],
    )
    options = ["--temperature", "1", "--max_new_tokens", "8"]
    monkeypatch.setattr(sys, "argv", ["chat", *options])
    torch.manual_seed(0)
    chat.main()
    asked_for = [{"role": "user", "content": "How many?"}]
    served = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        asked_for, add_generation_prompt=True, return_dict=False
    )
    assert read[0] == served  # the model's first input, by which the streamer knows the prompt
    said = capsys.readouterr().out.splitlines()
    assert "ask away" in said[0] and "".join(said[1:])


@pytest.mark.parametrize(
    "option", [["--temperature", "nan"], ["--max_new_tokens", "0"], ["--stage", "reward"]]
)
def test_bounds(option: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken once: NaN was a temperature; what was wrong got a page of usage."""
    monkeypatch.setattr(sys, "argv", ["chat", *option])
    with pytest.raises(UserError, match=rf"{option[0].strip('-')} \({option[1]}\)"):
        chat.main()


def test_finds_the_newest_stage_that_is_finished(tmp_path: Path) -> None:
    """Broken once: the oldest; a stage that was begun."""
    with pytest.raises(UserError, match=r"no finished model in .*: run `make all"):
        chat.find_model(tmp_path, None)
    for stage in ("pretrain", "sft", "reward"):
        (tmp_path / stage).mkdir()
        (tmp_path / stage / "config.json").touch()
    (tmp_path / "rlhf").mkdir()
    assert chat.find_model(tmp_path, None) == tmp_path / "sft"
    assert chat.find_model(tmp_path, "pretrain") == tmp_path / "pretrain"
    with pytest.raises(UserError, match="run `make rlhf"):
        chat.find_model(tmp_path, "rlhf")
