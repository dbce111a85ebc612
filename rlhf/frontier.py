"""The frontier: gold score against KL, of every method, beside the reward model's own score.

    make frontier
    make frontier ARGS="--methods ppo dpo --betas 0.03 0.3 --seeds 0 --jobs 2"

Each run is stage 4 by its ordinary command, into `<output_dir>/<method>_<beta>_<seed>/`; best of n
needs no training. Finished runs are kept, so that the same command goes on where it was killed and
another with more methods, coefficients or seeds adds to them; with another configuration of the
stage, or another model or reward model, it is refused the folder. All finished ones go into
`<output_dir>.json` (a row a run), `.md` (a table of means over seeds) and `.svg`.

Where the score goes on rising with KL and gold falls, the reward model is over-optimised
(arXiv 2210.10760).
"""

import os
import re
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from common.artifacts import MEASURED, hash_model, read_json, write_json, write_text
from common.config import parse_config, require, run
from common.errors import UserError
from rlhf.frontier_plot import by_setting, plot_frontier
from rlhf.methods import METHODS

BEST_OF_N = "best_of_n"
QUESTIONS = 100  # of a kind, that best of n is measured on: n answers are drawn to each
RUN = re.compile(rf"({'|'.join(METHODS)})_[\d.e-]+_\d+")
# of a row, and of the table: from a summary's `<figure>_after`
FIGURES = (
    "score",
    "gold_drawn",
    "gold",
    "hallucination",
    "exact_match",
    "exact_match_heldout_phrasing",
    "refusal_known",
)
# Of a run on Arden, start and both evaluations included, by one thread, another run beside it, on
# cores without bfloat16 units
SECONDS = {"ppo": 420, "rloo": 500, "grpo": 420, "dpo": 500, BEST_OF_N: 200}
Row = dict[str, Any]


@dataclass
class FrontierConfig:
    """Which runs."""

    output_dir: str = field(default="out/arden/frontier", metadata={"help": "a folder a run in it"})
    stage_config: str = field(
        default="configs/arden/rlhf.yaml", metadata={"help": "what all runs have in common"}
    )
    methods: list[str] = field(
        default_factory=lambda: [*METHODS, BEST_OF_N],
        metadata={"help": f"of {', '.join([*METHODS, BEST_OF_N])}"},
    )
    betas: list[float] = field(
        default_factory=lambda: [0.01, 0.03, 0.1, 0.3], metadata={"help": "KL coefficients"}
    )
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "of each beta"})
    n: list[int] = field(
        default_factory=lambda: [1, 2, 4, 8, 16], metadata={"help": "answers to choose among"}
    )
    num_updates: int | None = field(
        default=None,
        metadata={"help": "of each run, default stage_config's; give another output_dir"},
    )
    jobs: int = field(
        default=1, metadata={"help": "runs at a time; each gets its share of OMP_NUM_THREADS"}
    )

    def __post_init__(self) -> None:
        unknown = [method for method in self.methods if method not in (*METHODS, BEST_OF_N)]
        if unknown:
            known = ", ".join([*METHODS, BEST_OF_N])
            raise UserError(f"methods ({', '.join(unknown)}) must be of {known}")
        require(self, 1, "jobs", "n")
        require(self, 0, "betas")
        if not Path(self.stage_config).is_file():
            raise UserError(f"stage_config ({self.stage_config}): there is no such file")
        data = self.stage.get("data")
        if data != "arden":
            raise UserError(f"stage_config ({self.stage_config}) has data {data}: gold is arden's")

    @property
    def stage(self) -> dict[str, Any]:
        """What `stage_config` says."""
        read = yaml.safe_load(Path(self.stage_config).read_text(encoding="utf-8"))
        return read if isinstance(read, dict) else {}


def main() -> None:
    """Run what is missing, then write table and picture of all that is finished."""
    (config,) = parse_config(FrontierConfig)
    folder = Path(config.output_dir)
    commands = plan_runs(config)
    keep_to_one_setting(folder, config)
    left = {
        name: command for name, command in commands.items() if not finished(folder / name, config.n)
    }
    minutes = sum(SECONDS[method_of(name)] for name in left) / 60
    print(
        f"frontier: {len(commands)} runs, {len(commands) - len(left)} of them finished; the others "
        f"take about {minutes:.0f} min of one core",
        flush=True,
    )
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, threads // config.jobs))}
    stop = threading.Event()

    def execute(name: str) -> None:
        if stop.is_set():
            return
        start = time.perf_counter()
        log = folder / f"{name}.log"
        with log.open("a", encoding="utf-8") as file:
            code = subprocess.run(
                left[name], stdout=file, stderr=subprocess.STDOUT, env=environment
            ).returncode
        if code:
            stop.set()
            said = [line for line in log.read_text(encoding="utf-8").splitlines() if line]
            raise UserError(f"{name} ended with code {code}, see {log}: {said[-1] if said else ''}")
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)

    with ThreadPoolExecutor(config.jobs) as pool:
        try:
            list(pool.map(execute, left))
        finally:
            stop.set()  # interrupted, too: what has begun ends, no other run begins
    rows = collect(folder)
    table = write_table(rows)
    write_json(folder.with_name(f"{folder.name}.json"), rows)
    write_text(folder.with_name(f"{folder.name}.md"), table)
    write_text(folder.with_name(f"{folder.name}.svg"), plot_frontier(rows))
    print(f"\n{table}\n{folder}.json, .md and .svg")


def plan_runs(config: FrontierConfig) -> dict[str, list[str]]:
    """The command of each run by the name of its folder, a whole seed before the next."""
    commands = {}
    for seed in config.seeds:
        for method in config.methods:
            if method == BEST_OF_N:
                n = [str(n) for n in config.n]
                runs = {BEST_OF_N: ["rlhf.best_of_n", "--questions", str(QUESTIONS), "--n", *n]}
            else:
                settings = ["--method", method, "--seed", str(seed), "--best_of", "0", "--beta"]
                if config.num_updates:
                    settings = ["--num_updates", str(config.num_updates), *settings]
                runs = {f"{method}_{b:g}_{seed}": ["rlhf", *settings, str(b)] for b in config.betas}
            for name, flags in runs.items():
                command = [sys.executable, "-m", *flags, "--config", config.stage_config]
                command += ["--output_dir", str(Path(config.output_dir) / name)]
                commands[name] = [*command, "--disable_tqdm", "true"]
    return commands


def keep_to_one_setting(folder: Path, config: FrontierConfig) -> None:
    """Note in `folder` what its runs have in common.

    Raises:
        UserError: the runs that are there have something else.
    """
    stage = config.stage
    reward = stage["reward"]
    models = [stage["model_name_or_path"], *([reward] if isinstance(reward, str) else reward)]
    common = stage | {
        "num_updates": config.num_updates or stage.get("num_updates"),
        "models": {str(name): hash_model(Path(str(name))) for name in models},
    }
    noted = read_json(folder / "setting.json") or common
    differ = [name for name in common | noted if common.get(name) != noted.get(name)]
    if differ:
        raise UserError(
            f"{folder} holds runs with {differ[0]} {noted.get(differ[0])} (now "
            f"{common.get(differ[0])}): give another --output_dir"
        )
    write_json(folder / "setting.json", common)


def method_of(name: str) -> str:
    """The method of a run's folder."""
    return BEST_OF_N if name == BEST_OF_N else name.split("_")[0]


def finished(folder: Path, n: list[int]) -> bool:
    """Whether a run's figures are there; of best of n, for every `n`."""
    best = {row["n"] for row in read_json(folder / MEASURED) or []}
    return (folder / "summary.json").exists() or set(n) <= best


def collect(folder: Path) -> list[Row]:
    """A row for each finished run: method, kl_coefficient (or n), seed, kl and `FIGURES`.

    `drawn_questions` is the number of a kind where the task's figures are of fewer, drawn answers.
    """
    rows: list[Row] = []
    for path in sorted(folder.glob("*_*_*/summary.json")):
        if not RUN.fullmatch(path.parent.name):  # set aside by hand
            continue
        method, beta, seed = path.parent.name.split("_")
        summary = read_json(path)
        figures = {name: summary[f"{name}_after"] for name in FIGURES}
        rows.append(
            {"method": method, "kl_coefficient": float(beta), "n": None, "seed": int(seed)}
            | {"drawn_questions": None, "kl": summary["kl"]}
            | figures
        )
    for best in read_json(folder / BEST_OF_N / MEASURED) or []:
        rows.append(
            {"method": BEST_OF_N, "kl_coefficient": None, "n": best["n"], "seed": 0}
            | {"drawn_questions": QUESTIONS}
            | {name: best[name] for name in ("kl", *FIGURES)}
        )
    return sorted(rows, key=lambda row: (row["method"], row["n"] or -row["kl_coefficient"]))


def write_table(rows: list[Row]) -> str:
    """Markdown: means over seeds, with the standard deviation where there are several."""
    columns = ("kl", *FIGURES)
    lines = [
        "| method | | seeds | " + " | ".join(columns) + " |",
        "|---" * (3 + len(columns)) + "|",
    ]
    for (method, setting), group in by_setting(rows).items():
        cells = [show([row[name] for row in group]) for name in columns]
        if drawn := group[0]["drawn_questions"]:
            method += f" (drawn, {drawn} questions a kind)"
        lines.append(f"| {method} | {setting} | {len(group)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def show(values: list[float]) -> str:
    """Mean and, of several, standard deviation.

    >>> show([0.25, 0.75])
    '0.50 ± 0.35'
    """
    mean = f"{statistics.fmean(values):.2f}"
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


if __name__ == "__main__":
    run(main)
