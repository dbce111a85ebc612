"""docs/rlhf.md names functions, tests and figures that exist."""

import re
from collections.abc import Callable
from pathlib import Path

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
    known = {"loss", "grad_norm", "learning_rate", "epoch", "step"}  # transformers' own
    for name in line.keys() - known:
        name = re.sub(r"^rewards/\w+/mean$", "rewards/<name>/mean", name)
        assert re.sub(r"^completions/\w+$", "completions/*", name) in defined, name
