"""Trainings at the same time, each on its part of the cores.

The operations of a small model are too short to be shared: two trainings with a thread each come further than one
after the other with two (docs/results/side_by_side.md). The first is done here, the others in processes of their
own, whose results come back as checkpoints. So nothing depends on them: whoever finds that such a process has died,
or was never there, trains on from what it left, to the same bits.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgekit.errors import ForgeError
from forgekit.train.checkpoints import random_states, set_random_states
from forgekit.train.config import TrainConfig
from forgekit.train.distributed import world
from forgekit.train.loop import BatchSource, Events, StepInfo, Trainer
from forgekit.train.setup import training_device

Observer = Callable[[StepInfo], None]
PATIENCE = 30.0
"""Seconds that a process has to write its last checkpoint when it is told to stop."""


@dataclass(frozen=True)
class Training:
    """One training, wherever it is done.

    Attributes:
        model, data, config, folder: as :class:`Trainer` takes them; to leave this process they must be picklable.
        random: where the random generators stand when it starts; where they stand now, unless given.
    """

    model: nn.Module
    data: BatchSource
    config: TrainConfig
    folder: Path
    random: Mapping[str, Any] = field(default_factory=random_states)

    def trainer(self, events: Events, observer: Observer) -> Trainer:
        """Its trainer, with the random generators put where they have to stand."""
        set_random_states(dict(self.random))
        return Trainer(self.model, self.data, self.config, self.folder, events, observer)


class SideBySide:
    """Trainings that do not depend on each other, at the same time. A context manager; inside it every training, in
    this process too, has the same number of threads, so that it does not matter where it is done.

    Args:
        trainings: how many there are in all, finished ones included.
        wanted: off, they are done one after another with all threads.
        device: where they are done; processes do not share an accelerator.
    """

    def __init__(self, trainings: int, wanted: bool, device: str) -> None:
        self._before = torch.get_num_threads()
        shared = wanted and trainings > 1 and world()[1] == 1 and training_device(device).type == "cpu"
        self._threads = max(1, self._before // trainings) if shared else self._before
        self._apart = shared and self._before > 1
        self._others: dict[str, Beside] = {}

    def __enter__(self) -> SideBySide:
        torch.set_num_threads(self._threads)
        return self

    def __exit__(self, *exc: object) -> None:
        try:
            for other in self._others.values():
                other.close()
        finally:
            torch.set_num_threads(self._before)

    def start(self, name: str, training: Training, events: Events, observer: Observer) -> None:
        """Begin a training beside this process's own, where that is possible."""
        if self._apart:
            self._others[name] = Beside(training, self._threads, events, observer)

    def listen(self) -> None:
        """Pass on what the others told since last time."""
        for other in self._others.values():
            other.listen()

    def wait(self, name: str) -> int:
        """Wait for the end of a training, passing on what all of them tell.

        Returns:
            The exit code of its process: 0 when it is finished, or was never begun.
        """
        while name in self._others and self._others[name].runs:
            for other in self._others.values():
                other.listen(0.05)
        return self._others[name].close() if name in self._others else 0


class Beside:
    """One training in a process of its own, which ends with this one.

    Args:
        training: what to train; its model here stays as it is.
        threads: to compute with.
        events, observer: receive in this process what the trainer tells in the other.
    """

    def __init__(self, training: Training, threads: int, events: Events, observer: Observer) -> None:
        # Not fork: a process that has used torch's threads must not be forked.
        context = multiprocessing.get_context("spawn")
        self._news, theirs = context.Pipe(duplex=False)
        # Packed here: sent as they are, tensors would be shared, and both processes would write to them.
        job = (pickle.dumps(training), threads, theirs)
        self._process = context.Process(target=_train, args=job, daemon=True)
        self._process.start()
        theirs.close()
        self._events, self._observer = events, observer
        self.runs = True

    def listen(self, seconds: float = 0.0) -> None:
        """Pass on what it has told, waiting a little for the first of it."""
        while self.runs and self._news.poll(seconds):
            try:
                kind, told = self._news.recv()
            except (EOFError, OSError):  # it ended, perhaps in the middle of a message
                self.runs = False
            else:
                self._observer(told) if kind == "step" else self._events.event(kind, **told)

    def close(self) -> int:
        """End it: what it does not finish, its last checkpoint leaves for later. Returns its exit code."""
        if self.runs:
            self._process.terminate()
        end = time.monotonic() + PATIENCE
        while self.runs and time.monotonic() < end:
            self.listen(0.05)
        if self.runs:
            self._process.kill()
        self._process.join()
        self.runs = False
        self._news.close()
        return self._process.exitcode


class _Teller:
    """Sends what a trainer tells; after an interrupted message nothing more, for it could not be read."""

    def __init__(self, news: multiprocessing.connection.Connection) -> None:
        self._news, self._whole = news, True

    def event(self, kind: str, **data: Any) -> None:
        self._send((kind, data))

    def step(self, info: StepInfo) -> None:
        self._send(("step", info))

    def _send(self, message: tuple[str, Any]) -> None:
        if self._whole:
            self._whole = False
            self._news.send(message)
            self._whole = True


def _train(packed: bytes, threads: int, news: multiprocessing.connection.Connection) -> None:
    """Train in a process of its own, to a checkpoint of the last step.

    An error ends it without a word: whoever started it goes on in its own process, meets the same and tells it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits; it passes it on
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    teller = _Teller(news)
    try:
        training: Training = pickle.loads(packed)
        report = training.trainer(teller, teller.step).run(keep_last=True)
        share = report.data_seconds / max(report.seconds, 1e-9)
        teller.event("trained_beside", seconds=report.seconds, data_share=share)
    except (ForgeError, KeyboardInterrupt):
        sys.exit(1)


def leave_with_parent() -> None:
    """End this process when the one that started it is gone, also by ``kill -9``: no queue or pipe would say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
