"""Where prompts come from: checks on what the user gives, and the order they are drawn in."""

from collections.abc import Callable, Iterator
from typing import Any

from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from trl import GRPOConfig, RLOOConfig
from trl.trainer.utils import RepeatSampler

from common.errors import UserError
from rlhf.config import PPOConfig


class EpochSampler(RepeatSampler):
    """A `RepeatSampler` whose order depends on the epoch, not on how often it was iterated."""

    def __init__(self, *, epoch: Callable[[], int], **kwargs: Any):
        super().__init__(**kwargs)
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """Indices of one epoch."""
        if self.shuffle:
            self.generator.manual_seed(int(self.seed or 0) + self.epoch())
        return super().__iter__()


def epoch_sampler(trainer: Any, dataset: Dataset | None = None) -> EpochSampler:
    """TRL's sampler, shuffled anew from (seed, epoch), so that a resumed run sees the same."""
    args = trainer.args
    return EpochSampler(
        data_source=trainer.train_dataset if dataset is None else dataset,
        mini_repeat_count=trainer.num_generations,
        batch_size=args.generation_batch_size // trainer.num_generations,
        repeat_count=args.num_iterations * args.steps_per_generation,
        shuffle=trainer.shuffle_dataset,
        seed=args.seed,
        epoch=lambda: int(trainer.state.epoch or 0),
    )


def check_inputs(
    path: str,
    args: PPOConfig,
    train_dataset: Dataset | IterableDataset | None,
    tokenizer: PreTrainedTokenizerBase,
) -> dict[str, Any]:
    """Refuse what would fail late or train on the wrong tokens; return the first row."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"the tokenizer's pad token ({tokenizer.pad_token!r}) must exist and differ from eos "
            f"({tokenizer.eos_token!r}): completions end with eos, and padding is not part of them"
        )
    if not path and args.beta != 0.0:
        raise UserError("the policy must come from a path: the KL reference is loaded from there")
    if train_dataset is None or "prompt" not in (train_dataset.column_names or ["prompt"]):
        raise UserError("train_dataset must have a `prompt` column")
    require_rollout(args, train_dataset)
    return next(iter(train_dataset))


def require_rollout(args: RLOOConfig | GRPOConfig, prompts: Dataset | IterableDataset) -> None:
    """Refuse fewer prompts than one rollout takes.

    Raises:
        UserError: a sampler of whole rollouts would have none, and the run would end untrained.
    """
    needed = int(args.generation_batch_size or 0) // int(args.num_generations or 1)
    if isinstance(prompts, Dataset) and len(prompts) < needed:
        raise UserError(
            f"train_dataset has {len(prompts)} prompts, an update takes {needed}: lower "
            "per_device_train_batch_size, gradient_accumulation_steps or num_mini_batches"
        )
