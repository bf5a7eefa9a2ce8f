"""Packed artifacts: a model in 1.6, 2 or 4 to 8 bits a weight inside safetensors, and back, tensor for tensor.

``model.safetensors`` of layout 1 holds, by name of the map or embedding:

======================  ================================================================================
tensor                  what it is
======================  ================================================================================
``NAME.codes``          ternary: uint8 (R, P), base 3 (five columns a byte) or 2 bits, see ``code``;
                        group-wise: uint8 (R, P), a stream of ``bits`` a column (:mod:`forgekit.quant.pack`)
``NAME.scale``          ternary: float16 (R,), or (1,) with one scale per tensor; group-wise: float16 (R, G)
any other               norms, biases, small maps: float16, or float32 where float16 has not the range or
                        :data:`forgekit.quant.model.KEPT` says so; integers as they are
======================  ================================================================================

A head tied to its embedding has no tensors. A file without ternary maps has neither ``code`` nor ``plan``: each of
its maps says its bits and group. The file's metadata has one key, ``forge_packed``: JSON of
:class:`Header`, with kind, shape, bits and group of every map and the CRC-32 of every tensor's bytes. ``config.json``
is that of the plain model with a section ``forge_quantization``, which holds the CRC-32 of the header, so no byte of
the file goes unchecked. In the folder of a Hugging Face model it also names ``transformers_weights`` that are no file:
transformers would otherwise open the folder with random weights.

Shapes: R rows, C columns, P bytes of a packed row, G groups of a row.
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from forgekit.config import Config, canonical_json
from forgekit.errors import ArtifactError, ConfigError
from forgekit.models.config import FAMILIES, MODEL_CONFIGS
from forgekit.models.io import hollow_model, hub_config, read_config, write_tokenizer
from forgekit.quant.config import GroupPlan, MapPlan, TernaryPlan
from forgekit.quant.grid import Ternary
from forgekit.quant.groupwise import Grouped
from forgekit.quant.layers import GroupedEmbedding, GroupedLinear, PackedLinear, TiedHead, is_conv1d
from forgekit.quant.model import is_packed, packed, quantised_modules, rest, rest_dtype, swap
from forgekit.quant.pack import pack2, pack3, pack_bits, unpack2, unpack3, unpack_bits
from forgekit.store.fsio import write_atomic

LAYOUT = 1
"""Version of the layout; a reader refuses a newer one."""
PIECE = 1 << 16
"""Codes that are unpacked at a time."""
SECTION, METADATA = "forge_quantization", "forge_packed"
ONLY_US = "packed by agent-forge: open with `agent-forge chat` or forgekit.models.io.read_model"
"""Where transformers looks for the name of the weights' file; it refuses this one and says so."""

Code = Literal["base3", "2bit"]
Crc = Annotated[int, Field(ge=0, lt=2**32)]
Size = Annotated[int, Field(gt=0, lt=2**31)]


class MapEntry(Config):
    """One packed map or embedding."""

    kind: Literal["ternary", "embedding", "linear", "tied"]
    """Ternary map; group-wise embedding or map; head that uses the embedding ``to``."""
    shape: tuple[Size, Size]
    """Rows and columns."""
    bits: Annotated[int, Field(ge=4, le=8)] | None = None
    """Bits of a group-wise code."""
    group: Size | None = None
    """Columns that share a scale."""
    sub_norm: bool = False
    """Whether a ternary map norms its inputs, with the gain ``NAME.gain``."""
    to: str = ""
    """The embedding that a tied head uses."""

    @model_validator(mode="after")
    def _complete(self):
        if self.kind in ("embedding", "linear") and None in (self.bits, self.group):
            raise ValueError(f"kind {self.kind} needs bits and group")
        return self


class Header(Config):
    """What the metadata of a packed file says."""

    layout: Literal[1] = LAYOUT
    """Version of the layout."""
    code: Code | None
    """How ternary codes are stored; null where there are none."""
    plan: TernaryPlan | None
    """The ternary grid; null where no map is ternary."""
    maps: dict[str, MapEntry]
    """Packed maps and embeddings by name."""
    crc32: dict[str, Crc]
    """CRC-32 of the bytes of every stored tensor, by name."""

    @model_validator(mode="after")
    def _described(self):
        ternary = any(entry.kind == "ternary" for entry in self.maps.values())
        if ternary and None in (self.code, self.plan):
            raise ValueError("ternary maps need code and plan")
        return self


def write_packed(
    model: nn.Module,
    tokenizer: Any,
    folder: Path,
    plan: MapPlan | None = None,
    groups: GroupPlan | None = None,
    code: Code = "base3",
) -> dict[str, int]:
    """Write a packed artifact: ``model.safetensors``, ``config.json`` and, when given, the tokenizer.

    Args:
        model: plain, in training for the grids, or packed (then ``plan`` and ``groups`` are its own).
        tokenizer: the model's, or None.
        folder: is made where missing.
        plan: grid of the linear maps; the default ternary plan unless given.
        groups: rounding of embedding and head; None stores them in float16.
        code: of ternary maps: ``base3`` is a fifth smaller, ``2bit`` is what memory holds.

    Returns:
        Bytes on disk by part: ``ternary``, ``grouped``, ``rest``, ``header`` and ``total`` (of model.safetensors).

    Raises:
        ArtifactError: no linear layers, or weights that are not finite.
        ResourceError: disk full, or no permission.
    """
    folder = Path(folder)
    model = model if is_packed(model) else packed(model, plan or TernaryPlan(), groups)
    ternary = next((module.plan for module in model.modules() if isinstance(module, PackedLinear)), None)
    maps, tensors, parts = _stored(model, code)
    grid = {"code": code, "plan": ternary} if ternary else {"code": None, "plan": None}
    described = Header(**grid, maps=maps, crc32={name: _crc(one) for name, one in tensors.items()})
    short = {"maps": {name: entry.model_dump(mode="json", exclude_defaults=True) for name, entry in maps.items()}}
    header = canonical_json(described.model_dump(mode="json") | short)
    data = save(tensors, metadata={METADATA: header})
    section = {"layout": LAYOUT, "method": _method(ternary)}
    section |= {name: value for name, value in described.model_dump(mode="json").items() if name in grid}
    section |= {"header_crc32": zlib.crc32(header.encode())}
    values = {**_plain_config(model), SECTION: section}
    if hasattr(model, "hf"):
        values["transformers_weights"] = ONLY_US
        if model.hf.generation_config is not None:
            text = model.hf.generation_config.to_json_string()
            write_atomic(folder / "generation_config.json", text.encode())
    write_atomic(folder / "model.safetensors", data)
    write_atomic(folder / "config.json", (json.dumps(values, indent=2) + "\n").encode())
    write_tokenizer(tokenizer, folder)
    return {**parts, "header": len(data) - sum(parts.values()), "total": len(data)}


def _method(plan: Any) -> str:
    return "ternary" if plan else "grouped"


def _plain_config(model: nn.Module) -> dict[str, Any]:
    return (
        json.loads(model.hf.config.to_json_string(use_diff=False)) if hasattr(model, "hf") else hub_config(model.config)
    )


def _stored(model: nn.Module, code: Code):
    """Map entries, tensors as stored, and bytes by part."""
    maps: dict[str, MapEntry] = {}
    tensors: dict[str, Tensor] = {}
    parts = Counter({"ternary": 0, "grouped": 0, "rest": 0})
    modules = quantised_modules(model)
    for name, module in modules.items():
        if isinstance(module, TiedHead):
            to = next(other for other, one in modules.items() if one is module.table)
            maps[name] = MapEntry(kind="tied", shape=tuple(module.table.codes.shape), to=to)
            continue
        if isinstance(module, PackedLinear):
            shape, part = (len(module.scale), module.columns), "ternary"
            entry = MapEntry(kind="ternary", shape=shape, sub_norm=module.gain is not None)
            codes = (pack3 if code == "base3" else pack2)(module.ternary.codes_RC)
            scale = module.scale[:1] if module.plan.per == "tensor" else module.scale
        else:
            kind, part = "embedding" if isinstance(module, GroupedEmbedding) else "linear", "grouped"
            entry = MapEntry(kind=kind, shape=tuple(module.codes.shape), bits=module.bits, group=module.group)
            codes, scale = pack_bits(module.codes, module.bits), module.scale
        maps[name] = entry
        tensors[f"{name}.codes"], tensors[f"{name}.scale"] = codes, scale.half()
        parts[part] += codes.nbytes + 2 * scale.numel()
    for name, tensor in rest(model):
        tensors[name] = tensor.detach().to(rest_dtype(name, tensor))
        parts["rest"] += tensors[name].nbytes
    return maps, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, dict(parts)


def _crc(tensor: Tensor) -> int:
    return zlib.crc32(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def read_packed(folder: Path) -> tuple[nn.Module, Any]:
    """Load a packed artifact and its tokenizer, on the CPU, in eval mode: the tensors that were written.

    Codes stay packed (two bits a weight); everything else is float32 in memory.

    Raises:
        ArtifactError: a file is missing, cut short or changed, of a newer layout, or its tensors do not fit
            ``config.json``; names the file or the tensor.
    """
    folder = Path(folder)
    values = read_config(folder)
    section = values.pop(SECTION, None)
    values.pop("transformers_weights", None)
    where = folder / "config.json"
    if not isinstance(section, dict):
        raise ArtifactError("holds no packed model", where=str(where), remedy="open it with read_model")
    _check_layout(section, where)
    path = folder / "model.safetensors"
    header, tensors = _read_tensors(path, section)
    with torch.device("cpu"):  # whatever device the caller makes things on
        model = skeleton(values, folder)
        _fill(model, header, tensors, path)
    return model.eval().requires_grad_(False), read_tokenizer(values, folder)


def _check_layout(section: dict[str, Any], where: Path) -> None:
    layout = section.get("layout")
    if not isinstance(layout, int) or layout < 1:
        raise ArtifactError(f"layout {layout!r} is none", where=str(where), remedy="restore the artifact")
    if layout > LAYOUT:
        what = f"packed layout {layout} is newer than {LAYOUT}, the newest this version reads"
        raise ArtifactError(what, where=str(where), remedy="upgrade agent-forge")


def _read_tensors(path: Path, section: dict[str, Any]) -> tuple[Header, dict[str, Tensor]]:
    """The checked header and tensors of a file."""
    remedy = "restore the artifact"
    try:
        with safe_open(str(path), "pt") as file:
            text = (file.metadata() or {}).get(METADATA)
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        raise ArtifactError("no weights here", where=str(path), remedy="use a complete artifact folder") from None
    except (SafetensorError, OSError, ValueError) as error:
        raise ArtifactError(f"cut short or corrupt ({error})", where=str(path), remedy=remedy) from None
    if text is None:
        what = f"has no {METADATA} metadata, but config.json says it is packed"
        raise ArtifactError(what, where=str(path), remedy=remedy)
    header = _header(text, section, path)
    for name in sorted(header.crc32.keys() | tensors.keys()):
        if name not in tensors or name not in header.crc32:
            what = "is missing" if name not in tensors else "is not in the header"
            raise ArtifactError(f"tensor {name} {what}", where=str(path), remedy=remedy)
        if _crc(tensors[name]) != header.crc32[name]:
            what = f"tensor {name} is not the one that was written (its CRC-32 differs)"
            raise ArtifactError(what, where=str(path), remedy=remedy)
    return header, tensors


def _header(text: str, section: dict[str, Any], path: Path) -> Header:
    """The header in the file, which is the one that config.json's section speaks of."""
    try:
        values = json.loads(text)
    except ValueError:
        values = None
    if not isinstance(values, dict):
        raise ArtifactError(f"{METADATA} is no JSON object", where=str(path), remedy="restore the artifact")
    _check_layout(values, path)
    if zlib.crc32(text.encode()) != section.get("header_crc32"):
        what = "its header is not the one that config.json was written with"
        raise ArtifactError(what, where=str(path), remedy="restore model.safetensors and config.json together")
    told = {"code": values.get("code"), "plan": values.get("plan"), "method": _method(values.get("plan"))}
    for key, value in told.items():
        if section.get(key) != value:
            what, where = f"{SECTION}.{key} is not what {path.name} says", path.with_name("config.json")
            raise ArtifactError(what, where=str(where), remedy=f"restore config.json and {path.name} together")
    try:
        return Header.build(values, source=str(path))
    except ConfigError as error:
        raise ArtifactError(error.what, where=error.where, remedy="restore the artifact") from None


def skeleton(values: dict[str, Any], folder: Path) -> nn.Module:
    """The plain model that ``config.json`` describes, with no weights in it yet and next to no memory used.

    Args:
        values: of ``config.json``.
        folder: where it is, for messages.

    Raises:
        ArtifactError: transformers cannot build such a model.
        ConfigError: our family refuses a value.
    """
    source = str(folder / "config.json")
    if values.get("model_type") in FAMILIES:
        config = MODEL_CONFIGS.get(values["model_type"]).build(values.get("forge", {}), source=source)
        return hollow_model(config)
    from forgekit.models.hf import HFCausalLM

    return HFCausalLM(_hf_skeleton(values, folder))


def _hf_skeleton(values: dict[str, Any], folder: Path) -> Any:
    """A transformers model of a configuration. Its memory is asked for but, unwritten, not yet used."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
    from transformers.initialization import no_init_weights

    from forgekit.hub import first_line

    refused = (OSError, ValueError, KeyError, RuntimeError, TypeError, ImportError, AttributeError)
    try:
        config = AutoConfig.for_model(**values)
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.tie_weights()
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(folder))
    except (*refused, StrictDataclassError) as error:
        what = f"no causal language model that transformers can build ({first_line(error)})"
        raise ArtifactError(what, where=str(folder / "config.json"), remedy="restore the artifact") from None
    return model


def read_tokenizer(values: dict[str, Any], folder: Path) -> Any:
    """The tokenizer of a folder with this ``config.json``, of the house or of Hugging Face."""
    if values.get("model_type") in FAMILIES:
        from forgekit.data.tokenizer import load_tokenizer

        return load_tokenizer(folder)
    from forgekit.hub import read_hf_tokenizer

    return read_hf_tokenizer(folder)


def _fill(model: nn.Module, header: Header, tensors: dict[str, Tensor], path: Path) -> None:
    """Put packed modules in their places and the other tensors into theirs; all of them, and no others."""
    left, plain = dict(tensors), dict(model.named_modules(remove_duplicate=False))
    tables: dict[str, nn.Module] = {}
    for name, entry in sorted(header.maps.items(), key=lambda item: item[1].kind == "tied"):
        source = plain.get(name)
        _check_place(source, name, entry, path)
        if entry.kind == "tied":
            if not isinstance(tables.get(entry.to), GroupedEmbedding):
                raise _misfit(name, f"is tied to {entry.to!r}, which is no packed embedding", path)
            module = TiedHead(tables[entry.to])
        else:
            codes, scale = (_taken(left, f"{name}.{part}", path) for part in ("codes", "scale"))
            module = _module(name, entry, (codes, scale), header, path)
        if isinstance(module, GroupedEmbedding):
            module.padding_idx = source.padding_idx
        if isinstance(module, PackedLinear | GroupedLinear):
            module.transposed = is_conv1d(source)
        if isinstance(module, PackedLinear):
            module.gain = torch.empty(entry.shape[1]) if entry.sub_norm else None  # comes with the rest, like a bias
        if getattr(source, "bias", None) is not None:
            module.bias = torch.empty(entry.shape[0])
        tables[name] = module
        swap(model, name, module)
    _fill_rest(model, left, path)


def _check_place(source: nn.Module | None, name: str, entry: MapEntry, path: Path) -> None:
    """The plain model has such a map, of that shape."""
    conv = source is not None and is_conv1d(source)
    if type(source) is not (nn.Embedding if entry.kind == "embedding" else nn.Linear) and not conv:
        raise _misfit(name, f"is a {entry.kind} map here, but config.json has none of that name", path)
    shape = tuple(source.weight.shape)
    shape = shape[::-1] if conv else shape
    if shape != entry.shape:
        raise _misfit(name, f"is {_by(entry.shape)}, but config.json makes it {_by(shape)}", path)


def _module(
    name: str, entry: MapEntry, stored: tuple[Tensor, Tensor], header: Header, path: Path
) -> PackedLinear | GroupedEmbedding | GroupedLinear:
    """The packed module of stored codes and scales; refuses what does not fit the entry."""
    (rows, columns), (codes, scale) = entry.shape, stored
    ternary = entry.kind == "ternary"
    if ternary:
        expected = (1,) if header.plan.per == "tensor" else (rows,)
    else:
        expected = (rows, -(-columns // entry.group))
    if tuple(scale.shape) != expected or scale.dtype != torch.float16:
        grouping = "" if ternary else f" in groups of {entry.group}"
        what = f"is {_by(scale.shape)}, but {rows} rows of {columns} columns{grouping} need {_by(expected)} in float16"
        raise _misfit(f"{name}.scale", what, path)
    if not (scale.isfinite() & (scale >= 0)).all():
        raise _misfit(f"{name}.scale", "holds NaN, infinite or negative scales", path)
    if codes.ndim != 2 or len(codes) != rows:
        raise _misfit(f"{name}.codes", f"is {_by(codes.shape)}, the scales have {rows} rows", path)
    try:
        if not ternary:
            unpacked = _in_pieces(unpack_bits, codes, columns, entry.bits)
            grouped = Grouped(unpacked, scale.clone(), entry.group, entry.bits)  # a view would keep the file mapped
            return GroupedEmbedding(grouped) if entry.kind == "embedding" else GroupedLinear(grouped, None)
        unpacked = _in_pieces(unpack3 if header.code == "base3" else unpack2, codes, columns)
    except ArtifactError as error:
        raise _misfit(f"{name}.codes", error.what, path) from None
    return PackedLinear(Ternary(unpacked, scale.float()[:, None].expand(rows, 1)), None, header.plan)


def _in_pieces(unpack: Callable[..., Tensor], codes_RP: Tensor, columns: int, *bits: int) -> Tensor:
    """A whole matrix unpacked some rows at a time: what that takes besides the result stays small."""
    unpacked_RC, step = torch.empty(len(codes_RP), columns, dtype=torch.int8), max(1, PIECE // columns)
    for start in range(0, len(codes_RP), step):
        unpacked_RC[start : start + step] = unpack(codes_RP[start : start + step], columns, *bits)
    return unpacked_RC


def _fill_rest(model: nn.Module, left: dict[str, Tensor], path: Path) -> None:
    """Tensors that are not packed, as float32; then buffers that no file holds: in our layers they start at zero."""
    places = dict(rest(model))
    for name in sorted(places.keys() | left.keys()):
        if name not in left or name not in places:
            raise _misfit(name, "is missing" if name not in left else "has no place in the model", path)
        value, place = left[name], places[name]
        if value.shape != place.shape:
            raise _misfit(name, f"is {_by(value.shape)}, but config.json makes it {_by(place.shape)}", path)
        if value.dtype not in ((torch.float16, torch.float32) if place.is_floating_point() else (place.dtype,)):
            raise _misfit(name, f"is stored as {value.dtype}", path)  # no checksum covers the table of types
        if value.is_floating_point():
            if not value.isfinite().all():
                raise _misfit(name, "holds NaN or infinite values", path)
            value = value.to(torch.float32, copy=True)  # a view would keep the file mapped
        _place(model, name, value)
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype)  # "like" imports a compiler


def _place(model: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter or buffer; in place where it has memory, which another name may share."""
    owner, _, leaf = name.rpartition(".")
    module = model.get_submodule(owner)
    store = module._parameters if leaf in module._parameters else module._buffers
    if store[leaf].is_meta:
        store[leaf] = nn.Parameter(value, requires_grad=False) if store is module._parameters else value
    else:
        store[leaf].data.copy_(value)


def _taken(left: dict[str, Tensor], name: str, path: Path) -> Tensor:
    if name not in left:
        raise _misfit(name, "is missing", path)
    return left.pop(name)


def _misfit(name: str, what: str, path: Path) -> ArtifactError:
    return ArtifactError(f"tensor {name} {what}", where=str(path), remedy="restore model.safetensors and config.json")


def _by(shape: Any) -> str:
    return "x".join(map(str, shape)) or "a number"
