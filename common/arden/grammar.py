"""The words of Arden (`grammar/*.yaml`) and the dice that choose among them.

Every choice is made by `Dice`, which adds up its information in bits. A document is nothing but
its choices, so the bits rolled for it are its code length under the true generator: the floor
for a language model that has learnt the realm (see `common.arden.chronicle.entropy`).
"""

import math
import random
import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from common.arden.choices import split_choice
from common.arden.grammar_files import read_grammar

T = TypeVar("T")
FOLDER = Path(__file__).parent / "grammar"


class Dice:
    """Seeded choices that know their own cost.

    `random` and `randrange` are drawn on: of the first Python keeps the sequence for a seed, of the
    second it has so far, which a golden test watches.
    """

    def __init__(self, seed: str) -> None:
        self.random = random.Random(seed)
        self.bits = 0.0

    def pick(self, options: Sequence[T]) -> T:
        """One of `options`, each as likely; costs log2(n) bits."""
        self.bits += math.log2(len(options))
        return options[self.random.randrange(len(options))]

    def weighted(self, weights: Mapping[str, int]) -> str:
        """A key of `weights` (whole numbers), as likely as its weight; costs -log2 p bits."""
        total = sum(weights.values())
        mark = self.random.randrange(total)
        for key, weight in weights.items():
            mark -= weight
            if mark < 0:
                self.bits += math.log2(total / weight)
                return key
        raise AssertionError("weights ran out")

    def sample(self, options: Sequence[T], count: int) -> list[T]:
        """`count` different ones, in order; costs log2(n (n-1) ...) bits."""
        pool = list(options)
        for place in range(count):  # Fisher and Yates
            self.bits += math.log2(len(pool) - place)
            other = place + self.random.randrange(len(pool) - place)
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:count]

    def shuffled(self, options: Sequence[T]) -> list[T]:
        """All of `options` in a random order."""
        return self.sample(options, len(options))


@cache
def load_grammar() -> dict[str, Any]:
    """The grammar as nested dicts and lists, by file.

    Raises:
        UserError: one of the files is faulty.
    """
    return read_grammar(FOLDER)


def expand(template: str, dice: Dice, **slots: str) -> str:
    """Choose among `[a|b]` (nesting allowed), fill `{slot}`, set a capital at the start.

    >>> expand("{who} keeps [a goat|a goat].", Dice("x"), who="Alabert")
    'Alabert keeps a goat.'
    """
    text = _choose(template, dice).format(**slots)
    return text[:1].upper() + text[1:]


def _choose(template: str, dice: Dice) -> str:
    choice = split_choice(template)
    if choice is None:
        return template
    before, options, after = choice
    chosen = _choose(dice.pick(options), dice)
    return before + chosen + _choose(after, dice)


def join(*parts: str) -> str:
    """Sentences with one space between, empty ones left out."""
    return re.sub(r" +", " ", " ".join(part for part in parts if part)).strip()
