"""How well a reward model ranks, how sure it may be, and whether it likes length.

Everything here is arithmetic on scores: (N,) lists of the chosen and of the rejected answers'.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from datasets import Dataset
from torch import Tensor

BINS = 10  # of the reliability table
FOLDS = 5


# Figures that are no kind's: a kind of pair may not be called so.
TAKEN = {"clean_labels", "ceiling", "chance_error", "longer_worse", "longer_worse_chance_error"}


def accuracy_figures(
    pairs: Dataset, chosen: list[float], rejected: list[float], *, simulated: bool
) -> dict[str, float]:
    """Shares of pairs ranked right.

    Args:
        pairs: with `flipped` (the labeller erred) and `kind`.
        chosen, rejected: scores of each pair's answers.
        simulated: the labeller is, so that his errors are known.

    Returns:
        `accuracy` against the labels as given; of a simulated labeller `accuracy_clean_labels`
        against the truth behind them and `accuracy_ceiling` (what a perfect judge reaches on the
        labels as given); `accuracy_chance_error` (how far a guesser's accuracy strays: one standard
        error), `margin` (mean score of the truly better answer over the other's), and the clean
        accuracy of every kind of pair as `accuracy_<kind>`, with the pairs' count.
    """
    agrees = [a > b for a, b in zip(chosen, rejected, strict=True)]
    clean = [agree != flip for agree, flip in zip(agrees, pairs["flipped"], strict=True)]
    figures = {}
    for kind in sorted(set(pairs["kind"])):
        of_kind = [c for c, k in zip(clean, pairs["kind"], strict=True) if k == kind]
        figures[f"accuracy_{kind}"] = _mean(of_kind)
        figures[f"pairs_{kind}"] = len(of_kind)
    figures["accuracy"] = _mean(agrees)  # over a kind that is called like one of them
    if simulated:
        figures["accuracy_clean_labels"] = _mean(clean)
        figures["accuracy_ceiling"] = 1 - _mean(pairs["flipped"])
    return figures | {
        "accuracy_chance_error": chance_error(agrees, pairs["prompt"]),
        "margin": _mean(margins(pairs, chosen, rejected)),
    }


def chance_error(right: list[bool], prompts: Iterable[object]) -> float:
    """Standard error of the share `right`, were each pair right by the toss of a coin.

    Pairs of one prompt share answers, so they are right or wrong together: of independent prompts
    the deviations from one half are summed by prompt.
    """
    sums: dict[str, float] = {}
    for hit, prompt in zip(right, prompts, strict=True):
        sums[str(prompt)] = sums.get(str(prompt), 0.0) + hit - 0.5
    return math.hypot(*sums.values()) / len(right)


def margins(pairs: Dataset, chosen: list[float], rejected: list[float]) -> list[float]:
    """Score of each pair's truly better answer over the other's."""
    return [
        b - a if flip else a - b
        for a, b, flip in zip(chosen, rejected, pairs["flipped"], strict=True)
    ]


def link(differences: Tensor, slope: float, error_rate: float | Tensor) -> Tensor:
    """From the difference of two scores to the probability that a label prefers the first.

    Bradley and Terry's sigmoid, for a labeller who errs at a rate of his own whatever the pair
    (Christiano et al. 2017, arXiv:1706.03741, section 2.2.3): however far apart two answers are, no
    label is surer than 1 - `error_rate`.
    """
    return error_rate + (1 - 2 * error_rate) * torch.sigmoid(slope * differences)


def fit_link(differences: Tensor) -> tuple[float, float]:
    """Slope and error rate, the likeliest of a grid for labels that all prefer the first answer.

    Args:
        differences: (N,) scores of the chosen answers less those of the rejected.
    """
    slopes = torch.logspace(-2, 2, 81).tolist()
    error_rates = torch.linspace(0, 0.45, 91)[:, None]
    likelihoods = [link(differences, slope, error_rates).log().sum(1) for slope in slopes]
    best = int(torch.stack(likelihoods).argmax())
    return slopes[best // len(error_rates)], error_rates[best % len(error_rates)].item()


def label_probabilities(pairs: Dataset, chosen: list[float], rejected: list[float]) -> list[float]:
    """The probability of each pair's label, by a link fitted on the pairs of other prompts.

    Args:
        pairs: with `prompt`; their prompts are dealt out to five folds.
        chosen, rejected: scores of each pair's answers.
    """
    numbers: dict[str, int] = {}
    folds = torch.tensor(
        [numbers.setdefault(str(p), len(numbers)) % FOLDS for p in pairs["prompt"]]
    )
    differences = torch.tensor(chosen) - torch.tensor(rejected)
    probabilities = torch.empty_like(differences)
    for fold in folds.unique():
        own = folds == fold
        probabilities[own] = link(differences[own], *fit_link(differences[~own]))
    return probabilities.tolist()


def calibration_figures(
    probabilities: list[float], chosen: list[float], rejected: list[float]
) -> dict[str, float]:
    """How far it can be believed to be as sure as it says.

    Args:
        probabilities: those of `label_probabilities`.
        chosen, rejected: scores of each pair's answers.

    Returns:
        `calibration_error` of the probabilities with what chance would show in so few pairs,
        `calibration_error_as_trained` of the sigmoid of the scores' difference, which the loss had
        in mind, `overconfidence_as_trained`, what of it is too sure, and the link of all pairs:
        `link_slope`, `link_error_rate`.
    """
    differences = torch.tensor(chosen) - torch.tensor(rejected)
    bins, as_trained = map(reliability, (probabilities, torch.sigmoid(differences).tolist()))
    slope, error_rate = fit_link(differences)
    return {
        "calibration_error": calibration_error(bins),
        "calibration_error_by_chance": calibration_error_by_chance(bins),
        "calibration_error_as_trained": calibration_error(as_trained),
        "overconfidence_as_trained": overconfidence(as_trained),
        "link_slope": slope,
        "link_error_rate": error_rate,
    }


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs of which the model is about equally sure."""

    pairs: int
    confidence: float  # mean probability that the model gives to the answer it prefers
    agreement: float  # share of the labels that prefer it, too


def reliability(probabilities: list[float]) -> list[ReliabilityBin]:
    """Is it right as often as it is sure?

    Each pair is taken from the model's side: its confidence is that of the answer it prefers, from
    0.5 to 1, and the label, as given, agrees or not (a tie agrees by half). Pairs are sorted into
    ten ranges of confidence of equal width; empty ones are left out.

    Args:
        probabilities: that the model gives to the chosen answer of each pair.
    """
    found: dict[int, list[tuple[float, float]]] = {}
    for probability in probabilities:
        confidence = max(probability, 1 - probability)
        agreement = 0.5 if probability == 0.5 else float(probability > 0.5)
        place = min(BINS - 1, int((confidence - 0.5) * 2 * BINS))
        found.setdefault(place, []).append((confidence, agreement))
    return [
        ReliabilityBin(len(rows), _mean([c for c, _ in rows]), _mean([a for _, a in rows]))
        for _, rows in sorted(found.items())
    ]


def calibration_error(bins: list[ReliabilityBin]) -> float:
    """Expected calibration error: mean distance of confidence and agreement, by pairs.

    Naeini et al. 2015; Guo et al. 2017, arXiv:1706.04599. Labels as given: a labeller who errs
    once in ten is met by a confidence of 0.9, not of 1.
    """
    distances = [bin.pairs * abs(bin.confidence - bin.agreement) for bin in bins]
    return sum(distances) / sum(bin.pairs for bin in bins)


def overconfidence(bins: list[ReliabilityBin]) -> float:
    """The part of the calibration error that is of too much confidence, not of too little."""
    excess = [bin.pairs * max(0.0, bin.confidence - bin.agreement) for bin in bins]
    return sum(excess) / sum(bin.pairs for bin in bins)


def calibration_error_by_chance(bins: list[ReliabilityBin]) -> float:
    """What a perfectly calibrated model's error would come to in so few pairs, about.

    The mean distance of a share in n draws from its probability p is sqrt(2 p (1 - p) / (pi n)).
    """
    distances = [
        bin.pairs * math.sqrt(2 * bin.confidence * (1 - bin.confidence) / (math.pi * bin.pairs))
        for bin in bins
    ]
    return sum(distances) / sum(bin.pairs for bin in bins)


def correlation(one: list[float], other: list[float]) -> float:
    """Pearson's; 0 where one of the two never changes."""
    mean_one, mean_other = _mean(one), _mean(other)
    both = sum((a - mean_one) * (b - mean_other) for a, b in zip(one, other, strict=True))
    spread = sum((a - mean_one) ** 2 for a in one) * sum((b - mean_other) ** 2 for b in other)
    return both / math.sqrt(spread) if spread > 0 else 0.0


def partial_correlation(one: list[float], other: list[float], given: list[float]) -> float:
    """Correlation of what a straight line through `given` leaves of the two; 0 if nothing."""
    a, b, c = correlation(one, other), correlation(one, given), correlation(other, given)
    left = (1 - b**2) * (1 - c**2)
    return (a - b * c) / math.sqrt(left) if left > 1e-12 else 0.0


def length_figures(
    pairs: Dataset,
    chosen: list[float],
    rejected: list[float],
    gold: tuple[list[float], list[float]] | None,
) -> dict[str, float]:
    """Does it like length? Lengths are characters of the answer.

    Args:
        pairs, chosen, rejected: as in `accuracy_figures`.
        gold: the true scores of the chosen and the rejected answers, where they are known.

    Returns:
        `length_correlation` of score and length over all answers, with gold known
        `length_correlation_given_gold`, and `accuracy_longer_worse` with its chance error and its
        pairs: the share ranked right where the truly worse answer is the longer one; 0 where there
        is none.
    """
    lengths = {
        side: [float(len(answer[-1]["content"])) for answer in pairs[side]]
        for side in ("chosen", "rejected")
    }
    every = lengths["chosen"] + lengths["rejected"]
    figures = {"length_correlation": correlation(chosen + rejected, every)}
    if gold is not None:
        figures["length_correlation_given_gold"] = partial_correlation(
            chosen + rejected, every, gold[0] + gold[1]
        )
    worse_longer = [
        (a > b) if flip else (b > a)
        for a, b, flip in zip(lengths["chosen"], lengths["rejected"], pairs["flipped"], strict=True)
    ]
    gains = margins(pairs, chosen, rejected)
    places = [place for place, longer in enumerate(worse_longer) if longer]
    right = [gains[place] > 0 for place in places]
    prompts = [pairs["prompt"][place] for place in places]
    figures["accuracy_longer_worse"] = _mean(right) if right else 0.0
    figures["accuracy_longer_worse_chance_error"] = chance_error(right, prompts) if right else 0.0
    figures["pairs_longer_worse"] = len(right)
    return figures


def _mean(values: list[bool] | list[float]) -> float:
    return sum(values) / len(values)
