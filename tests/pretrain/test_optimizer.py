"""Muon against torch's own."""

import torch
from torch import nn

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


def test_tables_and_vectors_go_to_adamw() -> None:
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
