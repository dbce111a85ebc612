"""What PPO adds to TRL's `RLOOConfig`, and the defaults it changes.

One update is a rollout of `per_device_train_batch_size x gradient_accumulation_steps x
num_mini_batches x processes` completions, followed by `num_ppo_epochs x num_mini_batches`
optimizer steps on it. `max_steps`, `save_steps`, `eval_steps`, `logging_steps` and `warmup_steps`
count optimizer steps, as everywhere in transformers; logs, evaluations and saves that fall inside
an update wait for its end.
"""

from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from trl import RLOOConfig

from common.config import require
from common.errors import UserError


@dataclass
class PPOConfig(RLOOConfig):
    """PPO's own knobs; `beta` (KL coefficient), `temperature` and the rest are TRL's."""

    num_updates: int | None = field(
        default=None,
        metadata={"help": "PPO updates to run. Sets max_steps = num_updates x steps_per_update."},
    )
    num_mini_batches: int = field(
        default=4, metadata={"help": "Optimizer steps per pass over one rollout."}
    )
    num_ppo_epochs: int = field(default=1, metadata={"help": "Passes over one rollout."})
    rollout_forward_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Completions that a process reads (but for the first mini-batch) and scores at "
            "once; unset: per_device_train_batch_size. More are faster; their logits take memory."
        },
    )
    clip_range: float = field(default=0.2, metadata={"help": "Clip of the probability ratio."})
    clip_range_value: float = field(
        default=0.2, metadata={"help": "How far a value may move from the rollout's; 0 = no clip."}
    )
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    gamma: float = field(default=1.0, metadata={"help": "Discount per token."})
    gae_lambda: float = field(default=0.95, metadata={"help": "Lambda of GAE."})
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of the critic; unset: learning_rate."}
    )
    dpo_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate where the method is dpo; unset: learning_rate."},
    )
    share_trunk: bool = field(
        default=False,
        metadata={"help": "The critic is one layer on the policy's own trunk, trained by both."},
    )
    critic_head: Literal["copy", "zero"] = field(
        default="copy",
        metadata={"help": "Value head at the start: the reward model's ('copy') or zeros."},
    )
    score_mean: float | None = field(
        default=None,
        metadata={"help": "Subtracted from scores; unset: their mean at first."},
    )
    score_std: float | None = field(
        default=None,
        metadata={"help": "Scores are divided by it; unset: the stage takes a model's deviation."},
    )
    missing_eos_penalty: float = field(
        default=1.0,
        metadata={"help": "Taken off the normalised score of a completion that never ended."},
    )
    kl_budget: float | None = field(
        default=None,
        metadata={"help": "Stop after the update whose rollout has more KL, nats a completion."},
    )
    target_kl: float | None = field(
        default=None,
        metadata={"help": "Nats a completion; beta is only the start, and moves to hold KL there."},
    )
    ptx_coef: float = field(
        default=0.0,
        metadata={"help": "Weight of the loss on pretraining text (PPO-ptx); 0: none."},
    )
    ptx_data: str | None = field(
        default=None, metadata={"help": "Token file of that text: `data/train.bin` of pretraining."}
    )
    ptx_windows: int = field(
        default=8, metadata={"help": "Windows of that text to an optimizer step, of all processes."}
    )
    graph_decoding: bool = field(
        default=False,
        metadata={
            "help": "On a GPU: sample a bfloat16 copy by a CUDA graph (make bench-decoding)."
        },
    )
    kl_horizon: int = field(
        default=10_000,
        metadata={"help": "Completions over which target_kl moves beta by a fifth at most."},
    )

    # Defaults that differ from TRL's
    reward_clip_range: tuple[float, float] | None = field(
        default=(-10.0, 10.0), metadata={"help": "Clip of the normalised score."}
    )
    normalize_advantages: bool = field(
        default=True, metadata={"help": "Whiten advantages over all tokens of all processes."}
    )
    num_generations: int = field(
        default=1, metadata={"help": "Completions sampled per prompt in one rollout."}
    )
    disable_dropout: bool = field(default=True, metadata={"help": "PPO needs dropout off."})
    activation_checkpointing: bool | None = field(
        default=False, metadata={"help": "Trade compute for memory in the update."}
    )
    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the policy."})
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Epsilon of AdamW."})
    logging_steps: float = field(
        default=1, metadata={"help": "Optimizer steps between logs; at most one log an update."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every parameter is used in every step."}
    )

    def __post_init__(self) -> None:
        """Check PPO's fields and fill in the ones RLOO knows by other names."""
        self._check()
        self._rename("epsilon", self.clip_range, default=0.2, ours="clip_range")
        self._rename("num_iterations", self.num_ppo_epochs, default=1, ours="num_ppo_epochs")
        self._rename(
            "steps_per_generation",
            self.gradient_accumulation_steps * self.num_mini_batches,
            default=None,
            ours="num_mini_batches",
        )
        if self.bf16 is None:
            self.bf16 = torch.cuda.is_available() and not self.use_cpu and not self.fp16
        if self.num_updates is not None:
            self._rename(
                "max_steps",
                self.num_updates * self.steps_per_update,
                default=-1,
                ours="num_updates",
            )
        self._post_init_with_one_generation()
        if self.max_steps > 0 and self.max_steps % self.steps_per_update:
            raise UserError(
                f"max_steps ({self.max_steps}) must be a multiple of num_ppo_epochs x "
                f"num_mini_batches ({self.steps_per_update}), or set num_updates instead"
            )

    @property
    def steps_per_update(self) -> int:
        """Optimizer steps taken on one rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def micro_steps_per_update(self) -> int:
        """Forward and backward passes taken on one rollout, by each process."""
        return self.steps_per_update * self.gradient_accumulation_steps

    @property
    def reading_batch_size(self) -> int:
        """Completions that a process reads or scores at once, without gradients."""
        return self.rollout_forward_batch_size or self.per_device_train_batch_size

    def scale_scores(self, mean: float, std: float | None) -> None:
        """Take the starting policy's mean score and deviation (or none); what was given stays.

        Less their mean, so that a critic from zero is right at first, on average.
        """
        self.score_mean = mean if self.score_mean is None else self.score_mean
        self.score_std = (std or None) if self.score_std is None else self.score_std

    @property
    def score_scale(self) -> tuple[float, float]:
        """What is subtracted from a score, and what it is then divided by."""
        return self.score_mean or 0.0, 1.0 if self.score_std is None else self.score_std

    def _check(self) -> None:
        """Refuse what PPO cannot honour."""
        require(self, 1, "num_mini_batches", "num_ppo_epochs", "num_generations", "kl_horizon")
        require(self, 1, "ptx_windows", "max_completion_length")
        others = "critic_learning_rate", "dpo_learning_rate", "rollout_forward_batch_size"
        optional = ("score_std", "num_updates", "kl_budget", "target_kl", *others)
        given = [name for name in optional if getattr(self, name) is not None]
        require(self, 0, "temperature", "clip_range", *given, above=True)
        require(self, 0, "vf_coef", "clip_range_value", "missing_eos_penalty", "beta", "ptx_coef")
        require(self, 0, "gamma", "gae_lambda", most=1)
        clip = self.reward_clip_range
        if clip is not None and not clip[0] < clip[1]:
            raise UserError(f"reward_clip_range ({clip}) must be a lower bound and a higher one")
        if self.num_updates is None and self.max_steps == -1 and self.num_train_epochs % 1:
            raise UserError(
                f"num_train_epochs ({self.num_train_epochs}) may end inside an update: give a "
                "whole number, or num_updates"
            )
        if self.kl_budget is not None and self.beta == 0.0:
            raise UserError(
                "kl_budget needs a reference: set beta above 0 (1e-9 penalises nothing)"
            )
        if self.target_kl is not None and self.beta == 0.0:
            raise UserError(
                f"target_kl ({self.target_kl}) needs a beta ({self.beta}) above 0, where the KL "
                "coefficient starts"
            )
        if self.sync_ref_model:
            raise UserError("sync_ref_model (True): PPO's reference stays as it was, set it False")
        if self.ptx_coef and not self.ptx_data:
            raise UserError(
                f"ptx_coef ({self.ptx_coef:g}) needs ptx_data ({self.ptx_data}), the token file of "
                "the pretraining text; 0 does without"
            )
        if self.use_vllm:
            raise UserError("use_vllm (True): weights are not sent there, set it False")
        if not self.disable_dropout:
            raise UserError("disable_dropout (False): PPO compares log-probabilities, set it True")
        if self.chat_template_kwargs:
            raise UserError(
                f"chat_template_kwargs ({self.chat_template_kwargs}): the reward model and what is "
                "measured read the template without them, write them into it"
            )
        plain = {"top_p": 1.0, "top_k": 0, "min_p": None, "repetition_penalty": 1.0}
        plain["generation_kwargs"] = None
        for name, value in plain.items():
            if getattr(self, name) != value:
                raise UserError(
                    f"{name} ({getattr(self, name)}): PPO trains the distribution it samples from, "
                    f"set it to {value}; temperature is free"
                )

    def _rename(self, theirs: str, value: Any, default: Any, ours: str) -> None:
        """Set a base field from ours; a different value given by the user is an error."""
        given = getattr(self, theirs)
        if given not in (default, value):
            raise UserError(f"{theirs} ({given}) follows from {ours} ({value}): set {ours}")
        setattr(self, theirs, value)

    def _post_init_with_one_generation(self) -> None:
        """Run RLOO's checks, which refuse one completion per prompt, with a number they accept."""
        local_rollout = self.per_device_train_batch_size * int(self.steps_per_generation or 0)
        if local_rollout < 2:
            raise UserError("a rollout of 1 completion: raise per_device_train_batch_size")
        num_generations, self.num_generations = self.num_generations, local_rollout
        self.num_generations_eval = self.num_generations_eval or 1
        given, self.generation_batch_size = self.generation_batch_size, None  # TRL derives it
        super().__post_init__()
        self.num_generations = num_generations
        rollout = int(self.generation_batch_size or 0)
        if given not in (None, rollout):
            raise UserError(f"generation_batch_size ({given}) follows from the rest: {rollout}")
        if rollout % num_generations:
            raise UserError(
                f"num_generations ({num_generations}) must divide the rollout "
                f"({rollout} completions)"
            )
