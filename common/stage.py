"""What the three stages on TRL's trainers share: their data fields, their start, their resuming."""

import json
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState

from common.arden.world import PEOPLE
from common.artifacts import StageOutput, hash_model, require_apart, require_parent
from common.config import config_values, require
from common.device import has_bf16
from common.errors import UserError
from common.lengths import leave_room
from common.tasks import HELD_OUT_SHARE, Task, open_task, require_data

# TRL 1.16 reads a name that transformers 5.23 has renamed: nothing that a user could change.
warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)

# TRL's defaults are for large models on GPUs; these are for any size on anything.
TRAINER_DEFAULTS = {
    # On a CPU float32, though the units be there: no faster for small models, and exact.
    "bf16": torch.cuda.is_available() and has_bf16(),
    "use_cpu": not torch.accelerator.is_available(),
    "activation_checkpointing": False,
    "report_to": "none",
    "save_total_limit": 1,
    "disable_tqdm": False,
    "ddp_find_unused_parameters": False,
    "dataloader_pin_memory": False,
}
SPLITS = ("dev", "test")
SHOWN = ("loss", "accuracy", "score", "kl")  # of a trainer's logs, in the progress bar


@dataclass
class DataConfig:
    """The model to start from and the data, in every stage after the first."""

    model_name_or_path: str = field(metadata={"help": "the parent: a finished stage's directory"})
    data: str = field(metadata={"help": "arden, shakespeare, a file or folder, or a Hub name"})
    parent_command: str = field(
        default="make all", metadata={"help": "what to run when the parent is missing"}
    )
    columns: dict | None = field(
        default=None, metadata={"help": "our field: the data's column, e.g. prompt: question"}
    )
    plays: bool = field(default=False, metadata={"help": "the data is a text in play form"})
    realm_seed: int = field(default=1, metadata={"help": "the realm of Arden"})
    realm_people: int = field(default=PEOPLE, metadata={"help": "inhabitants of the realm"})
    validation_fraction: float = field(
        default=HELD_OUT_SHARE,
        metadata={"help": "share of one's own prompts that is held out: half dev, half test"},
    )
    skip_faulty_rows: int = field(
        default=0,
        metadata={"help": "pass over so many faulty rows of each source, naming them, not stop"},
    )
    max_new_tokens: int = field(default=48, metadata={"help": "longest answer, in tokens"})
    evaluate_on: str = field(
        default="test", metadata={"help": "test, or dev when choosing settings"}
    )
    overwrite: bool = field(
        default=False, metadata={"help": "replace a run of another configuration"}
    )

    def __post_init__(self) -> None:
        """Refuse what no stage can work with.

        Raises:
            UserError: names the field, what it is and what it must be.
        """
        require_data(self.data, self.columns)
        if self.evaluate_on not in SPLITS:
            raise UserError(f"evaluate_on ({self.evaluate_on}) must be one of {', '.join(SPLITS)}")
        require(self, 0, "skip_faulty_rows")
        require(self, 0, "validation_fraction", most=1)
        require(self, 1, "max_new_tokens")


@dataclass
class LabelledDataConfig(DataConfig):
    """The data of the stages that learn from rows as they stand: fine-tuning, the reward model."""

    max_lost_share: float = field(
        default=0.1,
        metadata={
            "help": "share of rows that max_length may cut or drop, and of characters that the "
            "tokenizer may not know, before the run refuses"
        },
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={
            "help": "stop after so many evaluations without a lower loss on held-out rows, and "
            "keep the best weights; 0: never. Needs eval_strategy"
        },
    )

    def __post_init__(self) -> None:
        """As of all stages, and a share that is one."""
        super().__post_init__()
        require(self, 0, "max_lost_share", most=1)
        require(self, 0, "early_stopping_patience")


@dataclass
class Stage:
    """A stage that is about to run."""

    output: StageOutput
    task: Task
    parent: Path


def open_stage(
    config: Any, args: TrainingArguments, hashes: dict[str, str] | None = None, **parents: str
) -> Stage:
    """Check parents and output directory; checkpoints go to a folder of their own.

    Args:
        config: a `DataConfig`.
        args: the trainer's, whose `output_dir` is the stage's.
        hashes: of what else the stage reads, by name.
        parents: further finished directories that the stage reads, by role.

    Raises:
        UserError: a parent is missing, or the output directory holds another run.
    """
    parent = require_parent(config.model_name_or_path, config.parent_command)
    sources = {"parent": hash_model(parent), **(hashes or {})}
    folders = {role: require_parent(path, config.parent_command) for role, path in parents.items()}
    sources |= {role: hash_model(path) for role, path in folders.items()}
    require_apart(str(args.output_dir), parent, *folders.values())
    task = open_task(config)
    sources["data"] = task.fingerprint()
    values = config_values(config, args)
    output = StageOutput(str(args.output_dir), values, sources, config.overwrite)
    args.distributed_state.wait_for_everyone()  # all have looked before one starts to change it
    args.output_dir = str(output.checkpoints)
    return Stage(output, task, parent)


def run_stage(profile: str, stage: str, flags: list[str]) -> None:
    """Run a stage as its profile configures it, in its own process; end with it if it fails.

    Args:
        profile: a folder of `configs`, or a realm, `realm/7`, whose folder has its configuration.
        stage: of the four; `rlhf_judge` is another configuration of `rlhf`.
        flags: what is not as in the configuration.
    """
    realm = profile.startswith("realm/")
    configs = Path("out", profile, "configs") if realm else Path("configs", profile)
    config, module = str(configs / f"{stage}.yaml"), stage.removesuffix("_judge")
    done = subprocess.run([sys.executable, "-m", module, "--config", config, *flags])
    if done.returncode:
        sys.exit(done.returncode)


def early_stopping(patience: int, args: TrainingArguments) -> list[TrainerCallback]:
    """The callback that stops a run, for a trainer that then ends with its best weights.

    Checkpoints are written at evaluations, for the best is taken from them.

    Args:
        patience: evaluations without a lower `eval_loss`; none at 0.
        args: changed: saving, and which checkpoint is the best.

    Raises:
        UserError: nothing is evaluated.
    """
    if patience == 0:
        return []
    if args.eval_strategy == "no":
        raise UserError(
            f"early_stopping_patience ({patience}) needs evaluations: give --eval_strategy steps "
            "and --eval_steps, or --eval_strategy epoch"
        )
    args.save_strategy, args.save_steps = args.eval_strategy, args.eval_steps or args.save_steps
    args.load_best_model_at_end = True
    args.metric_for_best_model, args.greater_is_better = "eval_loss", False
    args.restore_callback_states_from_checkpoint = True  # its count, when a killed run goes on
    return [EarlyStoppingCallback(patience)]


class ProgressBar(ProgressCallback):
    """transformers' bar with the newest figures in it, in place of a line for each log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show what is in `SHOWN`; all of it is in `metrics.jsonl`."""
        if self.training_bar is not None:
            shown = {name: f"{logs[name]:.3g}" for name in SHOWN if name in logs}
            self.training_bar.set_postfix(shown)


class Stopwatch(TrainerCallback, ExportableState):
    """Seconds of training, those of a killed run up to its last checkpoint included."""

    def __init__(self) -> None:
        self.before, self.start = 0.0, time.perf_counter()

    @property
    def seconds(self) -> float:
        """So far."""
        return self.before + time.perf_counter() - self.start

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"args": {}, "attributes": {"before": self.seconds}}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Go on with a checkpoint's."""
        if state.global_step and "Stopwatch" in state.stateful_callbacks:
            self.before = state.stateful_callbacks["Stopwatch"]["attributes"]["before"]


def train_or_resume(trainer: Trainer, checkpoints: Path) -> float:
    """Train from the newest whole checkpoint, or from the start; seconds of training in all.

    From a checkpoint at which the run had ended, by its steps or before, no further step is taken.
    """
    if not trainer.args.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(ProgressBar)
    wait_for_generators(trainer)
    trainer.add_callback(Stopwatch())
    states = {path.parent: _read_state(path) for path in checkpoints.glob("*/trainer_state.json")}
    whole = [path for path, state in states.items() if state]
    newest = max(whole, key=lambda path: int(path.name.split("-")[1]), default=None)
    if newest and states[newest]["stateful_callbacks"]["TrainerControl"]["args"].get(
        "should_training_stop"
    ):
        take_no_step(trainer)
    trainer.train(resume_from_checkpoint=str(newest) if newest else None)
    callbacks = trainer.callback_handler.callbacks  # a resumed run may have made its own anew
    return round(next(c.seconds for c in callbacks if isinstance(c, Stopwatch)), 1)


def _read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state; empty where a kill cut its writing short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError:
        return {}


def take_no_step(trainer: Trainer) -> None:
    """Let `train` load its checkpoint and end: transformers looks for the end after a step only."""

    def none(*_: Any, **__: Any) -> tuple[list[Any], None]:
        trainer.control.should_training_stop = True
        return [], None

    trainer.get_batch_samples = none  # type: ignore[method-assign]


def wait_for_generators(trainer: Trainer) -> None:
    """Let a checkpoint count as whole when every process has written its generators.

    `trainer_state.json`, by which it counts, is written after them, but by one process for all.
    """
    save: Any = trainer._save_rng_state

    def save_and_wait(output_dir: str) -> None:
        save(output_dir)
        trainer.accelerator.wait_for_everyone()

    trainer._save_rng_state = save_and_wait  # type: ignore[method-assign]


def questions_to_show(
    task: Task, tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel, max_new_tokens: int
) -> list[str]:
    """The task's sample questions, those that leave the model room for an answer."""
    questions = task.sample_questions()
    context = model.config.max_position_embeddings
    return [questions[i] for i in leave_room(questions, tokenizer, context, max_new_tokens)]


def format_samples(title: str, questions: list[str], answers: list[list[str]]) -> str:
    """Questions with their answers as Markdown."""
    parts = [f"# {title}\n"]
    for question, several in zip(questions, answers, strict=True):
        said = "\n".join(f"- {answer!r}" for answer in several)
        parts.append(f"**{question}**\n\n{said}\n")
    return "\n".join(parts)


def print_figures(stage: str, figures: dict[str, Any]) -> None:
    """The figures, one a line."""
    print(f"\n{stage}")
    for name, value in figures.items():
        print(f"  {name:<34} {value:.4g}" if isinstance(value, float) else f"  {name:<34} {value}")
