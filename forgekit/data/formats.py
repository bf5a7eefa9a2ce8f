"""Files of rows in, token bins in and out.

``read_rows`` turns any supported file into plain mappings, one at a time; ``TokenBin`` keeps a tokenised corpus on
disk and maps it into memory. Whatever is wrong with a file is told in one line that names the file and the line,
row or byte.

A *row* of a training set is ``{"text": ...}`` or ``{"prompt": ..., "answer": ...}``; ``row_text`` is what of it a
model reads.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import hashlib
import json
import lzma
import os
import re
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np

from forgekit.errors import DataError, ResourceError

DOCUMENT_END = "<|endoftext|>"
_BATCH = 1024
_DAMAGED = (lzma.LZMAError, gzip.BadGzipFile, zlib.error, EOFError)
_OPENERS: dict[str, Callable[..., IO[bytes]]] = {".xz": lzma.open, ".gz": gzip.open}
_SPACE = re.compile(r"\s*")


def row_text(row: dict[str, Any]) -> str:
    """What a model reads of a row: its text, or prompt and answer with a space (or the prompt's line break) between."""
    if "text" in row:
        return row["text"]
    return f"{row['prompt']}{'' if row['prompt'].endswith(chr(10)) else ' '}{row['answer']}"


def read_rows(path: Path | str, *, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """Read a data file row by row.

    JSON is a list of objects, an object holding one under ``data`` or ``rows``, or one object a line; CSV and TSV take
    their keys from the first line (TSV knows no quoting); HDF5 columns are the top-level data sets; plain text gives
    one ``{"text": ...}`` per document, documents ending at a ``<|endoftext|>`` line. Text formats may be compressed
    (``.xz``, ``.gz``). Only JSON is held in memory as a whole.

    Args:
        path: the file; its ending decides the format.
        limit: stop after this many rows.

    Raises:
        DataError: missing, empty, binary, not UTF-8 (with the byte offset), malformed (with the line or row), of an
            unknown format, or in need of a package that is not installed.
    """
    path = Path(path)
    reader = _reader_for(path)
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise DataError("no such file", where=str(path), remedy="check the path") from None
    except OSError as error:
        raise _unreadable(path, error) from None
    if path.is_dir():
        raise DataError("is a folder", where=str(path), remedy="name a file in it")
    if size == 0:
        raise _empty(path, "is empty")
    return islice(_at_least_one(path, reader(path)), limit)


def is_readable(path: Path) -> bool:
    """Whether the file's ending is one that ``read_rows`` knows."""
    ending, packed = _ending(path)
    return ending in _READERS and not (packed and ending in _UNPACKED_ONLY)


def _ending(path: Path) -> tuple[str, str]:
    """The format's ending and the compression's, e.g. ('.jsonl', '.xz')."""
    packed = path.suffix.lower() if path.suffix.lower() in _OPENERS else ""
    return (Path(path.stem) if packed else path).suffix.lower(), packed


def _reader_for(path: Path) -> Callable[[Path], Iterator[dict[str, Any]]]:
    ending, packed = _ending(path)
    if packed and ending in _UNPACKED_ONLY:
        raise DataError(f"{ending} cannot be read from inside {packed}", where=str(path), remedy="unpack it first")
    if ending not in _READERS:
        near = difflib.get_close_matches(ending, _READERS, n=2, cutoff=0.5)
        remedy = f"did you mean {' or '.join(near)}?" if near else f"use one of {', '.join(_READERS)}"
        raise DataError(f"unknown file ending {ending!r}", where=str(path), remedy=remedy)
    return _READERS[ending]


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"cannot be read ({error.strerror or error})", where=str(path), remedy="check its permissions")


def _empty(path: Path, what: str) -> DataError:
    return DataError(what, where=str(path), remedy="give a file with at least one row")


def _at_least_one(path: Path, rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    first = next(rows, None)
    if first is None:
        raise _empty(path, "holds no rows")
    yield from chain([first], rows)


def _lines(path: Path) -> Iterator[str]:
    """Decoded lines with their line breaks as ``\\n``; a byte-order mark is dropped."""
    offset = 0
    try:
        with _OPENERS.get(path.suffix.lower(), open)(path, "rb") as file:
            if (nul := file.read(8192).find(b"\0")) >= 0:
                raise _binary(path, nul)
            file.seek(0)
            for line in file:
                yield _decoded(path, line, offset)
                offset += len(line)
    except _DAMAGED as error:
        remedy = "fetch or pack the file again"
        raise DataError(f"damaged {path.suffix} archive ({error})", where=str(path), remedy=remedy) from None
    except OSError as error:
        raise _unreadable(path, error) from None


def _decoded(path: Path, line: bytes, offset: int) -> str:
    if (nul := line.find(b"\0")) >= 0:
        raise _binary(path, offset + nul)
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        remedy = "save the file as UTF-8"
        raise DataError(f"not UTF-8 at byte {offset + error.start}", where=str(path), remedy=remedy) from None
    text = text.removeprefix("\ufeff") if offset == 0 else text
    return f"{text[:-2]}\n" if text.endswith("\r\n") else text


def _binary(path: Path, offset: int) -> DataError:
    return DataError(f"binary, not text (NUL at byte {offset})", where=str(path), remedy="give UTF-8 text")


def _malformed(path: Path, line: int, why: str) -> DataError:
    return DataError(f"line {line} is malformed: {why}", where=str(path), remedy="mend or remove that line")


def _not_a_row(path: Path, place: str, value: Any) -> DataError:
    what = f"{place} holds a {type(value).__name__}, not an object"
    return DataError(what, where=str(path), remedy='write every row as {"key": value, ...}')


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Objects of a JSON file; those of a plain list are decoded one by one."""
    text = "".join(_lines(path))
    at = _after_space(text, 0)
    try:
        if not text.startswith("[", at):
            yield from _whole_rows(path, text) if at < len(text) else ()
            return
        decode, row = json.JSONDecoder().raw_decode, 0
        at = _after_space(text, at + 1)
        while not text.startswith("]", at):
            if row and not text.startswith(",", at):
                raise json.JSONDecodeError("expecting ',' or ']'", text, at)
            value, at = decode(text, _after_space(text, at + 1) if row else at)
            row += 1
            if not isinstance(value, dict):
                raise _not_a_row(path, f"row {row}", value)
            yield value
            at = _after_space(text, at)
        if rest := text[at + 1 :].strip():
            raise json.JSONDecodeError(f"extra data {rest[:20]!r}", text, at + 1)
    except json.JSONDecodeError as error:
        raise _malformed(path, error.lineno, error.msg) from None


def _after_space(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()


def _whole_rows(path: Path, text: str) -> Iterator[dict[str, Any]]:
    """Rows of a JSON file that does not begin with a list; several objects in turn are JSON Lines by another name."""
    try:
        return _wrapped_rows(path, json.loads(text))
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise
        return _jsonl_rows(path)


def _wrapped_rows(path: Path, value: Any) -> Iterator[dict[str, Any]]:
    """Rows of ``{"data": [...]}`` or ``{"rows": [...]}``; the hub's ``{"row_idx", "row"}`` wrapping is taken off."""
    if isinstance(value, dict):
        rows = next((value[key] for key in ("data", "rows") if isinstance(value.get(key), list)), None)
        if rows is None:
            what = f"holds one object with the keys {', '.join(list(value)[:6])}"
            raise DataError(what, where=str(path), remedy='put the rows in a list, or in a list under "data"')
        value = rows
    elif not isinstance(value, list):
        raise _not_a_row(path, "the file", value)
    for number, row in enumerate(value, 1):
        row = row["row"] if isinstance(row, dict) and "row_idx" in row and "row" in row else row
        if not isinstance(row, dict):
            raise _not_a_row(path, f"row {number}", row)
        yield row


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise _malformed(path, number, f"{error.msg} at column {error.colno}") from None
        if not isinstance(row, dict):
            raise _not_a_row(path, f"line {number}", row)
        yield row


def _csv_rows(path: Path) -> Iterator[dict[str, Any]]:
    tabs = _ending(path)[0] == ".tsv"
    quoting = csv.QUOTE_NONE if tabs else csv.QUOTE_MINIMAL
    # Documents are longer than the module's default field limit of 128 KiB; the limit is global, so it is only raised.
    csv.field_size_limit(max(csv.field_size_limit(), 2**31 - 1))
    table = csv.reader(_lines(path), delimiter="\t" if tabs else ",", quoting=quoting, strict=True)
    try:
        names = next(table, [])
        if len(set(names)) < len(names):
            raise _malformed(path, 1, "two columns have one name")
        for values in table:
            if values and len(values) != len(names):
                raise _malformed(path, table.line_num, f"{len(values)} fields where {len(names)} are named")
            if values:
                yield dict(zip(names, values))
    except csv.Error as error:
        raise _malformed(path, table.line_num, str(error)) from None


def _text_rows(path: Path) -> Iterator[dict[str, Any]]:
    document: list[str] = []
    for line in chain(_lines(path), [DOCUMENT_END]):
        if line.strip() != DOCUMENT_END:
            document.append(line)
            continue
        text = "".join(document).strip("\n")
        if text.strip():
            yield {"text": text}
        document = []


def _needs(path: Path, package: str) -> DataError:
    remedy = "run `pip install agent-forge[data]`"
    return DataError(f"reading {path.suffix} needs the package {package}", where=str(path), remedy=remedy)


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise _needs(path, "pyarrow") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"not a readable Parquet file ({error})", where=str(path), remedy="write it again") from None


def _hdf5_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        import h5py
    except ImportError:
        raise _needs(path, "h5py") from None
    try:
        with h5py.File(path, "r") as file:
            columns = {name: item for name, item in file.items() if isinstance(item, h5py.Dataset) and item.shape}
            lengths = {name: len(item) for name, item in columns.items()}
            if len(set(lengths.values())) > 1:
                shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
                raise DataError(f"columns differ in length ({shown})", where=str(path), remedy="make them equal")
            texts = {name: item.asstr() for name, item in columns.items() if h5py.check_string_dtype(item.dtype)}
            for start in range(0, next(iter(lengths.values()), 0), _BATCH):
                parts = [texts.get(name, item)[start : start + _BATCH].tolist() for name, item in columns.items()]
                yield from (dict(zip(columns, values)) for values in zip(*parts))
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"not a readable HDF5 file ({error})", where=str(path), remedy="write it again") from None


_READERS: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".csv": _csv_rows,
    ".tsv": _csv_rows,
    ".parquet": _parquet_rows,
    ".h5": _hdf5_rows,
    ".hdf5": _hdf5_rows,
    ".txt": _text_rows,
}
_UNPACKED_ONLY = {".parquet", ".h5", ".hdf5"}


class TokenBin:
    """A tokenised corpus on disk, mapped into memory.

    The file holds the token ids and nothing else, little-endian, two bytes each for vocabularies below 65,536 and four
    otherwise. Beside it, ``<file>.json`` says dtype, count, vocabulary size and SHA-256; it is written last, so a bin
    without it is unfinished. ``bin[i:j]`` is a read-only array that is not copied.

    Args:
        path: the bin.

    Raises:
        DataError: the bin or its header is missing, damaged, or the bin is not as long as the header says.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        header = _read_header(self.path)
        self.vocab_size: int = header["vocab_size"]
        self.sha256: str = header["sha256"]
        kind = np.dtype(header["dtype"]).newbyteorder("<")
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise _unreadable(self.path, error) from None
        if size != header["count"] * kind.itemsize:
            what = f"holds {size} bytes where {header['count'] * kind.itemsize} were written"
            raise DataError(what, where=str(self.path), remedy="write the bin again")
        self._tokens = np.memmap(self.path, dtype=kind, mode="r")

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, place: int | slice) -> np.ndarray:
        return self._tokens[place]

    def verify(self) -> None:
        """Read the whole bin and compare its hash.

        Raises:
            DataError: the content is not what was written.
        """
        with self.path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise DataError("content differs from its hash", where=str(self.path), remedy="write the bin again")

    @classmethod
    def write(cls, path: Path | str, tokens: np.ndarray | Iterable[Any], vocab_size: int) -> TokenBin:
        """Write a bin, piece by piece, and open it.

        Args:
            path: where to; an older bin there is replaced at once or not at all.
            tokens: one array of ids, or any iterable of arrays, lists or single ids.
            vocab_size: every id is below it.

        Raises:
            DataError: no tokens, an id outside the vocabulary, or values that are not integers.
            ResourceError: the disk is full or the folder cannot be written.
        """
        path = Path(path)
        kind = np.dtype("<u2" if vocab_size < 65536 else "<u4")
        digest, count = hashlib.sha256(), 0
        with _replaced(path) as file:
            for piece in [tokens] if isinstance(tokens, np.ndarray) else tokens:
                data = _checked(path, np.atleast_1d(np.asarray(piece)), vocab_size).astype(kind).tobytes()
                digest.update(data)
                count += len(data) // kind.itemsize
                file.write(data)
            if not count:
                raise DataError("no tokens to write", where=str(path), remedy="check the corpus it was made from")
            # A crash between the two renames must leave a bin without header, never one with another's.
            _header_path(path).unlink(missing_ok=True)
        header = {"dtype": kind.name, "count": count, "vocab_size": vocab_size, "sha256": digest.hexdigest()}
        with _replaced(_header_path(path)) as file:
            file.write(json.dumps(header, indent=1).encode())
        return cls(path)


def _header_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")


def _read_header(path: Path) -> dict[str, Any]:
    header_path = _header_path(path)
    try:
        header = json.loads(header_path.read_bytes())
        fits = (
            header["dtype"] in ("uint16", "uint32")
            and header["count"] > 0
            and {"vocab_size", "sha256"} <= header.keys()
        )
    except FileNotFoundError:
        what = "has no header, its writing was not finished" if path.exists() else "no such token bin"
        raise DataError(what, where=str(path), remedy="write the bin again") from None
    except OSError as error:
        raise _unreadable(header_path, error) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise DataError("not a token bin's header", where=str(header_path), remedy="write the bin again")
    return header


def _checked(path: Path, ids: np.ndarray, vocab_size: int) -> np.ndarray:
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise DataError(f"tokens of type {ids.dtype} are not ids", where=str(path), remedy="give integers")
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        worst = ids.min() if ids.min() < 0 else ids.max()
        what = f"token id {worst} is outside the vocabulary of {vocab_size}"
        raise DataError(what, where=str(path), remedy="use the tokenizer the vocabulary belongs to")
    return ids


@contextmanager
def _replaced(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` once it is complete and on disk, and vanishes if it never is."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with unfinished.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        raise _unwritable(path, error) from None
    finally:
        unfinished.unlink(missing_ok=True)


def _unwritable(path: Path, error: OSError) -> ResourceError:
    what = f"cannot be written ({error.strerror or error})"
    return ResourceError(what, where=str(path), remedy="free space or choose another folder")


class LRUCache:
    """Decoded data sets by key, the least recently used forgotten first.

    Args:
        capacity: characters of text that may be held in all; a single larger value is not kept.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._held = 0
        self._items: OrderedDict[Any, tuple[Any, int]] = OrderedDict()

    def get(self, key: Any) -> Any | None:
        """The value kept under ``key``, or None."""
        if key not in self._items:
            return None
        self._items.move_to_end(key)
        return self._items[key][0]

    def put(self, key: Any, value: Any, size: int) -> None:
        """Keep ``value``, of ``size`` characters, forgetting others until it fits."""
        if key in self._items:
            self._held -= self._items.pop(key)[1]
        if size > self.capacity:
            return
        self._items[key] = (value, size)
        self._held += size
        while self._held > self.capacity:
            self._held -= self._items.popitem(last=False)[1][1]
