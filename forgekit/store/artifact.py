"""The artifact folder: one model with everything needed to use it, check it and trace it.

``config.json``, ``model.safetensors``, ``tokenizer.json``, then ``metrics.json``, ``evidence.json`` and ``README.md``,
and ``manifest.json`` last. The folder appears by one rename, so it is either complete or absent.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from forgekit.config import Config, canonical_json
from forgekit.errors import ArtifactError, ConfigError
from forgekit.store.fsio import (
    disk_errors,
    fsync_dir,
    make_folder,
    remove_tree,
    sha256_file,
    sync_file,
    temporary_for,
    write_atomic,
    write_synced,
)
from forgekit.store.names import MODEL_ID_PATTERN, SESSION_ID_PATTERN, canonical_phase, new_model_id, utc_text
from forgekit.version import __version__

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
EVIDENCE = "evidence.json"
SPECIALIZATIONS = ("reasoning", "memory_integration", "adaptive_computation")
REQUIRED_METADATA = ("model_id", "session_id", "phase_name", "created_at", "parameters", "size_mb")


class Manifest(Config):
    """What an artifact is, where it comes from and what its files hash to."""

    schema_version: int = Field(default=SCHEMA_VERSION, ge=1, le=SCHEMA_VERSION)
    """Version of this layout."""
    model_id: str = Field(pattern=MODEL_ID_PATTERN)
    """``{phase}_{name}_{YYYYMMDD}_{HHMMSS}``, with ``_2``, ``_3`` … when taken."""
    session_id: str = Field(pattern=SESSION_ID_PATTERN)
    """The run that made it."""
    phase_name: str
    """The phase that made it; aliases become the phase's own name."""
    model_name: str = Field(min_length=1, max_length=96)
    """Human-readable name, unique within session and phase."""
    created_at: str = Field(default_factory=utc_text)
    """ISO 8601, UTC."""
    parents: list[str] = []
    """Ids of the models it was made from."""
    config_hash: str = ""
    """Fingerprint of the phase's configuration."""
    data_hash: str = ""
    """Content hash of the data it was trained on."""
    code_version: str = __version__
    """Version of agent-forge that made it."""
    seeds: list[int] = []
    """Every seed used."""
    environment: dict[str, Any] = {}
    """``torch``, ``cpu_capability`` and ``threads``: the same bits are promised for the same three and the
    same profile."""
    parameters: int = Field(ge=1)
    """Number of parameters."""
    size_mb: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Bytes of the weights on disk / 1e6; measured when the artifact is written."""
    files: dict[str, str] = {}
    """File name to SHA-256; filled when the artifact is written."""
    metadata: dict[str, Any] = {}
    """Everything else: ``specialization``, ``tags``, ``metrics``, …"""

    @field_validator("phase_name")
    @classmethod
    def _phase(cls, value: str) -> str:
        try:
            return canonical_phase(value)
        except ConfigError as error:
            raise ValueError(f"{error.what}; {error.remedy}") from None

    @field_validator("created_at")
    @classmethod
    def _instant(cls, value: str) -> str:
        return utc_text(value)

    @field_validator("metadata")
    @classmethod
    def _metadata(cls, value: dict[str, Any]) -> dict[str, Any]:
        special = value.get("specialization")
        if special is not None and special not in SPECIALIZATIONS:
            raise ValueError(f"specialization {special!r} is none of {', '.join(SPECIALIZATIONS)}")
        tags = value.get("tags", [])
        if not isinstance(tags, list) or not all(isinstance(tag, str) and tag and "," not in tag for tag in tags):
            raise ValueError(f"tags {tags!r} is not a list of words without commas")
        if not isinstance(value.get("metrics", {}), dict):
            raise ValueError("metrics is not a mapping of name to value")
        clash = sorted(set(value) & set(cls.model_fields))
        if clash:
            raise ValueError(f"{', '.join(clash)} belong beside metadata, not in it")
        return json.loads(json.dumps(value, default=_plain))

    def flat(self) -> dict[str, Any]:
        """The model's metadata as one mapping: the fields and the entries of ``metadata`` side by side."""
        values = self.model_dump(mode="json")
        return {**values.pop("metadata"), **values}

    @classmethod
    def from_flat(cls, values: dict[str, Any], source: str = "metadata") -> Manifest:
        """The manifest that :meth:`flat` would turn into ``values``.

        Raises:
            ConfigError: a required key is missing or a value is refused.
        """
        for key in REQUIRED_METADATA:
            if values.get(key) is None:
                raise ConfigError("missing", where=f"{source}: {key}", remedy=f"add {key} to the metadata")
        own = {key: value for key, value in values.items() if key in cls.model_fields and key != "metadata"}
        rest = {key: value for key, value in values.items() if key not in cls.model_fields}
        return cls.build({**own, "metadata": {**values.get("metadata", {}), **rest}}, source)

    @classmethod
    def describe(cls, session_id: str, phase_name: str, model_name: str, metadata: dict[str, Any]) -> Manifest:
        """A manifest from a model's place and its metadata; id and time are made up when the metadata has none."""
        place = {"session_id": session_id, "phase_name": phase_name, "model_name": model_name}
        made = {"model_id": new_model_id(phase_name, model_name), "created_at": utc_text()}
        return cls.from_flat({**made, **metadata, **place})


@dataclass(frozen=True)
class ArtifactExtras:
    """Reports that go into the folder beside the model; what is None is not written."""

    metrics: dict[str, Any] | None = None
    evidence: dict[str, Any] | list[Any] | None = None
    readme: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)
    """Further files by name, such as the mixer of Quiet-STaR."""


@dataclass(frozen=True)
class Artifact:
    """A complete artifact folder."""

    path: Path
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path | str, verify: bool = True) -> Artifact:
        """Open ``folder``, by default reading every file to compare it with its hash.

        Raises:
            ArtifactError: no such folder; unfinished; made by a newer version; a file is missing, truncated or changed.
            ResourceError: no permission to read.
        """
        folder = Path(folder)
        with disk_errors(folder):
            if not folder.is_dir():
                raise ArtifactError("no such artifact folder", where=str(folder), remedy="check the path or model id")
            manifest = _read_manifest(folder)
            for name, expected in manifest.files.items() if verify else ():
                _check_file(folder / name, expected)
        return cls(folder, manifest)

    @property
    def content_hash(self) -> str:
        """SHA-256 over the names and hashes of all files: equal content, equal hash, wherever it lies."""
        return hashlib.sha256(canonical_json(self.manifest.files).encode()).hexdigest()

    @property
    def metrics(self) -> dict[str, Any] | None:
        """Contents of ``metrics.json``; None if the artifact has none."""
        return self._report("metrics.json")

    @property
    def evidence(self) -> dict[str, Any] | list[Any] | None:
        """Contents of ``evidence.json``; None if the artifact has none."""
        return self._report(EVIDENCE)

    def _report(self, name: str) -> Any:
        if name not in self.manifest.files:
            return None
        with disk_errors(self.path):
            return _read_json(self.path / name)


def write_artifact(
    folder: Path | str, fill: Callable[[Path], None], manifest: Manifest, extras: ArtifactExtras | None = None
) -> Artifact:
    """Write an artifact so that ``folder`` is complete or absent, whatever happens meanwhile.

    Args:
        folder: its final place; must not exist.
        fill: writes ``config.json``, ``model.safetensors``, ``tokenizer.json``, … into the folder it is given.
        manifest: ``files`` and ``size_mb`` are filled in here.
        extras: reports to write beside the model.

    Raises:
        ArtifactError: ``folder`` exists.
        ResourceError: disk full, or no permission.
    """
    folder = Path(folder)
    if os.path.lexists(folder):
        raise ArtifactError("exists already", where=str(folder), remedy="choose another name: artifacts stay as made")
    make_folder(folder.parent)
    work = temporary_for(folder)
    with disk_errors(folder.parent, need=4 * manifest.parameters):
        work.mkdir()
        try:
            fill(work)
            _write_extras(work, extras or ArtifactExtras())
            manifest = _seal(work, manifest)
            os.rename(work, folder)
        except BaseException:
            remove_tree(work)
            raise
        fsync_dir(folder.parent)
    return Artifact(folder, manifest)


def amend_evidence(folder: Path | str, evidence: dict[str, Any] | list[Any]) -> Artifact:
    """Add ``evidence.json`` to a finished artifact: evidence can only be measured on models that exist.

    The file goes first, the manifest that names it last; a kill in between leaves the artifact as it was.

    Raises:
        ArtifactError: the artifact is incomplete or changed.
        ResourceError: disk full, or no permission.
    """
    artifact = Artifact.open(folder, verify=False)
    files = {name: digest for name, digest in artifact.manifest.files.items() if name != EVIDENCE}
    if EVIDENCE in artifact.manifest.files:
        write_atomic(artifact.path / MANIFEST, manifest_bytes(artifact.manifest.replace(files=files)))
    write_atomic(artifact.path / EVIDENCE, _json_bytes(evidence))
    manifest = artifact.manifest.replace(files={**files, EVIDENCE: sha256_file(artifact.path / EVIDENCE)})
    write_atomic(artifact.path / MANIFEST, manifest_bytes(manifest))
    return Artifact(artifact.path, manifest)


def manifest_bytes(manifest: Manifest) -> bytes:
    """The contents of ``manifest.json``."""
    return _json_bytes(manifest.model_dump(mode="json"))


def _write_extras(folder: Path, extras: ArtifactExtras) -> None:
    if extras.metrics is not None:
        (folder / "metrics.json").write_bytes(_json_bytes(extras.metrics))
    if extras.evidence is not None:
        (folder / EVIDENCE).write_bytes(_json_bytes(extras.evidence))
    if extras.readme is not None:
        (folder / "README.md").write_text(extras.readme, encoding="utf-8")
    for name, data in extras.files.items():
        (folder / name).write_bytes(data)


def _seal(folder: Path, manifest: Manifest) -> Manifest:
    """Hash and sync every file, then write the manifest and sync the folders."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in paths:
        sync_file(path)
    files = {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
    weights = sum(path.stat().st_size for path in paths if path.suffix == ".safetensors")
    manifest = manifest.replace(files=files, size_mb=weights / 1e6)
    write_synced(folder / MANIFEST, manifest_bytes(manifest))
    for path in [*folder.rglob("*"), folder]:
        if path.is_dir():
            fsync_dir(path)
    return manifest


def _check_file(path: Path, expected: str) -> None:
    if not path.is_file():
        raise ArtifactError("file is missing", where=str(path), remedy="copy the whole artifact again")
    found = sha256_file(path)
    if found != expected:
        what = f"file is truncated or changed (sha256 {found[:12]}…, manifest {expected[:12]}…)"
        raise ArtifactError(what, where=str(path), remedy="copy the artifact again or make it anew")


def _read_manifest(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not path.exists():
        remedy = "copy it again, or make it anew with `agent-forge run --resume`"
        raise ArtifactError("unfinished artifact: no manifest.json", where=str(folder), remedy=remedy)
    values = _read_json(path)
    if not isinstance(values, dict):
        raise ArtifactError("holds no manifest", where=str(path), remedy="copy the artifact again")
    version = values.get("schema_version")
    if isinstance(version, int) and version > SCHEMA_VERSION:
        what = f"made by a newer version (schema {version}, this one reads up to {SCHEMA_VERSION})"
        raise ArtifactError(what, where=str(path), remedy="upgrade agent-forge")
    try:
        return Manifest.build(values)
    except ConfigError as error:
        raise ArtifactError(f"{error.where} {error.what}", where=str(path), remedy="copy the artifact again") from None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ArtifactError(f"not valid JSON ({error})", where=str(path), remedy="copy the artifact again") from None


def _json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False, default=_plain) + "\n").encode()


def _plain(value: Any) -> Any:
    """Numbers and arrays of numpy or torch as plain numbers and lists, anything else as text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
