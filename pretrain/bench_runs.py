"""The runs that `pretrain.bench` times: ours and nanoGPT's, each a process of its own.

Ours is stage 1 as the command line starts it. nanoGPT runs from a copy of its checkout, on the same
text cut at the same place, and is timed by what it prints. No code of it is in this project.
"""

import contextlib
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.artifacts import read_json
from common.config import as_flags
from common.errors import UserError
from common.tasks import Task

ROOT = Path(__file__).parents[1]
EVAL_EVERY = 250  # nanoGPT's, in its configuration for Tiny Shakespeare


@dataclass(frozen=True)
class Shape:
    """Sizes that both sides get."""

    layers: int
    heads: int
    hidden: int
    block_size: int
    batch_size: int

    def ours(self) -> dict[str, Any]:
        """As stage 1's fields: GPT-2's shape, whose mathematics nanoGPT has."""
        return {
            "shape": "lesson",
            "tie_word_embeddings": True,
            "block_size": self.block_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "hidden_size": self.hidden,
            "per_device_train_batch_size": self.batch_size,
        }

    def theirs(self) -> dict[str, Any]:
        """As nanoGPT's."""
        return {
            "block_size": self.block_size,
            "n_layer": self.layers,
            "n_head": self.heads,
            "n_embd": self.hidden,
            "batch_size": self.batch_size,
        }


@dataclass(frozen=True)
class Run:
    """What a run took: training without compiling and evaluating; wall time with everything."""

    train_seconds: float
    train_tokens: int
    tokens_per_second: float  # median over blocks of steps
    val_loss: float
    wall_seconds: float
    memory_gb: float
    core_share: float  # of its cores' time that the process got; below 1, others ran there


def run_ours(
    output: Path, fields: dict[str, Any], threads: int, block: int, base: str = "small"
) -> Run:
    """Stage 1 by its command, with `fields` over a configuration of `configs/shakespeare`.

    Args:
        output: its output directory, made anew.
        fields: names and values of its configuration.
        threads: that it has.
        block: steps over which a speed is taken.
        base: the configuration's name.
    """
    shutil.rmtree(output, ignore_errors=True)
    output.parent.mkdir(parents=True, exist_ok=True)
    values = fields | {"output_dir": output.absolute(), "logging_steps": block}
    config = str(ROOT / "configs" / "shakespeare" / f"{base}.yaml")
    command = [sys.executable, "-m", "pretrain", "--config", config, *as_flags(values)]
    used = _run(command, ROOT, output.with_suffix(".log"), threads)
    lines = read_metrics(output)
    rates = [
        (after["tokens"] - before["tokens"]) / (after["seconds"] - before["seconds"])
        for before, after in pairwise(lines)
    ]
    return tell(
        output.name,
        train_seconds=lines[-1]["seconds"],
        train_tokens=lines[-1]["tokens"],
        tokens_per_second=statistics.median(rates),
        val_loss=read_json(output / "summary.json")["val_loss"],
        **used,
    )


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def run_nanogpt(
    copy: Path, shape: Shape, steps: int, threads: int, block: int, **fields: Any
) -> Run:
    """nanoGPT's `train.py` with compile, in `copy` (`copy_nanogpt`).

    Its README's CPU run but for `shape`, `steps` and `fields`. An iteration that evaluates is left
    out of the training time, and the mean of the others put in its place.
    """
    values = shape.theirs() | {"max_iters": steps, "lr_decay_iters": steps, "dropout": 0.0}
    values |= {"device": "cpu", "compile": True, "log_interval": 1, "eval_iters": 20}
    values |= {"always_save_checkpoint": True, "eval_interval": EVAL_EVERY} | fields
    flags = [f"--{name}={value}" for name, value in values.items()]
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *flags]
    log = copy.with_suffix(".log")
    used = _run(command, copy, log, threads)
    found = re.findall(r"^iter (\d+): .* time ([\d.]+)ms", log.read_text(), re.MULTILINE)
    seconds = [float(ms) / 1000 for i, ms in found if int(i) % values["eval_interval"]]
    windows = shape.batch_size * values.get("gradient_accumulation_steps", 1)
    step_tokens = windows * shape.block_size
    blocks = [seconds[i : i + block] for i in range(block, len(seconds) - block + 1, block)]
    return tell(
        "nanoGPT",
        train_seconds=statistics.fmean(seconds) * steps,
        train_tokens=steps * step_tokens,
        tokens_per_second=statistics.median(step_tokens / statistics.fmean(b) for b in blocks),
        val_loss=nanogpt_loss(copy) if steps % values["eval_interval"] == 0 else float("nan"),
        **used,
    )


def tell(name: str, **values: Any) -> Run:
    """A run's figures, printed as it ends: a round takes long, and may be cut off."""
    run = Run(**values)
    print(
        f"{name}: {run.tokens_per_second:,.0f} tokens/s, {run.train_seconds:.1f} s of training "
        f"({run.wall_seconds:.0f} s in all), loss {run.val_loss:.4f}",
        flush=True,
    )
    return run


def _run(command: list[str], folder: Path, log: Path, threads: int) -> dict[str, float]:
    """Run to the end, output into `log`; the measured fields of `Run`."""
    start = time.perf_counter()
    with log.open("w") as output:
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=output, env=environment
        )
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode:
        raise UserError(f"a run ended with exit code {process.returncode}: its words are in {log}")
    return {
        "wall_seconds": wall,
        "memory_gb": usage.ru_maxrss / 1e6,
        "core_share": (usage.ru_utime + usage.ru_stime) / wall / threads,
    }


def copy_nanogpt(checkout: Path, copy: Path, task: Task) -> None:
    """Copy the checkout, and write `task`'s text as nanoGPT reads it: a number a character."""
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(checkout, copy, ignore=shutil.ignore_patterns(".git"))
    texts = {split: "".join(task.texts(split)) for split in ("train", "validation")}
    characters = sorted(set("".join(texts.values())))
    number = {character: i for i, character in enumerate(characters)}
    folder = copy / "data" / "shakespeare_char"
    for split, name in (("train", "train.bin"), ("validation", "val.bin")):
        np.array([number[c] for c in texts[split]], dtype=np.uint16).tofile(folder / name)
    meta = {"vocab_size": len(number), "stoi": number, "itos": dict(enumerate(characters))}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


@torch.no_grad()
def nanogpt_loss(copy: Path) -> float:
    """Exact validation loss of nanoGPT's checkpoint: every token but the first predicted once."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", copy / "model.py")
    assert spec and spec.loader
    theirs: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    saved = torch.load(copy / "out-shakespeare-char" / "ckpt.pt", map_location="cpu")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with contextlib.redirect_stdout(io.StringIO()):
        model = theirs.GPT(theirs.GPTConfig(**saved["model_args"])).to(device).eval()
    weights = {name.removeprefix("_orig_mod."): w for name, w in saved["model"].items()}
    model.load_state_dict(weights)
    tokens = np.fromfile(copy / "data" / "shakespeare_char" / "val.bin", dtype=np.uint16)
    ids, nats = torch.from_numpy(tokens.astype(np.int64)).to(device), 0.0
    width = saved["model_args"]["block_size"]
    whole = (len(ids) - 1) // width * width
    parts = list(zip(ids[:whole].view(-1, width), ids[1 : whole + 1].view(-1, width), strict=True))
    parts += [(ids[whole:-1], ids[whole + 1 :])] if whole < len(ids) - 1 else []
    for inputs, targets in parts:
        nats += model(inputs[None], targets[None])[1].item() * len(targets)
    return nats / (len(ids) - 1)
