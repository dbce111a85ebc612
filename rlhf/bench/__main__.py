"""Our PPO against TRL 1.12's `PPOTrainer`, the last that TRL had, in turns, update by update.

    make bench-rlhf
    make bench-rlhf TRL112=path/to/python     an interpreter with trl==1.12.0

Without TRL112 ours alone is measured. Three problems (rlhf/bench/problem.py has what they share):

- reward: each trainer by its own defaults, ours one pass by four mini-batches, TRL's four passes by
  one, until the mean score of five updates is over `--target`; as many times as `--seeds` says;
- lengths: prompts and completions of many lengths, both four passes by one mini-batch;
- vocabulary: 16,000 tokens, lengths alike, both four passes by one mini-batch.

Writes `out/bench/rlhf.json`. A ratio is that of the two trainers' figures of one turn (of one seed,
for the time to the reward); the median of all turns, the least as `_min`, the greatest as `_max`.
Ratios of time are by the clock, and by processor time with `_cpu`: on one thread the second is the
first on an idle machine, whatever else runs.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.artifacts import write_json
from common.config import run
from common.device import measured_by
from common.errors import UserError
from rlhf.bench.problem import Problem, create, write

REWARD = Problem(vocab_size=200, prompt_tokens=8, completion_tokens=16)
LENGTHS = Problem(
    vocab_size=64,
    prompt_tokens=96,
    completion_tokens=96,
    varied=True,
    completions=32,
    micro_batch=8,
    learning_rate=1e-6,  # lengths stay what they are
)
VOCABULARY = Problem(
    vocab_size=16_000,
    prompt_tokens=64,
    completion_tokens=64,
    completions=32,
    micro_batch=32,
    learning_rate=1e-6,
)
ONE_PASS: dict[str, Any] = {"passes": 1, "mini_batches": 4, "micro_batch": 16}
Update = dict[str, float]
Figures = dict[str, float]


class Ended(UserError):
    """A trainer ended before it was told to."""


class Worker:
    """A trainer in a process of its own, which takes an update when it is its turn."""

    def __init__(self, python: str, module: str, folder: Path, name: str):
        self.log = folder / f"{name}.log"
        self.name = name
        self.updates: list[Update] = []
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [python, "-m", module, str(folder), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )

    def wait(self) -> Update:
        """Read one line of it."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Ended(f"{self.name} ended before it was told to: see {self.log}")
        return json.loads(line)

    def update(self) -> Update:
        """Let it take one update."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.updates.append(self.wait())
        return self.updates[-1]

    def total(self, figure: str) -> float:
        """A figure summed over its updates."""
        return sum(update[figure] for update in self.updates)

    def score(self) -> float:
        """Mean of the last five updates."""
        return statistics.fmean(update["score"] for update in self.updates[-5:])


def start(
    problem: Problem, ours: dict[str, Problem], folder: Path, trl112: str | None
) -> dict[str, Worker]:
    """Write a problem and start its workers: ours by name, and `trl112` where there is one."""
    folder.mkdir(parents=True, exist_ok=True)
    create(problem, folder)
    workers = {}
    for name, settings in ours.items():
        write(settings, folder, name)
        workers[name] = Worker(sys.executable, "rlhf.bench.ours", folder, name)
    if trl112 is not None:
        write(problem, folder, "trl112")
        workers["trl112"] = Worker(trl112, "rlhf.bench.trl112", folder, "trl112")
    for worker in workers.values():
        worker.wait()
    return workers


def stop(workers: dict[str, Worker]) -> None:
    """End the processes: there is nothing to be saved."""
    for worker in workers.values():
        worker.process.kill()
        worker.process.communicate()


def take_turns(workers: dict[str, Worker], rounds: int) -> None:
    """One update that does not count, then some that do."""
    for turn in range(rounds + 1):
        for worker in workers.values():
            worker.update()
            if turn == 0:
                worker.updates.clear()


def race(workers: dict[str, Worker], target: float, limit: int) -> None:
    """In turns until each has a mean score over the target.

    TRL 1.12's ends by itself where a batch has no token beside end-of-text; it has no updates then.
    """
    running = list(workers.values())
    while running:
        for worker in running:
            try:
                worker.update()
            except Ended as error:
                if worker.name != "trl112":
                    raise
                print(f"{error}: no ratio by this seed", file=sys.stderr)
                worker.updates.clear()
        running = [w for w in running if w.updates and (len(w.updates) < 5 or w.score() < target)]
        if running and len(running[0].updates) >= limit:
            names = ", ".join(w.name for w in running)
            raise UserError(f"{names}: score under {target} after {limit} updates")


def spread(name: str, values: list[float]) -> Figures:
    """Median of some values, with the least and the greatest beside."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def speed(name: str, problem: Problem, workers: dict[str, Worker]) -> Figures:
    """Samples a second and peak memory of each worker, and where the time of ours goes."""
    figures: Figures = {}
    for which, worker in workers.items():
        prefix = f"{name}_{which}"
        rates = [problem.completions / update["cpu_seconds"] for update in worker.updates]
        figures |= spread(f"{prefix}_samples_per_cpu_second", rates)
        rates = [problem.completions / update["seconds"] for update in worker.updates]
        figures |= spread(f"{prefix}_samples_per_second", rates)
        if "tokens" in worker.updates[0]:
            figures[f"{prefix}_tokens_per_sample"] = (
                worker.total("tokens") / len(worker.updates) / problem.completions
            )
        figures[f"{prefix}_peak_mb"] = worker.updates[-1]["peak_mb"]
        phases = [p for p in worker.updates[0] if p.endswith("_seconds") and p != "cpu_seconds"]
        for phase in phases:
            share = worker.total(phase) / worker.total("seconds")
            figures[f"{prefix}_{phase.removesuffix('_seconds')}_share"] = share
    return figures


def turns(ours: Worker, theirs: Worker, figure: str) -> Iterator[float]:
    """Theirs over ours, turn by turn."""
    for mine, other in zip(ours.updates, theirs.updates, strict=True):
        yield other[figure] / mine[figure]


def bench_reward(folder: Path, trl112: str | None, target: float, seeds: int) -> Figures:
    """Time until the score is over the target, each trainer by its defaults."""
    figures: Figures = {}
    ratios: dict[str, list[float]] = {"seconds": [], "cpu_seconds": []}
    shared: dict[str, list[float]] = {"seconds": [], "cpu_seconds": []}
    found: dict[str, list[float]] = {}
    for seed in range(seeds):
        problem = replace(REWARD, seed=seed)
        ours = {
            "separate": replace(problem, **ONE_PASS),
            "shared": replace(problem, share_trunk=True, **ONE_PASS),
        }
        workers = start(problem, ours, folder / f"seed{seed}", trl112)
        race(workers, target, limit=400)
        stop(workers)
        for name, worker in workers.items():
            if not worker.updates:
                continue
            for figure, value in {
                "seconds": worker.total("seconds"),
                "cpu_seconds": worker.total("cpu_seconds"),
                "updates": len(worker.updates),
                "kl": worker.updates[-1]["kl"],
            }.items():
                found.setdefault(f"reward_{name}_{figure}", []).append(value)
        if trl112 is not None and workers["trl112"].updates:
            for figure in ratios:
                theirs = workers["trl112"].total(figure)
                ratios[figure].append(theirs / workers["separate"].total(figure))
                shared[figure].append(theirs / workers["shared"].total(figure))
    for name, values in found.items():
        figures |= spread(name, values)
    if trl112 is not None:
        figures["reward_trl112_failed"] = seeds - len(ratios["seconds"])
    if ratios["seconds"]:
        figures |= spread("time_to_reward_ratio", ratios["seconds"])
        figures |= spread("time_to_reward_ratio_cpu", ratios["cpu_seconds"])
        figures |= spread("time_to_reward_ratio_shared", shared["seconds"])
        figures |= spread("time_to_reward_ratio_shared_cpu", shared["cpu_seconds"])
    return figures


def bench_speed(
    name: str, problem: Problem, folder: Path, trl112: str | None, rounds: int
) -> tuple[Figures, dict[str, Worker]]:
    """Both critics beside TRL's trainer on one problem."""
    ours = {"separate": problem, "shared": replace(problem, share_trunk=True)}
    workers = start(problem, ours, folder, trl112)
    take_turns(workers, rounds)
    stop(workers)
    return speed(name, problem, workers), workers


def main() -> None:
    """Run the bench, write and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output_dir", type=Path, default=Path("out/bench"))
    parser.add_argument("--rounds", type=int, default=3, help="updates of each that count")
    parser.add_argument("--seeds", type=int, default=3, help="runs to the reward")
    parser.add_argument("--target", type=float, default=0.6, help="reward to be reached, at most 1")
    args = parser.parse_args()
    trl112 = os.environ.get("TRL112") or None
    if min(args.rounds, args.seeds) < 1:
        raise UserError(f"rounds ({args.rounds}) and seeds ({args.seeds}) must be 1 or more")
    if trl112 is not None and shutil.which(trl112) is None:
        raise UserError(f"TRL112 ({trl112}): there is no such interpreter")
    folder = args.output_dir / "rlhf"
    figures = bench_reward(folder / "reward", trl112, args.target, args.seeds)
    keep(figures, args.output_dir)
    for name, problem in {"lengths": LENGTHS, "vocabulary": VOCABULARY}.items():
        found, workers = bench_speed(name, problem, folder / name, trl112, args.rounds)
        figures |= found
        if trl112 is None:
            continue
        theirs = workers["trl112"]
        for critic in ("separate", "shared"):
            mine = workers[critic]
            if name == "lengths":
                ratio = f"samples_per_second_ratio_{critic}"
                figures |= spread(ratio, list(turns(mine, theirs, "seconds")))
                figures |= spread(f"{ratio}_cpu", list(turns(mine, theirs, "cpu_seconds")))
            else:
                suffix = "" if critic == "separate" else "_shared"
                peaks = [1 / ratio for ratio in turns(mine, theirs, "peak_mb")]
                figures |= spread(f"memory_ratio{suffix}", peaks)
        keep(figures, args.output_dir)
    for figure, value in figures.items():
        print(f"{figure:<60} {value:.4g}")


def keep(figures: Figures, folder: Path) -> None:
    """Write what has been measured so far."""
    rounded = {figure: float(f"{value:.4g}") for figure, value in figures.items()}
    write_json(folder / "rlhf.json", measured_by() | rounded)


if __name__ == "__main__":
    run(main)
