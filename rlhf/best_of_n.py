"""Best of n: the reward chooses among n answers of the fine-tuned model; nothing is trained.

    python -m rlhf.best_of_n --config configs/arden/rlhf.yaml --n 1 4 16

It writes `best_of_n.json` into the output directory, a row for each n: what a trained policy must
beat at the same KL. Rows of other n that are there stay, of another configuration they are not
replaced without `--overwrite true`.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import common.gpt  # noqa: F401 - so that Auto classes load our GPT
from common.artifacts import (
    MEASURED,
    MEASURED_FROM,
    first_difference,
    hash_model,
    read_json,
    require_kind,
    require_parent,
    write_json,
)
from common.config import config_values, parse_config, require, run
from common.errors import UserError
from common.generation import as_chat
from common.stage import TRAINER_DEFAULTS, print_figures
from common.tasks import Task, open_task
from common.tokenizer import load_tokenizer
from rlhf.align import AlignConfig, load_rewards, measure_as_trained
from rlhf.chooser import Chooser
from rlhf.config import PPOConfig
from rlhf.measure import SHORT_NAMES, measure_choice, measured_rows
from rlhf.rewards import hash_function, is_function, make_scorer, weigh

UNREAD = {"overwrite", "parent_command", "method", "lora_r", "prompts", "allow_no_go", "best_of"}


@dataclass
class BestOfConfig:
    """How many answers to choose among."""

    n: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "answers a question"}
    )
    questions: int = field(
        default=40, metadata={"help": "most of a kind that the task's figures are measured on"}
    )

    def __post_init__(self) -> None:
        require(self, 1, "n", "questions")


def best_of_n_kl(n: int) -> float:
    """KL of best-of-n to the model it draws from, in nats: log n - (n - 1) / n.

    Exact where no two answers have the same score and none is likely; else an upper bound
    (arXiv 2401.01879).
    """
    return math.log(n) - (n - 1) / n


def identify(
    best_of: BestOfConfig, config: AlignConfig, args: PPOConfig, parent: Path, task: Task
) -> dict[str, Any]:
    """What the figures are of, whatever the n: configuration and sources, as a stage's manifest."""
    values = {name: value for name, value in config_values(config).items() if name not in UNREAD}
    values |= {"questions": best_of.questions, "reward_weights": args.reward_weights}
    sources = {"parent": hash_model(parent), "data": task.fingerprint()}
    sources |= {name: hash_function(name) for name in config.reward if is_function(name)}
    sources |= {name: hash_model(Path(name)) for name in config.models}
    return {"config": values, "sources": sources}


def rows_to_keep(
    folder: Path, manifest: dict[str, Any], n: list[int], overwrite: bool
) -> list[dict[str, Any]]:
    """The rows of other n that are in `folder`.

    Raises:
        UserError: those that are there are of another configuration, or nothing says of which.
    """
    rows, old = read_json(folder / MEASURED), read_json(folder / MEASURED_FROM)
    if rows is None or overwrite:
        return []
    changed = first_difference(old, manifest) if old else "an unknown configuration"
    if changed:
        raise UserError(
            f"{folder / MEASURED} holds figures with {changed}: give another --output_dir, or "
            "--overwrite true to replace them"
        )
    return [row for row in rows if row["n"] not in n]


def main() -> None:
    """Measure each n on the questions that PPO is measured on."""
    best_of, config, args = parse_config(
        BestOfConfig, AlignConfig, PPOConfig, defaults=TRAINER_DEFAULTS
    )
    if not args.output_dir:
        raise UserError("output_dir is empty: name a folder for the figures")
    measure_as_trained(config, args)
    parent = require_parent(config.model_name_or_path, config.parent_command)
    require_kind(parent, scores=False)
    task = open_task(config)
    folder, manifest = Path(args.output_dir), identify(best_of, config, args, parent, task)
    found = rows_to_keep(folder, manifest, best_of.n, config.overwrite)
    tokenizer = load_tokenizer(parent)
    batch_size, device = args.reading_batch_size, args.device
    rewards = load_rewards(config, task, parent, tokenizer, batch_size, device)
    rows = list(measured_rows(task, parent, tokenizer, config))
    weights = weigh(config.reward_names, args.reward_weights)
    chooser = Chooser(
        AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32).to(device),
        tokenizer,
        make_scorer(rewards, weights, tokenizer, batch_size, device),
        max(best_of.n),
        args.max_completion_length,
    )
    for n in sorted(best_of.n):

        def answer(asked: list[str], n: int = n) -> list[str]:
            return [text for text, _ in chooser.best([{"prompt": as_chat(q)} for q in asked], n)]

        measured = task.measure(answer, config.evaluate_on, best_of.questions)
        figures = {SHORT_NAMES.get(name, name): value for name, value in measured.items()}
        figures |= measure_choice(chooser, rows, n, task)
        found.append({"n": n, "kl": best_of_n_kl(n), **figures})
        print_figures(f"best of {n}", found[-1])
    write_json(folder / MEASURED_FROM, manifest)
    write_json(folder / MEASURED, sorted(found, key=lambda row: row["n"]))


if __name__ == "__main__":
    run(main)
