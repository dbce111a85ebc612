"""The grammar's files: what is wrong is said in one line, what is added needs no code."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from common.arden import grammar, world
from common.arden import questions as ask
from common.arden.choices import alternatives, split_choice
from common.arden.chronicle import entropy, write_chronicle
from common.arden.grammar import FOLDER, Dice, expand
from common.arden.grammar_files import read_grammar
from common.arden.grammar_form import FORM
from common.errors import UserError

HAT = """
hat:
  values: [a straw hat, a bonnet, no]
  answer: "{who} wears {what}."
  clause: "wears {what}"
  told: ["{who} has worn {what} [since the fair|to bed]."]
  questions: ["Hat 1 of {who}?", "Hat 2 of {who}?", "Hat 3 of {who}?", "Hat 4 of {who}?",
    "Hat 5 of {who}?", "Hat 6 of {who}?", "Hat 7 of {who}?", "Hat 8 of {who}?"]
  held_out: ["The hat of {who}?", "Has {who} a hat?"]
  friends: ["Hat of {who}'s friend?"]
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the grammar, to spoil."""
    return Path(shutil.copytree(FOLDER, tmp_path / "grammar"))


@pytest.fixture
def clean_caches() -> Iterator[None]:
    yield
    grammar.load_grammar.cache_clear()
    world.build_realm.cache_clear()


def test_every_file_has_a_form() -> None:
    """Broken by a file more in the folder: its words would be nobody's."""
    assert {path.stem for path in FOLDER.glob("*")} == FORM.keys()


@pytest.mark.parametrize(
    ("file", "old", "new", "line"),
    [
        (
            "relations",
            '  clause: "is {what}"\n',
            "",
            "trade: has no clause; expected: values",
        ),
        (
            "relations",
            "clause:",
            "claus:",
            "line {n}, trade.claus: unknown; expected: values, answ",
        ),
        ("relations", "town:\n", "trade:\n", "line {n}, trade: stands twice"),
        ("relations", '"I came to ask the trade of {who}."', '"What is {who} by trade?"', "twice"),
        (
            "relations",
            '    - "I came to ask the trade of {who}."\n',
            "",
            "trade.questions: 7 texts; ",
        ),
        (
            "relations",
            '"I came to ask the trade of {who}."',
            '"Name it."',
            "needs {who}; expected: a te",
        ),
        (
            "relations",
            "is {what} by trade,",
            "is {waht} by trade,",
            "has {waht}, for which there is no",
        ),
        ("relations", "proud of it|and", "proud of it[and", "cannot be read: a [ without its ]"),
        ("relations", "[though not by", "though not by", "a ] or | without its ["),
        ("relations", 'answer: "{who} is {what}."', 'answer: "{who} [is|was] {what}."', "choice"),
        ("relations", "dwells in {what}, [two", "dwells in [{what}|it], [two", "{what} in each"),
        (
            "relations",
            '"I came to ask the trade of {who}."',
            "Name: {who}",
            "line {n}, trade.questions: keys",
        ),
        (
            "relations",
            '"I came to ask the trade of {who}."',
            '"What does {who} drink?"',
            "trade.questions",
        ),
        ("relations", '{who} drinks {what}."', '{who} plays the {what}."', None),
        (
            "relations",
            "[a weaver,",
            "[House Oak, of House Oak,",
            "is of House Oak.' stands under",
        ),
        ("names", "strange_first: [Brx", "strange_first: [Al", "strange_first: 'Al' is in first"),
        (
            "names",
            "last: [bert, ",
            "last: [bert: dane, ",
            "line {n}, last: keys with values",
        ),
        ("places", "of: town", "of: friend", "river.of: 'friend'; expected: a relation that has"),
        ("answers", '"At your service."', '"Again, peace on your house."', None),
        ("answers", '"At your service."', '"So, Peace on your house."', "ends in 'Peace on"),
        ("answers", '"At your service."', '"A b c d e f g h i."', "expected: at most 8 words"),
        ("answers", '"I know not."', '""', "line {n}, refusals: '' is empty; expected: a text"),
        ("chronicle", "entry: 18", "entry: many", "kinds.entry: 'many'; expected: a whole number"),
        ("chronicle", "entry: 18", "entry: 0", "kinds.entry: '0'; expected: a whole number"),
        ("chronicle", "kinds:", "kinds: [", "not valid YAML"),
        (
            "chronicle",
            "    fear:",
            "    fears:",
            "feast.guests.fears: unknown; expected: a relation",
        ),
        ("scene", '"A lie! {truth}"', '"A lie!"', "witness.false: 'A lie!' needs {truth}"),
    ],
)
def test_faults(folder: Path, file: str, old: str, new: str, line: str | None) -> None:
    """One fault each, and two changes that are none; {n} is the line of the change.

    Broken by leaving out each check in turn.
    """
    path = folder / f"{file}.yaml"
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    if line is None:
        read_grammar(folder)
        return
    with pytest.raises(UserError) as error:
        read_grammar(folder)
    number = str(text[: text.index(old)].count("\n") + 1)
    assert f"{file}.yaml" in str(error.value) and line.replace("{n}", number) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_feast_has_guests_enough(folder: Path) -> None:
    """Broken by three relations: the third of the guests may have nothing left to tell."""
    path = folder / "chronicle.yaml"
    words = yaml.safe_load(path.read_text(encoding="utf-8"))
    guests = words["feast"]["guests"]
    words["feast"]["guests"] = {name: guests[name] for name in ("drink", "beast", "fear")}
    path.write_text(yaml.safe_dump(words), encoding="utf-8")
    with pytest.raises(UserError, match=r"feast\.guests: expected: 4 relations or more"):
        read_grammar(folder)


def test_missing_and_empty_files(folder: Path) -> None:
    (folder / "scene.yaml").write_text("# nothing\n")
    with pytest.raises(UserError, match=r"scene\.yaml: is empty; expected: leads, settings"):
        read_grammar(folder)
    (folder / "names.yaml").unlink()
    with pytest.raises(UserError, match=r"names\.yaml: No such file"):
        read_grammar(folder)


def test_a_relation_more_needs_no_code(
    folder: Path, monkeypatch: pytest.MonkeyPatch, clean_caches: None
) -> None:
    """Told, asked after and held out like the others; `no` is a text and no truth value.

    Broken by asking in all phrasings, the held-out ones too.
    """
    path = folder / "relations.yaml"
    path.write_text(path.read_text(encoding="utf-8") + HAT, encoding="utf-8")
    monkeypatch.setattr(grammar, "FOLDER", folder)
    grammar.load_grammar.cache_clear()
    world.build_realm.cache_clear()
    realm = world.build_realm(1)
    hats = {person.facts.get("hat", "untold") for person in realm.people.values()}
    assert hats == {"a straw hat", "a bonnet", "no", "untold"}
    documents = list(write_chronicle(realm, "train", 2000))
    text = " ".join(document.text for document in documents)
    assert " has worn " in text and "Hat 8 of " in text and "Hat of " not in text
    assert not re.search(r"(The hat of|Has) \w+( a hat)?\?", text)
    assert 0.1 < entropy(documents) < 0.4
    asked = [question.text for question in ask.known_questions(realm, "test", held_out=True)]
    assert sum(text.startswith("Has ") for text in asked) > 20


def test_split_choice() -> None:
    assert split_choice("plain") is None
    assert split_choice("so [a|b[c|d]] it [is]") == ("so ", ["a", "b[c|d]"], " it [is]")
    assert alternatives("[a|b[c|d]|] {who}[!]") == ["a {who}!", "bc {who}!", "bd {who}!", " {who}!"]
    assert expand("[a|a[b|c]]", Dice("x")) in ("A", "Ab", "Ac")
    for bad in ("[a|b", "a]", "a|b", "a] [b]", "[a [b]"):
        with pytest.raises(ValueError, match=r"\["):
            alternatives(bad)
