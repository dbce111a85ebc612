"""Speed of pretraining on a GPU, by itself or beside nanoGPT in the same minutes.

make bench-pretrain-gpu DATA=input.txt NANOGPT=path

Two comparisons, every run a process of its own, with compile: GPT-2's smallest shape at contexts of
1,024 tokens, half a million tokens a step, for its tokens a second; and Tiny Shakespeare by the
10.8M parameters of nanoGPT's configuration for a GPU, for its exact validation loss and how long it
took. nanoGPT keeps the checkpoint of its least sampled loss, and that one is measured. Writes
`pretrain_gpu.json`; what each figure is: docs/pretrain.md.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from common.config import parse_config, require, run
from common.device import measured_by
from common.errors import UserError
from common.gpt import build_config, build_gpt
from common.tasks import load_task
from common.tokenizer import train_characters
from pretrain.bench import LARGE, RoundsConfig, compare, run_rounds
from pretrain.bench_runs import (
    EVAL_EVERY,
    Run,
    Shape,
    copy_nanogpt,
    read_metrics,
    run_nanogpt,
    run_ours,
)
from pretrain.speed import flops_per_token, matmul_peak

GPT2 = Shape(layers=12, heads=12, hidden=768, block_size=1024, batch_size=96)
GPT2_WINDOWS = 480  # a step
GPT2_VOCAB = 50_304
NANOGPT_MICRO_BATCH = 12  # its own choice for this shape
SHAKESPEARE = replace(LARGE, batch_size=64)
SHAKESPEARE_STEPS = 5000  # nanoGPT's
THREADS = 8


@dataclass
class BenchGpuConfig(RoundsConfig):
    """What to run."""

    gpt2_steps: int = field(default=12, metadata={"help": "both, at GPT-2's shape"})

    def __post_init__(self) -> None:
        """As of every bench; too few steps, and no GPU."""
        super().__post_init__()
        if not torch.cuda.is_available():
            raise UserError("bench-pretrain-gpu needs a CUDA GPU: bench-pretrain is for a CPU")
        require(self, 6, "gpt2_steps")


def main() -> None:
    """Run the rounds, print the table, write `pretrain_gpu.json`."""
    (config,) = parse_config(BenchGpuConfig)
    folder = Path(config.output_dir)
    task = load_task(config.data, plays=True)
    if config.nanogpt:
        copy_nanogpt(Path(config.nanogpt), folder / "nanogpt", task)
        characters = folder / "nanogpt" / "data" / "shakespeare_char"
        for name in ("train.bin", "val.bin"):  # GPT-2's vocabulary is nanoGPT's where none is told
            (characters.parent / "openwebtext" / name).write_bytes((characters / name).read_bytes())
    blank = folder / "gpt2_blank"
    flops = flops_per_token(save_blank(blank))
    train_characters(task.tokenizer_texts()).save_pretrained(blank)
    one = partial(one_round, config, folder, blank, flops)
    run_rounds(config, measured_by(), "pretrain_gpu.json", one)


def save_blank(folder: Path) -> Any:
    """GPT-2's smallest shape with fresh weights, written for stage 1 to start from."""
    config = build_config(
        "lesson",
        vocab_size=GPT2_VOCAB,
        block_size=GPT2.block_size,
        num_hidden_layers=GPT2.layers,
        hidden_size=GPT2.hidden,
        num_attention_heads=GPT2.heads,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = build_gpt(config)
    model.save_pretrained(folder)
    return model


def one_round(
    config: BenchGpuConfig, folder: Path, blank: Path, flops: int, seed: int
) -> dict[str, float | None]:
    """All runs once; figures by name, ratios as ours over theirs."""
    peak = matmul_peak(torch.bfloat16, torch.device("cuda"))
    common: dict[str, Any] = {"data": config.data_path, "seed": seed, "torch_compile": True}
    values: dict[str, float | None] = {"matmul_tflops_bf16": peak / 1e12}

    def theirs(shape: Shape, steps: int, **fields: Any) -> Run | None:
        if not config.nanogpt:
            return None
        return run_nanogpt(folder / "nanogpt", shape, steps, THREADS, 2, device="cuda", **fields)

    gpt2: dict[str, Any] = common | {
        "model_name_or_path": blank.absolute(),
        "tokenizer": blank.absolute(),
        "block_size": GPT2.block_size,
        "per_device_train_batch_size": GPT2.batch_size,
        "gradient_accumulation_steps": GPT2_WINDOWS // GPT2.batch_size,
        "per_device_eval_batch_size": 16,
        "max_steps": config.gpt2_steps,
    }
    ours = run_ours(folder / "124m", gpt2, THREADS, 2)
    found = theirs(
        replace(GPT2, batch_size=NANOGPT_MICRO_BATCH),
        config.gpt2_steps,
        dataset="openwebtext",
        gradient_accumulation_steps=GPT2_WINDOWS // NANOGPT_MICRO_BATCH,
        eval_interval=100_000,
        eval_iters=1,
    )
    values |= compare("124m", ours, found)
    values["bf16_peak_fraction_124m"] = ours.tokens_per_second * flops / peak
    if found:
        fraction = found.tokens_per_second * flops / peak
        values["nanogpt_bf16_peak_fraction_124m"] = fraction
    fields = common | {"eval_steps": EVAL_EVERY}
    ours = run_ours(folder / "shakespeare", fields, THREADS, 50, base="large")
    values["val_loss_shakespeare"] = ours.val_loss
    found = theirs(
        SHAKESPEARE, SHAKESPEARE_STEPS, dropout=0.2, eval_iters=200, always_save_checkpoint=False
    )
    values |= compare("shakespeare", ours, found)
    if found:
        values["nanogpt_val_loss_shakespeare"] = found.val_loss
        ratio = ours.train_seconds / found.train_seconds
        values["train_time_ratio_shakespeare"] = ratio
        taken = seconds_to(folder / "shakespeare", found.val_loss)
        ratio_to_loss = taken and taken / found.train_seconds
        values["train_time_ratio_to_nanogpt_loss_shakespeare"] = ratio_to_loss
    return values


def seconds_to(run: Path, loss: float) -> float | None:
    """Training time up to a run's first evaluation at `loss` or below; None if it has none."""
    evaluated = (line for line in read_metrics(run) if "val_loss" in line)
    return next((line["seconds"] for line in evaluated if line["val_loss"] <= loss), None)


if __name__ == "__main__":
    run(main)
