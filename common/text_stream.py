"""Text too large to hold or to copy: row by row from files or the Hub, with a place to go on from.

for batch in stream_texts(sources):             # a megabyte or so of documents at a time
    ...
stream_texts(sources, after=batch.place)        # those that follow
"""

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from common.data import convert_rows, load_from_hub
from common.errors import UserError
from common.mixture import Source
from common.readers import NumberedRows, local_files, read_rows

BATCH_CHARS = 1 << 20
Place = dict[str, Any]  # as JSON keeps it


class TextBatch(NamedTuple):
    """Documents, the place behind the last of them, and the name of what they were read from."""

    texts: list[str]
    place: Place
    origin: str


def stream_texts(
    sources: list[Source],
    after: Place | None = None,
    batch_chars: int = BATCH_CHARS,
    skip: int = 0,
) -> Iterator[TextBatch]:
    """Every document of every source, once, in order; rows that are empty are left out.

    Args:
        sources: files, folders, or names on the Hub, which are downloaded as they are read.
        after: the `place` of a batch; what follows is cut into the same batches as it was then.
        batch_chars: a batch ends with the document that reaches so many.
        skip: so many wrong rows of a source, those before `after` included, are passed over, each
            named on stderr.

    Raises:
        UserError: nothing is there, more rows are wrong, or a weight is not 1.
    """
    for number, source in enumerate(sources):
        if source.weight != 1:
            raise UserError(f"{source.path}: streamed text is read once, weight must be 1")
        if after and number < after["source"]:
            continue
        begun = after if after and number == after["source"] else {}
        given = begun.get("place")
        files = local_files(source.path, source.split)
        rows = _HubRows(source, given) if files is None else _FileRows(files, given)
        faults = Told(begun.get("faults", [])) if skip else []
        texts, chars = [], 0
        for text in rows.texts(source.columns or {}, skip, faults):
            texts.append(text)
            chars += len(text)
            if chars >= batch_chars:
                yield TextBatch(texts, _place(number, rows, faults), rows.origin)
                texts, chars = [], 0
        if texts:
            yield TextBatch(texts, _place(number, rows, faults), rows.origin)


def _place(source: int, rows: "_FileRows | _HubRows", faults: list[str]) -> Place:
    known = {"faults": list(faults)} if faults else {}
    return {"source": source, "place": rows.place()} | known


class Told(list[str]):
    """Faults, each said as it is found: in a stream there is no end to say them at."""

    def append(self, fault: str) -> None:
        """Add it, and say so."""
        super().append(fault)
        print(f"faulty: {fault}", file=sys.stderr)


def fingerprint(sources: list[Source]) -> str:
    """Identifies streamed text without reading it: files by name, size and time, the Hub's by name.

    sha256, hex.
    """
    known: list[Any] = []
    for source in sources:
        files = local_files(source.path, source.split)
        known.append((source.path if files is None else "", source.split, source.columns))
        stats = [(str(file), file.stat()) for file in files or []]
        known += [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


class _FileRows:
    """Rows of local files, from the one after `place` on."""

    def __init__(self, files: list[Path], place: Place | None) -> None:
        self.files = files
        self.file: int = place["file"] if place else 0
        self.row: int = place["row"] if place else 0

    @property
    def origin(self) -> str:
        return f"{self.files[self.file].name} ({self.file + 1}/{len(self.files)})"

    def place(self) -> Place:
        return {"file": self.file, "row": self.row}

    def texts(self, columns: dict[str, str], skip: int, faults: list[str]) -> Iterator[str]:
        first, seen = self.file, self.row
        for number, path in enumerate(self.files[first:], start=first):
            self.file = number
            rows = self._numbered(path, seen if number == first else 0)
            named = str(path)
            for row in convert_rows(named, rows, "text", columns, skip=skip, faults=faults):
                yield row["text"]

    def _numbered(self, path: Path, seen: int) -> NumberedRows:
        for number, values in read_rows(path):
            if number > seen:
                self.row = number
                yield number, values


class _HubRows:
    """Rows of a data set on the Hub, downloaded as they are read, from `place` on."""

    def __init__(self, source: Source, place: Place | None) -> None:
        self.source = source
        self.rows = load_from_hub(source.path, source.split, streaming=True)
        self.count = 0
        if place:
            self.count = place["row"]
            self.rows.load_state_dict(place["state"])

    @property
    def origin(self) -> str:
        return f"{self.source.path}, row {self.count:,}"

    def place(self) -> Place:
        return {"row": self.count, "state": self.rows.state_dict()}

    def texts(self, columns: dict[str, str], skip: int, faults: list[str]) -> Iterator[str]:
        named, rows = self.source.path, self._numbered()
        for row in convert_rows(named, rows, "text", columns, skip=skip, faults=faults):
            yield row["text"]

    def _numbered(self) -> NumberedRows:
        try:
            for values in self.rows:
                self.count += 1
                yield self.count, values
        except Exception as error:  # the network, the Hub and its libraries raise all kinds
            reason = " ".join(str(error).split())[:200]
            raise UserError(
                f"{self.source.path}: the Hub broke off after row {self.count:,} ({reason}); "
                "the same command goes on from there"
            ) from error
