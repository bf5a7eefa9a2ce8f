"""The models that are to be merged: found, checked, and asked what they practised. No weights are read here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from agent_forge.merging.check import Candidate, check_lineage, check_models
from agent_forge.merging.folders_weights import WeightFolder
from agent_forge.merging.strategies_config import CHAMPION
from agent_forge.pipeline.handoff import EXTERNAL
from forgekit.data.plans import GymMix
from forgekit.errors import ArtifactError, ConfigError
from forgekit.models.config import FAMILIES
from forgekit.store.storage import ModelStorage

SPECIALITY = "speciality"


@dataclass(frozen=True)
class Parent:
    """A model that is merged, or their common ancestor.

    Attributes:
        name: unique among them.
        model_id: of the artifact, or the folder of a model of elsewhere.
        made_here: it is an artifact, so that others can name it as their parent.
        folder: where it lies.
        speciality: what it practised.
        data_hash: of its training data.
        print: changes with its content.
    """

    name: str
    model_id: str
    made_here: bool
    folder: Path
    speciality: tuple[GymMix, ...]
    data_hash: str
    print: str


def find_base(models: Sequence[str], storage: ModelStorage, named: str) -> str:
    """The common ancestor: the one named, else the nearest that all models' lineages hold.

    Raises:
        ArtifactError: none is named and the lineages have none in common.
    """
    if named:
        return named
    lines = [_line(model, storage) for model in models]
    common = [one for one in lines[0] if all(one in line for line in lines[1:])] if lines else []
    if not common:
        what = f"{', '.join(map(str, models)) or 'no models'}: no common ancestor is known"
        remedy = "merge siblings branched from one model, or name it: --set phases.evomerge.base=MODEL"
        raise ArtifactError(what, where="phase evomerge", remedy=remedy)
    return common[0]


def _line(model: str, storage: ModelStorage) -> list[str]:
    """Ids of a model's ancestors, nearest first."""
    opened = WeightFolder.open(storage.resolve(model), model)
    manifest = opened.artifact.manifest if opened.artifact else None
    waiting, line = list(manifest.parents if manifest else ()), []
    while waiting:
        one = waiting.pop(0)
        if one not in line:
            line.append(one)
            row = storage.registry.get_model(one)
            waiting += row["metadata"].get("parents", storage.registry.ancestors(one)) if row else []
    return line


def open_parents(
    models: Sequence[str], base: str, storage: ModelStorage, skills: Mapping[str, tuple[GymMix, ...]]
) -> tuple[list[Parent], Parent]:
    """Check that the models can be merged.

    Args:
        models: ids or folders.
        base: the common ancestor's.
        storage: where ids are looked up.
        skills: specialities by name; they go before what the manifests say.

    Raises:
        ConfigError: fewer than two models, or nobody knows what they practised.
        ArtifactError: a folder is incomplete; families, vocabularies, shapes or settings differ; the base is no
            ancestor. Names the model, the rule, the value and what to do.
    """
    if len(models) < 2:
        what = f"{len(models)} model{'s' * (len(models) != 1)} given, merging takes two or more"
        raise ConfigError(what, where="phase evomerge", remedy="run phase 1 first, or give --from MODEL MODEL MODEL")
    paths = [storage.resolve(one) for one in (*models, base)]
    if len(set(paths)) < len(paths):
        twice = next(path.name for path in paths if paths.count(path) > 1)
        raise ArtifactError("is given twice", where=twice, remedy="give every model once, the base not among them")
    names = _names(paths)
    stray = sorted(set(skills) - set(names))
    if stray:
        what = f"{stray[0]!r} is none of the models"
        raise ConfigError(what, where="phases.evomerge.skills", remedy=f"use their names: {', '.join(names)}")
    opened = [WeightFolder.open(path, name) for path, name in zip(paths, names)]
    candidates = [_candidate(one) for one in opened]
    check_models(candidates[:-1], candidates[-1])

    def parents_of(model_id: str) -> list[str] | None:
        row = storage.registry.get_model(model_id)
        return None if row is None or row["phase_name"] == EXTERNAL else storage.registry.ancestors(model_id)

    check_lineage(candidates[:-1], candidates[-1], parents_of)
    found = [_parent(one, given, name, skills) for one, given, name in zip(opened, (*models, base), names)]
    if not any(one.speciality for one in found):
        remedy = f'name it: --set phases.evomerge.skills.{names[0]}=[{{family="sort"}}]'
        raise ConfigError("nobody knows what the models practised", where="phases.evomerge.skills", remedy=remedy)
    return found[:-1], found[-1]


def _candidate(opened: WeightFolder) -> Candidate:
    """What is known of a model. One that was taken in from elsewhere has a manifest, but nobody knows its lineage."""
    known = opened.candidate()
    elsewhere = known.manifest is not None and known.manifest.phase_name == EXTERNAL
    return replace(known, manifest=None) if elsewhere else known


def _names(paths: Sequence[Path]) -> list[str]:
    """A short name for every folder: its own, numbered where two are called alike, or as the search's best is."""
    names: list[str] = [CHAMPION]
    for path in paths:
        name, number = path.name, 2
        while name in names:
            name, number = f"{path.name}_{number}", number + 1
        names.append(name)
    return names[1:]


def _parent(opened: WeightFolder, given: str, name: str, skills: Mapping[str, tuple[GymMix, ...]]) -> Parent:
    manifest = opened.artifact.manifest if opened.artifact else None
    practised = manifest.metadata.get(SPECIALITY, []) if manifest else []
    mix = skills.get(name) or tuple(GymMix.build(part, f"{name}: {SPECIALITY}") for part in practised)
    return Parent(
        name=name,
        model_id=manifest.model_id if manifest else str(given),
        made_here=manifest is not None,
        folder=opened.path,
        speciality=mix,
        data_hash=manifest.data_hash if manifest else "",
        print=opened.artifact.content_hash if opened.artifact else _weights_print(opened.path),
    )


def _weights_print(folder: Path) -> str:
    """A fingerprint of a folder that has no manifest: its weight files' contents."""
    from forgekit.store.fsio import sha256_file

    return " ".join(sha256_file(path) for path in sorted(folder.glob("*.safetensors")))


def differing_traits(configs: Mapping[str, Any], base: str) -> dict[str, dict[str, Any]]:
    """By model, the settings in which it differs from the base: none of them is a shape, the weights fit both.

    Models of Hugging Face's families have none: what their configurations may differ in, the merge does not take over.
    """
    origin = configs[base].model_dump()
    if configs[base].family not in FAMILIES:
        return {}
    found = {}
    for name, config in configs.items():
        values = config.model_dump()
        changes = {key: value for key, value in values.items() if key in origin and value != origin[key]}
        if changes:
            found[name] = changes
    return found
