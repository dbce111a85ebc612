"""Optimizers of pretraining: Muon for the matrices inside the blocks, AdamW for the rest, or all.

Muon (https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum by the nearest
orthogonal matrix, found by Newton-Schulz steps. torch has it as `torch.optim.Muon`; ours is
that with two changes for small models: matrices of one shape go through the steps together, and
in float32 where the machine has no fast bfloat16 (torch's always uses bfloat16). And with a third
for several processes, under DDP and FSDP2: each takes its share of the matrices through the steps.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers.pytorch_utils import Conv1D

# torch's default is 5; 3 learn as well here and cost less (docs/log.md)
NEWTON_SCHULZ_STEPS = 3


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` with batched orthogonalisation in the precision that is fast here.

    Args:
        params: matrices (outputs, inputs), as `nn.Linear` has them, or groups; one with
            `inputs_first` has them the other way round.
        bf16: orthogonalise in bfloat16, as torch's does; else in float32.
        **options: torch's.
    """

    def __init__(self, params: Iterable[Any], *, bf16: bool, **options: Any) -> None:
        super().__init__(params, **options)
        self.dtype = torch.bfloat16 if bf16 else torch.float32

    @torch.no_grad()
    def step(self, closure: Callable[[], Tensor] | None = None) -> None:  # type: ignore[override]
        """One update of every matrix that has a gradient."""
        assert closure is None
        for group in self.param_groups:
            same_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for param in group["params"]:
                if param.grad is not None:
                    same_shape[param.shape].append(param)
            for shape, params in same_shape.items():
                momenta = [whole(momentum) for momentum in self._momenta(params, group)]
                updates = orthogonalise_together(
                    torch.stack(momenta).to(self.dtype), group["ns_coefficients"], group["ns_steps"]
                )
                inputs, outputs = shape if group.get("inputs_first") else reversed(shape)
                scale = max(1.0, outputs / inputs) ** 0.5
                own = [
                    laid_out_like(param, update)
                    for param, update in zip(params, updates.to(params[0].dtype), strict=True)
                ]
                torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(params, own, alpha=-group["lr"] * scale)

    def _momenta(self, params: list[Tensor], group: dict) -> list[Tensor]:
        """Each matrix's; of all at once, since on a GPU starting a small product costs more."""
        for param in params:
            if "momentum_buffer" not in self.state[param]:
                self.state[param]["momentum_buffer"] = torch.zeros_like(param)
        grads = [param.grad for param in params if param.grad is not None]  # all of them
        buffers = [self.state[param]["momentum_buffer"] for param in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        if not group["nesterov"]:
            return buffers
        return list(torch._foreach_lerp(grads, buffers, group["momentum"]))


def whole(matrix: Tensor) -> Tensor:
    """All of a matrix, of which FSDP2 leaves each process only some rows."""
    return matrix.full_tensor() if isinstance(matrix, DTensor) else matrix


def laid_out_like(param: Tensor, matrix: Tensor) -> Tensor:
    """This process's rows of a whole matrix where FSDP2 has sharded `param`; else all of it."""
    if not isinstance(param, DTensor):
        return matrix
    # every process holds the whole matrix, so that nothing need be sent
    return distribute_tensor(matrix, param.device_mesh, param.placements, src_data_rank=None)


def orthogonalise_together(
    matrices: Tensor, coefficients: tuple[float, float, float], steps: int
) -> Tensor:
    """`orthogonalise`, (N, A, B): each process its share of the N matrices, then all gather all."""
    processes = dist.get_world_size() if dist.is_initialized() else 1
    if processes == 1:
        return orthogonalise(matrices, coefficients, steps)
    count = -(-len(matrices) // processes)  # the last shares are filled up with zeros
    filled = nn.functional.pad(matrices, (0, 0, 0, 0, 0, count * processes - len(matrices)))
    mine = filled[dist.get_rank() * count :][:count]
    updates = torch.empty_like(filled)
    dist.all_gather_into_tensor(updates, orthogonalise(mine, coefficients, steps).contiguous())
    return updates[: len(matrices)]


def orthogonalise(matrices: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Move the singular values of each (N, A, B) matrix near 1 by Newton-Schulz steps."""
    a, b, c = coefficients
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def build_optimizers(
    model: nn.Module,
    *,
    learning_rate: float,
    muon_learning_rate: float,
    weight_decay: float,
    bf16: bool = False,
    optimizer: str = "muon",
) -> list[torch.optim.Optimizer]:
    """[Muon, AdamW] over all parameters of a causal model; matrices of the blocks go to Muon.

    Embeddings and head are matrices too, but tables, not maps: AdamW, as for the vectors. Where
    `optimizer` is "adamw" it is [AdamW], and the matrices alone decay.
    """
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    tables |= {id(p) for p in model.get_output_embeddings().parameters()}  # type: ignore[operator]
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables]
    inner = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in inner]
    if optimizer == "adamw":
        decayed = {"params": matrices, "weight_decay": weight_decay}
        groups = [decayed, {"params": rest, "weight_decay": 0.0}]
        return [torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)]
    turned = {id(m.weight) for m in model.modules() if isinstance(m, Conv1D)}  # GPT-2's
    groups = [
        {"params": [p for p in matrices if (id(p) in turned) is first], "inputs_first": first}
        for first in (False, True)
    ]
    return [
        Muon(
            [group for group in groups if group["params"]],
            bf16=bf16,
            lr=muon_learning_rate,
            weight_decay=weight_decay,
            ns_steps=NEWTON_SCHULZ_STEPS,
        ),
        torch.optim.AdamW(
            rest, lr=learning_rate, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.0, fused=True
        ),
    ]
