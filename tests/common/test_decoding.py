"""Sampling that leaves ended rows behind, against transformers' loop and exact probabilities."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    GPT2Config,
    GPT2LMHeadModel,
    RecurrentGemmaConfig,
)

from common.decoding import sample_unended
from common.graph_decoding import CHECKED_EVERY, GraphSampler
from tests.toy import save_toy

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
PAD = 0
ENDS = list(range(1, 60))  # so many that rows end soon, and apart


def load(kind: str, folder: Path) -> Any:
    """A model with weights large enough to prefer something."""
    torch.manual_seed(0)
    if kind != "transformers":
        return AutoModelForCausalLM.from_pretrained(save_toy(folder, kind, weights=0.2))
    config = GPT2Config(vocab_size=300, n_positions=64, n_embd=32, n_layer=2, n_head=2)
    config.initializer_range = 0.2
    return GPT2LMHeadModel(config).eval()


def prompts(rows: int, padded: bool = True) -> tuple[Tensor, Tensor]:
    """Ids and mask of prompts of nine tokens, or of one to nine, padded on the left."""
    torch.manual_seed(1)
    ids, mask = torch.randint(60, 250, (rows, 9)), torch.ones(rows, 9, dtype=torch.long)
    for row in range(rows if padded else 0):
        mask[row, : row % 9] = 0
    return torch.where(mask == 1, ids, PAD), mask


def generate(model: Any, ids: Tensor, mask: Tensor, **options: Any) -> Tensor:
    """`model.generate` with this file's ends; greedy unless said."""
    rules: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12} | options
    return model.generate(ids, attention_mask=mask, eos_token_id=ENDS, pad_token_id=PAD, **rules)


KINDS = ["modern", "lesson", "transformers"]


@pytest.mark.parametrize("padded", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_is_as_transformers_has_it(kind: str, padded: bool, tmp_path: Path) -> None:
    """And each step reads the rows alone that have not ended.

    Broken by leaving the positions of the rows that stay unselected, by a cache of all rows, and
    by transformers' loop for prompts of one length, whose mask `generate` leaves out.
    """
    model = load(kind, tmp_path)
    ids, mask = prompts(64, padded)
    plain = generate(model, ids, mask)
    new = plain[:, ids.shape[1] :]
    lengths = (new != PAD).sum(1)
    assert lengths.min() < 3 < 6 < lengths.max() and len(set(lengths.tolist())) > 4
    read: list[int] = []
    watch = model.register_forward_pre_hook(
        lambda _, args, kwargs: read.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    assert torch.equal(generate(model, ids, mask, custom_generate=sample_unended), plain)
    watch.remove()
    assert read == [int((lengths > step).sum()) for step in range(len(read))]


def test_drawn_by_the_exact_probabilities(tmp_path: Path) -> None:
    """Of 6,000 draws the second token's shares among all, at a temperature and among the likeliest.

    Broken by drawing from the logits as they are, and by those of the row before.
    """
    model = load("modern", tmp_path)
    ids, mask = prompts(3)
    rules: dict[str, Any] = {"temperature": 0.7, "top_k": 8}
    draws = 6_000
    new = generate(
        model,
        ids.repeat_interleave(draws, 0),
        mask.repeat_interleave(draws, 0),
        do_sample=True,
        max_new_tokens=2,
        custom_generate=sample_unended,
        **rules,
    )[:, ids.shape[1] :].view(3, draws, 2)

    def exact(row: int, more: list[int]) -> Tensor:
        context = torch.cat([ids[row][mask[row] == 1], torch.tensor(more, dtype=torch.long)])
        with torch.no_grad():
            logits = model(context[None]).logits[0, -1] / rules["temperature"]
        cut = logits < logits.topk(rules["top_k"]).values[-1]
        return logits.masked_fill(cut, -torch.inf).softmax(-1)

    for row in range(3):
        first = exact(row, [])
        second = torch.zeros_like(first)
        for token in first.nonzero()[:, 0].tolist():
            if token in ENDS:
                second[PAD] += first[token]
            else:
                second += first[token] * exact(row, [token])
        for place, expected in ((0, first), (1, second)):
            shares = torch.bincount(new[row, :, place], minlength=len(expected)) / draws
            error = (expected * (1 - expected) / draws).sqrt()
            assert ((shares - expected).abs() <= 4.5 * error + 1e-6).all()


@pytest.mark.parametrize("way", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_where_rows_cannot_leave_it_is_theirs(way: dict[str, Any], tmp_path: Path) -> None:
    """Without a cache, and with one of fixed size. Broken by dropping there, too: neither has rows
    to select."""
    model = load("modern", tmp_path)
    ids, mask = prompts(8)
    options = way | {"disable_compile": True, "custom_generate": sample_unended}
    assert torch.equal(generate(model, ids, mask, **options), generate(model, ids, mask))


HYBRID: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}


@pytest.mark.parametrize(
    "config",
    [
        RecurrentGemmaConfig(**HYBRID, attention_window_size=16, w_init_variance_scale=0.2),
        FalconH1Config(**HYBRID, mamba_d_ssm=32, mamba_n_heads=2, mamba_d_state=8),
    ],
    ids=lambda config: config.model_type,
)
def test_recurrent_states_are_left_to_transformers(config: Any) -> None:
    """In layers of their own, and beside a layer's keys and values.

    Broken by dropping in every `DynamicCache`: the first cannot select rows, the second selects of
    its keys and values alone; and by asking for `batch_select_indices`, which the second has.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids, mask = prompts(16, padded=False)
    plain = generate(model, ids, mask)
    assert torch.equal(generate(model, ids, mask, custom_generate=sample_unended), plain)
    lengths = (plain[:, ids.shape[1] :] != PAD).sum(1)
    assert lengths.min() < lengths.max()


@pytest.mark.parametrize(
    "device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_gpu])]
)
@pytest.mark.parametrize("kind", KINDS)
def test_recorded_steps_are_as_transformers_has_them(
    kind: str, device: str, tmp_path: Path
) -> None:
    """Greedy, with and without padding, recordings used again, weights changed between.

    Broken by a mask that is not put back, positions that start at the prompt's width, rows that go
    on after their end, and a cache that is not reset.
    """
    model, sample = load(kind, tmp_path).to(device), GraphSampler()
    for rows, padded in ((24, True), (8, True), (24, False), (24, True)):
        ids, mask = (part.to(device) for part in prompts(rows, padded))
        plain = generate(model, ids, mask)
        new = generate(model, ids, mask, custom_generate=sample)
        assert torch.equal(new[:, : plain.shape[1]], plain)
        assert (new[:, plain.shape[1] :] == PAD).all()
        assert new.shape[1] - plain.shape[1] < CHECKED_EVERY
        with torch.no_grad():
            model.get_input_embeddings().weight[60:].mul_(1.05)
    assert len(sample.recordings) == 2


@pytest.mark.gpu
@needs_gpu
def test_a_recorded_step_casts_the_weights_itself(tmp_path: Path) -> None:
    """Under autocast as well a recording reads the weights as they are now.

    Broken by recording with autocast's cache on: the step then reads copies that are freed.
    """
    model, sample = load("lesson", tmp_path).to("cuda"), GraphSampler()
    ids, mask = (part.to("cuda") for part in prompts(24))
    for _ in range(3):
        new = []
        for sampler in (sample, GraphSampler()):
            with torch.autocast("cuda", torch.bfloat16):
                new.append(generate(model, ids, mask, custom_generate=sampler))
            torch.rand(1 << 26, device="cuda")  # into what is free
        assert torch.equal(*new)
        with torch.no_grad():
            model.get_input_embeddings().weight[60:].mul_(1.5)
