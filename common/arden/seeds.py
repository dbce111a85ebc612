"""Arden's four stages and PPO with the judge from several seeds, and the table of all of them.

    make seeds SEEDS="0 1 2"
    python -m common.arden.seeds --profile arden --seeds 0 1 2

Everything but the realm is drawn anew with a seed: weights, the order of data, samples. Seed 0 lies
in `out/arden`, as `make all` leaves it, seed 1 in `out/arden-1`. What is finished is kept; a killed
run goes on where it was.
"""

from dataclasses import dataclass, field
from pathlib import Path

from common.arden.report import report
from common.config import as_flags, parse_config, run
from common.errors import UserError
from common.stage import run_stage


@dataclass
class SeedsConfig:
    """Which realm, and how often."""

    profile: str = field(default="arden", metadata={"help": "arden, or another realm: realm/7"})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "a run each"})

    def __post_init__(self) -> None:
        """Refuse what no generator takes, before the first run."""
        if not self.seeds or min(self.seeds) < 0:
            raise UserError(f"seeds ({self.seeds}) must be whole numbers from 0 on: e.g. 0 1 2")


def main() -> None:
    """Run what is missing, print the table."""
    (config,) = parse_config(SeedsConfig)
    folders = [folder_of(config.profile, seed) for seed in config.seeds]
    for seed, folder in zip(config.seeds, folders, strict=True):
        for stage, parents in stages(folder).items():
            print(f"seeds: {folder / stage}", flush=True)
            fields = {"output_dir": folder / stage, "seed": seed, **parents}
            run_stage(config.profile, stage, as_flags(fields))
    report(folders)


def folder_of(profile: str, seed: int) -> Path:
    """Where a seed's runs lie."""
    return Path("out", f"{profile}-{seed}" if seed else profile)


def stages(folder: Path) -> dict[str, dict[str, Path]]:
    """The stages in order, each with what it reads of the others, by field."""
    tuned = {"model_name_or_path": folder / "sft"}
    return {
        "pretrain": {},
        "sft": {"model_name_or_path": folder / "pretrain"},
        "reward": tuned,
        "rlhf": tuned | {"reward": folder / "reward"},
        "rlhf_judge": tuned,
    }


if __name__ == "__main__":
    run(main)
