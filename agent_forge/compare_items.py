"""What every model of a comparison is asked: gym problems, and windows of text that phase 1 holds out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import Field, field_validator

from forgekit.config import Config
from forgekit.data.catalogue import DATASETS
from forgekit.data.gym import FAMILIES, Problem
from forgekit.data.gym.core import LEVELS, SPLITS
from forgekit.data.plans import GymMix, TextPlan
from forgekit.data.problems import held_out
from forgekit.data.texts import GRAM, load_texts
from forgekit.errors import ConfigError, DataError
from forgekit.registry import unknown

EVERYTHING = 1_500_000_000
"""Bytes taken of each text set: as many as any profile trains on, so that nothing trained on is taken for held out."""


class CompareConfig(Config):
    """What is measured, the same for every model."""

    problems: Annotated[int, Field(ge=1)] = 40
    """Distinct problems per family and level, where the family has as many."""
    families: tuple[str, ...] = ()
    """Gym families; all of them when empty."""
    levels: Annotated[tuple[int, ...], Field(min_length=1)] = (1, 2, 3, 4, 5)
    """Levels of every family."""
    split: str = "report"
    """``report``, ``select`` or ``train``, of problems and text alike."""
    windows: Annotated[int, Field(ge=1)] = 128
    """Windows of text at most."""
    window_bytes: Annotated[int, Field(ge=16)] = 384
    """UTF-8 bytes of a window."""
    data: Path | None = None
    """A text file, every document of which is used, or a data folder; unset, the texts of this Python."""

    @field_validator("families")
    @classmethod
    def _families(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(FAMILIES.resolve(name) for name in value))

    @field_validator("levels")
    @classmethod
    def _levels(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        wrong = [level for level in value if level not in LEVELS]
        if wrong:
            raise ConfigError(f"level {wrong[0]} is not in 1..10", where="levels", remedy="choose levels from 1 to 10")
        return tuple(sorted(set(value)))

    @field_validator("split")
    @classmethod
    def _split(cls, value: str) -> str:
        if value not in SPLITS:
            raise unknown("split", value, list(SPLITS))
        return value


def draw_problems(config: CompareConfig) -> tuple[list[Problem], list[str]]:
    """Distinct problems of every family and level from the split, and what could not be drawn."""
    problems, missing = [], []
    for name in config.families or tuple(FAMILIES):
        seen: set[str] = set()
        for level in config.levels:
            try:
                drawn = held_out((GymMix(family=name, levels=(level,)),), config.problems, config.split)
            except DataError:  # a level with so few prompts that none falls into this split
                missing.append(f"{name} {level}")
                continue
            problems += [p for p in drawn if p.prompt not in seen]  # levels of some families overlap
            seen |= {p.prompt for p in drawn}
    if not problems:
        what = f"no {config.split} problems of {', '.join(config.families)} at these levels"
        raise DataError(what, where="gym", remedy="choose higher levels")
    return problems, [f"no {config.split} problems exist at {', '.join(missing)}"] if missing else []


def text_windows(config: CompareConfig) -> tuple[list[str], list[str]]:
    """Windows of about ``window_bytes`` bytes, evenly spread over the split's documents, and where they come from."""
    documents, notes = _documents(config)
    pieces = [piece for text in documents for piece in cut(text, config.window_bytes)]
    if not pieces:
        what = f"no {config.split} document is as long as half a window of {config.window_bytes} bytes"
        raise DataError(what, where=str(config.data or "text"), remedy="give more text")
    chosen = np.unique(np.linspace(0, len(pieces) - 1, min(config.windows, len(pieces))).round().astype(int))
    windows = [pieces[i] for i in chosen]
    size = sum(len(w.encode()) for w in windows)
    return windows, [*notes, f"text: {len(windows)} windows, {size:,} bytes; each is read from its beginning"]


def cut(text: str, size: int) -> Iterator[str]:
    """Consecutive pieces of at most ``size`` bytes; a last one shorter than half of that is left out."""
    data = text.encode()
    for start in range(0, len(data), size):
        # A character that a boundary cuts in two belongs to neither piece.
        piece = data[start : start + size].decode(errors="ignore")
        if 2 * len(piece.encode()) >= size:
            yield piece


def _documents(config: CompareConfig) -> tuple[list[str], list[str]]:
    """Documents of the split, and a sentence about them."""
    if config.data is not None and config.data.is_file():
        texts = _texts_of(config.data)
        return texts, [f"text: all {len(texts)} documents of {config.data.name}, whatever the models were trained on"]
    plan = TextPlan(local=local_texts(), bytes_each=EVERYTHING)
    parts, provenance, _ = load_texts(plan, config.data)
    texts, used = parts[config.split], ", ".join(part["name"] for part in provenance)
    if config.split == "train":
        return texts, [f"text: {len(texts):,} training documents of {used}"]
    told = f"text: {len(texts):,} {config.split} documents of {used}, which share no {GRAM} words in a row with the"
    return texts, [f"{told} {len(parts['train']):,} training documents"]


def local_texts() -> tuple[str, ...]:
    """Every text set of the catalogue that a data folder may hold."""
    specs = [DATASETS.get(name) for name in DATASETS]
    return tuple(spec.name for spec in specs if spec.kind == "text" and not spec.embedded)


def _texts_of(path: Path) -> list[str]:
    from forgekit.data.formats import read_rows, row_text

    try:
        return [row_text(row) for row in read_rows(path)]
    except (KeyError, AttributeError):
        remedy = 'give rows with a "text", or with "prompt" and "answer"'
        raise DataError("holds rows without text", where=str(path), remedy=remedy) from None
