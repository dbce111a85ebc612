"""Stage 3: ranked answers -> reward model, on TRL's RewardTrainer.

    make reward
    accelerate launch -m reward --config configs/arden/reward.yaml --noise 0.2

Answers are sampled from the fine-tuned model, set beside known faults and ranked by a labeller
who errs (`reward.collect`); the GPT with a scalar head learns from the pairs (Bradley-Terry). One's
own rankings (`prompt`, `chosen`, `rejected`) are taken as they are. `report.md` says how far it can
be trusted, and `go` in the summary whether PPO should follow it (`reward.verdict`).
"""

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from trl import RewardConfig, RewardTrainer

import common.gpt  # noqa: F401 - so that Auto classes load our GPT
from common.arden.task import ArdenTask
from common.artifacts import MetricsFile, require_parent, require_same_tokenizer, write_text
from common.batches import render
from common.config import parse_config, refusing, run
from common.data import load_ranked
from common.errors import UserError
from common.lengths import LengthReport, measure_lengths
from common.reward_gpt import logprob_scorer
from common.scoring import score_chats
from common.sharded import whole_model
from common.stage import (
    TRAINER_DEFAULTS,
    Stage,
    early_stopping,
    format_samples,
    open_stage,
    print_figures,
    train_or_resume,
)
from common.tokenizer import load_tokenizer, require_own_tokens
from reward.collect import EVALUATED_ON, collect, hash_labeller
from reward.config import BY_DATA, RewardModelConfig
from reward.figures import (
    TAKEN,
    accuracy_figures,
    calibration_figures,
    label_probabilities,
    length_figures,
    reliability,
)
from reward.pairs import GroupedRewardTrainer
from reward.probes import padding_difference, spam_figures
from reward.report import draw_reliability, write_report, write_verdict
from reward.verdict import DIVERGED, reasons_against

LEARNED = ["prompt", "chosen", "rejected"]


def main() -> None:
    """Collect missing rankings, train, measure, leave the artifacts of `common.artifacts`."""
    config, args = parse_config(RewardModelConfig, RewardConfig, defaults=TRAINER_DEFAULTS)
    folder = config.folder(args.output_dir)
    callbacks = early_stopping(config.early_stopping_patience, args)
    stage = open_stage(config, args, hash_labeller(config), policy=config.policy)
    if stage.output.says_finished():
        return
    require_same_tokenizer(stage.parent, require_parent(config.policy, config.parent_command))
    tokenizer = load_tokenizer(stage.parent)
    require_own_tokens(tokenizer, eos_token=args.eos_token, pad_token=args.pad_token)
    if args.chat_template_path is not None:
        raise UserError(
            f"chat_template_path ({args.chat_template_path}) is for fine-tuning: the reward model "
            "reads by the template of its parent, so leave it out"
        )
    opening = answer_opening(tokenizer) if config.answer_logprobs else None
    with args.main_process_first():  # the others then find them, or meet the same error
        collect(config, args, stage.task, folder)
    stops_by = [EVALUATED_ON] if args.eval_strategy != "no" else []
    splits = list(dict.fromkeys(["train", config.evaluate_on, *stops_by]))
    pairs = load_pairs(folder, splits, tokenizer, stage.parent, config, args)
    train, held_out = pairs["train"], pairs[config.evaluate_on]
    torch.manual_seed(args.seed)  # of the new head
    trainer_class = GroupedRewardTrainer if config.pairs_together else RewardTrainer
    with refusing():
        trainer: Any = trainer_class(
            model=build_scorer(stage.parent, opening),
            args=args,
            train_dataset=learned(train, config.margins),
            eval_dataset=learned(pairs[EVALUATED_ON], config.margins) if stops_by else None,
            processing_class=tokenizer,
            callbacks=[MetricsFile(stage.output.path / "metrics.jsonl"), *callbacks],
        )
    with args.main_process_first():
        if args.process_index == 0:
            stage.output.start()
    seconds = train_or_resume(trainer, stage.output.checkpoints)
    model = whole_model(trainer.accelerator, trainer.model)
    if not trainer.is_world_process_zero():
        return
    # without the autocast of training: PPO reads its scores in float32
    model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    scores = {
        side: score_chats(model, tokenizer, [row["prompt"] + row[side] for row in held_out])
        for side in ("chosen", "rejected")
    }
    summary, report = assess(model, tokenizer, config, stage, held_out, scores)
    summary |= {"pairs": len(train), "train_seconds": seconds}
    write_text(stage.output.path / "report.md", report)
    stage.output.finish(model, tokenizer, summary, write_samples(held_out, scores))
    print_figures("reward", summary)


def load_pairs(
    folder: Path,
    splits: list[str],
    tokenizer: PreTrainedTokenizerFast,
    parent: Path,
    config: RewardModelConfig,
    args: RewardConfig,
) -> dict[str, Dataset]:
    """The rankings of each split that fit into `max_length`.

    Raises:
        UserError: too much would be lost, there is no margin where margins are asked for, or a
            kind of pair is called like a figure.
    """
    pairs = {}
    for split in splits:
        rows = load_ranked(folder / f"{split}.jsonl")
        lengths = measure_lengths(rows, tokenizer, args.max_length)
        if args.process_index == 0:
            print(f"reward, {split}: {lengths}")
        lengths.require_learnable(parent, config.max_lost_share)
        pairs[split] = keep_fitting(rows, lengths)
    taken = {kind for rows in pairs.values() for kind in rows.unique("kind")} & TAKEN
    if taken:
        raise UserError(
            f"{folder}: accuracy_{min(taken)} is another figure than that of the pairs of kind "
            f'"{min(taken)}"; give them another `kind`'
        )
    without = [split for split, rows in pairs.items() if "margin" not in rows.column_names]
    if config.margins and without:
        raise UserError(
            f"margins: the rankings in {folder} give no margin for {', '.join(without)}; give "
            "--margins 0"
        )
    return pairs


def answer_opening(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """The ids with which the chat template opens an answer.

    Raises:
        UserError: there are none.
    """
    question = [{"role": "user", "content": "ask"}]
    asked, opened = (render(tokenizer, [question], ask=ask)[0] for ask in (False, True))
    if len(opened) == len(asked):
        raise UserError(
            "answer_logprobs: the chat template opens an answer by nothing, so that where one "
            "begins cannot be told: give --answer_logprobs false"
        )
    return opened[len(asked) :]


def build_scorer(parent: Path, opening: list[int] | None) -> PreTrainedModel:
    """The parent with a scalar head; its own log-probabilities behind `opening` beside, if any."""
    if opening is not None:
        return logprob_scorer(str(parent), opening)
    return AutoModelForSequenceClassification.from_pretrained(
        parent, num_labels=1, dtype=torch.float32
    )


def learned(pairs: Dataset, margins: float) -> Dataset:
    """The columns that are trained on, with the margins asked for, if any."""
    if not margins:
        return pairs.select_columns(LEARNED)
    scaled = pairs.map(lambda row: {"margin": margins * row["margin"]})
    return scaled.select_columns([*LEARNED, "margin"])


def keep_fitting(pairs: Dataset, lengths: LengthReport) -> Dataset:
    """The pairs that `max_length` leaves whole: of others nothing is learned.

    Raises:
        UserError: there is none.
    """
    limit = lengths.max_length or lengths.longest
    fitting = [place for place, length in enumerate(lengths.row_lengths) if length <= limit]
    if not fitting:
        raise UserError(
            f"none of {len(pairs):,} pairs fits into max_length ({limit:,} tokens), the longest "
            f"has {lengths.longest:,}: raise max_length, or give more rows"
        )
    return pairs.select(fitting)


def assess(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    config: RewardModelConfig,
    stage: Stage,
    held_out: Dataset,
    scores: dict[str, list[float]],
) -> tuple[dict[str, Any], str]:
    """The figures of the held-out pairs' scores, with the verdict, and the report on them.

    Beside it draws `reliability.svg`. Of a model that has diverged there are no figures.
    """
    chosen, rejected = scores["chosen"], scores["rejected"]
    if not all(map(math.isfinite, chosen + rejected)):
        summary: dict[str, Any] = {"go": False, "no_go_reasons": [DIVERGED]}
        return summary, write_verdict(summary)
    probabilities = label_probabilities(held_out, chosen, rejected)
    by_data, gold = config.labeller == BY_DATA, None
    arden = stage.task if isinstance(stage.task, ArdenTask) else None
    if arden and (by_data or config.labeller_is_model):
        gold = arden.gold_reward  # of a file's own prompts the judge would know nothing
    simulated = arden is not None and by_data
    summary = measure(model, tokenizer, gold, simulated, held_out, scores, probabilities)
    plot = draw_reliability(reliability(probabilities))
    write_text(stage.output.path / "reliability.svg", plot)
    return summary, write_report(summary, held_out, chosen, rejected, probabilities)


def write_samples(held_out: Dataset, scores: dict[str, list[float]]) -> str:
    """The first held-out pairs, and what each of their answers scores."""
    shown = list(held_out.select(range(min(20, len(held_out)))))
    return format_samples(
        "Held-out pairs: score of the chosen, then of the rejected answer",
        [row["prompt"][-1]["content"] for row in shown],
        [
            [f"{scores[side][place]:+.2f} {row[side][0]['content']}" for side in scores]
            for place, row in enumerate(shown)
        ],
    )


def measure(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    judge: Callable[..., list[float]] | None,
    simulated: bool,
    pairs: Dataset,
    scores: dict[str, list[float]],
    probabilities: list[float],
) -> dict[str, Any]:
    """All figures of held-out pairs and the verdict on them, for the summary."""
    chosen, rejected = scores["chosen"], scores["rejected"]
    gold = None
    if judge is not None:
        gold = (
            judge(pairs["prompt"], pairs["chosen"]),
            judge(pairs["prompt"], pairs["rejected"]),
        )
    figures: dict[str, Any] = accuracy_figures(pairs, chosen, rejected, simulated=simulated)
    figures |= calibration_figures(probabilities, chosen, rejected)
    figures |= length_figures(pairs, chosen, rejected, gold)
    good = [row["prompt"] + row["rejected" if row["flipped"] else "chosen"] for row in pairs]
    random.Random(0).shuffle(good)  # of a mixture they stand source by source
    figures |= spam_figures(model, tokenizer, good)
    figures["padding_difference"] = padding_difference(model, tokenizer, good)
    reasons = reasons_against(figures, len(pairs))
    return figures | {"go": not reasons, "no_go_reasons": reasons}


if __name__ == "__main__":
    run(main)
