"""Best of n: the KL in closed form, and who is chosen."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import build_tokenizer
from transformers import AutoModelForCausalLM

from common import generation
from common.artifacts import MEASURED, MEASURED_FROM, write_json
from common.batches import render
from common.errors import UserError
from common.generation import as_chat, draw_each
from rlhf.align import AlignConfig
from rlhf.best_of_n import BestOfConfig, best_of_n_kl, identify, rows_to_keep
from rlhf.chooser import Chooser
from rlhf.config import PPOConfig


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

    def count(rows: Any, answers: Any) -> list[float]:
        asked.append(len(rows))
        return [float(answer.text.count("w5")) for answer in answers]

    policy = AutoModelForCausalLM.from_pretrained(policy_path)
    chooser = Chooser(policy, build_tokenizer(16), count, draws=12, max_new_tokens=8)
    rows = [{"prompt": as_chat(question)} for question in ("w4 w5", "w6", "w4 w5")]
    best = chooser.best(rows, 12)
    assert asked == [24] and best[0] == best[2]
    fewer = chooser.best(rows, 3)
    assert asked == [24]
    for row, (text, score), (_, score_of_fewer) in zip(rows, best, fewer, strict=True):
        answers, scores = chooser.all_of(row)
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
    draw_each(policy, tokenizer, [chat], 4)
    scored: list[Any] = []
    chooser = Chooser(policy, tokenizer, lambda rows, _: scored.extend(rows) or [0.0], 1, 4)
    chooser.best([{"prompt": chat}], 1)
    assert scored == [{"prompt": chat}]
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


def test_rows_that_ask_alike_have_answers_of_their_own(policy_path: str) -> None:
    """What is right differs. Broken once: draws kept by the prompt, so that the second row's were
    chosen by the first's answer.
    """

    def right(rows: Any, answers: Any) -> list[float]:
        signs = [1.0 if row["wanted"] == "long" else -1.0 for row in rows]
        return [sign * len(answer.text) for sign, answer in zip(signs, answers, strict=True)]

    policy = AutoModelForCausalLM.from_pretrained(policy_path)
    chooser = Chooser(policy, build_tokenizer(16), right, draws=16, max_new_tokens=6)
    prompt = as_chat("w4")
    rows = [{"prompt": prompt, "wanted": "long"}, {"prompt": prompt, "wanted": "short"}]
    (long, score), (short, other) = chooser.best(rows, 16)
    assert (score, other) == (len(long), -len(short)) and len(long) > len(short)


def test_drawn_ids_end_with_the_end_or_not_at_all(policy_path: str) -> None:
    """Padding of shorter rows is none of an answer's. Broken once: it was kept; the end cut off."""
    policy: Any = AutoModelForCausalLM.from_pretrained(policy_path)
    tokenizer = build_tokenizer(16)
    drawn = draw_each(policy, tokenizer, [as_chat(f"w{4 + n % 12}") for n in range(200)], 4)
    lengths = set()
    for text, ids in drawn:
        lengths.add(len(ids))
        assert 1 not in ids[:-1] and (ids[-1] == 1 or len(ids) == 4)
        assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert len(lengths) > 1


def test_figures_of_another_configuration_are_not_replaced(
    tmp_path: Path, policy_path: str
) -> None:
    """Those of other n stay. Broken once: all written over without a word."""
    task: Any = SimpleNamespace(fingerprint=lambda: "x")

    def look(n: list[int], overwrite: bool = False, **changed: Any) -> list[dict[str, Any]]:
        fields = {"model_name_or_path": policy_path, "data": "arden", "reward": "judge"}
        config = AlignConfig(**fields | changed)
        args = PPOConfig(use_cpu=True, report_to="none")
        manifest = identify(BestOfConfig(n=n), config, args, Path(policy_path), task)
        kept = rows_to_keep(tmp_path, manifest, n, overwrite)
        write_json(tmp_path / MEASURED_FROM, manifest)
        write_json(tmp_path / MEASURED, [*kept, *({"n": one} for one in n)])
        return kept

    assert look([1, 4]) == [] and look([4, 8]) == [{"n": 1}]
    assert look([8], method="rloo", best_of=4) == [{"n": 1}, {"n": 4}]  # of no influence
    with pytest.raises(
        UserError, match=r"holds figures with evaluate_on test \(now dev\): give ano"
    ):
        look([8], evaluate_on="dev")
    assert look([8], True, evaluate_on="dev") == []
    (tmp_path / MEASURED_FROM).unlink()
    with pytest.raises(UserError, match="holds figures with an unknown configuration"):
        look([8], evaluate_on="dev")
