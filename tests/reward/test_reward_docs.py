"""docs/reward.md defines every figure of the summary."""

import re
from pathlib import Path

from reward.figures import accuracy_figures, length_figures
from reward.probes import SPAM
from tests.reward.test_figures import CHOSEN, FOUR, REJECTED

PAGE = (Path(__file__).parents[2] / "docs" / "reward.md").read_text(encoding="utf-8")


def test_every_figure_is_defined() -> None:
    """Broken once: a row taken out of the page's table."""
    gold = CHOSEN, REJECTED
    figures = accuracy_figures(FOUR, CHOSEN, REJECTED, simulated=True)
    figures |= length_figures(FOUR, CHOSEN, REJECTED, gold)
    defined = set(re.findall(r"`([\w<>]+)`", PAGE.split("## Figures")[1].split("\n## ")[0]))
    for name in [*figures, "calibration_error", "calibration_error_by_chance", "go"]:
        assert re.sub(r"_[xy]$", "_<kind>", name) in defined, name
    for probe in SPAM:
        assert probe.replace("_", " ").replace("copied question", "the question") in PAGE, probe
