"""The reward stage on one's own rankings, as it is called: what it refuses, what it leaves be."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.config import as_flags
from common.errors import UserError
from common.tokenizer import load_tokenizer
from reward.__main__ import answer_opening, main
from tests.toy import save_toy

PAIRS = [
    {"prompt": f"How many are {n}?", "chosen": "There are many.", "rejected": "No."}
    for n in range(40)
]


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def run(toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Two steps of the stage into `tmp_path/reward`; its summary."""

    def call(data: Path, **more: Any) -> Any:
        fields = {"model_name_or_path": toy, "output_dir": tmp_path / "reward", "data": data}
        fields |= {"max_steps": 2, "max_length": 128, "disable_tqdm": "true"} | more
        flags = ["--config", "configs/own/reward.yaml", *as_flags(fields)]
        monkeypatch.setattr(sys, "argv", ["reward", *flags])
        main()
        return json.loads((tmp_path / "reward" / "summary.json").read_text())

    return call


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_other_rankings_of_a_labeller_are_another_run(
    run: Callable[..., Any], tmp_path: Path
) -> None:
    """Also a mixture of them, whose own file stays as it is. Broken once: it was finished, and one
    killed at a checkpoint went on from there on other pairs."""
    asked = write(tmp_path / "asked.jsonl", [{"prompt": row["prompt"]} for row in PAIRS])
    ranked = write(tmp_path / "ranked.jsonl", PAIRS)
    (tmp_path / "mix.yaml").write_text(f"- path: {ranked}\n")
    figures = run(asked, labeller=tmp_path / "mix.yaml")
    assert "accuracy" in figures and "accuracy_ceiling" not in figures
    sources = json.loads((tmp_path / "reward" / "manifest.json").read_text())["sources"]
    assert sources.keys() == {"parent", "policy", "labeller", "data"}
    write(ranked, PAIRS[:-1])
    with pytest.raises(UserError, match="holds a run with another labeller"):
        run(asked, labeller=tmp_path / "mix.yaml")


def test_a_template_that_opens_answers_by_nothing(
    run: Callable[..., Any], toy: Path, tmp_path: Path
) -> None:
    """Broken once: log-probabilities of the question were in the score, too; then it was said when
    all answers were sampled and ranked."""
    assert answer_opening(load_tokenizer(toy)) == [5]
    shutil.copytree(toy, parent := tmp_path / "parent")
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    (parent / "chat_template.jinja").write_text(template)
    data = write(tmp_path / "ranked.jsonl", PAIRS)
    with pytest.raises(UserError, match="the chat template opens an answer by nothing"):
        run(data, model_name_or_path=parent, answer_logprobs="true")
    assert not (tmp_path / "reward").exists()


@pytest.mark.parametrize(
    ("rows", "fields", "message"),
    [
        ([*PAIRS, {"prompt": "And?"}], {}, "row 41"),
        (PAIRS, {"margins": 2}, "give --margins 0"),
        ([row | {"kind": "ceiling"} for row in PAIRS], {}, "accuracy_ceiling is another figure"),
        (PAIRS, {"max_length": 4}, "are longer than max_length"),
        (PAIRS, {"eos_token": "<|user|>"}, "is not the tokenizer's own"),
        (PAIRS, {"chat_template_path": "own.jinja"}, "is for fine-tuning"),
    ],
)
def test_a_finished_run_stays_where_its_successor_is_refused(
    run: Callable[..., Any], tmp_path: Path, rows: list[Any], fields: dict[str, Any], message: str
) -> None:
    """Broken once: it was set aside before the new rows were read, and PPO found no model."""
    folder = tmp_path / "reward"
    (folder / "rankings").mkdir(parents=True)
    first = {"model.safetensors": "weights", "summary.json": "{}", "manifest.json": "{}"}
    first |= {"rankings/manifest.json": "{}", "rankings/train.jsonl": "pairs"}
    for name, text in first.items():
        (folder / name).write_text(text)
    with pytest.raises(UserError, match=message):
        run(write(tmp_path / "new.jsonl", rows), overwrite="true", **fields)
    kept = [name for name in first if not name.startswith("rankings")]
    kept += ["rankings/train.jsonl"] if len(rows) > len(PAIRS) else []
    assert {(folder / name).read_text() for name in kept} == {first[name] for name in kept}
    assert not (folder / "replaced").exists()
    run(write(tmp_path / "new.jsonl", PAIRS), overwrite="true")
    assert (folder / "model.safetensors").read_bytes() != b"weights"
    assert not (folder / "replaced").exists()
