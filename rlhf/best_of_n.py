"""Best of n: the reward chooses among n answers of the fine-tuned model; nothing is trained.

    python -m rlhf.best_of_n --config configs/arden/rlhf.yaml --n 1 4 16

It writes `best_of_n.json` into the output directory, a row for each n: what a trained policy must
beat at the same KL.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import common.gpt  # noqa: F401 - so that Auto classes load our GPT
from common.artifacts import MEASURED, require_kind, require_parent, write_json
from common.config import parse_config, require, run
from common.errors import UserError
from common.generation import as_chat
from common.stage import TRAINER_DEFAULTS, open_task, print_figures
from common.tokenizer import load_tokenizer
from rlhf.align import AlignConfig, load_rewards, measure_as_trained
from rlhf.chooser import Chooser
from rlhf.config import PPOConfig
from rlhf.measure import SHORT_NAMES, measure_choice, measured_rows
from rlhf.rewards import make_scorer, weigh


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
    tokenizer = load_tokenizer(parent)
    batch_size, device = args.per_device_train_batch_size, args.device
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
    found = []
    for n in sorted(best_of.n):

        def answer(asked: list[str], n: int = n) -> list[str]:
            return [text for text, _ in chooser.best([{"prompt": as_chat(q)} for q in asked], n)]

        measured = task.measure(answer, config.evaluate_on, best_of.questions)
        figures = {SHORT_NAMES.get(name, name): value for name, value in measured.items()}
        figures |= measure_choice(chooser, rows, n, task)
        found.append({"n": n, "kl": best_of_n_kl(n), **figures})
        print_figures(f"best of {n}", found[-1])
    write_json(Path(args.output_dir) / MEASURED, found)


if __name__ == "__main__":
    run(main)
