"""Token files: exact, whole or not at all, and read back as blocks."""

import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from common import token_file
from common.errors import UserError
from common.token_file import TokenFile, cut_points, write_token_file
from common.tokenizer import encode_texts, hash_tokenizer, train_bpe, train_characters

A, B, C = 8, 9, 10  # after seven special tokens and the space


@pytest.fixture
def abc():
    return train_characters(["abc"])


def test_worked_example(abc, tmp_path):
    path = tmp_path / "data.bin"
    info = write_token_file(["ab", "", "cé", "<|eos|>a"], abc, path, documents=True)
    assert (
        path.read_bytes()
        == np.array([1, A, B, 2, 1, C, 6, 2, 1, 6, 6, 6, 6, 6, 6, 6, A, 2], dtype="<u2").tobytes()
    )
    assert (info.tokens, info.bytes, info.documents, info.unknown) == (18, 2 + 3 + 8, 3, 8)
    assert info.dtype == "<u2"
    assert info.tokenizer == hash_tokenizer(abc)
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert json.loads((tmp_path / "data.bin.json").read_text())["tokens"] == 18
    assert sorted(os.listdir(tmp_path)) == ["data.bin", "data.bin.json"]
    assert TokenFile(path).info == info


def test_without_documents_texts_stand_side_by_side(abc, tmp_path):
    write_token_file(["ab", "ca"], abc, tmp_path / "d.bin", documents=False)
    assert TokenFile(tmp_path / "d.bin").tokens.tolist() == [A, B, C, A]


def test_batch_shifts_targets_by_one(abc, tmp_path):
    write_token_file(["abcab"], abc, tmp_path / "d.bin", documents=False)
    file = TokenFile(tmp_path / "d.bin")
    inputs, targets = file.batch([0, 2], 2)
    assert len(file) == 5
    assert inputs.dtype == targets.dtype == torch.int64
    assert inputs.tolist() == [[A, B], [C, A]]
    assert targets.tolist() == [[B, C], [A, B]]
    for bad in (-1, 3):
        with pytest.raises(ValueError, match="starts must lie in"):
            file.batch([0, bad], 2)


def test_joined_files_say_by_which_tokenizers(abc, tmp_path):
    """Broken by the first one's alone, which hid another behind it."""
    others = [train_characters([text]) for text in ("abd", "abc", "abd")]
    paths = [tmp_path / f"{number}.bin" for number in range(3)]
    for path, tokenizer in zip(paths, others, strict=True):
        write_token_file(["ab"], tokenizer, path, documents=False)
    said = TokenFile(*paths).info.tokenizer.split()
    assert sorted(said) == sorted(map(hash_tokenizer, others[:2]))


def test_wide_vocabulary_takes_four_bytes(tmp_path):
    text = "".join(map(chr, range(0x10000, 0x10000 + 66_000)))
    tokenizer = train_characters([text])
    info = write_token_file([text], tokenizer, tmp_path / "d.bin", documents=False)
    assert info.dtype == "<u4"
    assert TokenFile(tmp_path / "d.bin").tokens.tolist() == list(range(8, 66_008))


def random_text(seed: int) -> str:
    generator = random.Random(seed)
    parts = [*"aZé中ß1٣²½,.'", "the", "it's", " ", " ", " ", "  ", "\n", "\r\n", "\n\n", "\t"]
    parts += ["\u00a0", "\u2028", "e\u0301", "<|eos|>", "😀", "…", "\x1c", "\x85"]
    return "".join(generator.choices(parts, k=3000))


def test_cutting_changes_no_token(tmp_path, monkeypatch):
    text = "".join(map(random_text, range(20)))
    monkeypatch.setattr(token_file, "PIECE_CHARS", 11)
    monkeypatch.setattr(token_file, "BATCH_CHARS", 500)
    assert len(list(cut_points(text, 11))) > 300
    for tokenizer in (train_bpe([text], 512), train_characters([text])):
        info = write_token_file([text, text], tokenizer, tmp_path / "d.bin", documents=True)
        [whole] = encode_texts(tokenizer, [text])
        assert TokenFile(tmp_path / "d.bin").tokens.tolist() == [1, *whole, 2] * 2
        assert info.documents == 2
        assert info.bytes == 2 * len(text.encode())


def test_pieces_make_up_the_text():
    assert list(cut_points("one two three", 5)) == [7]
    assert list(cut_points("one, two; 3 4\n5", 1)) == []  # nowhere between two letters
    # Chinese has no spaces. Broken once: a book of it was one piece, and memory grew with it.
    assert list(cut_points("一二三。\n四五六。\n\n七八。\n九", 2)) == [5, 15]
    assert list(cut_points("", 5)) == []


def test_real_text_is_encoded_as_a_whole(tmp_path):
    folder = os.environ.get("FOLIO_TEST_DATA")
    if not folder:
        pytest.skip("FOLIO_TEST_DATA names no folder with the real data")
    text = (Path(folder) / "tinyshakespeare.txt").read_text(encoding="utf-8")
    for tokenizer in (train_bpe([text], 512), train_characters([text])):
        write_token_file([text], tokenizer, tmp_path / "d.bin", documents=False)
        [whole] = encode_texts(tokenizer, [text])
        assert TokenFile(tmp_path / "d.bin").tokens.tolist() == whole


def test_text_is_written_as_it_comes(abc, tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "BATCH_CHARS", 1000)

    def texts():
        for _ in range(100):
            yield "abc" * 100
        [scratch] = tmp_path.iterdir()
        sizes.append(scratch.stat().st_size)

    sizes: list[int] = []
    write_token_file(texts(), abc, tmp_path / "d.bin", documents=False)
    assert sizes[0] > 40_000  # most of the 60,000 bytes, before the last text was asked for


def test_a_failure_leaves_the_old_file(abc, tmp_path):
    def failing():
        yield "c"
        raise RuntimeError("killed")

    write_token_file(["ab"], abc, tmp_path / "d.bin", documents=False)
    with pytest.raises(RuntimeError):
        write_token_file(failing(), abc, tmp_path / "d.bin", documents=False)
    assert TokenFile(tmp_path / "d.bin").tokens.tolist() == [A, B]
    assert len(list(tmp_path.iterdir())) == 2


def test_no_text(abc, tmp_path):
    with pytest.raises(UserError, match="is empty"):
        write_token_file(["", ""], abc, tmp_path / "d.bin", documents=True)
    assert not list(tmp_path.iterdir())


def test_missing_and_damaged_files(abc, tmp_path):
    path = tmp_path / "d.bin"
    with pytest.raises(UserError, match="no token file"):
        TokenFile(path)
    write_token_file(["abc"], abc, path, documents=False)
    path.write_bytes(b"12")
    with pytest.raises(UserError, match="2 bytes, expected 6; delete it"):
        TokenFile(path)
