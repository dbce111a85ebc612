"""The training loop: one screen, on accelerate, and what it leans on.

The same seed gives the same weights however the batch is split into processes and micro-batches
(to float32 rounding), and however often the run was killed and gone on with (bit for bit on CPU).
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from common.artifacts import MetricsFile, read_json, write_json
from common.errors import UserError
from common.token_file import TokenFile
from common.windows import (
    back_to_beginnings,
    document_positions,
    evaluation_spans,
    source_documents,
    training_starts,
)
from pretrain.compiling import compile_if_worth
from pretrain.config import PretrainConfig
from pretrain.optimizer import build_optimizers
from pretrain.trackers import Gauge, start_trackers

Batch = tuple[Tensor, Tensor, Tensor | None]  # inputs, targets, position_ids: (B, T) int64 each
LossOf = Callable[..., Tensor]  # of a batch; compiled together with the model, or not


@dataclass(frozen=True)
class Windows:
    """What a model reads at a time: so many tokens, and by which one a document begins."""

    block_size: int
    bos_token_id: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Windows":
        """As long as the model can read."""
        return cls(model.config.max_position_embeddings, model.config.bos_token_id)


@dataclass(frozen=True)
class Progress:
    """How far a run is, and what it must keep to, so that it goes on to the same bits.

    Attributes:
        step: optimizer steps taken.
        train_seconds: spent on them.
        compiled: whether it compiles.
        step_windows: windows of a step, of all processes.
    """

    step: int = 0
    train_seconds: float = 0.0
    compiled: bool | None = None
    step_windows: int | None = None


def train(
    model: PreTrainedModel,
    train_file: TokenFile,
    validation_file: TokenFile,
    config: PretrainConfig,
    accelerator: Accelerator,
    windows: Windows | None = None,
) -> dict[str, float]:
    """Train `model` in place to `max_steps`; go on from the last checkpoint if there is one.

    Returns:
        `val_loss` (nats a token), `val_bits_per_byte`, `train_seconds`, `train_tokens`.

    Raises:
        UserError: a loss or gradient that is not finite, before it can reach the weights; a
            checkpoint of other steps.
    """
    metrics = MetricsFile(Path(config.output_dir) / "metrics.jsonl")
    windows = windows or Windows.of(model)
    optimizers = build_optimizers(
        model,
        learning_rate=config.learning_rate,
        muon_learning_rate=config.muon_learning_rate,
        weight_decay=config.weight_decay,
        bf16=bool(config.bf16),
        optimizer=config.optimizer,
    )
    full_rates = {type(one).__name__: one.param_groups[0]["lr"] for one in optimizers}
    gauge = Gauge(model, config, accelerator, windows.block_size)
    net, *optimizers = accelerator.prepare(model, *optimizers)
    if accelerator.is_fsdp2:  # its checkpoints take each optimizer to have a model of its own
        accelerator._models = [net] * len(optimizers)
    resumed = read_progress(config)
    step_windows = windows_per_step(config, accelerator)
    require_same_windows(resumed, step_windows, config, accelerator)

    def loss_uncompiled(*batch: Any) -> Tensor:
        return token_loss(net, *batch)

    def one_pass(loss_of: LossOf) -> None:
        batch = next(micro_batches(train_file, windows, 0, config, accelerator))
        accelerator.backward(loss_of(*batch))
        net.zero_grad()

    passes = config.max_steps * config.gradient_accumulation_steps
    wanted = config.torch_compile if resumed.compiled is None else resumed.compiled
    loss_of = compile_if_worth(loss_uncompiled, one_pass, passes, wanted, accelerator)
    load_checkpoint(accelerator, config, resumed.step)
    step, seconds = resumed.step, resumed.train_seconds
    main = accelerator.is_main_process
    if main:
        metrics.rewind(step)
    start_trackers(config, accelerator, step)
    progress = tqdm(total=config.max_steps, initial=step, disable=not main, unit="step")
    clock = time.perf_counter() - seconds  # runs while training, stands still while evaluating
    while step < config.max_steps:
        figures: dict[str, float] = {}  # of this step's evaluation, if it has one
        rate = rate_at(step, config)
        for optimizer, full in zip(optimizers, full_rates.values(), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = full * rate
        batches = micro_batches(train_file, windows, step, config, accelerator)
        try:
            values = train_step(net, loss_of, optimizers, batches, config, accelerator)
        except FloatingPointError as error:
            where = describe_step(train_file, windows, step, config, accelerator)
            rates = {name: full * rate for name, full in full_rates.items()}
            raise UserError(describe_failure(error, step + 1, rates, where)) from error
        step += 1
        progress.update()
        seconds = time.perf_counter() - clock
        tokens = step * step_windows * windows.block_size
        if step == config.max_steps or (config.eval_steps and step % config.eval_steps == 0):
            figures = evaluate(net, validation_file, config, accelerator, windows)
            clock = time.perf_counter() - seconds
        if step % config.logging_steps == 0 or figures:
            speed = gauge.read(tokens, seconds)
            progress.set_postfix(
                loss=f"{values['loss']:.3f}",
                tok_s=f"{speed['tokens_per_second']:,.0f}",
                mfu=f"{speed['utilisation']:.1%}",
            )
            line = {"step": step, **values, "rate": rate, "tokens": tokens, **figures}
            if main:
                metrics.write(line | {"seconds": round(seconds, 4)})
            accelerator.log(line | speed, step=step)
        if step % config.save_steps == 0 and step < config.max_steps:
            compiled = loss_of is not loss_uncompiled
            now = Progress(step, time.perf_counter() - clock, compiled, step_windows)
            save_checkpoint(accelerator, config, now)
    progress.close()
    return figures | {"train_seconds": round(seconds, 1), "train_tokens": tokens}


def train_step(
    net: Any,
    loss_of: LossOf,
    optimizers: list[Any],
    batches: Iterable[Batch],
    config: PretrainConfig,
    accelerator: Accelerator,
) -> dict[str, float]:
    """One optimizer step over this process's micro-batches; `loss` and `grad_norm` of all.

    Raises:
        FloatingPointError: one of them is not finite; no weight has changed.
    """
    loss = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(batches, start=1):
        # DDP sends gradients once a step; FSDP2 would have to keep them whole until then
        sends = number == config.gradient_accumulation_steps or accelerator.is_fsdp2
        with nullcontext() if sends else accelerator.no_sync(net):
            part = loss_of(*batch) / config.gradient_accumulation_steps
            accelerator.backward(part)
        loss += part.detach()
    loss = accelerator.reduce(loss, "mean")
    norm = accelerator.clip_grad_norm_(net.parameters(), config.max_grad_norm or math.inf)
    if not math.isfinite(loss.item() + float(norm)):
        raise FloatingPointError(f"loss {loss.item():.4g}, gradient norm {float(norm):.4g}")
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return {"loss": loss.item(), "grad_norm": float(norm)}


def rate_at(step: int, config: PretrainConfig) -> float:
    """The share of the full learning rate: linear warm-up, flat, linear fall to 0."""
    falling = max(1.0, config.max_steps * config.decay_fraction)
    warm = (step + 1) / max(1, config.warmup_steps)
    return min(1.0, warm, (config.max_steps - step) / falling)


def windows_per_step(config: PretrainConfig, accelerator: Accelerator) -> int:
    """Windows that one optimizer step trains on, over all processes."""
    per_device = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return per_device * accelerator.num_processes


def require_same_windows(
    resumed: Progress, step_windows: int, config: PretrainConfig, accelerator: Accelerator
) -> None:
    """Refuse to go on with steps of another size.

    Raises:
        UserError: the checkpoint's steps have more windows, or fewer.
    """
    if resumed.step_windows not in (None, step_windows):
        raise UserError(
            f"{config.output_dir} was begun with {resumed.step_windows} windows a step, and these "
            f"{accelerator.num_processes} processes make {step_windows}: start as many as it had"
        )


def micro_batches(
    file: TokenFile, windows: Windows, step: int, config: PretrainConfig, accelerator: Accelerator
) -> Iterator[Batch]:
    """This process's micro-batches of a step, on its device."""
    own = slice(accelerator.process_index, None, accelerator.num_processes)
    on_gpu = accelerator.device.type == "cuda"
    for part in step_starts(file, windows, step, config, accelerator, own):
        batch = file.batch(part, windows.block_size)
        if on_gpu:  # from pinned memory the copy waits for nothing that the GPU still has to do
            batch = batch[0].pin_memory(), batch[1].pin_memory()
        inputs, targets = (x.to(accelerator.device, non_blocking=on_gpu) for x in batch)
        yield inputs, targets, packed_positions(inputs, windows, config)


def packed_positions(inputs: Tensor, windows: Windows, config: PretrainConfig) -> Tensor | None:
    """What keeps documents of a row apart where `document_mask` is set; else nothing."""
    return document_positions(inputs, windows.bos_token_id) if config.document_mask else None


def step_starts(
    file: TokenFile,
    windows: Windows,
    step: int,
    config: PretrainConfig,
    accelerator: Accelerator,
    own: slice = slice(None),
) -> NDArray[np.int64]:
    """Where a step's windows start: (micro-batches, windows), those of all processes or `own`."""
    block_size, size = windows.block_size, config.per_device_train_batch_size
    count = windows_per_step(config, accelerator)
    starts = training_starts(len(file), block_size, step, count, config.seed)
    starts = starts.reshape(-1, size)[own]
    moved = back_to_beginnings(file.tokens, starts.ravel(), block_size, windows.bos_token_id)
    return moved.reshape(starts.shape)


def describe_step(
    file: TokenFile, windows: Windows, step: int, config: PretrainConfig, accelerator: Accelerator
) -> str:
    """Which tokens of which token files a step reads, and which documents of these, from 0.

    A file has the documents to train on alone, in their order: those held out are not counted.
    """
    said = []
    places = np.sort(step_starts(file, windows, step, config, accelerator).ravel())
    for part, starts in file.by_file(places):
        documents = source_documents(part, starts, windows.block_size, windows.bos_token_id)
        named = f"documents {', '.join(map(str, documents))}, " if documents else ""
        tokens = ", ".join(f"{start}-{start + windows.block_size}" for start in starts)
        said.append(f"{named}tokens {tokens} of {part.paths[0]}")
    return "; ".join(said)


def describe_failure(error: Exception, step: int, rates: dict[str, float], where: str) -> str:
    """What to tell of a step that is not finite, counted from 1, and what to do about it."""
    shown = ", ".join(f"{rate:.3g} ({name}'s)" for name, rate in rates.items())
    return (
        f"{error} at step {step} with learning rates {shown}, on {where}: the "
        "weights are untouched and the last checkpoint stands; look at these (counted from 0, "
        "docs/pretrain.md), or train anew with lower rates and --overwrite true"
    )


def token_loss(
    model: Any, inputs: Tensor, targets: Tensor, position_ids: Tensor | None = None
) -> Tensor:
    """Mean cross-entropy over targets that are not -100, in nats: ().

    Compiled as a whole, so that the logits, which are a step's largest array, are not written out
    in float32.
    """
    packed = {} if position_ids is None else {"position_ids": position_ids}
    logits = model(input_ids=inputs, use_cache=False, **packed).logits
    return torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1), targets.flatten(), ignore_index=-100
    )


@torch.no_grad()
def evaluate(
    model: Any,
    file: TokenFile,
    config: PretrainConfig,
    accelerator: Accelerator,
    windows: Windows | None = None,
) -> dict[str, float]:
    """Loss over the whole file, every token but the first predicted once.

    Returns:
        `val_loss` in nats a token and `val_bits_per_byte` of the text.
    """
    model.eval()
    net = accelerator.unwrap_model(model)
    windows = windows or Windows.of(net)
    spans = evaluation_spans(file.tokens, windows.block_size, windows.bos_token_id)
    processes, size = accelerator.num_processes, config.per_device_eval_batch_size
    mine = spans[accelerator.process_index :: processes]
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for first in range(0, math.ceil(len(spans) / processes), size):
        some = mine[first : first + size]  # none, at the end: sharded weights want all processes
        inputs, targets = pad_spans(file, some or spans[:1])
        count = int((targets != -100).sum()) if some else 0
        inputs, targets = inputs.to(accelerator.device), targets.to(accelerator.device)
        loss = token_loss(net, inputs, targets, packed_positions(inputs, windows, config))
        total += torch.tensor([loss.item() * count, count]).to(total)
    nats, count = accelerator.reduce(total, "sum").tolist()
    model.train()
    return {
        "val_loss": nats / count,
        "val_bits_per_byte": nats / math.log(2) / file.info.bytes,
    }


def pad_spans(file: TokenFile, spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Inputs padded at the right with token 0, targets with -100: (B, T) int64 each."""
    width = max(end - start for start, end in spans)
    inputs = np.zeros((len(spans), width), dtype=np.int64)
    targets = np.full((len(spans), width), -100, dtype=np.int64)
    for row, (start, end) in enumerate(spans):
        inputs[row, : end - start] = file.tokens[start:end]
        targets[row, : end - start] = file.tokens[start + 1 : end + 1]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def checkpoints(config: PretrainConfig) -> Path:
    """Where the run's checkpoints lie."""
    return Path(config.output_dir) / "checkpoints"


def save_checkpoint(accelerator: Accelerator, config: PretrainConfig, progress: Progress) -> None:
    """Weights, optimizers and generators; the older checkpoint goes when the new one is whole."""
    folder = checkpoints(config)
    scratch = folder / "unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(scratch, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(scratch))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        write_json(scratch / "progress.json", asdict(progress))
        os.replace(scratch, folder / f"step-{progress.step}")
        remove_others(folder, progress.step)


def remove_others(folder: Path, step: int) -> None:
    """Leave the checkpoint of `step` alone; its elders may be half removed by a killed run."""
    for old in folder.glob("step-*"):
        if old.name != f"step-{step}":
            shutil.rmtree(old)


def read_progress(config: PretrainConfig) -> Progress:
    """How far the newest checkpoint is."""
    folder = checkpoints(config)
    # An older one that was killed while it was removed may have lost this file, which is no matter.
    found = [Progress(**read_json(path)) for path in folder.glob("step-*/progress.json")]
    return max(found, key=lambda progress: progress.step, default=Progress())


def load_checkpoint(accelerator: Accelerator, config: PretrainConfig, step: int) -> None:
    """Restore the checkpoint of `step`, and leave it alone in its folder; 0 restores nothing."""
    if not step:
        return
    folder = checkpoints(config)
    accelerator.load_state(str(folder / f"step-{step}"))
    accelerator.wait_for_everyone()  # all have chosen
    if accelerator.is_main_process:
        remove_others(folder, step)
