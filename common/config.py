"""Configuration: YAML plus command line into dataclasses, and errors into one line.

    accelerate launch -m sft --config configs/arden/sft.yaml --learning_rate 1e-3

Any field of a stage's dataclasses can stand in the YAML or be given on the command line.
"""

import dataclasses
import difflib
import logging
import os
import re
import sys
from collections.abc import Callable
from enum import Enum
from typing import Any, NoReturn

import torch
import yaml
from transformers import TrainingArguments
from transformers.utils.logging import disable_progress_bar
from trl import TrlParser

from common.errors import UserError

# Decided while running, or without influence on the result: no part of a configuration's identity.
INCIDENTAL = {
    "output_dir",
    "overwrite",
    "logging_dir",
    "report_to",
    "dataloader_num_workers",
    "disable_tqdm",
}


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; `--help` lists the fields")


def parse_config(
    *dataclass_types: type,
    defaults: dict[str, Any] | None = None,
    args: list[str] | None = None,
    allow_others: bool = False,
) -> tuple[Any, ...]:
    """Read `--config FILE` and `--field value` into one instance of each dataclass.

    Args:
        dataclass_types: in the order in which their instances are returned.
        defaults: in place of the dataclasses' own.
        args: in place of the command line.
        allow_others: pass over fields that are in none of them.

    Raises:
        UserError: unknown field (names the nearest), wrong type, missing file, invalid value.
    """
    parser = _Parser(list(dataclass_types))  # type: ignore[arg-type]
    parser.set_defaults_with_config(**defaults or {})
    try:
        if allow_others:
            return parser.parse_args_and_config(args=args, return_remaining_strings=True)[:-1]
        return parser.parse_args_and_config(args=args)
    except OSError as error:
        raise UserError(f"--config {error.filename}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"--config is not valid YAML: {' '.join(str(error).split())}") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(_explain(error, dataclass_types)) from error


def _explain(error: ValueError, dataclass_types: tuple[type, ...]) -> str:
    message = " ".join(str(error).split())
    unknown = re.search(r"(?:Unknown arguments|not used by).*?--([\w-]+)", message)
    if not unknown:
        return message
    names = [field.name for kind in dataclass_types for field in dataclasses.fields(kind)]
    near = difflib.get_close_matches(unknown[1], names, n=1)
    cure = f"did you mean {near[0]}?" if near else "`--help` lists the fields"
    return f"unknown field {unknown[1]}: {cure}"


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
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
