"""What alignment is measured by: the task's figures, score, KL; and best-of-n beside."""

import statistics
from collections.abc import Callable
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from common.arden.task import ArdenTask
from common.batches import Chat
from common.generation import draw_each, generate_answers
from common.rows import assistant
from common.scoring import answer_logprobs
from common.stage import Stage
from common.tasks import Task
from rlhf.align import AlignConfig, align_prompts
from rlhf.chooser import Chooser, Row
from rlhf.rewards import Scorer, mean_score

# Before and after are compared by these, so their names are short.
SHORT_NAMES = {
    "exact_match_heldout_people": "exact_match",
    "hallucination_unknown": "hallucination",
}


def gold(task: ArdenTask, prompts: list[Chat], answers: list[str]) -> float:
    """The judge's mean score of the answers."""
    return statistics.fmean(task.gold_reward(prompts, [[assistant(text)] for text in answers]))


def measured_rows(
    task: Task, parent: Path, tokenizer: PreTrainedTokenizerFast, config: AlignConfig
) -> Dataset:
    """The prompts that score, KL and gold are measured on."""
    wanted = config.evaluate_on, config.eval_prompts
    return align_prompts(task, parent, tokenizer, config, *wanted)


def measure_choice(chooser: Chooser, rows: list[Row], n: int, task: Task) -> dict[str, float]:
    """`score` of the chosen among n answers to each row, and on Arden `gold_drawn`."""
    best = chooser.best(rows, n)
    figures = {"score": mean_score([score for _, score in best])}
    if isinstance(task, ArdenTask):
        prompts = [row["prompt"] for row in rows]
        figures["gold_drawn"] = gold(task, prompts, [text for text, _ in best])
    return figures


def measure_best_of(
    n: int,
    model: PreTrainedModel,
    score: Scorer,
    tokenizer: PreTrainedTokenizerFast,
    stage: Stage,
    config: AlignConfig,
) -> dict[str, float]:
    """What the rewards' choice among n answers of `model` reaches, on the prompts of `gold_drawn`.

    Returns:
        `score_best_of_<n>`, and on Arden `gold_best_of_<n>`.
    """
    rows = list(measured_rows(stage.task, stage.parent, tokenizer, config))
    chooser = Chooser(model, tokenizer, score, n, config.max_new_tokens)
    figures = measure_choice(chooser, rows, n, stage.task)
    return {f"{name.removesuffix('_drawn')}_best_of_{n}": value for name, value in figures.items()}


def measure(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    score: Scorer,
    tokenizer: PreTrainedTokenizerFast,
    stage: Stage,
    config: AlignConfig,
) -> dict[str, float]:
    """The task's figures on greedy answers and on drawn ones; score and KL on drawn ones.

    Returns:
        the task's figures, of greedy answers and (`<name>_sampled`) of answers drawn at
        temperature 1; `kl` (nats an answer, to the reference) and `score` of the drawn answers; on
        Arden `gold_drawn`, the judge's score of the same.
    """

    def answer_at(temperature: float) -> Callable[[list[str]], list[str]]:
        def answer(questions: list[str]) -> list[str]:
            several = generate_answers(
                model,
                tokenizer,
                questions,
                max_new_tokens=config.max_new_tokens,
                temperature=temperature,
            )
            return [one for (one,) in several]

        return answer

    figures = {}
    for temperature, ending in ((0.0, ""), (1.0, "_sampled")):
        measured = stage.task.measure(answer_at(temperature), config.evaluate_on)
        for name, value in measured.items():
            figures[SHORT_NAMES.get(name, name) + ending] = value
    rows = list(measured_rows(stage.task, stage.parent, tokenizer, config))
    prompts = [row["prompt"] for row in rows]
    drawn = draw_each(model, tokenizer, prompts, config.max_new_tokens)
    if isinstance(stage.task, ArdenTask):
        figures["gold_drawn"] = gold(stage.task, prompts, [answer.text for answer in drawn])
    ids = [answer.ids for answer in drawn]
    ours, theirs = (answer_logprobs(one, tokenizer, prompts, ids) for one in (model, reference))
    figures["kl"] = statistics.fmean(ours) - statistics.fmean(theirs)
    figures["score"] = mean_score(score(rows, drawn))
    return figures
