"""A run that is killed loses nothing, whenever that is."""

import hashlib
import json
from pathlib import Path
from typing import Any

from tests.kills import run_killed

KILLS = 20
FIELDS = {
    "plays": True,
    "tokenizer": "characters",
    "block_size": 16,
    "num_hidden_layers": 1,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "dropout": 0.1,  # so that torch's generator is asked at every step
    "max_steps": 60,
    "per_device_train_batch_size": 4,
    "save_steps": 5,
    "logging_steps": 2,
    "eval_steps": 20,
}


def read_without_time(output: Path) -> dict[str, Any]:
    """What a finished run left, but for how long it took."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((output / "summary.json").read_text())
    return {
        "weights": hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest(),
        "metrics": [{k: v for k, v in line.items() if k != "seconds"} for line in lines],
        "summary": {k: v for k, v in summary.items() if k != "train_seconds"},
        "samples": (output / "samples.md").read_text(),
        "files": sorted(
            str(path.relative_to(output))
            for path in output.rglob("*")
            if not path.name.startswith(".")  # a file that a killed run had begun
        ),
    }


def test_twenty_kills_change_nothing(tmp_path: Path) -> None:
    """Seen to fail with checkpoints read that were half removed, and with no metrics dropped."""
    text = tmp_path / "play.txt"
    speech = "FIRST:\nthe cat sat on mat {0}.\n\nSECOND:\nthe dog sat on log {0}.\n\n"
    text.write_text("".join(speech.format(n) for n in range(200)), encoding="utf-8")
    run_killed("pretrain", tmp_path, KILLS, FIELDS | {"data": text})
    whole = read_without_time(tmp_path / "whole")
    assert [line["step"] for line in whole["metrics"]] == list(range(2, 61, 2))
    for killed in tmp_path.glob("killed-*"):
        assert read_without_time(killed) == whole, killed.name
