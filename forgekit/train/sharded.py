"""The parts of a sharded checkpoint: every process writes and reads files, none ever holds the whole state.

A process writes the rows of each tensor that it owns (FSDP2 cuts along the first dimension); what is not sharded is
written by the first process. Reading puts one tensor together at a time, so any number of processes can go on with
what any other number wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from forgekit.models.base import local
from forgekit.store import fsio
from forgekit.train.distributed import world


def file_name(rank: int, size: int) -> str:
    """The file of one process."""
    return f"state-{rank:05d}-of-{size:05d}.safetensors"


def first_row(tensor: Tensor) -> int:
    """Where this process's rows of a sharded tensor begin; FSDP2 cuts as ``torch.chunk`` does."""
    rank, size = world()
    return min(rank * -(-tensor.shape[0] // size), tensor.shape[0])


def write_part(folder: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Write this process's rows; returns what the checkpoint's record says of them.

    Raises:
        ResourceError: disk full, or no permission.
    """
    rank, size = world()
    rows: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        sharded = hasattr(tensor, "device_mesh")
        own = local(tensor.detach())
        if rank and not sharded or sharded and not own.numel():
            continue
        rows[name], held[name] = (first_row(tensor) if sharded else 0), own.cpu().clone().contiguous()
    path = folder / file_name(rank, size)
    with fsio.disk_errors(folder, sum(t.numel() * t.element_size() for t in held.values())):
        save_file(held, str(path))
        fsio.sync_file(path)
    return {"file": path.name, "sha256": fsio.sha256_file(path), "rows": rows}


class Parts(Mapping[str, Tensor]):
    """The tensors of a sharded checkpoint by name, each put together when it is asked for.

    Raises:
        OSError, KeyError, SafetensorError: a file is missing or not what the record says.
    """

    def __init__(self, folder: Path, parts: list[dict[str, Any]]) -> None:
        self._files = [safe_open(str(folder / part["file"]), framework="pt") for part in parts]
        self._where: dict[str, list[tuple[int, int]]] = {}
        for number, part in enumerate(parts):
            for name, row in part["rows"].items():
                self._where.setdefault(name, []).append((row, number))

    def __getitem__(self, name: str) -> Tensor:
        pieces = [self._files[number].get_tensor(name) for _, number in sorted(self._where[name])]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        shapes = [self._files[number].get_slice(name).get_shape() for _, number in self._where[name]]
        return (sum(s[0] for s in shapes), *shapes[0][1:]) if shapes[0] else ()
