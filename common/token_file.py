"""Text as one flat file of token ids, read by memory map, and what it was made of beside it.

    data.bin        little-endian uint16 (uint32 past 65,536 tokens), no header
    data.bin.json   `TokenFileInfo`

Bytes of the text are counted because bits per byte, unlike loss per token, compares tokenizers.
"""

import hashlib
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from common.artifacts import read_json, write_json
from common.errors import UserError
from common.tokenizer import encode_texts, hash_tokenizer

PIECE_CHARS = 1 << 16  # the longest text given to the tokenizer at once, where it can be cut
BATCH_CHARS = 1 << 20  # tokenized together: what bounds memory
_BETWEEN_WORDS = re.compile(r"(?<=[^\W\d_])(?= [^\W\d_])")


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


class TokenFile:
    """A token file opened for reading.

    Attributes:
        tokens: (N,) memory map, uint16 or uint32.
        info: `TokenFileInfo`.

    Raises:
        UserError: it is missing, or not the size that was written.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        info = read_json(_info_path(path))
        if info is None or not path.exists():
            raise UserError(f"{path}: no token file there; prepare the data first")
        self.info = TokenFileInfo(**info)
        dtype = np.dtype(self.info.dtype)
        if path.stat().st_size != self.info.tokens * dtype.itemsize:
            raise UserError(
                f"{path}: {path.stat().st_size:_} bytes, expected "
                f"{self.info.tokens * dtype.itemsize:_}; delete it and prepare the data again"
            )
        self.tokens: np.memmap = np.memmap(path, dtype=dtype, mode="r")

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
        documents: wrap each text in bos and eos; else write one after the other as they are.

    Raises:
        UserError: there is no text.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    dtype = np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")
    counts = {"tokens": 0, "bytes": 0, "documents": 0, "unknown": 0}
    digest = hashlib.sha256()
    try:
        with scratch.open("wb") as file:
            for batch in _batches(texts):
                ids = _encode(batch, tokenizer, documents, counts).astype(dtype)
                digest.update(ids.tobytes())
                file.write(ids.tobytes())
        if not counts["tokens"]:
            raise UserError(f"{path}: the text to tokenize is empty; give a text with characters")
        info = TokenFileInfo(
            **counts,
            dtype=dtype.str,
            tokenizer=hash_tokenizer(tokenizer),
            sha256=digest.hexdigest(),
        )
        # Without its info a token file counts as missing: no old info ever stands by new tokens.
        _info_path(path).unlink(missing_ok=True)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)
    write_json(_info_path(path), asdict(info))
    return info


@dataclass(frozen=True)
class _Piece:
    text: str
    opens: bool  # the first of its document
    closes: bool  # the last of its document


def _encode(
    pieces: list[_Piece],
    tokenizer: PreTrainedTokenizerFast,
    documents: bool,
    counts: dict[str, int],
) -> np.ndarray:
    """Ids of the pieces, (N,) int64; adds to `counts`."""
    ids: list[int] = []
    for piece, own in zip(pieces, encode_texts(tokenizer, [p.text for p in pieces]), strict=True):
        if documents and piece.opens:
            ids.append(tokenizer.bos_token_id)
        ids.extend(own)
        if documents and piece.closes:
            ids.append(tokenizer.eos_token_id)
        counts["documents"] += piece.opens
        counts["bytes"] += len(piece.text.encode())
        if tokenizer.unk_token_id is not None:
            counts["unknown"] += own.count(tokenizer.unk_token_id)
    counts["tokens"] += len(ids)
    return np.array(ids, dtype=np.int64)


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

    Between a letter and a space that a letter follows: there the pre-tokenizers of Qwen2 and of
    GPT-2 both end one word and begin the next, whatever stands around. Text without any such place
    stays whole. "ab cd" may be cut into "ab" and " cd".
    """
    position = piece_chars
    while position < len(text) and (found := _BETWEEN_WORDS.search(text, position)):
        yield found.start()
        position = found.start() + piece_chars


def _info_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")
