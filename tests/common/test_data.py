"""Every shape of a row that is read, and every fault of one that is named before training."""

import gzip
import json
import re

import pytest

from common.data import load_rows
from common.errors import UserError
from tests.chats import UA, say, write_and_load


def gpt(*turns: str) -> list[dict[str, str]]:
    """The same in ShareGPT's words."""
    names = {"s": "system", "u": "human", "a": "gpt"}
    return [{"from": names[turn[0]], "value": turn[3:]} for turn in turns]


@pytest.fixture
def load(tmp_path):
    return write_and_load(tmp_path)


MESSAGES = [
    ({"messages": UA, "id": 3}, UA),
    ({"messages": say("s: S", "u: Hi", "a: Ho", "u: So", "a: No")}, None),
    ({"prompt": "Hi", "completion": "Ho"}, UA),
    (
        {"prompt": say("s: S", "u: Hi"), "completion": say("a: Ho")},
        say("s: S", "u: Hi", "a: Ho"),
    ),
    ({"system": "S", "prompt": "Hi", "completion": "Ho"}, say("s: S", "u: Hi", "a: Ho")),
    ({"question": "Hi", "answer": "Ho", "system": None}, UA),
    ({"instruction": "Hi", "input": "", "output": "Ho", "text": "x"}, UA),
    ({"instruction": "Hi", "output": "Ho"}, UA),
    ({"instruction": "Add", "input": "1, 2", "output": "3"}, say("u: Add\n\n1, 2", "a: 3")),
    (
        {"system": "S", "history": [["A", "B"]], "instruction": "Hi", "output": "Ho"},
        say("s: S", "u: A", "a: B", "u: Hi", "a: Ho"),
    ),
    ({"history": [], "instruction": "Hi", "output": "Ho"}, UA),
    ({"history": "[]", "instruction": "Hi", "output": "Ho"}, UA),
    ({"conversations": gpt("s: S", "u: Hi", "a: Ho")}, say("s: S", "u: Hi", "a: Ho")),
    ({"conversations": UA}, UA),
]


@pytest.mark.parametrize(("row", "expected"), MESSAGES)
def test_messages(load, row, expected):
    assert load([row, row]).to_list() == [{"messages": expected or row["messages"]}] * 2


UNSAID = {"margin": None, "kind": None}
PLAIN = {"prompt": say("u: Hi"), "chosen": say("a: Ho"), "rejected": say("a: No")}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi", "chosen": "Ho", "rejected": "No"}, PLAIN),
        (PLAIN, PLAIN),
        ({"prompt": "Hi", "chosen": UA, "rejected": say("u: Hi", "a: No")}, PLAIN),
        ({"chosen": UA, "rejected": say("u: Hi", "a: No")}, PLAIN),
        (
            {
                "conversations": gpt("u: A", "a: B", "u: C"),
                "chosen": gpt("a: Ho")[0],
                "rejected": gpt("a: No")[0],
            },
            {**PLAIN, "prompt": say("u: A", "a: B", "u: C")},
        ),
        (
            {
                "chosen": "\n\nHuman: A\n\nAssistant: B\nb\n\nHuman: C\n\nAssistant: Ho",
                "rejected": "\n\nHuman: A\n\nAssistant: B\nb\n\nHuman: C\n\nAssistant: No",
            },
            {**PLAIN, "prompt": say("u: A", "a: B\nb", "u: C")},
        ),
        (
            {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Ho", "rejected": "No"},
            PLAIN,
        ),
        (
            {"prompt": "Human: Hi\r\n\r\nAssistant:", "chosen": "Ho", "rejected": "No"},
            PLAIN,
        ),
        (  # what only the prompt says, and what all three say
            {
                "prompt": say("s: S", "u: A", "a: B", "u: Hi"),
                "chosen": UA,
                "rejected": say("u: Hi", "a: No"),
            },
            {**PLAIN, "prompt": say("s: S", "u: A", "a: B", "u: Hi")},
        ),
        (
            {"system": " ", "question": "Hi", "chosen": "Ho", "rejected": "No"},
            PLAIN,
        ),
        (
            {"system": "S", "question": "Hi", "chosen": "Ho", "rejected": "No"},
            {**PLAIN, "prompt": say("s: S", "u: Hi")},
        ),
        (
            {"instruction": "Add", "input": "1, 2", "chosen": "3", "rejected": "4"},
            {"prompt": say("u: Add\n\n1, 2"), "chosen": say("a: 3"), "rejected": say("a: 4")},
        ),
        ({"instruction": "So", "chosen": UA, "rejected": say("u: Hi", "a: No")}, PLAIN),
    ],
)
def test_preference(load, row, expected):
    """A margin or a kind goes along where the row has one. Broken once: Intel's orca_dpo_pairs
    (system, question, chosen, rejected) had "turn 1 by assistant", as its question was not read."""
    assert load([row], format="preference").to_list() == [expected | UNSAID]
    said = row | {"margin": 2, "kind": "manners"}
    told = {"margin": 2.0, "kind": "manners"}
    assert load([said], format="preference", name="b.jsonl").to_list() == [expected | told]


def test_optional_cells_of_csv(load):
    """Broken once: every margin was text, and an empty kind was "empty; expected text"."""
    text = "prompt,chosen,rejected,margin,kind\nHi,Ho,No,2,\nHi,Ho,No,,manners\n"
    rows = load(text, "rows.csv", format="preference")
    assert rows.to_list() == [
        PLAIN | {"margin": 2.0, "kind": None},
        PLAIN | {"margin": None, "kind": "manners"},
    ]


def test_ranked_answers_become_pairs(load):
    """Broken by keeping pairs of equal scores, and by an answer that is there twice."""
    row = {"prompt": "Hi", "answers": ["So", "Ho", "No", "Oh"], "scores": [2, 9.5, -1, 2]}
    row = {name: v + v[:1] if isinstance(v, list) else v for name, v in row.items()}
    pairs = load([row], format="preference", where=True)
    found = [(r["chosen"][0]["content"], r["rejected"][0]["content"]) for r in pairs]
    assert found == [("So", "No"), ("Ho", "So"), ("Ho", "No"), ("Ho", "Oh"), ("Oh", "No")]
    assert all(r["prompt"] == say("u: Hi") and r["where"].endswith("row 1") for r in pairs)
    assert pairs["margin"] == [3.0, 7.5, 10.5, 7.5, 3.0]


def test_answers_of_one_score_rank_nothing(load, tmp_path, capsys):
    """Broken once: such a row went without a word, and a file of them had "no rows in it"."""
    tie = {"prompt": "Hi", "answers": ["Ho", "No"], "scores": [1, 1], "kind": "manners"}
    rows = [tie, tie | {"scores": [2, 1]}, tie]
    (pair,) = load(rows, format="preference")
    assert pair["margin"] == 1 and pair["chosen"] == say("a: Ho")
    assert "rows.jsonl: 2 rows left out, all of whose answers have" in capsys.readouterr().err
    options = {"format": "preference", "cache_dir": str(tmp_path / "cache")}
    assert len(load_rows(str(tmp_path / "rows.jsonl"), **options)) == 1
    assert "left out" not in capsys.readouterr().err  # once a process is enough
    assert load(rows, format="prompt")["prompt"] == [say("u: Hi")] * 3
    with pytest.raises(UserError, match="of each of 2 rows all answers have the same score"):
        load([tie, tie], format="preference")


def test_shared_prefix_from_gzip(tmp_path):
    """As Anthropic's HH comes: `.jsonl.gz`, one dialogue in a string. Broken by keeping the space
    after a speaker's name."""
    line = {side: f"\n\nHuman: Hi\n\nAssistant: {a}" for side, a in
            (("chosen", "Ho"), ("rejected", "No"))}  # fmt: skip
    path = tmp_path / "train.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(line).encode() + b"\n"))
    options = {"cache_dir": str(tmp_path / "cache")}
    assert load_rows(str(path), format="preference", **options).to_list() == [PLAIN | UNSAID]
    prompts = load_rows(str(path), format="prompt", **options)
    assert prompts.to_list() == [{"prompt": say("u: Hi")}]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Hi"}, say("u: Hi")),
        ({"prompt": say("s: S", "u: Hi")}, say("s: S", "u: Hi")),
        ({"prompt": "Hi", "chosen": "Ho", "rejected": "No"}, say("u: Hi")),
        ({"messages": UA}, say("u: Hi")),
        ({"conversations": gpt("u: A", "a: B", "u: C", "a: D")}, say("u: A", "a: B", "u: C")),
        ({"question": "Hi", "answer": "Ho"}, say("u: Hi")),
        ({"instruction": "Hi", "input": "x", "output": "Ho"}, say("u: Hi\n\nx")),
        ({"question": "Hi"}, say("u: Hi")),
        ({"instruction": "Hi", "input": "x"}, say("u: Hi\n\nx")),
        ({"messages": say("u: A", "a: B", "u: C")}, say("u: A", "a: B", "u: C")),
        ({"prompt": "Hi", "answer": "Ho"}, say("u: Hi")),
        ({"prompt": "Hi", "answers": ["So", "Ho"], "scores": [1, 2]}, say("u: Hi")),
        # and a prompt beside what the answers answer
        ({"instruction": "Hi", "input": "", "output": "Ho", "prompt": "Hi? Ho"}, say("u: Hi")),
        ({"question": "Hi", "answer": "Ho", "prompt": "Solve: Hi"}, say("u: Hi")),
        ({"messages": say("s: S", "u: Hi", "a: Ho"), "prompt": "Hi"}, say("s: S", "u: Hi")),
        ({"prompt": "So", "chosen": UA, "rejected": say("u: Hi", "a: No")}, say("u: Hi")),
    ],
)
def test_prompt(load, row, expected):
    """Broken once: `prompt` was taken wherever there was one, though fine-tuning read another
    column: PPO's prompts held the answers, and other ones were held out."""
    assert load([row], format="prompt").to_list() == [{"prompt": expected}]


def test_text(load):
    rows = load([{"text": " a\r\n"}, {"text": ""}, {"text": "é😀"}], format="text")
    assert rows.to_list() == [{"text": " a\r\n"}, {"text": "é😀"}]


def test_columns_and_keep(load):
    row = {"q": "Hi", "a": "Ho", "kind": "fact", "messages": "none of ours"}
    columns = {"prompt": "q", "completion": "a"}
    assert load([row], columns=columns, keep=["kind"])[0] == {"messages": UA, "kind": "fact"}
    assert load([{"body": "x"}], format="text", columns={"text": "body"})[0] == {"text": "x"}
    two = {"prompt": "A", "completion": "B", "question": "Hi", "answer": "Ho"}
    assert load([two], columns={"question": "question"})[0] == {"messages": UA}


@pytest.mark.parametrize(
    "columns",
    [
        {"prompt": "q", "completion": "a"},
        {"question": "q", "answer": "a"},
        {"instruction": "q", "output": "a"},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "answers": "a", "scores": "b"},
    ],
)
def test_prompts_by_the_mapping_of_the_answers(load, columns):
    """Fine-tuning reads the held-out prompts, too, by its own mapping, after training.

    Broken by passing the columns on whole: "completion" was then no field of a prompt.
    """
    said = [["Ho", "No"], [2, 1]] if "scores" in columns else ["Ho", "No"]
    row = dict(zip("qab", ["Hi", *said], strict=True))
    rows = load([row], format="prompt", columns=columns)
    assert rows.to_list() == [{"prompt": say("u: Hi")}]


FAULTS = [
    ([{"question": "a", "answer": "b"}] * 16 + [{"question": "a"}],
     'row 17: "answer" is missing; expected question and answer (text)'),
    ([{"question": "a"}], 'row 1: "answer" is missing; expected question and answer (text)'),
    ([{"prompt": "a", "completion": None}], 'row 1: "completion" is missing; expected prompt and'),
    ([{"prompt": "a", "completion": 42}], 'row 1: "completion" is 42 (int); expected text, or a'),
    ([{"prompt": "a", "completion": " "}], 'row 1: "completion" is empty; expected text'),
    ([{"instruction": "a", "output": 1.5}], 'row 1: "output" is 1.5 (float); expected text'),
    ([{"instruction": "a", "input": [1], "output": "b"}], '"input" is [1] (list); expected text'),
    ([{"messages": []}], '"messages" is [] (list); expected text, or a list of messages'),
    ([{"messages": UA}, "", "  ", {"messages": [3]}], 'row 4: "messages"[0] is 3 (int); exp'),
    ([{"messages": [{"role": "user"}]}], '"messages"[0]: "content" is None (NoneType); expected'),
    ([{"messages": [{"role": "tool", "content": "x"}]}], '"role" is \'tool\' (str); expected sys'),
    ([{"messages": [{"role": ["user"], "content": "x"}]}], "\"role\" is ['user'] (list); expected"),
    ([{"messages": '[{"role": "user"}]'}], '"messages" is \'[{"role": "user"}]\' (str); expe'),
    ([{"prompt": "a", "completion": "b"}, "[" * 99_999], "row 2: not JSON (maximum recursion"),
    ([{"prompt": "a", "completion": "b"}, "9" * 5000], "row 2: not JSON (Exceeds the limit"),
    ([{"conversations": [{"from": "bot", "value": "x"}]}], '"from" is \'bot\' (str); expected sys'),
    ([{"messages": [*say("u: a"), say("a: b")[0] | {"tool_calls": [{"id": 1}]}]}],
     '"messages"[1] calls a tool; expected text alone'),
    ([{"prompt": "a", "completion": "b", "label": False}], '"label" says if the answer is good'),
    ([{"messages": say("u: a")}], "the last turn is by user; expected assistant"),
    ([{"messages": say("s: a")}], "the last turn is by system; expected assistant"),
    ([{"messages": say("a: a")}], '"messages": turn 1 is by assistant; expected user'),
    ([{"messages": say("s: a", "s: b")}], "turn 2 is by system; expected user"),
    ([{"messages": say("u: a", "u: b", "a: c")}], "turn 2 is by user; expected assistant"),
    ([{"prompt": "\ud800", "completion": "x"}], '"prompt" holds half a character'),
    ([{"prompt": "a", "completion": "b"}, '{"prompt": "a",'], "row 2: not JSON ("),
    (["[1, 2]"], "row 1: is a list; expected an object with columns"),
    ([{"foo": "a", "bar": "b"}], 'the row has foo, bar; format "messages" needs messages, or'),
    ([{"messages": UA, "question": "a", "answer": "b"}],
     "fits messages, or question and answer; name the columns to take"),
    ("", "rows.jsonl: no rows in it"),
    ("\n \n", "rows.jsonl: no rows in it"),
]  # fmt: skip


@pytest.mark.parametrize(("rows", "message"), FAULTS)
def test_faults_of_messages(load, rows, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load(rows)
    assert "\n" not in str(error.value)
    assert "rows.jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("format", "row", "message"),
    [
        ("text", {"text": 3}, '"text" is 3 (int); expected text'),
        ("text", {"text": None}, 'the row has text; format "text" needs text'),
        ("prompt", {"prompt": UA}, "the last turn is by assistant; expected user"),
        ("prompt", {"foo": "a"}, 'the row has foo; format "prompt" needs messages, or'),
        ("prompt", {"answer": "a"}, '"question" is missing; expected question and answer'),
        ("prompt", {"prompt": "a", "question": "b"}, "fits prompt, or question; name the columns"),
        (
            "prompt",
            {"prompt": "a", "completion": "b", "question": "c", "answer": "d"},
            "fits prompt and completion, or question and answer; name the columns to take",
        ),
        ("preference", {"prompt": "a", "chosen": "b"}, '"rejected" is missing; expected'),
        ("preference", {"prompt": UA, "chosen": "b", "rejected": "c"}, "turn 3 is by assistant"),
        ("preference", {"chosen": UA, "rejected": say("u: x", "a: y")}, "differ before their last"),
        (
            "preference",
            {"prompt": "a", "chosen": say("u: b"), "rejected": "c"},
            "turn 2 is by user",
        ),
        (
            "preference",
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: "},
            'row 1: "rejected"[1] is empty; expected text',
        ),
        (
            "preference",
            {"chosen": "\n\nHuman: a\n\nHuman: c\n\nAssistant: b", "rejected": "x"},
            "differ before their last turn",
        ),
        (
            "preference",
            {"prompt": "Be brief.\n\nHuman: a\n\nAssistant:", "chosen": "b", "rejected": "c"},
            '"prompt" ends in "Assistant:" and does not begin with "Human:"',
        ),
        (
            "preference",
            {f: f"Be brief.\n\nHuman: a\n\nAssistant: {f}" for f in ("chosen", "rejected")},
            '"chosen" and "rejected" hold no prompt; expected of each a list of messages, or a dia',
        ),
        ("messages", {"messages": UA, "tools": "[...]"}, '"tools" lists what may be called'),
        (
            "messages",
            {"history": [["a"]], "instruction": "b", "output": "c"},
            "\"history\"[0] is ['a'] (list); expected [question, answer]",
        ),
        (
            "messages",
            {"history": [["a", 1]], "instruction": "b", "output": "c"},
            '"history"[0] is 1 (int); expected text',
        ),
        (
            "preference",
            {"prompt": "a", "answers": ["b", "c"], "scores": [1]},
            'row 1: "scores" is [1] (list); expected a list of at least two',
        ),
        (
            "preference",
            {"prompt": "a", "answers": ["b", "c"], "scores": [1, 2, 3]},
            '"answers" has 2 entries and "scores" 3; expected a score for each answer',
        ),
        (
            "preference",
            {"prompt": "a", "answers": ["b", "c"], "scores": [1, "2"]},
            "\"scores\"[1] is '2' (str); expected a number",
        ),
        (
            "preference",
            {"prompt": "a", "answers": ["b", ""], "scores": [1, 2]},
            '"answers"[1] is empty; expected text',
        ),
        (
            "preference",
            {"prompt": "a", "answers": ["b", "c", "b"], "scores": [1, 2, 3]},
            '"answers"[0] and [2] are the same with different scores',
        ),
        (
            "preference",
            {"prompt": "a", "chosen": "b", "rejected": "b"},
            '"chosen" and "rejected" are the same; expected two answers',
        ),
        (
            "preference",
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "much"},
            "\"margin\" is 'much' (str); expected a number",
        ),
        (
            "preference",
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": -1},
            '"margin" is -1 (int); expected 0 or more',
        ),
        (
            "preference",
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": True},
            '"margin" is True (bool); expected a number',
        ),
        (
            "preference",
            {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "nan"},
            '"margin" is nan (float); expected a number',
        ),
        (
            "preference",
            {"prompt": "a", "answers": ["b", "c"], "scores": [1, 10**400]},
            f'"scores"[1] is 1{"0" * 56}... (int); expected a number',
        ),
    ],
)
def test_faults_of_other_formats(load, format, row, message):
    with pytest.raises(UserError, match=re.escape(message)):
        load([row], format=format)


def test_faults_of_arguments(load, tmp_path):
    row = {"q": "Hi", "a": "Ho"}
    for options, message in (
        ({"format": "chat"}, 'format "chat" is unknown; must be one of text, messages'),
        ({"columns": {"reply": "a"}}, 'columns: "reply" is no field of format "messages"'),
        ({"columns": {"prompt": "q", "completion": "b"}}, 'row 1: "b" is missing; expected prompt'),
        ({"columns": {"prompt": "q", "completion": "a"}, "keep": ["kind"]}, '"kind" is missing'),
        ({"split": "test"}, 'one file has no split "test"; give that split\'s file'),
        ({"name": "rows.xlsx"}, "cannot read .xlsx; use .txt .json .jsonl .csv .parquet"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            load([row], **options)
    for source in ("gone.jsonl", "./gone", "/gone", "a/b/c", "gone.json.gz", ""):
        with pytest.raises(UserError, match="no such file or folder"):
            load_rows(source, format="text")


def test_a_prompt_must_be_the_chosen_ones(load):
    row = {"prompt": say("u: So"), "chosen": UA, "rejected": say("u: Hi", "a: No")}
    with pytest.raises(UserError, match='"prompt" does not end in what chosen begins with'):
        load([row], format="preference")


def test_faulty_rows_alone_are_counted(load):
    """Broken once: "no rows in it, or only empty ones"."""
    with pytest.raises(UserError, match="2 faulty rows and no others; give a file with rows"):
        load([{"question": "a"}] * 2, skip=2)
