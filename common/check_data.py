"""What a stage would train on, shown before it does.

    make check-data CONFIG=configs/own/sft.yaml DATA=questions.jsonl
    python -m common.check_data --config configs/own/reward.yaml --data ranked.jsonl.gz

Prints rows and tokens, lengths, what `max_length` would cut or drop, rows that stand twice, and one
row as the model will read it. A row that cannot be read ends it with file, row and field.
"""

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast
from trl import RewardConfig, SFTConfig

from common.artifacts import require_parent
from common.config import parse_config, run
from common.data import load_ranked, opening
from common.errors import UserError
from common.lengths import LengthReport, measure_lengths, name_row
from common.rows import Messages
from common.tasks import Task, open_task
from common.tokenizer import load_tokenizer, require_own_tokens
from reward.collect import label, open_rankings
from reward.config import BY_PEOPLE, RankingConfig, RewardModelConfig
from sft.__main__ import FineTuneConfig
from sft.template import check_template, read_template

STAGES = ("sft", "reward")


@dataclass
class CheckConfig(RankingConfig):
    """The fields of a stage's file that decide what it trains on; its others are passed over."""

    output_dir: str = field(default="", metadata={"help": "the stage's; holds its rankings"})
    stage: str = field(default="", metadata={"help": "sft or reward; default: the file's name"})
    max_length: int | None = field(default=1024, metadata={"help": "longest sequence, tokens"})
    assistant_only_loss: bool = field(
        default=True, metadata={"help": "of fine-tuning: on the assistant's tokens alone"}
    )
    packing: bool = field(default=False, metadata={"help": "of fine-tuning: rows share a sequence"})
    eval_packing: bool | None = field(default=None, metadata={"help": "default: as packing"})
    packing_strategy: str = field(default="bfd", metadata={"help": "of fine-tuning"})
    truncation_mode: str = field(default="keep_start", metadata={"help": "of fine-tuning"})
    chat_template_path: str | None = field(default=None, metadata={"help": "of fine-tuning"})
    eos_token: str | None = field(default=None, metadata={"help": "no other than the tokenizer's"})
    pad_token: str | None = field(default=None, metadata={"help": "no other than the tokenizer's"})

    def kept(self, part: str) -> str:
        """What stays of a row of fine-tuning that is longer than `max_length`.

        `start`, `end`, or all of it: `bfd_split` (in pieces), `wrapped` (as any row, in pieces).
        """
        given = None if part == "training" else self.eval_packing
        if self.packing if given is None else given:
            return "start" if self.packing_strategy == "bfd" else self.packing_strategy
        return self.truncation_mode.removeprefix("keep_")


def main() -> None:
    """Print the report; end with an error where the stage itself would refuse."""
    others = FineTuneConfig, SFTConfig, RewardModelConfig, RewardConfig
    (config,) = parse_config(CheckConfig, others=others)
    stage = config.stage or _stage_of(sys.argv)
    if stage not in STAGES:
        raise UserError(f"stage ({stage}) must be one of {', '.join(STAGES)}: give --stage")
    tokenizer = load_tokenizer(require_parent(config.model_name_or_path, config.parent_command))
    require_own_tokens(tokenizer, eos_token=config.eos_token, pad_token=config.pad_token)
    if config.chat_template_path is not None:
        if stage != "sft":
            raise UserError(f"chat_template_path ({config.chat_template_path}) is for fine-tuning")
        tokenizer.chat_template = read_template(config.chat_template_path)
    if stage == "sft":
        check_template(tokenizer)
    task = open_task(config)
    train, held_out = (_rows(task, stage, config, part) for part in ("train", "evaluation"))
    parts = {"training": train, "evaluation": held_out}
    reports = {
        name: measure_lengths(part, tokenizer, config.max_length) for name, part in parts.items()
    }
    print(f"{stage}: {config.data}, as the tokenizer of {config.model_name_or_path} reads it\n")
    for name in parts:
        kept = config.kept(name) if stage == "sft" else ""
        print(f"{name}\n{describe_lengths(reports[name], kept, config.assistant_only_loss)}\n")
    print(f"repeated\n{describe_repeats(train, held_out)}\n")
    shown = show_row(
        train[0],
        tokenizer,
        config.max_length,
        config.assistant_only_loss,
        config.kept("training"),
    )
    print(f"one row, as the model reads it\n{shown}\n")
    for report in reports.values():
        report.require_learnable(config.model_name_or_path, config.max_lost_share)


def _stage_of(arguments: list[str]) -> str:
    return Path(arguments[arguments.index("--config") + 1]).stem if "--config" in arguments else ""


def _rows(task: Task, stage: str, config: CheckConfig, part: str) -> Dataset:
    """The stage's rows; rankings as they were collected or, before that, without own answers."""
    if stage == "sft":
        return task.conversations("train" if part == "train" else "validation")
    split = "train" if part == "train" else config.evaluate_on
    folder = config.folder(config.output_dir)
    collected = folder / f"{split}.jsonl"
    if collected.exists() and not open_rankings(config, task, folder).replaces:
        return load_ranked(collected)
    if config.labeller_is_model or config.labeller == BY_PEOPLE:
        raise UserError(
            f"labeller ({config.labeller}) has ranked nothing in {folder}: run `make rankings`"
        )
    count = config.prompts if part == "train" else config.eval_prompts
    return label(config, task, lambda asked: [[] for _ in asked], split, count, torch.device("cpu"))


def describe_lengths(report: LengthReport, kept: str, assistant_only_loss: bool) -> str:
    """Counts, a histogram, and what is lost and why, in words.

    `kept`: of fine-tuning's rows (`CheckConfig.kept`); empty for the reward model's pairs.
    """
    if kept not in ("", "start"):
        tokens_cut = report.tokens_cut if kept == "end" else 0
        report = replace(report, tokens_cut=tokens_cut, unanswered=0)
    lines = [f"  {report}", *(f"  {line}" for line in report.histogram().splitlines())]
    if report.truncated:
        lines.append(f"  longest: {report.longest_row}, {report.longest:,} tokens")
    if kept == "wrapped":
        lines.append("  packed: rows one behind another, cut every max_length tokens, none lost")
    elif report.truncated and not kept:
        lines.append(f"  dropped: {report.truncated:,} pairs with an answer that does not fit")
    elif report.truncated and kept == "bfd_split":
        lines.append(f"  split: {report.truncated:,} rows, into pieces that do not see each other")
    elif report.truncated:
        lost = report.unanswered if assistant_only_loss else 0
        end = "their beginning" if kept == "end" else "their end, <eos> included"
        lines.append(f"  cut: {report.truncated - lost:,} rows, which lose {end}")
        lines.append(f"  lost: {lost:,} rows, all of whose answer is cut off")
    return "\n".join(lines)


def describe_repeats(train: Dataset, held_out: Dataset) -> str:
    """Rows that stand twice, and prompts of the evaluation that are trained on, in words.

    Case and spaces do not make a difference. What a weight shows several times stands once.
    """
    places = train["where"] if "where" in train.column_names else range(len(train))
    rows = [row for _, row in set(zip(places, map(_plain, train), strict=True))]
    prompts = {opening(row): place for place, row in enumerate(train)}
    leaks = [
        (place, prompts[prompt])
        for place, prompt in enumerate(map(opening, held_out))
        if prompt in prompts
    ]
    lines = [
        f"  {len(rows) - len(set(rows)):,} of {len(rows):,} training rows stand there before",
        f"  {len(leaks):,} of {len(held_out):,} evaluation rows open with what training asks",
    ]
    for place, other in leaks[:3]:
        lines.append(f"    {name_row(held_out, place)} asks as {name_row(train, other)}")
    return "\n".join(lines)


def _plain(row: dict[str, Any]) -> str:
    fields = {k: row[k] for k in ("messages", "prompt", "chosen", "rejected") if k in row}
    return " ".join(json.dumps(fields).casefold().split())


def show_row(
    row: dict[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    max_length: int | None,
    assistant_only_loss: bool = True,
    kept: str = "start",
) -> str:
    """Fine-tuning's row with the learned tokens in [[ ]]; a pair as its two conversations."""
    if "messages" in row:
        shown = show_mask(row["messages"], tokenizer, max_length, assistant_only_loss, kept)
        return f"  {shown}"
    sides = []
    for side in ("chosen", "rejected"):
        text = tokenizer.apply_chat_template(row["prompt"] + row[side], tokenize=False)
        sides.append(f"  {side:<8}  {text}")
    return "\n".join(sides)


def show_mask(
    messages: Messages,
    tokenizer: PreTrainedTokenizerFast,
    max_length: int | None,
    assistant_only_loss: bool = True,
    kept: str = "start",
) -> str:
    """The conversation by the chat template: [[learned]] tokens, others bare, [cut off: ...].

    For two turns and our own template (the blank line as it is):
    `<|bos|><|user|> Hi\\n\\n<|assistant|>[[ Ho<|eos|>]]`
    """
    encoded: Any = tokenizer.apply_chat_template(
        messages, return_assistant_tokens_mask=True, return_dict=True
    )
    ids = encoded["input_ids"]
    mask = encoded["assistant_masks"] if assistant_only_loss else [1] * len(ids)
    over = 0 if max_length is None else max(0, len(ids) - max_length)
    start = over if kept == "end" else 0
    last = len(ids) - over if kept == "start" else len(ids)
    cut = f"[cut off: {tokenizer.decode(ids[:start] or ids[last:])}]"
    shown = cut if start else ""
    for end in range(start + 1, last + 1):
        if end == last or mask[end] != mask[start]:
            text: Any = tokenizer.decode(ids[start:end])
            shown += f"[[{text}]]" if mask[start] else text
            start = end
    return shown + (cut if last < len(ids) else "")


if __name__ == "__main__":
    run(main)
