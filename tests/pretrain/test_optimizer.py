"""Muon against torch's own, and two processes against one."""

from pathlib import Path

import pytest
import torch
from muon_processes import STEPS, train, work
from torch import nn
from transformers.pytorch_utils import Conv1D

from common.gpt import build_config, build_gpt
from pretrain.optimizer import Muon, build_optimizers, orthogonalise


def test_equals_torch_muon_to_bfloat16() -> None:
    torch.manual_seed(0)
    ours = [nn.Parameter(torch.randn(shape)) for shape in ((8, 24), (24, 8), (8, 24))]
    theirs = [nn.Parameter(p.detach().clone()) for p in ours]
    before = [p.detach().clone() for p in ours]
    mine = Muon(ours, bf16=False, lr=0.1, weight_decay=0.1)
    other = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.1)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        other.step()
    for a, b, start in zip(ours, theirs, before, strict=True):
        assert (a - b).norm() < 0.02 * (a - start).norm()


def test_orthogonalise_moves_singular_values_near_one() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(2, 6, 20)
    values = torch.linalg.svdvals(orthogonalise(matrices, (3.4445, -4.7750, 2.0315), 5).float())
    assert ((values > 0.6) & (values < 1.3)).all()


def test_a_map_learns_alike_however_its_matrix_lies() -> None:
    """GPT-2 stores (inputs, outputs). Broken once: the wider ones of the two ways were scaled, so
    that its feed-forward's way up learned at half the rate and its way down at twice."""
    torch.manual_seed(0)
    linear, gpt2 = nn.Linear(8, 24, bias=False), Conv1D(24, 8)
    start = linear.weight.detach().clone()
    gpt2.weight.data = start.T.clone()
    gradient = torch.randn(24, 8)
    for module, turned in ((linear, False), (gpt2, True)):
        sizes = {"num_hidden_layers": 1, "hidden_size": 8, "num_attention_heads": 1}
        special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
        config = build_config("lesson", vocab_size=64, block_size=8, **sizes, **special)
        model = build_gpt(config)
        model.transformer.h[0].attn.c_attn = module
        module.weight.grad = gradient.T.clone() if turned else gradient
        options = {"learning_rate": 0.0, "muon_learning_rate": 0.1, "weight_decay": 0.0}
        build_optimizers(model, **options)[0].step()
    torch.testing.assert_close(gpt2.weight.T, linear.weight)
    assert (linear.weight - start).norm() > 0.1


@pytest.mark.parametrize("sharded", [False, True], ids=["ddp", "fsdp2"])
def test_two_processes_share_the_work_of_one(tmp_path: Path, sharded: bool) -> None:
    """Equal weights, and half of the matrices each (rounded up: 1 of 1, 2 of 3).

    Broken once: every process all matrices; the gathered ones in another order; under FSDP2 the
    rows of a process orthogonalised by themselves.
    """
    one = train(sharded=False)
    assert one["seen"] == STEPS * 4
    torch.multiprocessing.spawn(work, args=(tmp_path, sharded), nprocs=2)
    for rank in range(2):
        two = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert two["seen"] == STEPS * (1 + 2)
        for ours, theirs in zip(two["weights"], one["weights"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_tables_and_vectors_go_to_adamw() -> None:
    """Matrices, too, where there is no Muon; they alone decay. Seen to fail with all decayed."""
    for tied in (True, False):
        model = build_gpt(
            build_config(
                "modern",
                vocab_size=64,
                block_size=16,
                num_hidden_layers=1,
                hidden_size=16,
                num_attention_heads=2,
                tie_word_embeddings=tied,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
        muon, adamw = build_optimizers(
            model, learning_rate=1e-2, muon_learning_rate=2e-2, weight_decay=0.0
        )
        assert len(muon.param_groups[0]["params"]) == 7  # q, k, v, o, gate, up, down
        both = muon.param_groups[0]["params"] + adamw.param_groups[0]["params"]
        assert {id(p) for p in both} == {id(p) for p in model.parameters()}
        (alone,) = build_optimizers(
            model,
            learning_rate=1e-2,
            muon_learning_rate=2e-2,
            weight_decay=0.5,
            optimizer="adamw",
        )
        for one, group, decay in zip((muon, adamw), alone.param_groups, (0.5, 0.0), strict=True):
            assert [*map(id, group["params"])] == [*map(id, one.param_groups[0]["params"])]
            assert (group["lr"], group["weight_decay"]) == (1e-2, decay)
