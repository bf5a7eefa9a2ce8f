"""Do training texts hold benchmark items?

The test is GPT-3's (Brown et al. 2020, appendix C): an item is hit if any 13 of its words in a row occur in the
training text, or all of its words in a row where it has fewer. Words are case folded and without punctuation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from forgekit.data.catalogue import BENCH, MissingDataset, load
from forgekit.data.formats import is_readable, read_rows, row_text
from forgekit.data.quality import words
from forgekit.errors import DataError

_BATCH_CHARS = 4_000_000
_FILTER_BITS = 22
_EXAMPLES = 5
# GPT-3's shortest n: a question of fewer words is common speech and is looked for together with its choices.
_QUESTION_WORDS = 8
_QUESTIONS = ("question", "query", "Question", "text", "prompt", "goal", "context")
_REST = ("choices", "choice0", "choice1", "choice2", "choice3", "sol1", "sol2", "Best Answer", "continuation", "code")
_LABEL = re.compile(r"(?m)^(?:[A-H]\. |Question: |Answer:\s*)")


@dataclass(frozen=True)
class Overlap:
    """One benchmark's items found in the training text."""

    items: int
    hits: int
    examples: tuple[tuple[int, str], ...]
    """(index of the item, the first of its words found), for the first few."""

    @property
    def share(self) -> float:
        """Items hit, as a share of all."""
        return self.hits / self.items if self.items else 0.0


@dataclass(frozen=True)
class ContaminationReport:
    """Overlap per benchmark."""

    n: int
    benchmarks: dict[str, Overlap]

    @property
    def clean(self) -> bool:
        """True if no item of any benchmark was found."""
        return not any(overlap.hits for overlap in self.benchmarks.values())


@dataclass(frozen=True)
class CatalogueRow:
    """One training set against one benchmark; ``overlap`` is None where it could not be told, ``reason`` says why."""

    name: str
    benchmark: str
    overlap: Overlap | None
    reason: str = ""


@dataclass(frozen=True)
class _Grams:
    """The n-grams of one length: sorted hashes, and for each the item and the word it starts at."""

    hashes: np.ndarray
    items: np.ndarray
    starts: np.ndarray
    filter: np.ndarray
    """Which leading bits of a hash occur at all: spares most searches."""


@dataclass(frozen=True)
class NgramIndex:
    """Benchmarks prepared for :func:`scan`; build one with :func:`ngram_index` and use it for many training sets."""

    n: int
    names: tuple[str, ...]
    offsets: tuple[int, ...]
    """Number of the first item of each benchmark, and the number of all items."""
    item_words: list[list[str]]
    word_ids: dict[str, int]
    codes: np.ndarray
    factors: np.ndarray
    grams: dict[int, _Grams]


def ngram_index(benchmarks: dict[str, list[str]], n: int = 13) -> NgramIndex:
    """Index every ``n`` words in a row of every item; an item with fewer words is indexed as a whole."""
    item_words = [words(text) for texts in benchmarks.values() for text in texts]
    word_ids: dict[str, int] = {}
    ids = [np.array([word_ids.setdefault(w, len(word_ids) + 1) for w in item], dtype=np.int64) for item in item_words]
    random = np.random.default_rng(0)
    codes = random.integers(1, 2**63, len(word_ids) + 1, dtype=np.uint64)
    factors = random.integers(1, 2**63, n, dtype=np.uint64) | np.uint64(1)
    gathered: dict[int, list[tuple[np.ndarray, int]]] = {}
    for item, values in enumerate(ids):
        if len(values):
            length = min(n, len(values))
            gathered.setdefault(length, []).append((_hashes(codes[values], factors[:length]), item))
    offsets = tuple(int(x) for x in np.cumsum([0, *map(len, benchmarks.values())]))
    grams = {length: _grams(parts) for length, parts in sorted(gathered.items())}
    return NgramIndex(n, tuple(benchmarks), offsets, item_words, word_ids, codes, factors, grams)


def check(train_texts: Iterable[str], benchmarks: dict[str, list[str]], n: int = 13) -> ContaminationReport:
    """Look for benchmark items in training texts.

    Args:
        train_texts: documents; no match crosses from one to the next.
        benchmarks: item texts per benchmark.
        n: words in a row that make a match.
    """
    return scan(ngram_index(benchmarks, n), train_texts)


def scan(index: NgramIndex, train_texts: Iterable[str]) -> ContaminationReport:
    """Look for an index's items in training texts; see :func:`check`."""
    found: dict[int, int] = {}
    for ids in _batches(index, train_texts):
        codes = index.codes[ids]  # that of id 0 is in no item's hashes
        for length, grams in index.grams.items():
            for row in _matches(grams, _hashes(codes, index.factors[:length])):
                found.setdefault(int(grams.items[row]), int(grams.starts[row]))
    return ContaminationReport(index.n, {name: _overlap(index, place, found) for place, name in enumerate(index.names)})


def check_catalogue(folder: Path | str, names: Iterable[str], n: int = 13) -> list[CatalogueRow]:
    """Check training sets of the catalogue against every benchmark file in ``folder/bench``.

    A set that is not on disk is reported as not checked, whatever its fallback is.

    Raises:
        ConfigError: an unknown name.
        DataError: no benchmark files, or a broken file.
    """
    benchmarks = bench_texts(folder)
    index = ngram_index(benchmarks, n)
    rows = []
    for name in names:
        reason, overlaps = "", {}
        try:
            loaded = load(name, folder=folder, allow_hub=False)
        except MissingDataset as error:
            reason = error.what
        else:
            reason = loaded.note if loaded.source == "fallback" else ""
            overlaps = {} if reason else scan(index, map(_train_text, loaded.rows)).benchmarks
        rows += [CatalogueRow(name, bench, overlaps.get(bench), reason) for bench in benchmarks]
    return rows


def bench_texts(folder: Path | str) -> dict[str, list[str]]:
    """What to look for, per file of ``folder/bench``.

    An item's text is its question, or the question with its choices or answer where it has fewer than eight words.

    Raises:
        DataError: no benchmark files there, or rows without any known question field.
    """
    paths = sorted(path for path in Path(folder, BENCH).glob("*") if is_readable(path))
    if not paths:
        remedy = f"put the benchmarks in use into {Path(folder, BENCH)}"
        raise DataError("no benchmark files to check against", where=str(folder), remedy=remedy)
    return {path.name.split(".")[0]: [_item_text(path, row) for row in read_rows(path)] for path in paths}


def _item_text(path: Path, row: dict[str, Any]) -> str:
    if "context_options" in row:
        return f"{row['context_options'][row['gold']]} {row['continuation']}"
    question = next((row[key] for key in _QUESTIONS if key in row), None)
    if question is None:
        what = f"no question among the fields {', '.join(row)}"
        raise DataError(what, where=str(path), remedy=f"name it one of {', '.join(_QUESTIONS)}")
    question = f"{row.get('Body', '')} {_LABEL.sub('', question)}"
    if len(words(question)) >= _QUESTION_WORDS:
        return question
    return " ".join([question, *chain.from_iterable(_texts(row[key]) for key in _REST if key in row)])


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _texts(inner)


def _train_text(row: dict[str, Any]) -> str:
    """The row without the letters of its choices, which benchmarks print differently, and with its solution."""
    return f"{_LABEL.sub('', row_text(row))} {row.get('trace', '')}"


def _hashes(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """One 64-bit hash per window of ``len(factors)`` words."""
    count = max(0, len(codes) - len(factors) + 1)
    total = np.zeros(count, dtype=np.uint64)
    for place, factor in enumerate(factors):
        total += codes[place : place + count] * factor
    return total


def _grams(parts: list[tuple[np.ndarray, int]]) -> _Grams:
    hashes = np.concatenate([part for part, _ in parts])
    items = np.concatenate([np.full(len(part), item) for part, item in parts])
    starts = np.concatenate([np.arange(len(part)) for part, _ in parts])
    order = np.argsort(hashes, kind="stable")
    present = np.zeros(1 << _FILTER_BITS, dtype=bool)
    present[hashes >> np.uint64(64 - _FILTER_BITS)] = True
    return _Grams(hashes[order], items[order], starts[order], present)


def _matches(grams: _Grams, hashes: np.ndarray) -> Iterator[int]:
    """Rows of the grams that occur among the hashes."""
    likely = np.unique(hashes[grams.filter[hashes >> np.uint64(64 - _FILTER_BITS)]])
    first, last = (np.searchsorted(grams.hashes, likely, side) for side in ("left", "right"))
    for start, end in zip(first[last > first], last[last > first]):
        yield from range(start, end)


def _batches(index: NgramIndex, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Word ids of many texts at a time, 0 for unknown words and between texts."""
    ids: list[int] = []
    chars = 0
    for text in texts:
        ids += [index.word_ids.get(word, 0) for word in words(text)]
        ids.append(0)
        chars += len(text)
        if chars >= _BATCH_CHARS:
            yield np.array(ids, dtype=np.int64)
            ids, chars = [], 0
    if ids:
        yield np.array(ids, dtype=np.int64)


def _overlap(index: NgramIndex, place: int, found: dict[int, int]) -> Overlap:
    first, end = index.offsets[place], index.offsets[place + 1]
    hit = [item for item in range(first, end) if item in found]
    examples = tuple(
        (item - first, " ".join(index.item_words[item][found[item] : found[item] + index.n]))
        for item in hit[:_EXAMPLES]
    )
    return Overlap(end - first, len(hit), examples)
