"""Both GPTs against transformers' own, run in a process that cannot see this project."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DynamicCache,
    PreTrainedConfig,
    PreTrainedModel,
)

from common import gpt_base
from common.device import fast_attention
from common.errors import UserError
from common.gpt import (
    GPT,
    GPTForSequenceClassification,
    LessonGPT,
    LessonGPTForSequenceClassification,
    RMSNorm,
    build_config,
    build_gpt,
)

PAD, BOS, EOS, VOCAB = 0, 1, 2, 96
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "block_size": 32,
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "modern": {"shape": "modern", "num_key_value_heads": 2},
    "modern_untied": {"shape": "modern", "tie_word_embeddings": False},
    "lesson": {"shape": "lesson"},
}
SHAPES = ["modern", "lesson"]

# Plain transformers: judges our checkpoints, and writes one of its own beside each.
NATIVE = """
import sys, torch
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
sys.modules["common"] = None  # any attempt to import the project fails
for folder in map(Path, sys.argv[1:]):
    batch = torch.load(folder / "batch.pt")
    auto = AutoModelForSequenceClassification if "score" in folder.name else AutoModelForCausalLM
    model = auto.from_pretrained(folder)
    assert type(model).__module__.startswith("transformers."), type(model)
    found = {"class": type(model).__name__, "keys": list(model.state_dict())}
    found["logits"] = model(**batch).logits.detach()
    torch.manual_seed(1)
    fresh = type(model)(model.config)
    for weight in fresh.parameters():
        weight.data.normal_(std=0.2)
    fresh.eval().save_pretrained(folder / "theirs")
    found["their_logits"] = fresh(**batch).logits.detach()
    if auto is AutoModelForCausalLM:
        loss = fresh.train()(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        found["loss"] = loss.item()
        found["grad_norm"] = torch.nn.utils.get_total_norm(
            [weight.grad for weight in fresh.parameters()]).item()
    torch.save(found, folder / "found.pt")
"""


def build(shape: str, **changes: Any) -> Any:
    """Build a GPT whose weights are large enough for a wrong mask or position to show."""
    config = build_config(**{**SIZES, "shape": shape, **changes})
    config.initializer_range = 0.2
    torch.manual_seed(0)
    return build_gpt(config).eval()


def build_scorer(config: PreTrainedConfig) -> PreTrainedModel:
    torch.manual_seed(0)
    config.num_labels = 1
    return AutoModelForSequenceClassification.from_config(config).eval()


def tokens(*size: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, size, generator=torch.Generator().manual_seed(seed))


def pad_left(rows: list[Tensor], width: int) -> tuple[Tensor, Tensor]:
    ids = torch.stack([torch.cat([torch.full((width - len(r),), PAD), r]) for r in rows])
    return ids, (ids != PAD).long()


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Save every variant and have plain transformers judge it: name -> folder."""
    folders = {}
    ids, mask = pad_left([tokens(9), tokens(5, seed=1)], width=9)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for name, variant in VARIANTS.items():
        model = build(**variant)
        for kind, each in {name: model, f"{name}_score": build_scorer(model.config)}.items():
            folders[kind] = tmp_path_factory.mktemp(kind)
            each.save_pretrained(folders[kind])
            batch = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
            torch.save(batch, folders[kind] / "batch.pt")
    command = [sys.executable, "-I", "-c", NATIVE, *map(str, folders.values())]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folders


NATIVE_NAMES = {
    "modern": "Qwen3ForCausalLM",
    "modern_untied": "Qwen3ForCausalLM",
    "lesson": "GPT2LMHeadModel",
    "modern_score": "Qwen3ForSequenceClassification",
    "modern_untied_score": "Qwen3ForSequenceClassification",
    "lesson_score": "GPT2ForSequenceClassification",
}
OUR_CLASSES = {
    "modern": GPT,
    "modern_untied": GPT,
    "lesson": LessonGPT,
    "modern_score": GPTForSequenceClassification,
    "modern_untied_score": GPTForSequenceClassification,
    "lesson_score": LessonGPTForSequenceClassification,
}


def load(folder: Path, kind: str) -> PreTrainedModel:
    auto = AutoModelForSequenceClassification if "score" in kind else AutoModelForCausalLM
    return auto.from_pretrained(folder).eval()


@pytest.mark.parametrize("kind", NATIVE_NAMES)
def test_plain_transformers_reads_what_we_save(native: dict[str, Path], kind: str) -> None:
    batch = torch.load(native[kind] / "batch.pt")
    theirs = torch.load(native[kind] / "found.pt")
    ours = load(native[kind], kind)
    assert type(ours) is OUR_CLASSES[kind]
    saved = json.loads((native[kind] / "config.json").read_text())
    assert saved["architectures"] == [theirs["class"]] == [NATIVE_NAMES[kind]]
    assert sorted(theirs["keys"]) == sorted(ours.state_dict())
    torch.testing.assert_close(ours(**batch).logits, theirs["logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", NATIVE_NAMES)
def test_we_read_what_plain_transformers_saves(native: dict[str, Path], kind: str) -> None:
    batch = torch.load(native[kind] / "batch.pt")
    theirs = torch.load(native[kind] / "found.pt")
    ours = load(native[kind] / "theirs", kind)
    assert type(ours) is OUR_CLASSES[kind]
    torch.testing.assert_close(ours(**batch).logits, theirs["their_logits"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", VARIANTS)
def test_loss_and_gradient_norm_are_transformers_own(native: dict[str, Path], kind: str) -> None:
    batch = torch.load(native[kind] / "batch.pt")
    theirs = torch.load(native[kind] / "found.pt")
    ours = load(native[kind] / "theirs", kind).train()
    loss = ours(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    grads = [weight.grad for weight in ours.parameters() if weight.grad is not None]
    assert loss.item() == pytest.approx(theirs["loss"], rel=1e-5)
    norm = torch.nn.utils.get_total_norm(grads).item()
    assert norm == pytest.approx(theirs["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_reward_model_starts_from_the_language_model(shape: str, tmp_path: Path) -> None:
    causal = build(shape)
    causal.save_pretrained(tmp_path)
    scorer = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=1)
    ours = causal.base_model.state_dict()
    assert all(torch.equal(w, ours[k]) for k, w in scorer.base_model.state_dict().items())
    assert scorer.score.weight.shape == (1, SIZES["hidden_size"])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("shape", SHAPES)
def test_padding_changes_no_logit(shape: str, attention: str) -> None:
    model = build(shape)
    model.set_attn_implementation(attention)
    row = tokens(7)
    alone = model(row[None]).logits[0]
    ids, mask = pad_left([row, tokens(12, seed=1)], width=12)
    left = model(ids, attention_mask=mask).logits[0, -7:]
    right = model(ids.roll(-5, 1), attention_mask=mask.roll(-5, 1)).logits[0, :7]
    torch.testing.assert_close(left, alone, atol=2e-5, rtol=0)
    torch.testing.assert_close(right, alone, atol=2e-5, rtol=0)


@pytest.mark.parametrize(("has_bf16", "longest"), [(True, 256), (False, 128)])
def test_short_rows_have_attention_written_out(
    has_bf16: bool, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU alone. Seen to fail with one bound for both, and on a GPU with the CPU's."""
    monkeypatch.setattr("common.device.has_bf16", lambda: has_bf16)
    assert [fast_attention(length) for length in (longest, longest + 1)] == ["eager", "sdpa"]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert fast_attention(longest) == "sdpa"


@pytest.mark.parametrize("shape", SHAPES)
def test_sdpa_and_explicit_attention_agree(shape: str) -> None:
    model, ids = build(shape), tokens(2, 12)
    kernel = model(ids)
    model.set_attn_implementation("eager")
    explicit = model(ids, output_attentions=True, output_hidden_states=True)
    torch.testing.assert_close(explicit.logits, kernel.logits, atol=1e-5, rtol=0)
    assert len(explicit.hidden_states) == SIZES["num_hidden_layers"] + 1
    for weights in explicit.attentions:  # (B, heads, T, T)
        assert weights.triu(1).abs().max() == 0
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 4, 12))


@pytest.mark.parametrize("width", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5, 32), (3, 5, 2, 16)])
def test_norm_by_hand_is_pytorchs(shape: tuple[int, ...], width: torch.dtype) -> None:
    """Forward to the bit, so that where gradients are on changes no number; the gradient to
    rounding. Seen to fail without the mean that is taken off, and with a weight's gradient of x."""
    torch.manual_seed(0)
    norm = RMSNorm(shape[-1], 1e-6)
    norm.weight.data = torch.randn(shape[-1])
    x = torch.randn(shape).to(width).requires_grad_()
    y = norm(x)
    assert "NormByHand" in y.grad_fn.name()
    with torch.no_grad():
        assert torch.equal(norm(x), y)
    gradient = torch.randn(shape).to(width).requires_grad_()
    theirs = torch.nn.functional.rms_norm(x, norm.weight.shape, norm.weight, 1e-6)
    wanted = torch.autograd.grad(theirs, (x, norm.weight), gradient)
    found = torch.autograd.grad(y, (x, norm.weight), gradient, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        found[0].sum().backward(retain_graph=True)
    rounding = 1e-2 if width == torch.bfloat16 else 1e-5
    for ours, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, other, rtol=rounding, atol=rounding)


def test_angles_are_one_operator_to_the_compiler() -> None:
    """Of any length. Seen to fail without it: each number had its cosine computed, many times."""
    model, graphs = build("modern"), []

    def backend(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for ids in (tokens(2, 8), tokens(2, 12)):
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits)
    assert [sum("rotary_angles" in name for name in names) for names in graphs] == [1]
    assert not {"cos", "sin"} & set(graphs[0])


@pytest.mark.parametrize("shape", SHAPES)
def test_no_logit_depends_on_later_tokens(shape: str) -> None:
    model = build(shape)
    x = model.get_input_embeddings()(tokens(1, 10)).detach().requires_grad_()
    logits = model(inputs_embeds=x).logits  # (1, T, V)
    for t in range(10):
        (grad,) = torch.autograd.grad(logits[0, t].pow(2).sum(), x, retain_graph=True)
        reached = grad[0].abs().sum(-1) > 0  # (T,)
        assert reached.tolist() == [True] * (t + 1) + [False] * (9 - t)


@pytest.mark.parametrize("shape", SHAPES)
def test_packed_documents_do_not_see_each_other(shape: str) -> None:
    model = build(shape)
    documents = [tokens(6), tokens(3, seed=1), tokens(5, seed=2)]
    packed = torch.cat(documents)[None]
    positions = torch.cat([torch.arange(len(d)) for d in documents])[None]
    together = model(packed, position_ids=positions).logits[0]
    separate = torch.cat([model(d[None]).logits[0] for d in documents])
    torch.testing.assert_close(together, separate, atol=2e-5, rtol=0)
    assert (model(packed).logits[0] - separate).abs().max() > 0.1


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_cached_logits_are_the_uncached(shape: str, padded: bool) -> None:
    model = build(shape)
    ids, mask = pad_left([tokens(12), tokens(8 if padded else 12, seed=1)], width=12)
    whole = model(ids, attention_mask=mask, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    pieces = []
    for start, end in itertools.pairwise([0, 5, 8, *range(9, 13)]):  # prompt, chunk, single steps
        given = mask[:, :end] if padded else None
        out = model(ids[:, start:end], attention_mask=given, past_key_values=cache)
        pieces.append(out.logits)
    real = mask.bool()
    torch.testing.assert_close(torch.cat(pieces, 1)[real], whole[real], atol=2e-5, rtol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_generation_is_the_same_with_and_without_cache(shape: str) -> None:
    model = build(shape)
    ids, mask = pad_left([tokens(6), tokens(3, seed=1)], width=6)
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    cached, static, uncached = (
        model.generate(ids, **settings, **way)
        for way in ({}, {"cache_implementation": "static"}, {"use_cache": False})
    )
    assert cached.tolist() == uncached.tolist() == static.tolist()
    alone = model.generate(ids[1:, 3:], max_new_tokens=12, do_sample=False)
    assert cached[1, 3 : 3 + alone.shape[1]].tolist() == alone[0].tolist()


def test_plain_rows_need_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("built a mask")

    monkeypatch.setattr(gpt_base, "create_causal_mask", refuse)
    model = build("modern")
    cache = model(tokens(2, 8), use_cache=True).past_key_values
    mask = torch.ones(2, 9, dtype=torch.long)
    model(tokens(2, 1), attention_mask=mask, past_key_values=cache)


@pytest.mark.parametrize("shape", SHAPES)
def test_score_does_not_depend_on_padding_or_company(shape: str) -> None:
    scorer = build_scorer(build(shape).config)
    row = tokens(7)
    alone = scorer(row[None]).logits.item()
    for width in (7, 9, 14):
        ids, mask = pad_left([row, tokens(7, seed=1)], width)
        for turn in (0, 7 - width):  # padding on the left, then on the right
            moved, seen = ids.roll(turn, 1), mask.roll(turn, 1)
            score = scorer(moved, attention_mask=seen).logits[0].item()
            assert score == pytest.approx(alone, abs=2e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradient_checkpointing_gives_the_same_gradient(shape: str) -> None:
    ids, norms, runs = tokens(2, 12), [], []
    for checkpointing in (False, True):
        model = build(shape).train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        for module in model.modules():
            if type(module).__name__.endswith("MLP"):
                module.register_forward_pre_hook(lambda *_, c=checkpointing: runs.append(c))
        model(ids, labels=ids).loss.backward()
        grads = [weight.grad for weight in model.parameters() if weight.grad is not None]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)
    assert (runs.count(False), runs.count(True)) == (2, 4)  # 2 blocks, run again going backward


def test_loss_and_logits_follow_their_arguments() -> None:
    model, ids = build("modern").train(), tokens(2, 8)
    labels = ids.clone()
    labels[:, :4] = -100  # 4 targets a row are left
    out = model(ids, labels=labels)
    assert out.past_key_values is None  # no cache in training unless asked
    chosen = out.logits[:, 3:-1].log_softmax(-1).gather(2, ids[:, 4:, None])
    assert out.loss.item() == pytest.approx(-chosen.mean().item(), rel=1e-5)
    summed = model(ids, labels=labels, num_items_in_batch=torch.tensor(2)).loss
    assert summed.item() == pytest.approx(4 * out.loss.item(), rel=1e-5)
    last = model(ids, logits_to_keep=2).logits
    torch.testing.assert_close(last, out.logits[:, -2:])
    loss, logits = model(ids, labels=labels, return_dict=False)
    assert loss == out.loss and torch.equal(logits, out.logits)


def test_number_of_parameters_by_hand() -> None:
    # embedding 96x32; a block: q, o 32x32 each, k, v 32x16 each, q- and k-norm 8 each,
    # MLP 3 x 32x64, two norms; the final norm. 8/3 of 32 is 85: the nearest multiple of 64 is 64
    block = 2 * 32 * 32 + 2 * 32 * 16 + 2 * 8 + 3 * 32 * 64 + 2 * 32
    modern = build("modern", num_key_value_heads=2)
    assert modern.num_parameters() == 96 * 32 + 2 * block + 32
    untied = build("modern", num_key_value_heads=2, tie_word_embeddings=False)
    assert untied.num_parameters() == modern.num_parameters() + 96 * 32
    # tokens 96x32, positions 32x32; a block: qkv, projection, MLP of 128, biases, two LayerNorms
    block = (32 * 96 + 96) + (32 * 32 + 32) + (32 * 128 + 128) + (128 * 32 + 32) + 2 * 2 * 32
    assert build("lesson").num_parameters() == 96 * 32 + 32 * 32 + 2 * block + 2 * 32


@pytest.mark.parametrize("shape", SHAPES)
def test_fresh_weights_are_small_and_smaller_where_branches_join(shape: str) -> None:
    config = build_config(**{**SIZES, "shape": shape, "hidden_size": 128, "num_hidden_layers": 8})
    model = build_gpt(config)
    for name, weight in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight", "c_proj.weight")):
            assert weight.std().item() == pytest.approx(0.02 / 4, rel=0.05), name  # sqrt(2 x 8) = 4
        elif weight.ndim == 2:
            assert weight.std().item() == pytest.approx(0.02, rel=0.05), name
        else:
            assert weight.unique().tolist() in ([0.0], [1.0]), name
    generation = model.generation_config
    assert (generation.pad_token_id, generation.bos_token_id) == (PAD, BOS)
    assert generation.eos_token_id == EOS
    assert config.max_position_embeddings == SIZES["block_size"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 0}, "num_hidden_layers (0) must be at least 1"),
        ({"intermediate_size": 0}, "intermediate_size (0) must be at least 1"),
        ({"hidden_size": 30}, "hidden_size (30) must be a multiple of num_attention_heads (4)"),
        ({"hidden_size": 12}, "num_attention_heads (3) must be even"),
        ({"num_key_value_heads": 3}, "num_key_value_heads (3) must divide"),
        ({"num_key_value_heads": 0}, "num_key_value_heads (0) must divide"),
        ({"shape": "lesson", "num_key_value_heads": 2}, "num_key_value_heads (2) is for"),
        ({"shape": "llama"}, "shape (llama) must be modern or lesson"),
        ({"dropout": 1.0}, "dropout (1.0) must be"),
        ({"bos_token_id": 96}, "bos_token_id (96) must be"),
        ({"pad_token_id": 2}, "pad_token_id and eos_token_id are both 2"),
    ],
)
def test_impossible_sizes_are_refused_in_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        build_config(**{"shape": "modern", **SIZES, **changes})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_checkpoints_beyond_this_gpt_are_refused() -> None:
    config = build_config("modern", **SIZES)
    config.rope_parameters = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
    with pytest.raises(UserError, match="yarn"):
        build_gpt(config)


def test_lesson_says_when_a_text_is_too_long() -> None:
    with pytest.raises(UserError, match=r"33 tokens .* block_size \(32\)"):
        build("lesson")(tokens(1, 33))


def test_dropout_is_of_embeddings_attention_and_both_branches() -> None:
    """In both shapes, in training alone; without it the modern configuration is Qwen3's own.

    Broken by dropping the sum in place of a branch, and by none on the embeddings.
    """
    assert not hasattr(build("modern").config, "resid_pdrop")
    for shape in SHAPES:
        model = build(shape, dropout=0.5)
        seen: dict[str, Tensor] = {}
        blocks = model.model.layers if shape == "modern" else model.transformer.h
        norm = blocks[0].input_layernorm if shape == "modern" else blocks[0].ln_1
        norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(before=args[0]))
        norm = blocks[0].post_attention_layernorm if shape == "modern" else blocks[0].ln_2
        norm.register_forward_pre_hook(lambda _, args, seen=seen: seen.update(between=args[0]))
        model.train()(tokens(4, 16))
        dropped = seen["before"] == 0
        assert dropped.float().mean().item() == pytest.approx(0.5, abs=0.05)
        added = seen["between"] - seen["before"]
        assert (added == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
        model.eval()(tokens(4, 16))
        assert not (seen["before"] == 0).any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("shape", SHAPES)
def test_residual_stream_is_narrow_under_autocast_on_a_gpu(shape: str) -> None:
    """And float32 without. Broken by leaving the embeddings as they are."""
    torch.manual_seed(0)
    model: Any = build_gpt(build_config(shape, **SIZES)).to("cuda")
    ids = torch.randint(3, VOCAB, (2, 8), device="cuda")
    for autocast, kind in ((True, torch.bfloat16), (False, torch.float32)):
        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            streams = model(ids, output_hidden_states=True).hidden_states
        assert {stream.dtype for stream in streams[:-1]} == {kind}
