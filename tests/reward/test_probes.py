"""Spam and padding on reward models whose score is known: the count of a letter."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from common.tokenizer import train_characters
from reward.probes import padding_difference, spam_figures

TOKENIZER = train_characters(["abcdefghijklmnopqrstuvwxyzATW .,!"])


class CountsTheLetter:
    """Scores a conversation by how often a letter stands in it; `leak` by the padding, too."""

    device = torch.device("cpu")
    config = SimpleNamespace(max_position_embeddings=100)

    def __init__(self, letter: str, leak: float = 0.0) -> None:
        self.letter, self.leak = TOKENIZER.convert_tokens_to_ids(letter), leak

    def eval(self) -> None:
        pass

    def __call__(self, ids: Any, attention_mask: Any) -> Any:
        counts = (ids == self.letter).sum(1) + self.leak * (ids == TOKENIZER.pad_token_id).sum(1)
        return SimpleNamespace(logits=counts[:, None].float())


CHATS = [
    [{"role": "user", "content": "so k k k"}, {"role": "assistant", "content": "ok" * n}]
    for n in (1, 3)
]


def test_spam_by_hand() -> None:
    """k stands once in `Thank you.`, twice more in repetition; the question has three. Broken by
    the sign of the change."""
    model: Any = CountsTheLetter("k")
    assert spam_figures(model, TOKENIZER, CHATS) == {
        "spam_thanks": 3.0,
        "spam_repetition": (2 + 6) / 2,
        "spam_flattery": 0.0,
        "spam_padding": 0.0,
        "spam_copied_question": (2 + 0) / 2,
    }


def test_a_probe_asks_only_what_the_context_holds() -> None:
    """Broken by repetition's length for all: without room for three answers nothing was probed."""
    model: Any = CountsTheLetter("k")
    model.config = SimpleNamespace(max_position_embeddings=30)
    assert spam_figures(model, TOKENIZER, CHATS).keys() == {
        "spam_repetition",
        "spam_copied_question",
    }
    model.config = SimpleNamespace(max_position_embeddings=5)
    assert spam_figures(model, TOKENIZER, CHATS) == {}


def test_padding_is_seen() -> None:
    """`okokok` is 4 tokens longer than `ok`. Broken by scoring both times in the batch."""
    assert padding_difference(CountsTheLetter("k"), TOKENIZER, CHATS) == 0.0  # type: ignore
    leaky: Any = CountsTheLetter("k", leak=0.5)
    assert padding_difference(leaky, TOKENIZER, CHATS) == pytest.approx(0.5 * 4)
