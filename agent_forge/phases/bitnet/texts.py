"""Text of the user: read, cut, freed of repetitions, and divided so that nothing is both learned from and told."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from agent_forge.phases.bitnet.config import OwnText
from forgekit.data.formats import is_readable, read_rows, row_text
from forgekit.data.quality import QualityConfig, clean
from forgekit.data.texts import GRAM, SPLIT_SEED
from forgekit.errors import DataError

SHARES = {"select": 0.1, "report": 0.2}
"""Shares of the pieces; the rest calibrates and trains. Larger than those of the house's text, which is longer."""
PIECES, SHORTEST, LONGEST = 60, 100, 2000
"""Into how many pieces a text is cut, if these are neither shorter nor longer than so many characters."""
KEEP = QualityConfig(min_chars=1, min_letter_share=0, max_symbol_share=1, max_repeated_lines=1)
"""It is the user's choice: only repetitions go."""


def own_texts(plan: OwnText) -> tuple[dict[str, list[str]], list[dict[str, Any]], list[str]]:
    """Read the user's text and divide it.

    It is cut into pieces, at ends of lines where there are any; which split a piece belongs to depends on its content
    alone. Held-out pieces that share 13 words in a row with the training pieces are dropped, and pieces that select
    where they share them with those that report.

    Returns:
        Texts by split (``train``, ``select``, ``report``), provenance of every file, notes for people.

    Raises:
        DataError: a file that is missing, empty, no text or of an unknown kind; nothing to read in a folder; too
            little text for three splits.
    """
    documents, provenance = [], []
    for path in _files(plan.paths):
        texts = [_text(row, path) for row in read_rows(path)]
        digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()
        provenance.append({"name": path.name, "path": str(path), "rows_used": len(texts), "sha256": digest})
        documents += [text for text in texts if text.strip()]
    where = ", ".join(plan.paths)
    if not documents:
        raise DataError("is empty", where=where, remedy="give text")
    size = min(LONGEST, max(SHORTEST, sum(map(len, documents)) // PIECES))
    cut = [piece for text in documents for piece in _cut(text, size)]
    taken = _taken(sorted(set(cut), key=_rank), plan.bytes)
    pieces = [row["text"] for row in clean([{"text": piece} for piece in taken], KEEP)[0]]
    note = f"own text: {len(documents)} documents in {len(cut)} pieces; {len(taken)} different ones within the limit, "
    note += f"{len(pieces)} without near repetitions"
    parts, at = {}, 0
    for split, share in SHARES.items():
        count = max(1, round(share * len(pieces)))
        parts[split], at = pieces[at : at + count], at + count
    parts["train"] = pieces[at:]
    if not all(parts.values()):
        what = f"{sum(map(len, documents))} characters are too few to train on some and measure on others"
        raise DataError(what, where=where, remedy="give more text")
    seen = set().union(*map(_grams, parts["train"]))
    for split in reversed(SHARES):  # what reports keeps most
        parts[split] = [text for text in parts[split] if not seen & _grams(text)]
        seen.update(*map(_grams, parts[split]))
    if not all(parts.values()):
        what = f"all pieces of a held-out split have {GRAM} words in a row of the other pieces"
        raise DataError(what, where=where, remedy="give text that repeats itself less")
    told = ", ".join(f"{len(parts[split])} {split}" for split in ("train", *SHARES))
    return parts, provenance, [note, f"own text: pieces by split: {told}"]


def _files(paths: Iterable[str]) -> Iterator[Path]:
    for path in map(Path, paths):
        if not path.is_dir():
            yield path  # reading it says what is wrong with it
            continue
        found = sorted(one for one in path.rglob("*") if one.is_file() and is_readable(one))
        if not found:
            raise DataError("holds no text files", where=str(path), remedy="give a folder with .txt or .jsonl files")
        yield from found


def _text(row: dict[str, Any], path: Path) -> str:
    if not all(isinstance(row.get(key), str) for key in (("text",) if "text" in row else ("prompt", "answer"))):
        remedy = "give rows with text, or with prompt and answer"
        raise DataError(f"a row has {', '.join(row) or 'nothing'}", where=str(path), remedy=remedy)
    return row_text(row)


def _cut(text: str, size: int) -> Iterator[str]:
    """Pieces of about ``size`` characters that end with lines; longer lines are cut."""
    piece = ""
    for line in text.splitlines(keepends=True):
        if piece and len(piece) + len(line) > size:
            yield piece
            piece = ""
        while len(line) > 2 * size:
            yield line[:size]
            line = line[size:]
        piece += line
    if piece.strip():
        yield piece


def _rank(text: str) -> str:
    """An order that has nothing to do with where a piece stood."""
    return hashlib.sha256(f"{SPLIT_SEED}:{text}".encode()).hexdigest()


def _taken(pieces: list[str], limit: int) -> list[str]:
    """Pieces from the front, up to ``limit`` bytes."""
    taken, total = [], 0
    for piece in pieces:
        total += len(piece.encode())
        if taken and total > limit:
            break
        taken.append(piece)
    return taken


def _grams(text: str) -> set[int]:
    """Hashes of every 13 words in a row (of the whole text where it is shorter)."""
    words = text.split()
    return {hash(tuple(words[i : i + GRAM])) for i in range(max(1, len(words) - GRAM + 1))}
