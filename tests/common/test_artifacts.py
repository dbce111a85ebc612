"""What a stage leaves behind."""

import fcntl
import json
import os
from pathlib import Path

import pytest

from common.artifacts import (
    MetricsFile,
    StageOutput,
    require_apart,
    require_kind,
    require_parent,
    require_same_tokenizer,
    write_json,
    write_text,
)
from common.errors import UserError
from common.report import rows
from common.tokenizer import train_bpe, train_characters


def start(path: Path, seed: int = 0, parent: str = "abc", overwrite: bool = False) -> StageOutput:
    config = {"seed": seed, "output_dir": str(path), "overwrite": overwrite}
    output = StageOutput(str(path), config, {"parent": parent}, overwrite)
    output.start()
    return output


def test_same_run_goes_on_and_another_is_refused(tmp_path: Path) -> None:
    output = start(tmp_path / "sft")
    write_text(output.checkpoints / "x", "precious")
    assert not start(tmp_path / "sft").finished
    StageOutput(str(tmp_path / "sft"), {"seed": 0, "disable_tqdm": True}, {"parent": "abc"})
    with pytest.raises(UserError, match=r"holds a run with seed 0 \(now 1\)"):
        start(tmp_path / "sft", seed=1)
    with pytest.raises(UserError, match="another parent"):
        start(tmp_path / "sft", parent="def")
    assert (output.checkpoints / "x").exists()
    start(tmp_path / "sft", seed=1, overwrite=True)
    assert not (output.checkpoints / "x").exists()


def test_what_has_no_influence_may_change(tmp_path: Path) -> None:
    """Nor does a manifest of old that has it stand in the way. Broken by a run that was refused its
    own folder for another save_steps."""
    start(tmp_path)
    config, sources = {"seed": 0, "save_steps": 5, "eval_steps": 7}, {"parent": "abc"}
    manifest = {"config": config | {"save_steps": 9}, "sources": sources}
    write_json(tmp_path / "manifest.json", manifest)
    write_text(tmp_path / "checkpoints" / "x", "precious")
    StageOutput(str(tmp_path), config, sources)
    config = config | {"eval_steps": 8}
    StageOutput(str(tmp_path), config, sources, incidental=frozenset({"eval_steps"}))
    with pytest.raises(UserError, match=r"holds a run with eval_steps 7 \(now 8\)"):
        StageOutput(str(tmp_path), config, sources)
    best = {"seed": 0, "eval_steps": 7, "load_best_model_at_end": True}
    write_json(tmp_path / "manifest.json", {"config": best | {"save_steps": 9}, "sources": sources})
    with pytest.raises(UserError, match=r"holds a run with save_steps 9 \(now 5\)"):
        StageOutput(str(tmp_path), best | {"save_steps": 5}, sources)


def test_what_no_run_has_left_is_in_no_danger(tmp_path: Path) -> None:
    """Broken once: a first run that failed, then another, and a folder of books was deleted. And by
    an empty folder taken for somebody's: a trainer makes one before its run starts."""
    (tmp_path / "book.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds book\.txt, which no run has left there"):
        start(tmp_path)
    with pytest.raises(UserError, match=r"output_dir \(.*book\.txt\) is a file"):
        start(tmp_path / "book.txt")
    with pytest.raises(UserError, match="output_dir is empty"):
        StageOutput(" ", {}, {})
    (tmp_path / "outer" / "sft").mkdir(parents=True)
    start(tmp_path / "outer" / "sft" / "run")
    with pytest.raises(UserError, match="holds sft, which no run has left there"):
        start(tmp_path / "outer", overwrite=True)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "manifest.json").write_text("{")
    with pytest.raises(UserError, match=r"damaged/manifest\.json is damaged"):
        start(tmp_path / "damaged")
    assert (tmp_path / "book.txt").read_text() == "mine"
    (tmp_path / "fresh" / "checkpoints").mkdir(parents=True)
    start(tmp_path / "fresh")


def test_a_run_is_kept_until_the_one_that_replaces_it_is_finished(tmp_path: Path) -> None:
    """Its own failures do not make it go, nor does a link in it. Broken once: deleted before the
    new input had been read."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x").touch()
    old = start(tmp_path / "sft")
    write_json(old.path / "summary.json", {"seed": 0})
    (old.path / "link").symlink_to(tmp_path / "elsewhere")
    start(old.path, seed=1, overwrite=True)  # fails
    start(old.path, seed=2)  # fails, too, without a checkpoint
    assert (old.path / "replaced" / "summary.json").read_text() == '{\n  "seed": 0\n}\n'
    write_text(start(old.path, seed=3).checkpoints / "x", "of an unfinished run")
    start(old.path, seed=4, overwrite=True)  # that of the finished one is worth more
    assert (old.path / "replaced" / "summary.json").read_text() == '{\n  "seed": 0\n}\n'
    start(old.path, seed=5).settle()
    assert not (old.path / "replaced").exists() and (tmp_path / "elsewhere" / "x").exists()


@pytest.mark.parametrize("moved", [1, 2, 3])
def test_setting_aside_goes_on_after_a_kill(
    tmp_path: Path, moved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its n-th file. Broken by what tells of the run moved before the rest."""
    old = start(tmp_path)
    for name in ("model.safetensors", "summary.json"):
        write_json(old.path / name, {})
    rename, calls = Path.rename, []

    def killed(path: Path, target: Path) -> Path:
        calls.append(path)
        if len(calls) > moved:
            raise KeyboardInterrupt
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        start(tmp_path, seed=1, overwrite=True)
    monkeypatch.setattr(Path, "rename", rename)
    output = start(tmp_path, seed=1, overwrite=True)
    names = {"config.yaml", "manifest.json", "model.safetensors", "summary.json"}
    assert {path.name for path in (output.path / "replaced").iterdir()} == names


def test_a_run_does_not_write_where_it_reads_nor_reads_the_wrong_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a model that the run reads"):
        require_apart(f"{tmp_path}/a/../b", tmp_path / "a", tmp_path / "b")
    write_json(tmp_path / "config.json", {"architectures": ["Qwen3LogprobReward"]})
    require_kind(tmp_path, scores=True)
    with pytest.raises(UserError, match=r"holds a reward model .* a language model is needed here"):
        require_kind(tmp_path, scores=False)
    write_json(tmp_path / "config.json", {"architectures": ["GPT2LMHeadModel"]})
    require_kind(tmp_path, scores=False)
    with pytest.raises(UserError, match=r"holds a language model .* a reward model is needed here"):
        require_kind(tmp_path, scores=True)


def test_looking_changes_nothing_and_one_process_replaces(tmp_path: Path) -> None:
    """As on two processes: both look, one starts. Broken by deleting when looking, as it was: the
    slower process deletes what the faster one has begun, or stumbles over a folder half deleted.
    """
    old = start(tmp_path)
    write_text(old.checkpoints / "x", "of the old run")
    config, sources = {"seed": 1}, {"parent": "abc"}
    one, two = (StageOutput(str(tmp_path), config, sources, overwrite=True) for _ in range(2))
    assert (old.checkpoints / "x").exists() and not one.finished and not two.finished
    one.start()
    assert not old.checkpoints.exists()
    write_text(one.checkpoints / "y", "of the new run")
    one.start()  # a second time it replaces nothing
    late = StageOutput(str(tmp_path), config, sources, overwrite=True)
    late.start()
    assert (one.checkpoints / "y").exists()


def test_one_process_works_in_a_directory(tmp_path: Path) -> None:
    """A lock of another process is a lock by another descriptor. Broken by not asking for it: both
    write checkpoints and metrics, and the model is of neither run."""
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)
    with pytest.raises(UserError, match="another process is at work there"):
        start(tmp_path)
    assert not list(tmp_path.iterdir())
    fcntl.flock(other, fcntl.LOCK_UN)
    start(tmp_path)
    start(tmp_path)  # it is we who hold it
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


def test_a_run_without_a_checkpoint_is_replaced(tmp_path: Path) -> None:
    """A data fault was mended, the data is another: no need of --overwrite. Broken by refusing
    every change."""
    (start(tmp_path / "reward").path / "rankings.jsonl").write_text("of the other data")
    output = start(tmp_path / "reward", parent="def")
    assert not (output.path / "rankings.jsonl").exists()
    write_json(output.path / "summary.json", {})
    with pytest.raises(UserError, match="another parent"):
        start(tmp_path / "reward")


def test_rankings_outlive_the_run_that_they_lie_in(tmp_path: Path) -> None:
    """They have a manifest of their own; samples beside have none. Broken by deleting it all."""
    output = start(tmp_path / "reward")
    write_text(start(output.path / "rankings").path / "train.jsonl", "minutes of sampling")
    write_text(output.path / "samples" / "x", "")
    write_json(output.path / "summary.json", {})
    start(tmp_path / "reward", seed=1, overwrite=True)
    assert (output.path / "rankings" / "train.jsonl").exists()
    assert not (output.path / "samples").exists() and not (output.path / "summary.json").exists()


def test_finished_is_a_summary(tmp_path: Path) -> None:
    output = start(tmp_path)
    write_json(output.path / "summary.json", {})
    assert start(tmp_path).finished


def test_write_leaves_no_scratch_behind(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b.txt", "one")
    write_text(tmp_path / "a" / "b.txt", "two")
    assert [path.read_text() for path in (tmp_path / "a").iterdir()] == ["two"]


def test_metrics_lose_what_will_be_logged_again(tmp_path: Path) -> None:
    metrics = MetricsFile(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        metrics.write({"step": step, "loss": 1.0})
    with metrics.path.open("a") as file:
        file.write('{"step": 4, "lo')  # killed while writing
    metrics.rewind(2)
    lines = metrics.path.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]


def test_missing_parent_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run `make sft` first"):
        require_parent(str(tmp_path), "make sft")
    (tmp_path / "replaced").mkdir()
    with pytest.raises(UserError, match=r"the one that was replaced lies in .*/replaced"):
        require_parent(str(tmp_path), "make sft")


def test_other_tokenizer_is_refused(tmp_path: Path) -> None:
    one, same, other = (tmp_path / name for name in "abc")
    train_characters(["abc"]).save_pretrained(one)
    padded = train_characters(["abc"])
    padded(["a", "ab"], padding=True)  # leaves its state in the file: still the same tokenizer
    padded.save_pretrained(same)
    train_bpe(["abc"], 320).save_pretrained(other)
    require_same_tokenizer(one, same)
    with pytest.raises(UserError, match="differ in tokenizer"):
        require_same_tokenizer(one, other)


def test_report_rows() -> None:
    summary = {"gold_before": 0.5, "gold_after": 0.75, "parameters": 1000, "train_seconds": 3.0}
    assert rows(summary) == [("gold", "0.500 -> 0.750"), ("parameters", "1,000")]
