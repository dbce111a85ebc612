"""TRL's `RLOOTrainer` with a critic on its policy: set-up, one optimizer for both, checkpoints.

What PPO does with the two is in `rlhf.trainer`.
"""

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
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

from common.pretraining_text import PretrainingText
from rlhf.config import PPOConfig
from rlhf.critic import (
    Critic,
    ValueHead,
    build_critic,
    check_plain_logits,
    detached_critic,
    disable_dropout,
    language_model,
    read_completions,
)
from rlhf.prompts import check_inputs
from rlhf.rewards import tell_apart
from rlhf.sampling import sample_fast
from rlhf.score import RewardFunc, TokenScorer, as_function, turn_suffix

VALUE_MODEL = "value_model"


class ActorCriticTrainer(RLOOTrainer):
    """A policy, its critic and its frozen reference, with `RLOOTrainer`'s arguments."""

    loss_is_scaled_for_ga = True  # we divide by the tokens of the whole optimizer step
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
        scorers: list[Any] = [
            as_function(func, tokenizer, suffix, args.reading_batch_size, args.device)
            for func in funcs
        ]
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
        self.reward_func_names = tell_apart(funcs)
        self.ptx: PretrainingText | None = None
        if args.ptx_data and args.ptx_coef:
            block_size = self.model.config.max_position_embeddings
            self.ptx = PretrainingText(
                args.ptx_data, args.ptx_windows, block_size, args.seed, tokenizer
            )
            self.ptx.require_one_each(self.accelerator, args.gradient_accumulation_steps)
        sample_fast(self, args.graph_decoding)
        pairs = zip(scorers, self.reward_weights.tolist(), strict=True)
        models = [(f, w) for f, w in pairs if isinstance(f, TokenScorer) and w]
        self._add_critic(*models[0] if models else (None, 1.0))

    def _add_critic(self, scorer: TokenScorer | None, weight: float) -> None:
        """Build the critic and hang it on the policy, which from here on gives values too.

        It starts from a reward model that is trained on, as that one is weighted: (w s - m) / d.
        """
        disable_dropout(self.model)
        if self.ref_model is not None:
            disable_dropout(self.ref_model)
        check_plain_logits(self.model)
        args, reward_model, head = self.args, None, self.args.critic_head
        mean, std = (value / weight for value in args.score_scale)
        if scorer is not None:
            reward_model, mean = scorer.model, mean + scorer.offset
        if self.reward_weights.count_nonzero() > 1:  # the mean is known of their sum alone
            head = "zero"
        critic: Critic | ValueHead
        if args.share_trunk:
            hidden_size = language_model(self.model).get_output_embeddings().weight.shape[1]
            critic = ValueHead(hidden_size)
        else:
            critic = build_critic(self.model, reward_model, head, mean, std)
        read_completions(self.model, self.temperature, critic.to(args.device))
        if self.ref_model is not None:
            read_completions(self.accelerator.unwrap_model(self.ref_model), self.temperature)

    def _ptx_loss(self, model: nn.Module) -> Tensor:
        """This micro-batch's share of the loss on pretraining text; the mean of all is logged."""
        assert self.ptx is not None
        processes, parts = self.accelerator.num_processes, self.args.gradient_accumulation_steps
        place = self._step % parts * processes + self.accelerator.process_index
        policy = language_model(self.accelerator.unwrap_model(model))
        with self.accelerator.autocast():
            loss = self.ptx.loss(policy, self.state.global_step, place, processes * parts)
        whole = self.accelerator.reduce(loss.detach(), "sum") * parts
        self._metrics["train"]["ptx_loss"].append(whole.item())
        return loss

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
        parts: dict[str, list[nn.Parameter]] = {"policy": [], "critic": []}
        for name, parameter in model.named_parameters():
            parts["critic" if _is_critic(name) else "policy"].append(parameter)
        norms = {}
        for which, parameters in parts.items():
            norms[which] = norm = nn.utils.clip_grad_norm_(parameters, self.args.max_grad_norm)
            self._metrics["train"][f"{which}_grad_norm"].append(norm.item())
        return norms["policy"]

    def _reference(self, input_ids: Tensor, prompt_lengths: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities of the frozen reference; with PEFT, the policy without its adapter."""
        where: Any = {"input_ids": input_ids, "prompt_lengths": prompt_lengths}
        where["completion_mask"] = mask
        if self.ref_model is not None:
            return self.ref_model(**where)[0]
        policy = self.accelerator.unwrap_model(self.model)
        with use_adapter(policy, "ref" if "ref" in policy.peft_config else None):
            return policy(**where, wants_values=False)[0]

    # What TRL prints and saves

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

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if state_dict is not None:
            state_dict = {k: v for k, v in state_dict.items() if not _is_critic(k)}
        with detached_critic(self.model):
            super()._save(output_dir, state_dict)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        # accelerate keeps FSDP's weights whole in a file of its own, the critic's among them
        with contextlib.nullcontext() if self.is_fsdp_enabled else detached_critic(self.model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        self.model.critic.save(Path(output_dir) / VALUE_MODEL, write=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.model.critic.load(Path(checkpoint) / VALUE_MODEL)


def _is_critic(parameter_name: str) -> bool:
    """Whether a parameter is the critic's, under any wrapper (`module.critic.model...`)."""
    return "critic" in parameter_name.split(".")[:3]
