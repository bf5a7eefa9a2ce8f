"""Disk space, asked for before it is needed."""

from __future__ import annotations

import shutil
from pathlib import Path

from forgekit.errors import ResourceError


def forecast(parameters: int, artifacts: int, checkpoints: int, optimizer_slots: int, dtype_bytes: int = 4) -> int:
    """Bytes that a run will write at its peak.

    Args:
        parameters: of one model.
        artifacts: models the run leaves behind.
        checkpoints: checkpoints kept at the same time; each holds weights and optimizer slots.
        optimizer_slots: values per parameter in the optimizer.
        dtype_bytes: bytes per value.
    """
    model = parameters * dtype_bytes
    checkpoint = model * (1 + optimizer_slots)
    # Writes go to a temporary file first, so at the worst moment one more of the largest thing exists.
    largest = checkpoint if checkpoints else model
    return artifacts * model + checkpoints * checkpoint + largest


def require_free(path: Path | str, needed: int, what: str) -> None:
    """Refuse to begin something the disk cannot hold.

    Args:
        path: where it will be written; it need not exist yet.
        needed: bytes.
        what: what will be written, for the message.

    Raises:
        ResourceError: fewer than ``needed`` bytes are free on that disk.
    """
    path = Path(path).absolute()
    place = next(folder for folder in (path, *path.parents) if folder.exists())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ResourceError(
            f"{what} needs {readable(needed)}, {readable(free)} are free",
            where=str(path),
            remedy=f"free {readable(needed - free)} there or choose another folder",
        )


def readable(size: float) -> str:
    """A number of bytes for people, in powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
