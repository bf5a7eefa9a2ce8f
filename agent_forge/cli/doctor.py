"""What this machine is like, and what to mend before a run."""

from __future__ import annotations

import platform
import sys
import time

SMALLEST_MEMORY, SMALLEST_DISK = 4e9, 2e9


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
    ]


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
