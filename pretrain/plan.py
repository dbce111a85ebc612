"""What a pretraining run would take, before it is begun.

python -m pretrain.plan --config configs/web/pretrain.yaml --devices 8 --tflops 400
python -m pretrain.plan --config configs/web/gpt3_175b.yaml --devices 1568 --shard true

The model is built and trained for two steps as stage 1 does, on tensors that have sizes and no
content (`FakeTensorMode`): so parameters, optimizer states and a step's peak are counted, not
estimated. Compiled a step holds less. FLOPs follow a formula (`pretrain.speed`).
"""

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig

from common.config import parse_config, require, run
from common.device import fast_attention, has_bf16
from common.errors import UserError
from common.gpt import build_gpt
from common.tasks import open_task
from common.tokenizer import model_vocab_size
from pretrain.__main__ import count_parameters, gpt_config
from pretrain.config import ModelConfig, PretrainConfig
from pretrain.optimizer import build_optimizers
from pretrain.speed import flops_per_token
from pretrain.stream import make_tokenizer
from pretrain.train import token_loss


@dataclass
class PlanConfig:
    """The machine, and how much to train."""

    devices: int = field(default=1, metadata={"help": "GPUs, or CPU processes"})
    tflops: float = field(
        default=400.0, metadata={"help": "what a device gets done, 1e12 FLOP/s: its peak times MFU"}
    )
    shard: bool = field(
        default=False, metadata={"help": "weights and optimizer states split (FSDP), not copied"}
    )
    train_tokens: float | None = field(
        default=None, metadata={"help": "in place of max_steps times the batch"}
    )
    here: bool = field(
        default=False,
        metadata={"help": "memory in this machine's precision and attention, not in bf16 on a GPU"},
    )

    def __post_init__(self) -> None:
        """Refuse what cannot be.

        Raises:
            UserError: no device, or no speed.
        """
        require(self, 1, "devices")
        require(self, 0, "tflops", above=True)


@dataclass(frozen=True)
class Counts:
    """What one model counts, in numbers and bytes."""

    parameters: int
    flops_per_token: int
    weight_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    step_bytes: int  # at its peak, gradients that are there then included
    peak_gradient_bytes: int  # these
    evaluation_bytes: int  # of a batch at its peak


def count(
    config: PreTrainedConfig,
    batch_size: int,
    micro_batches: int = 1,
    eval_batch_size: int = 1,
    *,
    optimizer: str = "muon",
    here: bool = False,
) -> Counts:
    """Count a model of `build_config`'s, trained in bf16 autocast over float32 weights.

    Args:
        config: its sizes.
        batch_size: windows of block_size tokens in a micro-batch.
        micro_batches: of a step; from the second on the gradients of those before are held.
        eval_batch_size: windows that are evaluated at once.
        optimizer: "muon" or "adamw", as of `PretrainConfig`.
        here: in this machine's precision, and with the attention that is fast on it.
    """
    bf16 = not here or has_bf16()
    with FakeTensorMode():
        model = build_gpt(config)
        if here:
            model.set_attn_implementation(fast_attention(config.max_position_embeddings))
        optimizers = build_optimizers(
            model,
            learning_rate=1.0,
            muon_learning_rate=1.0,
            weight_decay=0.0,
            bf16=bf16,
            optimizer=optimizer,
        )
        weight_bytes = sum(p.nbytes for p in model.parameters())
        step = measure_step(model, optimizers, batch_size, min(micro_batches, 2), bf16=bf16)
        return Counts(
            parameters=count_parameters(model),
            flops_per_token=flops_per_token(model),
            weight_bytes=weight_bytes,
            gradient_bytes=weight_bytes,
            optimizer_bytes=sum(_state_bytes(one) for one in optimizers),
            step_bytes=step.peak,
            peak_gradient_bytes=step.gradients,
            evaluation_bytes=measure_evaluation(model, eval_batch_size, bf16=bf16).peak,
        )


def _state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Once it has stepped: of Muon's momentum, AdamW's two moments; not of a count of steps."""
    states = tree_leaves(list(optimizer.state.values()))
    return sum(x.nbytes for x in states if torch.is_tensor(x) and x.ndim)


def measure_step(
    model: Any, optimizers: list[Any], batch_size: int, micro_batches: int, *, bf16: bool
) -> "PeakMemory":
    """What a step, uncompiled, holds at its peak beside weights and optimizer states.

    Gradients that are there by then, activations kept for the backward pass, and what is made and
    thrown away: where the vocabulary is large the loss's gradient for the logits, in float32, is
    the largest array of all.
    """
    take_step(model, optimizers, batch_size, 1, bf16=bf16)  # it makes the optimizers' states
    with PeakMemory(model) as memory:
        take_step(model, optimizers, batch_size, micro_batches, bf16=bf16)
    return memory


@torch.no_grad()
def measure_evaluation(model: Any, batch_size: int, *, bf16: bool) -> "PeakMemory":
    """What the loss of a batch of whole windows holds at its peak beside the weights."""
    with PeakMemory(model) as memory:
        ids = torch.zeros(batch_size, model.config.max_position_embeddings, dtype=torch.long)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            token_loss(model.eval(), ids, ids)
    return memory


def take_step(
    model: Any, optimizers: list[Any], batch_size: int, micro_batches: int, *, bf16: bool
) -> None:
    """Forward and backward on micro-batches of whole windows, and the update."""
    ids = torch.zeros(batch_size, model.config.max_position_embeddings, dtype=torch.long)
    for _ in range(micro_batches):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = token_loss(model, ids, ids)
        loss.backward()
        del loss
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of storages that are made under it; what torch's `MemTracker` finds, sooner.

    Attributes:
        peak: the most that lived at a time.
        gradients: those of the model's among them.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.parameters = list(model.parameters())
        self.held = self.peak = self.gradients = 0
        self.living: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        """Run the operation, and look at what it returns."""
        there = {x.untyped_storage()._cdata for x in tree_leaves(args) if torch.is_tensor(x)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in there | self.living:  # neither a view nor in place
                    self._hold(storage)
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self.living.add(key)
        self.held += size
        if self.held > self.peak:
            self.peak = self.held
            self.gradients = sum(p.grad.nbytes for p in self.parameters if p.grad is not None)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self.living.discard(key)
        self.held -= size


def plan(counts: Counts, config: PretrainConfig, block_size: int, machine: PlanConfig) -> dict:
    """The figures that `main` prints, by name; bytes are those of one device.

    Returns:
        parameters, tokens, FLOPs in all, steps, bytes a device by kind, days.
    """
    batch = config.per_device_train_batch_size * config.gradient_accumulation_steps
    step_tokens = batch * block_size * machine.devices
    tokens = int(machine.train_tokens or config.max_steps * step_tokens)
    parts = machine.devices if machine.shard else 1
    split = counts.peak_gradient_bytes * (parts - 1) // parts  # what of them other devices hold
    memory = {
        "weight_bytes": -(-counts.weight_bytes // parts),
        "optimizer_bytes": -(-counts.optimizer_bytes // parts),
        "step_bytes": counts.step_bytes - split,
        "evaluation_bytes": counts.evaluation_bytes,
        "bucket_bytes": counts.gradient_bytes if machine.devices > parts else 0,  # DDP's
    }
    never_at_once = min(memory["step_bytes"], memory["evaluation_bytes"])
    flops = counts.flops_per_token * tokens
    return {
        "parameters": counts.parameters,
        "tokens": tokens,
        "steps": -(-tokens // step_tokens),
        "flops_per_token": counts.flops_per_token,
        "flops": flops,
        **memory,
        "bytes_per_device": sum(memory.values()) - never_at_once,
        "days": flops / (machine.devices * machine.tflops * 1e12) / 86400,
    }


def main() -> None:
    """Print the plan of a configuration."""
    model_config, config, machine = parse_config(ModelConfig, PretrainConfig, PlanConfig)
    if model_config.model_name_or_path:
        raise UserError("model_name_or_path: what is planned is a blank page; give its sizes")
    vocab_size = model_config.vocab_size
    if model_config.tokenizer != "bpe":  # no more than is in the text, or in the directory
        task = open_task(config)
        texts, documents = task.tokenizer_texts(), task.documents_apart
        vocab_size = model_vocab_size(make_tokenizer(model_config, texts, documents=documents))
    sizes = gpt_config(model_config, vocab_size, pad_token_id=0, bos_token_id=1, eos_token_id=2)
    windows, micro_batches = config.per_device_train_batch_size, config.gradient_accumulation_steps
    evaluated = config.per_device_eval_batch_size
    optimizer, here = config.optimizer, machine.here
    counts = count(sizes, windows, micro_batches, evaluated, optimizer=optimizer, here=here)
    for name, value in plan(counts, config, sizes.max_position_embeddings, machine).items():
        if name.endswith("bytes") or name == "bytes_per_device":
            print(f"{name.replace('bytes', 'GB'):<18} {value / 1e9:>14,.2f}")
        elif name == "flops":
            print(f"{name:<18} {value:>14.3e}")
        else:
            print(f"{name:<18} {value:>14,.2f}" if name == "days" else f"{name:<18} {value:>14,}")


if __name__ == "__main__":
    run(main)
