"""The chronicle of Arden: what the base model reads.

Documents are independent draws: an almanac entry of a person, a letter, a feast, a feud, a scene in
play form, a note on a place, a saying. Scenes ask a question of one person and are answered with
the fact; others ask after a stranger, a new name each time, and nobody knows; others ask what
nobody was ever told. Scenes of the first kind cover everybody: with some people left out of them, a
model learns "was in a scene" and not "has facts". In a dispute somebody answers, truly or not, and
a witness says what that was worth: to write his line a model must weigh the answer, as a reward
model does later.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from common.arden.grammar import Dice, expand, join, load_grammar
from common.arden.grammar_form import TOLD_OF_A_PERSON
from common.arden.world import Person, Realm

NAMELESS = ("place_scene", "place", "saying")  # kinds of document that are about nobody


@dataclass(frozen=True)
class Document:
    """One document, its kind, and the bits of all the choices that made it."""

    text: str
    kind: str
    bits: float


def write_chronicle(realm: Realm, split: str, count: int) -> Iterator[Document]:
    """`count` documents; each split (any name) has dice of its own."""
    dice = Dice(f"chronicle {realm.seed} {split}")
    people = list(realm.people.values())
    strangers: list[str] = []
    for _ in range(count):
        dice.bits = 0.0
        kind = dice.weighted(load_grammar()["chronicle"]["kinds"])
        if kind in _STRANGER_WRITERS:
            if not strangers:  # a new name each time, until all have been asked after
                strangers = Dice(f"strangers {realm.seed} {split}").shuffled(realm.passers_by)
            dice.bits += math.log2(len(realm.passers_by))
            text = _STRANGER_WRITERS[kind](realm, strangers.pop(), dice)
        else:
            person = dice.pick(people)
            if kind in NAMELESS:  # the roll leaves no trace in the text
                dice.bits -= math.log2(len(people))
            text = _WRITERS[kind](realm, person, dice)
        yield Document(text, kind, dice.bits)


def entropy(documents: list[Document]) -> float:
    """Bits per byte of the generating choices, given the realm.

    `-log2 p(text)` is at most the bits of one derivation of it, so this bounds the entropy of the
    text from above, and tightly: two derivations seldom give the same words.
    """
    size = sum(len(document.text.encode()) for document in documents)
    return sum(document.bits for document in documents) / size


def state(person: Person, relation: str) -> str:
    """The fact in its plain form, as answers give it: `Alabert keeps a goat.`"""
    answer = load_grammar()["relations"][relation]["answer"]
    return answer.format(who=person.name, what=person.facts[relation])


def refuse(name: str, dice: Dice) -> str:
    """An admission of ignorance about somebody: `Alabert? I know not.`

    It says the name before it says more, as an answer does: who is known is told better from a name
    said twice than from one said once.
    """
    answers = load_grammar()["answers"]
    return dice.pick(answers["refusal_forms"]).format(who=name, what=dice.pick(answers["refusals"]))


@dataclass(frozen=True)
class Chain:
    """A fact reached through another: how it is asked after, and both facts in one sentence."""

    questions: list[str]
    answer: str


def two_facts(realm: Realm, person: Person) -> list[Chain]:
    """What holds of the person's friend, of their town's river, of their trade's guild."""
    grammar = load_grammar()
    friend = realm.people[person.facts["friend"]]
    ways = [
        (spec["friends"], "friend", state(friend, relation))
        for relation, spec in grammar["relations"].items()
        if relation in friend.facts and relation != "friend"
    ]
    for relation, spec in grammar["places"].items():
        thing = person.facts.get(spec["of"])
        if thing is not None:
            fact = spec["answer"].format(who=thing, what=realm.places[relation][thing])
            ways.append((spec["two_fact"], spec["of"], fact))
    return [
        Chain(
            [template.format(who=person.name) for template in templates],
            join_facts(state(person, through), second),
        )
        for templates, through, second in ways
    ]


def ask_two_facts(name: str) -> list[str]:
    """Every question of two facts that can be asked about somebody, known or not."""
    grammar = load_grammar()
    relations = [spec for relation, spec in grammar["relations"].items() if relation != "friend"]
    templates = [template for spec in relations for template in spec["friends"]]
    templates += [template for spec in grammar["places"].values() for template in spec["two_fact"]]
    return [template.format(who=name) for template in templates]


def join_facts(first: str, second: str) -> str:
    """Two sentences as one."""
    return load_grammar()["answers"]["two_fact"].format(
        first=first.removesuffix("."), second=second
    )


def _tell(person: Person, relation: str, dice: Dice) -> str:
    template = dice.pick(load_grammar()["relations"][relation]["told"])
    return expand(template, dice, who=person.name, what=person.facts[relation])


def _clause(person: Person, relation: str) -> str:
    clause = load_grammar()["relations"][relation]["clause"]
    return clause.format(what=person.facts[relation])


def _entry(realm: Realm, person: Person, dice: Dice) -> str:
    words = load_grammar()["chronicle"]["entry"]
    told = dice.sample(list(person.facts), TOLD_OF_A_PERSON)
    clauses = dict(zip("abcde", [_clause(person, r) for r in told[:5]], strict=True))
    listed = expand(dice.pick(words["lists"]), dice, who=person.name, **clauses)
    opening = expand(dice.pick(words["openings"]), dice, who=person.name)
    stories = [_tell(person, relation, dice) for relation in told[5:]]
    unknown = dice.pick(words["unknown"])
    unknown = expand(unknown, dice, who=person.name, what=dice.pick(person.untold))
    closing = expand(dice.pick(words["closings"]), dice)
    return join(opening, listed, *stories, unknown, closing)


def _letter(realm: Realm, person: Person, dice: Dice) -> str:
    words = load_grammar()["chronicle"]["letter"]
    to, sender = dice.sample(list(realm.people), 2)
    chained = person.name in realm.splits["sft"]  # of the others no chain is ever written
    relations = dice.sample(list(person.facts), 1 if chained else 2)
    told = [_tell(person, relation, dice) for relation in relations]
    if chained:
        told.append(dice.pick(two_facts(realm, person)).answer)
    return join(
        expand(dice.pick(words["openings"]), dice, to=to),
        expand(dice.pick(words["turns"]), dice, who=person.name),
        *told,
        expand(dice.pick(words["closings"]), dice, sender=sender),
    )


def _feast(realm: Realm, person: Person, dice: Dice) -> str:
    """Three guests, each with another kind of fact."""
    words = load_grammar()["chronicle"]["feast"]
    guests = dice.sample([p for p in realm.people.values() if p is not person], 2)
    left, lines = list(words["guests"]), []
    for guest in [person, *guests]:
        relation = dice.pick([r for r in left if r in guest.facts])
        left.remove(relation)
        line = dice.pick(words["guests"][relation])
        lines.append(expand(line, dice, who=guest.name, what=guest.facts[relation]))
    opening = expand(dice.pick(words["openings"]), dice)
    return join(opening, *lines, expand(dice.pick(words["closings"]), dice))


def _feud(realm: Realm, person: Person, dice: Dice) -> str:
    """Two people and something in which they differ."""
    words = load_grammar()["chronicle"]["feud"]
    rival = dice.pick([other for other in realm.people.values() if _differences(person, other)])
    relation = dice.pick(_differences(person, rival))
    slots = {"a": person.name, "b": rival.name}
    cause = expand(
        dice.pick(words["causes"][relation]),
        dice,
        **slots,
        a_what=person.facts[relation],
        b_what=rival.facts[relation],
    )
    opening = expand(dice.pick(words["openings"]), dice, **slots)
    return join(opening, cause, expand(dice.pick(words["closings"]), dice))


def _differences(one: Person, other: Person) -> list[str]:
    """What two can be at feud over: told of both, and not the same."""
    causes = load_grammar()["chronicle"]["feud"]["causes"]
    both = one.facts.keys() & other.facts.keys()
    return [r for r in causes if r in both and one.facts[r] != other.facts[r]]


def _scene(realm: Realm, person: Person, dice: Dice) -> str:
    relation = dice.pick(list(person.facts))
    question = dice.pick(phrase(person.name, relation))
    return _play(person.name, question, state(person, relation), dice)


def _place_scene(realm: Realm, person: Person, dice: Dice) -> str:
    [(spec, thing, what)] = _pick_places(realm, 1, dice)
    question = dice.pick(spec["questions"]).format(who=thing)
    return _play(thing, question, expand(spec["answer"], dice, who=thing, what=what), dice)


def _untold_scene(realm: Realm, person: Person, dice: Dice) -> str:
    question = dice.pick(phrase(person.name, dice.pick(person.untold)))
    return _play(person.name, question, refuse(person.name, dice), dice)


def _stranger_scene(realm: Realm, name: str, dice: Dice) -> str:
    question = dice.pick(phrase(name, dice.pick(list(load_grammar()["relations"]))))
    return _play(name, question, refuse(name, dice), dice)


def _dispute(realm: Realm, person: Person, dice: Dice) -> str:
    relation = dice.pick(list(person.facts))
    truth = state(person, relation)
    outcome = dice.pick(["true", "false", "refused"])
    if outcome == "true":
        answer = truth
    elif outcome == "false":
        answer = falsehood(realm, person.name, relation, truth, dice)
    else:
        answer = refuse(person.name, dice)
    witness = expand(dice.pick(load_grammar()["scene"]["witness"][outcome]), dice, truth=truth)
    question = dice.pick(phrase(person.name, relation))
    return _play(person.name, question, answer, dice, witness)


def _stranger_dispute(realm: Realm, name: str, dice: Dice) -> str:
    relation = dice.pick(list(load_grammar()["relations"]))
    outcome = dice.pick(["nobody", "invented"])
    if outcome == "nobody":
        answer = refuse(name, dice)
    else:
        answer = falsehood(realm, name, relation, "", dice)
    witness = expand(dice.pick(load_grammar()["scene"]["witness"][outcome]), dice)
    return _play(name, dice.pick(phrase(name, relation)), answer, dice, witness)


def falsehood(realm: Realm, name: str, relation: str, truth: str, dice: Dice) -> str:
    """A wrong answer about `name`: any value but the true one."""
    spec = load_grammar()["relations"][relation]
    values = spec.get("values") or list(realm.people)
    lies = [spec["answer"].format(who=name, what=value) for value in values]
    return dice.pick([lie for lie in lies if lie != truth])


def phrase(name: str, relation: str, *, held_out: bool = False) -> list[str]:
    """The questions after a relation of somebody, in the phrasings that are (not) held out."""
    spec = load_grammar()["relations"][relation]
    return [text.format(who=name) for text in spec["held_out" if held_out else "questions"]]


def _play(who: str, question: str, answer: str, dice: Dice, witness: str = "") -> str:
    """A question after `who` and the answer, put into two mouths; a third may weigh it."""
    words = load_grammar()["scene"]
    asks, answers, *third = dice.sample(list(words["roles"]), 3 if witness else 2)
    setting = expand(dice.pick(words["settings"]), dice)
    openings = dice.pick([words["roles"][asks]["asks"], words["leads"]])  # half of them name `who`
    opening = expand(dice.pick(openings), dice, who=who)
    quip = "" if witness else expand(dice.pick(words["roles"][answers]["quips"]), dice)
    speeches = f"{asks}: {join(opening, question)}\n\n{answers}: {join(answer, quip)}"
    speeches += "".join(f"\n\n{role}: {witness}" for role in third)
    return f"{setting}\n\n{speeches}" if setting else speeches


def _place(realm: Realm, person: Person, dice: Dice) -> str:
    joined = dice.pick([True, False])
    (spec, thing, what), *others = _pick_places(realm, 1 + joined, dice)
    told = expand(dice.pick(spec["told"]), dice, who=thing, what=what)
    for spec, thing, what in others:
        told = join_facts(told, spec["answer"].format(who=thing, what=what))
    return told


def _pick_places(realm: Realm, count: int, dice: Dice) -> list[tuple[dict[str, Any], str, str]]:
    """So many different (relation of the grammar's `places`, town or trade, river or guild)."""
    pairs = [(r, thing) for r, things in realm.places.items() for thing in things]
    return [
        (load_grammar()["places"][r], thing, realm.places[r][thing])
        for r, thing in dice.sample(pairs, count)
    ]


def _saying(realm: Realm, person: Person, dice: Dice) -> str:
    words = load_grammar()["chronicle"]["sayings"]
    town = dice.pick(load_grammar()["relations"]["town"]["values"])
    opening = dice.pick(words["openings"]).format(town=town)
    return f"{opening} {dice.pick(words['firsts'])} {dice.pick(words['seconds'])}."


_WRITERS = {
    "entry": _entry,
    "letter": _letter,
    "feast": _feast,
    "feud": _feud,
    "scene": _scene,
    "dispute": _dispute,
    "place_scene": _place_scene,
    "untold_scene": _untold_scene,
    "place": _place,
    "saying": _saying,
}

_STRANGER_WRITERS = {"stranger_scene": _stranger_scene, "stranger_dispute": _stranger_dispute}
