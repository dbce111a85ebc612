"""How long rows are in tokens, and what `max_length` takes from them, counted before training.

Fine-tuning cuts a sequence after `max_length` tokens, and drops a row of which no token of an
assistant is left; the reward model's trainer drops a pair whose longer sequence does not fit.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from jinja2 import TemplateError
from transformers import AutoConfig, PreTrainedTokenizerFast

from common.batches import BATCH, Chat, render
from common.errors import UserError
from common.generation import as_chat
from common.rows import Messages
from common.tokenizer import count_unknown, encode_texts

BAR = 40  # characters of the longest bar in a histogram


@dataclass(frozen=True)
class LengthReport:
    """What cutting every sequence after `max_length` tokens loses.

    A row of preferences has two sequences: its prompt with each answer.
    """

    max_length: int | None
    row_lengths: list[int]  # of each row's longest sequence
    tokens: int  # of all sequences, before the cut
    tokens_cut: int
    unanswered: int  # rows with a sequence of which no token of an assistant is left
    longest_row: str  # its file, row and field
    characters: int = 0  # of all that is said
    unknown: int = 0  # of these, such as the tokenizer never saw; it reads them all as one
    unknown_row: str = ""  # file, row and field that has most of them

    @property
    def rows(self) -> int:
        """How many there are."""
        return len(self.row_lengths)

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.row_lengths, default=0)

    @property
    def truncated(self) -> int:
        """Rows with a sequence that is cut."""
        limit = self.max_length
        return 0 if limit is None else sum(length > limit for length in self.row_lengths)

    def __str__(self) -> str:
        said = f"{self.rows:,} rows, {self.tokens:,} tokens, longest {self.longest:,}; "
        if self.max_length is None:
            said += "no max_length"
        else:
            said += (
                f"max_length {self.max_length:,} cuts {self.truncated:,} rows and "
                f"{self.tokens_cut:,} tokens, and leaves {self.unanswered:,} rows without any "
                "answer"
            )
        return f"{said}; {self._unknown()}" if self.unknown else said

    def _unknown(self) -> str:
        return (
            f"{self.unknown:,} of {self.characters:,} characters are unknown to the tokenizer and "
            "read as one"
        )

    def require_learnable(self, model: str | Path, max_lost_share: float) -> None:
        """Refuse rows of which `model` would learn too little.

        Raises:
            UserError: too many do not fit, one exceeds the context, or too much is unknown.
        """
        self.require_kept(max_lost_share)
        self.require_context(model)
        self.require_known(max_lost_share)

    def require_kept(self, max_lost_share: float) -> None:
        """Refuse to train on what is left of too few rows.

        Raises:
            UserError: more than `max_lost_share` of the rows do not fit into `max_length`, or
                none keeps an answer.
        """
        if self.truncated > max_lost_share * self.rows:
            raise UserError(
                f"{self.truncated:,} of {self.rows:,} rows are longer than max_length "
                f"({self.max_length:,} tokens), more than max_lost_share ({max_lost_share:g}); "
                f"the longest is {self.longest_row} with {self.longest:,}: "
                "raise max_length, shorten the rows, or allow it by --max_lost_share"
            )
        if self.rows and self.unanswered == self.rows:
            raise UserError(
                f"max_length ({self.max_length:,}) leaves none of {self.rows:,} rows a token of an "
                f"answer; the longest is {self.longest_row} with {self.longest:,}: raise it"
            )

    def require_context(self, model: str | Path) -> None:
        """Refuse rows longer than the model's context, in which it was never trained.

        Raises:
            UserError: what `max_length` leaves of the longest row exceeds the model's positions.
        """
        context = AutoConfig.from_pretrained(model).max_position_embeddings
        kept = self.longest if self.max_length is None else min(self.longest, self.max_length)
        if kept > context:
            raise UserError(
                f"{self.longest_row} gives {kept:,} tokens, and the model's context is "
                f"{context:,} (block_size in pretraining): set max_length to {context}"
            )

    def require_known(self, max_lost_share: float) -> None:
        """Refuse text that is made of other characters than the model's.

        Raises:
            UserError: the tokenizer never saw more than `max_lost_share` of the characters.
        """
        if self.unknown > max_lost_share * self.characters:
            raise UserError(
                f"{self._unknown()}, more than max_lost_share ({max_lost_share:g}), most of them "
                f"in {self.unknown_row}: pretrain on text that has them, or with a BPE, or allow "
                "it by --max_lost_share"
            )

    def histogram(self, bins: int = 8) -> str:
        """Rows by length, a line for each of at most `bins` equal ranges of tokens.

        A range that `max_length` cuts into is marked.
        """
        width = max(1, -(-self.longest // bins))
        counts = [0] * max(1, -(-self.longest // width))
        for length in self.row_lengths:
            counts[(max(length, 1) - 1) // width] += 1
        lines = []
        for place, count in enumerate(counts):
            first, last = place * width + 1, (place + 1) * width
            bar = "#" * (-(-count * BAR // max(1, *counts)))
            mark = "  > max_length" if self.max_length and last > self.max_length else ""
            lines.append(f"{first:>7,} -{last:>7,} tokens {count:>8,} {bar}{mark}")
        return "\n".join(lines)


def measure_lengths(
    dataset: Dataset, tokenizer: PreTrainedTokenizerFast, max_length: int | None
) -> LengthReport:
    """Tokenize rows of `common.data.load_rows` as training will, and count what would be cut.

    Raises:
        UserError: the chat template raises at a row, as it may at a system turn; a row says a
            special token, which the template passes on as one.
    """
    _require_plain(dataset, tokenizer)
    row_lengths: list[int] = []
    tokens = tokens_cut = unanswered = 0
    longest, field = 0, ""
    names = ("messages", "chosen", "rejected", "prompt")
    fields = [name for name in names if name in dataset.column_names]
    for sequences in _all_lengths(dataset, tokenizer):
        lengths = [length for length, _ in sequences]
        tokens += sum(lengths)
        if max_length is not None:
            tokens_cut += sum(max(0, length - max_length) for length in lengths)
            unanswered += any(start >= max_length for _, start in sequences)
        if max(lengths) > longest:
            longest = max(lengths)
            field = fields[lengths.index(longest)] if fields else "text"
            field = f'{name_row(dataset, len(row_lengths))}, "{field}"'
        row_lengths.append(max(lengths))
    characters, unknown = 0, Counter[str]()
    for place, name, message in _said(dataset):
        characters += len(message["content"])
        if count := count_unknown(tokenizer, [message["content"]]):
            unknown[f'{name_row(dataset, place)}, "{name}"'] += count
    return LengthReport(
        max_length=max_length,
        row_lengths=row_lengths,
        tokens=tokens,
        tokens_cut=tokens_cut,
        unanswered=unanswered,
        longest_row=field,
        characters=characters,
        unknown=unknown.total(),
        unknown_row=max(unknown, key=lambda row: unknown[row], default=""),
    )


def _said(rows: Dataset) -> Iterator[tuple[int, str, dict[str, str]]]:
    """Every message, with its row's place and field."""
    for place, row in enumerate(rows):
        for name in ("messages", "prompt", "chosen", "rejected"):
            yield from ((place, name, message) for message in row.get(name) or [])


def _require_plain(rows: Dataset, tokenizer: PreTrainedTokenizerFast) -> None:
    """Refuse what would speak for a role, or end an answer, by the token's name in a text."""
    names = [token for token in tokenizer.all_special_tokens if _is_passed_on(token, tokenizer)]
    special = re.compile("|".join(map(re.escape, names)))
    for place, field, message in _said(rows) if names else ():
        if found := special.search(message["content"]):
            raise UserError(
                f'{name_row(rows, place)}, "{field}": says {found[0]}, which the chat template '
                "passes on as that token: take it out of the text, or break it up in the template"
            )


def _is_passed_on(token: str, tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether a turn that says the token's name has that token among its ids."""
    turns = ([{"role": "user", "content": said}] for said in ("a", f"a{token}a"))
    plain, special = (render(tokenizer, [turn])[0] for turn in turns)
    place: Any = tokenizer.convert_tokens_to_ids(token)
    return special.count(place) > plain.count(place)


def keep_answerable(
    prompts: Dataset, tokenizer: PreTrainedTokenizerFast, model: str | Path, max_new_tokens: int
) -> Dataset:
    """The prompts that leave room for an answer in the model's context.

    Raises:
        UserError: none does.
    """
    context = AutoConfig.from_pretrained(model).max_position_embeddings
    kept = leave_room(prompts["prompt"], tokenizer, context, max_new_tokens)
    if not kept:
        raise UserError(
            f"none of {len(prompts):,} prompts leaves {max_new_tokens} tokens for an answer in the "
            f"model's context ({context:,}): shorten answers (max_completion_length) or prompts"
        )
    return prompts.select(kept)


def leave_room(
    questions: Iterable[str | Chat],
    tokenizer: PreTrainedTokenizerFast,
    context: int,
    max_new_tokens: int,
) -> list[int]:
    """Places of the questions that leave room for an answer in a context.

    Beyond it a model was never trained, and one with learned positions has none.
    """
    asked = Dataset.from_list([{"prompt": as_chat(question)} for question in questions])
    rows = enumerate(_all_lengths(asked, tokenizer))
    return [place for place, [(length, _)] in rows if length + max_new_tokens <= context]


def name_row(dataset: Dataset, index: int) -> str:
    """Where a row stands in its file, or its number, from 1."""
    return dataset[index]["where"] if "where" in dataset.column_names else f"row {index + 1}"


def _all_lengths(
    rows: Dataset, tokenizer: PreTrainedTokenizerFast
) -> Iterator[list[tuple[int, int]]]:
    """`_row_lengths`, batch by batch; a row that the chat template raises at is named."""
    for first in range(0, len(rows), BATCH):
        try:
            yield from _row_lengths(rows[first : first + BATCH], tokenizer)
        except TemplateError:
            for place in range(first, len(rows)):
                try:
                    list(_row_lengths(rows[place : place + 1], tokenizer))
                except TemplateError as error:
                    said = f"{name_row(rows, place)}: the chat template cannot render it ({error})"
                    raise UserError(f"{said}; change the row, or the template") from None


def _row_lengths(
    batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerFast
) -> Iterator[list[tuple[int, int]]]:
    """Per row and sequence: its tokens, and the index of the first one by an assistant.

    A bare prompt wants its first answer token just after its end; text is answer from the start.
    """
    if "text" in batch:
        yield from ([(len(ids), 0)] for ids in encode_texts(tokenizer, batch["text"]))
        return
    if "messages" in batch:
        turns = [[m["role"] for m in messages].index("assistant") for messages in batch["messages"]]
        opened = [messages[:i] for messages, i in zip(batch["messages"], turns, strict=True)]
        whole = [batch["messages"]]
    else:
        opened = batch["prompt"]
        answers = [batch[name] for name in ("chosen", "rejected") if name in batch]
        whole = [[p + a for p, a in zip(opened, some, strict=True)] for some in answers]
    starts = _chat_lengths(opened, tokenizer, add_generation_prompt=True)
    sequences = [_chat_lengths(chats, tokenizer) for chats in whole] or [starts]
    for start, *lengths in zip(starts, *sequences, strict=True):
        yield [(length, start) for length in lengths]


def _chat_lengths(
    chats: list[Messages],
    tokenizer: PreTrainedTokenizerFast,
    add_generation_prompt: bool = False,
) -> list[int]:
    texts = tokenizer.apply_chat_template(
        chats, tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
