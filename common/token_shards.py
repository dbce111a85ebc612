"""Streamed text tokenized once, into shards of token files that a killed run goes on with.

    <folder>/index.json          which text by which tokenizer; the shards so far, and the place in
                                 the text behind each
    <folder>/train-00000.bin     a token file (`common.token_file`) with its info beside it, and
    <folder>/validation-00000.bin    what was held out of the same stretch of text

A shard counts once it stands in the index, which is replaced as a whole after the shard's files
are in their places: at any moment a run can be killed, and the same call goes on behind the last
shard. One thread reads while another tokenizes, on all cores (`tokenizers` splits a batch among
its own); nothing grows with the text but the list of shards.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerFast

from common.artifacts import read_json, write_json
from common.data import place_of
from common.errors import UserError
from common.text_stream import TextBatch
from common.token_file import Encoded, TokenFile, TokenWriter, encode_parts

SHARD_TOKENS = 1 << 24  # 34 MB at 2 bytes a token; what a kill can cost, half a minute of a core
AHEAD = 2  # batches that wait for the tokenizer
SPLITS = ("train", "validation")


class ShardIndex:
    """`index.json`, read and written whole.

    Args:
        folder: where it stands, or will.
        identity: what the tokens are made of, plain values by name.

    Raises:
        UserError: there is one of something else.
    """

    def __init__(self, folder: str | Path, identity: dict[str, Any]) -> None:
        self.path = Path(folder) / "index.json"
        content = read_json(self.path)
        self.exists = content is not None
        self.content = content or {"identity": identity, "complete": False, "shards": []}
        for name, value in identity.items():
            if self.content["identity"].get(name) != value:
                raise UserError(
                    f"{folder} holds tokens of {name} {self.content['identity'].get(name)} "
                    f"(now {value}): give another --shards_dir, or delete it"
                )

    @property
    def complete(self) -> bool:
        """Whether the whole text is there."""
        return self.content["complete"]

    @property
    def shards(self) -> list[dict[str, Any]]:
        """Of each shard the `place` behind it, its text's `bytes`, and tokens by split."""
        return self.content["shards"]

    def write(self, *, complete: bool = False) -> None:
        """Put it on disk."""
        self.content["complete"] = complete
        write_json(self.path, self.content)
        self.exists = True


def write_token_shards(
    batches: Iterable[TextBatch],
    tokenizer: PreTrainedTokenizerFast,
    index: ShardIndex,
    *,
    validation_fraction: float,
    max_bytes: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Tokenize what follows the index's last shard, with progress on stderr.

    Every document is wrapped in bos and eos. Which ones are held out depends on their text alone,
    so equal documents are on one side.

    Args:
        batches: the text behind the last shard's place.
        tokenizer: of every shard.
        index: is added to, and completed.
        validation_fraction: share of the documents to hold out.
        max_bytes: stop when so much of the text, from its start, is done; None: read all.
        shard_tokens: a shard ends with the batch in which it has so many to train on.

    Raises:
        UserError: there is no text to train on, or none to hold out.
    """
    folder = index.path.parent
    for scratch in folder.glob(".*.[0-9]*"):  # of a killed run
        scratch.unlink()
    done = sum(shard["bytes"] for shard in index.shards)
    progress = tqdm(unit="B", unit_scale=True, initial=done, desc="tokenize", mininterval=1.0)
    encoded = _encode_ahead(batches, tokenizer, validation_fraction)
    more = max_bytes is None or done < max_bytes
    while more:
        number = len(index.shards)
        train, validation = (
            TokenWriter(folder / f"{split}-{number:05d}.bin", tokenizer) for split in SPLITS
        )
        with train, validation:
            place, more = None, False
            for batch, parts in encoded:
                for writer, part in zip((train, validation), parts, strict=True):
                    for piece in part:
                        writer.add(piece)
                        done += piece.bytes
                place = batch.place
                shown = f"shard {number}, {train.tokens:,} tokens, {batch.origin}"
                progress.set_postfix_str(shown, refresh=False)
                progress.update(done - progress.n)
                if train.tokens >= shard_tokens or (max_bytes and done >= max_bytes):
                    more = max_bytes is None or done < max_bytes
                    break
            if place is not None:
                index.shards.append(_close(place, train, validation))
                index.write()
    progress.close()
    for split in SPLITS:
        if not any(shard[split] for shard in index.shards):
            raise UserError(
                f"{folder}: no document of the text is for {split} at validation_fraction "
                f"({validation_fraction:g}); change it, or give more text"
            )
    index.write(complete=True)


def open_token_shards(folder: str | Path, split: str) -> TokenFile:
    """The tokens of `train` or `validation`, all shards as one.

    Raises:
        UserError: the text is not tokenized, or not to its end.
    """
    content = read_json(Path(folder) / "index.json")
    if content is None or not content["complete"]:
        raise UserError(f"{folder}: no complete token shards there; prepare the data first")
    numbers = [number for number, shard in enumerate(content["shards"]) if shard[split]]
    return TokenFile(*(Path(folder) / f"{split}-{number:05d}.bin" for number in numbers))


def is_held_out(text: str, fraction: float) -> bool:
    """Whether a document is among the `fraction` that is held out: by its hash, as by dice."""
    return place_of(text) < fraction


def _close(place: dict[str, Any], train: TokenWriter, validation: TokenWriter) -> dict[str, Any]:
    """Put a shard's files into their places; its line in the index. No file is empty."""
    line: dict[str, Any] = {"place": place, "bytes": train.bytes + validation.bytes}
    for split, writer in zip(SPLITS, (train, validation), strict=True):
        line[split] = writer.close().tokens if writer.tokens else 0
    return line


Split = tuple[list[Encoded], list[Encoded]]  # to train on, held out


def _encode_ahead(
    batches: Iterable[TextBatch], tokenizer: PreTrainedTokenizerFast, fraction: float
) -> Iterator[tuple[TextBatch, Split]]:
    """Batches with their ids, in order; the next ones are read while one is tokenized."""

    def encode(texts: list[str]) -> Split:
        held = [is_held_out(text, fraction) for text in texts]
        train, validation = (
            [text for text, out in zip(texts, held, strict=True) if out is side]
            for side in (False, True)
        )
        return (
            list(encode_parts(train, tokenizer, documents=True)),
            list(encode_parts(validation, tokenizer, documents=True)),
        )

    # One thread: a tokenizer's settings are for one call at a time, and it uses all cores itself.
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: deque[tuple[TextBatch, Future[Split]]] = deque()
        for batch in batches:
            waiting.append((batch, pool.submit(encode, batch.texts)))
            if len(waiting) > AHEAD:
                done, future = waiting.popleft()
                yield done, future.result()
        while waiting:
            done, future = waiting.popleft()
            yield done, future.result()
