"""One command in several processes, as ``torchrun`` starts them: the first speaks, and an error is told."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

GRACE = 10.0
"""Seconds that a process which met an error waits for the first one to tell it: torchrun ends all when one leaves."""


@contextmanager
def together() -> Iterator[bool]:
    """Join the announced process group, if any; gives whether this process is the one that speaks.

    An error of all processes is told by the first one. One that only another process met is told by that one, after
    a while in which the first, had it met it too, would have ended them all.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield True
        return
    from forgekit.compute.device import detect_device
    from forgekit.errors import ForgeError
    from forgekit.train.distributed import process_group

    with process_group(detect_device("auto").type) as (rank, _):
        try:
            yield rank == 0
        except ForgeError as error:
            if rank:
                time.sleep(GRACE)
                where = f"process {rank}: {error.where}" if error.where else f"process {rank}"
                raise type(error)(error.what, where=where, remedy=error.remedy) from error
            raise
