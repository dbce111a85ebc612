"""What the stages train on and are measured by: Arden, plays, or the reader's own files.

Each kind of data is a class with the methods that the stages call; `load_task` picks it by name.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from datasets import Dataset

from common import plays
from common.arden.task import ArdenTask
from common.arden.world import PEOPLE
from common.data import dataset_fingerprint, holdout, load_rows, require_two_parts
from common.errors import UserError
from common.mixture import Source, is_mapping, load_mixed, read_mixture, weigh
from common.rows import assistant

Answer = Callable[[list[str]], list[str]]
Sample = Callable[[list[str]], list[list[str]]]
HELD_OUT_SHARE = 0.1  # of a reader's own prompts: half to choose by (dev), half for test
# Names that a reward function gets other things by, or TRL leaves out
TAKEN = {"prompt", "prompts", "prompt_ids", "completion", "completions", "completion_ids"}
TAKEN |= {"source", "trainer_state", "log_extra", "log_metric"}
SHOWN_CHARS = 500  # of a prompt in samples.md
# Of the plays' training dialogues. The others are for ranking and PPO: a reply that the model was
# tuned on is likelier to it than one of its own, and one that it never read is not.
TUNED_SHARE = 0.6


class Task(Protocol):
    """What a stage asks of its data."""

    documents_apart: bool  # texts are documents of their own, not pieces of one stream

    def fingerprint(self) -> str:
        """Identifies the content."""

    def texts(self, split: str) -> Iterator[str]:
        """Text to pretrain on: `train` or `validation`."""

    def tokenizer_texts(self) -> Iterator[str]:
        """Text to train a tokenizer on."""

    def text_figures(self) -> dict[str, float]:
        """What is known of the text beforehand, for the summary."""

    def conversations(self, split: str) -> Dataset:
        """`messages` rows for fine-tuning."""

    def rankings(self, sample: Sample, split: str, count: int, noise: float) -> Dataset:
        """`prompt`, `chosen`, `rejected` rows; `kind` and `flipped` where they are known."""

    def prompt_rows(self, split: str, count: int) -> Dataset:
        """`prompt` rows for PPO."""

    def measure(
        self, answer: Answer, use: str = "test", limit: int | None = None
    ) -> dict[str, float]:
        """Figures of a model that answers questions, at most `limit` of each kind."""

    def sample_questions(self) -> list[str]:
        """A few questions for `samples.md`."""


def load_task(
    data: str,
    *,
    realm_seed: int = 1,
    realm_people: int = PEOPLE,
    documents: int = 0,
    **options: Any,
) -> Task:
    """`arden`, `shakespeare`, or a file, folder or Hub name of one's own, or a mixture of them.

    Args:
        data: the name; a file in play form counts as plays where `plays=True`, a .yaml file as a
            mixture (`common.mixture`).
        realm_seed, realm_people: for Arden.
        documents: for Arden, the chronicle's length.
        options: `plays`, `columns`, `validation_fraction`, `skip_faulty_rows`, `keep` (columns that
            prompts carry along), of which each kind takes its own.
    """
    require_data(data, options.get("columns"))
    keep, skip = options.get("keep", ()), options.get("skip_faulty_rows", 0)
    share = options.get("validation_fraction", HELD_OUT_SHARE)
    of_rows = {
        "keep_columns": keep,
        "columns": options.get("columns"),
        "validation_fraction": share != HELD_OUT_SHARE,
        "skip_faulty_rows": skip,
    }
    given = ", ".join(name for name, value in of_rows.items() if value)
    if given and (data in ("arden", "shakespeare") or options.get("plays")):
        raise UserError(f"{given}: of one's own rows, {data} has none; leave it out")
    if taken := TAKEN & set(keep):
        raise UserError(f"keep_columns ({', '.join(sorted(taken))}): the name is taken")
    if data == "arden":
        return ArdenTask(realm_seed, documents, realm_people)
    if data == "shakespeare" or options.get("plays"):
        return PlaysTask(None if data == "shakespeare" else data)
    if data.endswith((".yaml", ".yml")):
        if options.get("columns"):
            raise UserError(f"columns: each source of {data} has its own; give them there")
        sources = read_mixture(data)
    else:
        sources = [Source(data, columns=options.get("columns"))]
    return FileTask(sources, share, skip, keep)


def open_task(config: Any) -> Task:
    """The data that a stage's configuration names."""
    return load_task(
        config.data,
        realm_seed=config.realm_seed,
        realm_people=config.realm_people,
        documents=getattr(config, "documents", 0),  # pretraining's alone
        plays=config.plays,
        columns=config.columns,
        validation_fraction=config.validation_fraction,
        skip_faulty_rows=config.skip_faulty_rows,
        keep=getattr(config, "keep_columns", ()),  # alignment's alone
    )


def require_data(data: Any, columns: Any) -> None:
    """Refuse what YAML may hold and is no name, or no mapping of columns.

    Raises:
        UserError: says which, and what stands for several sources; none was given.
    """
    if not isinstance(data, str):
        raise UserError(
            f"data ({data!r}) must be one file, folder or name; several are listed in a file of "
            "their own, data: mix.yaml, with a line `- {path: a.jsonl}` each"
        )
    if data.startswith("set "):
        raise UserError("no data given: make ... DATA=path, or --data path")
    if columns is not None and not is_mapping(columns):
        raise UserError(
            f"columns ({columns!r}) must map our field to the data's column, e.g. "
            "{prompt: question}"
        )


class PlaysTask:
    """A text in play form: pretraining on the text, dialogue from it for the other stages."""

    documents_apart = False
    max_chars = 200  # of a speech, so that pairs fit the lesson's short contexts

    def __init__(self, path: str | None) -> None:
        self.path = plays.find_shakespeare(path)
        try:
            text = self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.path}: not UTF-8 at byte {error.start:,}; save it as UTF-8"
            ) from None
        self.parts = dict(zip(("train", "validation"), plays.split_text(text), strict=True))
        self.words = set(re.findall(r"[a-z']+", text.lower()))

    def fingerprint(self) -> str:
        """sha256 of the text."""
        return dataset_fingerprint(str(self.path))

    def texts(self, split: str) -> Iterator[str]:
        """The first 90% of the characters, or the last 10%."""
        yield self.parts[split]

    def tokenizer_texts(self) -> Iterator[str]:
        """The training part and the validation part: every character gets a token."""
        yield from self.parts.values()

    def text_figures(self) -> dict[str, float]:
        """Nothing is known of a poet's entropy."""
        return {}

    def conversations(self, split: str) -> Dataset:
        """A speech, and the reply that follows it."""
        return Dataset.from_list(self._pairs("sft" if split == "train" else split))

    def rankings(self, sample: Sample, split: str, count: int, noise: float) -> Dataset:
        """The true reply over a reply from elsewhere, and over the model's own."""
        pairs = self._pairs("align" if split == "train" else split)
        rows = plays.false_replies(pairs, seed=0)[:count]
        if not rows:
            raise UserError(
                f"{self.path}: no reply of {len(pairs)} ({split}) has another of like length, "
                f"{plays.FAR} or more away, to be ranked above: give a longer text"
            )
        rows = [{**row, "kind": "true_elsewhere", "flipped": False} for row in rows]
        drawn = sample([row["prompt"][-1]["content"] for row in rows])
        own = [
            {**row, "rejected": [assistant(answer)], "kind": "true_model"}
            for row, answers in zip(rows, drawn, strict=True)
            for answer in answers[:1]
            if answer != row["chosen"][-1]["content"]
        ]
        return Dataset.from_list(rows + own)

    def prompt_rows(self, split: str, count: int) -> Dataset:
        """Speeches to reply to."""
        pairs = self._pairs("align" if split == "train" else split)
        random.Random(0).shuffle(pairs)
        return Dataset.from_list([{"prompt": row["messages"][:-1]} for row in pairs[:count]])

    def measure(
        self, answer: Answer, use: str = "test", limit: int | None = None
    ) -> dict[str, float]:
        """Share of words that occur in the plays, of lines said twice, and words a reply."""
        pairs = self._pairs(use)[:200][:limit]
        asked = [row["messages"][-2]["content"] for row in pairs]
        replies = answer(asked)
        words = [word for reply in replies for word in re.findall(r"[a-z']+", reply.lower())]
        lines = [line for reply in replies for line in reply.splitlines() if line]
        return {
            "real_words": sum(word in self.words for word in words) / max(1, len(words)),
            "repeated_lines": 1 - len(set(lines)) / max(1, len(lines)),
            "words": len(words) / len(replies),
        }

    def sample_questions(self) -> list[str]:
        """Speeches of the validation part."""
        return [row["messages"][-2]["content"] for row in self._pairs("validation")[:8]]

    def _pairs(self, use: str) -> list[dict[str, Any]]:
        """Dialogue for `sft`, for `align` (ranking and PPO), or held out: `dev` the first half of
        the validation part, `test` the second, `validation` both.

        Raises:
            UserError: a half is empty.
        """
        part, share = ("train", TUNED_SHARE) if use in ("sft", "align") else ("validation", 0.5)
        pairs = plays.dialogue_pairs(plays.parse_plays(self.parts[part]), self.max_chars)
        if len(pairs) < 2:
            raise UserError(
                f"{self.path}: {len(pairs)} speeches with a reply in its part for {part}, of at "
                f"most {self.max_chars} characters each; at least 2 are needed: give a longer text "
                "in play form"
            )
        cut = round(share * len(pairs))
        ends = {"sft": pairs[:cut], "align": pairs[cut:], "dev": pairs[:cut], "test": pairs[cut:]}
        return ends.get(use, pairs)


class FileTask:
    """One's own rows, in the formats of `common.data`; a share of them is held out.

    Of several sources the rows are mixed; a prompt that is held out is so in all of them. Of what
    is held out, `dev` is the half that a run may choose by and `test` the other.
    """

    def __init__(
        self,
        sources: list[Source],
        validation_fraction: float,
        skip: int = 0,
        keep: Sequence[str] = (),
    ) -> None:
        self.sources, self.share, self.skip, self.keep = sources, validation_fraction, skip, keep
        self.weighed = len(sources) > 1 or sources[0].weight != 1
        name = sources[0].path.lower().removesuffix(".gz")
        one_text = len(sources) == 1 and name.endswith(".txt")
        if one_text and self.weighed:
            raise UserError(f"{sources[0].path}: a single text is read once, weight must be 1")
        self.documents_apart = not one_text

    def fingerprint(self) -> str:
        """sha256 of the file or folder; of a Hub set, its name; of a mixture, all of it."""
        if not self.weighed:
            return self.sources[0].fingerprint()
        return ", ".join(f"{s.weight:g} x {s.fingerprint()}" for s in self.sources)

    def texts(self, split: str) -> Iterator[str]:
        """The `text` column; of a plain text file, which is one stream, the part before the end.

        Raises:
            UserError: a part would be empty.
        """
        if self.documents_apart:
            yield from self._rows("text", split)["text"]
            return
        require_two_parts(self.share)
        pieces = load_rows(self.sources[0].path, format="text")["text"]
        left = round((1 - self.share) * sum(len(piece) for piece in pieces))
        for piece in pieces:
            part = piece[:left] if split == "train" else piece[left:]
            left = max(0, left - len(piece))
            if part:
                yield part

    def tokenizer_texts(self) -> Iterator[str]:
        """The training part."""
        return self.texts("train")

    def text_figures(self) -> dict[str, float]:
        """Nothing is known beforehand."""
        return {}

    def conversations(self, split: str) -> Dataset:
        """`messages` rows, and `where` each stands."""
        return self._rows("messages", split)

    def rankings(self, sample: Sample, split: str, count: int, noise: float) -> Dataset:
        """The sources' own pairs, and `where` each stands; without a `kind` the source's name."""
        rows = self._rows("preference", split)
        names = [source.name for source in self.sources] if len(self.sources) > 1 else ["given"]
        names = [f"{n}_{i}" if names.count(n) > 1 else n for i, n in enumerate(names, start=1)]
        places = rows["source"]
        kinds = [kind or names[place] for kind, place in zip(rows["kind"], places, strict=True)]
        given = rows.remove_columns(["source", "kind"])
        if None in rows["margin"]:
            given = given.remove_columns("margin")
        return given.add_column("kind", kinds).add_column("flipped", [False] * len(rows))

    def prompt_rows(self, split: str, count: int) -> Dataset:
        """The prompts of the file, whatever its format, and the columns to keep."""
        rows = self._rows("prompt", split).select_columns(["prompt", *self.keep])
        return rows if count >= len(rows) else rows.shuffle(seed=0).select(range(count))

    def measure(
        self, answer: Answer, use: str = "test", limit: int | None = None
    ) -> dict[str, float]:
        """Only a reader knows what is right here."""
        return {}

    def sample_questions(self) -> list[str]:
        """The first few held-out prompts that are short enough to print."""
        rows = self._rows("prompt", "validation").select_columns(["prompt"])
        asked = (row["prompt"][-1]["content"] for row in rows)
        short = list(islice((text for text in asked if len(text) <= SHOWN_CHARS), 8))
        return short or [rows[0]["prompt"][-1]["content"]]

    def _rows(self, format: str, split: str) -> Dataset:
        keep = self.keep if format == "prompt" else ()
        rows = load_mixed(self.sources, format, self.skip, keep)
        name = self.sources[0].path
        train, validation = holdout(rows, self.share, seed=0, name=name)
        if split in ("train", "align"):
            return weigh(train, self.sources) if self.weighed else train
        if split == "validation":
            return validation
        held = f"what validation_fraction ({self.share:g}) holds out of {name}"
        test, dev = holdout(validation, 0.5, seed=1, name=held)
        return dev if split == "dev" else test
