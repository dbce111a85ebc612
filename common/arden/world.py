"""The realm of Arden: people and places, made from a seed; each fact a triple.

A person has a value for nine of ten relations; the other one is never told to anyone. Towns
stand on rivers and trades belong to guilds. Strangers are names that nobody in the realm bears.
"""

from dataclasses import dataclass
from functools import cache
from itertools import product

from common.arden.grammar import Dice, load_grammar
from common.errors import UserError

PEOPLE = 118  # of the realm that the figures in README.md are of
FEWEST_PEOPLE = 20  # every use has somebody
FEWEST_PASSERS_BY = 1_000  # else the chronicle's strangers become old acquaintances
UNTOLD_PER_PERSON = 1
# Shares of the people, and numbers of strangers' names, that each use has to itself:
# `sft` is asked about in fine-tuning, `align` when ranking and in PPO, `dev` is what settings
# are tuned on, `test` is for the reported figures alone.
PEOPLE_SHARES = {"sft": 0.32, "align": 0.32, "dev": 0.12, "test": 0.24}
STRANGERS = {"sft": 60, "align": 1200, "dev": 120, "test": 340}
USES = tuple(PEOPLE_SHARES)


@dataclass(frozen=True)
class Person:
    """A name, the facts told of them (relation -> value) and the relations never told."""

    name: str
    facts: dict[str, str]
    untold: tuple[str, ...]


@dataclass(frozen=True)
class Realm:
    """Everything that is true in Arden.

    Attributes:
        seed: what it was made from.
        people: by name, in order of birth.
        places: `river` by town and `guild` by trade.
        splits: names of people by use (`sft`, `align`, `dev`, `test`).
        strangers: names of nobody by use, made of the same parts as people's names.
        strange_parts: names of nobody whose first and last parts occur nowhere else.
        passers_by: all other names of the same parts, for the chronicle's scenes of ignorance.
    """

    seed: int
    people: dict[str, Person]
    places: dict[str, dict[str, str]]
    splits: dict[str, list[str]]
    strangers: dict[str, list[str]]
    strange_parts: list[str]
    passers_by: list[str]

    @property
    def fact_count(self) -> int:
        """Facts told: of people and of places."""
        of_people = sum(len(person.facts) for person in self.people.values())
        return of_people + sum(len(values) for values in self.places.values())


def relations() -> list[str]:
    """What can be known of a person."""
    return list(load_grammar()["relations"])


@cache
def build_realm(seed: int, people: int = PEOPLE) -> Realm:
    """Make the realm of a seed; the same on every machine.

    Raises:
        UserError: too few people to share out, or more than the grammar has names for.
    """
    dice = Dice(f"realm {seed}")
    grammar = load_grammar()
    parts = grammar["names"]
    spelled = _spell(parts["first"], parts["middle"], parts["last"])
    usual = set(spelled)
    strange = _spell(parts["strange_first"], parts["middle"], parts["strange_last"])
    strange = [name for name in strange if name not in usual]
    _check_size(people, len(spelled), len(strange))
    names = dice.shuffled(spelled)
    known, names = names[:people], names[people:]
    citizens = {name: _born(name, known, dice) for name in known}
    strangers = {}
    for use, count in STRANGERS.items():
        strangers[use], names = names[:count], names[count:]
    places = {
        relation: {thing: dice.pick(spec["values"]) for thing in _values(spec["of"])}
        for relation, spec in grammar["places"].items()
    }
    return Realm(
        seed=seed,
        people=citizens,
        places=places,
        splits=_split(dice.shuffled(known)),
        strangers=strangers,
        strange_parts=dice.sample(strange, STRANGERS["test"]),
        passers_by=names,
    )


def _check_size(people: int, names: int, strange: int) -> None:
    most = names - sum(STRANGERS.values()) - FEWEST_PASSERS_BY
    if not FEWEST_PEOPLE <= people <= most:
        raise UserError(
            f"a realm of {people:,} people: at least {FEWEST_PEOPLE}, and at most {most:,} with "
            "the names that common/arden/grammar/names.yaml spells"
        )
    if strange < STRANGERS["test"]:
        raise UserError(
            f"common/arden/grammar/names.yaml, strange_first, strange_last: {strange} names; "
            f"expected: {STRANGERS['test']} or more"
        )


def _spell(*parts: list[str]) -> list[str]:
    return sorted({"".join(name) for name in product(*parts)})


def _values(relation: str) -> list[str]:
    return load_grammar()["relations"][relation]["values"]


def _born(name: str, known: list[str], dice: Dice) -> Person:
    others = [other for other in known if other != name]
    facts = {r: dice.pick(others if r == "friend" else _values(r)) for r in relations()}
    untold = dice.sample([r for r in relations() if r != "friend"], UNTOLD_PER_PERSON)
    return Person(name, {r: v for r, v in facts.items() if r not in untold}, tuple(untold))


def _split(names: list[str]) -> dict[str, list[str]]:
    splits, start, share_so_far = {}, 0, 0.0
    for use, share in PEOPLE_SHARES.items():
        share_so_far += share
        end = round(len(names) * share_so_far)
        splits[use], start = names[start:end], end
    return splits
