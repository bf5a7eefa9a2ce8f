"""Packed artifacts among the others: told apart by ``config.json`` alone, and led back to a dense copy. No torch here.

A packed model (:mod:`forgekit.quant.files`) can be run: chatted with, served, measured. It has codes in place of
weights, so nothing can train it, merge it or bake into it; that takes a dense copy, with the same weights as floats.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forgekit.errors import ArtifactError
from forgekit.store.artifact import MANIFEST, Artifact

SECTION = "forge_quantization"
"""Key of ``config.json`` that only packed models have."""
PACKED_MODEL = "packed_model"
"""Metadata entry of a dense copy: the id of the packed model with the same weights."""


def is_packed_folder(folder: Path | str) -> bool:
    """Whether a folder's ``config.json`` says that its weights are packed.

    False where there is no readable one: whoever opens the folder says what is wrong with it.
    """
    return says_packed(_json(Path(folder) / "config.json"))


def says_packed(config: Any) -> bool:
    """Whether the contents of a ``config.json`` are those of a packed model."""
    return isinstance(config, dict) and SECTION in config


def dense_copy(folder: Path | str) -> Path | None:
    """The newest artifact beside a packed one that has the same weights as floats; None where there is none."""
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        return None
    try:
        own = Artifact.open(folder, verify=False).manifest.model_id
        beside = sorted(path.parent for path in folder.absolute().parent.glob(f"*/{MANIFEST}"))
    except (ArtifactError, OSError):  # whoever opens the folder says what is wrong with it
        return None
    found = []
    for path in beside:
        try:
            manifest = Artifact.open(path, verify=False).manifest
        except ArtifactError:
            continue  # a damaged neighbour is no copy to name
        if manifest.metadata.get(PACKED_MODEL) == own:
            found.append((manifest.created_at, path))
    return max(found)[1] if found else None


def way_to_dense(folder: Path | str) -> str:
    """What to do for whom a packed model will not do: its dense copy, or the command that makes one."""
    folder, copy = Path(folder), dense_copy(folder)
    if copy is not None:
        return f"use its dense copy {copy}"
    return f"make a dense copy: agent-forge export {folder} --format hf --output {folder.absolute().name}-dense"


def refuse_packed(folder: Path | str, verb: str) -> None:
    """Refuse a packed model where only a dense one will do; any other folder passes.

    Args:
        folder: of a model.
        verb: what it cannot be: ``trained``, ``merged``.

    Raises:
        ArtifactError: it is packed; names its dense copy, or how to make one.
    """
    if is_packed_folder(folder):
        what = f"its weights are packed: it can be run, not {verb}"
        raise ArtifactError(what, where=str(folder), remedy=way_to_dense(folder))


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
