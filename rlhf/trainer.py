"""PPO with a learned critic, on TRL's `RLOOTrainer` (arXiv 1707.06347, 2203.02155).

TRL does prompts, sampling, Python reward functions, the reference model and, with transformers,
the loop, logs and checkpoints. Ours is what makes it PPO: scores on token ids, the KL penalty per
token, GAE, mini-batches and the clipped losses. One pass over an update:

    prompts -> completions -> scores, log-probs, values -> advantages -> mini-batches -> losses
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)
from trl import RLOOTrainer
from trl.data_utils import is_conversational
from trl.trainer.utils import use_adapter

from common.errors import UserError
from rlhf.advantage import (
    gae,
    masked_moments,
    mean_and_variance,
    normalise_scores,
    token_rewards,
    whiten,
)
from rlhf.callbacks import UpdateBoundary
from rlhf.config import PPOConfig
from rlhf.critic import (
    attach_critic,
    build_critic,
    check_plain_logits,
    detached_critic,
    disable_dropout,
    language_model,
    plain_policy,
    to_grid,
    token_logprobs,
)
from rlhf.loss import policy_loss, policy_stats, value_loss
from rlhf.prompts import EpochSampler, check_inputs
from rlhf.rollout import Rollout, join, plan_micro_batches
from rlhf.score import TokenScorer, load_reward_model, turn_suffix

RewardFunc = str | PreTrainedModel | Callable[..., list[float | None]]
VALUE_MODEL = "value_model"
# How far a log-ratio may be from 0 before the first step on a rollout; float32 on a CPU gives 0.
LOGRATIO_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.1}


@dataclass
class MicroBatch:
    """What one forward and backward pass trains on."""

    rollout: Rollout
    step_tokens: float  # completion tokens of the whole optimizer step, over all processes
    is_fresh: bool  # no optimizer step taken on this rollout yet


class PPOTrainer(RLOOTrainer):
    """PPO: `RLOOTrainer`'s arguments, a `PPOConfig`, and a reward model scored on token ids."""

    loss_is_scaled_for_ga = True  # we divide by the tokens of the whole optimizer step
    _tag_names = ["ppo"]
    _name = "PPO"
    _paper = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}
    # transformers types these as optional or as one of many
    model: Any
    args: Any
    accelerator: Any
    optimizer: Any
    _logs: Any

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: PPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, Any] = (None, None),
        peft_config: PeftConfig | None = None,
    ):
        args = PPOConfig() if args is None else args
        path = str(model if isinstance(model, str) else model.config.name_or_path)
        tokenizer = processing_class or AutoTokenizer.from_pretrained(path)
        first_row = check_inputs(path, args, train_dataset, tokenizer)
        funcs = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        suffix = turn_suffix(tokenizer) if is_conversational(first_row) else []
        scorers: list[Any] = [self._as_function(f, tokenizer, suffix, args) for f in funcs]
        super().__init__(
            model=model,
            reward_funcs=scorers,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
            peft_config=peft_config,
        )
        if tokenizer.pad_token_id in self.eos_token_ids:
            raise UserError(f"pad token {tokenizer.pad_token!r} ends completions in {path}")
        reward_models = [f.model for f in scorers if isinstance(f, TokenScorer)]
        self._add_critic(reward_models[0] if reward_models else None)
        self.add_callback(UpdateBoundary(args.steps_per_update))
        self._rollout: Any = None  # a Rollout from the first update on
        self._micro_batches: list[MicroBatch] = []
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=args.device))

    @staticmethod
    def _as_function(
        func: RewardFunc, tokenizer: PreTrainedTokenizerBase, suffix: list[int], args: PPOConfig
    ) -> Any:
        """A reward model, or the path to one, as a function on token ids; functions as they are."""
        if isinstance(func, str):
            func = load_reward_model(func, tokenizer)
        if isinstance(func, PreTrainedModel):
            batch_size = args.per_device_train_batch_size
            return TokenScorer(func, tokenizer, suffix, batch_size, args.device)
        return func

    def _add_critic(self, reward_model: PreTrainedModel | None) -> None:
        """Build the critic and hang it on the policy, which from here on gives values too."""
        disable_dropout(self.model)
        if self.ref_model is not None:
            disable_dropout(self.ref_model)
        check_plain_logits(self.model)
        args = self.args
        critic = build_critic(
            self.model, reward_model, args.critic_head, args.score_mean, args.score_std
        )
        attach_critic(self.model, critic.to(args.device), self.temperature)

    def _send_telemetry(self) -> None:
        """Nothing is sent anywhere."""

    # Optimizer

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Build Trainer's optimizer, with the critic's parameters in groups of their own."""
        if self.optimizer is not None:
            return self.optimizer
        optimizer = super().create_optimizer(model)
        named = (self.model if model is None else model).named_parameters()
        critic = {id(p) for name, p in named if _is_critic(name)}
        lr = self.args.critic_learning_rate or self.args.learning_rate
        for group in list(optimizer.param_groups):
            theirs = [p for p in group["params"] if id(p) in critic]
            group["params"] = [p for p in group["params"] if id(p) not in critic]
            if theirs:
                optimizer.add_param_group({**group, "params": theirs, "lr": lr})
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Tensor:
        """Clip policy and critic apart, so that neither's gradient shrinks the other's."""
        self.accelerator.unscale_gradients()
        norms = {}
        for which in ("policy", "critic"):
            parameters = [
                p for name, p in model.named_parameters() if _is_critic(name) == (which == "critic")
            ]
            norm = nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
            norms[which] = norm
            self._metrics["train"][f"{which}_grad_norm"].append(norm.item())
        return norms["policy"]

    # Rollout

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        """TRL's sampler, shuffled anew from (seed, epoch), so that a resumed run sees the same."""
        return EpochSampler(
            data_source=self.train_dataset if dataset is None else dataset,
            mini_repeat_count=self.num_generations,
            batch_size=self.args.generation_batch_size // self.num_generations,
            repeat_count=self.args.micro_steps_per_update,
            shuffle=self.shuffle_dataset,
            seed=self.args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """The next micro-batch; at the start of an update, from a new rollout."""
        step = self._step % self.args.micro_steps_per_update
        if step == 0:
            self._rollout, plan = self._generate_and_score_completions(generation_batch)
            self._estimate_advantages(self._rollout)
        if step % self.args.steps_per_generation == 0:
            if step > 0:
                plan = self._plan(self._rollout)
            self._micro_batches = list(self._cut(self._rollout, plan, is_first_epoch=step == 0))
        return self._micro_batches[step % self.args.steps_per_generation]

    def _plan(self, rollout: Rollout) -> list[list[Tensor]]:
        return plan_micro_batches(
            rollout.lengths, self.args.num_mini_batches, self.args.per_device_train_batch_size
        )

    def _cut(
        self, rollout: Rollout, plan: list[list[Tensor]], is_first_epoch: bool
    ) -> Iterator[MicroBatch]:
        """Micro-batches of a plan, each knowing the tokens of its whole optimizer step."""
        tokens = torch.stack([rollout.train_mask[torch.cat(rows)].sum() for rows in plan]).float()
        tokens = self.accelerator.reduce(tokens, "sum").clamp(min=1)
        for i, rows_of_step in enumerate(plan):
            for rows in rows_of_step:
                fresh = is_first_epoch and i == 0
                yield MicroBatch(rollout.select(rows), tokens[i].item(), fresh)

    @torch.no_grad()
    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Any:
        """Sample, score, and run the models: everything of a rollout but advantages.

        Returns the rollout and the plan of its first epoch: the same micro-batches, forwarded here
        and in the first optimizer step, make its ratio exactly 1.
        """
        prompts = [x["prompt"] for x in inputs]
        prompt_ids, completion_ids, completions = self._generate(prompts)
        rollout = join(
            prompt_ids, completion_ids, self._tokenizer.pad_token_id, self.accelerator.device
        )
        plan = self._plan(rollout)
        for rows in (rows for mini_batch in plan for rows in mini_batch):
            self._forward(rollout, rows)
        columns = [{**x, "prompt_ids": ids} for x, ids in zip(inputs, prompt_ids, strict=True)]
        rewards = self._calculate_rewards(columns, prompts, completions, completion_ids)
        finished = [ids[-1] in self.eos_token_ids for ids in completion_ids]
        self._reward(rollout, rewards, torch.tensor(finished, device=rewards.device))
        self._log_samples(prompts, completions, rewards)
        return rollout, plan

    def _forward(self, rollout: Rollout, rows: Tensor) -> None:
        """Fill in a micro-batch's log-probabilities, entropy, values and reference."""
        part = rollout.select(rows)
        where = part.input_ids, part.prompt_lengths, part.completion_mask
        with self.accelerator.autocast():
            logprobs, entropy, values = self.model(
                input_ids=part.input_ids,
                prompt_lengths=part.prompt_lengths,
                completion_mask=part.completion_mask,
            )
            ref_logprobs = logprobs if self.beta == 0.0 else self._reference(*where)
        for name, grid in zip(
            ("logprobs", "entropy", "values", "ref_logprobs"),
            (logprobs, entropy, values, ref_logprobs),
            strict=True,
        ):
            rollout.fill(name, rows, grid)

    def _reference(self, input_ids: Tensor, prompt_lengths: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities of the frozen reference; with PEFT, the policy without its adapter."""
        where = input_ids, prompt_lengths, mask
        if self.ref_model is not None:
            model = self.accelerator.unwrap_model(self.ref_model)
            return to_grid(token_logprobs(model, *where, self.temperature)[0], mask)
        policy = self.accelerator.unwrap_model(self.model)
        with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
            return to_grid(
                token_logprobs(language_model(policy), *where, self.temperature)[0], mask
            )

    def _reward(self, rollout: Rollout, rewards_per_func: Tensor, finished: Tensor) -> None:
        """Turn scores into per-token rewards, and log both.

        A completion no function could score (all None) is left out of the loss. Rewards land in
        `advantages` until `_estimate_advantages` replaces them.
        """
        args, rows = self.args, len(finished)
        weighted = (rewards_per_func * self.reward_weights.to(rewards_per_func)).nansum(1)
        scorable = ~rewards_per_func.isnan().all(1)  # all processes' rows, like the rewards
        mine = slice(self.accelerator.process_index * rows, None)
        scores = normalise_scores(
            weighted[mine][:rows], args.score_mean, args.score_std, args.reward_clip_range
        )
        scores = scores - args.missing_eos_penalty * ~finished
        rollout.train_mask &= scorable[mine][:rows, None]
        if args.mask_truncated_completions:
            rollout.train_mask &= finished[:, None]
        rollout.advantages = token_rewards(
            scores, rollout.logprobs, rollout.ref_logprobs, rollout.completion_mask, self.beta
        )
        self._log_rollout(rollout, finished)
        self._log_scores(rewards_per_func, weighted[scorable])

    def _estimate_advantages(self, rollout: Rollout) -> None:
        """Rewards to advantages and returns; whitened over the tokens of all processes."""
        mask = rollout.train_mask
        rollout.advantages, rollout.returns = gae(
            torch.where(mask, rollout.advantages, 0.0),
            rollout.values,
            mask,
            self.args.gamma,
            self.args.gae_lambda,
        )
        grids = rollout.advantages, rollout.returns, rollout.returns - rollout.values
        moments = torch.stack([masked_moments(grid, mask) for grid in grids])  # (3, 3)
        moments = self.accelerator.reduce(moments, "sum")
        if self.args.normalize_advantages:
            rollout.advantages = whiten(rollout.advantages, mask, moments[0])
        unexplained = mean_and_variance(moments[2])[1] / (mean_and_variance(moments[1])[1] + 1e-8)
        metrics = self._metrics["train"]
        metrics["explained_variance"].append(1 - unexplained.item())
        metrics["return"].append(mean_and_variance(moments[1])[0].item())

    # Loss

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Tensor:
        """Clipped losses of a `MicroBatch`, summed, per token of the whole optimizer step."""
        part, mask, args = inputs.rollout, inputs.rollout.train_mask, self.args
        logprobs, _, values = model(
            input_ids=part.input_ids,
            prompt_lengths=part.prompt_lengths,
            completion_mask=part.completion_mask,
        )
        if inputs.is_fresh:
            self._check_fresh(logprobs, part)
        clip = self.epsilon_low, self.epsilon_high
        pg = policy_loss(logprobs, part.logprobs, part.advantages, *clip)
        vf = value_loss(values, part.values, part.returns, args.clip_range_value)
        stats = policy_stats(logprobs.detach(), part.logprobs, *clip)
        stats |= {"policy_loss": pg.detach(), "value_loss": vf.detach(), "tokens": mask.float()}
        for name, grid in stats.items():
            self._sums[name] += (grid * mask).sum()
        loss = ((pg + args.vf_coef * vf) * mask).sum() / inputs.step_tokens
        return loss * self.accelerator.num_processes  # DDP takes the mean over processes

    def _check_fresh(self, logprobs: Tensor, part: Rollout) -> None:
        """Before the first step on a rollout, policy and rollout must agree: ratio 1, clip 0."""
        gap = (logprobs.detach() - part.logprobs).abs().max().item()
        mode = self.accelerator.mixed_precision
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mode, self.model.dtype)
        if not gap <= LOGRATIO_TOLERANCE[dtype]:
            update = self.state.global_step // self.args.steps_per_update + 1
            raise RuntimeError(
                f"log-ratio {gap:.2e} instead of 0 at the first mini-batch of update {update} "
                f"(process {self.accelerator.process_index}, micro-batch of {len(logprobs)}): the "
                "policy differs between rollout and update (dropout, temperature, precision or "
                "weights)"
            )

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None
    ) -> Tensor:
        """One micro-batch; after the last of an update, its means go to the log."""
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self._step % self.args.micro_steps_per_update == 0:
            names = sorted(self._sums)
            sums = self.accelerator.reduce(torch.stack([self._sums[n] for n in names]), "sum")
            means = dict(zip(names, (sums / sums[names.index("tokens")]).tolist(), strict=True))
            for name in names:
                if name != "tokens":
                    self._metrics["train"][name].append(means[name])
            self._sums.clear()
        return loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[None, None, None]:
        """Evaluation is a rollout whose metrics are logged; there is no loss."""
        self._generate_and_score_completions(inputs)
        return None, None, None

    # Logs

    def _log_rollout(self, rollout: Rollout, finished: Tensor) -> None:
        """Means per completion (kl, reward, length, eos_rate) and per token (entropy)."""
        mask = rollout.completion_mask
        kl = ((rollout.logprobs - rollout.ref_logprobs) * mask).sum()
        tokens, reward = mask.sum(), rollout.advantages.sum()
        local = [kl, reward, tokens, finished.sum(), (rollout.entropy * mask).sum(), tokens]
        counts = mask.new_tensor([len(mask)], dtype=torch.float32)
        sums = torch.cat([torch.stack([x.float() for x in local]), counts])
        *sums, count = self.accelerator.reduce(sums, "sum").tolist()
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name, total in zip(("kl", "reward", "length", "eos_rate"), sums, strict=False):
            if name != "kl" or self.beta != 0.0:  # without a reference there is no KL to tell
                metrics[name].append(total / count)
        metrics["entropy"].append(sums[4] / max(sums[5], 1))

    def _log_scores(self, rewards_per_func: Tensor, scores: Tensor) -> None:
        """Raw scores, before normalisation and penalties: weighted sum and each function's mean."""
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["score"].append(scores.mean().item())
        metrics["score_std"].append(scores.std(correction=0).item())
        for name, column in zip(self.reward_func_names, rewards_per_func.T, strict=True):
            metrics[f"rewards/{name}/mean"].append(column.nanmean().item())

    def _log_samples(self, prompts: list, completions: list, rewards_per_func: Tensor) -> None:
        """Keep samples for TRL's table, and what reward functions logged themselves."""
        mode = "train" if self.model.training else "eval"
        prompts, completions = gather_object(prompts), gather_object(completions)
        self._logs["prompt"].extend(prompts)
        self._logs["completion"].extend(completions)
        for name, column in zip(self.reward_func_names, rewards_per_func.T, strict=True):
            self._logs["rewards"][name].extend(column.tolist())
        self._logs["advantages"].extend([math.nan] * len(prompts))  # the table's column; ours: (T,)
        for column in sorted(set(gather_object(list(self._pending_extra_logs)))):
            self._logs["extra"][column].extend(gather_object(self._pending_extra_logs[column]))
        for name in sorted(set(gather_object(list(self._pending_metrics)))):
            values = gather_object(self._pending_metrics[name])
            self._metrics[mode][name].append(sum(values) / len(values))
        self._pending_extra_logs.clear()
        self._pending_metrics.clear()

    # Checkpoints: the policy is saved clean, the critic beside the optimizer, as training state

    def policy_model(self) -> PreTrainedModel:
        """A copy of the trained policy alone: no critic, its own forward, adapters merged in."""
        return plain_policy(self.accelerator.unwrap_model(self.model))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None:
            state_dict = {k: v for k, v in state_dict.items() if not _is_critic(k)}
        with detached_critic(self.model):
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        with detached_critic(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            self.model.critic.model.save_pretrained(Path(output_dir) / VALUE_MODEL)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            state = load_file(Path(checkpoint) / VALUE_MODEL / "model.safetensors")
            self.model.critic.model.load_state_dict(state)


def _is_critic(parameter_name: str) -> bool:
    """Whether a parameter is the critic's, under any wrapper (`module.critic.model...`)."""
    return "critic" in parameter_name.split(".")[:3]
