"""The model that is made small: opened, and refused where it cannot be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from agent_forge.phases.bitnet.config import BitNetConfig
from forgekit.data.plans import GymMix
from forgekit.errors import ConfigError
from forgekit.models.io import read_model
from forgekit.quant.model import targets
from forgekit.store.artifact import MANIFEST, Artifact
from forgekit.store.fsio import sha256_file
from forgekit.store.storage import ModelStorage


@dataclass
class Parent:
    """The model that is made small.

    Attributes:
        model_id: its id.
        name: its name.
        model: in float32; its values are never changed.
        tokenizer: its tokenizer.
        speciality: what it practised; empty where nobody knows.
        thinks: whether it may think before it answers.
        print: changes with its content.
    """

    model_id: str
    name: str
    model: nn.Module
    tokenizer: Any
    speciality: tuple[GymMix, ...]
    thinks: bool
    print: str


def open_parent(storage: ModelStorage, models: Sequence[str], config: BitNetConfig) -> Parent:
    """The one model that the phase was given.

    Raises:
        ConfigError: not exactly one, or rows that are longer than its context.
        ArtifactError: it cannot be read, has no linear maps, or is packed already.
    """
    if len(models) != 1:
        what, remedy = f"{len(models)} models given, it takes one", "give one model: --from MODEL"
        raise ConfigError(what, where="phase bitnet", remedy=remedy)
    folder = storage.resolve(models[0])
    model, tokenizer = read_model(folder)
    targets(model)
    _check_lengths(model, config)
    opened = Artifact.open(folder, verify=False) if (folder / MANIFEST).is_file() else None
    metadata = opened.manifest.metadata if opened else {}
    return Parent(
        model_id=opened.manifest.model_id if opened else str(models[0]),
        name=Path(folder).name,
        model=model.float(),
        tokenizer=tokenizer,
        speciality=tuple(GymMix.build(part, f"{models[0]}: speciality") for part in metadata.get("speciality", [])),
        thinks=bool(metadata.get("thinks")),
        print=opened.content_hash if opened else " ".join(map(sha256_file, sorted(folder.glob("*.safetensors")))),
    )


def _check_lengths(model: nn.Module, config: BitNetConfig) -> None:
    """Rows and windows fit the positions that a model was made for, where it has an end of them."""
    limit = getattr(model, "context_limit", None)
    for name, length in (("train.seq_len", config.train.seq_len), ("evaluation.length", config.evaluation.length)):
        if limit is not None and length > limit:
            where = f"phases.bitnet.{name}"
            raise ConfigError(f"{length} tokens, the model reads {limit}", where=where, remedy=f"--set {where}={limit}")
