"""Memory that is really free, and the models that occupy it.

Sizes: GB is 10**9 bytes as the sources have it; a model's MB is 2**20 bytes.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from forgekit.compute.device import detect_device
from forgekit.compute.ladder import is_out_of_memory
from forgekit.errors import ConfigError, ResourceError

if TYPE_CHECKING:
    import torch

TRAINING_FACTOR = {"cpu": 2.0, "mps": 2.5, "cuda": 2.5}
"""Weights and gradients, with the sources' margin on an accelerator."""


@dataclass(frozen=True)
class Allocation:
    """A model that lives on a device; ``allocated_gb`` counts its own parameters and buffers."""

    model: torch.nn.Module
    allocated_gb: float
    device: torch.device


class ComputeManager:
    """Places models on the best device and knows what still fits.

    Args:
        prefer: as in :func:`forgekit.compute.device.detect_device`.
    """

    def __init__(self, prefer: str = "auto") -> None:
        self.device = detect_device(prefer)
        self.current_allocation: dict[str, Allocation] = {}

    def available_memory(self) -> dict[str, float]:
        """Total and free memory in GB, measured now; the ``vram_`` keys only exist on CUDA."""
        total, free = ram_bytes()
        memory = {"ram_total_gb": total / 1e9, "ram_free_gb": free / 1e9}
        if self.device.type == "cuda":
            vram_total, vram_free = _vram_bytes(self.device)
            memory |= {"vram_total_gb": vram_total / 1e9, "vram_free_gb": vram_free / 1e9}
        return memory

    def free_bytes(self) -> int:
        """Bytes free on the device, measured now."""
        return _vram_bytes(self.device)[1] if self.device.type == "cuda" else ram_bytes()[1]

    def can_fit_model(self, size_mb: float) -> bool:
        """Whether a model of ``size_mb`` can be trained here: weights, gradients and a margin."""
        return size_mb * 2**20 * TRAINING_FACTOR[self.device.type] < self.free_bytes()

    def allocate_model(self, model: torch.nn.Module, model_id: str) -> torch.nn.Module:
        """Move a model to the device and remember it under ``model_id``.

        Raises:
            ConfigError: the id is taken.
            ResourceError: the device has no room for it.
        """
        if model_id in self.current_allocation:
            raise ConfigError("already allocated", where=f"model {model_id}", remedy="free it first or take another id")
        size = sum(tensor.nbytes for tensor in [*model.parameters(), *model.buffers()])
        try:
            model = model.to(self.device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            what = f"needs {size / 1e9:.2f} GB on {self.device}, {self.free_bytes() / 1e9:.2f} GB are free"
            raise ResourceError(what, where=f"model {model_id}", remedy="free a model or use a smaller one") from error
        self.current_allocation[model_id] = Allocation(model, size / 1e9, self.device)
        return model

    def free_model(self, model_id: str) -> bool:
        """Let go of a model; False when none is held under that id."""
        if self.current_allocation.pop(model_id, None) is None:
            return False
        gc.collect()
        if self.device.type == "cuda":
            import torch

            torch.cuda.empty_cache()
        return True


def ram_bytes() -> tuple[int, int]:
    """(total, free) bytes of main memory, as small as the tightest control group around this process makes it."""
    memory = psutil.virtual_memory()
    total, free = memory.total, memory.available
    for limit, used in cgroup_memory():
        total, free = min(total, limit), min(free, max(limit - used, 0))
    return total, free


def cgroup_memory(mount: str = "/sys/fs/cgroup", membership: str = "/proc/self/cgroup") -> list[tuple[int, int]]:
    """(limit, used) in bytes of each limited memory control group this process is in; empty without any.

    Reads cgroup v1 and v2, the own group and all its parents: a parent's limit binds too. File cache that the
    kernel would drop at once is not counted as used.
    """
    try:
        lines = Path(membership).read_text().splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        number, controllers, group = line.split(":", 2)
        if number == "0":
            base, names = Path(mount), ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            base = Path(mount, "memory")
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's; it is then missing and the mount's root is the own group.
        own = base / group.lstrip("/")
        levels = [own, *(parent for parent in own.parents if parent.is_relative_to(base))]
        found += [reading for level in levels if (reading := _read_group(level, *names)) is not None]
    return found


def _read_group(folder: Path, limit_name: str, used_name: str, cache_key: str) -> tuple[int, int] | None:
    """(limit, used) of one group; None where it has no limit or is not there."""
    try:
        limit = (folder / limit_name).read_text().strip()
        used = int((folder / used_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    if limit == "max":
        return None
    return int(limit), max(used - int(stat.get(cache_key, 0)), 0)


def _vram_bytes(device: torch.device) -> tuple[int, int]:
    """(total, free) bytes on a CUDA device; what torch's own pool holds unused counts as free."""
    import torch

    free, total = torch.cuda.mem_get_info(device)
    return total, free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
