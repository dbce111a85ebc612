"""Documents packed into a row, with attention across them and without."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from common.gpt import build_config, build_gpt
from common.token_file import TokenFile, write_token_file
from common.tokenizer import train_characters
from common.windows import document_positions
from pretrain.config import PretrainConfig
from pretrain.train import Windows, evaluate, micro_batches, step_starts, token_loss

BOS = 1
ROW = torch.tensor([[8, 9, 2, BOS, 9, 8, 8, 2, BOS, 9]])  # of three documents, the first cut
WAYS = [(shape, attention) for shape in ("modern", "lesson") for attention in ("eager", "sdpa")]


def build(shape: str, attention: str) -> Any:
    torch.manual_seed(0)
    config = build_config(
        shape,
        vocab_size=64,
        block_size=10,
        num_hidden_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        pad_token_id=0,
        bos_token_id=BOS,
        eos_token_id=2,
    )
    model = build_gpt(config).eval()
    model.set_attn_implementation(attention)
    for parameter in model.parameters():
        if parameter.ndim == 2:  # fresh, they are so small that nothing shows
            nn.init.normal_(parameter, std=0.3)
    return model


def reached(model: Any, position_ids: Tensor | None) -> list[bool]:
    """Which inputs have a part in the loss of the second document's last token but one."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.retain_grad()
        kept.append(output)

    hook = model.get_input_embeddings().register_forward_hook(keep)
    targets = torch.full_like(ROW, -100)
    targets[0, 6] = ROW[0, 7]
    token_loss(model, ROW, targets, position_ids).backward()
    hook.remove()
    return (kept[0].grad[0].abs().sum(-1) > 0).tolist()


def test_positions_by_hand() -> None:
    """Seen to fail with positions that run on over the last document."""
    assert document_positions(ROW, BOS).tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0, 1]]
    rows = torch.tensor([[BOS, 8, 9, 8], [8, BOS, BOS, 9]])
    assert document_positions(rows, BOS).tolist() == [[0, 1, 2, 3], [0, 0, 0, 1]]


@pytest.mark.parametrize(("shape", "attention"), WAYS)
def test_no_gradient_crosses_documents(shape: str, attention: str) -> None:
    """Seen to fail with positions that do not restart."""
    model = build(shape, attention)
    assert reached(model, None) == [True] * 7 + [False] * 3
    own = [False] * 3 + [True] * 4 + [False] * 3
    assert reached(model, document_positions(ROW, BOS)) == own


@pytest.mark.parametrize(("shape", "attention"), WAYS)
def test_loss_is_that_of_each_document_alone(shape: str, attention: str) -> None:
    """Seen to fail with positions counted on, as the lesson's table of positions shows."""
    model = build(shape, attention)
    targets = ROW.roll(-1, 1)
    targets[0, -1] = -100
    together = token_loss(model, ROW, targets, document_positions(ROW, BOS))
    parts = [(0, 3), (3, 8), (8, 9)]
    alone = [token_loss(model, ROW[:, a:b], targets[:, a:b]) * (b - a) for a, b in parts]
    torch.testing.assert_close(together, sum(alone) / 9, atol=1e-5, rtol=1e-5)
    assert (token_loss(model, ROW, targets) - together).abs() > 1e-3


def test_training_reads_documents_from_their_beginning(tmp_path: Path) -> None:
    """Seen to fail with windows left where the epoch cuts them."""
    tokenizer = train_characters(["abc"])
    write_token_file(["abcab", "cab", "bc"] * 40, tokenizer, tmp_path / "t.bin", documents=True)
    file = TokenFile(tmp_path / "t.bin")
    config = PretrainConfig(output_dir="x", data="x", bf16=False)
    accelerator, windows = Accelerator(cpu=True), Windows.of(build("modern", "eager"))
    starts = [step_starts(file, windows, step, config, accelerator).ravel() for step in range(4)]
    begun = np.concatenate(starts)
    assert (file.tokens[begun] == BOS).all() and len(set(begun)) > 10


def test_configuration_reaches_training_and_evaluation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seen to fail with `document_mask` left out of either."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tokenizer = train_characters(["abc"])
    write_token_file(["ab", "cab", "b"] * 9, tokenizer, tmp_path / "t.bin", documents=True)
    file = TokenFile(tmp_path / "t.bin")
    model, accelerator = build("modern", "eager"), Accelerator()
    losses = []
    for masked in (False, True):
        config = PretrainConfig(output_dir="x", data="x", document_mask=masked, bf16=False)
        inputs, _, positions = next(micro_batches(file, Windows.of(model), 0, config, accelerator))
        if masked:
            assert positions is not None
            assert ((positions == 0) == (inputs == BOS))[:, 1:].all()
        else:
            assert positions is None
        losses.append(evaluate(model, file, config, accelerator)["val_loss"])
    assert abs(losses[0] - losses[1]) > 1e-3
