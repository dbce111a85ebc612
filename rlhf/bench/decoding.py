"""Decoding on a GPU: tokens a second against the memory's limit, and its share of PPO's time.

    make bench-decoding

A step reads every weight and all keys and values so far, and computes little: it cannot be faster
than the memory brings them. The limit is that, by a copy's measured bandwidth and weights in
bfloat16. Ways to sample, of a policy with random weights that hardly ever ends:

- transformers: `generate`, the policy in float32 under autocast, as TRL's trainers sample;
- leaving: rows that have ended leave (`common/decoding.py`), PPO's own;
- graph: a step recorded as a CUDA graph (`common/graph_decoding.py`), of the same policy;
- graph_bf16: the same of a bfloat16 copy, PPO's with `--graph_decoding true`.

Then PPO's updates by phase, sampling in the second way and in the last. Writes
`out/bench/decoding.json`; medians, least and greatest.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, TrainerCallback

import common.gpt  # noqa: F401 - so that Auto classes load our GPT
from common.artifacts import write_json
from common.config import run
from common.decoding import sample_unended
from common.device import measured_by
from common.errors import UserError
from common.graph_decoding import GraphSampler
from rlhf.bench.__main__ import Figures, spread
from rlhf.bench.ours import build, time_phases
from rlhf.bench.problem import FIRST_TOKEN, Problem, create

PROBLEM = Problem(
    vocab_size=50_304,
    hidden_size=768,
    layers=12,
    prompts=512,
    prompt_tokens=64,
    completion_tokens=192,
    completions=64,
    micro_batch=16,
    mini_batches=4,
    passes=1,
    learning_rate=1e-6,
)
ROWS = (64, 256)
DEVICE = torch.device("cuda")


def bandwidth() -> float:
    """Bytes a second of a large copy, those read and those written."""
    source = torch.ones(1 << 30, dtype=torch.uint8, device=DEVICE)
    into = torch.empty_like(source)
    seconds = min(timed(lambda: into.copy_(source)) for _ in range(8))
    return 2 * source.numel() / seconds


def timed(work: Callable[[], Any]) -> float:
    """Seconds until the GPU is done with it."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def limit(model: Any, rows: int, bytes_a_second: float) -> float:
    """Tokens a second if a step took as long as its weights, keys and values do, in bfloat16."""
    config = model.config
    weights = sum(parameter.numel() for parameter in model.parameters())
    tokens = PROBLEM.prompt_tokens + PROBLEM.completion_tokens / 2
    kept = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
    return rows * bytes_a_second / (2 * (weights + rows * tokens * kept))


def bench_ways(folder: Path, rounds: int) -> Figures:
    """Tokens a second of each way, in turns, and its share of the limit."""
    policy: Any = AutoModelForCausalLM.from_pretrained(folder / "policy")
    policy = policy.to(DEVICE).eval()
    copy: Any = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.bfloat16)
    copy = copy.to(DEVICE).eval()
    ways: dict[str, tuple[Any, Any]] = {
        "transformers": (policy, None),
        "leaving": (policy, sample_unended),
        "graph": (policy, GraphSampler()),
        "graph_bf16": (copy, GraphSampler()),
    }
    speed = bandwidth()
    figures: Figures = {"bandwidth_gb_per_second": speed / 1e9}
    for rows in ROWS:
        shape = rows, PROBLEM.prompt_tokens
        ids = torch.randint(FIRST_TOKEN, PROBLEM.vocab_size, shape, device=DEVICE)

        def draw(model: Any, sample: Any, ids: torch.Tensor = ids) -> None:
            autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=model is policy)
            with torch.no_grad(), autocast:
                model.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=PROBLEM.completion_tokens,
                    do_sample=True,
                    top_k=0,
                    eos_token_id=None,
                    **({"custom_generate": sample} if sample else {}),
                )

        found: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(rounds + 1):
            for way, used in ways.items():
                seconds = timed(partial(draw, *used))
                if turn:  # the first also allocates and records
                    found[way].append(rows * PROBLEM.completion_tokens / seconds)
        most = limit(copy, rows, speed)
        figures[f"limit_tokens_per_second_{rows}"] = most
        for way, rates in found.items():
            figures |= spread(f"{way}_tokens_per_second_{rows}", rates)
            figures[f"{way}_share_of_limit_{rows}"] = statistics.median(rates) / most
    return figures


class Clock(TrainerCallback):
    """Keeps the seconds of each update and of its phases; stops after so many."""

    def __init__(self, phases: dict[str, float], steps: int, updates: int):
        self.phases, self.steps, self.left = phases, steps, updates
        self.seconds: list[dict[str, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The first update begins."""
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An update ends with its last optimizer step."""
        if state.global_step % self.steps == 0:
            now = time.perf_counter()
            self.seconds.append({"seconds": now - self.start, **self.phases})
            self.phases.clear()
            self.start, self.left = now, self.left - 1
            control.should_training_stop = self.left == 0


def bench_ppo(folder: Path, way: str, updates: int) -> Figures:
    """Seconds of an update, and the share of each phase, over all but the first."""
    trainer: Any = build(folder, way, PROBLEM, graph_decoding=way == "graph_bf16")
    clock = Clock(time_phases(trainer), trainer.args.steps_per_update, updates + 1)
    trainer.add_callback(clock)
    trainer.train()
    found = clock.seconds[1:]
    figures = spread(f"ppo_{way}_update_seconds", [update["seconds"] for update in found])
    for phase in (name for name in found[0] if name != "seconds"):
        total = sum(update[phase] for update in found)
        name = f"ppo_{way}_{phase.removesuffix('_seconds')}_share"
        figures[name] = total / sum(update["seconds"] for update in found)
    return figures


def main() -> None:
    """Run the bench, write and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--output_dir", type=Path, default=Path("out/bench"))
    parser.add_argument("--rounds", type=int, default=3, help="times through all that count")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("bench-decoding needs a CUDA GPU: make bench-rlhf measures PPO on a CPU")
    folder = args.output_dir / "decoding"
    folder.mkdir(parents=True, exist_ok=True)
    create(PROBLEM, folder)
    written: dict[str, Any] = measured_by()
    parts = [partial(bench_ways, folder, args.rounds)]
    parts += [partial(bench_ppo, folder, way, args.rounds) for way in ("leaving", "graph_bf16")]
    for part in parts:
        figures = {name: float(f"{value:.4g}") for name, value in part().items()}
        written |= figures
        write_json(args.output_dir / "decoding.json", written)
        for name, value in figures.items():
            print(f"{name:<60} {value:g}", flush=True)


if __name__ == "__main__":
    run(main)
