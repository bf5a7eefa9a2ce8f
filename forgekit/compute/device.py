"""Which device trains, and what the bits of its results depend on."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from forgekit.errors import ConfigError
from forgekit.registry import unknown

if TYPE_CHECKING:
    import torch

PREFERENCES = ("auto", "cpu", "cuda", "mps")
MINIMUM_CAPABILITY = (6, 0)
"""Pascal: the oldest CUDA architecture the sources accept."""


def detect_device(prefer: str = "auto") -> torch.device:
    """The device to compute on.

    Args:
        prefer: ``auto`` takes CUDA, then MPS, then the CPU; a device by name is taken or refused, never replaced.

    Raises:
        ConfigError: the name is unknown, or the named device is absent or too old.
    """
    import torch

    if prefer not in PREFERENCES:
        raise unknown("device", prefer, list(PREFERENCES))
    obstacle = {"cpu": "", "cuda": _cuda_obstacle(), "mps": _mps_obstacle()}
    if prefer == "auto":
        if obstacle["cuda"] and torch.cuda.is_available():
            warnings.warn(f"CUDA is not used: {obstacle['cuda']}", stacklevel=2)
        return torch.device(next(name for name in ("cuda", "mps", "cpu") if not obstacle[name]))
    if obstacle[prefer]:
        raise ConfigError(
            f"{prefer!r} cannot be used: {obstacle[prefer]}", where="device", remedy='set device = "auto" or "cpu"'
        )
    return torch.device(prefer)


def _cuda_obstacle() -> str:
    """Why CUDA cannot be used; empty when it can."""
    import torch

    if not torch.cuda.is_available():
        return "this torch build has no CUDA" if torch.version.cuda is None else "no CUDA device is visible"
    capability = torch.cuda.get_device_capability()
    if capability < MINIMUM_CAPABILITY:
        return f"compute capability {capability[0]}.{capability[1]} is below {'.'.join(map(str, MINIMUM_CAPABILITY))}"
    return ""


def _mps_obstacle() -> str:
    import torch

    return "" if torch.backends.mps.is_available() else "no MPS device is visible"


def environment(device: str | torch.device = "cpu") -> dict[str, Any]:
    """Everything that "the same bits" depends on, as plain JSON values.

    Two runs are promised the same bits only where these dictionaries are equal: the torch build, the CPU
    capability its kernels were dispatched to, the thread count, and the device.
    """
    import torch

    kind = torch.device(device).type
    return {
        "torch": torch.__version__,
        "torch_git": torch.version.git_version,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "device": kind,
        "device_name": torch.cuda.get_device_name(torch.device(device)) if kind == "cuda" else kind,
    }
