"""Conversations in short, and rows as files of data hold them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from datasets import Dataset

from common.data import load_rows


def say(*turns: str) -> list[dict[str, str]]:
    """say("s: Be brief.", "u: Hi", "a: Ho") as messages."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn[3:]} for turn in turns]


UA = say("u: Hi", "a: Ho")


def write_and_load(folder: Path) -> Callable[..., Dataset]:
    """A function that writes rows, or a text, to a file in `folder` and loads it."""

    def load(rows: Any, name: str = "rows.jsonl", **options: Any) -> Dataset:
        path = folder / name
        if isinstance(rows, str):
            path.write_text(rows, encoding="utf-8")
        else:
            lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
            path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        options.setdefault("format", "messages")
        return load_rows(str(path), cache_dir=str(folder / "cache"), **options)

    return load
