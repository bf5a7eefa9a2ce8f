"""Safetensors weights of a model folder, read and written tensor by tensor. Importing this module loads no torch.

Reading: a tensor is mapped into memory when it is asked for and unmapped when it is dropped. A handle of
``safetensors.safe_open`` keeps every page it has shown resident, so that the peak would grow to the size of the models.
Writing: all shapes are known beforehand, so the header goes first and every tensor straight to its place, in any order.

Format: eight bytes with the header's length, the header (JSON: dtype, shape, first and last byte of each tensor),
the bytes of the tensors without gaps.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent_forge.merging.check import Candidate
from forgekit.config import canonical_json
from forgekit.errors import ArtifactError
from forgekit.models.config import MODEL_CONFIGS
from forgekit.store.artifact import MANIFEST, Artifact
from forgekit.store.fsio import disk_errors, sha256_file, sync_file
from forgekit.store.packed import refuse_packed

if TYPE_CHECKING:
    from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
VOCABULARY_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "vocab.txt")
_LONGEST_HEADER = 100_000_000
HASHED_AT_ONCE = 2**23
"""Bytes of a file that are read and hashed in one piece."""

# Names of types in the format, in torch, and their bytes.
_TYPES = {
    "F64": ("float64", 8),
    "F32": ("float32", 4),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "I64": ("int64", 8),
    "I32": ("int32", 4),
    "I16": ("int16", 2),
    "I8": ("int8", 1),
    "U64": ("uint64", 8),
    "U32": ("uint32", 4),
    "U16": ("uint16", 2),
    "U8": ("uint8", 1),
    "BOOL": ("bool", 1),
}


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies on disk, or will."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int = 0

    @property
    def count(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """Size of the values."""
        return self.count * _TYPES[self.dtype][1]

    @property
    def floating(self) -> bool:
        """Whether its values are floating-point numbers."""
        return self.dtype.startswith(("F", "BF"))


def read_header(path: Path) -> dict[str, Stored]:
    """Names and places of all tensors in a file, in the order of the file.

    Raises:
        ArtifactError: missing, truncated, or not safetensors.
    """
    remedy = "copy the file again"
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = file.seek(0, 2)
            if size < 8 or length > min(_LONGEST_HEADER, size - 8):
                raise ArtifactError("not a safetensors file, or truncated", where=str(path), remedy=remedy)
            file.seek(8)
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        places = {name: _stored(path, entry, 8 + length) for name, entry in header.items()}
    except FileNotFoundError:
        raise ArtifactError("file is missing", where=str(path), remedy="copy the whole folder again") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"unreadable header ({error!r})", where=str(path), remedy=remedy) from None
    for name, (place, stop) in places.items():
        if place.start + place.bytes != stop or stop > size:
            raise ArtifactError(f"tensor {name} is truncated", where=str(path), remedy=remedy)
    return dict(sorted(((name, place) for name, (place, _) in places.items()), key=lambda item: item[1].start))


def _stored(path: Path, entry: Mapping[str, Any], data: int) -> tuple[Stored, int]:
    """The place that a header's entry names, and the byte after it."""
    if entry["dtype"] not in _TYPES:
        what = f"holds the type {entry['dtype']}, which cannot be merged"
        raise ArtifactError(what, where=str(path), remedy="store the model in a floating-point type")
    start, stop = entry["data_offsets"]
    return Stored(path, entry["dtype"], tuple(entry["shape"]), data + start), data + stop


def read_tensor(place: Stored) -> Tensor:
    """The tensor, mapped from its file; pages are read when they are looked at, and gone when it is dropped."""
    import numpy as np
    import torch

    name, width = _TYPES[place.dtype]
    if not place.bytes:
        return torch.empty(place.shape, dtype=getattr(torch, name))
    with disk_errors(place.file):
        raw = np.memmap(place.file, dtype=np.uint8, mode="c", offset=place.start, shape=(place.bytes,))
    data = torch.from_numpy(raw if place.start % width == 0 else np.array(raw))
    return data.view(getattr(torch, name)).reshape(place.shape)


@dataclass(frozen=True)
class WeightFolder:
    """A model folder, ours or Hugging Face's, of which only headers and configuration have been read.

    Attributes:
        path: the folder.
        name: for messages; unique among the models of a merge.
        config: ``config.json``; empty for a folder of importances.
        tensors: every tensor's place, in the order of the files.
        artifact: if it is one of ours.
    """

    path: Path
    name: str
    config: dict[str, Any]
    tensors: dict[str, Stored]
    artifact: Artifact | None = None

    @classmethod
    def open(cls, path: Path, name: str, model: bool = True) -> WeightFolder:
        """Read headers and configuration.

        Args:
            path: a folder, or a single safetensors file.
            name: for messages.
            model: whether a ``config.json`` must be there.

        Raises:
            ArtifactError: no such folder, no safetensors in it, or a file is missing or truncated.
        """
        with disk_errors(path):
            if not model and path.is_file():
                return cls(path, name, {}, read_header(path))
            if not path.is_dir():
                raise ArtifactError("no such folder", where=str(path), remedy="check the path")
            config = _read_config(path) if model else {}
            artifact = Artifact.open(path, verify=False) if (path / MANIFEST).is_file() else None
            return cls(path, name, config, _tensors(path), artifact)

    def read(self, name: str) -> Tensor:
        """One tensor, mapped into memory."""
        return read_tensor(self.tensors[name])

    @property
    def ours(self) -> bool:
        """Whether it is a model of one of our families, whose weights are always one file."""
        return self.config.get("model_type") in MODEL_CONFIGS

    @property
    def parameters(self) -> int:
        """Values in all tensors."""
        return sum(place.count for place in self.tensors.values())

    @property
    def weight_files(self) -> list[Path]:
        """The files its tensors lie in."""
        return sorted({place.file for place in self.tensors.values()})

    @cached_property
    def tokenizer(self) -> str | None:
        """Fingerprint of its vocabulary; see :func:`vocabulary_fingerprint`."""
        return vocabulary_fingerprint(self.path)

    def candidate(self) -> Candidate:
        """What can be checked before reading weights.

        Raises:
            ArtifactError: they are packed: codes cannot be averaged.
        """
        refuse_packed(self.path, "merged")
        shapes = {name: place.shape for name, place in self.tensors.items()}
        return Candidate(self.name, self.config, shapes, self.tokenizer, self.artifact and self.artifact.manifest)

    def content_hash(self, run: Callable[[Callable, Iterable[Path]], Iterable[str]] = map) -> str:
        """SHA-256 over the names and hashes of its weights, configuration and vocabulary; of an artifact, its own.

        Args:
            run: a ``map`` that may work in parallel.

        Raises:
            ArtifactError: a file of an artifact is not what its manifest says.
        """
        files = [*self.weight_files, *(self.path / n for n in ("config.json", *VOCABULARY_FILES))]
        files = [path for path in files if path.is_file()]
        root = self.path if self.path.is_dir() else self.path.parent
        with disk_errors(self.path):
            hashes = {p.relative_to(root).as_posix(): digest for p, digest in zip(files, run(_sha256, files))}
        if self.artifact is None:
            return hashlib.sha256(canonical_json(hashes).encode()).hexdigest()
        for name, digest in hashes.items():
            expected = self.artifact.manifest.files.get(name)
            if digest != expected:
                what = f"{name} is truncated or changed (sha256 {digest[:12]}…, manifest {str(expected)[:12]}…)"
                raise ArtifactError(what, where=str(self.path), remedy="copy the artifact again or make it anew")
        return self.artifact.content_hash


def _sha256(path: Path) -> str:
    """SHA-256 of a file, in long pieces: between two of them a thread waits for its turn, and while another one is
    busy importing torch that is a hundredth of a second each time."""
    digest, room = hashlib.sha256(), bytearray(HASHED_AT_ONCE)
    with open(path, "rb", buffering=0) as file:
        while count := file.readinto(room):
            digest.update(memoryview(room)[:count])
    return digest.hexdigest()


def _read_config(folder: Path) -> dict[str, Any]:
    """``config.json``; as :func:`forgekit.models.io.read_config`, whose module loads torch."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        remedy = "give an artifact or Hugging Face folder"
        raise ArtifactError("no model here", where=str(path), remedy=remedy) from None
    except ValueError as error:
        raise ArtifactError(f"unreadable ({error})", where=str(path), remedy="restore the artifact") from None
    if not isinstance(values, dict):
        raise ArtifactError("is no JSON object", where=str(path), remedy="restore the artifact")
    return values


def _tensors(folder: Path) -> dict[str, Stored]:
    """Places of all tensors of a folder; a single file goes before an index, as in transformers."""
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS)
    index = folder / INDEX
    if not index.is_file():
        others = [p.name for p in sorted(folder.glob("*.bin")) + sorted(folder.glob("*.pt*"))]
        what = f"no safetensors weights here{f', only {others[0]}' if others else ''}"
        raise ArtifactError(what, where=str(folder), remedy="save the model as safetensors (save_pretrained does)")
    try:
        placed: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"unreadable index ({error!r})", where=str(index), remedy="copy the folder again") from None
    tensors: dict[str, Stored] = {}
    for file in dict.fromkeys(placed.values()):
        tensors |= {name: place for name, place in read_header(folder / file).items() if placed.get(name) == file}
    for name, file in placed.items():
        if name not in tensors:
            raise ArtifactError(f"tensor {name} is missing", where=str(folder / file), remedy="copy the folder again")
    return tensors


def vocabulary_fingerprint(folder: Path) -> str | None:
    """SHA-256 of what the tokens are and how text is cut into them; None without a tokenizer.

    Of ``tokenizer.json`` only what decides ids counts: padding, truncation and the spelling of the file do not.
    """
    path = folder / "tokenizer.json"
    with disk_errors(folder):
        if not path.is_file():
            files = [folder / n for n in VOCABULARY_FILES if (folder / n).is_file()]
            hashes = {p.name: sha256_file(p) for p in files}
            return hashlib.sha256(canonical_json(hashes).encode()).hexdigest() if hashes else None
        try:
            values = json.loads(path.read_bytes())
            model = dict(values["model"])
            added = [[token["id"], token["content"]] for token in values.get("added_tokens") or []]
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"corrupt ({error!r})", where=str(path), remedy="restore the tokenizer") from None
    merges = [pair.split(" ", 1) if isinstance(pair, str) else pair for pair in model.get("merges") or []]
    parts = [values.get("normalizer"), values.get("pre_tokenizer"), model.get("vocab"), merges, added]
    return hashlib.sha256(canonical_json(parts).encode()).hexdigest()


@dataclass(frozen=True)
class Shard:
    """One file to write."""

    name: str
    tensors: dict[str, Stored]

    @property
    def bytes(self) -> int:
        """Size of the tensors, the header not counted."""
        return sum(place.bytes for place in self.tensors.values())


def make_shards(tensors: Mapping[str, tuple[str, tuple[int, ...]]], limit: int) -> list[Shard]:
    """Cut the tensors into files in Hugging Face's layout.

    Args:
        tensors: (dtype, shape) by name, in the order in which they are cut.
        limit: bytes per file; a larger tensor has a file of its own.
    """
    parts: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    room = limit
    for name, (dtype, shape) in tensors.items():
        need = Stored(Path(), dtype, shape).bytes
        if need > room and parts[-1]:
            parts.append({})
            room = limit
        parts[-1][name] = dtype, shape
        room -= need
    names = [WEIGHTS] if len(parts) == 1 else _shard_names(len(parts))
    return [Shard(name, _placed(name, part)) for name, part in zip(names, parts)]


def _shard_names(count: int) -> list[str]:
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def _placed(file: str, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, Stored]:
    """Places in a file: wide types first, so that every tensor is aligned, then by name."""
    places, start = {}, 0
    for name in sorted(tensors, key=lambda name: (-_TYPES[tensors[name][0]][1], name)):
        places[name] = Stored(Path(file), *tensors[name], start)
        start += places[name].bytes
    return places


class ShardWriter:
    """Writes the tensors of all shards to their places, in any order and from any thread.

    Args:
        folder: an existing folder.
        shards: what it will hold.

    Raises:
        ResourceError: disk full, or no permission.
    """

    def __init__(self, folder: Path, shards: Sequence[Shard]) -> None:
        self.folder, self.shards = folder, list(shards)
        self._places: dict[str, tuple[Shard, int]] = {}
        self._lock = threading.Lock()
        for shard in self.shards:
            header = _header(shard)
            with open(folder / shard.name, "xb") as file:
                file.write(header)
                file.truncate(len(header) + shard.bytes)
            self._places |= {name: (shard, len(header) + place.start) for name, place in shard.tensors.items()}

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, which must have the dtype and shape announced."""
        import torch

        shard, start = self._places[name]
        place = shard.tensors[name]
        assert (str(tensor.dtype), tuple(tensor.shape)) == (f"torch.{_TYPES[place.dtype][0]}", place.shape), name
        if not place.bytes:
            return
        data = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        with self._lock, open(self.folder / shard.name, "r+b") as file:
            file.seek(start)
            file.write(data)

    def close(self) -> None:
        """Write the index, when there is more than one file, and force everything to the disk."""
        if len(self.shards) > 1:
            placed = {name: shard.name for shard in self.shards for name in shard.tensors}
            index = {"metadata": {"total_size": sum(s.bytes for s in self.shards)}, "weight_map": placed}
            (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        for shard in self.shards:
            sync_file(self.folder / shard.name)


def _header(shard: Shard) -> bytes:
    """Length and header of a file, padded so that the tensors begin at a multiple of eight bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name, place in shard.tensors.items():
        offsets = [place.start, place.start + place.bytes]
        table[name] = {"dtype": place.dtype, "shape": list(place.shape), "data_offsets": offsets}
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def torch_dtype(dtype: str) -> str:
    """The name in torch of a type of the format."""
    return _TYPES[dtype][0]
