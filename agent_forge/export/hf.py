"""Export to the Hugging Face layout: a folder that transformers loads, with agent-forge or without. Packed models are
written as the plain ones they stand for.

Weights are read and written tensor by tensor, so memory holds one of them at a time. The folder is written under
another name and appears by one rename: it is complete or absent.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from agent_forge.export.card import CardFacts, hf_card, model_card
from agent_forge.export.dequantise import plain_source
from agent_forge.export.remote_code import AUTO_MAP, bundle
from agent_forge.merging.folders import COMPANIONS
from agent_forge.merging.folders_weights import (
    Shard,
    ShardWriter,
    Stored,
    WeightFolder,
    make_shards,
    torch_dtype,
)
from forgekit.compute.disk import require_free
from forgekit.config import Config
from forgekit.data.tokenizer import END, PAD, load_tokenizer
from forgekit.errors import ArtifactError, ConfigError
from forgekit.models.config import MODEL_CONFIGS
from forgekit.store.artifact import EVIDENCE, MANIFEST, Artifact
from forgekit.store.fsio import write_folder
from forgekit.store.names import utc_text
from forgekit.version import __version__

if TYPE_CHECKING:
    from torch import Tensor

ORIGIN = "agent_forge"
"""Key of ``config.json`` under which an exported model says what it was made from."""
CARD = "README.md"
LICENCES = ("LICENSE", "LICENSE.md", "LICENSE.txt", "NOTICE", "USE_POLICY.md")
"""Files that must stay with weights someone else made."""
_STORED = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_SPARE = 2_000_000
"""Bytes of everything beside weights and tokenizer, at most."""

Show = Callable[[int, int], None]
"""Called with (tensors written, tensors in all)."""


class ExportPlan(Config):
    """What to export, where to and how."""

    source: Path
    """Folder of the model: an artifact, an exported folder or a Hugging Face checkpoint."""
    output: Path
    """Folder of the result; must not exist."""
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    """Type of the weights; unset keeps theirs."""
    max_shard_bytes: Annotated[int, Field(gt=0)] = 5_000_000_000
    """Largest file of weights, unless one tensor is larger."""
    ancestors: tuple[str, ...] = ()
    """Ids of the models it comes from beyond its parents, nearest first, for the card."""


@dataclass
class Job:
    """A plan that has passed every check that needs no weights.

    Attributes:
        plan: as given.
        folder: the source.
        shards: the files to write.
        packed: what to tell where the source is packed and ``folder`` a plain copy of it; empty where it is not.
        rounded: largest change of a value by storing it in another type; filled while writing.
    """

    plan: ExportPlan
    folder: WeightFolder
    shards: list[Shard]
    packed: str = ""
    rounded: float = field(default=0.0)

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def dtype(self) -> str:
        """The type that most of the result's values have."""
        counts: dict[str, int] = {}
        for shard in self.shards:
            for place in shard.tensors.values():
                counts[place.dtype] = counts.get(place.dtype, 0) + place.count
        return torch_dtype(max(counts, key=counts.__getitem__))


def export_hf(plan: ExportPlan, show: Show | None = None) -> dict[str, Any]:
    """Write the model so that ``AutoModelForCausalLM`` and ``AutoTokenizer`` load it.

    Returns:
        what was written, as JSON-able values.

    Raises:
        ArtifactError: the target exists; the source is incomplete, damaged or not a causal language model; its
            weights do not fit its configuration or are not finite.
        ConfigError: the type cannot hold the weights.
        ResourceError: the disk is full or may not be written to.
    """
    began = time.perf_counter()
    check_ends(plan)
    with plain_source(plan.source, plan.output) as (folder, note):
        return {**_exported(_job(plan, folder, note), show), "seconds": time.perf_counter() - began}


def _exported(job: Job, show: Show | None) -> dict[str, Any]:
    """Write the result; what was written."""
    plan = job.plan
    require_free(plan.output, job.bytes + _companion_bytes(job.folder.path) + _SPARE, "the export")
    origin = _origin(job)

    def fill(work: Path) -> None:
        _write_weights(job, work, show)
        if job.folder.ours:
            _fill_ours(job, work, origin)
        else:
            _fill_theirs(job, work)

    write_folder(plan.output, fill, job.bytes)
    files = {path.name: path.stat().st_size for path in sorted(plan.output.iterdir())}
    return {
        "format": "hf",
        "source": str(plan.source),
        "model_id": origin.get("model_id"),
        "output": str(plan.output),
        "dtype": job.dtype,
        "values": job.folder.parameters,
        "largest_rounding": job.rounded,
        "bytes": sum(files.values()),
        "files": files,
        "notes": [job.packed] if job.packed else [],
    }


def prepare(plan: ExportPlan) -> Job:
    """Check everything that needs no weights, of a source that is not packed; raises as :func:`export_hf`."""
    check_ends(plan)
    return _job(plan, WeightFolder.open(plan.source, plan.source.name))


def check_ends(plan: ExportPlan) -> None:
    """The target is free, and a source with a manifest is what its manifest says.

    Raises:
        ArtifactError: it is not.
    """
    if os.path.lexists(plan.output):
        raise ArtifactError("exists already", where=str(plan.output), remedy="choose another folder or remove this one")
    if (plan.source / MANIFEST).is_file():
        Artifact.open(plan.source)  # reads every file: a damaged model must not be handed on


def _job(plan: ExportPlan, folder: WeightFolder, packed: str = "") -> Job:
    if folder.ours:
        _check_ours(folder)
    else:
        _check_theirs(folder, plan)
    tensors = {name: (_stored_as(place, plan), place.shape) for name, place in folder.tensors.items()}
    return Job(plan, folder, make_shards(tensors, plan.max_shard_bytes), packed)


def _stored_as(place: Stored, plan: ExportPlan) -> str:
    return _STORED[plan.dtype] if plan.dtype and place.floating else place.dtype


def _check_ours(folder: WeightFolder) -> None:
    """The tensors are those of the configured model, and the tokenizer fits it."""
    from forgekit.models.io import hollow_model

    kind = MODEL_CONFIGS.get(folder.config["model_type"])
    config = kind.build(folder.config.get("forge", {}), source=str(folder.path / "config.json"))
    expected = {name: tuple(t.shape) for name, t in hollow_model(config).state_dict().items()}
    found = {name: place.shape for name, place in folder.tensors.items()}
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            what = f"tensor {name} is {_shape(found.get(name))}, config.json says {_shape(expected.get(name))}"
            raise ArtifactError(what, where=str(folder.path), remedy="use the weights written with this config.json")
    check_vocabulary(load_tokenizer(folder.path), config.vocab_size, folder.path)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "missing" if shape is None else "x".join(map(str, shape)) or "a number"


def _check_theirs(folder: WeightFolder, plan: ExportPlan) -> None:
    """A causal model that transformers knows by itself; quantised weights keep their types."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from forgekit.hub import read_hf_tokenizer

    kind = folder.config.get("model_type")
    found = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind, ())
    known = {found} if isinstance(found, str) else set(found)
    named = folder.config.get("architectures") or known
    if not known.intersection(named):
        what = f"model type {kind!r} as {', '.join(named) or 'nothing known'} is no causal language model"
        remedy = "export one that transformers knows without a folder's own code"
        raise ArtifactError(what, where=str(folder.path / "config.json"), remedy=remedy)
    if plan.dtype and folder.config.get("quantization_config"):
        what = "the weights are quantised, so their types belong together"
        raise ConfigError(what, where="--dtype", remedy="leave the option out, or export the model they were made from")
    tokenizer, rows = read_hf_tokenizer(folder.path), folder.config.get("vocab_size")
    if isinstance(rows, int):  # some architectures keep it elsewhere
        check_vocabulary(tokenizer, rows, folder.path)


def check_vocabulary(tokenizer: Any, rows: int, folder: Path) -> None:
    """Every token has a row of the embedding.

    Raises:
        ArtifactError: the tokenizer knows more tokens than the weights.
    """
    size = max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1
    if size > rows:
        what = f"the tokenizer has {size:,} tokens, the weights {rows:,} rows"
        raise ArtifactError(what, where=str(folder), remedy="give the model the tokenizer it was trained with")


def _write_weights(job: Job, work: Path, show: Show | None) -> None:
    writer = ShardWriter(work, job.shards)
    names = [(name, place.dtype) for shard in job.shards for name, place in shard.tensors.items()]
    for number, (name, dtype) in enumerate(names, 1):
        writer.put(name, _converted(job, name, dtype))
        if show:
            show(number, len(names))
    writer.close()


def _converted(job: Job, name: str, dtype: str) -> Tensor:
    """One tensor in the type it is stored in; the largest change goes into the job."""
    import torch

    tensor = job.folder.read(name)
    if not tensor.is_floating_point() or tensor.dtype.itemsize < 2 or not tensor.numel():
        return tensor
    if not torch.isfinite(tensor).all():
        remedy = "its training diverged: export an earlier model"
        raise ArtifactError(
            f"tensor {name} holds values that are not finite", where=str(job.plan.source), remedy=remedy
        )
    result = tensor.to(getattr(torch, torch_dtype(dtype)))
    if result.dtype != tensor.dtype:
        if not torch.isfinite(result).all():
            what = f"{job.plan.dtype} cannot hold {float(tensor.abs().max()):.3g} of tensor {name}"
            raise ConfigError(what, where="--dtype", remedy="use bfloat16")
        job.rounded = max(job.rounded, float((result.double() - tensor.double()).abs().max()))
    return result


def _fill_ours(job: Job, work: Path, origin: dict[str, Any]) -> None:
    """Configuration, tokenizer, code and card of a model of the house."""
    folder = job.folder
    for name in COMPANIONS:
        _copy(folder.path / name, work)
    _copy(folder.path / EVIDENCE, work)
    config = {**folder.config, "auto_map": AUTO_MAP, "dtype": job.dtype, ORIGIN: origin}
    _write_json(work / "config.json", config)
    tokenizer = load_tokenizer(folder.path)
    ids = {"pad_token_id": tokenizer.token_to_id(PAD), "eos_token_id": tokenizer.token_to_id(END), "do_sample": False}
    _write_json(work / "generation_config.json", ids)
    for name, source in bundle(folder.config["model_type"]).items():
        (work / name).write_text(source, encoding="utf-8")
    (work / CARD).write_text(model_card(_facts(job, origin, work)), encoding="utf-8")


def _fill_theirs(job: Job, work: Path) -> None:
    """Everything that goes with a checkpoint someone else made; its card keeps its words and gains a section."""
    folder = job.folder
    for name in (*COMPANIONS, *LICENCES):
        _copy(folder.path / name, work)
    config = dict(folder.config)
    if job.plan.dtype:
        config = {key: value for key, value in config.items() if key != "torch_dtype"} | {"dtype": job.plan.dtype}
    _write_json(work / "config.json", config)
    readme = folder.path / CARD
    before = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    (work / CARD).write_text(hf_card(_facts(job, {}, work), before), encoding="utf-8")


def _facts(job: Job, origin: dict[str, Any], work: Path) -> CardFacts:
    artifact = job.folder.artifact
    readme = job.folder.path / CARD
    return CardFacts(
        name=artifact.manifest.model_name if artifact else job.plan.output.name,
        manifest=artifact.manifest if artifact else None,
        evidence=artifact.evidence if artifact else None,
        config=job.folder.config,
        readme=readme.read_text(encoding="utf-8", errors="replace") if artifact and readme.is_file() else "",
        ancestors=job.plan.ancestors,
        origin=origin,
        dtype=job.dtype,
        stored={torch_dtype(p.dtype) for p in job.folder.tensors.values() if p.floating},
        rounded=job.rounded,
        values=job.folder.parameters,
        weights={shard.name: (work / shard.name).stat().st_size for shard in job.shards},
        packed=job.packed,
    )


def _origin(job: Job) -> dict[str, Any]:
    """What the export was made from; an exported folder passes on what it was told."""
    folder = job.folder
    if folder.artifact is None:
        told = folder.config.get(ORIGIN)
        return told if isinstance(told, dict) else {}
    manifest = folder.artifact.manifest
    return {
        "model_id": manifest.model_id,
        "session_id": manifest.session_id,
        "content_hash": folder.artifact.content_hash,
        "made_with": manifest.code_version,
        "exported_with": __version__,
        "exported_at": utc_text(),
        **({"unpacked": True} if job.packed else {}),
    }


def _companion_bytes(folder: Path) -> int:
    names = (*COMPANIONS, *LICENCES, EVIDENCE, CARD)
    return sum((folder / name).stat().st_size for name in names if (folder / name).is_file())


def _copy(path: Path, work: Path) -> None:
    """Copy a file if it is there."""
    if path.is_file():
        (work / path.name).write_bytes(path.read_bytes())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
