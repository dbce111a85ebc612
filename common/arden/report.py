"""The alignment story of Arden: before, after PPO, and with the known truth as reward.

    make arden-report                       out/arden
    python -m common.arden.report out/arden out/arden-1 out/arden-2      three seeds

One table is of greedy answers, one of answers drawn at temperature 1; a line below compares gold of
drawn answers with the best of many. Each figure is the mean over the folders (one a seed). Behind ±
stands, of one folder, the standard error over questions, sqrt(p (1 - p) / n); of several, the
standard deviation over them, with the worst in brackets.
"""

import math
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

from common.arden.questions import evaluation_questions
from common.arden.world import PEOPLE, build_realm
from common.artifacts import read_json
from common.config import run
from common.errors import UserError

# figure -> the question set that it is a share of; None: no share
FIGURES = {
    "exact_match": "heldout_people",
    "exact_match_heldout_phrasing": "heldout_phrasing",
    "exact_match_two_fact": "two_fact",
    "refusal_known": "heldout_people",
    "hallucination": "stranger",
    "hallucination_two_fact": "stranger_two_fact",
    "hallucination_strange_name": "strange_name",
    "hallucination_untold": "untold",
    "courtesy": None,
    "words": None,
    "gold": None,
}
# which of several seeds is the worst; of words none is
WORST = {
    name: max if name.startswith(("refusal", "hallucination")) else min
    for name in FIGURES
    if name != "words"
}
COLUMNS = {
    "fine-tuned": ("rlhf", "before"),
    "PPO": ("rlhf", "after"),
    "PPO, judge as reward": ("rlhf_judge", "after"),
}


def main() -> None:
    """Print the table of the folders given."""
    folders = [Path(argument) for argument in sys.argv[1:]]
    if not folders:
        raise UserError("python -m common.arden.report takes Arden's folders, e.g. out/arden")
    report(folders)


def report(folders: list[Path]) -> None:
    """Print the tables of finished runs, a folder a seed.

    Raises:
        UserError: one has no finished rlhf.
    """
    summaries = {
        stage: [read_json(folder / stage / "summary.json") for folder in folders]
        for stage in ("rlhf", "rlhf_judge")
    }
    if None in summaries["rlhf"]:
        missing = folders[summaries["rlhf"].index(None)]
        raise UserError(f"no finished rlhf in {missing}: run `make all` first")
    columns = {name: c for name, c in COLUMNS.items() if None not in summaries[c[0]]}
    counts = count_questions(folders[0])
    for title, ending in (("greedy", ""), ("at temperature 1", "_sampled")):
        print(f"\n| {title} | " + " | ".join(columns) + " |")
        print("|---" * (1 + len(columns)) + "|")
        for figure, asked in FIGURES.items():
            cells = [
                show(
                    [summary[f"{figure}{ending}_{when}"] for summary in summaries[stage]],
                    counts.get(asked or ""),
                    WORST.get(figure),
                )
                for stage, when in columns.values()
            ]
            print(f"| {figure} | " + " | ".join(cells) + " |")
    runs = summaries["rlhf"]
    for best in (name for name in runs[0] if name.startswith("gold_best_of_")):
        gold = {
            name: show([run[name] for run in runs], None, min)
            for name in ("gold_drawn_before", "gold_drawn_after", best)
        }
        print("\n" + ", ".join(f"{name} {value}" for name, value in gold.items()))


def count_questions(folder: Path) -> dict[str, int]:
    """Questions in each set that the run in a folder was measured on."""
    config = yaml.safe_load((folder / "rlhf" / "config.yaml").read_text(encoding="utf-8"))
    realm = build_realm(config["realm_seed"], config.get("realm_people", PEOPLE))
    sets = evaluation_questions(realm, config["evaluate_on"])
    return {name: len(asked) for name, asked in sets.items()}


def show(values: list[Any], questions: int | None, worst: Any) -> str:
    """Mean and spread of one figure, and of several seeds the worst, if one is (`min` or `max`).

    >>> show([0.5], 100, min)
    '0.500 ± 0.050'
    >>> show([0.25, 0.75], 100, max)
    '0.500 ± 0.354 (0.750)'
    """
    mean = statistics.fmean(values)
    if len(values) > 1:
        spread = f"{mean:.3f} ± {statistics.stdev(values):.3f}"
        return f"{spread} ({worst(values):.3f})" if worst else spread
    if questions is None:
        return f"{mean:.3f}"
    return f"{mean:.3f} ± {math.sqrt(mean * (1 - mean) / questions):.3f}"


if __name__ == "__main__":
    run(main)
