"""How well a reward model ranks."""

from datasets import Dataset


def accuracy_figures(
    pairs: Dataset, chosen: list[float], rejected: list[float]
) -> dict[str, float]:
    """Shares of pairs ranked right.

    Args:
        pairs: with `flipped` (the labeller erred) and `kind`.
        chosen, rejected: scores of each pair's answers.

    Returns:
        `accuracy` against the labels as given, `accuracy_clean_labels` against the truth behind
        them, `accuracy_ceiling` (what a perfect judge reaches on the labels as given), and the
        clean accuracy of every kind of pair as `accuracy_<kind>`, with the pairs' count.
    """
    agrees = [a > b for a, b in zip(chosen, rejected, strict=True)]
    clean = [agree != flip for agree, flip in zip(agrees, pairs["flipped"], strict=True)]
    figures = {
        "accuracy": _mean(agrees),
        "accuracy_clean_labels": _mean(clean),
        "accuracy_ceiling": 1 - _mean(pairs["flipped"]),
    }
    for kind in sorted(set(pairs["kind"])):
        of_kind = [c for c, k in zip(clean, pairs["kind"], strict=True) if k == kind]
        figures[f"accuracy_{kind}"] = _mean(of_kind)
        figures[f"pairs_{kind}"] = len(of_kind)
    return figures


def _mean(values: list[bool]) -> float:
    return sum(values) / len(values)
