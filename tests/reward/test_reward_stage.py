"""The reward stage on one's own rankings, as it is called: what it refuses, what it leaves be."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from common.config import as_flags
from common.errors import UserError
from reward.__main__ import main
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
    run(asked, labeller=tmp_path / "mix.yaml")
    sources = json.loads((tmp_path / "reward" / "manifest.json").read_text())["sources"]
    assert sources.keys() == {"parent", "policy", "labeller", "data"}
    write(ranked, PAIRS[:-1])
    with pytest.raises(UserError, match="holds a run with another labeller"):
        run(asked, labeller=tmp_path / "mix.yaml")
