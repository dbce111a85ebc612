"""The report before training: what is repeated, what is learned, what is lost, by hand."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset

from common.check_data import describe_repeats, main, show_mask, show_row
from common.config import as_flags
from common.errors import UserError
from common.tokenizer import train_characters
from tests.chats import say
from tests.sft.test_template import OWN
from tests.toy import save_toy

BARE = OWN.replace("{% generation %}", "").replace("{% endgeneration %}", "")
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_toy(tmp_path_factory.mktemp("tiny"))


def test_mask_is_shown_to_the_token():
    """Broken by a run that ends a token late."""
    tokenizer = train_characters(["abc\n"])
    chat = say("u: a", "a: bb", "u: c", "a: a")
    assert show_mask(chat, tokenizer, None) == (
        "<|bos|><|user|> a\n\n<|assistant|>[[ bb<|eos|>]]<|user|> c\n\n<|assistant|>[[ a<|eos|>]]"
    )
    # <bos><user> _ a \n \n <assistant> _ b: the ninth token is the first b
    assert show_mask(chat[:2], tokenizer, 9) == (
        "<|bos|><|user|> a\n\n<|assistant|>[[ b]][cut off: b<|eos|>]"
    )
    assert show_mask(chat[:2], tokenizer, 9, kept="end") == (
        "[cut off: <|bos|><|user|>] a\n\n<|assistant|>[[ bb<|eos|>]]"
    )
    whole = "<|bos|><|user|> a\n\n<|assistant|>[[ bb<|eos|>]]"
    assert show_mask(chat[:2], tokenizer, 9, kept="bfd_split") == whole
    assert show_mask(chat[:2], tokenizer, 11, kept="end") == whole
    pair = {"prompt": chat[:1], "chosen": chat[1:2], "rejected": chat[3:]}
    assert show_row(pair, tokenizer, None) == (
        "  chosen    <|bos|><|user|> a\n\n<|assistant|> bb<|eos|>\n"
        "  rejected  <|bos|><|user|> a\n\n<|assistant|> a<|eos|>"
    )


def test_repeats_by_hand():
    """The last row comes twice, by a weight. Broken once by counting that as repeated; broken by
    comparing training rows as they are written."""
    train = [say("u: Who  goes?", "a: I."), say("u: who goes?", "a: i."), say("u: b", "a: c")]
    held_out = [say("u: WHO goes?", "a: You."), say("u: c", "a: b")]
    rows = [
        Dataset.from_list([{"messages": m, "where": f"f, row {i}"} for i, m in enumerate(part)])
        for part in (train, held_out)
    ]
    rows[0] = rows[0].select([0, 1, 2, 2])
    assert describe_repeats(*rows).splitlines() == [
        "  1 of 3 training rows stand there before",
        "  1 of 2 evaluation rows open with what training asks",
        "    f, row 0 asks as f, row 1",
    ]


def check(tiny: Path, stage: str, data: Path, *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "common.check_data", "--config", f"configs/own/{stage}.yaml"]
    command += ["--data", str(data), "--model_name_or_path", str(tiny), *more]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)


def test_command_reports_and_refuses(tiny: Path, tmp_path: Path):
    """Broken by leaving `require_kept` out: the second call then ended with 0. By a report without
    its histogram, without what is repeated, without the longest row.
    """
    data = tmp_path / "faq.jsonl"
    rows = [{"question": f"Who is {n}?", "answer": "He is." * (1 + n % 2 * 40)} for n in range(40)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = check(tiny, "sft", data)
    assert done.returncode == 0, done.stderr
    train, held_out = (int(n) for n in re.findall(r"(\d+) rows, ", done.stdout))
    assert train + held_out == 40 and 2 <= held_out < 12 and "[[ He is.<|eos|>]]" in done.stdout
    assert done.stdout.count(" tokens  ") == 2 * 8  # a histogram of either part
    assert f"0 of {train} training rows stand there before" in done.stdout
    assert "longest: " not in done.stdout
    done = check(tiny, "sft", data, "--max_length", "64")
    assert done.returncode == 2 and "[cut off:" not in done.stdout
    assert re.search(r"longest: .*faq\.jsonl, row \d+, \"messages\", 2\d\d tokens", done.stdout)
    assert re.search(r"cut: \d+ rows, which lose their end", done.stdout)
    assert f" of {train} rows are longer" in done.stderr and "faq.jsonl, row " in done.stderr
    assert "Traceback" not in done.stderr
    done = check(tiny, "sft", data, "--stage", "rlhf")
    assert done.returncode == 2 and "stage (rlhf) must be one of sft, reward" in done.stderr


@pytest.mark.parametrize(
    ("stage", "field", "value", "shown"),
    [
        (
            "sft",
            "assistant_only_loss",
            "false",
            "[[<|bos|><|user|> So?\n\n<|assistant|> And.<|eos|>]]",
        ),
        ("sft", "chat_template_path", OWN, "<|bos|><|user|>So?<|eos|><|assistant|>[[And.<|eos|>]]"),
        ("sft", "chat_template_path", BARE, "the chat template has no generation marks"),
        ("sft", "eos_token", "<|user|>", "eos_token (<|user|>) is not the tokenizer's own"),
        ("reward", "pad_token", "x", "pad_token (x) is not the tokenizer's own"),
        ("reward", "chat_template_path", OWN, "is for fine-tuning"),
    ],
)
def test_reads_as_the_stage_of_these_fields(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stage: str,
    field: str,
    value: str,
    shown: str,
) -> None:
    """Broken once: all were passed over, and fine-tuning's template was not checked."""
    data, template = tmp_path / "rows.jsonl", tmp_path / "template.jinja"
    rows = [{"prompt": "And?", "completion": "So."}, {"prompt": "So?", "completion": "And."}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template.write_text(value)
    fields = {"data": data, "model_name_or_path": tiny}
    fields[field] = template if field == "chat_template_path" else value
    flags = ["--config", f"configs/own/{stage}.yaml", *as_flags(fields)]
    monkeypatch.setattr(sys, "argv", ["check_data", *flags])
    if shown.startswith(("<", "[")):
        main()
        assert f"\n  {shown}\n" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match=re.escape(shown)):
            main()


@pytest.mark.parametrize(
    ("fields", "training", "evaluation"),
    [
        ({}, "cut: 1 rows, which lose their end", "cut: 1 rows, which lose their end"),
        ({"truncation_mode": "keep_end"}, "cut: 2 rows, which lose their beginning", "cut: 2 rows"),
        ({"packing": "true"}, "cut: 1 rows, which lose their end", "lost: 1 rows, all of whose"),
        (
            {"packing": "true", "packing_strategy": "bfd_split", "eval_packing": "false"},
            "split: 2 rows, into pieces that do not see each other",
            "cut: 1 rows, which lose their end",
        ),
        (
            {"packing": "true", "packing_strategy": "wrapped"},
            "packed: rows one behind another, cut every max_length tokens, none lost",
            "packed: rows one behind another",
        ),
    ],
)
def test_what_packing_and_truncation_mode_cut(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    fields: dict[str, str],
    training: str,
    evaluation: str,
) -> None:
    """In either part one row whose answer is too long, and one whose question is. Broken once:
    whatever was set, ends were cut and rows dropped."""
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": q + "So?" * 50, "completion": "And."} for q in ("", "Who is 1?")]
    rows += [{"prompt": q, "completion": "No" * 99} for q in ("What?", "Or?")]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {"data": data, "model_name_or_path": tiny, "validation_fraction": 0.5} | fields
    given |= {"max_length": 64, "max_lost_share": 1}
    monkeypatch.setattr(
        sys, "argv", ["check", "--config", "configs/own/sft.yaml", *as_flags(given)]
    )
    main()
    parts = re.split(r"\n(?:training|evaluation|repeated)\n", capsys.readouterr().out)
    assert f"  {training}" in parts[1] and f"  {evaluation}" in parts[2]
    assert ("lost: 1 rows" in parts[1]) == training.endswith("their end")
    assert (" and 0 tokens, " in parts[1]) == training.startswith(("split", "packed"))


@pytest.mark.parametrize(
    ("stage", "name", "rows"),
    [
        ("sft", "alpaca_en_1k.json", 999),
        ("sft", "gsm8k_train.jsonl", 7_473),
        ("reward", "preferences_en_300.json", 300),
    ],
)
def test_real_files(tiny: Path, stage: str, name: str, rows: int):
    folder = os.environ.get("FOLIO_TEST_DATA")
    if not folder:
        pytest.skip("FOLIO_TEST_DATA names no folder with the real data")
    done = check(tiny, stage, Path(folder) / name, "--max_length", "64")
    assert done.returncode == 2 and f"{name}, row " in done.stderr
    counts = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) rows, [\d,]+ t", done.stdout)]
    assert counts[0] == pytest.approx(0.9 * rows, rel=0.1)
    assert stage == "reward" or sum(counts) == rows  # the reward model's dev is not shown
    done = check(tiny, stage, Path(folder) / name, "--max_lost_share", "1")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ["check-data", "pretrain", "sft", "rankings", "sweep", "lesson"])
def test_a_name_with_spaces_reaches_the_command(target: str) -> None:
    """Broken once: "text.txt belongs to no field"."""
    command = ["make", "--dry-run", "--no-print-directory", target]
    command += ["PROFILE=own", "DATA=my text (2).txt"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    words = shlex.split(done.stdout.splitlines()[-1])
    assert words[words.index("--data") + 1] == "my text (2).txt"


def test_arden(tiny: Path):
    """Both stages of the embedded profile, before any ranking was collected."""
    for stage in ("sft", "reward"):
        command = ["--config", f"configs/arden/{stage}.yaml", "--model_name_or_path", str(tiny)]
        command += ["--output_dir", str(tiny / "out"), "--max_length", "256"]
        command = [sys.executable, "-m", "common.check_data", *command]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
        assert done.returncode == 0, done.stderr
        assert f"{stage}: arden" in done.stdout
