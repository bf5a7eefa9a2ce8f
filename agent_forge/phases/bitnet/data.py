"""Data of phase 4: real text, questions that decide and questions that report, what is practised and calibrated on."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent_forge.phases.bitnet.config import BitNetConfig
from agent_forge.phases.bitnet.texts import own_texts
from forgekit.data.batches import Batch, Mixture, PackedSource, ProblemSource, TextSource, encode_texts
from forgekit.data.gym import Problem
from forgekit.data.plans import GymMix, TextPlan, minus
from forgekit.data.problems import draw, held_out
from forgekit.data.texts import load_texts
from forgekit.data.thoughts import TraceSource, write_traces
from forgekit.data.thoughts.views import view
from forgekit.errors import DataError
from forgekit.measure.scores import TextWindows, cut_windows

Cell = tuple[str, int]
"""Family and level."""


@dataclass
class BitNetData:
    """Everything the phase trains on and measures with.

    Attributes:
        tokenizer: the parent's.
        mix: what the parent can do; empty where nobody knows.
        select, report: questions of it by split.
        windows: held-out text, by split.
        tokens: text to train on.
        data_hash: over text and questions.
        provenance: of every set or file of text.
        notes: sentences for people.
    """

    tokenizer: Any
    mix: tuple[GymMix, ...]
    select: list[Problem]
    report: list[Problem]
    windows: dict[str, TextWindows]
    tokens: np.ndarray
    data_hash: str
    provenance: list[dict[str, Any]]
    notes: list[str]


def prepare(
    config: BitNetConfig, tokenizer: Any, practised: Sequence[GymMix], first: TextPlan, folder: Path | None
) -> BitNetData:
    """Load text and draw questions.

    Args:
        config: the phase's settings.
        tokenizer: the parent's.
        practised: what its manifest says it can do; the settings count before it.
        first: phase 1's text, which is taken unless the settings name another.
        folder: a data folder, or None.

    Raises:
        DataError: the text is empty or shorter than the context.
    """
    mix = minus(config.skills or tuple(practised), ())
    own = config.own_text
    texts, provenance, notes = own_texts(own) if own is not None else load_texts(config.text or first, folder)
    if not mix:
        notes = [*notes, "nobody knows what the model can do: it is judged by text alone"]
    plan = config.evaluation
    digest = hashlib.sha256(f"{[part.model_dump() for part in mix]}{provenance}".encode())
    for split in sorted(texts):
        for text in texts[split]:
            digest.update(text.encode() + b"\0")
    tokens, windows = cut_text(config, tokenizer, texts)
    return BitNetData(
        tokenizer=tokenizer,
        mix=mix,
        select=held_out(mix, plan.select, "select"),
        report=held_out(mix, plan.problems, "report"),
        windows=windows,
        tokens=tokens,
        data_hash=digest.hexdigest(),
        provenance=provenance,
        notes=notes,
    )


def cut_text(
    config: BitNetConfig, tokenizer: Any, texts: Mapping[str, Sequence[str]]
) -> tuple[np.ndarray, dict[str, TextWindows]]:
    """Token ids to calibrate and train on, and windows to measure on by split.

    Args:
        config: the phase's settings.
        tokenizer: the parent's.
        texts: by split.

    Raises:
        DataError: not enough text for a row of training, or for a window of a held-out split.
    """
    plan = config.evaluation
    tokens = calibration_text(tokenizer, texts["train"], config.train.seq_len)
    return tokens, {
        split: cut_windows(tokenizer, texts[split], plan.length, plan.windows) for split in ("select", "report")
    }


def calibration_text(tokenizer: Any, texts: Sequence[str], length: int) -> np.ndarray:
    """Token ids of the texts that are calibrated and trained on.

    Args:
        tokenizer: the model's.
        texts: documents.
        length: tokens of a row.

    Raises:
        DataError: there is no text, or not enough for one row.
    """
    where = "calibration text"
    if not any(text.strip() for text in texts):
        raise DataError("is empty", where=where, remedy="give text: phases.bitnet.text")
    tokens = encode_texts(tokenizer, texts)
    if len(tokens) <= length:
        remedy = "give more text, or lower phases.bitnet.train.seq_len"
        raise DataError(f"{len(tokens)} tokens are not enough for a context of {length}", where=where, remedy=remedy)
    return tokens


def thought_about(problems: Sequence[Problem], thought: np.ndarray) -> frozenset[Cell]:
    """Families and levels that a model thinks about by itself: in at least half of their questions.

    Args:
        problems: questions it was asked.
        thought: 1.0 where it thought before it answered.
    """
    cells: dict[Cell, list[float]] = {}
    for problem, did in zip(problems, thought, strict=True):
        if view(problem.prompt) is not None:  # else nobody could write it a thought
            cells.setdefault((problem.family, problem.level), []).append(float(did))
    return frozenset(cell for cell, told in cells.items() if np.mean(told) >= 0.5)


def practice(config: BitNetConfig, data: BitNetData, thinks: Collection[Cell]) -> Mixture:
    """Training batches: what the parent thinks about with thoughts, its other skills, and text; text alone where
    nobody knows what it can do.

    Args:
        config: the phase's settings.
        data: of :func:`prepare`.
        thinks: what the parent thinks about; nothing where it does not think.
    """
    plan, train, tokenizer = config.practice, config.train, data.tokenizer
    others = minus(data.mix, [GymMix(family=family, levels=(level,)) for family, level in sorted(thinks)])
    thinking = minus(data.mix, others)
    sources: list[tuple[TextSource | PackedSource, float]] = []
    rest = 1 - plan.text
    if thinking:
        book = write_traces(thinking, plan.traces, plan.seed, weights=plan.strategies or None, told=plan.told)
        share = rest - plan.direct - (plan.skills if others else 0)
        sources.append((TraceSource(tokenizer, book.traces), share))
        if plan.direct:
            sources.append((ProblemSource(tokenizer, [trace.problem for trace in book.traces]), plan.direct))
        rest = plan.skills
    if others and rest:
        sources.append((ProblemSource(tokenizer, draw(others, plan.pool, plan.seed)), rest))
    if plan.text or not sources:
        sources.append((TextSource(data.tokens, plan.text_labels), plan.text or 1.0))
    return Mixture(tuple(sources), train.rows, train.seq_len, train.seed)


def calibration_rows(config: BitNetConfig, mixture: Mixture) -> list[Batch]:
    """Batches of the training data, at least as many rows as the settings ask for."""
    return [mixture.batch(number) for number in range(-(-config.calibration.samples // mixture.rows))]


def too_long(mixture: Mixture) -> dict[str, float]:
    """Share of the questions that no row of the training data holds, by the number of their source."""
    found = {}
    for number, (source, _) in enumerate(mixture.sources):
        if isinstance(source, PackedSource) and (share := float((source.size > mixture.length + 1).mean())):
            found[str(number)] = round(share, 4)
    return found
