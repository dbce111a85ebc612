"""How a run is followed: tokens per second and utilisation, and TensorBoard, Trackio or W&B.

    make pretrain ARGS="--report_to tensorboard"
    tensorboard --logdir out/arden/pretrain/logs

accelerate's trackers do the work; `metrics.jsonl` is written with or without them.
"""

from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from pretrain.config import PretrainConfig
from pretrain.speed import flops_per_token, matmul_peak


def make_accelerator(config: PretrainConfig) -> Accelerator:
    """The engine in the precision of the configuration, with its tracker."""
    return Accelerator(
        mixed_precision="bf16" if config.bf16 else "no",
        gradient_accumulation_steps=1,  # the loop adds up its micro-batches itself
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=Path(config.output_dir) / "logs",
        # the others wait for the one that prepares the text
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=1))],
    )


def start_trackers(config: PretrainConfig, accelerator: Accelerator, step: int) -> None:
    """Open the tracker for a run that goes on from `step`; TensorBoard drops what came after."""
    name = {"name": config.output_dir}
    own = {"tensorboard": {"purge_step": step + 1}, "trackio": name, "wandb": name}
    accelerator.init_trackers("pretrain", init_kwargs=own)


class Gauge:
    """Speed of a run, and its share of what all its processes could multiply.

    Args:
        model: before it is sharded or wrapped.
        config: whose precision counts.
        accelerator: on whose device the main process measures the matmul rate.
        block_size: tokens of a window.
    """

    def __init__(
        self, model: Any, config: PretrainConfig, accelerator: Accelerator, block_size: int
    ) -> None:
        self.flops = flops_per_token(model, block_size)
        self.peak = float("inf")
        if accelerator.is_main_process:
            dtype = torch.bfloat16 if config.bf16 else torch.float32
            self.peak = matmul_peak(dtype, accelerator.device) * accelerator.num_processes

    def read(self, tokens: int, seconds: float) -> dict[str, float]:
        """`tokens_per_second` and `utilisation` of so many tokens in so many seconds."""
        speed = tokens / seconds
        return {"tokens_per_second": speed, "utilisation": speed * self.flops / self.peak}
