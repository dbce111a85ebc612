"""PPO that is killed loses nothing, whenever that is."""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import AutoModelForSequenceClassification

from tests.kills import run_killed
from tests.toy import save_toy

FIELDS: dict[str, Any] = {
    "config": "configs/own/rlhf.yaml",
    "learning_rate": 1e-3,
    "prompts": 16,
    "eval_prompts": 4,
    "num_updates": 6,
    "max_completion_length": 4,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "save_steps": 4,  # the four optimizer steps of an update
    "bf16": False,
}


def read(output: Path) -> dict[str, Any]:
    """What a finished run left: weights of policy and critic, and scores."""
    files = [output / "model.safetensors", *output.rglob("value_model/model.safetensors")]
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": {
            str(file.relative_to(output)): hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files
        },
        "scores": [(line["step"], line["score"]) for line in lines if "score" in line],
    }


def test_kills_change_nothing(tmp_path: Path) -> None:
    """Policy and critic end in the very weights of a run that was left alone."""
    policy, reward = save_toy(tmp_path / "policy"), tmp_path / "reward"
    AutoModelForSequenceClassification.from_pretrained(policy, num_labels=1).save_pretrained(reward)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (reward / name).write_bytes((policy / name).read_bytes())
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps([{"prompt": f"And {n}?", "completion": "So."} for n in range(40)]))
    parents = {"data": asked, "model_name_or_path": policy, "reward": reward}
    run_killed("rlhf", tmp_path, 4, FIELDS | parents)
    whole = read(tmp_path / "whole")
    assert len(whole["scores"]) == 6 and len(whole["weights"]) >= 2
    for killed in tmp_path.glob("killed-*"):
        assert read(killed) == whole, killed.name
