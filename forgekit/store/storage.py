"""Where models live on disk, and how they get in and out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from forgekit.errors import ArtifactError
from forgekit.store.artifact import MANIFEST, Artifact, ArtifactExtras, Manifest, manifest_bytes, write_artifact
from forgekit.store.database import ModelRegistry
from forgekit.store.fsio import disk_errors, write_atomic
from forgekit.store.names import check_session_id, folder_name, phase_folder

if TYPE_CHECKING:
    from torch import nn

# Metadata that came with a loaded parent must not lend its identity to the child.
_MADE_HERE = {"schema_version", "model_id", "created_at", "code_version", "files", "size_mb"}


class ModelStorage:
    """Artifact folders below ``base_path`` and the registry that finds them.

    Layout: ``sessions/{session_id}/phase1_cognate/{model_name}/`` and ``registry/model_registry.db``. A registry that
    was lost or moved away is filled again from the folders.

    Raises:
        ArtifactError: the registry is damaged, or made by a newer version.
        ResourceError: the folder cannot be used.
    """

    def __init__(self, base_path: Path | str = "./storage") -> None:
        self.base_path = Path(base_path).absolute()
        self.registry = ModelRegistry(self.base_path / "registry" / "model_registry.db")
        if self.registry.was_empty:
            self.reindex()

    def session_path(self, session_id: str) -> Path:
        """The folder of a session."""
        return self.base_path / "sessions" / check_session_id(session_id)

    def model_path(self, session_id: str, phase_name: str, model_name: str) -> Path:
        """A free folder for a model: the model's name, then ``_2``, ``_3`` … when taken."""
        first = self.session_path(session_id) / phase_folder(phase_name) / folder_name(model_name)
        path, number = first, 1
        while path.exists():
            number += 1
            path = first.with_name(f"{first.name}_{number}")
        return path

    def save_model(
        self,
        model: nn.Module,
        session_id: str,
        phase_name: str,
        model_name: str,
        metadata: dict[str, Any],
        *,
        tokenizer: Any = None,
        extras: ArtifactExtras | None = None,
    ) -> str:
        """Write a model as an artifact and register it.

        Args:
            model: any model that ``forgekit.models.io`` can write.
            session_id: an existing session.
            phase_name: the phase that made it.
            model_name: a name for people; taken names get a number.
            metadata: fields of :class:`Manifest` (``parents``, ``config_hash``, ``seeds``, …) and anything else.
            tokenizer: written beside the model.
            extras: metrics, evidence and model card; metrics default to ``metadata["metrics"]``.

        Returns:
            The model's id.

        Raises:
            ArtifactError: no such session.
            ConfigError: the metadata is refused.
            ResourceError: disk full, or no permission.
        """
        from forgekit.models.io import write_model
        from forgekit.quant.model import logical_parameters

        self.registry.update_session(session_id)  # before the work: the session must exist
        given = {key: value for key, value in metadata.items() if key not in _MADE_HERE}
        counted = {"parameters": logical_parameters(model), "environment": _environment()}
        manifest = Manifest.describe(session_id, phase_name, model_name, {**counted, **given, "size_mb": 0.0})
        folder = self.model_path(session_id, phase_name, model_name)
        extras = extras or ArtifactExtras(metrics=metadata.get("metrics"))
        artifact = write_artifact(folder, lambda work: write_model(model, tokenizer, work), manifest, extras)
        return self._register(artifact)

    def load_model(
        self, model_id: str | None = None, session_id: str | None = None, phase_name: str | None = None
    ) -> tuple[nn.Module, dict[str, Any]]:
        """Load a model by id, or the newest of a session and phase; returns (model, metadata).

        Raises:
            ArtifactError: no such model, or its folder is incomplete or changed.
        """
        from forgekit.models.io import read_model

        row = self.registry.get_model(model_id, session_id, phase_name)
        if row is None:
            raise self.registry.no_model(model_id or f"{session_id or 'any session'}/{phase_name or 'any phase'}")
        artifact = Artifact.open(row["model_path"])
        model, _ = read_model(artifact.path)
        return model, artifact.manifest.flat()

    def resolve(self, ref: Path | str) -> Path:
        """The folder that ``ref`` means: an artifact folder, a model id, the beginning of one, the newest model of a
        name, or ``latest``.

        Raises:
            ArtifactError: nothing, or more than one model, is meant; the nearest ids are given.
        """
        path, name = Path(ref), str(ref)
        with disk_errors(path):
            if (path / MANIFEST).is_file():
                return path
        if name == "latest":
            newest = self.registry.search_models(limit=1)
            if newest:
                return Path(newest[0]["model_path"])
            raise ArtifactError("no models yet", where=str(self.base_path), remedy="make one: `agent-forge run`")
        ids = self.registry.find_ids(name, limit=4) if name else []
        if ids and (len(ids) == 1 or name in ids):
            row = self.registry.get_model(name if name in ids else ids[0])
            if row is not None:
                return Path(row["model_path"])
        if ids:
            what = f"{name!r} means more than one model: {', '.join(ids[:3])}{' …' * (len(ids) > 3)}"
            raise ArtifactError(what, remedy="give more of the id")
        if name and path.is_dir():
            return path
        named = [row for row in self.registry.search_models(name=name) if row["model_name"] == name] if name else []
        if named:
            return Path(named[0]["model_path"])
        raise self.registry.no_model(name)

    def reindex(self) -> list[str]:
        """Register every artifact folder that the registry does not know; returns the ids of all folders found.

        Sessions that are missing are entered as paused. Folders that cannot be read are left alone.
        """
        ids = []
        for path in sorted((self.base_path / "sessions").glob(f"*/*/*/{MANIFEST}")):
            if any(part.startswith(".") for part in path.relative_to(self.base_path).parts):
                continue  # unfinished, or being removed
            try:
                artifact = Artifact.open(path.parent, verify=False)
            except ArtifactError:
                continue
            session_id = artifact.manifest.session_id
            with self.registry.transaction():
                if self.registry.get_session(session_id) is None:
                    self.registry.create_session({}, session_id)
                    self.registry.update_session(session_id, status="paused")
            ids.append(self._register(artifact))
        return ids

    def _register(self, artifact: Artifact) -> str:
        manifest = artifact.manifest
        model_id = self.registry.register_model(manifest, artifact.path)
        if model_id != manifest.model_id:  # another model of the same second holds the id
            write_atomic(artifact.path / MANIFEST, manifest_bytes(manifest.replace(model_id=model_id)))
        return model_id


def _environment() -> dict[str, Any]:
    import torch

    return {
        "torch": str(torch.__version__),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
    }
