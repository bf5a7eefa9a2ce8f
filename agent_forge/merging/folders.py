"""Merge model folders tensor by tensor: artifacts of ours or Hugging Face checkpoints of any architecture.

Memory holds the tensors of one name at a time (one per thread), not the models. The result appears by one rename, so
its folder is complete or absent. When every input is an artifact, the result is one too.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator

from agent_forge.merging import MERGERS
from agent_forge.merging.check import Findings, Lookup, Supply, check_lineage, check_models, check_shapes, check_supply
from agent_forge.merging.folders_receipt import card, manifest_of, parents_in, receipt_of, told
from agent_forge.merging.folders_weights import (
    VOCABULARY_FILES,
    Shard,
    ShardWriter,
    Stored,
    WeightFolder,
    make_shards,
    torch_dtype,
)
from agent_forge.merging.operators_config import MergeOptions, Merger, PassthroughOptions
from agent_forge.merging.operators_layers import Entry, layer_count, layout, stacked_config
from forgekit.compute.disk import readable, require_free
from forgekit.config import Config
from forgekit.errors import ArtifactError
from forgekit.store.artifact import MANIFEST, Artifact, ArtifactExtras, write_artifact
from forgekit.store.fsio import write_folder
from forgekit.store.names import utc_text

if TYPE_CHECKING:
    from torch import Tensor

CARD = "README.md"
TEMPLATES = ("chat_template.jinja", "chat_template.json")
COMPANIONS = (
    *VOCABULARY_FILES,
    *TEMPLATES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "preprocessor_config.json",
)
"""Files beside the weights that make a model usable, copied when the donor has them."""
SPARE_BYTES = 32_000_000
"""Blocks and bookkeeping of one thread, at most."""

Show = Callable[[int, int], None]
"""Called with (tensors written, tensors in all)."""


class MergePlan(Config):
    """What to merge, how, and where to."""

    method: str
    """A merge method; see ``MERGERS``."""
    models: Annotated[tuple[Path, ...], Field(min_length=1)]
    """Folders of the models, ours or Hugging Face's."""
    base: Path | None = None
    """Folder of the common ancestor; always checked, and used where the method needs it."""
    output: Path
    """Folder of the result; must not exist."""
    options: dict[str, Any] = {}
    """The method's options."""
    importances: tuple[Path, ...] = ()
    """Safetensors files or folders with one importance tensor per parameter, one per model in the same order."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of methods that draw random numbers."""
    max_shard_bytes: Annotated[int, Field(gt=0)] = 2_000_000_000
    """Largest file of weights, unless one tensor is larger. Our own families are always one file."""
    threads: Annotated[int, Field(ge=0)] = 0
    """Tensors merged at the same time; 0 takes one per processor. Never changes the result."""
    files_from: Literal["base", "first"] = "base"
    """Whose configuration, tokenizer and generation settings the result takes; without a base the first model's."""
    tokenizer: Literal["same", "any"] = "same"
    """``any`` accepts models with different tokenizers; right only if equal ids mean the same."""
    verify: bool = True
    """Hash every input, for the receipt and to notice damaged artifacts."""
    session_id: str | None = None
    """Session of the result's manifest; the first model's when unset."""
    model_name: str | None = None
    """Name of the result; the output folder's when unset."""
    notes: tuple[str, ...] = ()
    """Further notes for the card, such as where the importances come from."""
    created_at: str | None = None
    """Instant on the card and in the manifest, ISO 8601; now when unset. Give one for equal files every time."""

    @field_validator("created_at")
    @classmethod
    def _instant(cls, value: str | None) -> str | None:
        return None if value is None else utc_text(value)


@dataclass(frozen=True)
class Job:
    """A plan that has passed every check that headers and configurations allow.

    Attributes:
        plan: as given.
        merger: the method.
        options: its options.
        models: the inputs.
        base: the ancestor, if any.
        importances: one per model, or none.
        entries: the result's tensors.
        shards: the result's files.
        findings: what is worth telling.
    """

    plan: MergePlan
    merger: Merger
    options: MergeOptions
    models: list[WeightFolder]
    base: WeightFolder | None
    importances: list[WeightFolder]
    entries: list[Entry]
    shards: list[Shard]
    findings: Findings

    @property
    def donor(self) -> WeightFolder:
        """The input whose configuration and companion files the result takes."""
        options = self.options
        if isinstance(options, PassthroughOptions):
            return self.models[options.outside]
        return self.base if self.base and self.plan.files_from == "base" else self.models[0]

    @property
    def inputs(self) -> list[WeightFolder]:
        """The models and, last, the base."""
        return [*self.models, *([self.base] if self.base else [])]

    @property
    def bytes(self) -> int:
        """Size of the result's weights."""
        return sum(shard.bytes for shard in self.shards)

    @property
    def threads(self) -> int:
        """Tensors merged at the same time."""
        mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return self.plan.threads or mine

    def source(self, entry: Entry, number: int = 0) -> Stored:
        """Where a tensor of an entry lies."""
        model, name = entry.sources[number]
        return self.models[model].tensors[name]

    def copied(self, entry: Entry) -> bool:
        """Whether the tensor is taken over instead of computed."""
        return self.merger.needs.structure or not self.source(entry).floating

    def peak(self) -> int:
        """Estimate of the bytes held at the worst moment: the largest groups that can be in work together."""
        groups = sorted((self._group_bytes(entry) for entry in self.entries), reverse=True)
        return sum(groups[: self.threads]) + self.threads * SPARE_BYTES

    def _group_bytes(self, entry: Entry) -> int:
        places = [self.source(entry, number) for number in range(len(entry.sources))]
        used = [self.base] if self.base and self.merger.needs.uses_base else []
        for folder in (*self.importances, *used):
            if entry.name in folder.tensors:
                places.append(folder.tensors[entry.name])
        mapped = sum(place.bytes for place in places)
        return mapped + places[0].bytes + 4 * places[0].count * (1 + self.merger.buffers)


def prepare(plan: MergePlan, parents_of: Lookup | None = None) -> Job:
    """Check everything that needs no weights.

    Args:
        plan: what to do.
        parents_of: parents of a model by id (None: unknown); by default the artifacts of the models' own sessions.

    Raises:
        ConfigError: the method, its options, or what it is given.
        ArtifactError: a folder is incomplete, the models do not fit together, or the output exists.
    """
    merger = MERGERS.get(plan.method)
    options = merger.build(plan.options)
    if os.path.lexists(plan.output):
        raise ArtifactError("exists already", where=str(plan.output), remedy="choose another output folder")
    paths = [*plan.models, *([plan.base] if plan.base else [])]
    opened = [WeightFolder.open(path, name) for path, name in zip(paths, _labels(paths))]
    models, base = opened[: len(plan.models)], opened[-1] if plan.base else None
    importances = [
        WeightFolder.open(path, f"importances of {model.name}", model=False)
        for path, model in zip(plan.importances, models)
    ]
    layers = max(layer_count(model.tensors) for model in models)
    supply = Supply(len(models), layers, base is not None, len(plan.importances))
    check_supply(merger, options, supply)
    candidates = [folder.candidate() for folder in opened]
    ancestor = candidates[-1] if base else None
    stacked = isinstance(options, PassthroughOptions)
    findings = check_models(candidates[: len(models)], ancestor, tokenizer=plan.tokenizer, stacked=stacked)
    _check_importances(models, importances)
    findings.notes.extend(check_lineage(candidates[: len(models)], ancestor, parents_of or _neighbours(opened)))
    entries = layout(options, [list(model.tensors) for model in models])
    typed = {entry.name: _announced(models, entry) for entry in entries}
    limit = sum(Stored(Path(), *kind).bytes for kind in typed.values()) if models[0].ours else plan.max_shard_bytes
    shards = make_shards(typed, max(limit, 1))
    job = Job(plan, merger, options, models, base, importances, entries, shards, findings)
    findings.notes.extend([*plan.notes, *_notes(job)])
    return job


def _labels(paths: Sequence[Path]) -> list[str]:
    """A short unique name for every folder: its own, or more of its path where two are called alike."""
    for depth in range(1, 8):
        labels = ["/".join(path.absolute().parts[-depth:]) for path in paths]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{path.name} (input {number})" for number, path in enumerate(paths)]


def _announced(models: Sequence[WeightFolder], entry: Entry) -> tuple[str, tuple[int, ...]]:
    """Type and shape of a result's tensor: those of the first model that has a part in it."""
    model, name = entry.sources[0]
    place = models[model].tensors[name]
    return place.dtype, place.shape


def _neighbours(folders: Sequence[WeightFolder]) -> Lookup:
    """Parents by id, as told by the artifacts that lie in the same sessions as the given ones."""
    known: dict[str, list[str]] | None = None

    def parents_of(model_id: str) -> list[str] | None:
        nonlocal known
        if known is None:
            known = {}
            for session in {f.path.absolute().parent.parent for f in folders if f.artifact}:
                for path in sorted(session.glob(f"*/*/{MANIFEST}")):
                    try:
                        manifest = Artifact.open(path.parent, verify=False).manifest
                    except ArtifactError:
                        continue  # not ours to judge: it is not part of the merge
                    known[manifest.model_id] = manifest.parents
        return known.get(model_id)

    return parents_of


def _check_importances(models: Sequence[WeightFolder], importances: Sequence[WeightFolder]) -> None:
    for model, folder in zip(models, importances):
        shapes = {name: place.shape for name, place in folder.tensors.items()}
        check_shapes((model.name, {n: p.shape for n, p in model.tensors.items()}), (folder.name, shapes), common=True)
        if not set(shapes) & set(model.tensors):
            what = f"none of its {len(shapes)} tensors is one of the model's"
            raise ArtifactError(what, where=folder.name, remedy="measure the importances on this model")


def _notes(job: Job) -> list[str]:
    notes = []
    if job.base and not job.merger.needs.uses_base:
        notes.append(f"{job.merger.name} does not compute with the base; it is checked and gives the configuration")
    absent = {e.name for e in job.entries if any(e.name not in f.tensors for f in job.importances)}
    if job.importances and absent:
        notes.append(f"{len(absent)} tensors have no importances and are merged without")
    kinds = sorted({torch_dtype(p.dtype) for m in job.models for p in m.tensors.values() if p.floating})
    if len(kinds) > 1:
        notes.append(f"models are stored in {', '.join(kinds)}; every tensor keeps the first model's type")
    if not _speaks(job.donor) and any(map(_speaks, job.models)):
        notes.append(f"{job.donor.name} has no chat template, others have; files_from = first takes the first model's")
    return notes


def _speaks(folder: WeightFolder) -> bool:
    """Whether it has a chat template."""
    if any((folder.path / name).is_file() for name in TEMPLATES):
        return True
    path = folder.path / "tokenizer_config.json"
    return path.is_file() and '"chat_template"' in path.read_text(encoding="utf-8")


def plan_text(plan: MergePlan, parents_of: Lookup | None = None) -> str:
    """What :func:`merge_folders` would do, from headers and configurations alone. Raises as :func:`prepare`."""
    job = prepare(plan, parents_of)
    options = job.options.model_dump(mode="json")
    lines = [f"{job.merger.name}: {job.merger.about}"]
    lines += [f"  {name} = {json.dumps(value)}" for name, value in options.items() if value not in ((), [])]
    if job.merger.needs.random:
        lines.append(f"  seed = {plan.seed}")
    for role, folder in [("model", m) for m in job.models] + ([("base", job.base)] if job.base else []):
        size = sum(place.bytes for place in folder.tensors.values())
        kind = folder.config.get("model_type", "unknown")
        lines.append(f"{role}  {folder.name}: {kind}, {folder.parameters:,} values, {readable(size)}")
    copied = sum(job.copied(entry) for entry in job.entries)
    files = "1 file" if len(job.shards) == 1 else f"{len(job.shards)} files"
    kind = "an artifact" if parents_in(job) else "a model folder without manifest"
    lines += [
        f"tensors  {len(job.entries) - copied} merged, {copied} copied",
        f"output  {plan.output}: {kind}, {readable(job.bytes)} in {files}; configuration of {job.donor.name}",
        f"memory  about {readable(job.peak())} at the peak with {job.threads} threads",
    ]
    lines += [f"differs  {name}: {told(values)}" for name, values in job.findings.traits.items()]
    return "\n".join([*lines, *(f"note  {note}" for note in job.findings.notes)])


def merge_folders(plan: MergePlan, parents_of: Lookup | None = None, show: Show | None = None) -> dict[str, Any]:
    """Merge model folders into a new one.

    Args:
        plan: what to do.
        parents_of: parents of a model by id, to judge the lineage; see :func:`prepare`.
        show: told the progress.

    Returns:
        The receipt: method, options, seed, inputs with content hashes, tensors, files, differences, notes, and the
        model's id when it is an artifact. What is on the model card, besides ``output`` and ``seconds``.

    Raises:
        ConfigError, ArtifactError: as :func:`prepare`; also NaN or infinite values, damaged inputs.
        ResourceError: disk full, or no permission. Nothing is left behind, whatever is raised.
    """
    began = time.perf_counter()
    job = prepare(plan, parents_of)
    require_free(plan.output, job.bytes, "the merged model")
    config = _output_config(job)
    receipt = receipt_of(job)

    def fill(folder: Path) -> None:
        _write_weights(job, folder, show)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        for name in COMPANIONS:
            if (job.donor.path / name).is_file():
                shutil.copyfile(job.donor.path / name, folder / name)

    if parents_in(job):
        manifest = manifest_of(job, receipt, config)
        receipt["model_id"] = manifest.model_id
        write_artifact(plan.output, fill, manifest, ArtifactExtras(readme=card(receipt)))
    else:

        def fill_with_card(folder: Path) -> None:
            fill(folder)
            (folder / CARD).write_text(card(receipt), encoding="utf-8")

        write_folder(plan.output, fill_with_card, job.bytes)
    return {**receipt, "output": str(plan.output), "seconds": time.perf_counter() - began}


def _write_weights(job: Job, folder: Path, show: Show | None) -> None:
    import torch

    from agent_forge.merging.operators import TensorGroup, merge_tensor

    writer = ShardWriter(folder, job.shards)
    labels = tuple(f.name for f in job.inputs)
    done = itertools.count(1)

    def merged(entry: Entry) -> Tensor:
        models = [job.models[model].read(name) for model, name in entry.sources]
        base = job.base.read(entry.name) if job.base and job.merger.needs.uses_base else None
        matters = None
        if job.importances and all(entry.name in folder.tensors for folder in job.importances):
            matters = [folder.read(entry.name) for folder in job.importances]
        group = TensorGroup(entry.name, models, base, matters, job.plan.seed, labels)
        return merge_tensor(job.merger, group, job.options)

    def work(entry: Entry) -> None:
        writer.put(entry.name, merged(entry))
        number = next(done)
        if show:
            show(number, len(job.entries))

    before = torch.get_num_threads()
    torch.set_num_threads(1)  # blocks are too small to share: threads of ours, not of each operation
    try:
        _run_all(work, job)
    finally:
        torch.set_num_threads(before)
    writer.close()


def _run_all(work: Callable[[Entry], None], job: Job) -> None:
    """Every entry, by as many threads as the plan says; the first error stops the rest."""
    if job.threads == 1:
        for entry in job.entries:
            work(entry)
        return
    with ThreadPoolExecutor(job.threads) as pool:
        futures = [pool.submit(work, entry) for entry in job.entries]
        try:
            wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        for future in futures:
            if future.done() and not future.cancelled():
                future.result()


def _output_config(job: Job) -> dict[str, Any]:
    """``config.json`` of the result: the donor's, told the new depth and the type the weights are stored in."""
    if isinstance(job.options, PassthroughOptions):
        config = stacked_config(job.options, [model.config for model in job.models])
    else:
        config = dict(job.donor.config)
    counts: dict[str, int] = {}
    for shard in job.shards:
        for place in shard.tensors.values():
            if place.floating:
                counts[place.dtype] = counts.get(place.dtype, 0) + place.count
    for key in ("dtype", "torch_dtype"):
        if key in config and counts:
            config[key] = torch_dtype(max(counts, key=counts.__getitem__))
    return config
