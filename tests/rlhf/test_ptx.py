"""PPO-ptx: which windows a step reads, their loss by hand, and that it trains the policy."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from common.pretraining_text import PretrainingText
from common.token_file import write_token_file
from common.tokenizer import train_characters
from rlhf.__main__ import check_ptx
from rlhf.align import AlignConfig
from rlhf.config import PPOConfig
from rlhf.trainer import PPOTrainer
from tests.rlhf.conftest import build_tokenizer


def write(path: Path, tokenizer: PreTrainedTokenizerFast, text: str) -> Path:
    write_token_file([text], tokenizer, path, documents=False)
    return path


class Always:
    """Says each time that the next token is like the last one, with chance 3/4 of 4."""

    device = torch.device("cpu")

    def __call__(self, input_ids: torch.Tensor, position_ids: torch.Tensor, use_cache: bool) -> Any:
        self.input_ids, self.position_ids = input_ids, position_ids
        logits = torch.zeros(*input_ids.shape, 12)
        logits.scatter_(2, input_ids[..., None], math.log(33))  # 33 / (33 + 11) = 3/4
        return SimpleNamespace(logits=logits)


def test_parts_sum_to_the_mean(tmp_path: Path) -> None:
    """A text of one letter: every next token is like the last, -log 3/4 a token.

    Broken once: shares divided by their own windows; all parts reading all windows.
    """
    tokenizer = train_characters(["abc"])
    text = PretrainingText(write(tmp_path / "t.bin", tokenizer, "a" * 90), 3, 4, 0, tokenizer)
    model = Always()
    for parts in (1, 2, 3, 4):
        shares = [text.loss(model, 5, part, parts).item() for part in range(parts)]
        assert sum(shares) == pytest.approx(-math.log(3 / 4), rel=1e-5)
    assert text.loss(model, 5, 3, 4).item() == 0  # nothing left to deal out


def test_documents_are_read_from_their_beginning_and_apart(tmp_path: Path) -> None:
    """Seen to fail with windows where the epoch cuts them, and without positions."""
    tokenizer = train_characters(["abc"])
    write_token_file(["abcab", "cab"] * 40, tokenizer, tmp_path / "t.bin", documents=True)
    model = Always()
    PretrainingText(tmp_path / "t.bin", 6, 8, 0, tokenizer).loss(model, 0, 0, 1)
    begins = model.input_ids == tokenizer.bos_token_id
    assert begins[:, 0].all() and begins[:, 1:].any()
    assert torch.equal(model.position_ids == 0, begins)


def test_another_tokenizer_is_refused(tmp_path: Path) -> None:
    """Seen to pass without the check."""
    path = write(tmp_path / "t.bin", train_characters(["ab"]), "ab" * 40)
    with pytest.raises(UserError, match="another tokenizer than the model's"):
        PretrainingText(path, 2, 4, 0, train_characters(["abc"]))
    with pytest.raises(UserError, match="has 80 tokens, at least 81"):
        PretrainingText(path, 2, 40, 0, train_characters(["ab"]))


def test_policy_learns_the_text(tmp_path: Path, build: Callable[..., PPOTrainer]) -> None:
    """The loss on the text falls. Seen to fail with the coefficient left out of the sum."""
    tokenizer = build_tokenizer(16)
    path = write(tmp_path / "t.bin", tokenizer, "w4 w5 w6 w7 " * 600)
    trainer = build(
        ptx_coef=1.0, ptx_data=str(path), ptx_windows=2, num_updates=3, learning_rate=1e-2
    )
    trainer.train()
    losses = [line["ptx_loss"] for line in trainer.state.log_history if "ptx_loss" in line]
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.5


def test_any_split_reads_the_same_text(tmp_path: Path, build: Callable[..., PPOTrainer]) -> None:
    """A step in one micro-batch and in two logs one loss. Broken once: `place` always 0."""
    tokenizer = build_tokenizer(16)
    words = " ".join(f"w{4 + i * i % 11}" for i in range(3000))
    path = write(tmp_path / "t.bin", tokenizer, words)
    losses = []
    for parts in (1, 2):
        trainer = build(
            ptx_coef=1.0,
            ptx_data=str(path),
            ptx_windows=3,
            num_updates=1,
            learning_rate=0.0,
            per_device_train_batch_size=8 // parts,
            gradient_accumulation_steps=parts,
        )
        trainer.train()
        losses += [line["ptx_loss"] for line in trainer.state.log_history if "ptx_loss" in line]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_coefficient_and_text_go_together(build: Callable[..., PPOTrainer]) -> None:
    """Each seen to start without its half of the check."""
    with pytest.raises(UserError, match=r"ptx_coef \(1\) needs ptx_data \(None\)"):
        build(ptx_coef=1.0)
    with pytest.raises(UserError, match=r"ptx_coef \(-1.0\) must be 0 or more"):
        build(ptx_coef=-1.0, ptx_data="train.bin")
    assert build(ptx_coef=0.0, ptx_data="nowhere.bin").ptx is None


def test_too_few_windows_are_refused_before_any_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where weights are sharded, and of PPO alone. Broken once: found out by the trainer, after
    models were loaded and the start was measured.
    """
    config = AlignConfig(model_name_or_path="x", data="arden", reward=["judge"])
    settings: dict[str, Any] = {"ptx_coef": 1.0, "ptx_data": "x", "use_cpu": True}
    settings |= {"gradient_accumulation_steps": 4, "report_to": "none"}
    few, enough = (PPOConfig(**settings, ptx_windows=windows) for windows in (3, 4))
    check_ptx(config, few)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    check_ptx(config, enough)
    with pytest.raises(
        UserError, match=r"ptx_windows \(3\) must be 4 or more where weights are sh"
    ):
        check_ptx(config, few)
    config.method = "rloo"
    check_ptx(config, few)
    assert few.ptx_coef == 0
