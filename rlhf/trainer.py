"""PPO with a learned critic, on TRL's `RLOOTrainer` (arXiv 1707.06347, 2203.02155).

TRL does prompts, sampling, Python reward functions, the reference model and, with transformers,
the loop, logs and checkpoints. Ours is what makes it PPO: scores on token ids, the KL penalty per
token, GAE, mini-batches and the clipped losses. One pass over an update:

    prompts -> completions -> scores, log-probs, values -> advantages -> mini-batches -> losses
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from common.errors import UserError
from rlhf.actor_critic import ActorCriticTrainer
from rlhf.advantage import (
    gae,
    masked_moments,
    mean_and_variance,
    normalise_scores,
    token_rewards,
    whiten,
)
from rlhf.callbacks import update_callbacks
from rlhf.invariants import check_same_policy, check_score_position
from rlhf.loss import policy_loss, policy_stats, value_loss
from rlhf.prompts import EpochSampler, epoch_sampler
from rlhf.rewards import find_scorable
from rlhf.rollout import Rollout, join, plan_micro_batches, plan_reading


@dataclass
class MicroBatch:
    """What one forward and backward pass trains on."""

    rollout: Rollout
    step_tokens: float  # completion tokens of the whole optimizer step, over all processes
    is_fresh: bool  # no optimizer step taken on this rollout yet


class PPOTrainer(ActorCriticTrainer):
    """PPO: `RLOOTrainer`'s arguments, a `PPOConfig`, and a reward model scored on token ids."""

    _tag_names = ["ppo"]
    _name = "PPO"
    _paper = {"title": "Proximal Policy Optimization Algorithms", "id": "1707.06347"}

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        for callback in update_callbacks(self):
            self.add_callback(callback)
        self.rollout_kl = 0.0  # of the newest training rollout, nats a completion
        self._rollout: Any = None  # a Rollout from the first update on
        self._micro_batches: list[MicroBatch] = []
        device = self.args.device
        self._sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=device))

    # Rollout

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        return epoch_sampler(self, dataset)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """The next micro-batch; at the start of an update, from a new rollout."""
        step = self._step % self.args.micro_steps_per_update
        place = step % self.args.steps_per_generation
        if step == 0:
            self._rollout, plan = self._generate_and_score_completions(generation_batch)
            self._estimate_advantages(self._rollout)
        elif place == 0:
            plan = self._plan(self._rollout)
        else:
            return self._micro_batches[place]
        self._micro_batches = list(self._cut(self._rollout, plan, is_first_epoch=step == 0))
        return self._micro_batches[0]

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
        for rows in plan_reading(rollout.lengths, plan, self.args.reading_batch_size):
            self._forward(rollout, rows)
        columns = [{**x, "prompt_ids": ids} for x, ids in zip(inputs, prompt_ids, strict=True)]
        rewards = self._calculate_rewards(columns, prompts, completions, completion_ids)
        finished = [ids[-1] in self.eos_token_ids for ids in completion_ids]
        finished_rows = torch.tensor(finished, device=rewards.device)
        scores = self._reward(rollout, rewards, finished_rows)
        check_score_position(rollout, completion_ids, scores, self.beta, self._where())
        self._log_samples(prompts, completions, rewards)
        return rollout, plan

    def _forward(self, rollout: Rollout, rows: Tensor) -> None:
        """Fill in some rows' log-probabilities, entropy, values and reference."""
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
        if self.state.global_step == 0 and self.model.training:
            mask = part.completion_mask
            self._check_same_policy(logprobs, ref_logprobs, mask, "policy and reference")

    def _reward(self, rollout: Rollout, rewards_per_func: Tensor, finished: Tensor) -> Tensor:
        """Turn scores into per-token rewards, log both, return the scores as rewarded, (B,).

        A completion that no reward of any weight could score is left out of the loss.
        """
        args, rows = self.args, len(finished)
        weights = self.reward_weights.to(rewards_per_func)
        weighted = (rewards_per_func * weights).nansum(1)
        scorable = find_scorable(rewards_per_func, weights)  # all processes' rows, as the rewards
        if self.model.training and not scorable.any():
            raise UserError(f"{self._where()}: no reward has a number for any of its answers")
        mine = slice(self.accelerator.process_index * rows, None)
        mean, std = args.score_scale
        scores = normalise_scores(weighted[mine][:rows], mean, std, args.reward_clip_range)
        scores = scores - args.missing_eos_penalty * ~finished
        rollout.train_mask &= scorable[mine][:rows, None]
        if args.mask_truncated_completions:
            rollout.train_mask &= finished[:, None]
        rollout.rewards = token_rewards(
            scores, rollout.logprobs, rollout.ref_logprobs, rollout.completion_mask, self.beta
        )
        self._log_rollout(rollout, finished, scorable[mine][:rows])
        lengths = self.accelerator.gather(rollout.completion_mask.sum(1)).float()
        if scorable.any():  # of a batch to evaluate on it may be none
            self._log_scores(rewards_per_func, weighted[scorable], lengths[scorable])
        return scores

    def _estimate_advantages(self, rollout: Rollout) -> None:
        """Rewards to advantages and returns; whitened over the tokens of all processes."""
        mask = rollout.train_mask
        rollout.advantages, rollout.returns = gae(
            torch.where(mask, rollout.rewards, 0.0),
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
            self._check_same_policy(
                logprobs, part.logprobs, part.completion_mask, "rollout and first mini-batch"
            )
        clip = self.epsilon_low, self.epsilon_high
        pg = policy_loss(logprobs, part.logprobs, part.advantages, *clip)
        vf = value_loss(values, part.values, part.returns, args.clip_range_value)
        stats = policy_stats(logprobs.detach(), part.logprobs, *clip)
        stats |= {"policy_loss": pg.detach(), "value_loss": vf.detach(), "tokens": mask.float()}
        for name, grid in stats.items():
            self._sums[name] += (grid * mask).sum()
        loss = ((pg + args.vf_coef * vf) * mask).sum() / inputs.step_tokens
        if self.ptx is not None:
            loss = loss + args.ptx_coef * self._ptx_loss(model)
        return loss * self.accelerator.num_processes  # DDP takes the mean over processes

    def _check_same_policy(
        self, logprobs: Tensor, others: Tensor, mask: Tensor, which: str
    ) -> None:
        """Stop unless two log-probabilities come from one policy."""
        mode = self.accelerator.mixed_precision
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(mode, self.model.dtype)
        clip = self.epsilon_low, self.epsilon_high
        check_same_policy(logprobs.detach(), others, mask, clip, dtype, which, self._where())

    def _where(self) -> str:
        """Place in the run, for messages."""
        update = self.state.global_step // self.args.steps_per_update + 1
        return f"update {update}, process {self.accelerator.process_index}"

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

    def _log_rollout(self, rollout: Rollout, finished: Tensor, scorable: Tensor) -> None:
        """Means per completion (kl, length, eos_rate), per scorable one (reward), per token."""
        mask = rollout.completion_mask
        sums = {
            "kl": ((rollout.logprobs - rollout.ref_logprobs) * mask).sum(),
            "length": mask.sum(),
            "eos_rate": finished.sum(),
            "reward": rollout.rewards[scorable].sum(),
            "entropy": (rollout.entropy * mask).sum(),
            "scorable": scorable.sum(),
            "completions": mask.new_tensor(len(mask), dtype=torch.float32),
        }
        totals = self.accelerator.reduce(torch.stack([x.float() for x in sums.values()]), "sum")
        total = dict(zip(sums, totals.tolist(), strict=True))
        metrics = self._metrics["train" if self.model.training else "eval"]
        for name in ("kl", "length", "eos_rate"):
            if name != "kl" or self.beta != 0.0:  # without a reference there is no KL to tell
                metrics[name].append(total[name] / total["completions"])
        if self.model.training:
            self.rollout_kl = total["kl"] / total["completions"]
        if total["scorable"]:
            metrics["reward"].append(total["reward"] / total["scorable"])
        metrics["entropy"].append(total["entropy"] / max(total["length"], 1))

    def _log_scores(self, rewards_per_func: Tensor, scores: Tensor, lengths: Tensor) -> None:
        """Raw scores, before normalisation and penalties: weighted sum and each function's mean.

        `score_length_correlation` near 1 tells of a reward that pays for tokens; 0 if either is
        constant.
        """
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["score"].append(scores.mean().item())
        metrics["score_std"].append(scores.std(correction=0).item())
        correlation = torch.stack([scores, lengths]).corrcoef()[0, 1].nan_to_num()
        metrics["score_length_correlation"].append(correlation.item())
        for name, column in zip(self.reward_func_names, rewards_per_func.T, strict=True):
            metrics[f"rewards/{name}/mean"].append(column.nanmean().item())
