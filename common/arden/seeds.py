"""Arden's four stages and PPO with the judge from several seeds, and the table of all of them.

    make seeds SEEDS="0 1 2"
    python -m common.arden.seeds 0 1 2

Everything but the realm is drawn anew with a seed: weights, the order of data, samples. Seed 0 lies
in `out/arden`, as `make all` leaves it, seed 1 in `out/arden-1`. What is finished is kept; a killed
run goes on where it was.
"""

import sys
from pathlib import Path

from common.arden.report import report
from common.config import as_flags, run
from common.errors import UserError
from common.stage import run_stage


def main() -> None:
    """Run what is missing, print the table."""
    if not sys.argv[1:] or not all(seed.isdecimal() for seed in sys.argv[1:]):
        raise UserError("python -m common.arden.seeds takes seeds, whole numbers: e.g. 0 1 2")
    folders = [folder_of(int(seed)) for seed in sys.argv[1:]]
    for seed, folder in zip(sys.argv[1:], folders, strict=True):
        for stage, parents in stages(folder).items():
            print(f"seeds: {folder / stage}", flush=True)
            fields = {"output_dir": folder / stage, "seed": seed, **parents}
            run_stage("arden", stage, as_flags(fields))
    report(folders)


def folder_of(seed: int) -> Path:
    """Where a seed's runs lie."""
    return Path(f"out/arden-{seed}" if seed else "out/arden")


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
