"""The web profile: its data sets' schemas on local shards, and its four stages at toy size.

The shards are written as the Hub keeps them: folders, file names, columns and their types.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import yaml

from common.config import as_flags
from common.errors import UserError
from common.mixture import Source
from common.tasks import load_task
from common.text_stream import stream_texts
from tests.launch import stage_start

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
STRING = pyarrow.string()
MESSAGES = pyarrow.list_(pyarrow.struct([("content", STRING), ("role", STRING)]))
WORDS = ["school", "teaches", "rivers", "carry", "sand", "moon", "pulls", "tides", "why", "not"]
ROWS = 120


def said(n: int) -> str:
    return " ".join(WORDS[(n * k) % len(WORDS)] for k in range(1, 5))


def say(*turns: str) -> list[dict[str, str]]:
    """The first turn is the user's; one that begins with "s: " is the system's."""
    system = [{"content": t[3:], "role": "system"} for t in turns[:1] if t.startswith("s: ")]
    roles = ("user", "assistant")
    rest = turns[len(system) :]
    return system + [{"content": t, "role": roles[i % 2]} for i, t in enumerate(rest)]


def write(path: Path, rows: list[dict[str, Any]], **types: pyarrow.DataType) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    for name, kind in types.items():
        place = table.column_names.index(name)
        table = table.set_column(place, name, table[name].cast(kind))
    pyarrow.parquet.write_table(table, path)


def fineweb_edu(folder: Path) -> Path:
    """HuggingFaceFW/fineweb-edu: data/<crawl>/train-*.parquet."""
    for crawl, first in (("CC-MAIN-2013-20", 0), ("CC-MAIN-2024-10", ROWS)):
        rows = [
            {
                "text": f"Lesson {n}. " + " ".join(said(n + k) + "." for k in range(8)),
                "id": f"<urn:uuid:{n}>",
                "dump": crawl,
                "url": f"http://example.org/{n}",
                "file_path": f"s3://commoncrawl/{crawl}",
                "language": "en",
                "language_score": 0.97,
                "token_count": 60,
                "score": 2.9,
                "int_score": 3,
            }
            for n in range(first, first + ROWS)
        ]
        write(folder / "data" / crawl / "train-00000-of-00001.parquet", rows)
    (folder / "README.md").write_text("---\nlicense: odc-by\n---\n")
    return folder


def smoltalk(folder: Path) -> Path:
    """HuggingFaceTB/smol-smoltalk, with one row in ROWS that nobody can learn from."""
    talks = [say(f"What of {said(n)}?", f"{said(n + 1)}.") for n in range(ROWS - 1)]
    talks[0] = say("s: You are brief.", "Hello?", "Hello.", "And now?", "Goodbye.")
    rows = [{"messages": talk, "source": "smol-magpie-ultra-short"} for talk in talks]
    rows.append({"messages": say("What?", ""), "source": "self-oss-instruct"})
    for split, part in (("train", rows), ("test", rows[:4])):
        write(folder / "data" / f"{split}-00000-of-00001.parquet", part, messages=MESSAGES)
    return folder


def ultrafeedback(folder: Path, name: str = "trl-lib") -> Path:
    """trl-lib/ultrafeedback_binarized or HuggingFaceH4's, whose split is called train_prefs."""
    rows = []
    for n in range(ROWS):
        question = f"What of {said(n)}?" if n else "Too long to answer: " + "why? " * 60
        answers = {"chosen": say(question, f"{said(n)}."), "rejected": say(question, "No.")}
        row: dict[str, Any] = {**answers, "score_chosen": 8.5, "score_rejected": 7.0}
        if name == "HuggingFaceH4":
            row |= {"prompt": question, "prompt_id": str(n), "messages": answers["chosen"]}
        rows.append(row)
    lists = {name: MESSAGES for name, value in rows[0].items() if isinstance(value, list)}
    split = "train_prefs" if name == "HuggingFaceH4" else "train"
    for part in (split, split.replace("train", "test")):
        write(folder / "data" / f"{part}-00000-of-00001.parquet", rows, **lists)
    return folder


def test_fineweb_edu(tmp_path: Path) -> None:
    texts = [t for b in stream_texts([Source(str(fineweb_edu(tmp_path)))]) for t in b.texts]
    assert len(texts) == 2 * ROWS
    assert texts[0].startswith("Lesson 0.") and texts[-1].startswith(f"Lesson {2 * ROWS - 1}.")


def test_smoltalk(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row without an answer stops, or is left out where one may be.

    Seen to fail with the number not handed on.
    """
    data = str(smoltalk(tmp_path))
    with pytest.raises(UserError, match=rf'row {ROWS}: "messages"\[1\]: "content" is empty'):
        load_task(data).conversations("train")
    task = load_task(data, skip_faulty_rows=1)
    rows = [row["messages"] for s in ("train", "validation") for row in task.conversations(s)]
    assert len(rows) == ROWS - 1
    assert f"row {ROWS}:" in capsys.readouterr().err
    systems = [row for row in rows if row[0]["role"] == "system"]
    assert [turn["content"] for turn in systems[0]][::2] == ["You are brief.", "Hello.", "Goodbye."]


@pytest.mark.parametrize("name", ["trl-lib", "HuggingFaceH4"])
def test_ultrafeedback(tmp_path: Path, name: str) -> None:
    data = ultrafeedback(tmp_path, name)
    mixture = tmp_path / "mix.yaml"
    split = "train_prefs" if name == "HuggingFaceH4" else "train"
    mixture.write_text(f"- {{path: {data}, split: {split}}}\n")
    task = load_task(str(mixture))
    pairs = task.rankings(lambda questions: [], "train", 0, 0.0)
    assert len(pairs) + len(task.rankings(lambda q: [], "validation", 0, 0.0)) == ROWS
    for pair in pairs:
        (question,), (chosen,), (rejected,) = (pair[k] for k in ("prompt", "chosen", "rejected"))
        assert question["role"] == "user" and chosen["role"] == rejected["role"] == "assistant"
        assert rejected["content"] == "No." and chosen["content"] != "No."
    assert {row["prompt"][0]["role"] for row in task.prompt_rows("align", 9)} == {"user"}


def test_the_family_reads_one_text() -> None:
    """All sizes of the family read the same text by the same tokenizer."""
    configs = Path(__file__).parents[1] / "configs" / "web"
    names = ("pretrain", "gpt2_350m", "gpt2_774m", "gpt2_1558m")
    ours, *family = (yaml.safe_load((configs / f"{name}.yaml").read_text()) for name in names)
    for field in ("data", "shards_dir", "validation_fraction", "tokenizer", "vocab_size"):
        assert {size[field] for size in family} == {ours[field]}


TOY = {
    "pretrain": {
        "vocab_size": 320,
        "block_size": 128,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "validation_fraction": 0.1,
        "max_steps": 6,
        "eval_steps": 3,
        "per_device_train_batch_size": 2,
        "torch_compile": False,
    },
    "sft": {"max_length": 128, "max_steps": 3, "dataset_num_proc": 1, "max_new_tokens": 8},
    "reward": {"max_length": 128, "max_steps": 3, "dataset_num_proc": 1},
    "rlhf": {
        "prompts": 64,
        "eval_prompts": 8,
        "num_updates": 1,
        "per_device_train_batch_size": 4,
        "max_completion_length": 16,
        "allow_no_go": True,
    },
}
DATA = {"pretrain": fineweb_edu, "sft": smoltalk, "reward": ultrafeedback, "rlhf": ultrafeedback}
PARENTS = {
    "pretrain": {},
    "sft": {"model_name_or_path": "pretrain"},
    "reward": {"model_name_or_path": "sft"},
    "rlhf": {"model_name_or_path": "sft", "reward": "reward"},
}


def run_stage(stage: str, folder: Path, *, processes: int = 1, **more: Any) -> str:
    """A stage of the web profile on shards of its data; what it printed."""
    data = folder / "data" / stage
    if not data.exists():
        DATA[stage](data)
    fields = TOY[stage] | {"output_dir": folder / stage, "data": data}
    fields |= {field: folder / parent for field, parent in PARENTS[stage].items()}
    fields |= {"shards_dir": folder / "tokens"} if stage == "pretrain" else {}
    fields |= {"validation_fraction": 0.2} if stage != "pretrain" else {}
    command = [*stage_start(stage, processes), "--config", f"configs/web/{stage}.yaml"]
    command += as_flags(fields | more)
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_four_stages_at_toy_size(tmp_path: Path) -> None:
    """By the profile's own configuration, sizes and data aside; pretraining on two processes."""
    printed = run_stage("pretrain", tmp_path, processes=2)
    assert "train: " in printed and "validation: " in printed
    figures = json.loads((tmp_path / "pretrain" / "summary.json").read_text())
    assert 0 < figures["val_bits_per_byte"] < 8
    tokens = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}
    run_stage("pretrain", tmp_path, output_dir=tmp_path / "longer", max_steps=7)
    assert tokens == {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").iterdir()}
    assert f"row {ROWS}:" in run_stage("sft", tmp_path)
    run_stage("reward", tmp_path)
    assert isinstance(json.loads((tmp_path / "reward" / "summary.json").read_text())["go"], bool)
    printed = run_stage("rlhf", tmp_path)
    assert "prompts leave room for 16 tokens of answer" in printed
    assert (tmp_path / "rlhf" / "model.safetensors").exists()
