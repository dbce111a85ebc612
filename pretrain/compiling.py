"""Whether torch.compile pays for itself in this run, by measurement, and compiling.

It takes 30 to 60 s and saves a quarter to two fifths of a step's time (docs/log.md): it pays where
training takes minutes, and costs where it takes one.
"""

import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from common.device import can_compile

VECTOR_BITS = {"AVX2": 256, "AVX512": 512}
WORTH_SECONDS = 120.0  # of training uncompiled: 48 s to compile, two fifths saved
TIMED_PASSES = 3


def compile_if_worth(
    loss_of: Any,
    one_pass: Callable[[Any], None],
    passes: int,
    wanted: bool | None,
    accelerator: Accelerator,
) -> Any:
    """`loss_of`, or the same compiled; nothing but time has passed by then.

    Args:
        loss_of: takes a micro-batch through the model to its loss.
        one_pass: takes such a function forward and backward on one micro-batch, and leaves no
            gradients.
        passes: of a process in the whole run.
        wanted: compile or not; None decides by how long that many passes take uncompiled.
        accelerator: whose main process decides for all.
    """
    if wanted is False:
        return loss_of
    if not can_compile():
        accelerator.print("pretrain: no C++ compiler with Python.h here, so uncompiled and slower")
        return loss_of
    on_cpu, on_gpu = (accelerator.device.type == kind for kind in ("cpu", "cuda"))
    with torch.random.fork_rng([accelerator.device] if on_gpu else []):  # dropout's dice
        if wanted is None:
            seconds = time_pass(loss_of, one_pass, on_gpu) * passes
            [seconds] = broadcast_object_list([seconds])
            if seconds < WORTH_SECONDS:
                return loss_of
        compiled = torch.compile(loss_of, options=cpu_options() if on_cpu else None)
        start = time.perf_counter()
        one_pass(compiled)
        accelerator.print(f"pretrain: compiled in {time.perf_counter() - start:.0f} s")
    return compiled


def cpu_options() -> dict[str, Any]:
    """Kernels called from C++; tanh by way of an exponential, which is cheaper (docs/log.md).

    And how wide this CPU's vectors are, or the compiler takes from its cache, which may have come
    from another machine, kernels for wider ones: with PyTorch 2.13 they give wrong losses in
    silence.
    """
    return {
        "cpp_wrapper": True,
        "cpp.use_decompose_tanh": True,
        "cpp.simdlen": VECTOR_BITS.get(torch.backends.cpu.get_cpu_capability()),
    }


def time_pass(loss_of: Any, one_pass: Callable[[Any], None], on_gpu: bool) -> float:
    """Seconds of the fastest of a few passes; the first one also allocates."""
    times = []
    for _ in range(TIMED_PASSES):
        start = time.perf_counter()
        one_pass(loss_of)
        if on_gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
