"""Streamed text: every document once, in order, from any place on; files and the Hub's layout."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from common import text_stream
from common.errors import UserError
from common.mixture import Source
from common.text_stream import fingerprint, stream_texts


def write(path: Path, texts: list[str]) -> Path:
    """A file of rows in the format that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        table = pyarrow.table({"id": range(len(texts)), "text": texts})
        pyarrow.parquet.write_table(table, path, row_group_size=3)
    else:
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def numbers(first: int, last: int) -> list[str]:
    return [f"document {n}" for n in range(first, last)]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """27 documents in three formats, two folders deep, with an empty one, and a held-out file."""
    write(tmp_path / "data" / "train-00000-of-00002.parquet", numbers(0, 10))
    write(tmp_path / "data" / "train-00001-of-00002.parquet", [*numbers(10, 15), " "])
    write(tmp_path / "more" / "train-2.jsonl", ["", *numbers(15, 20)])
    write(tmp_path / "more" / "train-3.jsonl.gz", numbers(20, 27))
    write(tmp_path / "data" / "test-00000-of-00001.parquet", ["never"])
    write(tmp_path / ".cache" / "train-9.jsonl", ["never"])
    return tmp_path


def all_texts(sources: list[Source], **options: object) -> list[str]:
    return [text for batch in stream_texts(sources, **options) for text in batch.texts]


def test_faulty_rows_can_be_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a set on the Hub nobody can mend row 3,000,001. Broken by stopping there for ever."""
    rows = ['{"text": "a"}', '{"text": null}', '{"text": "b"}', "no", '{"text": "c"}']
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    sources = [Source(str(tmp_path / "train.jsonl"))]
    assert all_texts(sources, skip=2) == ["a", "b", "c"]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and "train.jsonl, row 2" in said[0] and "row 4" in said[1]
    with pytest.raises(UserError, match=r"row 4.*more than skip_faulty_rows \(1\)"):
        all_texts(sources, skip=1)


def test_faulty_rows_before_a_stop_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In each source. Broken by a count that began anew with each start: any number passed."""
    rows = ['{"text": "a"}', "no", '{"text": "b"}', "no", '{"text": "c"}', "no", '{"text": "d"}']
    for name in ("one", "two"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    sources = [Source(str(tmp_path / f"{name}.jsonl")) for name in ("one", "two")]
    whole = list(stream_texts(sources, skip=3, batch_chars=1))
    for count, batch in enumerate(whole, start=1):
        after = json.loads(json.dumps(batch.place))
        capsys.readouterr()
        assert list(stream_texts(sources, after, 1, skip=3)) == whole[count:]
        assert capsys.readouterr().err.count("faulty: ") == [6, 5, 4, 3, 3, 2, 1, 0][count - 1]
        if count < 4:
            with pytest.raises(UserError, match=r"one.jsonl, row 6: .*skip_faulty_rows \(2\)"):
                list(stream_texts(sources, after, skip=2))


def test_every_document_once_in_order(shards: Path) -> None:
    """Seen to fail without the folders in the folder."""
    assert all_texts([Source(str(shards))]) == numbers(0, 27)


def test_goes_on_behind_any_batch(shards: Path) -> None:
    """Also into the next source. Seen to fail with the row counted that was to come."""
    more = write(shards.parent / f"{shards.name}.jsonl", numbers(27, 30))
    sources = [Source(str(shards)), Source(str(more))]
    batches = list(stream_texts(sources, batch_chars=25))
    assert len(batches) > 8 and max(len(batch.texts) for batch in batches) == 3
    for count, batch in enumerate(batches, start=1):
        place = json.loads(json.dumps(batch.place))
        rest = list(stream_texts(sources, after=place, batch_chars=25))
        assert [b.texts for b in rest] == [b.texts for b in batches[count:]]
        assert [b.place for b in rest] == [b.place for b in batches[count:]]


def test_the_hub_is_streamed_and_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FineWeb-Edu's layout and columns, read by `datasets` as it reads the Hub.

    Seen to fail with the state of the stream left out of the place.
    """
    extra = {"dump": "CC-MAIN-2024-10", "int_score": 4, "language": "en"}
    for number, (first, last) in enumerate(((0, 7), (7, 12))):
        rows = [{"text": t, "id": f"<urn:{t}>", **extra} for t in numbers(first, last)]
        path = tmp_path / "sample" / "10BT" / f"{number:03d}_00000.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: sample-10BT\n  data_files:\n  - split: train\n"
        "    path: sample/10BT/*\n---\n"
    )
    monkeypatch.setattr(text_stream, "local_files", lambda *_: None)  # take it for a name
    sources = [Source(f"{tmp_path}:sample-10BT")]
    batches = list(stream_texts(sources, batch_chars=15))
    assert [text for batch in batches for text in batch.texts] == numbers(0, 12)
    for count, batch in enumerate(batches, start=1):
        place = json.loads(json.dumps(batch.place))
        rest = [b.texts for b in stream_texts(sources, after=place, batch_chars=15)]
        assert rest == [b.texts for b in batches[count:]]
    assert batches[-1].origin.endswith("row 12")


def test_columns_and_faults(tmp_path: Path) -> None:
    """Seen to fail with the rows counted from 0."""
    file = tmp_path / "rows.jsonl"
    file.write_text('{"content": "a"}\n{"content": "b"}\n{"contents": "c"}\n')
    source = Source(str(file), columns={"text": "content"})
    with pytest.raises(UserError, match=r'rows.jsonl, row 3: "content" is missing'):
        all_texts([source])
    with pytest.raises(UserError, match="needs text: rename, or map with `columns`"):
        all_texts([Source(str(file))])
    with pytest.raises(UserError, match="weight must be 1"):
        all_texts([Source(str(file), weight=2)])


def test_a_stream_that_breaks_off_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        def __iter__(self):
            yield {"text": "a"}
            raise ConnectionError("timed\nout")

        def state_dict(self) -> dict:
            return {}

    monkeypatch.setattr(text_stream, "load_from_hub", lambda *_, **__: Broken())
    with pytest.raises(UserError) as stop:
        all_texts([Source("owner/name")])
    assert "owner/name: the Hub broke off after row 1 (timed out)" in str(stop.value)


def test_fingerprint_follows_files_and_columns(shards: Path) -> None:
    """Seen to fail with the columns left out."""
    source = Source(str(shards))
    before = fingerprint([source])
    assert fingerprint([source]) == before
    assert fingerprint([Source(str(shards), columns={"text": "id"})]) != before
    assert fingerprint([Source("owner/one")]) != fingerprint([Source("owner/two")])
    write(shards / "more" / "train-4.jsonl", ["new"])
    assert fingerprint([source]) != before
