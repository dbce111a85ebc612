"""Our PPO on the bench's problem: `python -m rlhf.bench.ours FOLDER NAME`."""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from rlhf.bench.pace import Pace
from rlhf.bench.problem import Problem, read, tokenizer
from rlhf.config import PPOConfig
from rlhf.trainer import PPOTrainer


def time_phases(trainer: Any) -> dict[str, float]:
    """Seconds of the clock by what they went to, filled while the trainer runs."""
    seconds: dict[str, float] = defaultdict(float)

    def watch(owner: Any, method: str, phase: str) -> None:
        original = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                seconds[phase] += time.perf_counter() - start

        setattr(owner, method, timed)

    watch(trainer, "_generate", "generation_seconds")
    watch(trainer, "_calculate_rewards", "scoring_seconds")
    watch(trainer, "_forward", "rollout_forward_seconds")  # policy, critic and reference
    watch(trainer, "compute_loss", "forward_seconds")
    watch(trainer.accelerator, "backward", "backward_seconds")
    return seconds


def build(folder: Path, name: str, problem: Problem, graph_decoding: bool = False) -> PPOTrainer:
    """The trainer on what `create` wrote to the folder."""
    torch.manual_seed(problem.seed)
    words = tokenizer(problem.vocab_size)
    prompts = read_prompts(folder, words)
    config = PPOConfig(
        output_dir=str(folder / name),
        num_updates=100_000,
        num_ppo_epochs=problem.passes,
        num_mini_batches=problem.mini_batches,
        per_device_train_batch_size=problem.micro_batch,
        rollout_forward_batch_size=64,  # what TRL 1.12's is unless set
        gradient_accumulation_steps=problem.accumulation,
        max_completion_length=problem.completion_tokens,
        learning_rate=problem.learning_rate,
        lr_scheduler_type="constant",
        beta=problem.kl_coef,
        share_trunk=problem.share_trunk,
        missing_eos_penalty=0.0,
        graph_decoding=graph_decoding,
        seed=problem.seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.cuda.is_available(),
        bf16=torch.cuda.is_available(),
    )
    return PPOTrainer(
        model=str(folder / "policy"),
        reward_funcs=str(folder / "reward"),
        args=config,
        train_dataset=prompts,
        processing_class=words,
    )


def main(folder: Path, name: str) -> None:
    """Train until told to stop."""
    trainer: Any = build(folder, name, read(folder, name))
    phases = time_phases(trainer)

    def figures() -> dict[str, float]:
        score = trainer._metrics["train"]["score"][-1]
        tokens = float(trainer._rollout.lengths.sum())
        told = {"score": score, "kl": trainer.rollout_kl, "tokens": tokens, **phases}
        phases.clear()
        return told

    trainer.add_callback(Pace(figures, trainer.args.steps_per_update))
    trainer.train()


def read_prompts(folder: Path, words: Any) -> Dataset:
    """The prompts' ids as text, which the trainer tokenizes again."""
    rows = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    return Dataset.from_dict({"prompt": [words.decode(ids) for ids in rows]})


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
