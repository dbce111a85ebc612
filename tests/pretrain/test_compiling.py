"""Whether to compile, decided by the time that training would take."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from pretrain import compiling
from pretrain.compiling import TIMED_PASSES, compile_if_worth


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What passes were made with; one takes a second and rolls dice."""
    used: list[Any] = []
    monkeypatch.setattr(compiling, "can_compile", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda loss, options: ("compiled", loss))
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
    assert found == (("compiled", "loss") if compiles else "loss")
    assert passed == ["loss"] * timed + [("compiled", "loss")] * compiles
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(not compiling.can_compile(), reason="no C++ compiler with Python's headers")
def test_compiled_is_the_same() -> None:
    """For real, with the options of a CPU. Seen to fail with an option that there is not."""
    torch.manual_seed(0)
    x = torch.randn(64, 32, requires_grad=True)
    gradients = []

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.gelu(x, approximate="tanh").square().mean()

    def one_pass(loss_of: Any) -> None:
        gradients.extend(torch.autograd.grad(loss_of(x), x))

    found = compile_if_worth(loss_of, one_pass, 1, True, Accelerator(cpu=True))
    assert found is not loss_of
    one_pass(loss_of)
    torch.testing.assert_close(gradients[0], gradients[1])
