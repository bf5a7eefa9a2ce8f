"""Who scores the candidates: this process, worker processes, or Ray; one interface, the same numbers.

Every candidate is scored on one thread, wherever it is scored: then the same weights get the same bits of fitness for
any number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load
from torch import Tensor

from agent_forge.phases.evomerge.config import FitnessPlan
from agent_forge.phases.evomerge.fitness import Exam, Marks, Reference, parts, sit
from forgekit.errors import ArtifactError, ConfigError, ResourceError
from forgekit.models.io import build_model, read_model
from forgekit.train.beside import leave_with_parent


@dataclass(frozen=True)
class Candidate:
    """A child to score: its ``weights`` as safetensors bytes, whose ``traits`` it takes, and in which ``exam``."""

    weights: bytes
    traits: str
    exam: str = "select"


@dataclass(frozen=True)
class Task:
    """Everything a process needs to score candidates.

    Attributes:
        folder: a model whose architecture the candidates have.
        traits: changes to its configuration, by the name of the original they come from.
        exams: what is asked, by split.
        plan: how the parts are weighed.
        reference: what costs are measured against.
    """

    folder: Path
    traits: Mapping[str, Mapping[str, Any]]
    exams: Mapping[str, Exam]
    plan: FitnessPlan
    reference: Reference


class Judge:
    """Scores candidates in the process it lives in."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._template = read_model(task.folder)[0]
        self._models: dict[str, torch.nn.Module] = {}

    def model(self, traits: str) -> torch.nn.Module:
        """A model with an original's traits, whose weights are to be replaced."""
        if traits not in self._models:
            self._models[traits] = with_traits(self._template, self.task.traits.get(traits, {}))
        return self._models[traits]

    def score(self, candidate: Candidate) -> Marks:
        """What a candidate reaches, on one thread."""
        model = self.model(candidate.traits)
        put_weights(model, load(candidate.weights))
        with one_thread():
            return sit(model.eval(), self.task.exams[candidate.exam])


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """A model's tensors by the names they have on disk, each once: tied ones share their memory."""
    found, seen = {}, set()
    for name, tensor in getattr(model, "hf", model).state_dict().items():
        place = (tensor.data_ptr(), tensor.shape) if tensor.numel() else name
        if place not in seen:
            seen.add(place)
            found[name] = tensor
    return found


def put_weights(model: torch.nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model the tensors of :func:`weights_of` another of its shape; what is tied stays tied."""
    known = weights_of(model)
    if set(weights) != set(known):
        odd = sorted(set(weights) ^ set(known))[0]
        raise ArtifactError(f"tensor {odd} does not fit", where="weights", remedy="merge models of one architecture")
    with torch.no_grad():
        for name, tensor in known.items():
            tensor.copy_(weights[name])


def with_traits(template: torch.nn.Module, traits: Mapping[str, Any]) -> torch.nn.Module:
    """A model of the template's shape and weights with other settings; the template itself where there are none."""
    if not traits:
        return template
    model = build_model(template.config.replace(**traits))
    model.load_state_dict(template.state_dict())
    return model.eval()


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute on one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Evaluator(ABC):
    """Scores candidates. Use it as a context manager: workers live no longer than the block."""

    def __init__(self, task: Task) -> None:
        self.task = task

    @abstractmethod
    def score(self, candidates: Sequence[Candidate]) -> list[Marks]:
        """What each candidate reaches, in the order given.

        Raises:
            ResourceError: the workers died, twice.
        """

    def worth(self, candidates: Sequence[Candidate]) -> list[dict[str, float]]:
        """The parts of each candidate's fitness, and the ``seconds`` they took; raises as :meth:`score`."""
        task = self.task
        return [{**parts(m, task.plan, task.reference), "seconds": m.seconds} for m in self.score(candidates)]

    def close(self) -> None:  # noqa: B027  what has no workers has nothing to let go
        """Let the workers go."""

    def __enter__(self) -> Evaluator:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class Inline(Evaluator):
    """Scores in this process, one after another."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self._judge = Judge(task)

    def score(self, candidates: Sequence[Candidate]) -> list[Marks]:
        return [self._judge.score(candidate) for candidate in candidates]


class Workers(Evaluator):
    """Scores in processes of their own. One that dies is replaced, once, and what it had not finished is done again."""

    def __init__(self, task: Task, workers: int) -> None:
        super().__init__(task)
        self._count = workers
        self._pool = self._start()

    def _start(self) -> ProcessPoolExecutor:
        # Not fork: a process that has used torch's threads must not be forked.
        context = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(self._count, context, initializer=_become_judge, initargs=(self.task,))

    def score(self, candidates: Sequence[Candidate]) -> list[Marks]:
        found: dict[int, Marks] = {}
        for attempt in (1, 2):
            waiting = [i for i in range(len(candidates)) if i not in found]
            try:
                futures: dict[int, Future] = {i: self._pool.submit(_judged, candidates[i]) for i in waiting}
                for i, future in futures.items():
                    found[i] = future.result()
                break
            except BrokenProcessPool:
                self._pool.shutdown(cancel_futures=True)
                if attempt == 2:
                    what = f"a worker died twice, {len(found)} of {len(candidates)} candidates were scored"
                    remedy = "free memory, then go on from this generation with --resume"
                    raise ResourceError(what, where="phase evomerge", remedy=remedy) from None
                self._pool = self._start()
        return [found[i] for i in range(len(candidates))]

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


_JUDGES: list[Judge] = []
"""The judge of a worker process: made once, when the process starts."""


def _become_judge(task: Task) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that asks; this one leaves with it
    threading.Thread(target=leave_with_parent, daemon=True).start()
    _JUDGES[:] = [Judge(task)]


def _judged(candidate: Candidate) -> Marks:
    return _JUDGES[0].score(candidate)


class RayWorkers(Evaluator):
    """Scores in Ray actors, on this machine or on the cluster that ``ray.init()`` finds."""

    def __init__(self, task: Task, workers: int) -> None:
        try:
            import ray
        except ImportError:
            remedy = 'pip install ray, or set phases.evomerge.engine = "processes"'
            raise ConfigError("ray is not installed", where="phases.evomerge.engine", remedy=remedy) from None
        super().__init__(task)
        self._ray, self._mine = ray, not ray.is_initialized()
        if self._mine:
            own = {} if os.environ.get("RAY_ADDRESS") else {"num_cpus": workers, "include_dashboard": False}
            ray.init(log_to_driver=False, configure_logging=False, **own)
        shared, actor = ray.put(task), ray.remote(num_cpus=1, max_restarts=1, max_task_retries=1)(Judge)
        self._actors = [actor.remote(shared) for _ in range(workers)]

    def score(self, candidates: Sequence[Candidate]) -> list[Marks]:
        from ray.util import ActorPool

        pool = ActorPool(self._actors)
        try:
            return list(pool.map(lambda actor, candidate: actor.score.remote(candidate), candidates))
        except self._ray.exceptions.RayActorError as error:
            remedy = "free memory, or use fewer workers; --resume goes on from this generation"
            what = f"a worker died twice ({type(error).__name__})"
            raise ResourceError(what, where="phase evomerge", remedy=remedy) from None

    def close(self) -> None:
        if self._mine:
            self._ray.shutdown()


def evaluator(task: Task, workers: int, engine: str) -> Evaluator:
    """The evaluator that the settings ask for."""
    if workers == 0:
        return Inline(task)
    return RayWorkers(task, workers) if engine == "ray" else Workers(task, workers)
