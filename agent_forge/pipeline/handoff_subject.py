"""A model as a handoff sees it: what its manifest says, and what can be looked at whoever made it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_forge.merging.folders_weights import WeightFolder
from agent_forge.pipeline.handoff import EXTERNAL
from forgekit.errors import ArtifactError
from forgekit.models.io import read_config
from forgekit.store.artifact import Artifact, Manifest
from forgekit.store.fsio import disk_errors
from forgekit.store.packed import says_packed, way_to_dense
from forgekit.store.storage import ModelStorage

if TYPE_CHECKING:
    from torch import Tensor, nn

Shape = dict[str, Any]

# One meaning, many spellings: ours write Hugging Face's usual names, some of its families have their own.
_SPELLINGS = {
    "family": ("model_type", "architecture", "family"),
    "width": ("hidden_size", "n_embd", "d_model"),
    "layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    "vocabulary": ("vocab_size",),
}
MISSING = object()
"""No such entry; None is a value."""


@dataclass(frozen=True)
class Subject:
    """One model to be judged.

    Attributes:
        name: for messages.
        key: equal for the same model given twice.
        metadata: its manifest as one mapping; empty for a model of elsewhere.
        parameters: their number.
        size_mb: weights in MB on disk.
        shape: family, width, layers, vocabulary and tokenizer, as far as they are known.
        tensors: reads the weights one by one.
        known: whether a missing entry counts; not for models of elsewhere and stand-ins.
        parents: shape by id of the models it was made from; None where one is no longer there.
        dense: what to do for a model to train, where the weights of this one are packed; empty where they are not.
    """

    name: str
    key: str
    metadata: Mapping[str, Any]
    parameters: int
    size_mb: float
    shape: Shape
    tensors: Callable[[], Iterator[tuple[str, Tensor]]]
    known: bool = True
    parents: Mapping[str, Shape | None] | None = None
    dense: str = ""

    def entry(self, key: str) -> Any:
        """A metadata entry, looked up among the metrics too; :data:`MISSING` if there is none."""
        tables = (self.metadata, self.metadata.get("metrics") or {})
        return next((table[key] for table in tables if key in table), MISSING)

    def lenient(self) -> Subject:
        """The same as a stand-in for a model that was not made: what it lacks is not known."""
        return replace(self, known=False)


def phase_of(manifest: Manifest) -> str:
    """The phase that made a model, also when it was taken in from another storage."""
    return manifest.metadata.get("origin_phase") or manifest.phase_name


def shape_of(config: Mapping[str, Any]) -> Shape:
    """Family, width, layers and vocabulary that a ``config.json`` states."""
    inner = config.get("text_config")
    values = {**config, **inner} if isinstance(inner, Mapping) else config
    found = {part: next((values[n] for n in names if n in values), None) for part, names in _SPELLINGS.items()}
    return {part: value for part, value in found.items() if value is not None}


def of_folder(path: Path, name: str, metadata: Mapping[str, Any] | None = None) -> Subject:
    """A model folder, ours or Hugging Face's; of ours every file is compared with its hash.

    Args:
        path: the folder.
        name: for messages, where it has no manifest.
        metadata: what to judge it by; None takes the manifest's.

    Raises:
        ArtifactError: incomplete, truncated or changed; names the model.
    """
    try:
        opened = WeightFolder.open(path, name)
        artifact = opened.artifact and Artifact.open(path)
        shape = shape_of(opened.config) | ({"tokenizer": opened.tokenizer} if opened.tokenizer else {})
    except ArtifactError as error:
        what = f"{error.where}: {error.what}" if error.where != name else error.what
        raise ArtifactError(f"weights cannot be used ({what})", where=name, remedy=error.remedy) from None
    with disk_errors(path):
        size = sum(file.stat().st_size for file in opened.weight_files) / 1e6

    def tensors() -> Iterator[tuple[str, Tensor]]:
        return ((tensor, opened.read(tensor)) for tensor, place in opened.tensors.items() if place.floating)

    manifest = artifact.manifest if artifact else None
    own = metadata if metadata is not None else manifest.flat() if manifest else {}
    known = metadata is not None or (manifest is not None and phase_of(manifest) != EXTERNAL)
    parameters = manifest.parameters if manifest else opened.parameters
    label = manifest.model_id if manifest else name
    dense = way_to_dense(path) if says_packed(opened.config) else ""
    return Subject(label, str(path.resolve()), own, parameters, size, shape, tensors, known, dense=dense)


def of_stored(storage: ModelStorage, ref: str) -> Subject:
    """A model of a storage by id or folder, with the shapes of its parents.

    Raises:
        ArtifactError: no such model, or its folder is incomplete, truncated or changed.
    """
    subject = of_folder(storage.resolve(ref), ref)
    parents = {one: _stored_shape(storage, one) for one in subject.metadata.get("parents", [])}
    return replace(subject, parents=parents)


def _stored_shape(storage: ModelStorage, model_id: str) -> Shape | None:
    row = storage.registry.get_model(model_id)
    if row is None:
        return None
    try:
        return shape_of(read_config(Path(row["model_path"])))
    except ArtifactError:  # removed or damaged: it is not this model that is judged
        return None


def of_model(model: nn.Module, name: str, metadata: Mapping[str, Any]) -> Subject:
    """A loaded model; its size is that of its parameters as they are held, in a packed one of all that is stored."""
    from forgekit.quant.model import is_packed, logical_parameters

    packed = is_packed(model)
    held: Sequence[Tensor] = list(model.state_dict().values() if packed else model.parameters())
    config = getattr(model, "config", None)
    values = config.model_dump() if hasattr(config, "model_dump") else config.to_dict() if config is not None else {}
    if "architecture" in values:  # a Hugging Face model in the house's clothes: its family is the architecture
        values = {**values, "model_type": values["architecture"]}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        return ((key, one) for key, one in model.state_dict().items() if one.is_floating_point())

    return Subject(
        name=str(metadata.get("model_id", name)),
        key=f"object {id(model)}",
        metadata=metadata,
        parameters=logical_parameters(model),
        size_mb=sum(one.numel() * one.element_size() for one in held) / 1e6,
        shape=shape_of(values),
        tensors=tensors,
        dense="hand over its dense copy" if packed else "",
    )
