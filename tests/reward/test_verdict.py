"""When a reward model is a no-go, one reason at a time, and what the report says of it."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from common.artifacts import require_go
from common.errors import UserError
from reward.figures import reliability
from reward.report import draw_reliability, write_report
from reward.verdict import reasons_against
from tests.reward.test_figures import CHOSEN, FOUR, REJECTED

GOOD = {
    "accuracy": 0.7,
    "accuracy_chance_error": 0.02,
    "margin": 1.5,
    "calibration_error": 0.02,
    "calibration_error_as_trained": 0.1,
    "overconfidence_as_trained": 0.1,
    "calibration_error_by_chance": 0.02,
    "spam_thanks": 0.4,
    "spam_padding": -2.0,
    "accuracy_longer_worse": 0.6,
    "accuracy_longer_worse_chance_error": 0.05,
    "pairs_longer_worse": 100,
    "padding_difference": 1e-5,
    "link_slope": 2.0,
    "link_error_rate": 0.1,
}


@pytest.mark.parametrize(
    ("change", "pairs", "reason"),
    [
        ({}, 900, ""),
        ({"accuracy": 0.53}, 900, "accuracy 0.530 on 900 held-out pairs cannot be told"),
        ({"accuracy": 0.55}, 900, ""),  # above 0.5 + 2 x 0.02
        ({"accuracy_chance_error": 0.12}, 16, "accuracy 0.700 on 16 held-out pairs cannot be told"),
        (
            {"accuracy": 1.0, "accuracy_chance_error": 0.5},
            3,
            "accuracy 1.000 on 3 held-out pairs cannot be told from chance: no ",
        ),
        ({"overconfidence_as_trained": 0.28}, 900, "overconfidence 0.280, as trained, is above"),
        ({"overconfidence_as_trained": 0.26}, 900, ""),
        ({"calibration_error_as_trained": 0.36}, 900, ""),  # too modest: of the scale alone
        ({"margin": -0.5}, 900, "margin -0.50: the worse answers score higher"),
        ({"spam_thanks": 1.6}, 900, "thanks raises the score by 1.60"),
        ({"spam_copied_question": 1.6}, 900, "copied question raises the score by 1.60"),
        ({"accuracy_longer_worse": 0.39}, 900, "of 100 pairs whose longer answer is worse"),
        ({"accuracy_longer_worse": 0.41}, 900, ""),
        ({"accuracy_longer_worse": 0.0, "pairs_longer_worse": 0}, 900, ""),
        ({"padding_difference": 0.02}, 900, "scores differ by 0.020 with the batch"),
    ],
)
def test_reasons(change: dict[str, float], pairs: int, reason: str) -> None:
    """Each line was seen to fail with its check left out."""
    reasons = reasons_against(GOOD | change, pairs)
    assert len(reasons) == bool(reason)
    assert not reason or reasons[0].startswith(reason)


def test_alignment_asks_the_verdict(tmp_path: Path) -> None:
    """Broken by reading `go` with False as default: models from elsewhere were then refused."""
    require_go(tmp_path, allow_no_go=False)
    (tmp_path / "summary.json").write_text(json.dumps({"go": True, "no_go_reasons": []}))
    require_go(tmp_path, allow_no_go=False)
    (tmp_path / "summary.json").write_text(json.dumps({"go": False, "no_go_reasons": ["a", "b"]}))
    require_go(tmp_path, allow_no_go=True)
    with pytest.raises(UserError, match=r"is a no-go: a; b\. See .*report.md"):
        require_go(tmp_path, allow_no_go=False)


def test_report_by_hand() -> None:
    """Broken by margins of 1 for every pair. Without clean labels there is no column of them."""
    figures: dict[str, Any] = GOOD | {"go": False, "no_go_reasons": ["it is bad"]}
    report = write_report(figures, FOUR, CHOSEN, REJECTED, [0.9, 0.9, 0.2, 0.2])
    assert "| x | 2 | 1.000 | 0.50 |" in report and "clean" not in report
    figures["accuracy_clean_labels"] = 0.25
    probabilities = [0.9, 0.9, 0.2, 0.2]
    lines = write_report(figures, FOUR, CHOSEN, REJECTED, probabilities).splitlines()
    assert lines[0] == "# Reward model: no-go for PPO" and "- it is bad" in lines
    assert any(line.startswith("| x | 2 | 1.000 | 0.500 | 0.500 | 0.50 |") for line in lines)
    assert any(line.startswith("| y | 2 | 0.000 | 0.000 | 1.000 | -2.00 |") for line in lines)
    assert "| spam_thanks | 0.4 |" in lines and "| 2 | 0.900 | 1.000 |" in lines


def test_plot_is_well_formed_and_places_its_dots() -> None:
    """One pair, sure to 0.5 and half agreed: the lower left corner's middle. Broken by an y axis
    that points down."""
    root = ElementTree.fromstring(draw_reliability(reliability([0.5, 1.0])))
    dots = [e.attrib for e in root.iter() if e.tag.endswith("circle")]
    assert [(d["cx"], d["cy"]) for d in dots] == [("40.0", "190.0"), ("340.0", "40.0")]
