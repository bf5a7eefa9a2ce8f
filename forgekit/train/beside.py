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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from forgekit.errors import ForgeError
from forgekit.train.checkpoints import random_states, set_random_states
from forgekit.train.config import TrainConfig
from forgekit.train.distributed import world
from forgekit.train.loop import BatchSource, Events, StepInfo, Trainer
from forgekit.train.setup import choose_plan, training_device

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
    this process too, has the same number of threads and the same part of the memory, so that it does not matter where
    it is done.

    Args:
        devices: where each of the trainings is done, finished ones included.
        wanted: off, they are done one after another with all threads.
    """

    def __init__(self, devices: Sequence[str], wanted: bool) -> None:
        self._before, self._trainings = torch.get_num_threads(), len(devices)
        on_cpu = all(training_device(device).type == "cpu" for device in devices)  # an accelerator is not shared
        self._shared = wanted and len(devices) > 1 and world()[1] == 1 and on_cpu
        self._threads = max(1, self._before // self._trainings) if self._shared else self._before
        self._apart = self._shared and self._before > 1
        self._others: dict[str, Beside] = {}

    def __enter__(self) -> SideBySide:
        torch.set_num_threads(self._threads)
        return self

    def __exit__(self, *exc: object) -> None:
        with ExitStack() as stack:
            stack.callback(torch.set_num_threads, self._before)
            for other in self._others.values():
                stack.callback(other.close)
            for other in self._others.values():
                other.stop()  # all at once: each takes its time to write

    def ready(self, training: Training) -> Training:
        """The training with its cut into micro batches decided, by its part of the memory that is free now."""
        config = training.config
        if not self._shared or config.micro_batch:
            return training
        plan = choose_plan(training.model, config, training_device(config.device), memory=1 / self._trainings)
        return replace(training, config=config.replace(micro_batch=plan.micro_batch))

    def start(self, name: str, training: Training, events: Events, observer: Observer) -> None:
        """Begin a training beside this process's own, where that is possible; where it is not, an event says why."""
        if not self._apart:
            return
        try:
            self._others[name] = Beside(training, self._threads, _Named(events, name), observer)
        except (OSError, pickle.PicklingError, TypeError, AttributeError) as error:
            # No process to be had, or a model or data source that cannot travel: it is trained here, in its turn.
            events.event("train_beside_failed", training=name, error=str(error).splitlines()[0])

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

    Raises:
        OSError: there is no process to be had.
        PicklingError, TypeError, AttributeError: the training cannot leave this process.
    """

    def __init__(self, training: Training, threads: int, events: Events, observer: Observer) -> None:
        # Packed here: sent as they are, tensors would be shared, and both processes would write to them.
        packed = pickle.dumps(training)
        # Not fork: a process that has used torch's threads must not be forked.
        context = multiprocessing.get_context("spawn")
        self._news, theirs = context.Pipe(duplex=False)
        job, mine = context.Pipe(duplex=False)
        self._process = context.Process(target=_train, args=(job, threads, theirs), daemon=True)
        # Ctrl-C is for this process, from the other's first moment on; what is blocked here is blocked there.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            self._process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            theirs.close()
            job.close()
        # Not with the start: that waits for ever if the process dies before it has read what is larger than a pipe.
        threading.Thread(target=_send, args=(mine, packed), daemon=True).start()
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

    def stop(self) -> None:
        """Ask it to end; what it does not finish, its last checkpoint leaves for later."""
        if self.runs:
            self._process.terminate()

    def close(self) -> int:
        """End it, and pass on the last that it tells. Returns its exit code."""
        self.stop()
        end = time.monotonic() + PATIENCE
        try:
            while self.runs and time.monotonic() < end:
                self.listen(0.05)
        finally:  # also when who is told cannot go on
            self._process.join(0 if self.runs else PATIENCE)
            self._process.kill()
            self._process.join()
            self.runs = False
            self._news.close()
        return self._process.exitcode


def _send(pipe: multiprocessing.connection.Connection, packed: bytes) -> None:
    with suppress(OSError), pipe:  # it died first: its exit code will say so
        pipe.send_bytes(packed)


class _Named:
    """Says with every event whose it is."""

    def __init__(self, events: Events, name: str) -> None:
        self._events, self._name = events, name

    def event(self, kind: str, **data: Any) -> None:
        self._events.event(kind, training=self._name, **data)


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


def _train(
    job: multiprocessing.connection.Connection, threads: int, news: multiprocessing.connection.Connection
) -> None:
    """Train in a process of its own, to a checkpoint of the last step.

    An error ends it: whoever started it goes on in its own process, and meets the same or does not.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    threading.Thread(target=leave_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    teller = _Teller(news)
    try:
        training: Training = pickle.loads(job.recv_bytes())
        report = training.trainer(teller, teller.step).run(keep_last=True)
        share = report.data_seconds / max(report.seconds, 1e-9)
        teller.event("trained_beside", seconds=report.seconds, data_share=share)
    except ForgeError as error:
        teller.event("train_beside_failed", error=str(error))
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(1)


def leave_with_parent() -> None:
    """End this process when the one that started it is gone, also by ``kill -9``: no queue or pipe would say so."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)
