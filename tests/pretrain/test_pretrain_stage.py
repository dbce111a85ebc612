"""The stage as a user runs it: killed and gone on with, split otherwise, fed bad input."""

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from common.config import as_flags
from tests.launch import kill_when, stage_start

TINY = {
    "data": "arden",
    "documents": 400,
    "tokenizer": "bpe",
    "vocab_size": 512,
    "block_size": 32,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 2,
    "max_steps": 120,
    "per_device_train_batch_size": 4,
    "save_steps": 10,
    "logging_steps": 7,
}


ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def command(
    output: Path, *, processes: int = 1, sharded: bool = False, **fields: object
) -> list[str]:
    values = TINY | {"output_dir": output} | fields
    return [*stage_start("pretrain", processes, sharded), *as_flags(values)]


def run_pretrain(
    output: Path, *, check: bool = True, **options: Any
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(output, **options), capture_output=True, text=True, check=check, env=ENVIRONMENT
    )


def weights_differ(one: Path, other: Path) -> float:
    a, b = (load_file(path / "model.safetensors") for path in (one, other))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def read_metrics(path: Path) -> list[dict[str, float]]:
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("whole") / "pretrain"
    run_pretrain(output)
    return output


def test_leaves_all_artifacts(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "config.yaml",
        "metrics.jsonl",
        "summary.json",
        "samples.md",
        "manifest.json",
        "checkpoints",
    }
    summary = json.loads((finished / "summary.json").read_text())
    assert summary.keys() >= {
        "val_loss",
        "val_bits_per_byte",
        "entropy_bits_per_byte",
        "train_seconds",
        "parameters",
    }
    assert 0 < summary["entropy_bits_per_byte"] < summary["val_bits_per_byte"] < 8


def test_killed_and_resumed_is_bit_for_bit_the_same(finished: Path, tmp_path: Path) -> None:
    """Seen to fail with the optimizers' state left out of the checkpoint."""
    output = tmp_path / "pretrain"
    kill_when(output / "checkpoints" / "step-20", command(output), ENVIRONMENT)
    assert not (output / "summary.json").exists(), "it ended before it was killed"
    run_pretrain(output)
    assert weights_differ(finished, output) == 0.0
    assert read_metrics(finished) == read_metrics(output)


def test_accumulation_and_processes_change_nothing(tmp_path: Path) -> None:
    """In float32; seen to fail with every process on the same windows, in bfloat16, and with
    gradients that are never sent to the other process. The curve, too: seen to fail with the
    logged loss of the first process alone. The progress line shows what it should.
    """
    split = {"per_device_train_batch_size": 2, "bf16": False}
    shown = run_pretrain(tmp_path / "whole", bf16=False).stderr
    assert re.search(r"\[\d\d:\d\d<\d\d:\d\d, .*loss=\d\.\d+, mfu=\d.*%, tok_s=\d", shown)
    run_pretrain(tmp_path / "a", gradient_accumulation_steps=2, **split)
    run_pretrain(tmp_path / "b", processes=2, **split)
    run_pretrain(tmp_path / "c", processes=2, sharded=True, **split)
    split |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    run_pretrain(tmp_path / "d", processes=2, **split)
    for other in "abcd":
        assert weights_differ(tmp_path / "whole", tmp_path / other) < 1e-4, other
        curves = (read_metrics(tmp_path / run) for run in ("whole", other))
        for line, theirs in zip(*curves, strict=True):
            for name in {"loss", "grad_norm", "val_loss"} & line.keys():
                assert theirs[name] == pytest.approx(line[name], rel=1e-4), (other, name)


def test_adamw_alone_is_sharded_and_goes_on(tmp_path: Path) -> None:
    """Of two processes under FSDP2, killed, the weights of one that was not.

    Seen to fail with the optimizer's state left out of the checkpoint. At the rate beside Muon
    Adam makes of rounding, in gradients near 0, whole steps.
    """
    fields = {"optimizer": "adamw", "learning_rate": 1e-3, "bf16": False, "save_steps": 20}
    run_pretrain(tmp_path / "whole", **fields)
    fields |= {"per_device_train_batch_size": 2, "processes": 2, "sharded": True}
    killed = tmp_path / "killed"
    kill_when(killed / "checkpoints" / "step-20", command(killed, **fields), ENVIRONMENT)
    assert not (killed / "summary.json").exists(), "it ended before it was killed"
    run_pretrain(killed, **fields)
    assert weights_differ(tmp_path / "whole", killed) < 1e-4


def test_finished_run_is_left_alone(finished: Path) -> None:
    before = (finished / "model.safetensors").stat().st_mtime_ns
    assert "is finished" in run_pretrain(finished).stdout
    changed = run_pretrain(finished, check=False, seed=1)
    assert changed.returncode == 2
    assert "holds a run with seed 0 (now 1)" in changed.stderr
    assert (finished / "model.safetensors").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_stepz": 3}, "unknown field max_stepz: did you mean max_steps?"),
        ({"max_steps": "many"}, "max_steps"),
        ({"max_steps": 0}, "max_steps (0) must be 1 or more"),
        ({"data": "nowhere/text.txt"}, "nowhere/text.txt"),
        ({"hidden_size": 33}, "hidden_size"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, fields: dict[str, object], message: str
) -> None:
    result = run_pretrain(tmp_path / "x", check=False, **fields)
    assert result.returncode == 2
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and message in lines[0]
    assert "Traceback" not in result.stderr


def test_own_text_with_characters(tmp_path: Path) -> None:
    """Broken once: a faulty text in its place was met when the finished run had been set aside."""
    text = tmp_path / "book.txt"
    text.write_text("the cat sat on the mat.\n" * 200, encoding="utf-8")
    output = tmp_path / "pretrain"
    result = run_pretrain(output, data=text, tokenizer="characters", validation_fraction=0.1)
    assert "0 unknown" in result.stdout
    summary = json.loads((output / "summary.json").read_text())
    assert summary["val_bits_per_byte"] < 4
    faulty = tmp_path / "rows.jsonl"
    faulty.write_text('{"question": "Who?"}\n' * 9)
    for data in (faulty, tmp_path / "nowhere.txt"):
        fields = {"data": data, "tokenizer": "characters", "overwrite": "true"}
        assert run_pretrain(output, check=False, **fields).returncode == 2
        assert (output / "model.safetensors").exists() and not (output / "replaced").exists()
