"""docs/rlhf.md names functions, tests and figures that exist."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.trainer import PPOTrainer
from tests.pages import ROOT, check_names

PAGE = (ROOT / "docs" / "rlhf.md").read_text(encoding="utf-8")


def test_functions_and_tests_exist() -> None:
    """Broken once: a function renamed in the page."""
    check_names(PAGE, "rlhf|common", 25, Path(__file__).parent, ROOT / "tests" / "common")


def test_every_logged_figure_is_defined(build: Callable[..., PPOTrainer]) -> None:
    """Broken once: a row taken out of the page's table."""
    trainer = build(num_updates=1)
    trainer.train()
    (line,) = [line for line in trainer.state.log_history if "score" in line]
    defined = set(re.findall(r"`([\w/<>*]+)`", PAGE.split("## Figures in")[1]))
    for name in line:
        name = re.sub(r"^rewards/\w+/mean$", "rewards/<name>/mean", name)
        assert re.sub(r"^completions/\w+$", "completions/*", name) in defined, name


def test_loss_and_grad_norms_are_as_defined(build: Callable[..., PPOTrainer]) -> None:
    """In an update of one optimizer step: the critic's is of its own part of the loss, so twice as
    steep where that counts twice. Broken once: the critic's norm for the policy's.
    """
    lines = []
    for vf_coef in (0.5, 1.0):
        trainer = build(num_updates=1, num_mini_batches=1, vf_coef=vf_coef, bf16=False)
        trainer.train()
        (line,) = [line for line in trainer.state.log_history if "score" in line]
        loss = line["policy_loss"] + vf_coef * line["value_loss"]
        assert line["loss"] == pytest.approx(loss, rel=1e-4)
        assert line["value_loss"] > 1e-3
        assert line["grad_norm"] == pytest.approx(line["policy_grad_norm"], rel=1e-6)
        lines.append(line)
    half, whole = lines
    assert whole["policy_grad_norm"] == pytest.approx(half["policy_grad_norm"], rel=1e-3)
    assert whole["critic_grad_norm"] == pytest.approx(2 * half["critic_grad_norm"], rel=1e-3)
