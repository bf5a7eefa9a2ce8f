"""Traces: questions with a thought and the answer it leads to; written, deduplicated, verified, packed to learn from.

Shapes: see :mod:`forgekit.data.batches`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from forgekit.data.batches import PackedSource, end_token, told
from forgekit.data.gym import Problem
from forgekit.data.plans import GymMix
from forgekit.data.problems import draw
from forgekit.data.thoughts.checks import check, conclusion
from forgekit.data.thoughts.form import CLOSE, OPEN, Thought
from forgekit.data.thoughts.strategies import STRATEGIES, Strategy
from forgekit.data.thoughts.views import view
from forgekit.errors import ConfigError, DataError


@dataclass(frozen=True)
class Trace:
    """A question, the thought about it and its answer.

    Attributes:
        problem: what is asked.
        strategy: the way to think.
        thought: verified: every statement but a mended slip holds, and its steps lead to the answer.
        told: whether a system message names the strategy.
    """

    problem: Problem
    strategy: str
    thought: Thought
    told: bool

    @property
    def system(self) -> str:
        """The system message, "" where there is none."""
        return self.strategy if self.told else ""


@dataclass
class TraceBook:
    """What was written.

    Attributes:
        traces: distinct and verified.
        duplicates: written a second time and dropped.
        refused: written and found wrong by the checks, by strategy; none in a correct program.
    """

    traces: list[Trace] = field(default_factory=list)
    duplicates: int = 0
    refused: Counter = field(default_factory=Counter)

    def table(self) -> dict[str, dict[str, int]]:
        """Traces by family and strategy."""
        found: dict[str, dict[str, int]] = {}
        for trace in self.traces:
            row = found.setdefault(trace.problem.family, {})
            row[trace.strategy] = row.get(trace.strategy, 0) + 1
        return found


def write_traces(
    mix: Iterable[GymMix],
    per_level: int,
    seed: int,
    split: str = "train",
    weights: Mapping[str, float] | None = None,
    told: float = 0.3,
) -> TraceBook:
    """Traces of the questions of a mix, each in one strategy.

    Args:
        mix: families and levels.
        per_level: questions of every family and level (times the part's weight when training).
        seed: decides questions, strategies and slips.
        split: ``train``, ``select`` or ``report``.
        weights: how often each strategy is drawn; all alike unless given, strategies that are left out never.
        told: share of the traces whose system message names the strategy.

    Raises:
        ConfigError: an unknown strategy, or a weight that is none.
        DataError: nothing could be written.
    """
    writers, share = _drawn(weights)
    problems = draw(mix, per_level, seed, split)
    rng, book, seen = np.random.default_rng([seed, 3]), TraceBook(), set()
    # Whose exponential waiting time is over first is drawn first: draws without replacement, all at once.
    orders = (rng.exponential(size=(len(problems), len(writers))) / share).argsort(axis=1)
    for problem, order in zip(problems, orders.tolist()):
        known = view(problem.prompt)
        tried = (writers[i] for i in order if known)
        chosen = next(((w.name, t) for w in tried if (t := w.write(known, rng)) is not None), None)
        if chosen is None:
            raise DataError("no strategy can write about it", where=f"gym {problem.family}", remedy="leave it out")
        name, thought = chosen
        key = (problem.prompt, str(thought))
        if key in seen:
            book.duplicates += 1
        elif not _verified(problem, thought):
            book.refused[name] += 1
        else:
            seen.add(key)
            book.traces.append(Trace(problem, name, thought, bool(rng.random() < told)))
    if not book.traces:
        raise DataError("no trace was written", where="traces", remedy="give at least one family and level")
    return book


def _drawn(weights: Mapping[str, float] | None) -> tuple[list[Strategy], np.ndarray]:
    """The strategies that are drawn, and how often."""
    weights = weights or dict.fromkeys(STRATEGIES.names(), 1.0)
    writers = [STRATEGIES.get(name) for name, weight in weights.items() if weight]
    share = np.array([weight for weight in weights.values() if weight], dtype=float)
    if not len(share) or not (np.isfinite(share).all() and (share > 0).all()):
        raise ConfigError(f"{dict(weights)} are no weights", where="weights", remedy="give numbers above 0")
    return writers, share


def _verified(problem: Problem, thought: Thought) -> bool:
    led_to = conclusion(problem.prompt, thought)
    return check(problem.prompt, str(thought)).valid and led_to in (None, problem.answer)


class TraceSource(PackedSource):
    """Traces packed into rows: thought and answer are learned, deliberate slips are only shown."""

    def __init__(self, tokenizer, traces: Sequence[Trace]) -> None:
        if not traces:
            raise DataError("no traces", where="traces", remedy="write some first")
        end, _ = end_token(tokenizer)
        prompts = [told(tokenizer, trace.problem.prompt, trace.system) for trace in traces]
        pieces = [(text, learn) for trace in traces for text, learn in _pieces(trace, end)]
        ids = iter(tokenizer.encode_batch([text for text, _ in pieces], add_special_tokens=False))
        asked = [e.ids for e in tokenizer.encode_batch(prompts, add_special_tokens=False)]
        answers, learned = [], []
        for trace in traces:
            parts = [(next(ids).ids, learn) for _, learn in _pieces(trace, end)]
            answers.append([token for tokens, _ in parts for token in tokens])
            learned.append([learn for tokens, learn in parts for _ in tokens])
        super().__init__(tokenizer, asked, answers, learned)


def _pieces(trace: Trace, end: str) -> list[tuple[str, bool]]:
    """Text and whether it is learned. A slip's marker is learned (a step comes next), what it says is not."""
    found: list[tuple[str, bool]] = []
    run = OPEN
    for segment in trace.thought.segments:
        if segment.slip:
            found += [(run + segment.marker, True), (segment.text, False)]
            run = ""
        else:
            run += segment.marker + segment.text
    return [*found, (f"{run}{CLOSE}{trace.problem.answer}{end}", True)]
