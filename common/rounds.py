"""Reward model and PPO again, on answers of the policy that PPO left, and a table of the rounds.

    make rounds ROUNDS=2
    python -m common.rounds --profile arden --rounds 2

The first round is `make reward rlhf`. Each further one, in `out/<profile>/round<n>/`, collects
rankings of the newest policy's answers, trains the reward model on with them, and aligns the
fine-tuned model anew. Anew, not the policy on: each round has the same start and the same distance
to go, so that the table compares reward models, and what an earlier one was fooled into is undone.
(Rounds: Bai et al. 2022, arXiv:2204.05862, section 4.5.) Data, what of it is held out, and labeller
are those of the first. A killed run goes on where it was.
"""

import shlex
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml

from common.artifacts import make_variable, read_json, require_parent
from common.config import as_flags, parse_config, run
from common.errors import UserError
from common.report import show_columns
from common.stage import run_stage
from reward.config import BY_DATA

FIRST_ROUNDS = (
    *("data", "columns", "plays", "realm_seed", "realm_people", "validation_fraction"),
    *("skip_faulty_rows", "labeller", "allow_no_go"),
)


@dataclass
class RoundsConfig:
    """How often."""

    profile: str = field(default="arden", metadata={"help": "whose configuration"})
    rounds: int = field(default=2, metadata={"help": "rounds in all; the first is make all's"})
    evaluate_on: str = field(
        default="test", metadata={"help": "test, or dev when choosing settings"}
    )

    def __post_init__(self) -> None:
        """One round is what `make all` does."""
        if self.rounds < 2:
            raise UserError(f"rounds ({self.rounds}) must be 2 or more: the first is make all's")


def main() -> None:
    """Run the stages of every round that are missing, print the table."""
    (config,) = parse_config(RoundsConfig)
    first = Path("out") / config.profile
    for stage in ("sft", "reward", "rlhf"):
        require_parent(str(first / stage), f"make all {make_variable(first)}")
    given_by: dict[str, dict[str, Any]] = {}
    for stage in ("reward", "rlhf"):
        on = yaml.safe_load((first / stage / "config.yaml").read_text(encoding="utf-8"))
        if stage == "reward" and (given := given_rankings(on)):
            raise UserError(
                f"{first / stage} learned from rankings that were given ({given}): nobody "
                f"ranks new answers. Have them ranked: make rankings {make_variable(first)} "
                f'DATA={shlex.quote(on["data"])} ARGS="--policy {first}/rlhf --labeller people '
                f'--rankings {first}/round2/answers"'
            )
        if on["evaluate_on"] != config.evaluate_on:
            raise UserError(
                f"{first / stage} was measured on {on['evaluate_on']}, further rounds would be on "
                f"{config.evaluate_on}: give --evaluate_on {on['evaluate_on']}"
            )
        given_by[stage] = {name: on[name] for name in FIRST_ROUNDS if on.get(name) is not None}
    folders = [first, *(first / f"round{n}" for n in range(2, config.rounds + 1))]
    for last, folder in pairwise(folders):
        parents = {"model_name_or_path": last / "reward", "policy": last / "rlhf"}
        train(config, "reward", folder, given_by["reward"] | parents)
        parents = {"model_name_or_path": first / "sft", "reward": folder / "reward"}
        train(config, "rlhf", folder, given_by["rlhf"] | parents)
    for stage in ("reward", "rlhf"):
        summaries = {
            f"round {n}": read_json(folder / stage / "summary.json")
            for n, folder in enumerate(folders, start=1)
        }
        print("\n" + show_columns(stage, summaries))


def given_rankings(on: dict[str, Any]) -> str:
    """The file of rankings that a reward model's configuration names, which rank no new answer.

    Empty where Arden's judge, a play or another reward model ranks.
    """
    if on["labeller"] == BY_DATA:
        return "" if on["data"] == "arden" or on["plays"] else on["data"]
    return "" if (Path(on["labeller"]) / "config.json").exists() else on["labeller"]


def train(config: RoundsConfig, stage: str, folder: Path, given: dict[str, Any]) -> None:
    """Run a stage into a round's folder, as its profile configures it but for what is given."""
    print(f"rounds: {folder / stage}", flush=True)
    fields = {"output_dir": folder / stage, "evaluate_on": config.evaluate_on} | given
    run_stage(config.profile, stage, as_flags(fields))


if __name__ == "__main__":
    run(main)
