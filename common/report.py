"""The closing table of `make all`: what each stage gained, and where its model is.

python -m common.report out/arden
"""

import sys
from pathlib import Path
from typing import Any

from common.artifacts import make_variable, read_json
from common.config import run
from common.errors import UserError

STAGES = ("pretrain", "sft", "reward", "rlhf")


def main() -> None:
    """Print the table for the profile's folder."""
    if len(sys.argv) != 2:
        raise UserError("python -m common.report takes a profile's folder, e.g. out/arden")
    folder = Path(sys.argv[1])
    summaries = {stage: read_json(folder / stage / "summary.json") for stage in STAGES}
    done = {stage: summary for stage, summary in summaries.items() if summary}
    if not done:
        raise UserError(f"no finished stage in {folder}: run `make all {make_variable(folder)}`")
    for stage, summary in done.items():
        print(f"\n{stage}  ({summary['train_seconds']:.0f} s)  {folder / stage}")
        for name, text in rows(summary):
            print(f"  {name:<34} {text}")
    print(f"\ntraining, all stages: {sum(s['train_seconds'] for s in done.values()):.0f} s")


def rows(summary: dict[str, Any]) -> list[tuple[str, str]]:
    """(name, figure) of a summary; figures before and after stand in one row.

    >>> rows({"gold_before": 0.5, "gold_after": 0.75, "kl": 2.0})
    [('gold', '0.500 -> 0.750'), ('kl', '2.000')]
    """
    table = []
    for name, value in summary.items():
        if name.endswith("_before"):
            name = name.removesuffix("_before")
            table.append((name, f"{_plain(value)} -> {_plain(summary[f'{name}_after'])}"))
        elif not name.endswith("_after") and name != "train_seconds":
            table.append((name, _plain(value)))
    return table


def show_columns(title: str, summaries: dict[str, dict[str, Any]]) -> str:
    """Several runs of one stage beside each other, a column each, as Markdown.

    >>> print(show_columns("rate", {"1e-3": {"loss": 0.5}, "1e-4": {"loss": 0.75}}))
    | rate | 1e-3 | 1e-4 |
    |---|---|---|
    | loss | 0.500 | 0.750 |
    """
    table = {column: dict(rows(summary)) for column, summary in summaries.items()}
    names = dict.fromkeys(name for figures in table.values() for name in figures)
    lines = [[title, *table], *([n, *(t.get(n, "") for t in table.values())] for n in names)]
    shown = [f"| {' | '.join(cells)} |" for cells in lines]
    return "\n".join([shown[0], "|---" * (len(table) + 1) + "|", *shown[1:]])


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return "; ".join(value) or "none"
    return f"{value:.3f}" if isinstance(value, float) else f"{value:,}"


if __name__ == "__main__":
    run(main)
