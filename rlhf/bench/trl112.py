"""TRL 1.12's `PPOTrainer` on the bench's problem, run by an interpreter that has it.

    cd folio; path/to/python -m rlhf.bench.trl112 FOLDER NAME

Its stop token is end-of-text, its temperature 1, as ours; what is not set here is its default.
"""

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl.experimental.ppo import PPOConfig, PPOTrainer

from rlhf.bench.pace import Pace
from rlhf.bench.problem import read, tokenizer


def main(folder: Path, name: str) -> None:
    """Train until told to stop."""
    problem = read(folder, name)
    rows = json.loads((folder / "prompts.json").read_text(encoding="utf-8"))
    config = PPOConfig(
        output_dir=str(folder / name),
        total_episodes=100_000 * problem.completions,
        num_ppo_epochs=problem.passes,
        num_mini_batches=problem.mini_batches,
        per_device_train_batch_size=problem.micro_batch,
        gradient_accumulation_steps=problem.accumulation,
        response_length=problem.completion_tokens,
        stop_token="eos",
        temperature=1.0,
        learning_rate=problem.learning_rate,
        lr_scheduler_type="constant",
        kl_coef=problem.kl_coef,
        seed=problem.seed,
        num_sample_generations=0,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
    )
    reward: Any = AutoModelForSequenceClassification.from_pretrained
    policy: Any = AutoModelForCausalLM.from_pretrained
    trainer: Any = PPOTrainer(
        args=config,
        processing_class=tokenizer(problem.vocab_size),
        model=policy(folder / "policy"),
        ref_model=policy(folder / "policy"),
        reward_model=reward(folder / "reward"),
        value_model=reward(folder / "reward"),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        eval_dataset=Dataset.from_dict({"input_ids": rows[:1]}),
    )

    def figures() -> dict[str, float]:
        line = trainer.state.log_history[-1]
        return {"score": line["objective/scores"], "kl": line["objective/kl"]}

    trainer.add_callback(Pace(figures))
    trainer.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
