"""Readings that need not wait for the training: of the parent, and of what is only rounded."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from agent_forge.phases.bitnet.measuring import Reading

Found = tuple[Reading, int]
"""What a model shows, and its bytes on disk."""


class Ahead:
    """Measures models in a thread of its own while another training goes on here. A context manager.

    Args:
        apart: measure at once, on one torch thread; off, when the results are collected, on all threads. An interrupted
            run that goes on measures on as many threads as it would have, so it finds the same.
    """

    def __init__(self, apart: bool) -> None:
        self._before, self._apart = torch.get_num_threads(), apart
        self._waiting: dict[str, Callable[[], Found] | Future[Found]] = {}
        self._pool = ThreadPoolExecutor(1, "ahead", torch.set_num_threads, (1,)) if apart else None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            torch.set_num_threads(self._before)

    def read(self, name: str, model: Callable[[], Found]) -> None:
        """Measure a model, now or later.

        Args:
            name: of the model.
            model: makes and measures it.
        """
        self._waiting[name] = model if self._pool is None else self._pool.submit(model)

    def collect(self) -> dict[str, Found]:
        """All results in the order they were asked for; waits for them. What went wrong there is raised here."""
        return {name: one.result() if isinstance(one, Future) else one() for name, one in self._waiting.items()}
