"""Whether to compile, decided by the time that training would take."""

from typing import Any

import pytest
import torch
from accelerate import Accelerator

from pretrain import compiling
from pretrain.compiling import TIMED_PASSES, compile_if_worth


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The nets that passes were made with; a pass takes a second and rolls dice."""
    nets: list[Any] = []
    monkeypatch.setattr(compiling, "can_compile", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda net: ("compiled", net))
    monkeypatch.setattr(compiling.time, "perf_counter", lambda: float(len(nets)))
    return nets


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

    def one_pass(net: Any) -> None:
        passed.append(net)
        torch.rand(1)

    before = torch.get_rng_state()
    found = compile_if_worth("net", one_pass, passes, wanted, Accelerator(cpu=True))
    assert found == (("compiled", "net") if compiles else "net")
    assert passed == ["net"] * timed + [("compiled", "net")] * compiles
    assert torch.equal(torch.get_rng_state(), before)
