"""RLOO, GRPO and DPO in PPO's place: TRL's trainers on the same policy, prompts and rewards.

    accelerate launch -m rlhf --config configs/arden/rlhf.yaml --method grpo

RLOO and GRPO sample several completions a prompt and take their mean score as the baseline, where
PPO asks a critic (RLOO: arXiv 2402.14740; GRPO: 2402.03300). A rollout has as many completions as
PPO's and as many optimizer steps are taken on it; with `num_generations` completions a prompt it
has fewer prompts. RLOO takes the KL penalty off the reward as PPO does, GRPO adds it to the loss.

DPO (2305.18290) samples once, before training: of `num_generations` answers of the starting policy
the reward picks the best and the worst, and these pairs are trained on, as many a step as PPO has
completions, at `dpo_learning_rate`. An answer that was cut off passes for a finished one there.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, Trainer
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.data_utils import is_conversational

from common.config import refusing
from common.errors import UserError
from common.rows import assistant
from rlhf.callbacks import UpdateBoundary
from rlhf.chooser import Chooser, Row
from rlhf.config import PPOConfig
from rlhf.critic import check_critic, check_plain_logits
from rlhf.prompts import EpochSampler, check_inputs, epoch_sampler, require_rollout
from rlhf.rewards import find_scorable, is_model, make_scorer, tell_apart, weigh
from rlhf.sampling import sample_fast
from rlhf.score import as_function, turn_suffix
from rlhf.trainer import PPOTrainer

METHODS = ("ppo", "rloo", "grpo", "dpo")
CONFIGS: dict[str, Any] = {"rloo": RLOOConfig, "grpo": GRPOConfig, "dpo": DPOConfig}
GENERATIONS = 4  # completions a prompt, unless the configuration says more than one
# Named alike in PPO's configuration, but with its own default or meaning there
OWN_DEFAULTS = {"normalize_advantages", "generation_batch_size", "num_generations_eval"}


class LikePPO:
    """What RLOO and GRPO do here as PPO does, and TRL otherwise; a mixin of its trainers.

    They draw prompts in PPO's order, and leave out a completion that no reward of any weight has a
    number for. The last reward function is `missing_eos`.
    """

    reward_weights: Tensor
    model: Any
    state: Any

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        return epoch_sampler(self, dataset)

    def _calculate_rewards(self, *inputs: Any) -> Tensor:
        """(N, F), the whole row NaN, which TRL leaves out, where no reward has a number."""
        rewards: Tensor = super()._calculate_rewards(*inputs)  # type: ignore[misc]
        weights = self.reward_weights.to(rewards)
        scorable = find_scorable(rewards[:, :-1], weights[:-1])
        if self.model.training and not scorable.any():
            step = self.state.global_step + 1
            raise UserError(f"step {step}: no reward has a number for any of its answers")
        rewards[~scorable] = math.nan
        return rewards


class RLOO(LikePPO, RLOOTrainer):
    """TRL's, on PPO's prompts and rewards."""


class GRPO(LikePPO, GRPOTrainer):
    """TRL's, on PPO's prompts and rewards."""


def trl_config(args: PPOConfig, method: str) -> Any:
    """PPO's configuration as TRL's for another method: what has the same name is the same.

    Raises:
        UserError: TRL's trainer refuses it.
    """
    kind = CONFIGS[method]
    names = {f.name for f in dataclasses.fields(kind) if f.init} - OWN_DEFAULTS
    shared = [f.name for f in dataclasses.fields(args) if f.init and f.name in names]
    values: dict[str, Any] = {name: getattr(args, name) for name in shared}
    if "num_generations" in names:
        values["num_generations"] = several_generations(args)
    with refusing(f"method {method}, num_generations {values.get('num_generations')}: "):
        return kind(**values)


def several_generations(args: PPOConfig) -> int:
    """Completions a prompt where one alone tells nothing."""
    return GENERATIONS if args.num_generations == 1 else args.num_generations


def missing_eos(eos_token_id: int) -> Any:
    """A reward function: -1 for a completion that was cut off, 0 for one that ended."""

    def missing_eos(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return [0.0 if ids[-1] == eos_token_id else -1.0 for ids in completion_ids]

    return missing_eos


def check_run(
    method: str,
    rewards: Sequence[Any],
    args: PPOConfig,
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
) -> None:
    """Refuse, before any work, what the method's trainer would refuse late or do wrong.

    Args:
        method, rewards, args: as of `build_trainer`.
        policy, tokenizer: the model that is trained, and its own.
        prompts: rows to train on.

    Raises:
        UserError: says what, and what would do.
    """
    if args.load_best_model_at_end:
        measures = [
            f"eval_rewards/{name}/mean"
            for name, weight in zip(
                tell_apart(rewards), weigh(rewards, args.reward_weights), strict=True
            )
            if weight == 0
        ]
        if args.metric_for_best_model not in measures:
            raise UserError(
                f"metric_for_best_model ({args.metric_for_best_model}) must be of a reward that is "
                f"not trained on, of weight 0 in reward_weights; there are: {measures}"
            )
    if method == "ppo":
        weights = weigh(rewards, args.reward_weights)
        pairs = zip(rewards, weights, strict=True)
        if not args.share_trunk and not any(
            weight and is_model(reward) for reward, weight in pairs
        ):
            check_critic(policy)
        check_plain_logits(policy)
        check_inputs(policy.config.name_or_path, args, prompts, tokenizer)
        return
    for name in ("kl_budget", "target_kl"):
        if getattr(args, name) is not None:
            given = getattr(args, name)
            raise UserError(f"{name} ({given}) is PPO's alone: leave it out of {method}")
    config = trl_config(args, method)
    if method != "dpo":
        require_rollout(config, prompts)
    elif args.eval_strategy != "no":
        raise UserError(f"eval_strategy ({args.eval_strategy}) needs rollouts: leave it out of dpo")


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
    if method == "dpo":
        return build_dpo(rewards, args, **rest)
    tokenizer = rest["processing_class"]
    weights = [w / args.score_scale[1] for w in weigh(rewards, args.reward_weights)]
    batch_size, device = args.reading_batch_size, args.device
    conversational = is_conversational(rest["train_dataset"][0])
    suffix = turn_suffix(tokenizer) if conversational else []
    functions = [as_function(f, tokenizer, suffix, batch_size, device) for f in rewards]
    functions.append(missing_eos(tokenizer.eos_token_id))
    config = trl_config(args, method)
    config.reward_weights = [*weights, args.missing_eos_penalty]
    config.reward_clip_range = None
    trainer_class: Any = RLOO if method == "rloo" else GRPO
    trainer = trainer_class(reward_funcs=functions, args=config, **rest)
    trainer.reward_func_names = [*tell_apart(rewards), "missing_eos"]
    trainer.add_callback(UpdateBoundary(args.steps_per_update))
    sample_fast(trainer, args.graph_decoding)
    return trainer


def build_dpo(rewards: list[Any], args: PPOConfig, train_dataset: Dataset, **rest: Any) -> Trainer:
    """DPO on the best and the worst of the starting policy's answers to the prompts."""
    tokenizer, weights = rest["processing_class"], weigh(rewards, args.reward_weights)
    policy: Any = AutoModelForCausalLM.from_pretrained(rest["model"], dtype=torch.float32)
    chooser = Chooser(
        policy.to(args.device),
        tokenizer,
        make_scorer(rewards, weights, tokenizer, args.reading_batch_size, args.device),
        several_generations(args),
        int(args.max_completion_length or 0),
    )
    pairs = preferences(chooser, list(train_dataset))
    config = trl_config(args, "dpo")
    config.learning_rate = args.dpo_learning_rate or args.learning_rate
    config.max_length = None  # prompts that leave no room for an answer are left out already
    return DPOTrainer(args=config, train_dataset=pairs, **rest)


def preferences(chooser: Chooser, rows: list[Row]) -> Dataset:
    """`prompt`, `chosen`, `rejected` of each row: its best and worst draw, unless they tie.

    A draw that no reward has a number for is neither; two of one text, in other tokens, tie.
    """
    pairs = []
    chooser.draw(rows)
    for row in rows:
        answers, scores = chooser.all_of(row)
        known = [place for place, score in enumerate(scores) if not math.isnan(score)]
        best = max(known, key=scores.__getitem__, default=0)
        worst = min(known, key=scores.__getitem__, default=0)
        if scores[best] > scores[worst] and answers[best] != answers[worst]:
            pairs.append(
                {
                    "prompt": row["prompt"],
                    "chosen": [assistant(answers[best])],
                    "rejected": [assistant(answers[worst])],
                }
            )
    if not pairs:
        raise UserError("dpo: the reward scores all answers to each prompt alike, nothing to learn")
    return Dataset.from_list(pairs)
