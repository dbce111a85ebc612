"""Utilisation, and where a run can be followed."""

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType

from common.errors import UserError
from common.gpt import build_config, build_gpt
from pretrain import config as config_module
from pretrain import trackers
from pretrain.config import PretrainConfig
from pretrain.speed import matmul_peak
from pretrain.trackers import Gauge, make_accelerator, start_trackers


def test_peak_is_the_best_product_and_leaves_the_generator(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock that ticks a second a look. Seen to fail with the worst shape, and a global seed."""
    ticks = iter(range(10_000))
    monkeypatch.setattr("pretrain.speed.time.perf_counter", lambda: next(ticks))
    monkeypatch.setattr("pretrain.speed.CPU_SHAPES", ((2, 3, 5), (7, 11, 13), (1, 1, 1)))
    before = torch.get_rng_state()
    assert matmul_peak(torch.float32, torch.device("cpu")) == 2 * 7 * 11 * 13
    assert torch.equal(before, torch.get_rng_state())


def test_utilisation_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer of 8 and 12 words. Seen to fail with tokens and seconds changed about."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(trackers, "matmul_peak", lambda dtype, device: 1e6)
    model = build_gpt(
        build_config(
            "lesson",
            vocab_size=12,
            block_size=4,
            num_hidden_layers=1,
            hidden_size=8,
            num_attention_heads=2,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    config = PretrainConfig(output_dir="out/x", data="x", bf16=False)
    weights = 8 * 24 + 8 * 8 + 2 * 8 * 32 + 8 * 12
    speed = Gauge(model, config, Accelerator(), model.config.max_position_embeddings).read(
        tokens=300, seconds=2.0
    )
    assert speed["tokens_per_second"] == 150.0
    assert speed["utilisation"] == pytest.approx(150 * (6 * weights + 12 * 8 * 4) / 1e6)


def test_a_tracker_that_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seen to fail with the check left out: accelerate goes on without a word."""
    monkeypatch.setattr(config_module, "get_available_trackers", lambda: [LoggerType.TENSORBOARD])
    PretrainConfig(output_dir="out/x", data="x", report_to="tensorboard")
    with pytest.raises(UserError, match=r"report_to \(trackio\) .* pip install trackio"):
        PretrainConfig(output_dir="out/x", data="x", report_to="trackio")


def test_tensorboard_has_every_step_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run killed after step 4 and gone on with from step 2. Seen to fail without purge_step."""
    if LoggerType.TENSORBOARD not in get_available_trackers():
        pytest.skip("tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    config = PretrainConfig(output_dir=str(tmp_path), data="x", report_to="tensorboard", bf16=False)
    for step in (0, 2):
        accelerator = make_accelerator(config)
        start_trackers(config, accelerator, step)
        for later in range(step + 1, 5 + step):
            accelerator.log({"loss": 10.0 * step + later}, step=later)
        accelerator.end_training()
    found = EventAccumulator(str(tmp_path / "logs" / "pretrain")).Reload().Scalars("loss")
    assert [(event.step, event.value) for event in found] == [
        (1, 1.0),
        (2, 2.0),
        (3, 23.0),
        (4, 24.0),
        (5, 25.0),
        (6, 26.0),
    ]
