"""What the machine at hand is, and can do."""

import datetime
import os
import platform
import shlex
import shutil
import sysconfig
from pathlib import Path
from typing import Any

import torch

from common.artifacts import git_commit

LONGEST_WRITTEN_OUT = {True: 256, False: 128}  # by whether bfloat16 is fast


def has_bf16() -> bool:
    """Whether bfloat16 matrix products are fast here: a recent GPU, or a CPU with the units.

    On CPUs without them (AVX2 alone) bfloat16 products ran 10 times slower than float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def fast_attention(block_size: int) -> str:
    """The attention implementation that trains fastest here on rows of `block_size` tokens.

    On a CPU, short rows: attention written out ("eager"), since PyTorch's kernel costs more than
    it saves there (docs/log.md: 57 ms a step against 80 at 64 tokens, and at 256 tokens 238 against
    281 where bfloat16 is fast, 322 against 297 where it is not).
    """
    written_out = not torch.cuda.is_available() and block_size <= LONGEST_WRITTEN_OUT[has_bf16()]
    return "eager" if written_out else "sdpa"


def can_compile() -> bool:
    """Whether `torch.compile` finds a compiler ($CXX, else g++) and Python's headers."""
    compiler, *_ = shlex.split(os.environ.get("CXX", "g++"))
    headers = Path(sysconfig.get_paths()["include"], "Python.h")
    return shutil.which(compiler) is not None and headers.exists()


def measured_by() -> dict[str, Any]:
    """What a benchmark's figures are of: `date`, `commit`, `machine`, `torch`."""
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else _processor(),
        "torch": torch.__version__,
    }


def _processor() -> str:
    """The processor's name, as Linux gives it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
