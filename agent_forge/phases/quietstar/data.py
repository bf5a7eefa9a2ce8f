"""Data of phase 3: the parent, real text, traces, the questions that select and the questions that report."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from agent_forge.phases.quietstar.config import LEAST_TRACES, QuietStarConfig
from forgekit.data.batches import Batch, Mixture, PackedSource, ProblemSource, TextSource, encode_texts
from forgekit.data.gym import Problem
from forgekit.data.plans import GymMix, TextPlan, minus
from forgekit.data.problems import draw, held_out
from forgekit.data.texts import load_texts
from forgekit.data.thoughts import STRATEGIES, TraceBook, TraceSource, write_traces
from forgekit.errors import DataError
from forgekit.measure.scores import TextWindows, cut_windows
from forgekit.train.config import TrainConfig


@dataclass
class QuietData:
    """Everything the phase trains on and measures with.

    Attributes:
        tokenizer: the parent's, with the thinking tokens.
        book: the traces.
        select, report: questions to think about, by split.
        skills: questions of the parent's skills on the report split; ``skill_mix`` is what they are of.
        windows: held-out text of the report split.
        texts: text tokens by split.
        data_hash: over what is trained on.
        notes: sentences for people.
    """

    tokenizer: Any
    book: TraceBook
    select: list[Problem]
    report: list[Problem]
    skills: list[Problem]
    skill_mix: tuple[GymMix, ...]
    windows: TextWindows
    texts: dict[str, np.ndarray]
    data_hash: str
    notes: list[str]


def prepare(
    config: QuietStarConfig, tokenizer: Any, practised: Sequence[GymMix], first: TextPlan, folder: Path | None
) -> QuietData:
    """Load text, write traces, draw questions.

    Args:
        config: the phase's settings.
        tokenizer: the parent's.
        practised: what its manifest says it can do.
        first: phase 1's text, which is taken unless the settings name another.
        folder: a data folder, or None.

    Raises:
        DataError: too few distinct traces, or nobody knows what the parent can do.
    """
    plan = config.traces
    book = write_traces(plan.mix, plan.per_level, plan.seed, weights=plan.strategies or None, told=plan.told)
    if len(book.traces) < LEAST_TRACES:
        what = f"{len(book.traces)} distinct verified traces, {LEAST_TRACES} are needed"
        raise DataError(what, where="phases.quietstar.traces", remedy="raise per_level or add families and levels")
    skill_mix = minus(config.skills or tuple(practised), plan.mix)
    if not skill_mix:
        remedy = 'name it: --set phases.quietstar.skills=[{family="sort"}]'
        raise DataError("nobody knows what the parent can do", where="phases.quietstar.skills", remedy=remedy)
    texts, provenance, notes = load_texts(config.text or first, folder)
    evaluation = config.evaluation
    notes.append(
        f"traces: {len(book.traces):,} distinct and verified, {book.duplicates} duplicates dropped, "
        f"{sum(book.refused.values())} refused by the checks"
    )
    digest = hashlib.sha256()
    for text in (*texts["train"], *(f"{t.problem.prompt}{t.thought}{t.told}" for t in book.traces)):
        digest.update(text.encode() + b"\0")
    digest.update(str(provenance).encode())
    return QuietData(
        tokenizer=tokenizer,
        book=book,
        select=held_out(plan.mix, evaluation.select, "select"),
        report=held_out(plan.mix, evaluation.problems, "report"),
        skills=held_out(skill_mix, evaluation.skills, "report"),
        skill_mix=skill_mix,
        windows=cut_windows(tokenizer, texts["report"], evaluation.length, evaluation.windows),
        texts={split: encode_texts(tokenizer, texts[split]) for split in texts},
        data_hash=digest.hexdigest(),
        notes=notes,
    )


def teaching(config: QuietStarConfig, data: QuietData, thinking: bool) -> Mixture:
    """Batches of step 1, or of the model that learns the same questions without thoughts."""
    plan, train, tokenizer = config.teach, config.teach.train, data.tokenizer
    seed = config.traces.seed
    direct = [trace.problem for trace in data.book.traces]
    traces = TraceSource(tokenizer, data.book.traces) if thinking else ProblemSource(tokenizer, direct)
    rest = 1 - plan.direct - plan.skills - plan.text
    sources: list[tuple[TextSource | PackedSource, float]] = [(traces, rest)]
    if plan.direct:
        sources.append((ProblemSource(tokenizer, direct), plan.direct))
    if plan.skills:
        known = draw(data.skill_mix, plan.pool, seed)
        sources.append((ProblemSource(tokenizer, known, _named(config, len(known))), plan.skills))
    if plan.text:
        sources.append((TextSource(data.texts["train"], plan.text_labels), plan.text))
    return Mixture(tuple(sources), train.rows, train.seq_len, train.seed)


def _named(config: QuietStarConfig, count: int) -> list[str]:
    """System messages for questions that are answered at once: as often as with traces they name a strategy, so that a
    model asked for one still answers what needs no thought."""
    names = tuple(config.traces.strategies) or STRATEGIES.names()
    rng = np.random.default_rng([config.traces.seed, 4])
    which = rng.integers(0, len(names), count)
    return [names[i] if heard else "" for i, heard in zip(which, rng.random(count) < config.traces.told)]


def talking(config: QuietStarConfig, data: QuietData, split: str = "train", rows: int = 0) -> Mixture:
    """Batches of step 2: questions with direct answers, and text; thoughts are the model's own.

    Args:
        split: ``train``, ``select`` or ``report``.
        rows: rows per batch; 0 takes the training's.
    """
    plan, train = config.quiet, config.quiet.train
    drawn = draw(config.traces.mix, 200 if split == "train" else 40, train.seed, split)
    sources: list[tuple[TextSource | PackedSource, float]] = [(ProblemSource(data.tokenizer, drawn), 1 - plan.text)]
    if plan.text:
        sources.append((TextSource(data.texts[split]), plan.text))
    return Mixture(tuple(s for s in sources if s[1]), rows or train.rows, train.seq_len, train.seed)


def validation_batch(config: QuietStarConfig, data: QuietData, split: str) -> Batch:
    """Held-out rows on which the validation loss of step 2 is told."""
    train: TrainConfig = config.quiet.train
    return talking(config, data, split, config.quiet.rows).batch(train.seed)
