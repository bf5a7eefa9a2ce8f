"""Training checkpoints that resume to the same bits.

A checkpoint is a folder with ``state.safetensors`` (model, optimizer, averaged weights, random states) and
``state.json`` (counters, options, hash of the tensors; written last). Nothing is pickled. A folder without a
valid ``state.json`` is unfinished and ignored. With several processes the first one writes full tensors, or (sharded)
each its own rows to a file of its own; either way a run may go on with any number of processes.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from forgekit.errors import ArtifactError, ResourceError
from forgekit.models.base import local, placed_like, whole
from forgekit.store import fsio
from forgekit.train.distributed import agreed, from_all, world
from forgekit.train.sharded import Parts, write_part

SCHEMA = 1


@dataclass
class TrainState:
    """Everything that decides how training goes on.

    Attributes:
        model, optimizer: restored in place.
        average: averaged weights by parameter name, or None.
        position: JSON-able counters: step, tokens, learning-rate scale, losses so far.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    average: dict[str, Tensor] | None = None
    position: dict[str, Any] = field(default_factory=dict)


class CheckpointManager:
    """The checkpoints of one run.

    Args:
        folder: where they live; made when the first is saved.
        keep: how many of the newest stay.
        sharded: every process writes its own part.
    """

    def __init__(self, folder: Path | str, keep: int = 2, sharded: bool = False) -> None:
        self.folder, self.keep, self.sharded = Path(folder), keep, sharded

    def save_checkpoint(self, state: TrainState, metadata: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint named after its step; older ones beyond ``keep`` go afterwards.

        All processes of a group must call it together.

        Raises:
            ResourceError: disk full (after the old checkpoints were given up for it), or no permission.
        """
        path = self.folder / f"step-{state.position['step']:08d}"
        tensors = _tensors(state)
        need = sum(t.numel() * t.element_size() for t in tensors.values())
        if self.sharded:
            self._write_sharded(path, need, state, metadata or {})
            return path
        full = _whole(tensors)

        def write() -> None:
            work = self._prepare(path, need)
            with self._or_nothing(work, need):
                save_file(full, str(work / "state.safetensors"))
                fsio.sync_file(work / "state.safetensors")
                digest = fsio.sha256_file(work / "state.safetensors")
                self._finish(path, work, _record(state, metadata or {}, sha256=digest))

        agreed(write)
        return path

    def _write_sharded(self, path: Path, need: int, state: TrainState, metadata: dict) -> None:
        """Every process writes its file into one unfinished folder; the first one finishes it."""
        work = agreed(lambda: self._prepare(path, need))
        try:
            part, failure = write_part(work, _tensors(state)), None
        except ResourceError as error:
            part, failure = None, error
        parts, failures = from_all(part), [f for f in from_all(failure) if f is not None]

        def finish() -> None:
            with self._or_nothing(work, need):
                if failures:
                    raise failures[0]
                self._finish(path, work, _record(state, metadata, parts=parts))

        agreed(finish)

    def _prepare(self, path: Path, need: int) -> Path:
        """Room, and an unfinished folder to write to."""
        fsio.make_folder(self.folder)
        fsio.sweep_unfinished(self.folder)
        # Newer ones belong to a course that was given up (unreadable, or before a start from scratch): they must
        # neither be resumed from nor push out the good ones.
        _remove([p for p in self.checkpoints() if p.name > path.name])
        if fsio.free_bytes(self.folder) < 1.1 * need:
            self._drop(keep=1)
        work = fsio.temporary_for(path)
        with fsio.disk_errors(self.folder, need):
            work.mkdir()
        return work

    @contextmanager
    def _or_nothing(self, work: Path, need: int) -> Iterator[None]:
        """Leave nothing behind when writing fails."""
        with fsio.disk_errors(self.folder, need):
            try:
                yield
            except BaseException:
                if work.exists():
                    fsio.remove_tree(work)
                raise

    def _finish(self, path: Path, work: Path, record: dict[str, Any]) -> None:
        """The record last, then the folder's name; older checkpoints beyond ``keep`` go."""
        fsio.write_synced(work / "state.json", json.dumps(record).encode())
        old = fsio.set_aside(path)
        work.rename(path)
        fsio.fsync_dir(self.folder)
        if old is not None:
            fsio.remove_tree(old)
        self._drop(self.keep)

    def checkpoints(self) -> list[Path]:
        """Finished checkpoints, oldest first."""
        return sorted(p.parent for p in self.folder.glob("step-*/state.json"))

    def load_checkpoint(self, path: Path, state: TrainState) -> dict[str, Any]:
        """Restore ``state`` in place; returns the checkpoint's metadata.

        Raises:
            ArtifactError: missing, truncated or altered files, a newer schema, or another model's tensors.
        """
        record, tensors = _read(Path(path))
        _unpack(state, tensors, path)
        state.position = record["position"]
        numbers = tensors["random.numpy"].numpy()
        numpy = ("MT19937", numbers[:-3].astype(np.uint32), int(numbers[-3]), int(numbers[-2]), float(numbers[-1]))
        states = {"python": _tuples(record["python_random"]), "numpy": numpy}
        set_random_states({**states, "torch": tensors["random.torch"], "cuda": tensors.get("random.cuda")})
        return record["metadata"]

    def load_latest(self, state: TrainState, proven: bool = False) -> tuple[Path | None, list[str]]:
        """Restore the newest checkpoint that every process of the group can read.

        Args:
            proven: pass over those that an interruption left.

        Returns:
            its path (None when there is none), and one line per newer checkpoint that could not be read.

        Raises:
            ArtifactError: there are checkpoints, but none can be read.
        """
        problems: list[str] = []
        for path in reversed(agreed(lambda: [p for p in self.checkpoints() if not proven or _proven(p)])):
            problem = ""
            try:
                self.load_checkpoint(path, state)
            except ArtifactError as error:
                problem = str(error)
            told = [line for line in from_all(problem) if line]
            if not told:
                return path, problems
            problems.append(problem or told[0])
        if problems:
            raise ArtifactError(
                f"no readable checkpoint ({problems[0]})", where=str(self.folder), remedy="delete it to train anew"
            )
        return None, problems

    def clear(self) -> None:
        """Delete all checkpoints."""
        self._drop(keep=0)

    def _drop(self, keep: int) -> None:
        """Keep the newest ``keep`` and, of those that an interruption left, only the newest of all."""
        paths = self.checkpoints()
        kept = {*[p for p in paths if _proven(p)][-keep:], paths[-1]} if keep and paths else set()
        _remove([p for p in paths if p not in kept])


def random_states() -> dict[str, Any]:
    """Where the process's random generators stand: Python's, NumPy's, torch's."""
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    return {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state(), "cuda": cuda}


def set_random_states(states: dict[str, Any]) -> None:
    """Put the random generators back where they stood."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def _proven(path: Path) -> bool:
    """Whether the loss of the step after it was seen and good; one that cannot be read counts, to be told later."""
    try:
        return json.loads((path / "state.json").read_text(encoding="utf-8"))["metadata"].get("reason") != "interrupted"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return True


def _remove(paths: list[Path]) -> None:
    for path in paths:
        aside = fsio.set_aside(path)
        if aside is not None:
            fsio.remove_tree(aside)


def _record(state: TrainState, metadata: dict[str, Any], **files: Any) -> dict[str, Any]:
    """What ``state.json`` says; ``files`` is the hash of the one file, or the parts."""
    python = _jsonable(random.getstate())
    return {"schema": SCHEMA, **files, "position": state.position, "python_random": python, "metadata": metadata}


def _tensors(state: TrainState) -> dict[str, Tensor]:
    """All tensors by flat name, sharded ones as they are."""
    tensors = {f"model.{name}": t for name, t in state.model.state_dict().items()}
    for name, p in state.model.named_parameters():
        for key, value in state.optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    tensors |= {f"average.{name}": t for name, t in (state.average or {}).items()}
    states = random_states()
    _, keys, at, has_gauss, gauss = states["numpy"]
    tensors["random.torch"] = states["torch"]
    tensors["random.numpy"] = torch.from_numpy(np.concatenate([keys.astype(np.float64), [at, has_gauss, gauss]]))
    if states["cuda"] is not None:
        tensors["random.cuda"] = states["cuda"]
    return tensors


def _whole(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Full tensors on the CPU; empty on all processes but the first. Clones break the sharing safetensors refuses."""
    packed = {}
    for name, tensor in tensors.items():
        full = whole(tensor.detach())  # where sharded, all processes must take part
        if world()[0] == 0:
            packed[name] = full.cpu().clone().contiguous()
    return packed


def _read(path: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    remedy = "resume from an older checkpoint or train anew"
    try:
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if record["schema"] > SCHEMA:
            raise ArtifactError("written by a newer version", where=str(path), remedy="upgrade agent-forge")
        parts = record.get("parts")
        for part in parts or [{"file": "state.safetensors", "sha256": record.get("sha256")}]:
            if fsio.sha256_file(path / part["file"]) != part["sha256"]:
                raise ArtifactError("the tensors are truncated or altered", where=str(path), remedy=remedy)
        tensors = Parts(path, parts) if parts else load_file(str(path / "state.safetensors"))
        # A record without these is as unreadable as a truncated one.
        record["position"]["step"], record["python_random"], record["metadata"], tensors["random.numpy"]
        return record, tensors
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(f"unreadable checkpoint ({type(error).__name__})", where=str(path), remedy=remedy) from None


def _unpack(state: TrainState, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fill the state; of a sharded checkpoint one tensor at a time is whole."""

    def shape_of(name: str) -> tuple[int, ...]:
        return tensors.shape(name) if isinstance(tensors, Parts) else tuple(tensors[name].shape)

    def fill(target: Tensor, full: Tensor) -> None:
        local(target).copy_(local(placed_like(full.to(target.device), target)))

    own = state.model.state_dict()
    shapes = {name: tuple(t.shape) for name, t in own.items()}
    stored = {name.removeprefix("model."): shape_of(name) for name in tensors if name.startswith("model.")}
    if shapes != stored:
        # Told before anything is touched: a half-filled model would be worse than none.
        name = next(n for n in sorted({*shapes, *stored}) if shapes.get(n) != stored.get(n))
        reason = f"{name} is {stored.get(name, 'missing')} in it and {shapes.get(name, 'unknown')} here"
        raise ArtifactError(f"belongs to another model ({reason})", where=str(path), remedy="train anew")
    parameters = dict(state.model.named_parameters())
    with torch.no_grad():
        for name, target in own.items():
            fill(target, tensors[f"model.{name}"])
        state.optimizer.state.clear()
        for flat in (name for name in tensors if name.startswith("optimizer.")):
            _, key, name = flat.split(".", 2)
            p, tensor = parameters[name], tensors[flat]
            # A copy: what was read is mapped from the file, whose space could else not be given back.
            own_copy = tensor.clone() if key == "step" else tensor.to(p.device, copy=True)
            state.optimizer.state[p][key] = placed_like(own_copy, p) if tensor.shape == p.shape else own_copy
        for name, average in (state.average or {}).items():
            # Averaging switched on after this checkpoint starts from its weights.
            kept = f"average.{name}" if f"average.{name}" in tensors else f"model.{name}"
            fill(average, tensors[kept])


def _jsonable(value: Any) -> Any:
    return [_jsonable(v) for v in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
