"""Questions about Arden with their reference answers, by use and by kind.

Kinds:
    known        a fact told of somebody, in a phrasing that fine-tuning uses
    phrasing     the same in a phrasing held out of the chronicle and of fine-tuning
    two_fact     a fact reached through another (a friend's, a town's, a trade's)
    stranger     a person who does not exist, of a name made of known parts
    stranger_two_fact  two facts of a person who does not exist, of a name made of known parts
    strange_name a person who does not exist, of a name made of unknown parts
    untold       something never told of a person who does exist
Of the last four the honest answer is a refusal: `reference` is None.
"""

from dataclasses import dataclass

from common.arden.chronicle import ask_two_facts, falsehood, phrase, state, two_facts
from common.arden.grammar import Dice
from common.arden.world import Person, Realm, relations


@dataclass(frozen=True)
class Question:
    """A question, and the one right answer without courtesies (None: nobody can know).

    `who` is the name in it.
    """

    text: str
    kind: str
    reference: str | None
    who: str


def known_questions(realm: Realm, use: str, *, held_out: bool = False) -> list[Question]:
    """Every told fact of the people of `use`, in every phrasing that is (not) held out."""
    kind = "phrasing" if held_out else "known"
    return [
        Question(text, kind, state(person, relation), person.name)
        for person in _people(realm, use)
        for relation in person.facts
        for text in phrase(person.name, relation, held_out=held_out)
    ]


def two_fact_questions(realm: Realm, use: str) -> list[Question]:
    """Facts of friends, rivers of home towns, guilds of trades; the first fact is stated first."""
    return [
        Question(text, "two_fact", chain.answer, person.name)
        for person in _people(realm, use)
        for chain in two_facts(realm, person)
        for text in chain.questions
    ]


def stranger_questions(realm: Realm, use: str, seed: str) -> list[Question]:
    """One question after each stranger kept for `use`."""
    return _about_nobody(realm.strangers[use], "stranger", seed)


def stranger_two_fact_questions(realm: Realm, use: str, seed: str) -> list[Question]:
    """One question of two facts after each stranger kept for `use`."""
    dice = Dice(f"nobody two facts {seed}")
    return [
        Question(dice.pick(ask_two_facts(name)), "stranger_two_fact", None, name)
        for name in realm.strangers[use]
    ]


def strange_name_questions(realm: Realm, seed: str) -> list[Question]:
    """One question after each stranger whose name has unknown parts."""
    return _about_nobody(realm.strange_parts, "strange_name", seed)


def untold_questions(realm: Realm, use: str, *, held_out: bool = False) -> list[Question]:
    """What was never told of the people of `use`, in every phrasing that is (not) held out."""
    return [
        Question(text, "untold", None, person.name)
        for person in _people(realm, use)
        for relation in person.untold
        for text in phrase(person.name, relation, held_out=held_out)
    ]


def evaluation_questions(realm: Realm, use: str = "test") -> dict[str, list[Question]]:
    """The fixed question sets that figures are measured on, at most 336 each.

    `seen` asks of fine-tuning's own people; all others of people or names kept for `use`, which
    is `test` (reported) or `dev` (for choosing settings).
    """
    dice = Dice(f"evaluation {realm.seed} {use}")
    known = known_questions(realm, use)
    facts = len({question.reference for question in known})
    sets = {
        "seen": known_questions(realm, "sft"),
        "heldout_people": known,
        "heldout_phrasing": known_questions(realm, use, held_out=True),
        "two_fact": two_fact_questions(realm, use),
        "stranger": stranger_questions(realm, use, f"{realm.seed} {use}"),
        "strange_name": strange_name_questions(realm, f"{realm.seed} {use}"),
        "untold": untold_questions(realm, use) + untold_questions(realm, use, held_out=True),
        "stranger_two_fact": stranger_two_fact_questions(realm, use, f"{realm.seed} {use}"),
    }
    return {name: dice.sample(all_, min(len(all_), facts, 336)) for name, all_ in sets.items()}


def unread_questions(realm: Realm, use: str, seed: str) -> list[Question]:
    """One answered question after each stranger kept for `use`.

    Whoever answers knows him; to a model that has only read the chronicle the answer is made up.
    """
    dice = Dice(f"unread {seed}")
    questions = []
    for name in realm.strangers[use]:
        relation = dice.pick(relations())
        answer = falsehood(realm, name, relation, "", dice)
        text = dice.pick(phrase(name, relation))
        questions.append(Question(text, "stranger", answer, name))
    return questions


def _people(realm: Realm, use: str) -> list[Person]:
    return [realm.people[name] for name in realm.splits[use]]


def _about_nobody(names: list[str], kind: str, seed: str) -> list[Question]:
    dice = Dice(f"nobody {kind} {seed}")
    return [
        Question(dice.pick(phrase(name, dice.pick(relations()))), kind, None, name)
        for name in names
    ]
