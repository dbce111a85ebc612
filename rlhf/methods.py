"""RLOO, GRPO and DPO in PPO's place: TRL's trainers on the same policy, prompts and rewards.

    accelerate launch -m rlhf --config configs/arden/rlhf.yaml --method grpo

RLOO and GRPO sample several completions a prompt and take their mean score as the baseline, where
PPO asks a critic (RLOO: arXiv 2402.14740; GRPO: 2402.03300). A rollout has as many completions as
PPO's and as many optimizer steps are taken on it; with `num_generations` completions a prompt it
has fewer prompts. RLOO takes the KL penalty off the reward as PPO does, GRPO adds it to the loss.

DPO (2305.18290) samples once, before training: of `num_generations` answers of the starting policy
the reward picks the best and the worst, and these pairs are trained on, as many a step as PPO has
completions. An answer that was cut off passes for a finished one there.
"""

import dataclasses
import math
from functools import partial
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.data_utils import is_conversational

from common.batches import Chat
from common.errors import UserError
from rlhf.chooser import Chooser
from rlhf.config import PPOConfig
from rlhf.prompts import epoch_sampler
from rlhf.rewards import further_columns, score_answers, weigh
from rlhf.sampling import sample_fast
from rlhf.score import as_function, turn_suffix
from rlhf.trainer import PPOTrainer

METHODS = ("ppo", "rloo", "grpo", "dpo")
GENERATIONS = 4  # completions a prompt, unless the configuration says more than one
# Named alike in PPO's configuration, but with its own default or meaning there
OWN_DEFAULTS = {"normalize_advantages", "generation_batch_size", "num_generations_eval"}


def trl_config(args: PPOConfig, kind: Any) -> Any:
    """PPO's configuration as TRL's: what has the same name is the same."""
    names = {f.name for f in dataclasses.fields(kind) if f.init} - OWN_DEFAULTS
    shared = [f.name for f in dataclasses.fields(args) if f.init and f.name in names]
    values: dict[str, Any] = {name: getattr(args, name) for name in shared}
    if args.num_generations == 1 and "num_generations" in names:
        values["num_generations"] = GENERATIONS
    return kind(**values)


def missing_eos(eos_token_id: int) -> Any:
    """A reward function: -1 for a completion that was cut off, 0 for one that ended."""

    def missing_eos(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [0.0 if ids[-1] == eos_token_id else -1.0 for ids in completion_ids]

    return missing_eos


def build_trainer(method: str, rewards: list[Any], args: PPOConfig, **rest: Any) -> Trainer:
    """The trainer of a method, on rewards as PPO sees them.

    PPO divides scores by `score_std` and takes `missing_eos_penalty` off what was cut off; here
    weights do both. Its shift by `score_mean` has no effect under a baseline of the prompt's own,
    and for want of it nothing is clipped: that would be around 0 and not around the mean.

    Args:
        method: one of `METHODS`.
        rewards: reward models and functions, weighted by `args.reward_weights`.
        args: PPO's configuration, whatever the method.
        rest: the trainer's other arguments: model, train_dataset, processing_class, ...
    """
    if method == "ppo":
        return PPOTrainer(reward_funcs=rewards, args=args, **rest)
    for name in ("kl_budget", "target_kl"):
        if getattr(args, name) is not None:
            given = getattr(args, name)
            raise UserError(f"{name} ({given}) is PPO's alone: leave it out of {method}")
    if method == "dpo":
        return build_dpo(rewards, args, **rest)
    tokenizer = rest["processing_class"]
    weights = [w / args.score_scale[1] for w in weigh(rewards, args.reward_weights)]
    batch_size, device = args.per_device_train_batch_size, args.device
    conversational = is_conversational(rest["train_dataset"][0])
    suffix = turn_suffix(tokenizer) if conversational else []
    functions = [as_function(f, tokenizer, suffix, batch_size, device) for f in rewards]
    functions.append(missing_eos(tokenizer.eos_token_id))
    trainer_class: Any = RLOOTrainer if method == "rloo" else GRPOTrainer
    config: Any = trl_config(args, RLOOConfig if method == "rloo" else GRPOConfig)
    config.reward_weights = [*weights, args.missing_eos_penalty]
    config.reward_clip_range = None
    trainer = trainer_class(reward_funcs=functions, args=config, **rest)
    trainer._get_train_sampler = partial(epoch_sampler, trainer)
    sample_fast(trainer, args.graph_decoding)
    return trainer


def build_dpo(
    rewards: list[Any], args: PPOConfig, train_dataset: Dataset, eval_dataset: Any, **rest: Any
) -> Trainer:
    """DPO on the best and the worst of the starting policy's answers to the prompts."""
    if eval_dataset is not None:
        raise UserError(f"eval_strategy ({args.eval_strategy}) needs rollouts: leave it out of dpo")
    tokenizer, weights = rest["processing_class"], weigh(rewards, args.reward_weights)
    policy: Any = AutoModelForCausalLM.from_pretrained(rest["model"], dtype=torch.float32)
    chooser = Chooser(
        policy.to(args.device),
        tokenizer,
        lambda chats: score_answers(
            rewards, weights, tokenizer, chats, **further_columns(train_dataset, chats)
        ),
        GENERATIONS if args.num_generations == 1 else args.num_generations,
        int(args.max_completion_length or 0),
    )
    rows = preferences(chooser, list(train_dataset["prompt"]))
    return DPOTrainer(args=trl_config(args, DPOConfig), train_dataset=rows, **rest)


def preferences(chooser: Chooser, prompts: list[Chat]) -> Dataset:
    """`prompt`, `chosen`, `rejected` rows: a prompt's best and worst draw, unless they tie.

    A draw that no reward has a number for is neither.
    """
    rows = []
    chooser.best(prompts, 1)
    for prompt in prompts:
        answers, scores = chooser.all_of(prompt)
        known = [place for place, score in enumerate(scores) if not math.isnan(score)]
        best = max(known, key=scores.__getitem__, default=0)
        worst = min(known, key=scores.__getitem__, default=0)
        if scores[best] > scores[worst]:
            rows.append(
                {
                    "prompt": prompt,
                    "chosen": [{"role": "assistant", "content": answers[best]}],
                    "rejected": [{"role": "assistant", "content": answers[worst]}],
                }
            )
    if not rows:
        raise UserError("dpo: the reward scores all answers to each prompt alike, nothing to learn")
    return Dataset.from_list(rows)
