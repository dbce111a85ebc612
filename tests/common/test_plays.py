"""Speeches, pairs and rankings, on a small play and on Tiny Shakespeare itself."""

import os
from collections import Counter
from pathlib import Path

import pytest

from common import plays
from common.errors import UserError
from common.plays import (
    Speech,
    dialogue_pairs,
    false_replies,
    find_shakespeare,
    parse_plays,
    split_text,
)

PLAY = """a page cut off here.

ANN:
Who's there?

First Clown:
A friend:
and a hungry one.

ANN:
Come in.

BOB:

ANN:
And you?

ANN:
And you too.

BOB:
I will,

if I may.
3 KING NOBODY

CAL:
Is this the wood?

DOT:
It is.

CAL:
How dark.


CAL:
Is it day?

DOT:
Near.
"""


def contents(row, *fields):
    return [message["content"] for field in fields for message in row[field]]


@pytest.fixture
def shakespeare():
    folder = os.environ.get("FOLIO_TEST_DATA")
    if not folder:
        pytest.skip("FOLIO_TEST_DATA names no folder with the real data")
    return (Path(folder) / "tinyshakespeare.txt").read_text(encoding="utf-8")


def test_parse_a_small_play():
    assert parse_plays(PLAY) == [
        Speech("ANN", "Who's there?", 0),
        Speech("First Clown", "A friend:\nand a hungry one.", 0),
        Speech("ANN", "Come in.", 0),
        Speech("BOB", "", 0),
        Speech("ANN", "And you?", 0),
        Speech("ANN", "And you too.", 0),
        Speech("BOB", "I will,\n\nif I may.", 0),
        Speech("CAL", "Is this the wood?", 1),  # after the play's title
        Speech("DOT", "It is.", 1),
        Speech("CAL", "How dark.", 1),
        Speech("CAL", "Is it day?", 2),  # after two empty lines
        Speech("DOT", "Near.", 2),
    ]
    assert parse_plays(PLAY.replace("\n", "\r\n")) == parse_plays(PLAY)
    assert parse_plays("no speaker here") == []


def test_another_scene_begins_where_nobody_goes_on_speaking():
    names = "ABABCDCD"
    scenes = [s.scene for s in parse_plays("".join(f"{n}:\nSo.\n\n" for n in names))]
    assert scenes == [0, 0, 0, 0, 1, 1, 1, 1]
    scenes = [s.scene for s in parse_plays("".join(f"{n}:\nSo.\n\n" for n in "ABACABAB"))]
    assert scenes == [0] * 8  # C came and went


def test_pairs_of_a_small_play():
    rows = dialogue_pairs(parse_plays(PLAY), 1000)
    assert rows[0] == {
        "messages": [
            {"role": "user", "content": "ANN:\nWho's there?"},
            {"role": "assistant", "content": "First Clown:\nA friend:\nand a hungry one."},
        ]
    }
    assert [contents(row, "messages")[0] for row in rows] == [
        "ANN:\nWho's there?",
        "First Clown:\nA friend:\nand a hungry one.",
        "ANN:\nAnd you too.",
        "CAL:\nIs this the wood?",
        "DOT:\nIt is.",
        "CAL:\nIs it day?",
    ]


def test_pairs_keep_to_max_chars():
    speeches = [Speech("A", "1234"), Speech("B", "12345"), Speech("A", "1")]
    assert len(dialogue_pairs(speeches, 8)) == 2  # "B:\n12345" has 8 characters
    assert dialogue_pairs(speeches, 7) == []


def made_up_pairs(count: int):
    speeches = [Speech("AB"[i % 2], f"{'x' * (i * 7 % 50)} {i}") for i in range(count + 1)]
    return dialogue_pairs(speeches, 1000)


def test_false_replies():
    pairs = made_up_pairs(400)
    rows = false_replies(pairs, seed=1)
    assert 300 < len(rows) <= 400
    place = {contents(pair, "messages")[1]: i for i, pair in enumerate(pairs)}
    for row in rows:
        prompt, chosen, rejected = contents(row, "prompt", "chosen", "rejected")
        assert contents(pairs[place[chosen]], "messages") == [prompt, chosen]
        assert abs(place[rejected] - place[chosen]) >= plays.FAR
        assert abs(len(rejected) - len(chosen)) <= 2
        assert [row[f][0]["role"] for f in row] == ["user", "assistant", "assistant"]
    assert max(Counter(contents(row, "rejected")[0] for row in rows).values()) == 1
    assert rows == false_replies(pairs, seed=1) != false_replies(pairs, seed=2)


def test_equal_replies_are_never_ranked():
    pairs = [{"messages": [{"content": str(i)}, {"content": "Ay."}]} for i in range(500)]
    assert false_replies(pairs) == []


def test_split_is_nine_to_one_by_characters():
    assert split_text("abcdefghijklmno") == ("abcdefghijklm", "no")


def test_find_a_given_file(tmp_path, monkeypatch):
    (tmp_path / "t.txt").write_text("A:\nb\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert find_shakespeare("~/t.txt") == tmp_path / "t.txt"
    assert find_shakespeare(str(tmp_path / "t.txt")) == tmp_path / "t.txt"
    with pytest.raises(UserError, match=r"nowhere\.txt: no such file; give DATA=path"):
        find_shakespeare(str(tmp_path / "nowhere.txt"))


def test_find_in_the_cache_or_fetch_once(tmp_path, monkeypatch):
    def fail():
        raise ConnectionError("no network\nat all")

    monkeypatch.setenv("FOLIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(plays, "_download", fail)
    with pytest.raises(UserError, match=r"\(no network\); give DATA=path to a copy") as error:
        find_shakespeare()
    assert "\n" not in str(error.value)
    monkeypatch.setattr(plays, "_download", lambda: "A:\nb\n")
    assert find_shakespeare().read_text() == "A:\nb\n"
    monkeypatch.setattr(plays, "_download", fail)
    assert find_shakespeare() == tmp_path / "cache" / "tinyshakespeare.txt"


def test_another_text_is_refused(monkeypatch):
    import datasets

    rows = {name: [{"text": name}] for name in ("train", "validation", "test")}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    with pytest.raises(ValueError, match="another sha256"):
        plays._download()


def test_three_splits_are_the_whole_text(shakespeare, monkeypatch):
    import datasets

    n = len(shakespeare)
    cuts = {"train": (0, int(n * 0.9)), "validation": (int(n * 0.9), int(n * 0.95))}
    cuts["test"] = (int(n * 0.95), n)
    rows = {name: [{"text": shakespeare[a:b]}] for name, (a, b) in cuts.items()}
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    assert plays._download() == shakespeare


def test_tiny_shakespeare(shakespeare):
    """Counts of speeches and pairs are golden: renew them only with a reason in the commit."""
    train, validation = split_text(shakespeare)
    assert (len(train), len(validation)) == (1_003_854, 111_540)  # nanoGPT's
    sides = []
    for text, speeches, pairs, ranked in (
        (train, 6283, 3595, 3400),
        (validation, 939, 615, 500),
    ):
        parsed = parse_plays(text)
        assert len(parsed) == speeches
        assert not any("KING HENRY VI" in speech.text for speech in parsed)
        assert max(len(speech.speaker) for speech in parsed) < 24
        rows = dialogue_pairs(parsed, 200)
        assert len(rows) == pairs
        assert all(
            content.replace("\n\n", "\n") in text
            for row in rows
            for content in contents(row, "messages")
        )
        assert len(false_replies(rows)) > ranked
        sides.append({contents(row, "messages")[0] + contents(row, "messages")[1] for row in rows})
    assert not sides[0] & sides[1]
