"""Training checkpoints that resume to the same bits.

A checkpoint is a folder with ``state.safetensors`` (model, optimizer, averaged weights, random states) and
``state.json`` (counters, options, hash of the tensors; written last). Nothing is pickled. A folder without a
valid ``state.json`` is unfinished and ignored.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from forgekit.errors import ArtifactError
from forgekit.store import fsio

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
    """

    def __init__(self, folder: Path | str, keep: int = 2) -> None:
        self.folder, self.keep = Path(folder), keep

    def save_checkpoint(self, state: TrainState, metadata: dict[str, Any] | None = None) -> Path:
        """Write a checkpoint named after its step; older ones beyond ``keep`` go afterwards.

        Raises:
            ResourceError: disk full (after the old checkpoints were given up for it), or no permission.
        """
        tensors = _pack(state)
        need = sum(t.numel() * t.element_size() for t in tensors.values())
        path = self.folder / f"step-{state.position['step']:08d}"
        fsio.make_folder(self.folder)
        fsio.sweep_unfinished(self.folder)
        if fsio.free_bytes(self.folder) < 1.1 * need:
            self._drop(keep=1)
        work = fsio.temporary_for(path)
        with fsio.disk_errors(self.folder, need):
            try:
                work.mkdir()
                save_file(tensors, str(work / "state.safetensors"))
                fsio.sync_file(work / "state.safetensors")
                record = {
                    "schema": SCHEMA,
                    "sha256": fsio.sha256_file(work / "state.safetensors"),
                    "position": state.position,
                    "python_random": _jsonable(random.getstate()),
                    "metadata": metadata or {},
                }
                fsio.write_synced(work / "state.json", json.dumps(record).encode())
                old = fsio.set_aside(path)
                work.rename(path)
            except BaseException:
                if work.exists():
                    fsio.remove_tree(work)
                raise
        fsio.fsync_dir(self.folder)
        if old is not None:
            fsio.remove_tree(old)
        self._drop(self.keep)
        return path

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
        random.setstate(_tuples(record["python_random"]))
        return record["metadata"]

    def load_latest(self, state: TrainState) -> tuple[Path | None, list[str]]:
        """Restore the newest readable checkpoint.

        Returns:
            its path (None when there is none), and one line per newer checkpoint that could not be read.

        Raises:
            ArtifactError: there are checkpoints, but none can be read.
        """
        problems: list[str] = []
        for path in reversed(self.checkpoints()):
            try:
                self.load_checkpoint(path, state)
                return path, problems
            except ArtifactError as error:
                problems.append(str(error))
        if problems:
            raise ArtifactError(
                f"no readable checkpoint ({problems[0]})", where=str(self.folder), remedy="delete it to train anew"
            )
        return None, problems

    def clear(self) -> None:
        """Delete all checkpoints."""
        self._drop(keep=0)

    def _drop(self, keep: int) -> None:
        paths = self.checkpoints()
        for path in paths[: len(paths) - keep]:
            aside = fsio.set_aside(path)
            if aside is not None:
                fsio.remove_tree(aside)


def _pack(state: TrainState) -> dict[str, Tensor]:
    """All tensors by flat name. Clones break the sharing that safetensors refuses."""
    tensors = {f"model.{name}": t for name, t in state.model.state_dict().items()}
    for name, p in state.model.named_parameters():
        for key, value in state.optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    tensors |= {f"average.{name}": t for name, t in (state.average or {}).items()}
    tensors["random.torch"] = torch.get_rng_state()
    kind, keys, at, has_gauss, gauss = np.random.get_state()
    tensors["random.numpy"] = torch.from_numpy(np.concatenate([keys.astype(np.float64), [at, has_gauss, gauss]]))
    if torch.cuda.is_available():
        tensors["random.cuda"] = torch.cuda.get_rng_state()
    return {name: t.detach().cpu().clone().contiguous() for name, t in tensors.items()}


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    remedy = "resume from an older checkpoint or train anew"
    try:
        record = json.loads((path / "state.json").read_text(encoding="utf-8"))
        if record["schema"] > SCHEMA:
            raise ArtifactError("written by a newer version", where=str(path), remedy="upgrade agent-forge")
        if fsio.sha256_file(path / "state.safetensors") != record["sha256"]:
            raise ArtifactError("the tensors are truncated or altered", where=str(path), remedy=remedy)
        return record, load_file(str(path / "state.safetensors"))
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ArtifactError(f"unreadable checkpoint ({type(error).__name__})", where=str(path), remedy=remedy) from None


def _unpack(state: TrainState, tensors: dict[str, Tensor], path: Path) -> None:
    def part(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}

    try:
        state.model.load_state_dict(part("model."))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ArtifactError(f"belongs to another model: {reason}", where=str(path), remedy="train anew") from None
    parameters = dict(state.model.named_parameters())
    state.optimizer.state.clear()
    for flat, tensor in part("optimizer.").items():
        key, name = flat.split(".", 1)
        p = parameters[name]
        state.optimizer.state[p][key] = tensor if key == "count" else tensor.to(p.device)
    if state.average is not None:
        for name, tensor in part("average.").items():
            state.average[name].copy_(tensor)
    torch.set_rng_state(tensors["random.torch"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
    numbers = tensors["random.numpy"].numpy()
    np.random.set_state(
        ("MT19937", numbers[:-3].astype(np.uint32), int(numbers[-3]), int(numbers[-2]), float(numbers[-1]))
    )


def _jsonable(value: Any) -> Any:
    return [_jsonable(v) for v in value] if isinstance(value, tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
