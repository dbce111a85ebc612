"""Plays as data for the stages: what each split gives, and the figures on replies."""

import gzip
import json
from pathlib import Path

import pytest

from common.errors import UserError
from common.tasks import PlaysTask, load_task

SPEAKERS = "ANN", "BOB", "CAL"
SPEECHES = 2400


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> PlaysTask:
    """Three people who talk for long, no line twice: `line 0 goes`, `line 1 goes` ..."""
    lines = (f"{SPEAKERS[i % 3]}:\nline {i} goes\n" for i in range(SPEECHES))
    path: Path = tmp_path_factory.mktemp("plays") / "play.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    task = load_task(str(path), plays=True)
    assert isinstance(task, PlaysTask)
    return task


def number(message: dict[str, str]) -> int:
    return int(message["content"].split()[2])


def test_a_reply_follows_its_speech_and_splits_share_none(task: PlaysTask) -> None:
    numbers = {}
    for split in ("train", "validation"):
        rows = task.conversations(split)["messages"]
        assert all(number(answer) == number(question) + 1 for question, answer in rows)
        numbers[split] = {number(message) for row in rows for message in row}
    asked = {number(row["prompt"][-1]) for row in task.prompt_rows("align", 5000)}
    assert len(numbers["train"] | asked) > 1000 and len(numbers["validation"]) > 100
    assert len(numbers["train"]) > 600 and max(numbers["train"]) == min(asked)
    assert max(numbers["train"] | asked) < min(numbers["validation"])


def test_rankings_set_the_true_reply_above_both_others(task: PlaysTask) -> None:
    asked: list[str] = []

    def sample(questions: list[str]) -> list[list[str]]:
        asked.extend(questions)
        return [["BOB:\nmade up"] for _ in questions]

    rows = task.rankings(sample, "test", 20, noise=0.0)
    kinds = [row["kind"] for row in rows]
    assert kinds.count("true_elsewhere") == kinds.count("true_model") == len(asked) == 20
    first_held_out = number(task.conversations("validation")[0]["messages"][0])
    for row in rows:
        assert number(row["chosen"][0]) == number(row["prompt"][-1]) + 1
        assert number(row["prompt"][-1]) >= first_held_out
        if row["kind"] == "true_model":
            assert row["rejected"][0]["content"] == "BOB:\nmade up"
        else:
            assert abs(number(row["rejected"][0]) - number(row["chosen"][0])) > 10


def test_replies_to_rank_were_never_trained_on(task: PlaysTask) -> None:
    """Broken by ranking fine-tuning's dialogues, as it was: it knows those replies by heart."""
    tuned = {number(answer) for _, answer in task.conversations("train")["messages"]}
    rows = task.rankings(lambda questions: [[] for _ in questions], "train", 5000, noise=0.0)
    ranked = {number(row["chosen"][0]) for row in rows}
    assert len(ranked) > 200 and max(tuned) < min(ranked)
    assert ranked <= {number(row["prompt"][-1]) + 1 for row in task.prompt_rows("align", 5000)}


def test_prompts_of_ppo_are_not_those_of_the_evaluation(task: PlaysTask) -> None:
    """Nor are those that settings are chosen by. Broken once: dev was test."""
    train, dev, test = (
        {number(row["prompt"][-1]) for row in task.prompt_rows(split, 5000)}
        for split in ("align", "dev", "test")
    )
    assert train and dev and test and max(train) < min(dev) and max(dev) < min(test)
    asked: dict[str, list[str]] = {}
    for use in ("dev", "test"):
        task.measure(lambda questions, use=use: asked.setdefault(use, questions), use)  # type: ignore[misc]
        ranked = task.rankings(lambda questions: [[] for _ in questions], use, 5000, noise=0.0)
        assert {number(row["chosen"][0]) - 1 for row in ranked} <= (dev if use == "dev" else test)
    assert not set(asked["dev"]) & set(asked["test"])
    assert len(task.prompt_rows("align", 7)) == 7


def test_too_short_a_text_is_refused(tmp_path: Path) -> None:
    """Broken once: a division by zero after training, and "no prompt leaves max_new_tokens"."""
    path = tmp_path / "play.txt"

    def play(speeches: int) -> PlaysTask:
        path.write_text("\n".join(f"{SPEAKERS[i % 3]}:\nline {i} goes\n" for i in range(speeches)))
        return PlaysTask(str(path))

    least = play(40)
    assert [len(least.conversations(split)) for split in ("train", "validation")] == [21, 3]
    for rows in (least.prompt_rows("dev", 9), least.prompt_rows("test", 9)):
        assert len(rows) > 0
    with pytest.raises(UserError, match=r"play\.txt: no reply of 14 \(train\) has another of like"):
        least.rankings(lambda questions: [[] for _ in questions], "train", 9, noise=0.0)
    with pytest.raises(UserError, match=r"0 speeches with a reply in its part for validation"):
        play(20).conversations("validation")
    assert len(play(20).conversations("train")) > 0 and list(play(3).texts("validation"))


def test_figures_count_words_and_lines(task: PlaysTask) -> None:
    replies = iter(["ANN:\nline 7 goes", "ANN:\nline line glorp", "BOB:\nline 7 goes"] * 200)
    figures = task.measure(lambda questions: [next(replies) for _ in questions[:3]])
    assert figures["real_words"] == pytest.approx(9 / 10)  # glorp is none
    assert figures["repeated_lines"] == pytest.approx(2 / 6)  # ANN: and line 7 goes, said again
    assert figures["words"] == pytest.approx(10 / 3)


def test_samples_show_short_prompts(tmp_path: Path) -> None:
    """Seen to fail with the first prompts taken, however long."""
    rows = [{"prompt": f"{n} " + "why? " * (n % 2 * 200), "completion": "so"} for n in range(60)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shown = load_task(str(path), validation_fraction=0.5).sample_questions()
    assert len(shown) == 8 and all(int(prompt) % 2 == 0 for prompt in shown)
    long_ones = tmp_path / "long.jsonl"
    long_ones.write_text("".join(json.dumps(row) + "\n" for row in rows[1::2]), encoding="utf-8")
    assert len(load_task(str(long_ones), validation_fraction=0.5).sample_questions()) == 1


@pytest.mark.parametrize("name", ["BOOK.TXT", "book.txt", "Book.Txt.gz"])
def test_a_book_is_one_stream(tmp_path: Path, name: str) -> None:
    """Broken by the ending as it is written: a book was documents, of which one row is too few."""
    text, path = "".join(f"line {n}\n" for n in range(100)), tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    task = load_task(str(path))
    parts = [list(task.texts(split)) for split in ("train", "validation")]
    cut = round(0.9 * len(text))
    assert parts == [[text[:cut]], [text[cut:]]] and not task.documents_apart


@pytest.mark.parametrize("name", ["book.txt", "texts.jsonl"])
@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_part_of_a_text_may_not_be_empty(tmp_path: Path, name: str, share: float) -> None:
    """Broken once for one text: "validation.bin: the text to tokenize is empty", after training's
    was tokenized."""
    (tmp_path / name).write_text('{"text": "a"}\n{"text": "b"}\n')
    task = load_task(str(tmp_path / name), validation_fraction=share)
    with pytest.raises(UserError, match=r"validation_fraction \([01]\) must be between 0 and 1"):
        next(iter(task.tokenizer_texts()))


@pytest.mark.parametrize(
    "given",
    [
        {"keep": ["answer"]},
        {"columns": {"prompt": "frage"}},
        {"validation_fraction": 0.5},
        {"skip_faulty_rows": 3},
    ],
)
@pytest.mark.parametrize("data", [{"data": "arden"}, {"data": "play.txt", "plays": True}])
def test_what_is_of_own_rows_is_refused_elsewhere(data: dict, given: dict) -> None:
    with pytest.raises(UserError, match="of one's own rows"):
        load_task(**data, **given)


@pytest.mark.parametrize("name", ["prompt", "completion", "prompt_ids", "log_metric"])
def test_columns_to_keep_have_names_of_their_own(name: str) -> None:
    """Broken once: TRL leaves a completion out, so the function had it where it is measured
    and not in training."""
    with pytest.raises(UserError, match=rf"keep_columns \({name}\): the name is taken"):
        load_task("rows.jsonl", keep=[name])
