"""Speed of pretraining, by itself or beside nanoGPT in the same minutes.

make bench-pretrain DATA=input.txt                    ours alone
make bench-pretrain DATA=input.txt NANOGPT=path       beside a checkout of nanoGPT
make bench-pretrain DATA=input.txt ARGS="--rounds 1 --threads 2"
make bench-pretrain-gpu ...                       on a GPU, at other sizes (pretrain/bench_gpu.py)

Every run is a process of its own, pinned to the same cores with the same number of threads; a round
goes through all of them, so that both sides see the machine at its best and worst. The table, and
`pretrain.json` with it, has for each figure the median over the rounds, least and greatest. What
each figure is: docs/pretrain.md.
"""

import os
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from common.artifacts import write_json
from common.config import parse_config, require, run
from common.device import measured_by
from common.errors import UserError
from common.tasks import load_task
from pretrain.bench_runs import Run, Shape, copy_nanogpt, run_nanogpt, run_ours
from pretrain.speed import flops_per_token, matmul_peak

TARGET = 1.898  # exact validation loss of nanoGPT's README run on CPU, 0.8M parameters
README_STEPS = 2000  # of that run
SMALL = Shape(layers=4, heads=4, hidden=128, block_size=64, batch_size=12)
LARGE = Shape(layers=6, heads=6, hidden=384, block_size=256, batch_size=16)
BLOCK, LARGE_BLOCK = 10, 2  # steps over which a speed is taken
ADAMW: dict[str, Any] = {"optimizer": "adamw", "learning_rate": 1e-3}  # nanoGPT's README run's
EQUAL_TIME_BATCH = 32  # windows a step when there is nanoGPT's time to use


@dataclass
class RoundsConfig:
    """What every bench of pretraining can be told."""

    data: str = field(default="shakespeare", metadata={"help": "Tiny Shakespeare: name or file"})
    nanogpt: str | None = field(
        default=None, metadata={"help": "checkout of nanoGPT to run beside"}
    )
    output_dir: str = field(default="out/bench", metadata={"help": "where the figures go"})
    rounds: int = field(default=3, metadata={"help": "times through all runs, a seed each"})
    seed: int = field(default=0, metadata={"help": "ours, of the first round"})

    def __post_init__(self) -> None:
        """Refuse what cannot be measured.

        Raises:
            UserError: no round, or no nanoGPT at the path.
        """
        require(self, 1, "rounds")
        if self.nanogpt and not (Path(self.nanogpt) / "train.py").exists():
            raise UserError(f"{self.nanogpt}: no train.py there; give a checkout of nanoGPT")

    @property
    def data_path(self) -> str | Path:
        """The data as a process in another folder finds it."""
        return Path(self.data).absolute() if Path(self.data).exists() else self.data


@dataclass
class BenchConfig(RoundsConfig):
    """What to run, and on how much of the machine."""

    threads: int = field(default=1, metadata={"help": "of every run, each on a core of its own"})
    target_steps: int = field(default=190, metadata={"help": f"ours, to a loss of {TARGET}"})
    small_steps: int = field(default=200, metadata={"help": "ours, at nanoGPT's 0.8M shape"})
    large_steps: int = field(default=16, metadata={"help": "both, at its 10.8M shape"})
    torch_compile: bool = field(default=True, metadata={"help": "ours, too, as nanoGPT is"})

    def __post_init__(self) -> None:
        """As of every bench; too few steps, and cores that are not there."""
        super().__post_init__()
        require(self, 1, "threads")
        require(self, 30, "target_steps", "small_steps")
        require(self, 6, "large_steps")
        if not hasattr(os, "sched_setaffinity"):
            raise UserError("this system does not pin processes to cores: run the bench on Linux")
        cores = len(os.sched_getaffinity(0))
        if self.threads > cores:
            raise UserError(f"threads ({self.threads}) must be at most {cores}, the cores here")


def main() -> None:
    """Run the rounds, print the table, write `pretrain.json`."""
    (config,) = parse_config(BenchConfig)
    folder = Path(config.output_dir)
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-config.threads :])
    torch.set_num_threads(config.threads)
    task = load_task(config.data, plays=True)
    if config.nanogpt:
        copy_nanogpt(Path(config.nanogpt), folder / "nanogpt", task)
    about = measured_by() | {"threads": config.threads, "target_steps": config.target_steps}
    run_rounds(config, about, "pretrain.json", partial(one_round, config, folder))


def run_rounds(
    config: RoundsConfig,
    about: dict[str, Any],
    name: str,
    one_round: Callable[[int], dict[str, float | None]],
) -> None:
    """All rounds, a seed each; the file is written after each, the table printed after the last."""
    rounds: list[dict[str, float | None]] = []
    for number in range(config.rounds):
        rounds.append(one_round(config.seed + number))
        figures = summarise(rounds)
        write_json(Path(config.output_dir) / name, about | {"rounds": len(rounds)} | figures)
        print(f"round {number + 1} of {config.rounds}", flush=True)
    print("\n".join(format_table(figures)))


def one_round(config: BenchConfig, folder: Path, seed: int) -> dict[str, float | None]:
    """All runs once; figures by name, ratios as ours over theirs."""
    cpu, threads = torch.device("cpu"), config.threads
    peaks = {
        "bf16": matmul_peak(torch.bfloat16, cpu) / 1e9,
        "fp32": matmul_peak(torch.float32, cpu) / 1e9,
    }
    values: dict[str, float | None] = {
        "load_average": os.getloadavg()[0],
        **{f"matmul_gflops_{name}": peak for name, peak in peaks.items()},
    }
    common: dict[str, Any] = {"data": config.data_path, "seed": seed}
    common["torch_compile"] = config.torch_compile

    def ours(name: str, **fields: Any) -> Run:
        block = LARGE_BLOCK if name.startswith("10p8m") else BLOCK
        return run_ours(folder / name, common | fields, threads, block)

    def theirs(shape: Shape, steps: int, block: int, **fields: int) -> Run | None:
        if not config.nanogpt:
            return None
        return run_nanogpt(folder / "nanogpt", shape, steps, threads, block, **fields)

    def both(name: str, shape: Shape, steps: int, other: Run | None) -> dict[str, float]:
        fields = shape.ours() | {"max_steps": steps}
        found = compare(name, ours(name, **fields, **ADAMW), other)
        found |= _peak_fractions(name, folder, found, peaks)
        speed = ours(f"{name}_muon", **fields).tokens_per_second
        found[f"tokens_per_second_{name}_muon"] = speed
        if other:
            found[f"tokens_per_second_ratio_{name}_muon"] = speed / other.tokens_per_second
        return found

    target = ours("target", max_steps=config.target_steps)
    values |= describe("", "target", target) | {"val_loss_target": target.val_loss}
    small = theirs(SMALL, README_STEPS, BLOCK)
    values |= both("0p8m", SMALL, config.small_steps, small)
    # Too short a run to evaluate in, but for what nanoGPT does before its first step
    large = theirs(LARGE, config.large_steps, LARGE_BLOCK, eval_interval=100_000, eval_iters=1)
    values |= both("10p8m", LARGE, config.large_steps, large)
    reached = target.val_loss <= TARGET
    values["train_seconds_to_1p898"] = target.train_seconds if reached else None
    if small:
        values["nanogpt_val_loss"] = small.val_loss
        ratio = target.train_seconds / small.train_seconds
        values["train_time_ratio_to_1p898"] = ratio if reached else None
        values["wall_time_ratio_to_1p898"] = (
            target.wall_seconds / small.wall_seconds if reached else None
        )
        step_tokens = EQUAL_TIME_BATCH * SMALL.block_size
        tokens = small.train_seconds * target.train_tokens / target.train_seconds
        equal = ours(
            "equal_time",
            max_steps=max(30, int(tokens / step_tokens)),
            per_device_train_batch_size=EQUAL_TIME_BATCH,
        )
        values["val_loss_at_equal_time"] = equal.val_loss
        values["train_time_ratio_at_equal_time"] = equal.train_seconds / small.train_seconds
    return values


def compare(name: str, ours: Run, theirs: Run | None) -> dict[str, float]:
    """What both took, and the ratio of their speeds."""
    values = describe("", name, ours)
    if theirs:
        values |= describe("nanogpt_", name, theirs)
        ratio = ours.tokens_per_second / theirs.tokens_per_second
        values[f"tokens_per_second_ratio_{name}"] = ratio
    return values


def describe(prefix: str, name: str, one: Run) -> dict[str, float]:
    """What a run took, as figures."""
    return {
        f"{prefix}{figure}_{name}": getattr(one, figure)
        for figure in (
            "tokens_per_second",
            "train_seconds",
            "wall_seconds",
            "memory_gb",
            "core_share",
        )
    }


def _peak_fractions(
    name: str, folder: Path, values: dict[str, Any], peaks: dict[str, float]
) -> dict[str, float]:
    """Model FLOPs over the measured matmul rate: ours, and nanoGPT's at the same shape."""
    flops = flops_per_token(AutoModelForCausalLM.from_pretrained(folder / name))
    return {
        f"{who}{kind}_peak_fraction_{name}": speed * flops / 1e9 / peak
        for who in ("", "nanogpt_")
        for kind, peak in peaks.items()
        if (speed := values.get(f"{who}tokens_per_second_{name}"))
    }


def summarise(rounds: list[dict[str, float | None]]) -> dict[str, float | None]:
    """Median, least and greatest of each figure; None where a round has none to give.

    >>> summarise([{"a": 1.0}, {"a": 3.0}, {"a": 2.0}])
    {'a': 2.0, 'a_min': 1.0, 'a_max': 3.0}
    """
    figures: dict[str, float | None] = {}
    for name in rounds[0]:
        found = [value for one in rounds if (value := one[name]) is not None]
        whole = len(found) == len(rounds)
        figures[name] = statistics.median(found) if whole else None
        figures[f"{name}_min"] = min(found) if whole else None
        figures[f"{name}_max"] = max(found) if whole else None
    return figures


def format_table(figures: dict[str, float | None]) -> list[str]:
    """A line a figure: name, median, least and greatest."""

    def text(value: float | None) -> str:
        return "not reached" if value is None else f"{value:,.4g}"

    lines = [f"{'':<36}{'median':>12}{'least':>12}{'greatest':>12}"]
    for name in (name for name in figures if f"{name}_min" in figures):
        three = (figures[name], figures[f"{name}_min"], figures[f"{name}_max"])
        lines.append(f"{name:<36}" + "".join(f"{text(value):>12}" for value in three))
    return lines


if __name__ == "__main__":
    run(main)
