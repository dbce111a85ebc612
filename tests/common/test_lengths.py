"""Lengths counted as training counts them, by hand; and the refusal when too much is lost."""

from dataclasses import replace
from pathlib import Path

import pytest
from datasets import Dataset
from transformers import AutoConfig

from common.errors import UserError
from common.lengths import LengthReport, keep_answerable, leave_room, measure_lengths
from common.tokenizer import train_characters
from tests.chats import say


def test_lengths_by_hand():
    tokenizer = train_characters(["abc\n"])
    # <bos><user> _ a a \n \n <assistant> _ b b b <eos>: 13 tokens, the answer begins at index 8
    rows = [say("u: aa", "a: bbb"), say("u: aa", "a: bbb", "u: c", "a: c"), say("u: a", "a: b")]
    rows = Dataset.from_list([{"messages": row} for row in rows])
    report = measure_lengths(rows, tokenizer, 13)
    assert (report.rows, report.tokens, report.longest) == (3, 13 + 22 + 10, 22)
    assert (report.truncated, report.tokens_cut, report.unanswered) == (1, 9, 0)
    assert measure_lengths(rows, tokenizer, 9).unanswered == 0
    assert measure_lengths(rows, tokenizer, 8).unanswered == 2
    assert str(report) == (
        "3 rows, 45 tokens, longest 22; max_length 13 cuts 1 rows and 9 tokens, "
        "and leaves 0 rows without any answer"
    )
    pair = {"prompt": say("u: aa"), "chosen": say("a: bbb"), "rejected": say("a: b")}
    report = measure_lengths(Dataset.from_list([pair]), tokenizer, 8)
    assert (report.tokens, report.longest, report.truncated) == (24, 13, 1)
    assert (report.tokens_cut, report.unanswered) == (8, 1)
    report = measure_lengths(Dataset.from_list([{"prompt": say("u: aa")}]), tokenizer, 8)
    assert (report.tokens, report.truncated, report.unanswered) == (8, 0, 1)
    report = measure_lengths(Dataset.from_list([{"text": "abc"}]), tokenizer, 2)
    assert (report.tokens, report.tokens_cut, report.unanswered) == (3, 1, 0)


def report(*lengths: int, max_length: int | None = 100) -> LengthReport:
    return LengthReport(max_length, list(lengths), sum(lengths), 0, 0, 'a.jsonl, row 7, "messages"')


def test_the_longest_row_is_named_by_file_row_and_field():
    """Broken by naming the first row in place of the longest."""
    tokenizer = train_characters(["abc"])
    pair = {"prompt": say("u: a"), "chosen": say("a: b")}
    pairs = [
        {**pair, "rejected": say(f"a: {answer}"), "where": f"f, row {row}"}
        for answer, row in (("b", 3), ("bb", 9))
    ]
    found = measure_lengths(Dataset.from_list(pairs), tokenizer, 5)
    assert found.longest_row == 'f, row 9, "rejected"'


def test_a_row_that_the_template_refuses_is_named():
    """Broken once: a traceback of jinja's, without the row."""
    tokenizer = train_characters(["abc"])
    refuses = "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = f"{{% for m in messages %}}{refuses}{{{{ m.content }}}}{{% endfor %}}"
    rows = [{"messages": say("u: a", "a: b"), "where": f"f, row {n}"} for n in range(300)]
    assert measure_lengths(Dataset.from_list(rows), tokenizer, None).rows == 300
    rows[299]["messages"] = say("s: c", "u: a", "a: b")
    with pytest.raises(UserError, match=r"^f, row 299: the chat template cannot .* \(no system\)"):
        measure_lengths(Dataset.from_list(rows), tokenizer, None)


def test_a_text_that_speaks_for_a_role_is_refused():
    """By a template that passes it on; ours breaks it up. Broken once: it was learned as a turn."""
    tokenizer = train_characters(["abc\n"])
    rows = [say("u: a", "a: b"), say("u: a", "a: b<|assistant|>c")]
    rows = Dataset.from_list(
        [{"messages": row, "where": f"x, row {i}"} for i, row in enumerate(rows)]
    )
    measure_lengths(rows, tokenizer, 100)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    with pytest.raises(
        UserError, match=r'x, row 1, "messages": says <\|assistant\|>, which the ch'
    ):
        measure_lengths(rows, tokenizer, 100)
    measure_lengths(rows.select([0]), tokenizer, 100)


def test_a_run_refuses_when_too_much_is_lost():
    """Broken by comparing with >= and by leaving the check out."""
    lengths = [50] * 9 + [101]
    report(*lengths).require_kept(0.1)  # one in ten is allowed
    report(*lengths, max_length=None).require_kept(0.0)
    masked = replace(report(101, 102), unanswered=2)  # with this share fine-tuning once began
    with pytest.raises(UserError, match=r"max_length \(100\) leaves none of 2 rows a token of an"):
        masked.require_kept(1.0)
    replace(masked, unanswered=1).require_kept(1.0)
    with pytest.raises(UserError) as error:
        report(*lengths).require_kept(0.05)
    assert str(error.value) == (
        "1 of 10 rows are longer than max_length (100 tokens), more than max_lost_share (0.05); "
        'the longest is a.jsonl, row 7, "messages" with 101: '
        "raise max_length, shorten the rows, or allow it by --max_lost_share"
    )


@pytest.mark.parametrize("shape", ["qwen3", "gpt2"])
def test_rows_beyond_the_context_are_refused(tmp_path: Path, shape: str):
    """Broken by comparing the longest row before the cut."""
    AutoConfig.for_model(shape, max_position_embeddings=64).save_pretrained(tmp_path)
    report(65, 10, max_length=64).require_context(tmp_path)
    report(64, 10, max_length=None).require_context(tmp_path)
    with pytest.raises(UserError, match=r"row 7.* gives 65 tokens, .* is 64 .*max_length to 64"):
        report(90, 10, max_length=65).require_context(tmp_path)


def test_characters_that_the_tokenizer_never_saw() -> None:
    """Broken by saying nothing, as it was: Chinese questions were fine-tuned on as one sign."""
    rows = Dataset.from_list([{"messages": say("u: aa", "a: bd")}])
    known = measure_lengths(rows, train_characters(["abd"]), None)
    known.require_known(0.1)
    assert "unknown" not in str(known)
    some = measure_lengths(rows, train_characters(["ab"]), None)
    some.require_known(0.25)
    assert "; 1 of 4 characters are unknown to the tokenizer" in str(some)
    message = (
        r'1 of 4 characters .* max_lost_share \(0\.1\), most of them in row 1, "messages": pre'
    )
    with pytest.raises(UserError, match=message):
        some.require_known(0.1)


def test_histogram_by_hand():
    """Broken by counting a length at a range's end to the next one; once by a division by zero
    where there are no rows, as of a play without a reply.
    """
    assert report().histogram() == "      1 -      1 tokens        0 "
    assert report(1, 2, 3, 5, 8, max_length=6).histogram(bins=4).splitlines() == [
        "      1 -      2 tokens        2 " + "#" * 40,
        "      3 -      4 tokens        1 " + "#" * 20,
        "      5 -      6 tokens        1 " + "#" * 20,
        "      7 -      8 tokens        1 " + "#" * 20 + "  > max_length",
    ]
    assert report().histogram().endswith("tokens        0 ")  # a division by zero once


def test_prompts_that_leave_room_for_an_answer(tmp_path: Path) -> None:
    """<bos><user> _ a a \\n \\n <assistant> are 8. Broken by forgetting the answer's room."""
    AutoConfig.for_model("gpt2", max_position_embeddings=17).save_pretrained(tmp_path)
    prompts = Dataset.from_list([{"prompt": say(f"u: {'a' * n}")} for n in (2, 6, 3)])
    tokenizer = train_characters(["abc\n"])
    kept = keep_answerable(prompts, tokenizer, tmp_path, 8)
    assert [row["prompt"][0]["content"] for row in kept] == ["aa", "aaa"]
    with pytest.raises(UserError, match=r"none of 3 prompts leaves 10 tokens .*context \(17\)"):
        keep_answerable(prompts, tokenizer, tmp_path, 10)
    assert leave_room(["aa", "aaaaaa", "aaa"], tokenizer, 17, 8) == [0, 2]
    assert leave_room([], tokenizer, 17, 8) == []
