"""What is worth training on: a quality filter, exact and near duplicates.

Near duplicates are found by MinHash over word 5-grams with banding (Broder 1997; Leskovec et al., Mining of Massive
Datasets, chapter 3); every candidate is confirmed by its true Jaccard similarity, so nothing is dropped on an estimate.
The filter's rules follow Gopher's (Rae et al. 2021, appendix A).
"""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pydantic import Field

from forgekit.config import Config
from forgekit.data.formats import row_text

_WORD = re.compile(r"\w+")
_LETTERS = re.compile(r"[^\W\d_]+")
_SYMBOLS = re.compile(r"[^\w\s]+")
_SHINGLE = 5
# 20 bands of 6 rows: a pair of similarity 0.8 becomes a candidate with probability 1 - (1 - 0.8^6)^20 = 0.998.
_BANDS, _ROWS = 20, 6
# Three standard errors of a similarity of 0.8 estimated from 120 values: candidates further below are not confirmed.
_MARGIN = 0.11
_CHUNK = 2048


class QualityConfig(Config):
    """Which rows are dropped. The shares are of the characters that are not spaces, or of the lines."""

    min_chars: int = Field(20, ge=0)
    """Shortest text kept, in characters."""
    max_chars: int = Field(5_000_000, ge=1)
    """Longest text kept, in characters; the longest real novels stay below."""
    min_letter_share: float = Field(0.5, ge=0, le=1)
    """Smallest share of letters kept."""
    max_symbol_share: float = Field(0.35, ge=0, le=1)
    """Largest share of characters that are neither letters nor digits; code has about 0.25."""
    max_repeated_lines: float = Field(0.3, ge=0, le=1)
    """Largest share of non-empty lines that repeat an earlier line of the same text."""
    near_duplicates: bool = True
    """Whether near duplicates are dropped, besides exact ones."""
    threshold: float = Field(0.8, ge=0.5, le=1)
    """Jaccard similarity of the word 5-grams from which two texts are near duplicates."""
    seed: int = 0
    """Of the hash functions."""


@dataclass(frozen=True)
class CleanReport:
    """What a cleaning dropped, and why."""

    total: int
    kept: int
    dropped: list[tuple[int, str]] = field(default_factory=list)
    """(index of the row, reason), in order."""

    @property
    def counts(self) -> dict[str, int]:
        """Rows dropped per reason."""
        counts: dict[str, int] = defaultdict(int)
        for _, reason in self.dropped:
            counts[reason] += 1
        return dict(counts)


def words(text: str) -> list[str]:
    """The text's words, case folded, without punctuation."""
    return _WORD.findall(text.casefold())


def text_key(text: str) -> bytes:
    """Equal for texts that differ in nothing but case and white space."""
    return hashlib.blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()


def flaw(text: str, config: QualityConfig) -> str | None:
    """The first rule a text breaks, or None."""
    if len(text) < config.min_chars:
        return "too short"
    if len(text) > config.max_chars:
        return "too long"
    solid = sum(map(len, text.split())) or 1
    if sum(map(len, _LETTERS.findall(text))) / solid < config.min_letter_share:
        return "few letters"
    if sum(map(len, _SYMBOLS.findall(text))) / solid > config.max_symbol_share:
        return "many symbols"
    lines = [line for raw in text.splitlines() if (line := raw.strip())]
    if lines and 1 - len(set(lines)) / len(lines) > config.max_repeated_lines:
        return "repeated lines"
    return None


def clean(
    rows: Iterable[dict[str, Any]], config: QualityConfig | None = None
) -> tuple[list[dict[str, Any]], CleanReport]:
    """Drop poor rows and all but the first of equal or nearly equal ones.

    Args:
        rows: ``{"text"}`` or ``{"prompt", "answer"}`` mappings, judged by the text a model would read.
        config: the rules.
    """
    config = config or QualityConfig()
    near = NearDuplicates(config.threshold, config.seed) if config.near_duplicates else None
    seen: set[bytes] = set()
    kept: list[dict[str, Any]] = []
    dropped: list[tuple[int, str]] = []
    for index, row in enumerate(rows):
        text = row_text(row)
        key, reason = text_key(text), flaw(text, config)
        if reason is None and key in seen:
            reason = "exact duplicate"
        if reason is None and near is not None and near.find_or_add(text) is not None:
            reason = "near duplicate"
        if reason is not None:
            dropped.append((index, reason))
            continue
        seen.add(key)
        kept.append(row)
    return kept, CleanReport(len(kept) + len(dropped), len(kept), dropped)


class NearDuplicates:
    """The texts seen so far, searchable by similarity.

    Args:
        threshold: Jaccard similarity of word 5-grams from which two texts count as the same.
        seed: of the hash functions.
    """

    def __init__(self, threshold: float = 0.8, seed: int = 0) -> None:
        self.threshold = threshold
        random = np.random.default_rng(seed)
        self._factors_S1 = random.integers(1, 2**63, (_BANDS * _ROWS, 1), dtype=np.uint64) | np.uint64(1)
        self._places = random.integers(1, 2**63, _SHINGLE, dtype=np.uint64) | np.uint64(1)
        self._word_ids: dict[str, int] = {}
        self._texts: list[str] = []
        self._signatures_NS = np.empty((64, _BANDS * _ROWS), dtype=np.uint32)
        self._bands: list[dict[bytes, list[int]]] = [{} for _ in range(_BANDS)]

    def find_or_add(self, text: str) -> int | None:
        """Number of the first added text that is nearly this one; otherwise the text is added and None returned."""
        shingles = self._shingles(text)
        if not shingles.size:
            return None
        signature = self._signature(shingles)
        keys = [band.tobytes() for band in signature.reshape(_BANDS, _ROWS)]
        for number in self._likely(signature, keys):
            if jaccard(shingles, self._shingles(self._texts[number])) >= self.threshold:
                return number
        if len(self._texts) == len(self._signatures_NS):
            self._signatures_NS = np.concatenate([self._signatures_NS, np.empty_like(self._signatures_NS)])
        self._signatures_NS[len(self._texts)] = signature
        for key, band in zip(keys, self._bands):
            band.setdefault(key, []).append(len(self._texts))
        self._texts.append(text)
        return None

    def _likely(self, signature: np.ndarray, keys: list[bytes]) -> list[int]:
        """Texts that share a band and whose estimated similarity is near the threshold, oldest first."""
        numbers = np.array(
            sorted({n for key, band in zip(keys, self._bands) for n in band.get(key, ())}), dtype=np.intp
        )
        estimates = (self._signatures_NS[numbers] == signature).mean(axis=1) if len(numbers) else numbers
        return numbers[estimates >= self.threshold - _MARGIN].tolist()

    def _shingles(self, text: str) -> np.ndarray:
        """Sorted distinct 64-bit hashes of the text's word 5-grams; a shorter text is one gram. Recomputed for the
        few candidates rather than kept: a corpus has as many 5-grams as words."""
        found = words(text)
        ids = np.array([self._word_ids.setdefault(word, len(self._word_ids) + 1) for word in found], dtype=np.uint64)
        if 0 < len(ids) < _SHINGLE:
            ids = np.pad(ids, (0, _SHINGLE - len(ids)))
        count = max(0, len(ids) - _SHINGLE + 1)
        grams = np.zeros(count, dtype=np.uint64)
        for place, factor in enumerate(self._places):
            grams += _mixed(ids[place : place + count]) * factor
        return np.unique(_mixed(grams))

    def _signature(self, shingles: np.ndarray) -> np.ndarray:
        """MinHash values [bands * rows] of a set of shingles: the high halves, which multiplication mixes best."""
        lowest = np.full(_BANDS * _ROWS, np.iinfo(np.uint64).max, dtype=np.uint64)
        for start in range(0, len(shingles), _CHUNK):
            hashed = self._factors_S1 * shingles[None, start : start + _CHUNK]
            lowest = np.minimum(lowest, hashed.min(axis=1))
        return (lowest >> np.uint64(32)).astype(np.uint32)


def jaccard(left: np.ndarray, right: np.ndarray) -> float:
    """Size of the intersection over that of the union of two arrays of distinct values."""
    shared = len(np.intersect1d(left, right, assume_unique=True))
    return shared / (len(left) + len(right) - shared)


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser: spreads 64-bit values evenly."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
