"""Stage 4: prompts + reward model -> aligned assistant, by PPO, RLOO, GRPO or DPO.

    make rlhf
    accelerate launch -m rlhf --config configs/arden/rlhf.yaml --beta 0.1
    accelerate launch -m rlhf --config configs/arden/rlhf.yaml --method grpo

The reward is a reward model's directory, a Python function (`my_rewards.py:brevity`), or several of
them with `reward_weights` (rlhf/rewards.py). On Arden `--reward judge` takes the known truth
instead, to see what a perfect reward would do.
"""

import statistics
import sys
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

import common.gpt  # noqa: F401 - so that Auto classes load our GPT
from common.artifacts import MetricsFile, require_kind
from common.config import parse_config, run
from common.errors import UserError
from common.generation import draw_each, generate_answers
from common.pretraining_text import PretrainingText, require_windows
from common.sharded import whole_model, will_shard
from common.stage import (
    TRAINER_DEFAULTS,
    format_samples,
    open_stage,
    print_figures,
    questions_to_show,
    train_or_resume,
)
from common.token_file import TokenFile
from common.tokenizer import load_tokenizer
from rlhf.align import AlignConfig, align_prompts, load_rewards, lora, measure_as_trained
from rlhf.config import PPOConfig
from rlhf.critic import plain_policy
from rlhf.invariants import BrokenInvariant
from rlhf.measure import measure, measure_best_of
from rlhf.methods import build_trainer, check_run
from rlhf.rewards import (
    hash_function,
    is_function,
    is_model,
    known_scores,
    make_scorer,
    weigh,
)


def main() -> None:
    """Align the fine-tuned model, measure before and after, leave the artifacts."""
    config, args = parse_config(AlignConfig, PPOConfig, defaults=TRAINER_DEFAULTS)
    measure_as_trained(config, args)
    check_ptx(config, args)
    sources = {f"reward_{i}" if i else "reward": path for i, path in enumerate(config.models)}
    stage = open_stage(config, args, hash_functions_and_text(config, args), **sources)
    require_kind(stage.parent, scores=False)
    if stage.output.says_finished():
        return
    tokenizer = load_tokenizer(stage.parent)
    batch_size, device = args.reading_batch_size, args.device
    rewards = load_rewards(config, stage.task, stage.parent, tokenizer, batch_size, device)
    weights = weigh(config.reward_names, args.reward_weights)
    policy = AutoModelForCausalLM.from_pretrained(stage.parent, dtype=torch.float32).to(device)
    if args.ptx_coef:  # refused now, if it is not the policy's text, and not after measuring
        context = policy.config.max_position_embeddings
        PretrainingText(args.ptx_data, args.ptx_windows, context, args.seed, tokenizer)
    prompts = align_prompts(stage.task, stage.parent, tokenizer, config, "align", config.prompts)
    check_run(config.method, rewards, args, policy, tokenizer, prompts)
    score = make_scorer(rewards, weights, tokenizer, batch_size, device)
    rows = list(prompts.shuffle(seed=0))[: config.eval_prompts]
    asked = [row["prompt"] for row in rows]
    scores = score(rows, draw_each(policy, tokenizer, asked, config.max_new_tokens))
    set_scale(scores, rewards, weights, config, args)
    with args.main_process_first():
        if args.process_index == 0:
            stage.output.start()
    before = measure(policy, policy, score, tokenizer, stage, config)
    if args.process_index == 0:
        room = f"{config.max_new_tokens} tokens of answer"
        print(f"rlhf: {len(prompts):,} prompts leave room for {room}")
    wanted = stage.task, stage.parent, tokenizer, config, "dev", config.eval_prompts
    trainer: Any = build_trainer(
        config.method,
        rewards,
        args,
        model=str(stage.parent),
        train_dataset=prompts,
        eval_dataset=align_prompts(*wanted) if args.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=lora(config.lora_r),
        callbacks=[MetricsFile(stage.output.path / "metrics.jsonl")],
    )
    seconds = train_or_resume(trainer, stage.output.checkpoints)
    trained = whole_model(trainer.accelerator, trainer.model)
    if not trainer.is_world_process_zero():
        return
    model = plain_policy(trained)
    after = measure(model, policy, score, tokenizer, stage, config)
    summary = compare(before, after)
    if config.best_of:
        summary |= measure_best_of(config.best_of, policy, score, tokenizer, stage, config)
    summary |= {"kl": after["kl"], "train_seconds": seconds}
    questions = questions_to_show(stage.task, tokenizer, policy, config.max_new_tokens)
    samples = write_samples(policy, model, tokenizer, questions, config.max_new_tokens)
    model.generation_config = policy.generation_config  # as it came, for whoever samples it next
    stage.output.finish(model, tokenizer, summary, samples)
    print_figures("rlhf", summary)


def check_ptx(config: AlignConfig, args: PPOConfig) -> None:
    """Leave the loss on pretraining text out of other methods, which have none.

    Raises:
        UserError: PPO has too few windows of it for processes that share the weights.
    """
    if args.ptx_coef and config.method != "ppo":
        if args.process_index == 0:
            print(f"rlhf: the loss on pretraining text is PPO's, {config.method} goes without")
        args.ptx_coef, args.ptx_data = 0.0, None
    if args.ptx_coef and will_shard():
        require_windows(args.ptx_windows, args.world_size * args.gradient_accumulation_steps)


def hash_functions_and_text(config: AlignConfig, args: PPOConfig) -> dict[str, str]:
    """What the stage reads beside models and prompts: reward functions and pretraining text."""
    hashes = {name: hash_function(name) for name in config.reward if is_function(name)}
    if args.ptx_coef:
        hashes["ptx_data"] = TokenFile(str(args.ptx_data)).info.sha256
    return hashes


def set_scale(
    scores: list[float],
    rewards: list[Any],
    weights: list[float],
    config: AlignConfig,
    args: PPOConfig,
) -> None:
    """Take the scale of scores from those of the starting policy's answers.

    Args:
        scores: of prompts to train on: what is measured on is not looked at.
        rewards, weights: by what they were given.
        config: names the rewards, for the message.
        args: PPO's configuration, whose scale is set.

    Raises:
        UserError: none is a number.
    """
    known = known_scores(scores)
    if not known:
        raise UserError(f"reward ({', '.join(config.reward)}) has no number for any answer")
    pairs = zip(rewards, weights, strict=True)
    by_model = any(weight and is_model(reward) for reward, weight in pairs)
    std = statistics.pstdev(known) if by_model else None  # a function's scale is its author's
    args.scale_scores(statistics.fmean(known), std)


def compare(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """`<figure>_before` and `<figure>_after` of every figure but `kl`, which is 0 before."""
    return {
        f"{name}_{when}": figures[name]
        for name in before
        if name != "kl"
        for when, figures in (("before", before), ("after", after))
    }


def write_samples(
    before: PreTrainedModel,
    after: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    questions: list[str],
    max_new_tokens: int,
) -> str:
    """The same questions to both models, greedy: the first answer is from before."""
    answers = [
        generate_answers(model, tokenizer, questions, max_new_tokens=max_new_tokens)
        for model in (before, after)
    ]
    pairs = [[old[0], new[0]] for old, new in zip(*answers, strict=True)]
    return format_samples("Greedy answers before and after alignment", questions, pairs)


if __name__ == "__main__":
    try:
        run(main)
    except BrokenInvariant as error:
        sys.exit(f"error: {error}")  # one line from the process that saw it, exit code 1
