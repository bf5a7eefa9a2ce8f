"""Several processes, one loss. Without ``torchrun`` everything here is the identity.

Every process draws the same batch (it is a function of seed and step) and takes every world-th row of it; losses
are weighted by supervised tokens over *all* processes, so gradients sum to those of the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from forgekit.errors import ForgeError
from forgekit.models.base import whole

T = TypeVar("T")
PATIENCE = timedelta(hours=12)
"""How long processes wait for the first one, which measures and writes alone."""


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
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    # Counters are summed on the CPU, whatever the gradients live on.
    dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield world()
    finally:
        dist.destroy_process_group()


def agreed(act: Callable[[], T]) -> T:
    """Do something once, in the first process, and give what it returns to all of them.

    Raises:
        ForgeError: ``act`` raised it, in every process.
    """
    rank, size = world()
    if size == 1:
        return act()
    answer: list = [None, None]
    if rank == 0:
        try:
            answer[0] = act()
        except ForgeError as error:
            answer[1] = error
    dist.broadcast_object_list(answer, src=0, device=torch.device("cpu"))
    if answer[1] is not None:
        raise answer[1]
    return answer[0]


def gathered(model: nn.Module, build: Callable[[], nn.Module]) -> nn.Module:
    """A sharded model as a whole one made by ``build``, in every process; any other as it is."""
    if not any(hasattr(p, "device_mesh") for p in model.parameters()):
        return model
    full = build()
    full.load_state_dict({name: whole(tensor) for name, tensor in model.state_dict().items()})
    return full.to(next(iter(model.parameters())).device).train(model.training)


def from_all(value: T) -> list[T]:
    """What every process gives, in the order of the processes."""
    size = world()[1]
    if size == 1:
        return [value]
    values: list = [None] * size
    dist.all_gather_object(values, value)
    return values


def threads_here(threads: int) -> int:
    """This process's part of the machine's threads, which the processes of one machine divide among them."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if world()[1] > 1 else 1
    return max(1, threads // beside)


def shard(model: nn.Module) -> nn.Module:
    """Shard a model over the processes with FSDP2: each block by itself, then the rest."""
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    for block in getattr(model, "blocks", []):
        fully_shard(block)
    fully_shard(model)
    register_fsdp_forward_method(model, "training_loss")
    return model


def sum_over_processes(value: float) -> float:
    """The sum of a number over all processes."""
    return sums_over_processes([value])[0]


def sums_over_processes(values: list[float]) -> list[float]:
    """The sum of each of several numbers over all processes, as one message."""
    if world()[1] == 1:
        return values
    totals = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(totals)
    return totals.tolist()


def least_over_processes(value: int) -> int:
    """The smallest value that any process has."""
    if world()[1] == 1:
        return value
    least = torch.tensor(value)
    dist.all_reduce(least, dist.ReduceOp.MIN)
    return int(least)


def largest_over_processes(tensors: list[Tensor]) -> None:
    """Replace each element of equally shaped tensors by the largest that any process has."""
    if world()[1] == 1 or not tensors:
        return
    stacked = torch.stack(tensors)
    dist.all_reduce(stacked, dist.ReduceOp.MAX)
    for tensor, largest in zip(tensors, stacked):
        tensor.copy_(largest)


def sum_gradients(parameters: list[Tensor]) -> None:
    """Sum gradients over all processes, as one message.

    A parameter without a gradient here gets the others' sum; one without a gradient anywhere stays without.
    """
    if world()[1] == 1:
        return
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    present = torch.tensor([float(p.grad is not None) for p in parameters], device=grads[0].device)
    flat = torch.cat([present, *(g.flatten() for g in grads)])
    dist.all_reduce(flat)
    present, *sums = flat.split([len(grads), *(g.numel() for g in grads)])
    for p, grad, found, part in zip(parameters, grads, present.tolist(), sums):
        if found:
            p.grad = grad.copy_(part.view_as(grad))
