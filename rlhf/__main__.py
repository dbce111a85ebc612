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
from common.generation import draw_chats, generate_answers
from common.pretraining_text import PretrainingText
from common.sharded import whole_model
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
from rlhf.measure import measure, measure_best_of, measured_rows
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
    sources = {f"reward_{i}" if i else "reward": path for i, path in enumerate(config.models)}
    hashes = {name: hash_function(name) for name in config.reward if is_function(name)}
    if args.ptx_coef and config.method != "ppo":
        if args.process_index == 0:
            print(f"rlhf: the loss on pretraining text is PPO's, {config.method} goes without")
        args.ptx_coef, args.ptx_data = 0.0, None
    if args.ptx_coef:
        hashes["ptx_data"] = TokenFile(args.ptx_data).info.sha256
    stage = open_stage(config, args, hashes, **sources)
    require_kind(stage.parent, scores=False)
    if stage.output.says_finished():
        return
    tokenizer = load_tokenizer(stage.parent)
    rewards = load_rewards(config, stage.task, stage.parent, tokenizer, args.device)
    weights = weigh(config.reward_names, args.reward_weights)
    policy = AutoModelForCausalLM.from_pretrained(stage.parent, dtype=torch.float32).to(args.device)
    if args.ptx_coef:  # refused now, if it is not the policy's text, and not after measuring
        context = policy.config.max_position_embeddings
        PretrainingText(args.ptx_data, args.ptx_windows, context, args.seed, tokenizer)
    prompts = align_prompts(stage.task, stage.parent, tokenizer, config, "align", config.prompts)
    check_run(config.method, rewards, args, policy, tokenizer, prompts)
    rows = [*prompts, *measured_rows(stage.task, stage.parent, tokenizer, config)]
    score = make_scorer(rewards, weights, tokenizer, rows)
    # the scale of scores is of prompts to train on: what is measured on is not looked at
    asked = list(prompts.shuffle(seed=0)["prompt"])[: config.eval_prompts]
    known = known_scores(score(draw_chats(policy, tokenizer, asked, config.max_new_tokens)))
    if not known:
        raise UserError(f"reward ({', '.join(config.reward)}) has no number for any answer")
    with args.main_process_first():
        if args.process_index == 0:
            stage.output.start()
    pairs = zip(rewards, weights, strict=True)
    models = [reward for reward, weight in pairs if weight and is_model(reward)]
    std = statistics.pstdev(known) if models else None  # a function's scale is its author's
    args.scale_scores(statistics.fmean(known), std)
    before = measure(policy, policy, score, tokenizer, stage, config)
    evaluates = args.eval_strategy != "no"
    if args.process_index == 0:
        room = f"{config.max_new_tokens} tokens of answer"
        print(f"rlhf: {len(prompts):,} prompts leave room for {room}")
    trainer: Any = build_trainer(
        config.method,
        rewards,
        args,
        model=str(stage.parent),
        train_dataset=prompts,
        eval_dataset=align_prompts(
            stage.task, stage.parent, tokenizer, config, "dev", config.eval_prompts
        )
        if evaluates
        else None,
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
    summary = {
        f"{name}_{when}": value
        for name in before
        if name != "kl"
        for when, value in (("before", before[name]), ("after", after[name]))
    }
    if config.best_of:
        summary |= measure_best_of(config.best_of, policy, score, tokenizer, stage, config)
    summary |= {"kl": after["kl"], "train_seconds": seconds}
    questions = questions_to_show(stage.task, tokenizer, policy, config.max_new_tokens)
    samples = write_samples(policy, model, tokenizer, questions, config.max_new_tokens)
    model.generation_config = policy.generation_config  # as it came, for whoever samples it next
    stage.output.finish(model, tokenizer, summary, samples)
    print_figures("rlhf", summary)


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
