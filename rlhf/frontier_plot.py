"""The frontier as a picture: the reward model's score and gold against KL, side by side.

The axis of KL is by its root, as over-optimisation is drawn (Gao et al., arXiv 2210.10760): what a
policy gains is in proportion to that at first, and runs at 1 and at 13 nats fit on one axis.
"""

import math
import statistics
from typing import Any

WIDTH, HEIGHT, GAP = 430, 320, 70  # of a panel, and left of it, pixels
TOP = 40
# A method's colour, and where its labels stand beside their dots, pixels.
STYLES = {
    "ppo": ("#c0392b", 8, -6),
    "rloo": ("#2e6da4", 8, 13),
    "grpo": ("#3a8f3a", 8, 13),
    "dpo": ("#8e5ba6", 8, -6),
    "best_of_n": ("#555555", -8, -6),
}
PANELS = {
    "score": "the reward model's score",
    "gold_drawn": "gold, the judge's, of the same answers",
}


def plot_frontier(rows: list[dict[str, Any]]) -> str:
    """SVG; a small dot a run, a line through the means over seeds of a method's coefficients."""
    right = max([row["kl"] for row in rows], default=0) * 1.2 or 1.0
    parts = []
    for place, (figure, title) in enumerate(PANELS.items()):
        values = [row[figure] for row in rows] or [0.0]
        low, high = min(values), max(values)
        margin = 0.08 * (high - low) or 0.1
        panel = Panel(GAP + place * (WIDTH + GAP), right, low - margin, high + margin)
        parts.append(panel.frame(title))
        for method, style in STYLES.items():
            own = [row for row in rows if row["method"] == method]
            parts.append(panel.curve(own, figure, *style))
    for place, (method, (colour, *_)) in enumerate(STYLES.items()):
        x = GAP + place * 110
        y = TOP + HEIGHT + 58
        parts.append(f'<circle cx="{x}" cy="{y - 4}" r="5" fill="{colour}"/>')
        parts.append(f'<text x="{x + 10}" y="{y}">{method.replace("_", " ")}</text>')
    size = f'width="{2 * (WIDTH + GAP) + 20}" height="{TOP + HEIGHT + 75}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def by_setting(rows: list[dict[str, Any]]) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """The runs of each method and setting (`n 4`, `beta 0.1`), in the order of the rows."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        setting = f"n {row['n']}" if row["n"] else f"beta {row['kl_coefficient']:g}"
        groups.setdefault((row["method"], setting), []).append(row)
    return groups


class Panel:
    """One pair of axes: KL from 0 to `right`, by its root, and a figure from `low` to `high`."""

    def __init__(self, left: float, right: float, low: float, high: float) -> None:
        self.left, self.right, self.low, self.high = left, right, low, high

    def x(self, kl: float) -> float:
        """Pixels from the left."""
        return self.left + WIDTH * math.sqrt(max(0.0, kl) / self.right)  # measured, it can be < 0

    def y(self, value: float) -> float:
        """Pixels from the top."""
        return TOP + HEIGHT * (self.high - value) / (self.high - self.low)

    def frame(self, title: str) -> str:
        """Title, box, and five marks on each axis."""
        parts = [
            f'<text x="{self.left}" y="{TOP - 14}" font-size="14">{title}</text>'
            f'<rect x="{self.left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" '
            'stroke="#999"/>'
            f'<text x="{self.left + WIDTH / 2}" y="{TOP + HEIGHT + 34}" text-anchor="middle">'
            "KL to the fine-tuned model, nats an answer</text>"
        ]
        for mark in range(5):
            kl = self.right * (mark / 4) ** 2
            value = self.low + (self.high - self.low) * mark / 4
            parts.append(
                f'<text x="{self.x(kl):.1f}" y="{TOP + HEIGHT + 16}" text-anchor="middle">'
                f"{kl:.1f}</text>"
                f'<text x="{self.left - 6}" y="{self.y(value) + 4:.1f}" text-anchor="end">'
                f"{value:.2f}</text>"
            )
        return "\n".join(parts)

    def curve(
        self, rows: list[dict[str, Any]], figure: str, colour: str, aside: int, below: int
    ) -> str:
        """A method's runs, and the line through its settings' means, each with its setting."""
        anchor = "start" if aside > 0 else "end"
        parts = [
            f'<circle cx="{self.x(row["kl"]):.1f}" cy="{self.y(row[figure]):.1f}" r="3" '
            f'fill="{colour}" opacity="0.4"/>'
            for row in rows
        ]
        means = sorted(
            (
                statistics.fmean(row["kl"] for row in group),
                statistics.fmean(row[figure] for row in group),
                setting.removeprefix("beta "),
            )
            for (_, setting), group in by_setting(rows).items()
        )
        points = " ".join(f"{self.x(kl):.1f},{self.y(value):.1f}" for kl, value, _ in means)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        for kl, value, setting in means:
            x, y = self.x(kl), self.y(value)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}"/>')
            parts.append(
                f'<text x="{x + aside:.1f}" y="{y + below:.1f}" font-size="10" '
                f'text-anchor="{anchor}" fill="{colour}">{setting}</text>'
            )
        return "\n".join(parts)
