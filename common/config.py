"""Configuration: YAML plus command line into dataclasses, and errors into one line.

    accelerate launch -m sft --config configs/arden/sft.yaml --learning_rate 1e-3

Any field of a stage's dataclasses can stand in the YAML or be given on the command line.
"""

import dataclasses
import difflib
import logging
import math
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any, NoReturn

import torch
import yaml
from transformers import TrainingArguments
from transformers.utils.logging import disable_progress_bar
from trl import TrlParser

from common.errors import LocalError, UserError

# Decided while running, or without influence on the result: no part of a configuration's identity.
INCIDENTAL = {
    "output_dir",
    "overwrite",
    "logging_dir",
    "report_to",
    "logging_steps",
    "save_steps",
    "dataloader_num_workers",
    "disable_tqdm",
}


OURS = {"use_peft": "lora_r"}  # what TRL's scripts call it


class _Parser(TrlParser):
    def __init__(self, dataclass_types: list[type]) -> None:
        super().__init__(dataclass_types)  # type: ignore[arg-type]
        for action in self._actions:
            if getattr(action.type, "__name__", "") == "dict":  # wrapped, to accept none
                action.type = mapping

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `--help` lists the fields")


def parse_config(
    *dataclass_types: type,
    defaults: dict[str, Any] | None = None,
    args: list[str] | None = None,
    others: tuple[type, ...] = (),
) -> tuple[Any, ...]:
    """Read `--config FILE` and `--field value` into one instance of each dataclass.

    Args:
        dataclass_types: in the order in which their instances are returned.
        defaults: in place of the dataclasses' own.
        args: in place of the command line.
        others: further dataclasses, whose fields are passed over.

    Raises:
        UserError: unknown field (names the nearest), wrong type, missing file, invalid value.
    """
    parser = _Parser(list(dataclass_types))
    parser.set_defaults_with_config(**defaults or {})
    try:
        *configs, left = parser.parse_args_and_config(args=args, return_remaining_strings=True)
        known = {field.name for kind in others for field in dataclasses.fields(kind)}
        for flag in left:
            if flag.startswith("--") and flag[2:].split("=")[0] not in known:
                raise ValueError(f"Unknown arguments: {flag}")
        if left and not others:
            raise UserError(f"{left[0]} belongs to no field: quote a value that has spaces")
    except OSError as error:
        raise UserError(f"--config {error.filename}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config is not valid YAML: {' '.join(str(error).split())}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(_explain(error, (*dataclass_types, *others))) from error
    for config in configs:
        if isinstance(config, TrainingArguments):
            check_training(config)
    return tuple(configs)


def mapping(text: str) -> dict[str, Any]:
    """A mapping on the command line, as YAML has it.

    >>> mapping("{prompt: frage}")
    {'prompt': 'frage'}
    """
    try:
        return dict(yaml.safe_load(text))
    except (yaml.YAMLError, TypeError) as error:
        raise ValueError(text) from error


def _explain(error: ValueError, dataclass_types: tuple[type, ...]) -> str:
    message = " ".join(str(error).split())
    unknown = re.search(r"(?:Unknown arguments|not used by).*?--([\w-]+)", message)
    if not unknown:
        return message
    names = [field.name for kind in dataclass_types for field in dataclasses.fields(kind)]
    near = difflib.get_close_matches(unknown[1], names, n=1)
    near = [OURS[unknown[1]]] if OURS.get(unknown[1]) in names else near
    cure = f"did you mean {near[0]}?" if near else "`--help` lists the fields"
    return f"unknown field {unknown[1]}: {cure}"


def require(
    config: Any, least: float, *names: str, most: float = math.inf, above: bool = False
) -> None:
    """Refuse fields of a configuration that are no numbers, below `least` or above `most`.

    Of a list every entry is looked at, and one at least has to be there.

    Args:
        config: a dataclass.
        least, most: the bounds, allowed themselves.
        names: the fields.
        above: `least` is refused, too.

    Raises:
        UserError: names the field, its value and the bounds.
    """
    bounds = f"{least:g} or more" if most == math.inf else f"between {least:g} and {most:g}"
    bounds = f"above {least:g}" if above else bounds
    whole = (int, "int", int | None, list[int])
    counts = {field.name for field in dataclasses.fields(config) if field.type in whole}
    for name in names:
        given = getattr(config, name)
        for value in (given or [None]) if isinstance(given, list) else [given]:
            kind = int if name in counts else int | float
            if isinstance(value, bool) or not isinstance(value, kind):
                said = "a whole number" if name in counts else "a number"
                raise UserError(f"{name} ({given}) must be {said}, {bounds}")
            if not least <= value <= most or (above and value == least):
                raise UserError(f"{name} ({given}) must be {bounds}")


def check_training(args: TrainingArguments) -> None:
    """Refuse what transformers would fail at late, or do otherwise than it reads.

    Raises:
        UserError: names the field, what it is and what it must be.
    """
    require(args, 0, "learning_rate", "max_grad_norm", "weight_decay", "warmup_steps")
    require(args, 1, "per_device_train_batch_size", "per_device_eval_batch_size")
    require(args, 1, "gradient_accumulation_steps")
    if args.max_steps == 0 or args.max_steps < -1:
        raise UserError(f"max_steps ({args.max_steps}) must be at least 1, or -1 for whole epochs")
    if args.max_steps == -1:
        require(args, 0, "num_train_epochs", above=True)
    if args.resume_from_checkpoint:
        raise UserError(
            f"resume_from_checkpoint ({args.resume_from_checkpoint}): leave it out, a run goes on "
            "by itself from its own last checkpoint"
        )


@contextmanager
def refusing(what: str = "") -> Iterator[None]:
    """What a library's constructor finds wrong with its settings, as one line behind `what`.

    Raises:
        UserError: in place of any other ValueError, and where its output_dir cannot be made.
    """
    try:
        yield
    except UserError:
        raise
    except ValueError as error:
        raise UserError(what + " ".join(str(error).split())) from error
    except OSError as error:
        said = f"{error.filename} cannot be written to ({error.strerror})"
        raise UserError(f"{what}{said}: give another --output_dir") from error


def as_flags(fields: dict[str, Any]) -> list[str]:
    """Fields of a configuration as a command line has them.

    >>> as_flags({"seed": 1, "output_dir": "out"})
    ['--seed', '1', '--output_dir', 'out']
    """
    return [str(part) for name, value in fields.items() for part in (f"--{name}", value)]


def config_values(*configs: Any) -> dict[str, Any]:
    """What was set: all fields of our dataclasses, of a library's only those that differ."""
    values: dict[str, Any] = {}
    for config in configs:
        ours = not isinstance(config, TrainingArguments)
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            value = value.value if isinstance(value, Enum) else value
            plain = isinstance(value, str | int | float | bool | None | list | dict)
            if field.init and plain and (ours or value != _default(field)):
                values[field.name] = value
    return values


def _default(field: dataclasses.Field) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def run(main: Callable[[], None]) -> None:
    """Call a command's main; a `UserError` becomes one line on stderr and exit code 2."""
    if not torch.cuda.is_available():
        # Unless told, accelerate leaves several CPU processes strangers to each other.
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")
    disable_progress_bar()  # of loading and writing weights: a blink each
    logging.getLogger("accelerate.utils.other").setLevel(logging.ERROR)  # tied weights, saved once
    try:
        main()
        if torch.distributed.is_initialized():
            # Left to the interpreter's end, gloo's threads abort the process now and then.
            torch.distributed.destroy_process_group()
    except KeyboardInterrupt:
        if os.environ.get("RANK", "0") == "0":
            said = "stopped; a stage goes on from its last checkpoint by the same command"
            print(said, file=sys.stderr)
        sys.exit(130)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or isinstance(error, LocalError):
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
