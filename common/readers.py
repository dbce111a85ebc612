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
from itertools import chain
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.parquet
import yaml
from datasets.data_files import sanitize_patterns
from datasets.utils.metadata import MetadataConfigs

from common.errors import UserError
from common.rows import BadRow
from common.token_file import cut_points

TEXT_CHARS = 1 << 22  # a longer .txt file comes as several rows, cut between two words
NumberedRows = Iterator[tuple[int, Any]]
Sets = dict[tuple[Path, str], list[Path]]  # (folder, name): files, all from the folder given
SHOWN = 4  # of the sets in a folder that holds several

_HELD_OUT = r"(validation|valid|val|test|eval|dev)"


def local_files(source: str, split: str, several: bool = True) -> list[Path] | None:
    """The files of a local source; None if it can only be a name on the Hub.

    Args:
        source: a file, a folder or a name.
        split: of a folder's files.
        several: a folder may hold several sets for the split; they are one then.

    Raises:
        UserError: it looks like a path and nothing is there, or nothing that can be read.
    """
    path = Path(source).expanduser()
    if source and path.is_dir():
        files = _files_of_folder(path, split, several)
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


def _files_of_folder(folder: Path, split: str, several: bool) -> list[Path]:
    """The files of the one set that a folder holds for a split, or of all of them.

    Folders in it are searched too, save hidden ones: a data set of the Hub, downloaded, keeps its
    files in `data/` or deeper.

    Raises:
        UserError: there is none, or more than one and not `several`.
    """
    below = (file.relative_to(folder) for file in folder.rglob("*") if _suffix(file) in _READERS)
    files = sorted(file for file in below if not any(p.startswith(".") for p in file.parts))
    sets = _sets_by_card(folder, split) or _sets_by_name(files, split)
    if not sets:
        raise UserError(f'{folder}: no files for split "{split}" in it; expected {_known()}')
    if len(sets) > 1 and not several:
        lines = [f"`- {{path: {folder / place}, split: {name}}}`" for place, name in sets]
        more = f" and {len(lines) - SHOWN} more" if len(lines) > SHOWN else ""
        raise UserError(
            f'{folder}: {len(sets)} sets in it for split "{split}": list those to read in a file '
            f"of sources, DATA=mix.yaml, a line each, of {', '.join(lines[:SHOWN])}{more}"
        )
    return [folder / file for file in sorted(set(chain(*sets.values())))]


def _sets_by_card(folder: Path, split: str) -> Sets:
    """What a card of the Hub's, README.md, names for the split, its default if it has one.

    As `datasets` reads it; none without a card, or if that leaves it to the files' names.
    """
    card = folder / "README.md"
    try:
        header = re.match(r"---\s*\n(.*?\n)---", card.read_text(encoding="utf-8"), re.DOTALL)
        configs = MetadataConfigs.from_dataset_card_data(
            yaml.safe_load(header[1] if header else "{}")
        )
        default = configs.get_default_config_name()
        globs = [
            sanitize_patterns(configs[name].get("data_files", {})).get(split, [])
            for name in ([default] if default else configs)
        ]
    except (OSError, AttributeError, ValueError, yaml.YAMLError):  # none, or of another kind
        return {}
    sets: Sets = {}
    for some in globs:
        found = {file.relative_to(folder) for glob in some for file in folder.glob(glob)}
        if files := sorted(file for file in found if _suffix(file) in _READERS):
            place = files[0] if files[0].parent == Path() else files[0].parent
            sets[_named(files[0], split) or (place, split)] = files
    return sets


def _sets_by_name(files: list[Path], split: str) -> Sets:
    """Files named after the split, or in a folder that is; without such, all but other splits'.

    train_sft is one only where nothing is named train and no more.
    """
    sets: Sets = {}
    for file in files:
        if found := _named(file, re.escape(split)):
            sets.setdefault(found, []).append(file)
    if sets or split != "train":
        return {key: some for key, some in sets.items() if key[1] == split} or sets
    for file in files:
        if not _named(file, _HELD_OUT):
            shard = re.match(r"(.+)-\d{5}-of-\d{5}", file.name)  # the Hub's shards of a split
            sets.setdefault((Path(), shard[1] if shard else split), []).append(file)
    return sets


def _named(file: Path, split: str) -> tuple[Path, str] | None:
    """Where a file's set lies and what it is called, if it is named after the split.

    main/train-00000.parquet and main/train/0.jsonl: (main, "train"); c4-train.0.json: "c4-train".
    """
    for depth, part in enumerate(file.parts):
        if re.search(rf"(^|[-_.]){split}([-_.]|$)", part):
            name = part.removesuffix(".gz")
            name = name[: -len(_suffix(file))] if part == file.name else name
            return Path(*file.parts[:depth]), re.split(r"[-_.]\d", name)[0]
    return None


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


def _load_json(text: str) -> Any:
    """What the text holds.

    Raises:
        json.JSONDecodeError: nothing, or what is nested too deep, or a number too long to read.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        raise
    except (ValueError, RecursionError) as error:
        raise json.JSONDecodeError(str(error), text, 0) from None


def _read_jsonl(path: Path) -> NumberedRows:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield number, _load_json(line.rstrip("\n"))
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
                yield from enumerate(_load_json(first + file.read()), start=1)
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
