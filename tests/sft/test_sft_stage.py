"""The stage as it is called, on questions of one's own: what it refuses, and what it leaves be."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from common.config import as_flags
from common.errors import UserError
from common.tokenizer import ROLE_TOKENS, load_tokenizer
from sft.__main__ import main
from tests.sft.test_template import OWN
from tests.toy import save_toy

ROWS = [{"question": f"How many are {n}?", "answer": "There are many."} for n in range(40)]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("toy"), "lesson")


@pytest.fixture
def run(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Two steps of the stage; its folder."""
    data, folder = tmp_path / "asked.jsonl", tmp_path / "sft"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def call(**more: Any) -> Path:
        fields = {"model_name_or_path": toy, "output_dir": folder, "data": data, "max_steps": 2}
        fields |= {"max_new_tokens": 4, "max_length": 128, "disable_tqdm": "true"} | more
        flags = ["--config", "configs/own/sft.yaml", *as_flags(fields)]
        monkeypatch.setattr(sys, "argv", ["sft", *flags])
        main()
        return folder

    return call


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"padding_free": "true"}, "padding_free=True"),
        ({"packing": "true", "max_length": "none"}, "max_length"),
        (
            {"eos_token": "<|user|>"},
            "is not the tokenizer's own, <.eos.>",
        ),
        ({"pad_token": "zz"}, r"pad_token \(zz\) is not the tokenizer's own, <\|pad\|>"),
        (
            {"chat_template_path": "nowhere.jinja"},
            "nowhere.jinja. cannot be read",
        ),
        ({"chat_template_path": "configs/own/sft.yaml"}, "has no generation marks"),
        ({"max_length": 4}, "are longer than max_length"),
    ],
)
def test_a_finished_run_stays_where_its_successor_is_refused(
    run: Callable[..., Path], tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    """Broken once: what TRL refuses came as a traceback, after the finished run was set aside, and
    a template or an end that TRL sets had passed by what is asked of the model's own."""
    folder = tmp_path / "sft"
    folder.mkdir()
    for name in ("model.safetensors", "summary.json", "manifest.json"):
        (folder / name).write_text("{}")
    with pytest.raises(UserError, match=message):
        run(overwrite="true", **fields)
    assert (folder / "model.safetensors").read_text() == "{}"
    assert not (folder / "replaced").exists()


def test_a_template_of_ones_own_is_the_model_s(run: Callable[..., Path], tmp_path: Path) -> None:
    """What it says is of the run's identity. Broken by its path alone."""
    path = tmp_path / "own.jinja"
    path.write_text(OWN)
    folder = run(chat_template_path=path)
    assert load_tokenizer(folder).chat_template == OWN
    path.write_text(OWN + " ")
    with pytest.raises(UserError, match="holds a run with another chat_template"):
        run(chat_template_path=path)


def test_questions_without_room_for_an_answer_are_no_samples(run: Callable[..., Path]) -> None:
    """A context of 2,048. Broken once: an IndexError behind the last learned position, after the
    training, and again whenever the run was to go on."""
    assert "How many are" in (run() / "samples.md").read_text()
    samples = (run(max_new_tokens=2040, overwrite="true") / "samples.md").read_text()
    assert samples.startswith("# Answers") and "How many are" not in samples


def test_lora_can_tell_an_end_from_a_role(
    run: Callable[..., Path], toy: Path, tmp_path: Path
) -> None:
    """In a head of its own, whose rows are alike for what the base never read. Broken once: it was
    frozen, and an answer's end as likely as each of the other twenty tokens."""
    base: Any = AutoModelForCausalLM.from_pretrained(toy, tie_word_embeddings=False)
    base.lm_head.weight = nn.Parameter(torch.zeros_like(base.lm_head.weight))
    base.save_pretrained(tmp_path / "base")
    load_tokenizer(toy).save_pretrained(tmp_path / "base")
    fields = {"model_name_or_path": tmp_path / "base", "lora_r": 4, "warmup_steps": 0}
    tuned: Any = AutoModelForCausalLM.from_pretrained(run(**fields))
    tokenizer = load_tokenizer(toy)
    roles = tokenizer.convert_tokens_to_ids(list(ROLE_TOKENS))
    rows = tuned.lm_head.weight
    assert not rows[tokenizer.eos_token_id].equal(rows[roles[0]])
