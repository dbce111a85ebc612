"""Draws answers from a model and lets a reward choose among them."""

import json
import math
from typing import Any

from common.batches import Chat
from common.generation import answered, as_chat, generate_answers


class Chooser:
    """Answers questions by the best of the first n of its draws; each question is drawn once."""

    def __init__(self, model: Any, tokenizer: Any, score: Any, draws: int, max_new_tokens: int):
        self.model, self.tokenizer, self.score = model, tokenizer, score
        self.draws, self.max_new_tokens = draws, max_new_tokens
        self.drawn: dict[str, tuple[list[str], list[float]]] = {}

    def best(self, questions: list[str] | list[Chat], n: int) -> list[tuple[str, float]]:
        """For each question, or conversation that ends in one, the best of n answers, its score."""
        self.draw(questions)
        chosen = []
        for question in questions:
            answers, scores = self.all_of(question)
            place = max(range(n), key=lambda i: -math.inf if math.isnan(scores[i]) else scores[i])
            chosen.append((answers[place], scores[place]))
        return chosen

    def all_of(self, question: str | Chat) -> tuple[list[str], list[float]]:
        """Every answer that `draw` drew to a question, and their scores."""
        return self.drawn[json.dumps(as_chat(question))]

    def draw(self, questions: list[str] | list[Chat]) -> None:
        """Draw and score answers to the questions that have none yet."""
        asked = {json.dumps(as_chat(question)): as_chat(question) for question in questions}
        asked = {key: chat for key, chat in asked.items() if key not in self.drawn}
        if not asked:
            return
        several = generate_answers(
            self.model,
            self.tokenizer,
            list(asked.values()),
            max_new_tokens=self.max_new_tokens,
            temperature=1.0,
            samples=self.draws,
        )
        chats = [
            answered(chat, answer)
            for chat, answers in zip(asked.values(), several, strict=True)
            for answer in answers
        ]
        scores = self.score(chats)
        for i, (key, answers) in enumerate(zip(asked, several, strict=True)):
            self.drawn[key] = answers, scores[i * self.draws : (i + 1) * self.draws]
