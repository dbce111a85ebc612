"""The lesson's ladder on Tiny Shakespeare: from a table of pairs to a GPT, one small step a rung.

make lesson DATA=input.txt                 the small rungs: two to four minutes on a CPU
make lesson DATA=input.txt ARGS="--scaled true"   the last rung, too; goes on where it was killed

After "Let's build GPT: from scratch, in code, spelled out" (A. Karpathy), with this project's own
parts: each rung is `common.lesson_gpt` with less in it. Differences: queries, keys and values have
biases, the head has none; windows are drawn without replacement; the validation loss is exact, over
the whole split, where the lesson samples 200 batches; and the scaled-up rung is trained as stage 1
trains, by Muon and AdamW. The rung after the lesson's has the shape of `common/gpt.py`.
"""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import trange
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedTokenizerFast
from transformers.cache_utils import Cache
from transformers.modeling_outputs import CausalLMOutput

from common.artifacts import StageOutput, write_json, write_text
from common.config import config_values, parse_config, require, run
from common.errors import UserError
from common.gpt import LessonGPT, build_config, build_gpt
from common.lesson_gpt import LessonBlock
from common.tasks import open_task
from common.token_file import TokenFile
from common.tokenizer import load_tokenizer
from common.windows import training_starts
from pretrain.__main__ import count_parameters, make_model, prepare_text, require_windows
from pretrain.compiling import time_pass
from pretrain.config import ModelConfig, PretrainConfig
from pretrain.lesson_plot import plot_ladder
from pretrain.trackers import make_accelerator
from pretrain.train import evaluate, token_loss, train

BLOCK_SIZE, BATCH_SIZE, WIDTH, HEADS = 8, 32, 32, 4  # of the small rungs, as in the lesson


@dataclass
class LessonConfig:
    """What of the ladder to climb; the YAML's other fields are the scaled-up rung's."""

    scaled: bool = field(default=False, metadata={"help": "train the scaled-up rung, too"})
    rung_steps: int = field(default=5000, metadata={"help": "optimizer steps of a small rung"})


@dataclass(frozen=True)
class Rung:
    """A step of the ladder: what the model has, and the loss that the lesson reports for it."""

    name: str
    reported: float | None
    kind: str = "lesson"  # or bigram, modern
    layers: int = 1
    heads: int = HEADS
    feed_forward: bool = True
    residual: bool = True
    layer_norm: bool = True
    learning_rate: float = 1e-3


LADDER = (
    Rung("bigram table", 2.49, kind="bigram", learning_rate=1e-2),
    Rung("one head", 2.40, heads=1, feed_forward=False, residual=False, layer_norm=False),
    Rung("several heads", 2.28, feed_forward=False, residual=False, layer_norm=False),
    Rung("feed-forward", 2.27, residual=False, layer_norm=False),
    Rung("residual paths, three blocks", 2.09, layers=3, layer_norm=False),
    Rung("LayerNorm", 2.08, layers=3),
    Rung("beyond the lesson: modern shape", None, kind="modern", layers=3),
)
SCALED = "scaled up, dropout"
SCALED_REPORTED = 1.48


class Bigram(nn.Module):
    """A table: row i holds the logits of what follows token i."""

    def __init__(self, config: GPT2Config) -> None:
        super().__init__()
        self.config = config
        self.table = nn.Embedding(config.vocab_size, config.vocab_size)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> CausalLMOutput:
        """Logits (B, T, V) of tokens (B, T)."""
        return CausalLMOutput(logits=self.table(input_ids))


class PartialBlock(LessonBlock):
    """A block of the lesson's GPT with the parts that a rung has.

    Before there are residual paths the lesson's branches have no projection back into the stream,
    and its feed-forward is as wide as the stream.
    """

    def __init__(self, config: GPT2Config, layer_idx: int, rung: Rung) -> None:
        super().__init__(config, layer_idx)
        self.residual = rung.residual
        if not rung.residual:
            self.attn.set_submodule("c_proj", nn.Identity())
            self.mlp.set_submodule("c_proj", nn.Identity())
        if not rung.feed_forward:
            self.set_submodule("mlp", nn.Identity())
        if not rung.layer_norm:
            self.set_submodule("ln_1", nn.Identity())
            self.set_submodule("ln_2", nn.Identity())

    def forward(
        self, x: Tensor, mask: Tensor | None, past_key_values: Cache | None, **kwargs: object
    ) -> Tensor:
        """Pass x (B, T, H) on."""
        if self.residual:
            return super().forward(x, mask, past_key_values, **kwargs)
        return self.mlp(self.ln_2(self.attn(self.ln_1(x), mask, past_key_values, **kwargs)[0]))


def build_rung(rung: Rung, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The model of a small rung, fresh."""
    config = build_config(
        "modern" if rung.kind == "modern" else "lesson",
        vocab_size=len(tokenizer),
        block_size=BLOCK_SIZE,
        num_hidden_layers=rung.layers,
        hidden_size=WIDTH,
        num_attention_heads=rung.heads,
        intermediate_size=None if rung.residual else WIDTH,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config.initializer_range = WIDTH**-0.5  # 0.02 is for widths of hundreds: here signals would die
    config._attn_implementation = "eager"  # faster on eight tokens
    if not isinstance(config, GPT2Config):
        return build_gpt(config)
    config.activation_function = "relu"  # the lesson's
    if rung.kind == "bigram":
        return Bigram(config)
    model = LessonGPT(config)
    blocks = [PartialBlock(config, layer, rung) for layer in range(rung.layers)]
    model.transformer.h = nn.ModuleList(blocks)
    if not rung.layer_norm:
        model.transformer.set_submodule("ln_f", nn.Identity())
    model.init_weights()
    return model


def average_by_loop(x: Tensor) -> Tensor:
    """Each time step of x (B, T, C) becomes the mean of itself and all before: two loops."""
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            out[b, t] = x[b, : t + 1].mean(dim=0)
    return out


def average_by_matrix(x: Tensor) -> Tensor:
    """The same as one product: row t of the matrix holds t + 1 times 1 / (t + 1), then zeros."""
    ones = torch.tril(torch.ones(x.shape[1], x.shape[1]))
    return (ones / ones.sum(dim=1, keepdim=True)) @ x


def average_by_softmax(x: Tensor) -> Tensor:
    """The same by softmax over scores of 0, the future at -inf: attention that ignores content."""
    T = x.shape[1]
    scores = torch.zeros(T, T).masked_fill(torch.tril(torch.ones(T, T)) == 0, -math.inf)
    return F.softmax(scores, dim=-1) @ x


def fit(model: Any, file: TokenFile, rung: Rung, steps: int, seed: int) -> float:
    """Train a small rung in place as the lesson does, by AdamW at one rate; seconds."""
    device = next(model.parameters()).device
    optimizer = torch.optim.AdamW(model.parameters(), lr=rung.learning_rate, fused=True)
    start = time.perf_counter()
    for step in trange(steps, desc=rung.name, leave=False):
        starts = training_starts(len(file), BLOCK_SIZE, step, BATCH_SIZE, seed)
        inputs, targets = file.batch(starts, BLOCK_SIZE)
        loss = token_loss(model, inputs.to(device), targets.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return time.perf_counter() - start


@torch.no_grad()
def write_text_by(model: Any, tokenizer: PreTrainedTokenizerFast, length: int, seed: int) -> str:
    """Draw `length` tokens after a line end, each given the last block_size tokens, no cache."""
    generator = torch.Generator().manual_seed(seed)
    block_size = model.config.max_position_embeddings
    ids = torch.tensor([tokenizer("\n").input_ids])
    model = model.cpu().eval()
    for _ in range(length):
        logits = model(input_ids=ids[:, -block_size:], use_cache=False).logits[:, -1]
        drawn = torch.multinomial(F.softmax(logits.float(), dim=-1), 1, generator=generator)
        ids = torch.cat([ids, drawn], dim=1)
    return str(tokenizer.decode(ids[0], skip_special_tokens=True)).strip()


def climb(
    files: list[TokenFile],
    tokenizer: PreTrainedTokenizerFast,
    lesson: LessonConfig,
    config: PretrainConfig,
    accelerator: Accelerator,
) -> tuple[list[dict[str, Any]], list[str]]:
    """Train and measure the small rungs: a row of figures and a sample of text each."""
    rows, samples = [], []
    for rung in LADDER:
        set_seed(config.seed)
        model = build_rung(rung, tokenizer).to(accelerator.device)
        seconds = fit(model, files[0], rung, lesson.rung_steps, config.seed)
        loss = evaluate(model, files[1], config, accelerator)["val_loss"]
        rows.append(figures_of(rung.name, model, loss, seconds, rung.reported))
        samples.append(write_text_by(model, tokenizer, 300, config.seed))
        print(format_row(rows[-1]))
    return rows, samples


def read_trained(folder: Path, config: PretrainConfig) -> dict[str, Any] | None:
    """The scaled-up rung's last metrics, if it was trained to its end and is kept; else None."""
    metrics = folder / "metrics.jsonl"
    if not (metrics.exists() and (folder / "scaled" / "tokenizer.json").exists()):
        return None
    last = json.loads(metrics.read_text(encoding="utf-8").splitlines()[-1])
    return last if last["step"] == config.max_steps else None


def estimate_hours(
    model: Any, file: TokenFile, config: PretrainConfig, accelerator: Accelerator
) -> float:
    """Hours that the scaled-up rung would take here, by passes over 4 windows, uncompiled."""
    windows = 4
    batch = file.batch(range(windows), model.config.max_position_embeddings)
    inputs, targets = (part.to(accelerator.device) for part in batch)

    def one_pass(loss_of: Any) -> None:
        with accelerator.autocast():  # as `train` does
            loss = loss_of(model, inputs, targets)
        loss.backward()
        model.zero_grad()

    seconds = time_pass(token_loss, one_pass, accelerator.device.type == "cuda")
    step_windows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return seconds * step_windows / windows * config.max_steps / 3600


def figures_of(
    name: str, model: Any, loss: float, seconds: float, reported: float | None
) -> dict[str, Any]:
    """A row of the table."""
    return {
        "rung": name,
        "parameters": count_parameters(model),
        "val_loss": loss,
        "seconds": round(seconds, 1),
        "lesson_val_loss": reported,
    }


def format_row(row: dict[str, Any]) -> str:
    """A row as a line: rung, parameters, validation loss, the lesson's, seconds."""
    theirs = f"{row['lesson_val_loss']:.2f}" if row["lesson_val_loss"] else "-"
    return (
        f"{row['rung']:<32} {row['parameters']:>10,} {row['val_loss']:>9.4f} {theirs:>7} "
        f"{row['seconds']:>8.1f}"
    )


def main() -> None:
    """Climb the ladder; leave summary.json, samples.md and plot.svg in `output_dir`."""
    model_config, config, lesson = parse_config(ModelConfig, PretrainConfig, LessonConfig)
    require(lesson, 1, "rung_steps")
    if config.shards_dir:
        raise UserError("shards_dir: the lesson reads no stream; leave it out")
    task = open_task(config)
    sources = {"data": task.fingerprint()}
    values = config_values(model_config, config)
    output = StageOutput(config.output_dir, values, sources, config.overwrite)
    output.start()
    folder = output.path
    prepare_text(task, model_config, folder / "data")
    tokenizer = load_tokenizer(folder / "data")
    files = [TokenFile(folder / "data" / f"{split}.bin") for split in ("train", "validation")]
    require_windows(files, model_config.block_size, config.data)
    x = torch.randn(4, 8, 2, generator=torch.Generator().manual_seed(config.seed))
    others = average_by_matrix(x), average_by_softmax(x)
    gap = max(float((average_by_loop(x) - other).abs().max()) for other in others)
    print(f"the past averaged by loop, matrix product and softmax: largest difference {gap:.1e}\n")
    print(f"{'rung':<32} {'parameters':>10} {'val loss':>9} {'lesson':>7} {'seconds':>8}")
    accelerator = make_accelerator(config)
    rows, samples = climb(files, tokenizer, lesson, config, accelerator)
    set_seed(config.seed)
    model = make_model(model_config, tokenizer).to(accelerator.device)
    trained = read_trained(folder, config)
    if trained:
        model = AutoModelForCausalLM.from_pretrained(folder / "scaled")
    else:
        hours = estimate_hours(model, files[0], config, accelerator)
        print(
            f"{SCALED}: some {hours:.1f} hours here for its {config.max_steps:,} steps (max_steps; "
            "those of the rungs above are rung_steps)"
            + ("" if lesson.scaled else "; --scaled true trains it")
        )
    if lesson.scaled and not trained:
        set_seed(config.seed)  # the estimate has thrown dropout's dice
        figures = train(model, files[0], files[1], config, accelerator)
        model.save_pretrained(folder / "scaled")
        tokenizer.save_pretrained(folder / "scaled")
        trained = {"val_loss": figures["val_loss"], "seconds": figures["train_seconds"]}
    if trained:
        loss, seconds = trained["val_loss"], trained["seconds"]
        rows.append(figures_of(SCALED, model, loss, seconds, SCALED_REPORTED))
        samples.append(write_text_by(model, tokenizer, 500, config.seed))
        print(format_row(rows[-1]))
    texts = [f"## {row['rung']}\n\n{text}\n" for row, text in zip(rows, samples, strict=True)]
    write_text(folder / "samples.md", "# What each rung writes\n\n" + "\n".join(texts))
    write_text(folder / "plot.svg", plot_ladder(rows))
    write_json(folder / "summary.json", {"averages_differ_by": gap, "rungs": rows})
    output.settle()
    accelerator.end_training()


if __name__ == "__main__":
    run(main)
