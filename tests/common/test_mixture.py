"""Several sources as one: how often each row comes, that nothing held out is trained on, faults."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from common.errors import UserError
from common.mixture import Source, read_mixture
from common.tasks import FileTask, load_task


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """100 rows twice, 100 a half; ten questions stand in both sources."""
    one = [{"question": f"q{n}", "answer": "one"} for n in range(100)]
    two = [{"frage": f"q{n}", "output": "two"} for n in range(90, 190)]
    write(tmp_path / "one.jsonl", one)
    write(tmp_path / "two.jsonl", two)
    path = tmp_path / "mix.yaml"
    path.write_text(
        f"- {{path: {tmp_path}/one.jsonl, weight: 2}}\n"
        f"- {{path: {tmp_path}/two.jsonl, weight: 0.5, "
        "columns: {instruction: frage, output: output}}\n"
    )
    return path


def test_weights_say_how_often_rows_come(mixture: Path) -> None:
    """Broken by rounding 0.5 to 0, and by leaving the rows in order."""
    task = load_task(str(mixture), validation_fraction=0.2)
    train, held_out = (task.conversations(split)["messages"] for split in ("train", "validation"))
    counts = Counter((row[0]["content"], row[1]["content"]) for row in train)
    assert {count for (_, answer), count in counts.items() if answer == "one"} == {2}
    assert {count for (_, answer), count in counts.items() if answer == "two"} == {1}
    held = Counter((row[0]["content"], row[1]["content"]) for row in held_out)
    assert set(held.values()) == {1}
    assert not {question for question, _ in counts} & {question for question, _ in held}
    ones, twos = (sum(a == name for _, a in [*counts, *held]) for name in ("one", "two"))
    assert ones == 100 and 40 < twos < 80
    answers = [row[1]["content"] for row in train]
    assert len(set(answers[:20])) == 2, "the sources stand one after the other"
    assert train == task.conversations("train")["messages"]
    assert task.prompt_rows("align", 7).column_names == ["prompt"]


def test_the_weight_of_a_single_source_counts(tmp_path: Path) -> None:
    """Broken once: it had no effect, and `columns` beside a mixture neither."""
    rows = [{"question": f"q{n}", "answer": "a"} for n in range(20)]
    file, mixture = write(tmp_path / "one.jsonl", rows), tmp_path / "mix.yaml"
    plain = load_task(str(file))
    mixture.write_text(f"- path: {file}")
    assert load_task(str(mixture)).fingerprint() == plain.fingerprint()
    mixture.write_text(f"- {{path: {file}, weight: 3}}")
    task = load_task(str(mixture))
    assert len(task.conversations("train")) == 3 * len(plain.conversations("train"))
    assert len(task.conversations("dev")) == len(plain.conversations("dev"))
    assert task.fingerprint() != plain.fingerprint()
    with pytest.raises(UserError, match=r"columns: each source of .*mix\.yaml has its own"):
        load_task(str(mixture), columns={"question": "q"})
    mixture.write_text(f"- {{path: {tmp_path}/book.txt, weight: 3}}")
    with pytest.raises(UserError, match=r"book\.txt: a single text is read once, weight must be 1"):
        load_task(str(mixture))


def test_a_source_is_a_subset_of_the_reward_figures(tmp_path: Path) -> None:
    pairs = [{"prompt": f"q{n}", "chosen": "a", "rejected": "b"} for n in range(20)]
    sources = [Source(str(write(tmp_path / f"{name}.jsonl", pairs))) for name in ("hh-1", "mine")]
    rows = FileTask(sources, 0.1).rankings(lambda questions: [], "train", 0, 0.0)
    assert set(rows["kind"]) == {"hh_1", "mine"} and "source" not in rows.column_names


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("weight: 2", "weight: 3"),
        ("weight: 2", "weight: 2, split: test"),
        ("frage, output: output", "frage, output: frage"),
    ],
)
def test_fingerprint_changes_with_what_is_read(mixture: Path, old: str, new: str) -> None:
    """Broken by the files' content alone: a finished run then stood for other columns."""
    before = load_task(str(mixture)).fingerprint()
    mixture.write_text(mixture.read_text().replace(old, new))
    assert load_task(str(mixture)).fingerprint() != before


def test_fingerprint_of_a_file_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken once: it was the path, so that a changed file went unnoticed."""
    monkeypatch.setenv("HOME", str(tmp_path))
    source, found = Source("~/q.jsonl"), set()
    for answer in ("a", "b"):
        write(tmp_path / "q.jsonl", [{"question": "q", "answer": answer}])
        found.add(source.fingerprint())
    assert len(found) == 2
    (tmp_path / "mix.yaml").write_text("- {path: ~/q.jsonl}")
    assert read_mixture("~/mix.yaml") == [source]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- [", "mix.yaml: cannot be read ("),
        ("path: a.jsonl", "mix.yaml: expected a list of sources"),
        ("- {path: a.jsonl}\n- {pth: b}", "mix.yaml, entry 2: is {'pth': 'b'}; expected path"),
        ("- {path: a, wight: 2}", "entry 1: is {'path': 'a', 'wight': 2}; expected path, and of"),
        ("- {path: 5}", 'entry 1: "path" is 5; expected text'),
        ("- {path: a, weight: 0}", 'entry 1: "weight" is 0; expected a number above 0'),
        ("- {path: a, weight: x}", "entry 1: \"weight\" is 'x'; expected a number above 0"),
        ("- {path: a, weight: true}", 'entry 1: "weight" is True; expected a number above 0'),
        ("- {path: a, split: 5}", 'entry 1: "split" is 5; expected text'),
        ("- {path: a, columns: [q]}", "entry 1: \"columns\" is ['q']; expected {ours: theirs}"),
        ("- {path: a, columns: {text: 5}}", "entry 1: \"columns\" is {'text': 5}; expected {ours"),
    ],
)
def test_faults(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mix.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_mixture(str(path))
    with pytest.raises(UserError, match=r"gone\.yaml: cannot be read"):
        read_mixture(str(tmp_path / "gone.yaml"))
