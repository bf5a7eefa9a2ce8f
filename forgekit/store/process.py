"""Whether the process that owns something is still there."""

from __future__ import annotations

import psutil

# A step of the wall clock moves the start time the system reports. Taking a live owner for dead would delete its work,
# taking a recycled pid for the owner only delays a cleanup: so be generous.
_CLOCK_SLACK_SECONDS = 60.0


def own_process() -> tuple[int, float]:
    """This process: (pid, start time in seconds since the epoch)."""
    process = psutil.Process()
    return process.pid, process.create_time()


def process_alive(pid: int | None, started: float | None) -> bool:
    """True while the process ``pid`` that started at ``started`` runs; a later process with the same pid is not it."""
    if pid is None or started is None:
        return False
    try:
        process = psutil.Process(pid)
        same = abs(process.create_time() - started) <= _CLOCK_SLACK_SECONDS
        return same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # it exists, and we may not look: leave its work alone
        return True
