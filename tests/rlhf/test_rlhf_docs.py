"""docs/rlhf.md names functions, tests and figures that exist."""

import re
from collections.abc import Callable
from pathlib import Path

from rlhf.trainer import PPOTrainer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "rlhf.md").read_text(encoding="utf-8")


def test_functions_and_tests_exist() -> None:
    """Broken once: a function renamed in the page."""
    places = re.findall(r"`(rlhf/\w+\.py):(\w+)`", PAGE)
    assert len(places) > 25
    for file, name in places:
        source = (ROOT / file).read_text(encoding="utf-8")
        assert re.search(rf"(def|class) {name}\b", source), (file, name)
    files = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    tests = re.findall(r"`(test_\w+)`", PAGE)
    assert len(tests) > 25
    for test in tests:
        assert any(f"def {test}(" in text for text in files), test


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
