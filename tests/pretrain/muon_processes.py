"""Muon on one process and on two, run by `test_optimizer`: by hand as DDP does, and under FSDP2."""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from pretrain import optimizer as under_test

STEPS = 3


def train(sharded: bool) -> dict[str, Any]:
    """Weights after `STEPS` steps on 8 rows, split over the processes; matrices orthogonalised."""
    rank, processes = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.manual_seed(0)
    sizes = [6, 9, 9, 9, 9]  # three of one shape, and 9 rows: neither can be halved
    net = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in pairwise(sizes)))
    inputs, targets = torch.randn(STEPS, 8, 6), torch.randn(STEPS, 8, 9)
    if sharded:
        fully_shard(net, mesh=init_device_mesh("cpu", (processes,)))
    muon = under_test.Muon(net.parameters(), bf16=False, lr=0.1, weight_decay=0.1)
    seen, orthogonalise = 0, under_test.orthogonalise

    def count(matrices: torch.Tensor, *settings: Any) -> torch.Tensor:
        nonlocal seen
        seen += len(matrices)
        return orthogonalise(matrices, *settings)

    under_test.orthogonalise = count
    for x, y in zip(inputs, targets, strict=True):
        mine = slice(rank * 8 // processes, (rank + 1) * 8 // processes)
        (net(x[mine]).tanh() - y[mine]).square().mean().backward()
        for param in net.parameters():
            if processes > 1 and not sharded:
                dist.all_reduce(param.grad)
                param.grad /= processes
        muon.step()
        muon.zero_grad()
    under_test.orthogonalise = orthogonalise
    return {"weights": [under_test.whole(p.detach()) for p in net.parameters()], "seen": seen}


def work(rank: int, folder: Path, sharded: bool) -> None:
    """One of two processes; its result in a file. Ends without the interpreter's clearing away, in
    which FSDP2's mesh still holds gloo's threads: one run in hundreds aborted there.
    """
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    torch.save(train(sharded), folder / f"{rank}.pt")
    dist.destroy_process_group()
    os._exit(0)
