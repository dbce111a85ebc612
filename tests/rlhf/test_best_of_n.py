"""Best of n: the KL in closed form, and who is chosen."""

import math
from typing import Any

import pytest
from conftest import build_tokenizer
from transformers import AutoModelForCausalLM

from common import generation
from common.batches import render
from common.generation import draw_chats
from rlhf.best_of_n import best_of_n_kl
from rlhf.chooser import Chooser


def exact_kl(n: int, answers: int) -> float:
    """KL of best-of-n to the uniform distribution on answers with different scores.

    The best of n is the i-th worst with probability (i / m)^n - ((i - 1) / m)^n.
    """
    total = 0.0
    for i in range(1, answers + 1):
        p = (i / answers) ** n - ((i - 1) / answers) ** n
        total += p * math.log(p * answers)
    return total


@pytest.mark.parametrize("n", [1, 2, 5, 16])
def test_kl_bounds_the_exact_one_and_meets_it(n: int) -> None:
    """Broken once: (n + 1) / n in place of (n - 1) / n."""
    for answers in (3, 30):
        assert exact_kl(n, answers) <= best_of_n_kl(n) + 1e-12
    assert exact_kl(n, 100_000) == pytest.approx(best_of_n_kl(n), abs=1e-3)


def test_the_best_of_the_first_n_is_chosen(policy_path: str) -> None:
    """By hand from the draws; a question asked twice is drawn once.

    Broken once: best of all draws, whatever n.
    """
    asked: list[int] = []

    def count(chats: list[Any]) -> list[float]:
        asked.append(len(chats))
        return [float(chat[-1]["content"].count("w5")) for chat in chats]

    policy = AutoModelForCausalLM.from_pretrained(policy_path)
    chooser = Chooser(policy, build_tokenizer(16), count, draws=12, max_new_tokens=8)
    questions = ["w4 w5", "w6", "w4 w5"]
    best = chooser.best(questions, 12)
    assert asked == [24] and best[0] == best[2]
    fewer = chooser.best(questions, 3)
    assert asked == [24]
    for question, (text, score), (_, score_of_fewer) in zip(questions, best, fewer, strict=True):
        answers, scores = chooser.all_of(question)
        assert len(answers) == 12
        assert score == max(scores) == text.count("w5")
        assert score_of_fewer == max(scores[:3])
    assert sum(score for _, score in best) > sum(score for _, score in fewer)


def test_all_that_was_said_before_is_read(
    policy_path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the policy, and by whoever scores. Broken once: the last question alone."""
    policy: Any = AutoModelForCausalLM.from_pretrained(policy_path)
    tokenizer = build_tokenizer(16)
    chat = [
        {"role": "user", "content": "w4"},
        {"role": "assistant", "content": "w5"},
        {"role": "user", "content": "w6"},
    ]
    seen: list[int] = []
    generate = policy.generate

    def watch(ids: Any, **options: Any) -> Any:
        seen.append(ids.shape[1])
        return generate(ids, **options)

    monkeypatch.setattr(policy, "generate", watch)
    (drawn,) = draw_chats(policy, tokenizer, [chat], 4)
    turns: list[int] = []
    chooser = Chooser(policy, tokenizer, lambda c: turns.extend(map(len, c)) or [0.0], 1, 4)
    chooser.best([chat], 1)
    assert drawn[:-1] == chat and turns == [4]
    assert seen == [len(render(tokenizer, [chat], ask=True)[0])] * 2


def test_few_rows_are_sampled_at_a_time(policy_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All answers of all questions, in batches of at most `MOST_ROWS`. Broken once: no limit."""
    policy: Any = AutoModelForCausalLM.from_pretrained(policy_path)
    rows: list[int] = []
    generate = policy.generate

    def watch(ids: Any, **options: Any) -> Any:
        rows.append(len(ids))
        return generate(ids, **options)

    policy.generate = watch
    monkeypatch.setattr(generation, "MOST_ROWS", 7)
    questions = ["w4", "w5 w6", "w7", "w8 w9", "w10"]
    answers = generation.generate_answers(
        policy, build_tokenizer(16), questions, max_new_tokens=3, temperature=1.0, samples=3
    )
    assert rows == [6, 6, 3] and [len(several) for several in answers] == [3] * 5
