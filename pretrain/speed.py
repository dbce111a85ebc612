"""How fast a model trains, beside how fast the machine multiplies matrices.

Utilisation is the share of the measured matmul rate that goes into the model's own products: FLOPs
that are recomputed or spent on anything else count nothing (PaLM's MFU, arXiv:2204.02311, app. B,
with a measured peak in place of the maker's).
"""

import time
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

# (rows, inputs, outputs) of products: a large one, and what small models do. Caches decide which
# of them is the fastest, so the best one counts.
CPU_SHAPES = ((768, 128, 512), (1024, 1024, 1024), (4096, 384, 1536))
GPU_SHAPES = ((8192, 8192, 8192), (16384, 4096, 4096))
REPEATS = 8


def flops_per_token(model: Any, block_size: int | None = None) -> int:
    """Of forward and backward: 6 a weight in a matrix product, 12 L H T for attention.

    A weight multiplies and adds once forward, twice backward; so do the T x T scores and their
    product with the values, the half above the diagonal included (PaLM, arXiv:2204.02311, app. B).
    Tables that are only looked up, norms and biases count nothing. T is `block_size`, by default
    the model's context.
    """
    config = model.config
    products = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear | Conv1D))
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    mixed = config.num_hidden_layers * config.num_attention_heads * width
    return 6 * products + 12 * mixed * (block_size or config.max_position_embeddings)


def matmul_peak(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the fastest of a few matrix products here, with the threads that torch has.

    Takes a tenth of a second on a CPU with the units for `dtype`, and leaves the generators as
    they are.
    """
    on_cpu = device.type == "cpu"
    random = torch.Generator(device).manual_seed(0)
    best = 0.0
    for rows, inputs, outputs in CPU_SHAPES if on_cpu else GPU_SHAPES:
        x = torch.randn(rows, inputs, device=device, generator=random).to(dtype)
        weight = torch.randn(outputs, inputs, device=device, generator=random).to(dtype)
        for _ in range(REPEATS):
            _wait(on_cpu)
            start = time.perf_counter()
            F.linear(x, weight)
            _wait(on_cpu)
            seconds = time.perf_counter() - start
            best = max(best, 2 * rows * inputs * outputs / seconds)
    return best


def _wait(on_cpu: bool) -> None:
    if not on_cpu:
        torch.accelerator.synchronize()
