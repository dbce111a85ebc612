"""Draws answers from a model and lets a reward choose among them."""

from typing import Any

from common.generation import generate_answers


class Chooser:
    """Answers questions by the best of the first n of its draws; each question is drawn once."""

    def __init__(self, model: Any, tokenizer: Any, score: Any, draws: int, max_new_tokens: int):
        self.model, self.tokenizer, self.score = model, tokenizer, score
        self.draws, self.max_new_tokens = draws, max_new_tokens
        self.drawn: dict[str, tuple[list[str], list[float]]] = {}

    def best(self, questions: list[str], n: int) -> list[tuple[str, float]]:
        """For each question the best of n answers, and its score."""
        new = [q for q in dict.fromkeys(questions) if q not in self.drawn]
        if new:
            self._draw(new)
        chosen = []
        for question in questions:
            answers, scores = self.drawn[question]
            place = max(range(n), key=lambda i: scores[i])
            chosen.append((answers[place], scores[place]))
        return chosen

    def _draw(self, questions: list[str]) -> None:
        several = generate_answers(
            self.model,
            self.tokenizer,
            questions,
            max_new_tokens=self.max_new_tokens,
            temperature=1.0,
            samples=self.draws,
        )
        chats = [
            [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            for question, answers in zip(questions, several, strict=True)
            for answer in answers
        ]
        scores = self.score(chats)
        for i, (question, answers) in enumerate(zip(questions, several, strict=True)):
            self.drawn[question] = answers, scores[i * self.draws : (i + 1) * self.draws]
