"""Local files and folders as numbered rows, one at a time, whatever they are written in.

.txt .json .jsonl .csv, each also as .gz, and .parquet. Numbers count from 1; in .jsonl they are
lines. Only a .json file that is one array is read whole.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet

from common.errors import UserError
from common.rows import BadRow
from common.token_file import cut_points

TEXT_CHARS = 1 << 22  # a longer .txt file comes as several rows, cut between two words
NumberedRows = Iterator[tuple[int, Any]]

_HELD_OUT = r"(validation|valid|val|test|eval|dev)"


def local_files(source: str, split: str) -> list[Path] | None:
    """The files of a local source; None if it can only be a name on the Hub.

    Raises:
        UserError: it looks like a path and nothing is there, or nothing that can be read.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        files = _files_of_folder(path, split)
    elif path.is_file():
        if _suffix(path) not in _READERS:
            raise UserError(f"{source}: cannot read {path.suffix or 'this'}; use {_known()}")
        if split != "train":
            raise UserError(f'{source}: one file has no split "{split}"; give that split\'s file')
        files = [path]
    elif not may_be_on_hub(source):
        raise UserError(f"{source}: no such file or folder; check the path")
    else:
        return None
    for file in files:
        if _suffix(file) == ".parquet" and file.suffix == ".gz":
            raise UserError(f"{file}: parquet is not read from .gz; run `gunzip {file}`")
    return files


def may_be_on_hub(source: str) -> bool:
    """Whether a name that is nothing here may be the Hub's, and does not look like a path."""
    ours = _suffix(Path(source)) in _READERS or source[:1] in ("/", ".", "~", "")
    return not ours and source.count("/") <= 1


def _files_of_folder(folder: Path, split: str) -> list[Path]:
    """Those named after the split, or in a folder that is; without such, all but other splits'.

    Folders in it are searched too, save hidden ones: a data set of the Hub, downloaded, keeps its
    files in `data/` or deeper.
    """
    below = (file.relative_to(folder) for file in folder.rglob("*") if _suffix(file) in _READERS)
    files = sorted(file for file in below if not any(p.startswith(".") for p in file.parts))
    named = [file for file in files if _is_named(file, re.escape(split))]
    if not named and split == "train":
        named = [file for file in files if not _is_named(file, _HELD_OUT)]
    if not named:
        raise UserError(f'{folder}: no files for split "{split}" in it; expected {_known()}')
    return [folder / file for file in named]


def _is_named(file: Path, split: str) -> bool:
    """Whether the file or a folder on the way to it is named so: train-0.parquet, train/0.jsonl."""
    return any(re.match(rf"{split}([-_.]|$)", part) for part in file.parts)


def require_one_set(source: str, files: list[Path], split: str) -> None:
    """Refuse a folder that holds several data sets under one split's name, as some of the Hub do.

    Their names: the folder at the top that is not `data`, and what follows the split's name. So
    main/train-0.parquet and socratic/train-0.parquet are two, train_prefs-0 and train_sft-0, too.

    Raises:
        UserError: it does.
    """
    sets: dict[str, str] = {}
    for file in files if len(files) > 1 else []:
        *above, name = file.relative_to(Path(source).expanduser()).parts
        stem = re.sub(r"([-_]\d+)?(-of-\d+)?(\..*)?$", "", name)
        if re.match(rf"{re.escape(split)}([-_]|$)", stem):
            inside = [part for part in above[:1] if part not in ("data", split)]
            pick = f"path: {Path(source, *inside)}" + ("" if stem == split else f", split: {stem}")
            sets["/".join([*inside, stem])] = f"- {{{pick}}}"
    if len(sets) > 1:
        known = ", ".join(sorted(sets)[:4])
        raise UserError(
            f'{source}: several sets for split "{split}" in it ({known}); write those to take into '
            f"a YAML file, a line each, `{sets[sorted(sets)[0]]}`, and give that"
        )


def _suffix(path: Path) -> str:
    return Path(path.name.removesuffix(".gz")).suffix.lower()


def _known() -> str:
    return " ".join(_READERS) + " (or those but .parquet with .gz)"


def read_rows(path: Path) -> NumberedRows:
    """Every row of a file with its number; one that cannot be read is a `BadRow`.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        yield from _READERS[_suffix(path)](path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except (csv.Error, OSError, EOFError, zlib.error, pyarrow.ArrowInvalid) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason}); make the file again") from None


def _open(path: Path, newline: str | None = None) -> IO[str]:
    opener: Any = gzip.open if path.name.endswith(".gz") else open
    return opener(path, "rt", encoding="utf-8-sig", newline=newline)


def _read_txt(path: Path) -> NumberedRows:
    number, rest = 1, ""
    with _open(path) as file:
        while block := file.read(TEXT_CHARS):
            rest += block
            for cut in cut_points(rest, TEXT_CHARS):
                yield number, {"text": rest[:cut]}
                number, rest = number + 1, rest[cut:]
                break
    yield number, {"text": rest}


def _read_jsonl(path: Path) -> NumberedRows:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, json.loads(line.rstrip("\n"))
                except json.JSONDecodeError as error:
                    # given, not raised: a generator that raised could not go on
                    yield (
                        number,
                        BadRow(
                            f"not JSON ({error.msg}, character {error.colno}); "
                            "expected one object a line"
                        ),
                    )


def _read_json(path: Path) -> NumberedRows:
    with _open(path) as file:
        first = file.read(1)
        while first.isspace():
            first = file.read(1)
        if first == "[":
            try:
                yield from enumerate(json.loads(first + file.read()), start=1)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"{path}: not JSON ({error.msg}, line {error.lineno}); expected a list of rows"
                ) from None
            return
    yield from _read_jsonl(path)


def _read_csv(path: Path) -> NumberedRows:
    csv.field_size_limit(1 << 30)
    with _open(path, newline="") as file:
        rows = csv.DictReader(file, strict=True)
        names = rows.fieldnames or []
        if len(names) == 1 and (sign := next((s for s in ";\t|" if s in names[0]), "")):
            raise UserError(
                f"{path}: its columns are parted by {sign!r}; save it with commas, or as .jsonl"
            )
        for number, row in enumerate(rows, start=1):
            faulty = BadRow("more cells than columns; quote the commas") if None in row else None
            yield number, faulty or row


def _read_parquet(path: Path) -> NumberedRows:
    with pyarrow.parquet.ParquetFile(path) as file:
        # Group by group: one iterator over the file holds on to all that it has read.
        groups = (file.iter_batches(1000, row_groups=[i]) for i in range(file.num_row_groups))
        rows = (row for group in groups for batch in group for row in batch.to_pylist())
        yield from enumerate(rows, start=1)


_READERS: dict[str, Callable[[Path], NumberedRows]] = {
    ".txt": _read_txt,
    ".json": _read_json,
    ".jsonl": _read_jsonl,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
