"""docs/reward.md defines every figure of the summary."""

import re
from pathlib import Path

from reward.figures import accuracy_figures, calibration_figures, length_figures
from reward.probes import SPAM, padding_difference
from tests.reward.test_figures import CHOSEN, FOUR, REJECTED

PAGE = (Path(__file__).parents[2] / "docs" / "reward.md").read_text(encoding="utf-8")


def test_every_figure_is_defined() -> None:
    """Seen to fail with any one row taken out of the page's table."""
    figures = accuracy_figures(FOUR, CHOSEN, REJECTED, simulated=True)
    figures |= length_figures(FOUR, CHOSEN, REJECTED, gold=(CHOSEN, REJECTED))
    figures |= calibration_figures([0.9, 0.8, 0.4, 0.3], CHOSEN, REJECTED)
    defined = set(re.findall(r"`([\w<>]+)`", PAGE.split("## Figures")[1].split("\n## ")[0]))
    own = {re.sub(r"_[xy]$", "_<kind>", name) for name in figures}
    assert defined >= {*own, "spam_<probe>", padding_difference.__name__, "go", "no_go_reasons"}
    for probe in SPAM:
        assert probe.replace("_", " ").replace("copied question", "the question") in PAGE, probe
