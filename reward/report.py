"""`report.md` and `reliability.svg`: the reward model's figures, as one reads them."""

from typing import Any

from datasets import Dataset

from reward.figures import ReliabilityBin, calibration_error, margins, reliability

SIDE, EDGE = 300, 40  # pixels: of the plot, and of the margin around it


def write_report(
    figures: dict[str, Any],
    pairs: Dataset,
    chosen: list[float],
    rejected: list[float],
    probabilities: list[float],
) -> str:
    """The report as Markdown.

    Args:
        figures: the summary's.
        pairs, chosen, rejected, probabilities: as in `reward.figures`.
    """
    bins, lines = reliability(probabilities), write_verdict(figures).splitlines()
    known = "accuracy_clean_labels" in figures
    names = ["kind", "pairs", "accuracy", *(["on clean labels", "at most"] if known else [])]
    names += ["margin", "calibration error"]
    lines += ["\n## By kind of pair\n", _cells(names), "|---" * len(names) + "|"]
    everything = list(range(len(pairs)))
    columns = chosen, rejected, probabilities
    kinds = {
        kind: [place for place in everything if pairs["kind"][place] == kind]
        for kind in sorted(set(pairs["kind"]))
    }
    for name, places in {"all": everything, **kinds}.items():
        lines.append(_row(name, known, pairs.select(places), *_at(places, *columns)))
    lines += [
        "\n## Reliability\n",
        "How sure it is of the answer it prefers, and how often the labels as given prefer it, "
        "too. For a score difference d it is sure by e + (1 - 2 e) sigmoid(s d), a labeller who "
        f"errs in a share e of all pairs: e = {figures['link_error_rate']:.3f} and "
        f"s = {figures['link_slope']:.2f} fit these pairs best; for each row they were fitted on "
        f"other prompts. Calibration error {figures['calibration_error']:.3f}, of sigmoid(d) alone "
        f"{figures['calibration_error_as_trained']:.3f}; of that many pairs a perfect model would "
        f"show about {figures['calibration_error_by_chance']:.3f} by chance.\n",
        "![reliability](reliability.svg)\n",
        "| pairs | sure | agrees |",
        "|---|---|---|",
        *(f"| {bin.pairs} | {bin.confidence:.3f} | {bin.agreement:.3f} |" for bin in bins),
        "\n## Length, spam, padding\n",
        "`spam_*` is the mean change of score when a good answer is spoilt so; `margin` is what a "
        "better answer gains.\n",
        "| figure | |",
        "|---|---|",
    ]
    shown = ("length_", "accuracy_longer", "pairs_longer", "margin", "spam_", "padding_")
    lines += [f"| {k} | {v:.4g} |" for k, v in figures.items() if k.startswith(shown)]
    return "\n".join(lines) + "\n"


def write_verdict(figures: dict[str, Any]) -> str:
    """The report's beginning: go or no-go, and why."""
    verdict = "go" if figures["go"] else "no-go"
    reasons = [f"- {reason}\n" for reason in figures["no_go_reasons"]]
    return "".join(
        [f"# Reward model: {verdict} for PPO\n\n", *(reasons or ["Nothing speaks against it.\n"])]
    )


def _at(places: list[int], *columns: list[float]) -> list[list[float]]:
    return [[column[place] for place in places] for column in columns]


def _cells(texts: list[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _row(
    name: str,
    known: bool,
    pairs: Dataset,
    chosen: list[float],
    rejected: list[float],
    probabilities: list[float],
) -> str:
    distances = margins(pairs, chosen, rejected)
    count = len(pairs)
    given = sum(a > b for a, b in zip(chosen, rejected, strict=True)) / count
    clean = sum(distance > 0 for distance in distances) / count
    error = calibration_error(reliability(probabilities))
    ceiling = 1 - sum(pairs["flipped"]) / count  # of a perfect judge, on the labels as given
    shares = [f"{given:.3f}", *([f"{clean:.3f}", f"{ceiling:.3f}"] if known else [])]
    mean = sum(distances) / count
    return _cells([name, str(count), *shares, f"{mean:.2f}", f"{error:.3f}"])


def draw_reliability(bins: list[ReliabilityBin]) -> str:
    """An SVG: confidence to the right, agreement upwards, a dot's area by its pairs.

    On the diagonal it is right as often as it is sure.
    """
    most = max(bin.pairs for bin in bins)
    size = SIDE + 2 * EDGE

    def x(confidence: float) -> float:
        return EDGE + (confidence - 0.5) * 2 * SIDE

    def y(agreement: float) -> float:
        return EDGE + (1 - agreement) * SIDE

    dots = [
        f'<circle cx="{x(bin.confidence):.1f}" cy="{y(bin.agreement):.1f}" '
        f'r="{2 + 8 * (bin.pairs / most) ** 0.5:.1f}" fill="#36c" fill-opacity="0.6"/>'
        for bin in bins
    ]
    text = f'<text y="{size - 10}" font-family="sans-serif" font-size="12"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{size}" height="{size}">',
            f'<rect width="{size}" height="{size}" fill="white"/>',
            f'<rect x="{EDGE}" y="{EDGE}" width="{SIDE}" height="{SIDE}" '
            'fill="none" stroke="black"/>',
            f'<line x1="{x(0.5)}" y1="{y(0.5)}" x2="{x(1)}" y2="{y(1)}" stroke="gray"/>',
            *dots,
            f'{text} x="{EDGE}">sure: 0.5</text>',
            f'{text} x="{EDGE + SIDE - 6}">1</text>',
            f'<text x="{EDGE}" y="{EDGE - 10}" font-family="sans-serif" font-size="12">'
            "agrees: 1 at the top, 0 at the bottom</text>",
            "</svg>\n",
        ]
    )
