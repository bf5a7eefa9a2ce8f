"""Export to GGUF, the file of llama.cpp, for models whose computation one of its graphs performs exactly.

Which those are and how weights are rearranged is :mod:`agent_forge.export.gguf_layout`'s; here are the tokenizer, the
types of the tensors and the file.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from agent_forge.export.gguf_layout import Entry, Layout, check_settings, layout_of
from agent_forge.export.hf import ExportPlan, Show, prepare
from agent_forge.merging.folders_weights import WeightFolder
from forgekit.compute.disk import require_free
from forgekit.data.tokenizer import CHAT_TEMPLATE, END, PAD, load_tokenizer
from forgekit.errors import ArtifactError, ConfigError
from forgekit.store.fsio import disk_errors, fsync_dir, make_folder, sync_file, temporary_for
from forgekit.version import __version__

if TYPE_CHECKING:
    import numpy as np

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5
"""GGUF's token types."""
_FILE_TYPES = {"float32": 0, "float16": 1, "q8_0": 7, "tq2_0": 37}
_DIGITS = {"type": "Digits", "individual_digits": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
PRE_TOKENIZERS = {"smollm": {"type": "Sequence", "pretokenizers": [_DIGITS, _BYTES]}, "gpt-2": _BYTES}
"""llama.cpp's names of the rules that cut text before the merges, with the same rules in ``tokenizer.json``."""
_HEADROOM = 1_000_000


class GGUFPlan(ExportPlan):
    """What to export, to which file and in which type; the size of shards has no meaning here."""

    output: Path
    """The file, NAME.gguf; must not exist."""
    dtype: Literal["float32", "float16", "q8_0", "tq2_0"] | None = None
    """Type of the matrices (norms stay float32); q8_0 shares a scale among 32 values of 8 bits, tq2_0 one among 256
    ternary ones. Unset: float16 if all weights are stored so, else float32."""

    @field_validator("output")
    @classmethod
    def _named(cls, output: Path) -> Path:
        if output.suffix != ".gguf":
            raise ValueError("must end in .gguf")
        return output


def export_gguf(plan: GGUFPlan, show: Show | None = None) -> dict[str, Any]:
    """Write the model as one GGUF file with its tokenizer.

    Returns:
        what was written, as JSON-able values. ``largest_rounding`` is against the rearranged weights in float32.

    Raises:
        ArtifactError: the target exists; the source is incomplete, damaged or not a causal language model.
        ConfigError: a setting of the model or tokenizer has no exact place in llama.cpp, the type cannot hold the
            weights, or the package ``gguf`` is missing.
        ResourceError: the disk is full or may not be written to.
    """
    began = time.perf_counter()
    library = _library()
    check_settings(WeightFolder.open(plan.source, plan.source.name).config, plan.source)
    folder = prepare(ExportPlan(source=plan.source, output=plan.output)).folder
    layout = layout_of(folder)
    rows = layout.fields["vocab_size"]
    dtype = plan.dtype or _dtype_of(folder)
    types = {entry.name: stored_type(entry, dtype) for entry in layout.entries}
    fields = {**_general(folder, layout, dtype), **layout.extra, **vocabulary(folder, rows)}
    need = sum(_bytes(library, entry, types[entry.name]) for entry in layout.entries)
    require_free(plan.output, need + _HEADROOM + 200 * rows, "the export")
    with _appearing(plan.output, need) as work:
        rounded = _write(library, work, layout, fields, types, show)
    model_id = folder.artifact.manifest.model_id if folder.artifact else None
    return {
        "format": "gguf",
        "source": str(plan.source),
        "model_id": model_id,
        "output": str(plan.output),
        "architecture": layout.arch,
        "dtype": dtype,
        "types": {name: sum(1 for other in types.values() if other == name) for name in sorted(set(types.values()))},
        "values": sum(entry.count for entry in layout.entries),
        "source_values": folder.parameters,
        "largest_rounding": rounded,
        "notes": list(layout.notes),
        "bytes": plan.output.stat().st_size,
        "files": {plan.output.name: plan.output.stat().st_size},
        "seconds": time.perf_counter() - began,
    }


def _library() -> Any:
    """The package that writes GGUF.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise ConfigError(
            "the package gguf is missing", where="--format gguf", remedy="run `pip install gguf`"
        ) from None
    return gguf


# Tokenizer ------------------------------------------------------------------------------------------------------------


def vocabulary(folder: WeightFolder, rows: int) -> dict[str, Any]:
    """The ``tokenizer.`` fields; rows of the embedding without a token get a name that no text is cut into.

    Raises:
        ConfigError: llama.cpp would cut text otherwise; the part of ``tokenizer.json`` is named.
    """
    if folder.ours:
        backend = load_tokenizer(folder.path)
        ids = {"eos": backend.token_to_id(END), "padding": backend.token_to_id(PAD), "bos": None}
        template = CHAT_TEMPLATE
    else:
        from forgekit.hub import read_hf_tokenizer

        read = read_hf_tokenizer(folder.path)
        backend, fast = read.backend, read.fast
        ids = {"eos": fast.eos_token_id, "padding": fast.pad_token_id, "bos": fast.bos_token_id}
        template = fast.chat_template if isinstance(fast.chat_template, str) else None
    spec = json.loads(backend.to_str())
    pre = pre_tokenizer(spec, str(folder.path / "tokenizer.json"))
    tokens, types = _tokens(spec, rows)
    ids["bos"] = ids["eos"] if ids["bos"] is None else ids["bos"]  # unset, llama.cpp takes token 11
    begins, ends = _framing(backend, ids, str(folder.path / "tokenizer.json"))
    fields = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]],
        "tokenizer.ggml.add_bos_token": begins,
        "tokenizer.ggml.add_eos_token": ends,
        "tokenizer.ggml.add_space_prefix": False,
    }
    fields |= {f"tokenizer.ggml.{name}_token_id": value for name, value in ids.items() if value is not None}
    return fields | ({"tokenizer.chat_template": template} if template else {})


def pre_tokenizer(spec: dict[str, Any], where: str) -> str:
    """llama.cpp's name of the rules that cut text in this ``tokenizer.json``.

    Raises:
        ConfigError: it has none that cuts alike, or another part of the tokenizer changes text.
    """
    model, remedy = spec["model"], "use --format hf: llama.cpp would cut text into other tokens"
    odd = [name for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix") if model.get(name)]
    odd += [name for name in ("byte_fallback", "ignore_merges") if model.get(name)]
    if model.get("type") != "BPE" or odd:
        what = f"the tokenizer is {model.get('type')}{' with ' + ', '.join(odd) if odd else ''}, not plain BPE of bytes"
        raise ConfigError(what, where=where, remedy=remedy)
    if spec.get("normalizer"):
        raise ConfigError(f"normalizer {spec['normalizer'].get('type')}", where=where, remedy=remedy)
    strict = [t["content"] for t in spec["added_tokens"] if t["lstrip"] or t["rstrip"] or t["single_word"]]
    if strict:
        raise ConfigError(f"token {strict[0]!r} takes the spaces around it", where=where, remedy=remedy)
    rules = _without_offsets(spec.get("pre_tokenizer"))
    for name, known in PRE_TOKENIZERS.items():
        if rules == known:
            return name
    raise ConfigError(f"pre_tokenizer {json.dumps(rules)[:120]} is not known", where=where, remedy=remedy)


def _without_offsets(rules: Any) -> Any:
    """The rules without what changes reported positions only."""
    if isinstance(rules, dict):
        return {key: _without_offsets(value) for key, value in rules.items() if key != "trim_offsets"}
    return [_without_offsets(rule) for rule in rules] if isinstance(rules, list) else rules


def _tokens(spec: dict[str, Any], rows: int) -> tuple[list[str], list[int]]:
    tokens = [f"[PAD{i}]" for i in range(rows)]
    types = [UNUSED] * rows
    for token, i in spec["model"]["vocab"].items():
        tokens[i], types[i] = token, NORMAL
    for added in spec["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = CONTROL if added["special"] else USER_DEFINED
    return tokens, types


def _framing(backend: Any, ids: dict[str, int | None], where: str) -> tuple[bool, bool]:
    """Whether the tokenizer puts a first and a last token around a text."""
    bare, framed = backend.encode("a", add_special_tokens=False).ids, backend.encode("a").ids
    for begins in (False, True):
        for ends in (False, True):
            if framed == [ids["bos"]] * begins + bare + [ids["eos"]] * ends:
                return begins, ends
    what = f"post_processor adds tokens ({framed} for {bare}) that are not the first and last one of the vocabulary"
    raise ConfigError(what, where=where, remedy="use --format hf")


# The file -------------------------------------------------------------------------------------------------------------


def _dtype_of(folder: WeightFolder) -> str:
    stored = {place.dtype for place in folder.tensors.values() if place.floating}
    return "float16" if stored == {"F16"} else "float32"


def stored_type(entry: Entry, dtype: str) -> str:
    """GGML's name of the type that an entry is stored in.

    Rows that 32 does not divide stay float16 under q8_0; tables stay float16 under tq2_0.

    Raises:
        ConfigError: a row of a ternary map is not a multiple of 256.
    """
    if entry.kind == "vector" or dtype == "float32":
        return "F32"
    if dtype == "q8_0" and entry.shape[1] % 32 == 0:
        return "Q8_0"
    if dtype == "tq2_0" and entry.kind == "map":
        if entry.shape[1] % 256:
            what = f"rows of {entry.name} have {entry.shape[1]} values, tq2_0 packs 256"
            raise ConfigError(what, where="--dtype", remedy="use q8_0")
        return "TQ2_0"
    return "F16"


def _bytes(library: Any, entry: Entry, kind: str) -> int:
    block, size = library.GGML_QUANT_SIZES[library.GGMLQuantizationType[kind]]
    return entry.count // block * size


def _general(folder: WeightFolder, layout: Layout, dtype: str) -> dict[str, Any]:
    manifest = folder.artifact.manifest if folder.artifact else None
    fields = {
        "general.type": "model",
        "general.name": manifest.model_name if manifest else folder.path.name,
        "general.file_type": _FILE_TYPES[dtype],
        "general.quantization_version": 2,
        "agent_forge.exported_with": __version__,
        "agent_forge.family": folder.config["model_type"],
    }
    if manifest:
        fields["agent_forge.model_id"] = manifest.model_id
    return fields | {f"{layout.arch}.{name}": value for name, value in layout.fields.items()}


@contextmanager
def _appearing(output: Path, need: int) -> Iterator[Path]:
    """A temporary file beside ``output`` that takes its name when everything has been written."""
    make_folder(output.parent)
    work = temporary_for(output)
    with disk_errors(output.parent, need=need):
        try:
            yield work
            sync_file(work)
            os.rename(work, output)
        except BaseException:
            work.unlink(missing_ok=True)
            raise
        fsync_dir(output.parent)


def _write(library: Any, path: Path, layout: Layout, fields: dict, types: dict[str, str], show: Show | None) -> float:
    """Write header, fields and tensors, one tensor in memory at a time; returns the largest change by rounding."""
    writer = library.GGUFWriter(path, layout.arch)
    try:
        for key, value in fields.items():
            _add(writer, key, value)
        for entry in layout.entries:
            kind = library.GGMLQuantizationType[types[entry.name]]
            size = _bytes(library, entry, types[entry.name])
            writer.add_tensor_info(entry.name, entry.shape, None, size, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        rounded = 0.0
        for number, entry in enumerate(layout.entries, 1):
            data, change = converted(library, entry, types[entry.name])
            rounded = max(rounded, change)
            try:
                writer.write_tensor_data(data)
            except OSError as error:  # numpy tells a short write without the system's number for it
                raise error if error.errno else OSError(errno.ENOSPC, "no space left on device") from None
            if show:
                show(number, len(layout.entries))
    finally:
        writer.close()
    return rounded


def _add(writer: Any, key: str, value: Any) -> None:
    """A field of the type that its value has; whole numbers are 32 bits without a sign."""
    add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    add.get(type(value), writer.add_array)(key, value)


def converted(library: Any, entry: Entry, kind: str) -> tuple[np.ndarray, float]:
    """The bytes of one tensor, and the largest change of a value.

    Raises:
        ArtifactError: values that are not finite.
        ConfigError: float16 cannot hold them, or weights to be packed as ternary are not ternary.
    """
    import numpy as np

    values = np.ascontiguousarray(entry.make().numpy(), dtype=np.float32)
    assert values.shape == entry.shape, f"{entry.name} is {values.shape}, not {entry.shape}"
    if not np.isfinite(values).all():
        what = f"tensor {entry.name} holds values that are not finite"
        raise ArtifactError(what, where="export", remedy="its training diverged: export an earlier model")
    with np.errstate(over="ignore"):  # told below
        data = library.quantize(values, library.GGMLQuantizationType[kind])
    change = float(np.abs(library.dequantize(data, library.GGMLQuantizationType[kind]) - values).max(initial=0.0))
    if not np.isfinite(change):
        what = f"16 bits cannot hold {float(np.abs(values).max()):.3g} of tensor {entry.name}"
        raise ConfigError(what, where="--dtype", remedy="use float32")
    if kind == "TQ2_0" and change > 2.0**-10 * float(np.abs(values).max(initial=0.0)):
        what = f"tensor {entry.name} is not ternary: packing would change a weight by {change:.3g}"
        raise ConfigError(what, where="--dtype", remedy="use q8_0, or quantise the model with training first")
    return data, change
