"""What the machine at hand can do."""

import torch


def has_bf16() -> bool:
    """Whether bfloat16 matrix products are fast here: a recent GPU, or a CPU with the units.

    On CPUs without them (AVX2 alone) bfloat16 products ran 10 times slower than float32.
    """
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
