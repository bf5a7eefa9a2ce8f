"""Models that a run starts from: found before the session exists, taken into it when it runs.

A model of this storage's registry is used as it is. Any other folder, ours or Hugging Face's, is copied into the
session as an artifact of the phase ``external``, so that it has an id, a hash and a place in the lineage, and a
resumed session finds it even when the folder has moved.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from agent_forge.pipeline.handoff import EXTERNAL, RELEASE
from agent_forge.pipeline.handoff_subject import phase_of
from forgekit.errors import ConfigError
from forgekit.models.io import read_config, read_model
from forgekit.registry import unknown
from forgekit.store.artifact import MANIFEST, Artifact
from forgekit.store.names import PHASES
from forgekit.store.packed import refuse_packed
from forgekit.store.storage import ModelStorage


@dataclass(frozen=True)
class Input:
    """One model that a run starts from.

    Attributes:
        path: its folder, absolute.
        phase: the phase that made it, ``external`` for a model of elsewhere.
        model_id: in the registry; empty until a folder has been taken in.
    """

    path: str
    phase: str
    model_id: str = ""

    @property
    def ref(self) -> str:
        """What :meth:`ModelStorage.resolve` understands."""
        return self.model_id or self.path

    def record(self) -> dict[str, str]:
        """For the session's plan."""
        return asdict(self)


def find_input(storage: ModelStorage, ref: str, verb: str = "trained") -> Input:
    """The model that ``ref`` means: an id, its beginning, a name, or a folder, ours or Hugging Face's.

    ``verb`` is what packed weights cannot be.

    Raises:
        ArtifactError: no such model, the folder holds none, or its weights are packed: phases train.
    """
    path = storage.resolve(Path(ref).expanduser() if ref.startswith("~") else ref).absolute()
    refuse_packed(path, verb)
    if not (path / MANIFEST).is_file():
        read_config(path)
        return Input(str(path), EXTERNAL)
    manifest = Artifact.open(path, verify=False).manifest
    row = storage.registry.get_model(manifest.model_id)
    ours = row is not None and Path(row["model_path"]).resolve() == path.resolve()
    return Input(str(path), phase_of(manifest), manifest.model_id if ours else "")


def source_of(inputs: Sequence[Input]) -> str:
    """The phase that made all of them, models of elsewhere aside.

    Raises:
        ConfigError: phases differ.
    """
    made = {one.phase: one for one in inputs if one.phase != EXTERNAL}
    if len(made) > 1:
        told = ", ".join(f"{Path(one.path).name} ({phase})" for phase, one in made.items())
        raise ConfigError(f"made by different phases: {told}", where="--from", remedy="give models of one phase")
    return next(iter(made), EXTERNAL)


def next_phase(source: str) -> str:
    """The phase after the one that made the models.

    Raises:
        ConfigError: models of elsewhere come from no phase; after the last there is none.
    """
    if source == EXTERNAL:
        what = "models of elsewhere do not say where the run is to start"
        raise ConfigError(what, where="--from", remedy="name the phase: --phase evomerge")
    if source not in PHASES:
        raise unknown("phase", source, list(PHASES))
    if (after := following(source)) == RELEASE:
        raise ConfigError(f"{source} is the last phase", where="--from", remedy="name an earlier one: --phase X")
    return after


def following(phase: str) -> str:
    """The phase after a phase in the pipeline's order; ``release`` after the last."""
    return (*PHASES, RELEASE)[PHASES.index(phase) + 1]


def take_in(storage: ModelStorage, session_id: str, one: Input) -> Input:
    """The same model in the registry; a copy in the session where it is not there yet.

    Raises:
        ArtifactError: it is gone, incomplete, or nothing the house can load.
        ResourceError: disk full, or no permission.
    """
    if one.model_id:
        if storage.registry.get_model(one.model_id) is None:
            raise storage.registry.no_model(one.model_id)
        return one
    path = Path(one.path)
    rows = storage.registry.search_models(phase=EXTERNAL, session_id=session_id)
    copied = next((row["model_id"] for row in rows if row["metadata"].get("origin") == one.path), "")
    return Input(one.path, one.phase, copied or _copied(storage, session_id, path))


def _copied(storage: ModelStorage, session_id: str, path: Path) -> str:
    artifact = Artifact.open(path) if (path / MANIFEST).is_file() else None
    model, tokenizer = read_model(path)
    metadata: dict[str, Any] = {"origin": str(path), "tags": [EXTERNAL]}
    if artifact is not None:
        own = artifact.manifest.flat()
        metadata = {**own, **metadata, "origin_phase": phase_of(artifact.manifest), "origin_id": own["model_id"]}
    return storage.save_model(model, session_id, EXTERNAL, path.name, metadata, tokenizer=tokenizer)
