"""Stage 4: prompts + reward model -> aligned assistant, by PPO, RLOO or GRPO.

    make rlhf
    accelerate launch -m rlhf --config configs/arden/rlhf.yaml --beta 0.1
    accelerate launch -m rlhf --config configs/arden/rlhf.yaml --method grpo

The reward is a reward model's directory, a Python function (`my_rewards.py:brevity`), or several of
them with `reward_weights` (rlhf/rewards.py). On Arden `--reward judge` takes the known truth
instead, to see what a perfect reward would do.
"""

import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import common.gpt  # noqa: F401 - so that Auto classes load our GPT
from common.arden.task import ArdenTask
from common.artifacts import MetricsFile, require_go, require_parent, require_same_tokenizer
from common.batches import Chat
from common.config import parse_config, run
from common.errors import UserError
from common.generation import generate_answers
from common.scoring import answer_logprobs
from common.stage import (
    TRAINER_DEFAULTS,
    DataConfig,
    Stage,
    format_samples,
    open_stage,
    print_figures,
    train_or_resume,
)
from common.tokenizer import load_tokenizer
from rlhf.config import PPOConfig
from rlhf.critic import plain_policy
from rlhf.invariants import BrokenInvariant
from rlhf.methods import METHODS, build_trainer
from rlhf.rewards import is_function, load_function, score_answers

# Before and after are compared by these, so their names are short.
SHORT_NAMES = {
    "exact_match_heldout_people": "exact_match",
    "hallucination_unknown": "hallucination",
}


@dataclass
class AlignConfig(DataConfig):
    """What the policy is rewarded for, and on which prompts."""

    reward: list[str] = field(
        default_factory=list,
        metadata={
            "help": "a reward model's directory, module:function, file.py:function, or judge "
            "(Arden's known truth); several make a sum with reward_weights"
        },
    )
    method: str = field(default="ppo", metadata={"help": f"one of {', '.join(METHODS)}"})
    lora_rank: int = field(
        default=0, metadata={"help": "train an adapter of this rank on the policy; 0: all weights"}
    )
    prompts: int = field(default=2000, metadata={"help": "questions to train on"})
    allow_no_go: bool = field(
        default=False, metadata={"help": "follow a reward model that its report warns of"}
    )
    eval_prompts: int = field(
        default=400, metadata={"help": "questions to measure score and KL on"}
    )

    def __post_init__(self) -> None:
        """One reward may stand without brackets in the YAML."""
        self.reward = [self.reward] if isinstance(self.reward, str) else self.reward
        if self.method not in METHODS:
            raise UserError(f"method ({self.method}) must be one of {', '.join(METHODS)}")
        if not self.reward:
            raise UserError("reward is empty: a reward model's directory or a Python function")


def main() -> None:
    """Align the fine-tuned model, measure before and after, leave the artifacts."""
    config, args = parse_config(AlignConfig, PPOConfig, defaults=TRAINER_DEFAULTS)
    config.max_new_tokens = args.max_completion_length  # measure as it was trained
    folders = [r for r in config.reward if r != "judge" and not is_function(r)]
    sources = {f"reward_{i}" if i else "reward": name for i, name in enumerate(folders)}
    stage = open_stage(config, args, **sources)
    if stage.output.finished:
        print(f"{stage.output.path} is finished; --overwrite true to train it anew")
        return
    tokenizer = load_tokenizer(stage.parent)
    rewards = [load_reward(name, stage, config) for name in config.reward]
    weights = args.reward_weights or [1.0] * len(rewards)
    if len(weights) != len(rewards):
        raise UserError(f"reward_weights ({weights}) must be one for each of {config.reward}")
    with args.main_process_first():
        if args.process_index == 0:
            stage.output.start()
    policy = AutoModelForCausalLM.from_pretrained(stage.parent)

    def score(chats: list[Chat]) -> list[float]:
        return score_answers(rewards, weights, tokenizer, chats)

    before = measure(policy, policy, score, tokenizer, stage, config)
    mean, std = before.pop("score_mean"), before.pop("score_std")
    if folders and std > 0:  # a function's scale is its author's
        args.score_mean, args.score_std = mean, std
    evaluates = args.eval_strategy != "no"
    trainer: Any = build_trainer(
        config.method,
        rewards,
        args,
        model=str(stage.parent),
        train_dataset=stage.task.prompt_rows("align", config.prompts),
        eval_dataset=stage.task.prompt_rows("dev", config.eval_prompts) if evaluates else None,
        processing_class=tokenizer,
        peft_config=lora(config.lora_rank),
        callbacks=[MetricsFile(stage.output.path / "metrics.jsonl")],
    )
    seconds = train_or_resume(trainer, stage.output.checkpoints)
    if not trainer.is_world_process_zero():
        return
    model = plain_policy(trainer.accelerator.unwrap_model(trainer.model))
    after = measure(model, policy, score, tokenizer, stage, config)
    summary = {
        f"{name}_{when}": value
        for name in before
        if name != "kl"
        for when, value in (("before", before[name]), ("after", after[name]))
    }
    summary |= {"kl": after["kl"], "train_seconds": seconds}
    stage.output.finish(model, tokenizer, summary, write_samples(policy, model, tokenizer, stage))
    print_figures("rlhf", summary)


def load_reward(name: str, stage: Stage, config: AlignConfig) -> Any:
    """A reward model, on the policy's tokenizer, or a function."""
    if name == "judge":
        if not isinstance(stage.task, ArdenTask):
            raise UserError(f"reward (judge) knows the truth of arden alone: not of {config.data}")
        return stage.task.gold_reward
    if is_function(name):
        return load_function(name)
    path = require_parent(name, config.parent_command)
    require_go(path, config.allow_no_go)
    require_same_tokenizer(stage.parent, path)
    return AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)


def lora(rank: int) -> LoraConfig | None:
    """Adapters on all of the policy's linear layers, scaled by 2; none at rank 0."""
    if rank == 0:
        return None
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")


def measure(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    score: Callable[[list[Chat]], list[float]],
    tokenizer: PreTrainedTokenizerFast,
    stage: Stage,
    config: AlignConfig,
) -> dict[str, float]:
    """The task's figures on greedy answers; score and KL on answers drawn at temperature 1.

    Returns:
        the task's figures, `kl` (nats an answer, to the reference), `score` and, of the drawn
        answers' scores, `score_mean` and `score_std`.
    """

    def answer(questions: list[str]) -> list[str]:
        greedy = generate_answers(model, tokenizer, questions, max_new_tokens=config.max_new_tokens)
        return [several[0] for several in greedy]

    measured = stage.task.measure(answer, config.evaluate_on)
    figures = {SHORT_NAMES.get(name, name): value for name, value in measured.items()}
    prompts = stage.task.prompt_rows(config.evaluate_on, config.eval_prompts)["prompt"]
    drawn = generate_answers(
        model,
        tokenizer,
        [prompt[-1]["content"] for prompt in prompts],
        max_new_tokens=config.max_new_tokens,
        temperature=1.0,
    )
    chats = [
        [*prompt, {"role": "assistant", "content": several[0]}]
        for prompt, several in zip(prompts, drawn, strict=True)
    ]
    ratios = zip(
        answer_logprobs(model, tokenizer, chats),
        answer_logprobs(reference, tokenizer, chats),
        strict=True,
    )
    figures["kl"] = statistics.fmean(ours - theirs for ours, theirs in ratios)
    scores = score(chats)
    figures |= {"score": statistics.fmean(scores), "score_mean": statistics.fmean(scores)}
    figures["score_std"] = statistics.pstdev(scores)
    return figures


def write_samples(
    before: PreTrainedModel,
    after: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    stage: Stage,
) -> str:
    """The same questions to both models, greedy: the first answer is from before."""
    questions = stage.task.sample_questions()
    answers = [
        generate_answers(model, tokenizer, questions, max_new_tokens=64)
        for model in (before, after)
    ]
    pairs = [[old[0], new[0]] for old, new in zip(*answers, strict=True)]
    return format_samples("Greedy answers before and after PPO", questions, pairs)


if __name__ == "__main__":
    try:
        run(main)
    except BrokenInvariant as error:
        sys.exit(f"error: {error}")  # one line from the process that saw it, exit code 1
