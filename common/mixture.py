"""Several sources of rows as one, by weight: `data` names a YAML file that lists them.

    - {path: alpaca.json}
    - {path: openai/gsm8k:main, weight: 0.5}
    - {path: faq.csv, weight: 3, columns: {prompt: frage, completion: antwort}}

A weight is how often an epoch shows each row of the source: 3 shows all three times, 0.5 a random
half. Rows that are held out are shown once. Paths are as in `data`: seen from where make is run.
"""

import dataclasses
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml
from datasets import Dataset, concatenate_datasets

from common.data import dataset_fingerprint, load_rows
from common.errors import UserError
from common.readers import may_be_on_hub


@dataclass(frozen=True)
class Source:
    """One source: what `common.data.load_rows` takes, and its weight."""

    path: str
    weight: float = 1.0
    columns: dict[str, str] | None = None
    split: str = "train"

    @property
    def name(self) -> str:
        """Its file's name without ending, or the Hub's without owner, fit for a figure's name."""
        stem = Path(self.path).name.split(".")[0]
        return "".join(sign if sign.isalnum() else "_" for sign in stem)

    def fingerprint(self) -> str:
        """sha256 of the file or folder (of a Hub set, its name), and what is read of it and how."""
        local = Path(self.path).expanduser().exists() or not may_be_on_hub(self.path)
        said = [dataset_fingerprint(self.path) if local else self.path]
        said += [self.split] if self.split != "train" else []
        said += [json.dumps(self.columns, sort_keys=True)] if self.columns else []
        return " ".join(said)


def read_mixture(path: str) -> list[Source]:
    """The sources that a YAML file lists.

    Raises:
        UserError: there is no such file, it is no such list, or an entry is wrong.
    """
    try:
        entries = yaml.safe_load(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: cannot be read ({reason}); check the file") from None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{path}: expected a list of sources, `- {{path: ..., weight: ...}}`")
    return [_source(entry, f"{path}, entry {i}") for i, entry in enumerate(entries, start=1)]


def _source(entry: object, where: str) -> Source:
    known = [field.name for field in dataclasses.fields(Source)]
    if not isinstance(entry, dict) or "path" not in entry or not set(entry) <= set(known):
        raise UserError(f"{where}: is {entry!r}; expected path, and of {', '.join(known[1:])} any")
    if not isinstance(entry["path"], str):
        raise UserError(f'{where}: "path" is {entry["path"]!r}; expected text')
    weight = entry.get("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not weight > 0:
        raise UserError(f'{where}: "weight" is {weight!r}; expected a number above 0')
    if not isinstance(entry.get("split", "train"), str):
        raise UserError(f'{where}: "split" is {entry["split"]!r}; expected text')
    if entry.get("columns") is not None and not is_mapping(entry["columns"]):
        raise UserError(f'{where}: "columns" is {entry["columns"]!r}; expected {{ours: theirs}}')
    return Source(**entry)


def is_mapping(columns: object) -> bool:
    """Whether `columns` says of our fields what the source calls them."""
    return isinstance(columns, dict) and all(
        isinstance(name, str) for pair in columns.items() for name in pair
    )


def load_mixed(
    sources: list[Source], format: str, skip: int = 0, keep: Sequence[str] = ()
) -> Dataset:
    """All rows of all sources, once each, with `source`, their source's index, and columns to keep.

    In each source as many as `skip` faulty rows are passed over.

    Rows that are learned from as they stand (messages, preferences) also have `where`.
    """
    parts = []
    for index, source in enumerate(sources):
        rows = load_rows(
            source.path,
            format=format,
            split=source.split,
            columns=source.columns,
            keep=keep,
            where=format in ("messages", "preference"),
            skip=skip,
        )
        parts.append(rows.add_column("source", [index] * len(rows)))
    return concatenate_datasets(parts)


def weigh(rows: Dataset, sources: list[Source]) -> Dataset:
    """Rows of `load_mixed`, each as often as its source's weight says, in random order."""
    dice = random.Random(0)
    places = []
    for place, index in enumerate(rows["source"]):
        times, rest = divmod(sources[index].weight, 1)
        places += [place] * (int(times) + (dice.random() < rest))
    dice.shuffle(places)
    if not places:
        raise UserError("the weights of the mixture leave no row; raise them")
    return rows.select(places)
