"""The English and the code that ship inside every Python installation.

No download, no licence question (the PSF licence): docstrings, help topics and texts of the standard library make
about 2 MB of prose, its sources about 10 MB of code. Test folders are left out, and so are the ``encodings`` (tables)
and the ``_sysconfigdata`` modules (generated, and full of the building machine's paths).
"""

from __future__ import annotations

import ast
import codecs
import inspect
import os
import random
import re
import sysconfig
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

from forgekit.errors import DataError

_SKIPPED = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages", "encodings"}
_SKIPPED_FILES = re.compile(r"_sysconfigdata|(Pattern)?Grammar\.txt$")
_SHORTEST = 80
_CODE_DOCUMENT = 4096
_TOP_LEVEL = re.compile(r"(?<=\n\n)(?=async def |def |class |@)")


def library_folder() -> Path:
    """Where this Python keeps its standard library."""
    return Path(sysconfig.get_path("stdlib"))


def python_prose(limit_bytes: int | None = None, seed: int = 0, *, root: Path | None = None) -> list[str]:
    """English documents of the standard library: docstrings, help topics and text files, each once.

    Args:
        limit_bytes: stop before this many UTF-8 bytes; None for all.
        seed: of the shuffle; files are read in sorted order first, so equal seeds give equal lists.
        root: a library folder other than this Python's.

    Raises:
        DataError: the installation ships no sources and no texts.
    """
    root = root or library_folder()
    return _chosen(root, "prose", (text for path in _files(root) for text in _prose_of(path)), limit_bytes, seed)


def python_code(limit_bytes: int | None = None, seed: int = 0, *, root: Path | None = None) -> list[str]:
    """Source documents of the standard library, long files cut before top-level definitions at about 4 KiB.

    Arguments and errors are those of :func:`python_prose`.
    """
    root = root or library_folder()
    sources = (_source(path) for path in _files(root) if path.suffix == ".py" and path.parent.name != "pydoc_data")
    return _chosen(root, "code", (part for text in sources for part in _cut(text)), limit_bytes, seed)


def _chosen(root: Path, kind: str, documents: Iterable[str], limit_bytes: int | None, seed: int) -> list[str]:
    """Long enough documents, each once, shuffled, up to the limit."""
    unique = list(dict.fromkeys(text for text in documents if len(text.strip()) >= _SHORTEST and _is_clean(text)))
    if not unique:
        remedy = "install the standard library's sources, or give --data"
        raise DataError(f"holds no Python {kind}", where=str(root), remedy=remedy)
    random.Random(seed).shuffle(unique)
    if limit_bytes is None:
        return unique
    kept, left = [], limit_bytes
    for text in unique:
        size = len(text.encode())
        if size <= left:
            kept.append(text)
            left -= size
        elif kept:
            break
    return kept


def _is_clean(text: str) -> bool:
    """Whether it can be stored: docstrings may spell NULs and lone surrogates by escapes."""
    return "\0" not in text and not any("\ud800" <= char <= "\udfff" for char in set(text))


def _files(root: Path) -> Iterator[Path]:
    """Sources and texts in sorted order; skipped folders are not even entered, installed packages can be huge."""
    for folder, inner, names in os.walk(root):
        inner[:] = sorted(set(inner) - _SKIPPED)
        for name in sorted(names):
            if name.endswith((".py", ".txt")) and not _SKIPPED_FILES.search(name):
                yield Path(folder, name)


def _source(path: Path) -> str:
    """The file's text; empty where it cannot be read or its declared encoding does not hold."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return ""


def _prose_of(path: Path) -> Iterator[str]:
    text = _source(path)
    if path.suffix == ".txt":
        yield text.strip()
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old sources hold escapes that newer compilers warn about
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return
    if path.parent.name == "pydoc_data":
        yield from (topic.strip() for topic in _strings(tree))
    elif path.name == "this.py":
        yield from (codecs.decode(verse, "rot13") for verse in _strings(tree))
    else:
        yield from _docstrings(tree)


def _docstrings(node: ast.AST) -> Iterator[str]:
    """Docstrings of the node and of what it defines; only statements are walked, expressions hold none."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        if text := ast.get_docstring(node, clean=False):
            yield inspect.cleandoc(text).strip()
    for field in ("body", "orelse", "finalbody", "handlers"):
        for child in getattr(node, field, ()):
            yield from _docstrings(child)


def _strings(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _cut(source: str) -> Iterator[str]:
    """Parts of at least 4 KiB that begin at a top-level definition; together they are the source."""
    held = ""
    for part in _TOP_LEVEL.split(source):
        held += part
        if len(held) >= _CODE_DOCUMENT:
            yield held
            held = ""
    if held:
        yield held
