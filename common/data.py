"""Anyone's data, from a file, a folder or the Hub, as rows that a stage can train on.

    load_rows("faq.jsonl", format="messages", columns={"prompt": "q", "completion": "a"})
    load_rows("openai/gsm8k:main", format="messages")

Every row is checked (`common.rows` says against what) before anything is trained: the first wrong
one stops with its file, its number (counted from 1; in .jsonl the line), its field, what was found
and what was expected. Rows are read one by one and written to an Arrow file in the datasets cache,
so memory does not grow with the data (but for a .json file that is one array).
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
from datasets import Dataset, Features, Value

from common import readers, rows
from common.errors import UserError
from common.readers import NumberedRows, local_files, read_rows
from common.rows import SHAPES, BadRow, Row, find_shape

_MESSAGES = [{"role": Value("string"), "content": Value("string")}]
_FEATURES: dict[str, dict[str, Any]] = {
    "text": {"text": Value("large_string")},
    "messages": {"messages": _MESSAGES},
    "preference": {
        "prompt": _MESSAGES,
        "chosen": _MESSAGES,
        "rejected": _MESSAGES,
        "margin": Value("float64"),
        "kind": Value("string"),
    },
    "prompt": {"prompt": _MESSAGES},
}
_RANKED = _FEATURES["preference"] | {"flipped": Value("bool"), "where": Value("string")}

_CODE = (__file__, rows.__file__, readers.__file__)  # what makes a cached Arrow file stale

_NAMED: set[str] = set()  # what this process has said of rows that are left out

Sources = list[tuple[str, Callable[[], NumberedRows]]]


def load_rows(
    source: str,
    *,
    format: str,
    split: str = "train",
    columns: dict[str, str] | None = None,
    keep: Sequence[str] = (),
    where: bool = False,
    skip: int = 0,
    cache_dir: str | None = None,
) -> Dataset:
    """Load, check and convert every row of `source`.

    Args:
        source: a file (.txt .json .jsonl .csv, also .gz, or .parquet), a folder of such files, or
            a name on the Hub: `owner/name`, with `:config` where the data set has several.
        format: "text", "messages", "preference" or "prompt".
        split: of a Hub data set, or of a folder with files named after splits (train.jsonl).
        columns: our field -> their column; not needed for the shapes in `common.rows`.
        keep: further columns of the source to carry along, as text.
        where: add the column `where`, a row's file and number, e.g. "faq.jsonl, row 17".
        skip: so many wrong rows are passed over, each named on stderr; with more it stops.
        cache_dir: where the Arrow file goes; the datasets cache by default.

    Returns:
        A memory-mapped `Dataset` with the format's columns and `keep`. For "text" a .txt file is
        one row and rows that are empty are left out; for "preference" rows that rank nothing,
        counted on stderr.

    Raises:
        UserError: nothing is there, or a row is wrong.
    """
    columns = columns or {}
    _check_arguments(format, columns)
    files = local_files(source, split, several=format == "text")
    if files is None:
        hub = load_from_hub(source, split, cache_dir=cache_dir)
        identity: Any = hub._fingerprint
        sources: Sources = [(source, lambda: enumerate(hub, start=1))]
    else:
        stats = [(f, f.stat()) for f in files]  # a row says by which name its file was given
        identity = [(str(f), str(f.resolve()), s.st_size, s.st_mtime_ns) for f, s in stats]
        sources = [(str(file), partial(read_rows, file)) for file in files]
    code = [hashlib.sha256(Path(f).read_bytes()).hexdigest() for f in _CODE]
    key = json.dumps([identity, format, columns, list(keep), where, skip, code], sort_keys=True)
    convert = partial(_convert, sources, format, columns, keep, where, skip)
    told = key in _NAMED  # also where the rows come from the cache
    if skip and not told:
        for fault in (faults := _find_faults(convert)):
            print(f"skipped: {fault}", file=sys.stderr)
        print(f"{source}: {len(faults)} faulty rows skipped", file=sys.stderr)
    _NAMED.add(key)
    added = [*keep, *(["where"] if where else [])]
    try:
        found = Dataset.from_generator(
            lambda: convert([]),
            features=Features(_FEATURES[format] | {name: Value("string") for name in added}),
            cache_dir=cache_dir,
            fingerprint=hashlib.sha256(key.encode()).hexdigest()[:32],
            # A row of .txt may be a whole book: few at a time, or memory grows.
            writer_batch_size=8 if any(".txt" in f.name.lower() for f in files or []) else None,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    return _ranking(source, found, told) if format == "preference" else found


def _ranking(source: str, rows: Dataset, told: bool) -> Dataset:
    """The rows that set one answer above another; how many do not is said unless it was `told`."""
    ranks = rows.data.column("chosen").is_valid().to_pylist()
    ties = ranks.count(False)
    if ties == len(ranks):
        raise UserError(
            f"{source}: of each of {ties:,} rows all answers have the same score, so that nothing "
            "is ranked; give different scores"
        )
    if not ties:
        return rows
    if not told:
        print(
            f"{source}: {ties:,} rows left out, all of whose answers have the same score",
            file=sys.stderr,
        )
    return rows.select([place for place, rank in enumerate(ranks) if rank])


def _check_arguments(format: str, columns: dict[str, str]) -> None:
    if format not in SHAPES:
        raise UserError(f'format "{format}" is unknown; must be one of {", ".join(SHAPES)}')
    fields = {field for shape in SHAPES[format] for field in (*shape.fields, *shape.optional)}
    for name in columns:
        if name not in fields:
            raise UserError(
                f'columns: "{name}" is no field of format "{format}"; '
                f"must be one of {', '.join(sorted(fields))} (our field: their column)"
            )


def _convert(
    sources: Sources,
    format: str,
    columns: dict[str, str],
    keep: Sequence[str],
    where: bool,
    skip: int,
    faults: list[str],
) -> Iterator[dict[str, Any]]:
    """Rows as `load_rows` gives them; faulty ones that may be skipped are added to `faults`."""
    for source, read in sources:
        empty, before = True, len(faults)
        for row in convert_rows(
            source, read(), format, columns, keep=keep, where=where, skip=skip, faults=faults
        ):
            empty = False
            yield row
        if empty:
            faulty = f"{len(faults) - before} faulty rows and no others"
            said = faulty if len(faults) > before else "no rows in it, or only empty ones"
            raise UserError(f"{source}: {said}; give a file with rows")


def convert_rows(
    source: str,
    numbered: NumberedRows,
    format: str,
    columns: dict[str, str],
    *,
    keep: Sequence[str] = (),
    where: bool = False,
    skip: int = 0,
    faults: list[str] | None = None,
) -> Iterator[dict[str, Any]]:
    """A source's rows, checked and converted one by one; arguments as in `load_rows`.

    Of faulty rows the first `skip` are left out and named in `faults`.

    Raises:
        UserError: a row is wrong; names `source` and the row's number.
    """
    shape = None
    faults = [] if faults is None else faults
    for number, values in numbered:
        try:
            if isinstance(values, BadRow):
                raise values
            if not isinstance(values, dict):
                raise BadRow(f"is a {type(values).__name__}; expected an object with columns")
            shape = shape or find_shape(format, values, columns)
            row = Row(values, columns, f"{shape} (text)")
            kept = {name: str(Row(values, {}, "text").get(name)) for name in keep}
            if where:
                kept["where"] = f"{source}, row {number}"
            if format != "text" or not row.is_blank("text"):
                found = shape.convert(row)
                yield from (r | kept for r in (found if isinstance(found, list) else [found]))
        except BadRow as error:
            faults.append(f"{source}, row {number}: {error}")
            if len(faults) > skip:
                many = f"; that is more than skip_faulty_rows ({skip}) allows" if skip else ""
                raise UserError(faults[-1] + many) from None


def _find_faults(convert: Callable[[list[str]], Iterator[Any]]) -> list[str]:
    """All that is wrong with the rows, one line each."""
    faults: list[str] = []
    for _ in convert(faults):
        pass
    return faults


def load_ranked(path: Path) -> Dataset:
    """Pairs as the reward stage keeps them, a line of JSON each, memory-mapped.

    `Dataset.from_json` guesses types: of answers that are all dates it makes points in time.
    """

    def pairs() -> Iterator[dict[str, Any]]:
        with path.open(encoding="utf-8") as file:
            yield from map(json.loads, file)

    return Dataset.from_generator(
        pairs,
        features=Features({name: _RANKED[name] for name in next(pairs())}),
        fingerprint=dataset_fingerprint(path)[:32],
    )


def load_from_hub(source: str, split: str, **options: Any) -> Any:
    """A data set of the Hub as it is; `options` (`streaming`, `cache_dir`) are `load_dataset`'s.

    Raises:
        UserError: the Hub does not give it.
    """
    name, _, config = source.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split, **options)
    except Exception as error:  # the network, the Hub and its libraries raise all kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{source}, split {split}: no such file here, and the Hub does not give it ({reason}); "
            "check name, config (owner/name:config), split and network, or give a local file"
        ) from error


def holdout(
    dataset: Dataset, fraction: float, seed: int, name: str = "the data"
) -> tuple[Dataset, Dataset]:
    """Set about `fraction` of the prompts aside: no prompt stands in both parts, in text no row.

    A prompt's own hash decides, not the rows beside it: one that a stage holds out is held out in
    every other, whatever else they read. Conversations that open alike are one prompt, or one's
    last answer would stand in the middle of another.

    Args:
        dataset: rows with `text`, `messages` or `prompt`.
        fraction: of the prompts.
        seed: other parts for another.
        name: what an error calls the data.

    Returns:
        train and evaluation rows, each in the old order; the same seed gives the same parts. Of few
        prompts one at least is left to train on and two, if there are three, are set aside; which
        two depends on all of them.

    Raises:
        UserError: the fraction is none, or there are fewer than two prompts.
    """
    require_two_parts(fraction)
    places = [place_of(f"{seed} {opening(row)}") for row in dataset]
    ordered = sorted(set(places))
    if len(ordered) < 2:
        raise UserError(
            f"{name} has one prompt in {len(places):,} rows: at least 2 are needed, to part them"
        )
    limit = min(max(fraction, ordered[1]), ordered[-2])
    train = [index for index, place in enumerate(places) if place > limit]
    held = [index for index, place in enumerate(places) if place <= limit]
    return dataset.select(train), dataset.select(held)


def opening(row: dict[str, Any]) -> str:
    """What a row asks first: its first user turn, after the system turn if there is one.

    Case and spaces make no difference.
    """
    if "text" in row:
        return str(row["text"])
    messages = row["messages"] if "messages" in row else row["prompt"]
    first = [message["role"] for message in messages].index("user")
    asked = " ".join(message["content"] for message in messages[: first + 1])
    return " ".join(asked.casefold().split())


def require_two_parts(fraction: float) -> None:
    """Refuse a `validation_fraction` that leaves one part empty.

    Raises:
        UserError: it is not between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise UserError(f"validation_fraction ({fraction:g}) must be between 0 and 1")


def place_of(text: str) -> float:
    """From 0 to 1, as by dice, and the same for the same text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64


def dataset_fingerprint(source: str | Path) -> str:
    """sha256, hex, of the content: a file's bytes, a folder's names and bytes.

    Raises:
        UserError: there is no such file or folder.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise UserError(f"{source}: no such file or folder; check the path")
    if path.is_dir():
        digest = hashlib.sha256()
        for file in sorted(file for file in path.rglob("*") if file.is_file()):
            digest.update(f"{file.relative_to(path)} {dataset_fingerprint(file)}\n".encode())
        return digest.hexdigest()
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
