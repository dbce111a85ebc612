"""Text as one flat file of token ids, read by memory map, and what it was made of beside it.

    data.bin        little-endian uint16 (uint32 past 65,536 tokens), no header
    data.bin.json   `TokenFileInfo`

Bytes of the text are counted because bits per byte, unlike loss per token, compares tokenizers.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from common.artifacts import read_json, write_json
from common.errors import UserError
from common.tokenizer import encode_texts, hash_tokenizer

PIECE_CHARS = 1 << 16  # the longest text given to the tokenizer at once, where it can be cut
BATCH_CHARS = 1 << 20  # tokenized together: what bounds memory
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])|(?<=\S\n)(?=[^\W\d_])")


@dataclass(frozen=True)
class TokenFileInfo:
    """What a token file holds; `sha256` is that of the `.bin`, `bytes` those of the text."""

    tokens: int
    bytes: int
    documents: int
    unknown: int
    dtype: str
    tokenizer: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens of {self.bytes:,} bytes, {self.unknown:,} unknown"


class TokenFile:
    """A token file opened for reading, or several as one, in the order given.

    Attributes:
        paths: the files.
        tokens: (N,) memory map, uint16 or uint32; `JoinedTokens` of several files.
        info: `TokenFileInfo`; of several, sums, and each tokenizer once.

    Raises:
        UserError: one is missing, or not the size that was written.
    """

    def __init__(self, *paths: str | Path) -> None:
        self.paths = [Path(path) for path in paths]
        infos, parts = zip(*map(_open, self.paths), strict=True)
        self.info: TokenFileInfo = infos[0]
        self.tokens: np.memmap | JoinedTokens = parts[0]
        if len(paths) > 1:
            self.info = _sum_infos(infos)
            self.tokens = JoinedTokens(parts)

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, starts: Iterable[int], block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Cut B blocks of T tokens, and the same blocks one token later.

        With tokens 5 6 7 8, `batch([1], 2)` is ([[6, 7]], [[7, 8]]).

        Args:
            starts: B indices, each from 0 to N - T - 1.
            block_size: T.

        Returns:
            inputs and targets, (B, T) int64.

        Raises:
            ValueError: a block would leave the file.
        """
        index = np.asarray(list(starts), dtype=np.int64)
        if index.min() < 0 or index.max() + block_size >= len(self):
            raise ValueError(f"starts must lie in [0, {len(self) - block_size}), got {index}")
        rows = self.tokens[index[:, None] + np.arange(block_size + 1)]  # (B, T + 1)
        both = torch.from_numpy(rows.astype(np.int64))
        return both[:, :-1].contiguous(), both[:, 1:].contiguous()

    def by_file(self, places: np.ndarray) -> Iterator[tuple[Self, np.ndarray]]:
        """The files in which `places`, (n,) int64, lie, each with those of them, counted in it."""
        past = 0
        for path in self.paths:
            file = type(self)(path)
            inside = (places >= past) & (places < past + len(file))
            if inside.any():
                yield file, places[inside] - past
            past += len(file)


class JoinedTokens:
    """Memory maps read as one array: by slices, and by arrays of indices of any shape."""

    def __init__(self, parts: Sequence[np.memmap]) -> None:
        self.parts = parts
        self.ends = np.cumsum([len(part) for part in parts])  # each part's first index past it

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: slice | np.ndarray) -> np.ndarray:
        """The tokens at `index`, in its shape."""
        if isinstance(index, slice):
            start, end, step = index.indices(len(self))
            if step == 1:
                return self._between(start, end)
            index = np.arange(start, end, step)
        place = np.searchsorted(self.ends, index, side="right")
        found = np.empty(index.shape, dtype=self.parts[0].dtype)
        for number in np.unique(place):
            here, part = place == number, self.parts[number]
            found[here] = part[index[here] - (self.ends[number] - len(part))]
        return found

    def _between(self, start: int, end: int) -> np.ndarray:
        """A copy of the tokens from `start` to `end`, read part by part."""
        pieces = [self.parts[0][:0]]
        for number in range(int(np.searchsorted(self.ends, start, side="right")), len(self.parts)):
            part, past = self.parts[number], int(self.ends[number])
            first = past - len(part)
            if first >= end:
                break
            pieces.append(part[max(start, first) - first : min(end, past) - first])
        return np.concatenate(pieces)


def _open(path: Path) -> tuple[TokenFileInfo, np.memmap]:
    values = read_json(_info_path(path))
    if values is None or not path.exists():
        raise UserError(f"{path}: no token file there: `make pretrain` writes it")
    info = TokenFileInfo(**values)
    dtype = np.dtype(info.dtype)
    if path.stat().st_size != info.tokens * dtype.itemsize:
        raise UserError(
            f"{path}: {path.stat().st_size:_} bytes, expected "
            f"{info.tokens * dtype.itemsize:_}; delete it and prepare the data again"
        )
    return info, np.memmap(path, dtype=dtype, mode="r")


def _sum_infos(infos: Sequence[TokenFileInfo]) -> TokenFileInfo:
    sums = {
        name: sum(getattr(info, name) for info in infos)
        for name in ("tokens", "bytes", "documents", "unknown")
    }
    return replace(
        infos[0],
        **sums,
        tokenizer=" ".join(sorted({info.tokenizer for info in infos})),
        sha256=hashlib.sha256("".join(info.sha256 for info in infos).encode()).hexdigest(),
    )


def write_token_file(
    texts: Iterable[str],
    tokenizer: PreTrainedTokenizerFast,
    path: str | Path,
    *,
    documents: bool,
) -> TokenFileInfo:
    """Tokenize `texts` into a token file, whole or not at all; memory does not grow with it.

    Empty texts are left out. Special tokens spelled out in a text are ordinary text.

    Args:
        texts: documents, or consecutive parts of one text.
        tokenizer: its ids are written.
        path: the `.bin`; its info goes to `<path>.json`.
        documents: wrap each text in bos and eos, or begin it with the one token that is both; else
            write one after the other as they are.

    Raises:
        UserError: there is no text.
    """
    with TokenWriter(path, tokenizer) as writer:
        for part in encode_parts(texts, tokenizer, documents=documents):
            writer.add(part)
        if not writer.tokens:
            raise UserError(f"{path}: the text to tokenize is empty; give a text with characters")
        return writer.close()


class Encoded(NamedTuple):
    """A stretch of text as (N,) ids, and what it was made of."""

    ids: np.ndarray
    bytes: int
    documents: int
    unknown: int


class TokenWriter:
    """Writes a token file under another name; `close` gives it its own, leaving without removes it.

    Attributes:
        tokens: how many were added.
    """

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerFast) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        self.tokenizer = hash_tokenizer(tokenizer)
        self.dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
        self.tokens = self.bytes = self.documents = self.unknown = 0
        self.digest = hashlib.sha256()
        self.file = self.scratch.open("wb")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        self.scratch.unlink(missing_ok=True)

    def add(self, part: Encoded) -> None:
        """Append ids."""
        content = part.ids.astype(self.dtype).tobytes()
        self.digest.update(content)
        self.file.write(content)
        self.tokens += len(part.ids)
        self.bytes += part.bytes
        self.documents += part.documents
        self.unknown += part.unknown

    def close(self) -> TokenFileInfo:
        """Put the file into its place, and its info beside it."""
        self.file.close()
        info = TokenFileInfo(
            tokens=self.tokens,
            bytes=self.bytes,
            documents=self.documents,
            unknown=self.unknown,
            dtype=self.dtype.str,
            tokenizer=self.tokenizer,
            sha256=self.digest.hexdigest(),
        )
        # Without its info a token file counts as missing: no old info ever stands by new tokens.
        _info_path(self.path).unlink(missing_ok=True)
        os.replace(self.scratch, self.path)
        write_json(_info_path(self.path), asdict(info))
        return info


def encode_parts(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerFast, *, documents: bool
) -> Iterator[Encoded]:
    """`texts` as ids, about `BATCH_CHARS` characters at a time; see `write_token_file`."""
    for pieces in _batches(texts):
        yield _encode(pieces, tokenizer, documents)


@dataclass(frozen=True)
class _Piece:
    text: str
    opens: bool  # the first of its document
    closes: bool  # the last of its document


def _encode(pieces: list[_Piece], tokenizer: PreTrainedTokenizerFast, documents: bool) -> Encoded:
    ids: list[int] = []
    unknown = 0
    for piece, own in zip(pieces, encode_texts(tokenizer, [p.text for p in pieces]), strict=True):
        if documents and piece.opens:
            ids.append(tokenizer.bos_token_id)
        ids.extend(own)
        # where one token is both, the next document's first ends this one
        if documents and piece.closes and tokenizer.eos_token_id != tokenizer.bos_token_id:
            ids.append(tokenizer.eos_token_id)
        if tokenizer.unk_token_id is not None:
            unknown += own.count(tokenizer.unk_token_id)
    return Encoded(
        np.array(ids, dtype=np.int64),
        bytes=sum(len(piece.text.encode()) for piece in pieces),
        documents=sum(piece.opens for piece in pieces),
        unknown=unknown,
    )


def _batches(texts: Iterable[str]) -> Iterator[list[_Piece]]:
    """Group the pieces of all texts by about `BATCH_CHARS` characters."""
    batch: list[_Piece] = []
    size = 0
    for text in texts:
        cuts = [0, *cut_points(text, PIECE_CHARS), len(text)]
        for start, end in pairwise(cuts):
            if start == end:  # an empty text
                continue
            batch.append(_Piece(text[start:end], opens=start == 0, closes=end == len(text)))
            size += end - start
            if size >= BATCH_CHARS:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def cut_points(text: str, piece_chars: int) -> Iterator[int]:
    """Where to cut `text` in pieces of about `piece_chars` without changing its tokens.

    Between a letter and a space that a letter follows, and between the end of a line that is not
    empty and a letter: there the pre-tokenizers of Qwen2 and of GPT-2 both end one word and begin
    the next, whatever stands around. Text without any such place stays whole. "ab cd" may be cut
    into "ab" and " cd".
    """
    position = piece_chars
    while position < len(text) and (found := _BETWEEN_WORDS.search(text, position)):
        yield found.start()
        position = found.start() + piece_chars


def _info_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")
