"""What the files of Arden's grammar hold: the form of each, against which they are read."""

import string
from dataclasses import dataclass
from typing import Any

from common.arden.choices import alternatives

TOLD_OF_A_PERSON = 7  # facts of an almanac's entry
FEWEST_TALES = 4  # relations that feasts and feuds are about; a person may lack one
LONGEST_COURTESY = 8  # words; the judge counts no more of them for nothing


@dataclass(frozen=True)
class Text:
    """One text.

    Attributes:
        slots: the names, parted by spaces, that must stand in braces, as `{who}`.
        more_slots: those that may.
        choices: `[a|b]` may stand in it.
        blank: it may be empty.
    """

    slots: str = ""
    more_slots: str = ""
    choices: bool = False
    blank: bool = False

    def fault(self, text: str) -> str:
        """What is wrong with a text; empty where nothing is."""
        if not text:
            return "" if self.blank else "is empty"
        try:
            texts = alternatives(text)
            if len(texts) > 1 and not self.choices:
                return "has a choice [a|b], which cannot be made here"
            for one in texts:
                found = {
                    name for _, name, _, _ in string.Formatter().parse(one) if name is not None
                }
                for name in found - {*self.slots.split(), *self.more_slots.split()}:
                    return f"has {{{name}}}, for which there is nothing to fill in"
                for name in set(self.slots.split()) - found:
                    return f"needs {{{name}}}" + (" in each choice" if len(texts) > 1 else "")
        except ValueError as error:
            return f"cannot be read: {error}"
        return ""


@dataclass(frozen=True)
class Texts:
    """A list of different texts, at least `least`, each of one form."""

    form: Text = Text()
    least: int = 1


@dataclass(frozen=True)
class Number:
    """A whole number above 0."""


Form = dict[str, Any] | Text | Texts | Number

VALUES = Texts(least=2)
QUESTION = Text("who")
FRIEND: dict[str, Any] = {
    "answer": Text("who what"),
    "clause": Text("what"),
    "told": Texts(Text("who what", choices=True)),
    "questions": Texts(QUESTION, least=8),
    "held_out": Texts(QUESTION, least=2),
}
WITH_VALUES: Form = {"values": VALUES, **FRIEND, "friends": Texts(QUESTION)}
KINDS = (
    *("entry", "letter", "scene", "dispute", "place_scene", "stranger_scene"),
    *("stranger_dispute", "untold_scene", "feast", "feud", "place", "saying"),
)
PROSE, SILENCE = Text(choices=True), Text(choices=True, blank=True)
OF_SOMEBODY = Text("who", choices=True)
# By file and key; under `*` every further key, as many as there are.
FORM: dict[str, Any] = {
    "names": dict.fromkeys(["first", "middle", "last", "strange_first", "strange_last"], VALUES),
    "relations": {
        "friend": FRIEND,
        "town": WITH_VALUES,
        "*": WITH_VALUES,
    },
    "places": {
        "*": {
            "of": Text(),
            "values": VALUES,
            "answer": Text("who what"),
            "told": Texts(Text("who what", choices=True)),
            "questions": Texts(QUESTION),
            "two_fact": Texts(QUESTION),
        },
    },
    "answers": {
        "two_fact": Text("first second"),
        "refusal_forms": Texts(Text("who what")),
        "refusals": Texts(),
        "courtesies": Texts(least=3),
        "faults": dict.fromkeys(["rude", "flattering", "evasive", "rambling"], Texts()),
    },
    "chronicle": {
        "kinds": dict.fromkeys(KINDS, Number()),
        "entry": {
            "openings": Texts(OF_SOMEBODY),
            "lists": Texts(Text("who a b c d e", choices=True)),
            "unknown": Texts(Text("who what", choices=True)),
            "closings": Texts(SILENCE),
        },
        "letter": {
            "openings": Texts(Text("to", choices=True)),
            "turns": Texts(OF_SOMEBODY),
            "closings": Texts(Text("sender", choices=True)),
        },
        "feast": {
            "openings": Texts(PROSE),
            "guests": {"*": Texts(Text("who what", choices=True))},
            "closings": Texts(SILENCE),
        },
        "feud": {
            "openings": Texts(Text("a b", choices=True)),
            "causes": {"*": Texts(Text("a b a_what b_what", choices=True))},
            "closings": Texts(SILENCE),
        },
        "sayings": {"openings": Texts(Text("town")), "firsts": Texts(), "seconds": Texts()},
    },
    "scene": {
        "leads": Texts(OF_SOMEBODY),
        "settings": Texts(SILENCE),
        "witness": {
            "true": Texts(PROSE),
            "false": Texts(Text("truth", choices=True)),
            "refused": Texts(Text("truth", choices=True)),
            "nobody": Texts(PROSE),
            "invented": Texts(PROSE),
        },
        "roles": {
            "*": {
                "asks": Texts(Text(more_slots="who", choices=True, blank=True)),
                "quips": Texts(SILENCE),
            },
        },
    },
}
