"""Whether to compile, decided by the time that training would take."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from common.gpt import build_config, build_gpt
from pretrain import compiling
from pretrain.compiling import TIMED_PASSES, compile_if_worth
from pretrain.train import token_loss
from tests.pages import ROOT


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What passes were made with; one takes a second and rolls dice."""
    used: list[Any] = []
    monkeypatch.setattr(compiling, "can_compile", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda loss, options: ("compiled", loss, options))
    monkeypatch.setattr(compiling.time, "perf_counter", lambda: float(len(used)))
    return used


@pytest.mark.parametrize(
    ("passes", "wanted", "timed", "compiles"),
    [
        (119, None, TIMED_PASSES, False),
        (120, None, TIMED_PASSES, True),
        (10_000, False, 0, False),
        (1, True, 0, True),
    ],
)
def test_by_measurement_or_by_word(
    passed: list[Any], passes: int, wanted: bool | None, timed: int, compiles: bool
) -> None:
    """Two minutes at a second a pass, or what the configuration says; dropout's dice stay.

    Broken by the first pass's time in place of all, and by dice that are not put back.
    """

    def one_pass(loss_of: Any) -> None:
        passed.append(loss_of)
        torch.rand(1)

    before = torch.get_rng_state()
    found = compile_if_worth("loss", one_pass, passes, wanted, Accelerator(cpu=True))
    compiled = "compiled", "loss", compiling.cpu_options()
    assert found == (compiled if compiles else "loss")
    assert passed == ["loss"] * timed + [compiled] * compiles
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not compiling.can_compile(), reason="no C++ compiler with Python's headers")
def test_compiled_is_the_same() -> None:
    """The model with packed documents, for real. Seen to fail with an option that there is not, and
    with other sizes of the angles told to the compiler."""
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model: Any = build_gpt(build_config("modern", vocab_size=32, block_size=8, **sizes, **special))
    ids = torch.randint(3, 32, (2, 8))
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2], [0, 1, 0, 1, 2, 3, 4, 5]])
    gradients = []

    def loss_of(*batch: torch.Tensor) -> torch.Tensor:
        return token_loss(model, *batch)

    def one_pass(loss_of: Any) -> None:
        loss = loss_of(ids, ids, positions)
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))

    found = compile_if_worth(loss_of, one_pass, 1, True, Accelerator(cpu=True))
    assert found is not loss_of
    one_pass(loss_of)
    for ours, uncompiled in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, uncompiled)


COMPILE = """
import torch
from accelerate import Accelerator
from pretrain.compiling import compile_if_worth
values = torch.arange(64.0)
found = []
def one_pass(loss_of): found.append(loss_of(values))
def loss_of(values): return values.softmax(0).square().sum()
one_pass(loss_of)
compile_if_worth(loss_of, one_pass, 1, True, Accelerator(cpu=True))
torch.testing.assert_close(*found)
"""


@pytest.mark.skipif(not compiling.can_compile(), reason="no C++ compiler with Python's headers")
@pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the CPU has vectors of one width"
)
def test_a_cache_of_another_cpu_is_not_taken(tmp_path: Path) -> None:
    """As where several machines share one. Seen to fail without the vectors' width told."""
    for capability in ("avx512", "avx2"):
        environment = {"ATEN_CPU_CAPABILITY": capability, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", COMPILE]
        done = subprocess.run(
            command, capture_output=True, text=True, env=os.environ | environment, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr[-2000:]
