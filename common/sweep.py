"""A stage once for each of several values of one field, measured on dev, and a table.

    make sweep STAGE=sft FIELD=learning_rate VALUES="1e-4 3e-4 1e-3"
    python -m common.sweep --stage sft --field learning_rate --values 1e-4 3e-4 1e-3

The runs lie in `out/<profile>/sweep/<stage>/<field>_<value>`. A killed sweep goes on where it was,
and one with further values trains these alone.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from common.artifacts import read_json
from common.config import parse_config, run
from common.errors import UserError
from common.report import show_columns
from common.stage import run_stage

STAGES = ("sft", "reward", "rlhf")


@dataclass
class SweepConfig:
    """What is varied."""

    stage: str = dataclasses.field(metadata={"help": f"one of {', '.join(STAGES)}"})
    field: str = dataclasses.field(metadata={"help": "a field of the stage's configuration"})
    values: list[str] = dataclasses.field(metadata={"help": "what to set it to, one run each"})
    profile: str = dataclasses.field(default="arden", metadata={"help": "whose configuration"})

    def __post_init__(self) -> None:
        """Pretraining has no dev: it is measured on validation text."""
        if self.stage not in STAGES:
            raise UserError(f"stage ({self.stage}) must be one of {', '.join(STAGES)}")


def main() -> None:
    """Run what is missing, print the table."""
    ours, others = split_arguments(sys.argv[1:])
    (config,) = parse_config(SweepConfig, args=ours)
    folder = Path("out") / config.profile / "sweep" / config.stage
    summaries = {}
    for value in config.values:
        output = folder / f"{config.field}_{value.replace('/', '_')}"
        flags = ["--evaluate_on", "dev", *others, f"--{config.field}", value]
        print(f"sweep: {config.field} {value}", flush=True)
        run_stage(config.profile, config.stage, [*flags, "--output_dir", str(output)])
        summaries[value] = read_json(output / "summary.json")
    print("\n" + show_columns(config.field, summaries))


def split_arguments(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Ours, and what comes after `--`, for the stage."""
    where = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:where], arguments[where + 1 :]


if __name__ == "__main__":
    run(main)
