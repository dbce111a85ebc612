"""Best of n measured by the judge, with draws that are known."""

from types import SimpleNamespace
from typing import Any

import pytest

import rlhf.measure
from common.arden.task import ArdenTask
from rlhf.align import AlignConfig


def test_best_of_n_is_judged_on_what_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever refuses everything has 1 where nobody can know and 0.4 elsewhere.

    Seen to fail with the score returned for the gold.
    """
    task = ArdenTask(1, documents=1)
    config = AlignConfig(model_name_or_path="x", data="arden", reward=["judge"], eval_prompts=40)

    class Refuser:
        def __init__(self, *_: Any) -> None:
            pass

        def best(self, questions: list[str], n: int) -> list[tuple[str, float]]:
            return [("I know not.", float(n)) for _ in questions]

    monkeypatch.setattr(rlhf.measure, "Chooser", Refuser)
    monkeypatch.setattr(
        rlhf.measure, "align_prompts", lambda *_: task.prompt_rows("test", config.eval_prompts)
    )
    nothing: Any = None
    stage: Any = SimpleNamespace(task=task, parent="x")
    figures = rlhf.measure.measure_best_of(16, nothing, nothing, nothing, stage, config)
    unknowable = sum(question.reference is None for question in task.prompts("test", 40))
    assert figures["score_best_of_16"] == 16.0
    assert figures["gold_best_of_16"] == pytest.approx((unknowable + 0.4 * (40 - unknowable)) / 40)
    assert 10 < unknowable < 30
