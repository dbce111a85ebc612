"""Draws answers from a model and lets a reward choose among them."""

import json
import math
from collections.abc import Sequence
from typing import Any

from common.generation import generate_drawn
from rlhf.rewards import Scorer

Row = dict[str, Any]


class Chooser:
    """Answers rows by the best of the first n of its draws; each row is drawn for once.

    A row is a `prompt`, and the further columns of the data that rewards may ask for.
    """

    def __init__(self, model: Any, tokenizer: Any, score: Scorer, draws: int, max_new_tokens: int):
        self.model, self.tokenizer, self.score = model, tokenizer, score
        self.draws, self.max_new_tokens = draws, max_new_tokens
        self.drawn: dict[str, tuple[list[str], list[float]]] = {}

    def best(self, rows: Sequence[Row], n: int) -> list[tuple[str, float]]:
        """For each row the best of n answers, and its score."""
        self.draw(rows)
        chosen = []
        for row in rows:
            answers, scores = self.all_of(row)
            place = max(range(n), key=lambda i: -math.inf if math.isnan(scores[i]) else scores[i])
            chosen.append((answers[place], scores[place]))
        return chosen

    def all_of(self, row: Row) -> tuple[list[str], list[float]]:
        """Every answer that `draw` drew to a row, and their scores."""
        return self.drawn[json.dumps(row)]

    def draw(self, rows: Sequence[Row]) -> None:
        """Draw and score answers to the rows that have none yet."""
        asked = {key: row for row in rows if (key := json.dumps(row)) not in self.drawn}
        if not asked:
            return
        several = generate_drawn(
            self.model,
            self.tokenizer,
            [row["prompt"] for row in asked.values()],
            max_new_tokens=self.max_new_tokens,
            temperature=1.0,
            samples=self.draws,
        )
        repeated = [row for row in asked.values() for _ in range(self.draws)]
        scores = self.score(repeated, [answer for answers in several for answer in answers])
        for i, (key, answers) in enumerate(zip(asked, several, strict=True)):
            texts = [answer.text for answer in answers]
            self.drawn[key] = texts, scores[i * self.draws : (i + 1) * self.draws]
