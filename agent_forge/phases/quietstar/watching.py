"""Looking at thoughts: are they valid and coherent, how long do they take, are slips noticed, is the answer right."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent_forge.phases.quietstar.config import QuietStarConfig
from forgekit.data.batches import asked
from forgekit.data.gym import Problem
from forgekit.data.thoughts import CLOSE, OPEN, STRATEGIES, Trace, check, strategy_of, write_traces
from forgekit.data.thoughts.form import DOUBT
from forgekit.infer.engine import Engine
from forgekit.infer.sampling import SamplingConfig
from forgekit.measure.coherence import Coherence, CoherenceScorer
from forgekit.measure.theater import Thought, think

CALIBRATED_ON = 96
"""Written traces, of the train split, on which a coherence scorer is calibrated."""
ROOM = 24
"""Tokens left for an answer after its thought."""
ONE_OF_A_THOUGHT = SamplingConfig(max_tokens=3, thinking_budget=1)
"""One token that the model chooses; the engine keeps the other two for the end of the thought and an answer."""


@dataclass(frozen=True)
class Watched:
    """Thoughts about some questions.

    Attributes:
        problems: the questions.
        thoughts: one each.
        scores: their coherence.
        seconds: that thinking and answering took, for all of them.
    """

    problems: Sequence[Problem]
    thoughts: Sequence[Thought]
    scores: Sequence[Coherence]
    seconds: float

    @property
    def valid(self) -> np.ndarray:
        """1.0 where a thought is well formed and true, leads to the right answer, and is coherent enough."""
        return np.array([float(score.valid) for score in self.scores])

    @property
    def right(self) -> np.ndarray:
        """1.0 where the answer after the thought is right."""
        return np.array([float(thought.answered) for thought in self.thoughts])

    def mean(self, name: str) -> float:
        """Mean of one of the scores."""
        return float(np.mean([getattr(score, name) for score in self.scores]))

    def summary(self) -> dict[str, Any]:
        """The numbers that are told of thoughts."""
        count = len(self.thoughts)
        return {
            "total": count,
            "valid": int(self.valid.sum()),
            "validity_rate": float(self.valid.mean()),
            "coherence": self.mean("coherence"),
            "coherence_min": float(min(score.coherence for score in self.scores)),
            **{name: self.mean(name) for name in ("semantic", "logical", "relevance", "fluency")},
            "length": float(np.mean([len(thought.tokens) for thought in self.thoughts])),
            "milliseconds": 1000 * self.seconds / count,
            "right": float(self.right.mean()),
        }


def scorer_of(model, tokenizer, config: QuietStarConfig, traces: Sequence[Trace]) -> CoherenceScorer:
    """A coherence scorer on the model's own states, calibrated on written traces that nothing reports."""
    step = max(1, len(traces) // CALIBRATED_ON)
    items = [(trace.problem.prompt, str(trace.thought)) for trace in traces[::step][:CALIBRATED_ON]]
    return CoherenceScorer(model, tokenizer, config.coherence).calibrate(items)


def watch(
    model, tokenizer, problems: Sequence[Problem], config: QuietStarConfig, scorer: CoherenceScorer, system: str = ""
) -> Watched:
    """Let the model think about every question, greedily, and look at the thoughts; ``system`` is said before each."""
    began = time.perf_counter()
    thoughts = think(model, tokenizer, problems, config.theater, system)
    seconds = time.perf_counter() - began
    scores = scorer.score([(p.prompt, whole(t)) for p, t in zip(problems, thoughts)])
    return Watched(problems, thoughts, scores, seconds)


def watch_told(
    model, tokenizer, problems: Sequence[Problem], config: QuietStarConfig, scorer: CoherenceScorer
) -> dict[str, Watched]:
    """Thoughts by strategy, each asked for by its system message."""
    return {
        name: watch(model, tokenizer, problems, config, scorer, name)
        for name in config.traces.strategies or STRATEGIES.names()
    }


def whole(thought: Thought) -> str:
    """A thought with its outer pair."""
    return f"{OPEN}{thought.text}{CLOSE}"


def valid_share(model, tokenizer, problems: Sequence[Problem], config: QuietStarConfig) -> float:
    """Share of thoughts that are sound: well formed, every statement holds, they lead to the answer. Coherence is not
    asked."""
    thoughts = think(model, tokenizer, problems, config.theater)
    return float(np.mean([check(p.prompt, whole(t)).sound for p, t in zip(problems, thoughts)]))


def answers(model, tokenizer, problems: Sequence[Problem], budget: int) -> tuple[np.ndarray, np.ndarray]:
    """(2, N): whether the answer is right and whether it thought first, the model deciding by itself."""
    order = sorted(range(len(problems)), key=lambda i: len(problems[i].prompt))
    right, thought = np.zeros(len(problems)), np.zeros(len(problems))
    engine = Engine(model, tokenizer)
    sampling = SamplingConfig(max_tokens=budget + ROOM, thinking_budget=budget)
    for at in range(0, len(order), 256):
        chosen = order[at : at + 256]
        said = engine.generate([asked(tokenizer, problems[i].prompt) for i in chosen], sampling)
        for i, one in zip(chosen, said, strict=True):
            right[i] = one.finish_reason == "stop" and one.text == problems[i].answer
            thought[i] = bool(one.thinking_tokens)
    return right, thought


def slips_noticed(model, tokenizer, config: QuietStarConfig, split: str = "report") -> tuple[np.ndarray, np.ndarray]:
    """Whether the model doubts (N,) after a right step, and after the same step with a slip in it.

    The beginning of a written thought is shown up to a step; the next token is the model's.
    """
    mix, count = config.traces.mix, config.evaluation.select
    traces = write_traces(mix, count, config.traces.seed, split, weights={"doubt": 1.0, "expert": 1e-9}).traces
    engine, doubt, found = Engine(model, tokenizer), tokenizer.token_to_id(DOUBT), []
    for slipped in (False, True):
        prompts = [_until_slip(tokenizer, trace, slipped) for trace in traces if trace.strategy == "doubt"]
        said = engine.generate(prompts, ONE_OF_A_THOUGHT)
        found.append(np.array([float(one.tokens[:1] == [doubt]) for one in said]))
    return found[0], found[1]


def _until_slip(tokenizer, trace: Trace, slipped: bool) -> str:
    """Question and thought up to its slip, or up to the right step in the slip's place."""
    segments = trace.thought.segments
    at = next(i for i, segment in enumerate(segments) if segment.slip)
    shown = [segment.marker + segment.text for segment in segments[:at]]
    last = segments[at].text if slipped else segments[at + 1].text
    return asked(tokenizer, trace.problem.prompt) + OPEN + "".join(shown) + segments[at].marker + last


def by_kind(watched: Watched, told: Mapping[str, Watched]) -> dict[str, dict[str, Any]]:
    """By strategy: its share of the thoughts that were free to choose, and, where a system message asks for it, how
    often it is followed, valid and right. By family: valid and right of the free ones."""
    free = [strategy_of(thought.text) for thought in watched.thoughts]
    strategies: dict[str, Any] = {}
    for name, asked_for in told.items():
        followed = float(np.mean([strategy_of(thought.text) == name for thought in asked_for.thoughts]))
        row = {"share": free.count(name) / len(free), "followed": followed, "n": len(asked_for.thoughts)}
        strategies[name] = {**row, "valid": float(asked_for.valid.mean()), "right": float(asked_for.right.mean())}
    families, names = {}, [problem.family for problem in watched.problems]
    for name in dict.fromkeys(names):
        at = np.array([one == name for one in names])
        row = {"valid": float(watched.valid[at].mean()), "right": float(watched.right[at].mean())}
        families[name] = {**row, "n": int(at.sum())}
    return {"by_strategy": strategies, "by_family": families}


def examples(watched: Watched, told: Mapping[str, Watched], count: int = 12) -> list[dict[str, Any]]:
    """Thoughts to read: one for every strategy that was asked for, of those that follow it and are right and valid if
    there are any (each is named by the strategy it does follow), then one free one of every family that went wrong."""
    chosen = []
    for number, (name, asked_for) in enumerate(told.items()):
        rows = [_example(*parts) for parts in zip(asked_for.problems, asked_for.thoughts, asked_for.scores)]
        good = [row for row in rows if row["strategy"] == name and row["right"] and row["valid"]] or rows
        chosen.append(good[(number * len(good)) // len(told)])
    free = [_example(*parts) for parts in zip(watched.problems, watched.thoughts, watched.scores)]
    odd = [row for row in free if not row["right"]] + [row for row in free if row["right"] and not row["valid"]]
    families = {row["family"]: row for row in reversed(odd)}
    return [*chosen, *families.values()][:count]


def _example(problem: Problem, thought: Thought, score: Coherence) -> dict[str, Any]:
    found = check(problem.prompt, whole(thought))
    notes = []
    if not found.well_formed:
        notes.append("it is not well formed")
    elif found.false:
        notes.append(f"{found.false} of {found.statements} statements do not hold")
    elif not found.complete:
        notes.append("its steps do not lead to the answer")
    return {
        "family": problem.family,
        "asked": problem.prompt,
        "thought": thought.text,
        "answered": thought.answer,
        "expected": problem.answer,
        "right": thought.answered,
        "valid": score.valid,
        "strategy": strategy_of(thought.text),
        "note": "; ".join(notes),
    }
