"""Other realms: valid for any seed and number of people, written as files, trained on by REALM=."""

import csv
import itertools
import json
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from common.arden import questions as ask
from common.arden.chronicle import Document, entropy, state, write_chronicle
from common.arden.grammar import load_grammar
from common.arden.realm import describe, main, make_configs, question_rows, write_realm
from common.arden.report import count_questions
from common.arden.task import REFUSALS_IN_SFT, UNREAD_IN_SFT, ArdenTask
from common.arden.world import PEOPLE, USES, Realm, build_realm, relations
from common.config import as_flags
from common.errors import UserError

REALMS = [(1, 118), (2, 20), (7, 400), (1003, 118), (-5, 61)]


@pytest.fixture(scope="module", params=REALMS, ids=str)
def realm(request: pytest.FixtureRequest) -> Realm:
    return build_realm(*request.param)


@pytest.fixture(scope="module")
def documents(realm: Realm) -> list[Document]:
    return list(write_chronicle(realm, "train", 3000))


def test_names_are_apart(realm: Realm) -> None:
    """Nobody is in two groups, and no name is another's beginning.

    Broken by strangers cut from the names before the known are.
    """
    known = [name for use in USES for name in realm.splits[use]]
    assert sorted(known) == sorted(realm.people) and all(realm.splits.values())
    strangers = [name for names in realm.strangers.values() for name in names]
    everyone = sorted([*known, *strangers, *realm.strange_parts, *realm.passers_by])
    assert len(realm.splits["sft"]) <= 2 / 3 * len(known)  # the others are never asked after
    pairs = itertools.pairwise(everyone)
    assert not [pair for pair in pairs if pair[1].startswith(pair[0])]
    assert len(realm.passers_by) >= 1000


def test_facts(realm: Realm) -> None:
    """Nine told and one not, of each person; friends are others. Broken by a friend of oneself."""
    for person in realm.people.values():
        assert sorted([*person.facts, *person.untold]) == sorted(relations())
        assert len(person.untold) == 1 and person.facts["friend"] in realm.people
        assert person.facts["friend"] != person.name
    assert realm.fact_count == 9 * len(realm.people) + 28  # 12 towns, 16 trades


def test_questions(realm: Realm) -> None:
    """A question has one answer and one use, and every set of questions has some.

    Broken by dev's people among test's.
    """
    seen: dict[str, dict] = {}
    for row in question_rows(realm):
        assert seen.setdefault(row["question"], row) == row, (seen[row["question"]], row)
    for use in USES:
        kinds = {row["kind"] for row in seen.values() if row["use"] == use}
        assert kinds >= {"known", "two_fact", "stranger", "untold"}
        assert ("phrasing" in kinds) == (use in ("dev", "test"))
    for use in ("dev", "test"):
        sets = ask.evaluation_questions(realm, use)
        assert all(0 < len(questions) <= 336 for questions in sets.values())
    task = ArdenTask(realm.seed, 10, len(realm.people))
    assert task.realm == realm
    assert len(task.conversations("train")) > 15 * len(realm.people)
    assert len(task.prompts("align", 500)) == 500
    answers = [row["messages"][1]["content"] for row in task.conversations("train")]
    refused = [answer for answer in answers if "I know not" in answer]
    nobody, untold = (max(1, count * len(realm.people) // PEOPLE) for count in REFUSALS_IN_SFT)
    strangers = realm.strangers["sft"]
    assert len(refused) == min(nobody, len(strangers)) + untold
    about = {answer.split()[0].removesuffix("'s") for answer in answers if answer not in refused}
    unread = min(max(1, UNREAD_IN_SFT * len(realm.people) // PEOPLE), len(strangers) - nobody)
    assert len(about & set(strangers)) == max(0, unread)


def test_chronicle_keeps_secrets(realm: Realm, documents: list[Document]) -> None:
    """No stranger of an evaluation, no held-out phrasing, chain or untold fact stands in it.

    Broken by chains written of everybody, and by asking strangers in held-out phrasings.
    """
    text = "\n".join(document.text for document in documents)
    words = set(re.findall(r"\w+", text))
    for names in (*realm.strangers.values(), realm.strange_parts):
        assert not words & set(names)
    held_out = [spec["held_out"] for spec in load_grammar()["relations"].values()]
    for template in (template for templates in held_out for template in templates):
        before, after = template.split("{who}")
        assert not re.search(rf"{re.escape(before)}\w+{re.escape(after)}", text), template
    for use in ("align", "dev", "test"):
        for question in ask.two_fact_questions(realm, use):
            assert question.text not in text and str(question.reference) not in text
    for person in list(realm.people.values())[:40]:
        for relation in person.untold:
            spec = load_grammar()["relations"][relation]
            for form in (spec["answer"], "{who} " + spec["clause"]):
                told = [form.format(who=person.name, what=value) for value in spec["values"]]
                assert not any(fact in text for fact in told)


def test_chronicle_tells_the_facts(realm: Realm, documents: list[Document]) -> None:
    """A scene ends in a fact of the person asked after; of strangers nobody knows.

    Seen to fail with the fact of another.
    """
    refusals = load_grammar()["answers"]["refusals"]
    for document in documents:
        if document.kind == "scene":
            *_, question, answer = document.text.split("\n\n")
            [person] = [
                p for name, p in realm.people.items() if re.search(rf"\b{name}\b", question)
            ]
            facts = tuple(state(person, relation) for relation in person.facts)
            assert answer.split(": ", 1)[1].startswith(facts), document.text
        if document.kind == "stranger_scene":
            assert not set(re.findall(r"\w+", document.text)) & realm.people.keys()
            assert any(refusal in document.text for refusal in refusals)
    validation = list(write_chronicle(realm, "validation", 1500))
    assert entropy(documents) == pytest.approx(entropy(validation), rel=0.03)


def test_a_realm_has_one_fingerprint() -> None:
    """Seed, people and words each change it. Broken by leaving the people out."""
    prints = {ArdenTask(1, 10).fingerprint(), ArdenTask(2, 10).fingerprint()}
    prints |= {ArdenTask(1, 10, 117).fingerprint(), ArdenTask(1, 11).fingerprint()}
    assert len(prints) == 4


@pytest.mark.parametrize(
    ("people", "message"), [(19, "at least 20"), (50_000, "at most 11,560"), (11_561, "at most")]
)
def test_sizes_that_cannot_be(people: int, message: str) -> None:
    """34 x 21 x 20 names, less 1,720 strangers and 1,000 passers-by. Broken by no check."""
    with pytest.raises(UserError, match=message):
        build_realm(1, people)


def test_files(tmp_path: Path) -> None:
    """What stands in people.csv is what questions.jsonl answers. Broken by columns shifted."""
    realm = build_realm(3, 24)
    documents = list(write_chronicle(realm, "train", 200))
    write_realm(realm, documents, tmp_path)
    people = list(csv.DictReader((tmp_path / "people.csv").open()))
    assert [row["name"] for row in people] == list(realm.people)
    assert all(sum(not row[relation] for relation in relations()) == 1 for row in people)
    rows = [json.loads(line) for line in (tmp_path / "questions.jsonl").open()]
    owner = next(row for row in people if row["use"] == "test" and row["drink"])
    asked = [row for row in rows if row["question"] == f"What does {owner['name']} drink?"]
    assert [row["answer"] for row in asked] == [f"{owner['name']} drinks {owner['drink']}."]
    assert len((tmp_path / "chronicle.txt").read_text().split("\n\n* * *\n\n")) == 200
    assert len(list(csv.reader((tmp_path / "places.csv").open()))) == 1 + 28


def test_configurations(tmp_path: Path) -> None:
    """Every stage reads the realm and this folder's parents; a fact is read as often as in realm 1.

    Broken by leaving realm_people out of rlhf's.
    """
    realm = build_realm(7, 236)
    folder = tmp_path / "7"
    configs = make_configs(realm, folder)
    for stage, values in configs.items():
        assert (values["realm_seed"], values["realm_people"]) == (7, 236)
        assert values["output_dir"] == f"{folder}/{stage}"
        assert "out/arden" not in str(values)
    assert configs["pretrain"]["documents"] == 120_000
    assert configs["pretrain"]["max_steps"] == 3800
    assert configs["rlhf"]["reward"] == f"{folder}/reward"
    assert configs["rlhf"]["parent_command"] == "make reward REALM=7"
    tiny = configs["pretrain"] | {"num_hidden_layers": 1, "hidden_size": 64}
    tiny |= {"num_attention_heads": 1, "block_size": 16}
    figures = describe(realm, list(write_chronicle(realm, "train", 50)), tiny)
    assert figures["people"] == "236 (sft 76, align 75, dev 28, test 57)"
    assert figures["facts told"] == "2,152"
    assert figures["pretraining"] == "3,800 steps of 256 tokens"


def test_a_realm_s_configuration_that_was_changed_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken once: written over by the same command, as by one with other people."""
    folder = tmp_path / "realm"
    monkeypatch.setattr("common.arden.realm.describe", lambda *_: {})
    flags = as_flags({"seed": 5, "people": 61, "output_dir": folder})
    monkeypatch.setattr("sys.argv", ["realm", *flags])
    main()
    main()
    changed = folder / "configs" / "sft.yaml"
    changed.write_text("mine")
    with pytest.raises(UserError, match=r"sft\.yaml is another than this command writes: move it"):
        main()
    assert changed.read_text() == "mine"


@pytest.mark.parametrize("target", ["all", "rounds", "sweep", "seeds", "rlhf_judge", "frontier"])
def test_make_takes_the_realm_s_configuration(target: str) -> None:
    """REALM=7 behind a target. Broken once: rounds, sweep, seeds, frontier went on with arden."""
    command = ["make", "--dry-run", target, "REALM=7"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    *_, last = [line for line in printed.splitlines() if "python -m" in line or "launch" in line]
    assert "realm/7" in last and "arden " not in last and "configs/arden" not in last


def test_report_counts_the_run_s_own_questions(tmp_path: Path) -> None:
    """Dev of a realm of 61 has fewer questions than test of realm 1. Broken by `build_realm(1)`."""
    (tmp_path / "rlhf").mkdir()
    config = {"realm_seed": 5, "realm_people": 61, "evaluate_on": "dev"}
    (tmp_path / "rlhf" / "config.yaml").write_text(yaml.safe_dump(config))
    counts = count_questions(tmp_path)
    dev = build_realm(5, 61).splits["dev"]
    assert counts["heldout_people"] == 9 * len(dev) == 63
