"""The trainings of phase 3: each is found again when it is finished, and goes on from its checkpoint when it is not."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from agent_forge.pipeline.phase import PhaseContext, Progress
from forgekit.store import fsio
from forgekit.train.beside import SideBySide, Training
from forgekit.train.checkpoints import CheckpointManager
from forgekit.train.config import TrainConfig
from forgekit.train.distributed import agreed
from forgekit.train.loop import BatchSource, StepInfo
from forgekit.train.setup import training_device

Watch = Callable[[int], dict[str, Any]]
"""Looks at the model after a step; what it returns is kept in the history."""


@dataclass(frozen=True)
class Piece:
    """One model to train: its name for people, the model (trained in place), its data, how."""

    name: str
    model: torch.nn.Module
    data: BatchSource
    train: TrainConfig


class Workshop:
    """Trains the phase's models.

    Args:
        context: folder, events, progress.
        key: fingerprint of everything that decides the results: settings, parent, data.
    """

    def __init__(self, context: PhaseContext, key: str) -> None:
        self.context, self.key = context, key[:12]
        self.folder = context.folder / "pieces"

    def train(self, piece: Piece, watch: tuple[frozenset[int], Watch] | None = None) -> dict[str, Any]:
        """Train in place, or take over what an earlier start finished.

        Args:
            watch: steps after which to look at the model, and how.

        Returns:
            ``losses``, ``tokens``, and ``history``: by step what was observed.
        """
        return self._finished(piece, self._ready(piece, watch), watch, None)

    def train_all(self, pieces: Sequence[Piece], side_by_side: bool) -> dict[str, dict[str, Any]]:
        """Train models that do not depend on each other; the records by name, as :meth:`train` gives them.

        Args:
            side_by_side: at the same time, the first one here.
        """
        with SideBySide([piece.train.device for piece in pieces], side_by_side) as crew:
            ready = [crew.ready(self._ready(piece)) for piece in pieces]
            for piece, training in list(zip(pieces, ready))[1:]:
                if agreed(partial(_restored, self._path(piece.name))) is None:
                    observer = self._observer(piece, self._history(piece.name))
                    crew.start(piece.name, training, self.context.logger, observer)
            return {p.name: self._finished(p, training, None, crew) for p, training in zip(pieces, ready)}

    def _ready(self, piece: Piece, watch: tuple[frozenset[int], Watch] | None = None) -> Training:
        """A training whose checkpoints, if it has any, are good to go on from."""
        torch.manual_seed(piece.train.seed)
        self._forget_unseen(piece, watch)
        return Training(piece.model, piece.data, piece.train, self._checkpoints(piece.name))

    def _forget_unseen(self, piece: Piece, watch) -> None:
        due = {step for step in range(1, piece.train.steps + 1) if _due(step, piece.train, watch)}
        agreed(lambda: _forget_unseen(self._checkpoints(piece.name), due, self._history(piece.name)))

    def _finished(self, piece: Piece, training: Training, watch, crew: SideBySide | None) -> dict[str, Any]:
        """The record of a piece, trained now or before; its model is ready to be used."""
        name, model, path = piece.name, piece.model, self._path(piece.name)
        record = agreed(lambda: _restored(path))
        if record is None:
            record = self._trained(piece, training, watch, crew)
            # Clones: an embedding that is the head's too is there twice, and safetensors refuses shared memory.
            whole = {n: t.detach().cpu().clone().contiguous() for n, t in model.state_dict().items()}
            agreed(lambda: fsio.write_atomic(path, save(whole, {"record": json.dumps(record)})))
            agreed(lambda: training.folder.is_dir() and fsio.remove_tree(training.folder))
        else:
            with safe_open(str(path), "pt") as file:
                model.load_state_dict({n: file.get_tensor(n) for n in file.keys()})
            model.to(training_device(piece.train.device))
            self.context.show(Progress(name, piece.train.steps, piece.train.steps, "already made"))
        model.eval()
        return record

    def _trained(self, piece: Piece, training: Training, watch, crew: SideBySide | None) -> dict[str, Any]:
        if crew is not None and (code := crew.wait(piece.name)):
            self.context.logger.event("train_beside_ended", name=piece.name, exit_code=code)
            self._forget_unseen(piece, watch)  # its last steps may not have been told
        history = self._history(piece.name)
        report = training.trainer(self.context.logger, self._observer(piece, history, watch, crew)).run()
        threads = torch.get_num_threads()
        self.context.logger.event("trained", name=piece.name, tokens=report.tokens, losses=report.losses)
        return {"losses": report.losses, "tokens": report.tokens, "history": history.rows, "threads": threads}

    def _path(self, name: str) -> Path:
        return self.folder / f"{name.replace(' ', '-')}-{self.key}.safetensors"

    def _history(self, name: str) -> History:
        return History(self._checkpoints(name) / "history.json")

    def _checkpoints(self, name: str) -> Path:
        return self.context.folder / "checkpoints" / f"{name.replace(' ', '-')}-{self.key}"

    def _observer(self, piece: Piece, history: History, watch=None, crew: SideBySide | None = None):
        steps, look = watch or (frozenset(), dict)
        name, train = piece.name, piece.train

        def observe(info: StepInfo) -> None:
            note = f"loss {info.loss_avg_100:.3f}  {info.tokens_per_second:,.0f} tokens/s"
            if "reward_mean" in info.parts:
                note += f"  reward {info.parts['reward_mean']:.4f}"
            self.context.show(Progress(name, info.step, info.steps, f"{note}  {info.seconds_left:.0f} s left"))
            if crew is not None:
                crew.listen()
            if not _due(info.step, train, watch):
                return
            seen = agreed(lambda: look(info.step)) if info.step in steps else {}
            values = {"loss": info.loss, "grad_norm": info.grad_norm, "learning_rate": info.learning_rate, **info.parts}
            history.add(info.step, {**values, **seen})
            self.context.logger.event("quietstar_step", name=name, step=info.step, **values)

        return observe

    def clear(self) -> None:
        """Delete the finished pieces: their results are in the artifact and the evidence."""
        for folder in (self.folder, self.context.folder / "checkpoints"):
            if folder.is_dir():
                fsio.remove_tree(folder)


class History:
    """What was observed, by step; on the disk, so that a resumed training has all of it.

    Args:
        path: a JSON file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.rows: dict[str, dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):  # not begun, or damaged: then what is due is trained again
            self.rows = {}

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Keep the values of a step; an earlier run's later steps are forgotten, they come again."""
        self.rows = {key: row for key, row in self.rows.items() if int(key) < step} | {str(step): values}
        fsio.write_atomic(self.path, json.dumps(self.rows).encode())


def _due(step: int, train: TrainConfig, watch: tuple[frozenset[int], Watch] | None) -> bool:
    """Whether a step has a row in the history."""
    return step % train.log_every == 0 or step == train.steps or (watch is not None and step in watch[0])


def _forget_unseen(folder: Path, due: set[int], history: History) -> None:
    """Delete checkpoints with a step up to theirs that was not observed: going on after them would leave a gap.

    Stopped while a step is observed, the training loop leaves a checkpoint behind that step.
    """
    for path in CheckpointManager(folder).checkpoints():
        step = int(path.name.removeprefix("step-"))
        if any(one <= step and str(one) not in history.rows for one in due):
            fsio.remove_tree(path)


def _restored(path: Path) -> dict[str, Any] | None:
    """The record of a finished piece; a damaged one counts as not there and is made again."""
    if not path.is_file():
        return None
    try:
        with safe_open(str(path), "pt") as file:
            return json.loads(file.metadata()["record"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        path.unlink()
        return None
