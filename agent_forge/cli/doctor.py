"""What this machine is like, and what to mend before a run."""

from __future__ import annotations

import os
import platform
import sys
import time
from typing import Any

SMALLEST_MEMORY, SMALLEST_DISK = 4e9, 2e9
_WAYS = {"cpu": "pip install llvmlite", "cuda": "pip install triton"}
"""What brings faster products with packed weights, by device."""
LLVM_BROKEN = "pip install --force-reinstall llvmlite for faster ones; everything runs without it too"


def examine(storage: str) -> list[dict[str, str]]:
    """Rows of check, result and advice; an advice beginning with ``must`` means a run would fail."""
    import torch

    from forgekit.compute.disk import readable
    from forgekit.compute.manager import ComputeManager
    from forgekit.store.fsio import free_bytes
    from forgekit.train.setup import autocast_dtype

    manager = ComputeManager()
    memory = manager.available_memory()
    disk, dtype = free_bytes(storage), autocast_dtype("auto", manager.device)
    speed = {name: _matmul_speed(kind) for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16))}
    ram = memory["ram_free_gb"] * 1e9
    return [
        _row(
            "python",
            f"{platform.python_version()} on {platform.system()}",
            sys.version_info < (3, 11),
            "must be 3.11 or newer",
        ),
        _row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads", False, ""),
        _row("device", str(manager.device), False, ""),
        _row("memory free", readable(ram), ram < SMALLEST_MEMORY, "close other programs, or use the pico profile"),
        _row("disk free", readable(disk), disk < SMALLEST_DISK, "must have 2 GB for sessions; try agent-forge clean"),
        _row("matrix product", ", ".join(f"{k} {v:.0f} GFLOP/s" for k, v in speed.items()), False, ""),
        _row("training precision", "bf16" if dtype else "fp32", False, ""),
        _kernels(manager.device),
    ]


def _kernels(device: Any) -> dict[str, str]:
    """What multiplies packed weights here, and how to have it faster."""
    from forgekit.errors import ForgeError
    from forgekit.infer import kernels

    forced = os.environ.get(kernels.VARIABLE, "")
    places = [device.type] if forced else list(dict.fromkeys(("cpu", device.type)))
    try:
        found = {place: kernels.backend(place) for place in places}
    except ForgeError as error:
        advice = f"must be changed: {error.what}; {error.remedy}"
        return _row("ternary kernels", f"{kernels.VARIABLE}={forced}", True, advice)
    names = {place: _told(name) for place, name in found.items()}
    alike = len(set(names.values())) == 1
    result = next(iter(names.values())) if alike else ", ".join(f"{name} on {place}" for place, name in names.items())
    slow = [place for place, name in found.items() if name == "torch" and place in _WAYS]
    way = f"unset {kernels.VARIABLE}" if forced else " and ".join(_WAYS[place] for place in slow)
    result += ", forced" if forced else ""
    if not forced and "cpu" in slow and (obstacle := kernels.cpu.obstacle()) not in ("", kernels.cpu.MISSING):
        return _row("ternary kernels", f"{result}: LLVM does not work here ({obstacle})", True, LLVM_BROKEN)
    return _row("ternary kernels", result, bool(slow), f"{way} for faster ones")


def _told(backend: str) -> str:
    """A backend by name; LLVM with the instructions it compiles for."""
    if backend != "llvm":
        return "plain torch" if backend == "torch" else backend
    from forgekit.infer.kernels import cpu

    return f"llvm ({cpu.ternary()[0].name})"


def _row(check: str, result: str, bad: bool, advice: str) -> dict[str, str]:
    return {"check": check, "result": result, "advice": advice if bad else ""}


def _matmul_speed(dtype) -> float:
    """GFLOP/s of a 512 x 512 product, best of several."""
    import torch

    a = torch.ones(512, 512, dtype=dtype)
    best = float("inf")
    for _ in range(12):
        clock = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - clock)
    return 2 * 512**3 / best / 1e9
