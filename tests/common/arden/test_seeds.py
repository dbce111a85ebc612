"""Several seeds: what each stage reads, and the table with the worst of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from common.arden import seeds
from common.arden.report import COLUMNS, FIGURES, report
from common.errors import UserError


def test_every_stage_reads_its_own_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken once: the reward model of seed 0 taken for all."""
    ran: list[dict[str, str]] = []

    def run_stage(profile: str, stage: str, flags: list[str]) -> None:
        assert profile == "arden"
        ran.append({"stage": stage} | dict(zip(flags[::2], flags[1::2], strict=True)))

    monkeypatch.setattr(seeds, "run_stage", run_stage)
    monkeypatch.setattr(seeds, "report", lambda folders: ran.append({"report": str(folders[1])}))
    monkeypatch.setattr("sys.argv", ["seeds", "--seeds", "0", "1"])
    seeds.main()
    assert [run.get("stage") for run in ran] == [*seeds.stages(Path())] * 2 + [None]
    assert ran[-1] == {"report": "out/arden-1"}
    for run in ran[:5]:
        assert run["--output_dir"] == f"out/arden/{run['stage']}"
    for run in ran[5:10]:
        assert run["--seed"] == "1"
        for name in run.keys() - {"stage", "--seed"}:
            assert run[name].startswith("out/arden-1/"), name


@pytest.mark.parametrize("wanted", [["-1"], ["0", "-2"], []])
def test_no_run_begins_with_a_seed_that_is_none(
    monkeypatch: pytest.MonkeyPatch, wanted: list[str]
) -> None:
    """Broken by leaving it to the stage: folders of `arden--1`, then a traceback of numpy's."""
    monkeypatch.setattr(seeds, "run_stage", lambda *_: pytest.fail("a run has begun"))
    monkeypatch.setattr("sys.argv", ["seeds", "--seeds", *wanted])
    with pytest.raises(UserError, match="seeds"):
        seeds.main()


def test_seeds_stages_are_those_that_have_a_configuration() -> None:
    """And what they are given are fields of it. Seen to fail with a field misspelt."""
    for stage, parents in seeds.stages(Path("out/arden")).items():
        config = yaml.safe_load(Path(f"configs/arden/{stage}.yaml").read_text(encoding="utf-8"))
        assert config["output_dir"] == f"out/arden/{stage}"
        read = {name: path for name, path in config.items() if "out/arden/" in str(path)}
        given = {"output_dir": f"out/arden/{stage}"} | {n: str(p) for n, p in parents.items()}
        assert read == given, stage


def test_the_table_has_the_worst(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two seeds: 0.25 and 0.75 of everything. Broken once: the best in the brackets."""
    figures = [f"{name}{kind}" for name in FIGURES for kind in ("", "_sampled")]
    whens = {when for _, when in COLUMNS.values()}
    for folder, value in (("a", 0.25), ("b", 0.75)):
        stage = tmp_path / folder / "rlhf"
        stage.mkdir(parents=True)
        summary: dict[str, Any] = {f"{name}_{when}": value for name in figures for when in whens}
        (stage / "summary.json").write_text(json.dumps(summary))
        (stage / "config.yaml").write_text("realm_seed: 1\nevaluate_on: dev\n")
    report([tmp_path / "a", tmp_path / "b"])
    lines = capsys.readouterr().out.splitlines()
    assert "| exact_match | 0.500 ± 0.354 (0.250) | 0.500 ± 0.354 (0.250) |" in lines
    assert "| hallucination | 0.500 ± 0.354 (0.750) | 0.500 ± 0.354 (0.750) |" in lines
    assert "| words | 0.500 ± 0.354 | 0.500 ± 0.354 |" in lines
