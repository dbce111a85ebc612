"""What happens on the boundaries of PPO updates: logs, saves, checks, the KL coefficient, stops."""

from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from common.errors import UserError
from rlhf.advantage import adapted_kl_coef
from rlhf.invariants import check_processes_agree, check_unchanged, checksums


class UpdateBoundary(TrainerCallback):
    """Defer what Trainer wants in the middle of an update to the update's end.

    A checkpoint holds no rollout, so only one between two rollouts resumes exactly.
    """

    DEFERRED = ("should_log", "should_evaluate", "should_save", "should_training_stop")

    def __init__(self, steps_per_update: int):
        self.steps_per_update = steps_per_update
        self.pending: set[str] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse to start or to end inside an update."""
        for name in ("global_step", "max_steps"):
            step = getattr(state, name)
            if step % self.steps_per_update:
                raise UserError(
                    f"{name} ({step}) is not a multiple of the {self.steps_per_update} optimizer "
                    "steps of an update: resume from, and stop at, the end of one"
                )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Hold the flags back until the update is over."""
        at_end = state.global_step % self.steps_per_update == 0
        for name in self.DEFERRED:
            if getattr(control, name):
                self.pending.add(name)
            setattr(control, name, at_end and name in self.pending)
        if at_end:
            self.pending.clear()


class WeightGuard(TrainerCallback):
    """After every update: the reference is as it was, and all processes have the same weights."""

    def __init__(self, trainer: Any):
        self.trainer = trainer
        self.frozen: dict[str, Tensor] = {}

    def reference_sums(self) -> dict[str, Tensor]:
        """Of the reference model; with adapters, of the policy's weights that don't train."""
        if self.trainer.ref_model is None:
            return checksums(self.trainer.model, trainable=False)
        return checksums(self.trainer.ref_model)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Remember the reference."""
        self.frozen = self.reference_sums()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Check at the end of an update, before anything is saved."""
        steps = self.trainer.args.steps_per_update
        if state.global_step % steps == 0:
            accelerator = self.trainer.accelerator
            where = f"end of update {state.global_step // steps}"
            check_processes_agree(accelerator, checksums(self.trainer.model), where)
            where += f", process {accelerator.process_index}"
            check_unchanged(self.frozen, self.reference_sums(), where)


class KLBudget(TrainerCallback):
    """Ends a run whose policy has gone further from the reference than it may.

    The KL is that of the rollout, so of the policy before the update: one update is taken too many.
    """

    def __init__(self, trainer: Any, budget: float):
        self.trainer = trainer
        self.budget = budget

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop, and say so, at the end of an update over the budget."""
        kl, steps = self.trainer.rollout_kl, self.trainer.args.steps_per_update
        if state.global_step % steps == 0 and kl > self.budget:
            control.should_training_stop = True
            if state.is_world_process_zero:
                update = state.global_step // steps
                print(f"stopped after update {update}: KL {kl:.3g} over kl_budget {self.budget}")


class AdaptiveKL(TrainerCallback, ExportableState):
    """Moves the KL coefficient after every update, so that the rollouts' KL comes to a target.

    Lies in a checkpoint's `trainer_state.json`, from where a resumed run takes it.
    """

    def __init__(self, trainer: Any, target: float, horizon: int):
        completions = trainer.args.generation_batch_size
        if 5 * horizon <= completions:
            raise UserError(
                f"kl_horizon ({horizon}) must be above a fifth of an update's {completions} "
                "completions, else one update may take beta below 0"
            )
        self.trainer = trainer
        self.target = target
        self.horizon = horizon

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"kl_coef": self.trainer.beta}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Go on with a checkpoint's coefficient."""
        kept: Any = state.stateful_callbacks  # a dict by class name; transformers types a list
        if "AdaptiveKL" in kept:  # not in a checkpoint of a run without a target
            self.trainer.beta = kept["AdaptiveKL"]["attributes"]["kl_coef"]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the update's coefficient and set that of the next."""
        trainer = self.trainer
        if state.global_step % trainer.args.steps_per_update == 0:
            trainer._metrics["train"]["kl_coef"].append(trainer.beta)
            trainer.beta = adapted_kl_coef(
                trainer.beta,
                trainer.rollout_kl,
                self.target,
                trainer.args.generation_batch_size,
                self.horizon,
            )


def update_callbacks(trainer: Any) -> list[TrainerCallback]:
    """The callbacks that a trainer's configuration asks for, in the order they are called."""
    args = trainer.args
    callbacks: list[TrainerCallback] = [UpdateBoundary(args.steps_per_update), WeightGuard(trainer)]
    if args.kl_budget is not None:
        callbacks.append(KLBudget(trainer, args.kl_budget))
    if args.target_kl is not None:
        callbacks.append(AdaptiveKL(trainer, args.target_kl, args.kl_horizon))
    return callbacks
