"""Fine-tuning and the reward model, a few steps each, on the shapes that people's data comes in."""

import gzip
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from common.config import as_flags
from common.tasks import load_task
from tests.toy import save_toy

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("tiny"))


def real(name: str) -> Path:
    folder = os.environ.get("FOLIO_TEST_DATA")
    if not folder:
        pytest.skip("FOLIO_TEST_DATA names no folder with the real data")
    return Path(folder) / name


def run_stage(stage: str, tiny: Path, out: Path, data: Path, **more: Any) -> dict[str, Any]:
    """Two steps of a stage of the `own` profile; its summary."""
    fields = {"model_name_or_path": tiny, "output_dir": out, "data": data, "max_steps": 2}
    fields |= {"per_device_train_batch_size": 4, "max_new_tokens": 8, "max_length": 1024} | more
    flags = as_flags(fields)
    command = [sys.executable, "-m", stage, "--config", f"configs/own/{stage}.yaml", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads((out / "summary.json").read_text())


def test_a_mixture_of_alpaca_and_gsm8k(tiny: Path, tmp_path: Path) -> None:
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(
        f"- {{path: {real('alpaca_en_1k.json')}}}\n"
        f"- {{path: {real('gsm8k_train.jsonl')}, weight: 0.1}}\n"
    )
    figures = run_stage("sft", tiny, tmp_path / "sft", mixture, max_lost_share=0.5)
    assert 0 < figures["eval_loss"] < 20


def test_lora_leaves_a_plain_model_that_the_next_stage_takes(tiny: Path, tmp_path: Path) -> None:
    """Broken by leaving the merge out: other names then, and no config.json."""
    asked, ranked = tmp_path / "asked.json", tmp_path / "ranked.json"
    asked.write_text(json.dumps([{"prompt": f"And {n}?", "completion": "So."} for n in range(40)]))
    pairs = [{"prompt": f"And {n}?", "chosen": "So.", "rejected": "No."} for n in range(40)]
    ranked.write_text(json.dumps(pairs))
    run_stage("sft", tiny, tmp_path / "sft", asked, lora_r=4, learning_rate=0.1)
    ours, theirs = (load_file(path / "model.safetensors") for path in (tmp_path / "sft", tiny))
    assert ours.keys() == theirs.keys()
    assert any(not ours[name].equal(theirs[name]) for name in ours)
    figures = run_stage("reward", tmp_path / "sft", tmp_path / "reward", ranked)
    assert figures["pairs_given"] > 0 and isinstance(figures["go"], bool)


def test_held_out_rows_are_measured_before_training(tiny: Path, tmp_path: Path) -> None:
    """Broken once: they were not, and the run failed at its end, with nothing left."""
    rows = [{"prompt": f"And {n}?", "completion": "So."} for n in range(40)]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    task = load_task(str(tmp_path / "rows.json"))
    held_out = {row[0]["content"] for row in task.conversations("validation")["messages"]}
    long = [
        row | {"completion": "So. " * 600} if row["prompt"] in held_out else row for row in rows
    ]
    (tmp_path / "rows.json").write_text(json.dumps(long))
    fields = {"model_name_or_path": tiny, "output_dir": tmp_path / "sft", "max_length": 4096}
    fields |= {"data": tmp_path / "rows.json", "max_lost_share": 1}
    command = [sys.executable, "-m", "sft", "--config", "configs/own/sft.yaml", *as_flags(fields)]
    done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2 and "the model's context is" in done.stderr
    assert not (tmp_path / "sft" / "checkpoints").exists()


def pairs_of(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rankings" / f"{split}.jsonl").open()]


def test_dialogues_in_one_string_and_scored_answers(tiny: Path, tmp_path: Path) -> None:
    """Two kinds of preferences mixed: 60 pairs in gzip, and 20 prompts with three answers each."""
    said = "\n\nHuman: What is {}?\n\nAssistant: A number.\n\nHuman: Sure?\n\nAssistant: {}"
    lines = [
        {side: said.format(n, a) for side, a in (("chosen", "Yes."), ("rejected", "Maybe not."))}
        for n in range(60)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "hh.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    ranked = [
        {"prompt": f"And {n}?", "answers": ["one", "two", "three"], "scores": [1, 3, 2]}
        for n in range(20)
    ]
    (tmp_path / "ranked.json").write_text(json.dumps(ranked))
    mixture = tmp_path / "mix.yaml"
    mixture.write_text(f"- path: {tmp_path}/hh.jsonl.gz\n- path: {tmp_path}/ranked.json\n")
    figures = run_stage(
        "reward", tiny, tmp_path / "reward", mixture, validation_fraction=0.2, max_length=256
    )
    train, held_out = (pairs_of(tmp_path / "reward", split) for split in ("train", "test"))
    assert figures["pairs"] == len(train) > 80
    for kind in ("hh", "ranked"):
        assert figures[f"pairs_{kind}"] == sum(row["kind"] == kind for row in held_out) > 0
    asked = [{str(row["prompt"]) for row in rows} for rows in (train, held_out)]
    assert not asked[0] & asked[1]
    assert {"accuracy_hh", "accuracy_ranked", "spam_thanks"} <= figures.keys()
    report = (tmp_path / "reward" / "report.md").read_text()
    assert "| hh |" in report and (tmp_path / "reward" / "reliability.svg").exists()


def test_all_pairs_of_a_prompt_and_early_stopping(tiny: Path, tmp_path: Path) -> None:
    """30 prompts of three ranked answers, one row of which is faulty; nothing is learned at rate 0,
    so two evaluations are enough. Broken by pairs in place of prompts as the trainer's rows: an
    epoch then had eighteen steps."""
    rows: list[dict[str, Any]] = [
        {"prompt": f"And {n}?", "answers": ["one", "two", "three"], "scores": [1, 3, 2]}
        for n in range(30)
    ]
    rows.append({"prompt": "And?", "answers": ["one"], "scores": [1]})
    (tmp_path / "ranked.json").write_text(json.dumps(rows))
    fields: dict[str, Any] = {"pairs_together": True, "skip_faulty_rows": 1, "max_steps": 9}
    fields |= {"eval_strategy": "steps", "eval_steps": 1, "early_stopping_patience": 1}
    fields |= {"learning_rate": 0.0, "validation_fraction": 0.2, "max_length": 64}
    out = tmp_path / "reward"
    figures = run_stage("reward", tiny, out, tmp_path / "ranked.json", **fields)
    prompts = len({str(row["prompt"]) for row in pairs_of(out, "train")})
    assert figures["pairs"] == prompts * 3 > 45
    parts = [{str(row["prompt"]) for row in pairs_of(out, split)} for split in ("dev", "test")]
    assert not parts[0] & parts[1]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    evaluated = [line for line in lines if "eval_loss" in line]
    assert [line["step"] for line in evaluated] == [1, 2]
    assert evaluated[0]["epoch"] == pytest.approx(1 / math.ceil(prompts / 4))
    assert "eval_accuracy" in evaluated[0]
