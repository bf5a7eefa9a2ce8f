"""Several processes, one loss. Without ``torchrun`` everything here is the identity.

Every process draws the same batch (it is a function of seed and step) and takes every world-th row of it; losses
are weighted by supervised tokens over *all* processes, so gradients sum to those of the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world() -> tuple[int, int]:
    """(rank, size) of the running process group; (0, 1) without one."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


@contextmanager
def process_group(device: str = "cpu") -> Iterator[tuple[int, int]]:
    """Join the group ``torchrun`` announces in the environment, and leave it afterwards."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield 0, 1
        return
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield world()
    finally:
        dist.destroy_process_group()


def shard(model: nn.Module) -> nn.Module:
    """Shard a model over the processes with FSDP2: each block by itself, then the rest."""
    from torch.distributed.fsdp import fully_shard

    for block in getattr(model, "blocks", []):
        fully_shard(block)
    fully_shard(model)
    return model


def sum_over_processes(value: float) -> float:
    """The sum of a number over all processes."""
    if world()[1] == 1:
        return value
    total = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def sum_gradients(parameters: list[Tensor]) -> None:
    """Sum gradients over all processes, as one message."""
    if world()[1] == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    for grad, part in zip(grads, flat.split([g.numel() for g in grads])):
        grad.copy_(part.view_as(grad))
