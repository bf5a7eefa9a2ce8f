"""One command in several processes, as ``torchrun`` starts them: the first speaks, an error is told once."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def together() -> Iterator[bool]:
    """Join the announced process group, if any; gives whether this process is the one that speaks.

    The others leave without a word where the first one says what went wrong.
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
            if rank == 0:
                raise
            sys.exit(error.exit_code)
