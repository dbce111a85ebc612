"""Which commands a sweep and further rounds run; the stages themselves are tested elsewhere."""

import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from common import rounds, sweep
from common.artifacts import write_json
from common.errors import UserError
from common.report import show_columns


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """What was run, as fields; each leaves a summary that says how manyeth it was."""
    ran: list[dict[str, str]] = []

    def note(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        fields = {"stage": command[2]} | dict(zip(command[3::2], command[4::2], strict=True))
        ran.append(fields)
        write_json(Path(fields["--output_dir"]) / "summary.json", {"gold": 0.5 * len(ran)})
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "run", note)
    return ran


def test_sweep(
    commands: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Broken by one output directory for all, and by measuring on test."""
    line = "sweep --stage sft --field learning_rate --values 1e-4 3e-4 -- --seed 1"
    monkeypatch.setattr(sys, "argv", line.split())
    sweep.main()
    assert [c["--learning_rate"] for c in commands] == ["1e-4", "3e-4"]
    assert len({c["--output_dir"] for c in commands}) == 2
    for command in commands:
        assert command["stage"] == "sft" and command["--config"] == "configs/arden/sft.yaml"
        assert command["--evaluate_on"] == "dev" and command["--seed"] == "1"
    assert "| learning_rate | 1e-4 | 3e-4 |" in capsys.readouterr().out
    with pytest.raises(UserError, match="must be one of sft, reward, rlhf"):
        sweep.SweepConfig(stage="pretrain", field="seed", values=["1"])


def test_rounds(
    commands: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Broken by the first round's policy and reward model in every round; once: rankings that were
    given trained on again, as data or as labeller; the profile's data, or another share of it held
    out, in place of the first round's; a cure that a space in a path took apart.
    """
    monkeypatch.setattr(sys, "argv", ["rounds", "--rounds", "3"])
    with pytest.raises(UserError, match="no finished model in out/arden/sft: run `make all"):
        rounds.main()
    for stage in ("sft", "reward", "rlhf"):
        write_json(Path("out/arden") / stage / "config.json", {})
        write_json(Path("out/arden") / stage / "summary.json", {"gold": 0.0})
        settings = {"evaluate_on": "dev", "data": "own.jsonl", "labeller": "data"}
        settings["plays"] = False
        write_json(Path("out/arden") / stage / "config.yaml", settings)
    for name, file in (("data", "my own.jsonl"), ("labeller", "ranked.jsonl")):
        write_json(Path("out/arden/reward/config.yaml"), settings | {name: file})
        with pytest.raises(UserError) as refused:
            rounds.main()
        said = str(refused.value)
        assert f"given ({file}): nobody ranks new answers" in said
        cure = shlex.split(said.split("ranked: ")[1])
        flags = "--policy out/arden/rlhf --labeller people --rankings out/arden/round2/answers"
        data = file if name == "data" else "own.jsonl"
        assert cure == ["make", "rankings", "PROFILE=arden", f"DATA={data}", f"ARGS={flags}"]
    for ranked_by_itself in ({"data": "play.txt", "plays": True}, {"data": "arden"}):
        write_json(Path("out/arden/reward/config.yaml"), settings | ranked_by_itself)
        with pytest.raises(UserError, match="was measured on dev, further rounds would be on test"):
            rounds.main()
    write_json(Path("judge/config.json"), {})
    settings |= {"data": "own.jsonl", "labeller": "judge", "columns": {"prompt": "q"}}
    settings |= {"evaluate_on": "test", "validation_fraction": 0.3}
    for stage in ("sft", "reward", "rlhf"):
        write_json(Path("out/arden") / stage / "config.yaml", settings)
    rounds.main()
    names = ("--output_dir", "--model_name_or_path", "--policy", "--reward")
    ran = [[c.get(name, "").removeprefix("out/arden/") for name in names] for c in commands]
    assert ran == [
        ["round2/reward", "reward", "rlhf", ""],
        ["round2/rlhf", "sft", "", "round2/reward"],
        ["round3/reward", "round2/reward", "round2/rlhf", ""],
        ["round3/rlhf", "sft", "", "round3/reward"],
    ]
    names = ("--data", "--columns", "--labeller", "--validation_fraction")
    taken = [tuple(c[name] for name in names) for c in commands]
    assert set(taken) == {("own.jsonl", "{'prompt': 'q'}", "judge", "0.3")}
    assert "| gold | 0.000 | 1.000 | 2.000 |" in capsys.readouterr().out
    with pytest.raises(UserError, match="must be 2 or more"):
        rounds.RoundsConfig(rounds=1)


def test_columns_of_runs_with_different_figures() -> None:
    """Broken by the first run's names alone."""
    table = show_columns("n", {"a": {"x": 1.0}, "b": {"x": 2, "y_before": 0.5, "y_after": 0.75}})
    assert table.splitlines() == [
        "| n | a | b |",
        "|---|---|---|",
        "| x | 1.000 | 2 |",
        "| y |  | 0.500 -> 0.750 |",
    ]
