"""The training loop when something goes wrong: numbers, a kill, no compiler."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import PreTrainedModel

from common.errors import UserError
from common.token_file import TokenFile, write_token_file
from common.tokenizer import train_characters
from common.windows import evaluation_spans
from pretrain.__main__ import make_model, require_windows
from pretrain.config import ModelConfig, PretrainConfig
from pretrain.train import Windows, describe_step, evaluate, rate_at, train

Toy = tuple[PreTrainedModel, TokenFile, PretrainConfig]


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Toy:
    """A model, its text and a run of 8 steps, saved every second."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    tokenizer = train_characters(["the cat sat"])
    write_token_file(["the cat sat"] * 60, tokenizer, tmp_path / "train.bin", documents=True)
    torch.manual_seed(0)
    sizes = ModelConfig(block_size=16, num_hidden_layers=1, hidden_size=16, num_attention_heads=2)
    config = PretrainConfig(
        output_dir=str(tmp_path),
        data="x",
        max_steps=8,
        per_device_train_batch_size=2,
        warmup_steps=0,
        decay_fraction=0.0,
        save_steps=2,
        torch_compile=False,
    )
    return make_model(sizes, tokenizer), TokenFile(tmp_path / "train.bin"), config


def test_rates_warm_up_stay_and_fall() -> None:
    """By hand. Broken once by a rate that never changes, which no test saw."""
    config = PretrainConfig("out", "x", max_steps=10, warmup_steps=4, decay_fraction=0.5)
    shares = [rate_at(step, config) for step in range(10)]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])
    config = replace(config, warmup_steps=0, decay_fraction=0.0)
    assert [rate_at(step, config) for step in range(10)] == [1.0] * 10


def test_a_checkpoint_in_bfloat16_is_trained_in_float32(toy: Toy, tmp_path: Path) -> None:
    """Small steps are lost in bfloat16. Broken once by the precision that the file has."""
    tokenizer = train_characters(["the cat sat"])
    toy[0].to(torch.bfloat16).save_pretrained(tmp_path / "base")
    model = make_model(ModelConfig(model_name_or_path=str(tmp_path / "base")), tokenizer)
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_gradient_that_is_not_finite_stops_before_the_weights(tmp_path: Path, toy: Toy) -> None:
    """Seen to fail with the loss alone looked at, and with the weights stepped beforehand."""
    model, file, config = toy
    calls = []

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return gradient * float("inf") if len(calls) == 5 else gradient

    model.model.norm.weight.register_hook(spoil)
    accelerator = Accelerator()
    with pytest.raises(UserError) as stop:
        train(model, file, file, config, accelerator)
    message = str(stop.value)
    assert "at step 5 with learning rates 0.02 (Muon's), 0.01 (AdamW's), on documents " in message
    assert describe_step(file, Windows.of(model), 4, config, accelerator) in message
    assert "\n" not in message
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert checkpoint.name == "step-4"
    saved = load_file(checkpoint / "model.safetensors")
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in saved.items())


def test_one_optimizer_trains_all(toy: Toy) -> None:
    """And is the one that a failure names. Seen to fail with Muon beside it whatever is asked."""
    model, file, config = toy
    with pytest.raises(UserError, match=r"with learning rates 1e\+30 \(AdamW's\), on documents "):
        train(
            model, file, file, replace(config, optimizer="adamw", learning_rate=1e30), Accelerator()
        )


def test_a_failure_names_tokens_where_they_lie(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In shards. Broken by tokens and documents counted on from shard to shard, of no file."""
    model, _, config = toy
    paths = [tmp_path / "train-00000.bin", tmp_path / "train-00001.bin"]
    for path in paths:  # documents of 13 tokens
        write_token_file(
            ["the cat sat"] * 2, train_characters(["the cat sat"]), path, documents=True
        )
    monkeypatch.setattr("pretrain.train.step_starts", lambda *_: np.array([[40, 12], [1, 26]]))
    said = describe_step(TokenFile(*paths), Windows.of(model), 0, config, Accelerator())
    first, second = said.split("; ")
    assert first == f"documents 0, 1, tokens 1-17, 12-28 of {paths[0]}"
    assert second == f"documents 0, 1, tokens 0-16, 14-30 of {paths[1]}"


def test_going_on_removes_what_a_killed_run_had_half_removed(tmp_path: Path, toy: Toy) -> None:
    """Seen to fail with old checkpoints removed at the next one alone, which may never come."""
    model, file, config = toy
    train(model, file, file, config, Accelerator())
    (tmp_path / "checkpoints" / "step-4").mkdir()
    train(model, file, file, config, Accelerator())
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-6"]


def test_without_a_compiler_it_trains_all_the_same(
    tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Seen to end in torch's InvalidCxxCompiler without the question."""
    model, file, config = toy
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    figures = train(model, file, file, replace(config, torch_compile=True), Accelerator())
    assert figures["train_tokens"] == 256
    assert "no C++ compiler" in capsys.readouterr().out


def test_goes_on_with_as_many_windows_a_step(toy: Toy) -> None:
    """Broken by going on with the processes there were: other windows, and tokens that jump."""
    model, file, config = toy
    train(model, file, file, config, Accelerator())
    config = replace(config, gradient_accumulation_steps=2)
    with pytest.raises(UserError, match=r"begun with \d+ windows a step, .* 1 processes make \d+"):
        train(model, file, file, config, Accelerator())


def test_no_clipping_is_no_clipping(toy: Toy) -> None:
    """`max_grad_norm` 0 is TrainingArguments' word for it. Broken by gradients scaled to 0."""
    model, file, config = toy
    before = model.model.norm.weight.clone()
    train(model, file, file, replace(config, max_grad_norm=0.0), Accelerator())
    assert not torch.equal(before, model.model.norm.weight)


def test_goes_on_compiled_as_it_began(
    tmp_path: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From a checkpoint it does not decide again. Seen to fail with the configuration's word."""
    model, file, config = toy
    config = replace(config, torch_compile=None)
    asked: list[bool | None] = []

    def choose(loss_of: Any, one_pass: Any, passes: int, wanted: bool | None, _: Any) -> Any:
        asked.append(wanted)
        return partial(loss_of)  # another than `loss_of`, as a compiled one is

    monkeypatch.setattr("pretrain.train.compile_if_worth", choose)
    monkeypatch.setattr("pretrain.train.train_step", lambda *_: {"loss": 0.0, "grad_norm": 0.0})
    for _ in range(2):
        train(model, file, file, config, Accelerator())
    assert asked == [None, True]


def test_text_too_short_to_train_or_measure_on() -> None:
    """At the least of both parts and one token below. Seen to fail with one token less asked for,
    and with the parts confused."""
    require_windows([range(24), range(9)], 8, "x")
    for lengths, part in (((23, 9), "23 tokens for train"), ((24, 8), "8 tokens for validation")):
        with pytest.raises(UserError, match=f"x has {part}: at least"):
            require_windows([range(count) for count in lengths], 8, "x")


def test_evaluation_sums_over_tokens(toy: Toy, tmp_path: Path) -> None:
    """Documents of many lengths, span by span. Seen to fail with a mean of the batches' means, with
    padding counted, and with nats in place of bits."""
    model, _, config = toy
    texts = ["the cat sat " * (1 + i % 4) + "at" * (i % 7) for i in range(20)]
    write_token_file(texts, train_characters(["the cat sat"]), tmp_path / "v.bin", documents=True)
    file = TokenFile(tmp_path / "v.bin")
    torch.nn.init.normal_(model.lm_head.weight)  # so that some tokens are likelier than others
    nats = 0.0
    for start, end in evaluation_spans(file.tokens, 16, model.config.bos_token_id):
        ids = torch.tensor(file.tokens[start : end + 1].astype("int64"))
        logits = model(input_ids=ids[None, :-1]).logits[0]
        nats += torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
    bits_per_byte = nats / math.log(2) / len("".join(texts).encode())
    for size in (1, 3, 64):
        part = replace(config, per_device_eval_batch_size=size)
        figures = evaluate(model, file, part, Accelerator())
        assert figures["val_loss"] == pytest.approx(nats / (len(file) - 1), rel=1e-5)
        assert figures["val_bits_per_byte"] == pytest.approx(bits_per_byte, rel=1e-5)
