"""What alignment reads, whichever way it is done."""

import os
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

import common.gpt  # noqa: F401 - so that Auto classes load our GPT
from common.arden.task import ArdenTask
from common.artifacts import require_go, require_kind, require_parent, require_same_tokenizer
from common.config import require
from common.errors import UserError
from common.generation import draw_each
from common.lengths import keep_answerable
from common.stage import DataConfig
from common.tasks import Task
from rlhf.config import PPOConfig
from rlhf.ensemble import Ensemble
from rlhf.methods import METHODS
from rlhf.rewards import is_function, is_model, load_function, make_scorer


@dataclass
class AlignConfig(DataConfig):
    """What the policy is rewarded for, and on which prompts."""

    reward: list[str] = field(
        default_factory=list,
        metadata={
            "help": "a reward model's directory, module:function, file.py:function, or judge "
            "(Arden's known truth); several make a sum with reward_weights"
        },
    )
    method: str = field(default="ppo", metadata={"help": f"one of {', '.join(METHODS)}"})
    lora_r: int = field(
        default=0, metadata={"help": "train an adapter of this rank on the policy; 0: all weights"}
    )
    prompts: int = field(default=2000, metadata={"help": "questions to train on"})
    allow_no_go: bool = field(
        default=False, metadata={"help": "follow a reward model that its report warns of"}
    )
    disagreement_penalty: float = field(
        default=0.0,
        metadata={
            "help": "above 0 the reward models are one reward: their mean less so many of their "
            "standard deviations"
        },
    )
    eval_prompts: int = field(
        default=400, metadata={"help": "questions to measure score and KL on"}
    )
    keep_columns: list[str] = field(
        default_factory=list,
        metadata={"help": "columns of one's own data that reward functions get by name, as text"},
    )
    best_of: int = field(
        default=0,
        metadata={"help": "measure also the rewards' choice among so many answers; 0: do not"},
    )

    def __post_init__(self) -> None:
        """One reward may stand without brackets in the YAML."""
        super().__post_init__()
        require(self, 1, "prompts", "eval_prompts")
        require(self, 0, "lora_r", "best_of", "disagreement_penalty")
        self.reward = [self.reward] if isinstance(self.reward, str) else self.reward
        if self.method not in METHODS:
            raise UserError(f"method ({self.method}) must be one of {', '.join(METHODS)}")
        if not self.reward:
            raise UserError("reward is empty: a reward model's directory or a Python function")
        if len({os.path.realpath(name) for name in self.reward}) < len(self.reward):
            raise UserError(f"reward ({', '.join(self.reward)}) has one twice: each once, weighted")
        if self.disagreement_penalty and not 1 < len(self.models) == len(self.reward):
            raise UserError(
                f"disagreement_penalty ({self.disagreement_penalty:g}) needs two reward models or "
                f"more and nothing beside: reward is {self.reward}"
            )

    @property
    def models(self) -> list[str]:
        """The rewards that are a reward model's directory."""
        return [name for name in self.reward if name != "judge" and not is_function(name)]

    @property
    def reward_names(self) -> list[str]:
        """What is weighed: the rewards, or the one that they make."""
        return ["ensemble"] if self.disagreement_penalty else self.reward


def measure_as_trained(config: AlignConfig, args: PPOConfig) -> None:
    """Set the longest answer that is measured to the longest that is sampled in training.

    Raises:
        UserError: another one was given.
    """
    given, longest = config.max_new_tokens, int(args.max_completion_length or 0)
    if given not in (DataConfig.max_new_tokens, longest):
        raise UserError(
            f"max_new_tokens ({given}) follows from max_completion_length ({longest}): set that"
        )
    config.max_new_tokens = longest


def load_reward(
    name: str, task: Task, parent: Path, config: AlignConfig, device: torch.device
) -> Any:
    """A reward model, on the policy's tokenizer, or a function."""
    if name == "judge":
        if not isinstance(task, ArdenTask):
            raise UserError(f"reward (judge) knows the truth of arden alone: not of {config.data}")
        return task.gold_reward
    if is_function(name):
        return load_function(name, config.keep_columns)
    path = require_parent(name, config.parent_command)
    require_kind(path, scores=True)
    require_go(path, config.allow_no_go)
    require_same_tokenizer(parent, path)
    model: Any = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float32)
    return model.to(device)


def load_rewards(
    config: AlignConfig,
    task: Task,
    parent: Path,
    tokenizer: PreTrainedTokenizerFast,
    batch_size: int,
    device: torch.device,
) -> list[Any]:
    """Every reward of the configuration, models on `device`; with a penalty on disagreement one
    `Ensemble` of them, which scores `batch_size` answers at a time.

    Its members are centred on answers drawn from the parent, to prompts that it will train on.
    """
    rewards = [load_reward(name, task, parent, config, device) for name in config.reward]
    for reward in rewards:
        if is_model(reward):
            reward.config.pad_token_id = tokenizer.pad_token_id  # where it looks for the last token
    if not config.disagreement_penalty:
        return rewards
    ensemble = Ensemble(rewards, config.disagreement_penalty, [0.0] * len(rewards))
    rows = list(align_prompts(task, parent, tokenizer, config, "align", config.eval_prompts))
    policy: Any = AutoModelForCausalLM.from_pretrained(parent, dtype=torch.float32)
    prompts = [row["prompt"] for row in rows]
    answers = draw_each(policy.to(device), tokenizer, prompts, config.max_new_tokens)
    for place, member in enumerate(rewards):
        score = make_scorer([member], [1.0], tokenizer, batch_size, device)
        ensemble.offsets[place] = statistics.fmean(score(rows, answers))
    return [ensemble]


def align_prompts(
    task: Task,
    parent: Path,
    tokenizer: PreTrainedTokenizerFast,
    config: AlignConfig,
    split: str,
    count: int,
) -> Dataset:
    """`count` of the task's prompts, less those that leave the parent no room for an answer."""
    prompts = task.prompt_rows(split, count)
    return keep_answerable(prompts, tokenizer, parent, config.max_new_tokens)


def lora(rank: int) -> LoraConfig | None:
    """Adapters on all of the policy's linear layers, scaled by 2; none at rank 0."""
    if rank == 0:
        return None
    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
