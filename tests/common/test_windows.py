"""Which tokens a step trains on and which the evaluation reads."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from common.windows import back_to_beginnings, evaluation_spans, source_documents, training_starts


def test_an_epoch_covers_every_window_once() -> None:
    starts = [training_starts(1001, 10, step, 7, seed=3) for step in range(14)]  # 98 of 99 windows
    flat = np.concatenate(starts)
    assert len(set(flat.tolist())) == len(flat)
    assert set((flat - flat[0]) % 10) == {0}
    assert flat.min() >= 0 and flat.max() + 10 < 1001


def test_same_windows_for_any_split() -> None:
    whole = training_starts(5000, 16, 3, 8, seed=1)
    halves = [training_starts(5000, 16, step, 4, seed=1) for step in (6, 7)]
    assert np.array_equal(whole, np.concatenate(halves))


def test_epochs_and_seeds_differ() -> None:
    """Whole epochs of 99 windows, each a permutation. Seen to fail with one order for all epochs
    and with one for all seeds."""
    orders = [training_starts(1001, 10, e, 99, seed) for e, seed in ((0, 1), (1, 1), (0, 2))]
    assert all(len(set(order.tolist())) == 99 for order in orders)
    assert len({tuple(order - order.min()) for order in orders}) == 3


def test_windows_move_back_to_where_their_document_begins() -> None:
    """Seen to fail with the first begin in reach in place of the nearest."""
    tokens = np.array([1, 8, 9, 8, 1, 8, 1, 8, 8], dtype=np.uint16)
    starts = np.arange(len(tokens))
    assert back_to_beginnings(tokens, starts, 4, 1).tolist() == [0, 0, 0, 0, 4, 4, 6, 6, 6]
    assert back_to_beginnings(tokens, starts, 2, 1).tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 8]
    stream = np.array([8, 8, 1], dtype=np.uint16)
    assert back_to_beginnings(stream, starts[:3], 3, 1).tolist() == [0, 1, 2]


def test_every_whole_window_of_a_long_document_is_read_in_every_epoch() -> None:
    """Broken by moving the starts of its first window alone: the tokens behind that were read in
    one epoch of five."""
    size, document = 8, [1] + [8] * 28  # three windows of 8 and 5 more
    tokens = np.array(document * 20 + [1], dtype=np.uint16)
    count = (len(tokens) - 1) // size - 1
    for epoch in range(20):
        starts = training_starts(len(tokens), size, epoch, count, seed=0)
        moved = back_to_beginnings(tokens, starts, size, 1)
        read = np.bincount(moved % len(document), minlength=29)
        assert set(np.flatnonzero(read)) <= {0, 8, 16, 24}  # the whole windows, and the rest
        assert (read[[8, 16]] >= 19).all() and read[0] >= 19  # of 20; the text's ends are cut


def test_what_is_far_behind_its_beginning_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a stream without documents is not searched to its start at every step."""
    tokens = np.array([1] + [8] * 20, dtype=np.uint16)
    monkeypatch.setattr("common.windows.LOOKED_BACK", 3)
    assert back_to_beginnings(tokens, np.array([11, 12]), 4, 1).tolist() == [8, 12]


def test_evaluation_predicts_every_token_but_the_first_once() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        tokens = rng.integers(1, 6, size=int(rng.integers(2, 200))).astype(np.uint16)
        targets = [t + 1 for a, b in evaluation_spans(tokens, 8, 1) for t in range(a, b)]
        assert targets == list(range(1, len(tokens)))


def test_spans_begin_with_documents_that_fit() -> None:
    tokens = np.array([1, 5, 5, 1, 5, 5, 5, 1, 5], dtype=np.uint16)
    assert evaluation_spans(tokens, 5, 1) == [(0, 3), (3, 8)]
    assert evaluation_spans(np.full(9, 5, dtype=np.uint16), 5, 1) == [(0, 5), (5, 8)]


def file_of(tokens: list[int], documents: int) -> Any:
    """As much of a token file as is looked at."""
    return SimpleNamespace(tokens=np.array(tokens), info=SimpleNamespace(documents=documents))


def test_source_documents_by_hand() -> None:
    """Seen to fail with the last target forgotten, and with each document counted twice that both
    begins and ends with one token, as Qwen3's do.
    """
    for file in (file_of([1, 8, 9] * 4, 4), file_of([1, 8, 1] * 4, 4)):  # 1 begins a document
        assert source_documents(file, np.array([2]), 3, 1) == [0, 1]
        assert source_documents(file, np.array([2]), 4, 1) == [0, 1, 2]
        assert source_documents(file, np.array([9, 0]), 2, 1) == [0, 3]
    assert source_documents(file_of([8, 9, 8], 1), np.array([0]), 2, 1) == []
