"""Stage 4: prompts + reward model -> aligned assistant, by PPO.

    make rlhf
    accelerate launch -m rlhf --config configs/arden/rlhf.yaml --beta 0.1

The reward is a reward model's directory; on Arden `--reward judge` takes the known truth instead,
to see what a perfect reward would do.
"""

import statistics
import sys
from dataclasses import dataclass, field
from typing import Any

from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import common.gpt  # noqa: F401 - so that Auto classes load our GPT
from common.arden.task import ArdenTask
from common.artifacts import MetricsFile, require_go, require_parent, require_same_tokenizer
from common.config import parse_config, run
from common.errors import UserError
from common.generation import generate_answers
from common.scoring import answer_logprobs, score_chats
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
from rlhf.invariants import BrokenInvariant
from rlhf.trainer import PPOTrainer

# Before and after are compared by these, so their names are short.
SHORT_NAMES = {
    "exact_match_heldout_people": "exact_match",
    "hallucination_unknown": "hallucination",
}


@dataclass
class AlignConfig(DataConfig):
    """What the policy is rewarded for, and on which prompts."""

    reward: str = field(
        default="", metadata={"help": "a reward model's directory, or judge (Arden's known truth)"}
    )
    prompts: int = field(default=2000, metadata={"help": "questions to train on"})
    allow_no_go: bool = field(
        default=False, metadata={"help": "follow a reward model that its report warns of"}
    )
    eval_prompts: int = field(
        default=400, metadata={"help": "questions to measure score and KL on"}
    )


def main() -> None:
    """Align the fine-tuned model, measure before and after, leave the artifacts."""
    config, args = parse_config(AlignConfig, PPOConfig, defaults=TRAINER_DEFAULTS)
    config.max_new_tokens = args.max_completion_length  # measure as it was trained
    judged = config.reward == "judge"
    stage = open_stage(config, args, **({} if judged else {"reward": config.reward}))
    if stage.output.finished:
        print(f"{stage.output.path} is finished; --overwrite true to train it anew")
        return
    reward: Any = config.reward
    if judged:
        if not isinstance(stage.task, ArdenTask):
            raise UserError(f"reward (judge) knows the truth of arden alone: not of {config.data}")
        reward = stage.task.gold_reward
    tokenizer = load_tokenizer(stage.parent)
    reward_model = None
    if not judged:
        path = require_parent(config.reward, config.parent_command)
        require_go(path, config.allow_no_go)
        require_same_tokenizer(stage.parent, path)
        reward_model = AutoModelForSequenceClassification.from_pretrained(path)
    with args.main_process_first():
        if args.process_index == 0:
            stage.output.start()
    policy = AutoModelForCausalLM.from_pretrained(stage.parent)
    before = measure(policy, policy, reward_model, tokenizer, stage, config)
    if reward_model is not None:
        args.score_mean, args.score_std = before.pop("score_mean"), before.pop("score_std")
    trainer = PPOTrainer(
        model=str(stage.parent),
        reward_funcs=reward,
        args=args,
        train_dataset=stage.task.prompt_rows("align", config.prompts),
        processing_class=tokenizer,
        callbacks=[MetricsFile(stage.output.path / "metrics.jsonl")],
    )
    seconds = train_or_resume(trainer, stage.output.checkpoints)
    if not trainer.is_world_process_zero():
        return
    model = trainer.policy_model()
    after = measure(model, policy, reward_model, tokenizer, stage, config)
    summary = {
        f"{name}_{when}": value
        for name in before
        if name != "kl"
        for when, value in (("before", before[name]), ("after", after[name]))
    }
    summary |= {"kl": after["kl"], "train_seconds": seconds}
    stage.output.finish(model, tokenizer, summary, write_samples(policy, model, tokenizer, stage))
    print_figures("rlhf", summary)


def measure(
    model: PreTrainedModel,
    reference: PreTrainedModel,
    reward_model: PreTrainedModel | None,
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
    if reward_model is not None:
        scores = score_chats(reward_model, tokenizer, chats)
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
