"""Readings that need not wait for the training: of the parent, and of what is only rounded."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from agent_forge.phases.bitnet.measuring import Reading

Found = tuple[Reading, int]
"""What a model shows, and its bytes on disk."""


class Ahead:
    """Measures models, where it may in a thread of its own while a training goes on here. A context manager.

    How many torch threads a reading has must not depend on how far the training has come. So it begins and ends between
    the same two points as the trainings side by side, which have the same number of threads all that time.

    Attributes:
        leaving: is set when the results are no longer wanted; who measures looks at it now and then.
    """

    def __init__(self) -> None:
        self.leaving = threading.Event()
        self._asked: dict[str, Callable[[], Found]] = {}
        self._found: dict[str, Future[Found]] = {}
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> Ahead:
        return self

    def __exit__(self, *exc: object) -> None:
        self.leaving.set()
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def ask(self, name: str, model: Callable[[], Found]) -> None:
        """Have a model measured, later.

        Args:
            name: of the model.
            model: makes and measures it.
        """
        self._asked[name] = model

    def begin(self) -> None:
        """Measure in a thread from now on."""
        self._pool = ThreadPoolExecutor(1, "ahead")
        self._found = {name: self._pool.submit(model) for name, model in self._asked.items()}

    def wait(self) -> None:
        """Wait until everything that was begun is measured. What went wrong there is raised here."""
        for one in self._found.values():
            one.result()

    def collect(self) -> dict[str, Found]:
        """All results in the order they were asked for. What was not begun is measured now, on all threads."""
        return {name: self._found[name].result() if self._found else one() for name, one in self._asked.items()}
