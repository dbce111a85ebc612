"""Batches of conversations."""

from common.batches import BATCH, by_length


def test_batches_by_hand() -> None:
    """Sorted by length, at most 6 tokens with padding. Seen to fail with padding not counted."""
    rows = [[7] * length for length in (5, 1, 3, 2, 8)]
    assert list(by_length(rows)) == [[1, 3, 2, 0, 4]]
    assert list(by_length(rows, max_tokens=6)) == [[1, 3], [2], [0], [4]]
    assert [len(batch) for batch in by_length([[7]] * (BATCH + 1))] == [BATCH, 1]
    assert list(by_length([])) == []
