"""Early stopping: when a run ends, and with which weights. And how a stage is called."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from common import stage
from common.errors import UserError
from common.stage import early_stopping, run_stage


class Point(nn.Module):
    """One weight, pulled towards x."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": ((self.weight - x) ** 2).mean()}


def arguments(path: Path, **more: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {"max_steps": 20, "optim": "sgd", "max_grad_norm": 0.0}
    defaults |= {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_type": "constant"}
    defaults |= {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    return TrainingArguments(output_dir=str(path), **(defaults | more))


@pytest.mark.parametrize(("patience", "steps", "weight"), [(2, 3, 0.5), (0, 20, 1.0)])
def test_stops_and_keeps_the_best(tmp_path: Path, patience: int, steps: int, weight: float) -> None:
    """By hand: trained towards 1 by steps of 0.25 x 2 (1 - w), the weight is 1 - 0.5^n; held out is
    0.6, so that 0.5, 0.75, 0.875 have losses of 0.01, 0.0225, 0.0756: the first is the best. Two
    more are no better, then it stops. Broken by leaving the best weights unloaded (0.875), and by
    the largest loss as the best."""
    args = arguments(tmp_path, learning_rate=0.25)
    callbacks = early_stopping(patience, args)
    model: Any = Point()
    trainer = Trainer(
        model=model,
        args=args,
        train_dataset=[{"x": torch.tensor(1.0)}] * 8,
        eval_dataset=[{"x": torch.tensor(0.6)}],
        callbacks=callbacks,
    )
    trainer.can_return_loss = True
    trainer.train()
    assert trainer.state.global_step == steps
    assert float(model.weight.detach()) == pytest.approx(weight, abs=1e-3)


def test_needs_evaluations(tmp_path: Path) -> None:
    """Broken by leaving the check to transformers' assertion."""
    args = arguments(tmp_path, eval_strategy="no")
    assert early_stopping(0, args) == []
    with pytest.raises(UserError, match="needs evaluations: give --eval_strategy"):
        early_stopping(3, args)


def test_a_realm_has_its_configuration_in_its_own_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken by looking for a realm's, too, in `configs`."""
    commands: list[list[str]] = []

    def execute(command: list[str]) -> Any:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(stage.subprocess, "run", execute)
    run_stage("realm/7", "rlhf_judge", [])
    run_stage("own", "sft", ["--seed", "1"])
    start = [sys.executable, "-m"]
    assert commands == [
        [*start, "rlhf", "--config", "out/realm/7/configs/rlhf_judge.yaml"],
        [*start, "sft", "--config", "configs/own/sft.yaml", "--seed", "1"],
    ]
