"""Accuracy, calibration and length worked by hand; correlations against numpy."""

import math
from typing import Any

import numpy
import pytest
import torch
from datasets import Dataset

from reward.figures import (
    accuracy_figures,
    calibration_error,
    calibration_error_by_chance,
    calibration_figures,
    chance_error,
    correlation,
    fit_link,
    label_probabilities,
    length_figures,
    partial_correlation,
    reliability,
)


def pairs(*rows: tuple[str, str, str, bool]) -> Dataset:
    """(chosen, rejected, kind, flipped) with a prompt."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": "q"}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "kind": kind,
                "flipped": flipped,
            }
            for chosen, rejected, kind, flipped in rows
        ]
    )


FOUR = pairs(("a", "bb", "x", False), ("a", "bb", "x", True), ("cc", "d", "y", False), ("e", "ff", "y", False))  # fmt: skip # noqa: E501
CHOSEN, REJECTED = [3.0, 2.0, 1.0, 0.0], [1.0, 1.0, 4.0, 1.0]


def test_accuracy_and_margin_by_hand() -> None:
    """Margins +2, -1 (the labeller erred), -3, -1. Broken by margins that pass over `flipped`, and
    once by a ceiling of 1 and clean labels where nobody knows who erred."""
    figures = accuracy_figures(FOUR, CHOSEN, REJECTED, simulated=True)
    unknown = accuracy_figures(FOUR, CHOSEN, REJECTED, simulated=False)
    assert figures.keys() - unknown.keys() == {"accuracy_clean_labels", "accuracy_ceiling"}
    assert figures["accuracy"] == 2 / 4 and figures["accuracy_ceiling"] == 3 / 4
    assert figures["accuracy_clean_labels"] == figures["accuracy"] - 1 / 4
    assert figures["margin"] == -3 / 4
    assert (figures["accuracy_x"], figures["accuracy_y"]) == (1 / 2, 0.0)
    assert (figures["pairs_x"], figures["pairs_y"]) == (2, 2)


def test_chance_is_of_prompts_and_not_of_pairs() -> None:
    """Nine answers a prompt, scored by dice: a guesser passes two standard errors once in forty
    times. Broken by the 36 pairs taken each for itself: he passed once in eight."""
    dice, passed = numpy.random.default_rng(0), 0
    prompts = [prompt for prompt in range(40) for _ in range(36)]
    for _ in range(400):
        scores = dice.random((40, 9))
        right = [bool(a > b) for row in scores for i, a in enumerate(row) for b in row[i + 1 :]]
        passed += sum(right) / len(right) > 0.5 + 2 * chance_error(right, prompts)
    assert passed / 400 < 0.05
    assert chance_error([True] * 3, ["a"] * 3) == 0.5
    assert chance_error([True, False, True, True], "abcd") == 0.5 / math.sqrt(4)


def test_calibration_by_hand() -> None:
    """Eight pairs sure to 0.88, of which six agree, two sure to 0.62 in the wrong.

    Error: (8 |0.88 - 0.75| + 2 |0.62 - 0|) / 10. Broken by taking the probability of the chosen
    answer in place of the preferred one.
    """
    bins = reliability([0.88] * 6 + [0.12] * 2 + [0.38] * 2)
    assert [(b.pairs, round(b.confidence, 9), b.agreement) for b in bins] == [
        (2, 0.62, 0.0),
        (8, 0.88, 0.75),
    ]
    assert calibration_error(bins) == pytest.approx((8 * 0.13 + 2 * 0.62) / 10)
    assert reliability([0.5])[0].agreement == 0.5
    assert reliability([1.0])[0].confidence == 1.0


def drawn_differences(count: int, slope: float, error_rate: float, seed: int) -> Any:
    """Differences chosen - rejected whose labels a labeller drew who errs at `error_rate`."""
    dice = numpy.random.default_rng(seed)
    difference = dice.normal(0, 2, count)
    prefers = error_rate + (1 - 2 * error_rate) / (1 + numpy.exp(-slope * difference))
    return numpy.where(dice.random(count) < prefers, difference, -difference)


def test_a_calibrated_model_shows_what_chance_shows() -> None:
    """Labels drawn by the model's own probabilities; the mean of 200 draws. Broken by leaving pi
    out of the formula."""
    errors, expected = [], []
    for seed in range(200):
        differences = torch.tensor(drawn_differences(300, 1.0, 0.0, seed))
        bins = reliability(torch.sigmoid(differences).tolist())
        errors.append(calibration_error(bins))
        expected.append(calibration_error_by_chance(bins))
    assert numpy.mean(errors) == pytest.approx(numpy.mean(expected), rel=0.1)


def test_the_link_finds_the_labeller() -> None:
    """From 20,000 of his labels, error rate and slope; of a perfect one an error rate near 0.

    Broken by a factor of (1 - error_rate) in the link.
    """
    slope, error_rate = fit_link(torch.tensor(drawn_differences(20_000, 3.0, 0.1, seed=0)))
    assert slope == pytest.approx(3.0, rel=0.15) and error_rate == pytest.approx(0.1, abs=0.011)
    slope, error_rate = fit_link(torch.tensor(drawn_differences(20_000, 2.0, 0.0, seed=1)))
    assert slope == pytest.approx(2.0, rel=0.15) and error_rate < 0.02


def test_the_link_calibrates_pairs_it_was_not_fitted_on() -> None:
    """A model surer than its labeller is off as trained, and by chance alone with the link.

    And a label that contradicts all others counts in the others' links, not in its own. Broken by
    fitting each fold's link on its own pairs.
    """
    differences = drawn_differences(3_000, 3.0, 0.1, seed=2)
    zeros = [0.0] * len(differences)
    many = Dataset.from_dict({"prompt": [str(place // 3) for place in range(len(differences))]})
    probabilities = label_probabilities(many, list(differences), zeros)
    figures = calibration_figures(probabilities, list(differences), zeros)
    assert figures["calibration_error"] < 2 * figures["calibration_error_by_chance"] < 0.03
    assert figures["calibration_error_as_trained"] > 0.05
    modest = calibration_figures([0.6] * 100, [0.5] * 100, [0.0] * 100)
    assert modest["overconfidence_as_trained"] == 0.0 < 0.3 < modest["calibration_error_as_trained"]
    assert figures["link_error_rate"] == pytest.approx(0.1, abs=0.03)
    five = Dataset.from_dict({"prompt": list("abcde")})
    apart = label_probabilities(five, [1.0, 1.0, 1.0, 1.0, -1.0], [0.0] * 5)
    assert apart[4] < 0.01 and max(apart[:4]) < 0.9


def test_correlations_against_numpy() -> None:
    """The partial one as correlation of residuals. Broken by forgetting the product b c."""
    dice = numpy.random.default_rng(1)
    gold, noise = dice.normal(size=(2, 50))
    length = gold + noise
    score = gold + 0.3 * length + dice.normal(size=50)
    theirs = numpy.corrcoef(score, length)[0, 1]
    assert correlation(list(score), list(length)) == pytest.approx(theirs)
    rest = [v - numpy.polyval(numpy.polyfit(gold, v, 1), gold) for v in (score, length)]
    theirs = numpy.corrcoef(*rest)[0, 1]
    assert partial_correlation(list(score), list(length), list(gold)) == pytest.approx(theirs)
    assert partial_correlation(list(gold), list(length), list(gold)) == 0.0
    assert correlation([1.0, 1.0], [1.0, 2.0]) == 0.0


def test_length_by_hand() -> None:
    """The truly worse answer is longer in the first and the last pair; the first is ranked right.

    Broken by taking the rejected answer for the worse one where the labeller erred.
    """
    figures = length_figures(FOUR, CHOSEN, REJECTED, gold=None)
    assert (figures["accuracy_longer_worse"], figures["pairs_longer_worse"]) == (1 / 2, 2)
    assert "length_correlation_given_gold" not in figures
    lengths = [1.0, 1.0, 2.0, 1.0, 2.0, 2.0, 1.0, 2.0]
    theirs = numpy.corrcoef(CHOSEN + REJECTED, lengths)[0, 1]
    assert figures["length_correlation"] == pytest.approx(theirs)
    gold = ([1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 0.0])
    assert "length_correlation_given_gold" in length_figures(FOUR, CHOSEN, REJECTED, gold)
