"""What a candidate is worth: four measured parts, their weighted sum, and intervals for differences of that sum.

Source: V2 specification, 2.2.5 (composite fitness), with DESIGN 7 (2): perplexity is per byte, so that tokenizers can
be compared; speed and memory are counted, because noise must not rank two children of one shape.
"""

from __future__ import annotations

import hashlib
import inspect
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from agent_forge.phases.evomerge.config import FitnessPlan
from forgekit.data.batches import ProblemSource
from forgekit.data.gym import Problem
from forgekit.measure.scores import TextWindows, cut_windows, score_source, score_windows
from forgekit.measure.stats import RESAMPLES, Interval

WORST_BITS = 64.0
"""Bits per byte that a window counts at most, and where the model's scores are no numbers: eight blind guesses."""


@dataclass(frozen=True)
class Exam:
    """What every candidate of a search is asked: tokenized once, the same for all.

    Attributes:
        problems: by speciality.
        text: windows of held-out text.
    """

    problems: dict[str, ProblemSource]
    text: TextWindows

    @classmethod
    def make(cls, tokenizer, problems: Mapping[str, Sequence[Problem]], texts: Sequence[str], plan: FitnessPlan):
        """Tokenize problems and cut the text's windows; raises ``DataError`` where there is too little of either."""
        sources = {name: ProblemSource(tokenizer, list(asked)) for name, asked in problems.items()}
        return cls(sources, cut_windows(tokenizer, texts, plan.length, plan.windows))

    @property
    def print(self) -> str:
        """A fingerprint of everything that is asked."""
        digest = hashlib.sha256(self.text.ids.tobytes())
        for name, source in self.problems.items():
            digest.update(name.encode() + source.tokens.tobytes() + source.prompt_size.tobytes())
        return digest.hexdigest()

    @property
    def tokens(self) -> int:
        """Tokens read when a model takes the exam."""
        return int(sum(s.size.sum() for s in self.problems.values()) + self.text.ids[:, 1:].size)

    @property
    def items(self) -> int:
        """Problems and windows."""
        return sum(len(s.size) for s in self.problems.values()) + len(self.text.ids)


@dataclass(frozen=True)
class Marks:
    """What a model reached in an exam.

    Attributes:
        right: by speciality, 1.0 for every problem answered exactly.
        bits: of every text window; ``bytes`` of the same.
        flops: forward FLOPs per answered token, recursion steps included as they were taken.
        size: bytes of the weights.
        steps: mean recursion steps per answered token.
        seconds: it took.
    """

    right: dict[str, np.ndarray]
    bits: np.ndarray
    bytes: np.ndarray
    flops: float
    size: int
    steps: float
    seconds: float

    @property
    def accuracy(self) -> float:
        """Exact answers, the mean over the specialities."""
        return float(np.mean([right.mean() for right in self.right.values()]))

    @property
    def bits_per_byte(self) -> float:
        """Of the held-out text."""
        return float(self.bits.sum() / self.bytes.sum())


def sit(model, exam: Exam) -> Marks:
    """Let a model take an exam."""
    began = time.perf_counter()
    scores = {name: score_source(model, source) for name, source in exam.problems.items()}
    text = score_windows(model, exam.text)
    answered = sum(float(s.tokens.sum()) for s in scores.values())
    steps = sum(float((s.steps * s.tokens).sum()) for s in scores.values()) / answered
    # A token is answered with the question before it: its context is the mean problem's length.
    context = round(float(np.mean(np.concatenate([s.size for s in exam.problems.values()]))))
    return Marks(
        right={name: s.right for name, s in scores.items()},
        bits=np.minimum(np.where(np.isnan(text.bits), np.inf, text.bits), WORST_BITS * text.bytes),
        bytes=text.bytes,
        flops=answer_flops(model, context, steps),
        size=sum(t.numel() * t.element_size() for t in model.state_dict().values()),
        steps=steps,
        seconds=time.perf_counter() - began,
    )


def answer_flops(model, context: int, steps: float) -> float:
    """Forward FLOPs of one answered token; families without recursion have no steps to count."""
    if "steps" in inspect.signature(model.flops_per_token).parameters:
        return float(model.flops_per_token(context, steps))
    return float(model.flops_per_token(context))


@dataclass(frozen=True)
class Reference:
    """What speed and memory are measured against: the base's ``flops`` per answered token and ``size`` in bytes."""

    flops: float
    size: int


def parts(marks: Marks, plan: FitnessPlan, reference: Reference) -> dict[str, float]:
    """The composite and everything it is made of."""
    perplexity = 2.0**marks.bits_per_byte
    speed, memory = reference.flops / marks.flops, reference.size / marks.size
    return {
        "composite": composite(marks.accuracy, marks.bits_per_byte, (speed, memory), plan),
        "accuracy": marks.accuracy,
        "bits_per_byte": marks.bits_per_byte,
        "perplexity": perplexity,
        "perplexity_score": 1 / perplexity,
        "flops_per_token": marks.flops,
        "speed_score": speed,
        "bytes": float(marks.size),
        "memory_score": memory,
        "steps": marks.steps,
    }


def composite(accuracy, bits_per_byte, counted: tuple[float, float], plan: FitnessPlan):
    """The weighted sum; accuracy and bits per byte may be arrays of resampled values."""
    speed, memory = counted
    return plan.perplexity * 2.0**-bits_per_byte + plan.accuracy * accuracy + plan.speed * speed + plan.memory * memory


def composite_change(
    before: Sequence[Marks], after: Sequence[Marks], plan: FitnessPlan, reference: Reference, seed: int = 0
) -> Interval:
    """``after - before`` of the composite with its 95 % percentile bootstrap interval; each side is a mean over models.

    Problems are resampled within their speciality and windows among windows, the same ones for every model. Costs are
    counted on all of them and not resampled. The interval speaks of other items, not of other searches.
    """
    rng, first = np.random.default_rng(seed), before[0]
    draws = {name: rng.integers(0, len(r), (RESAMPLES, len(r))) for name, r in first.right.items()}
    windows = rng.integers(0, len(first.bits), (RESAMPLES, len(first.bits)))
    sides, means = [], []
    for side in (before, after):
        resampled = []
        for marks in side:
            accuracy = np.mean([marks.right[name][draw].mean(1) for name, draw in draws.items()], axis=0)
            bits = marks.bits[windows].sum(1) / marks.bytes[windows].sum(1)
            counted = (reference.flops / marks.flops, reference.size / marks.size)
            resampled.append(composite(accuracy, bits, counted, plan))
        sides.append(np.mean(resampled, axis=0))
        means.append(float(np.mean([parts(marks, plan, reference)["composite"] for marks in side])))
    low, high = np.percentile(sides[1] - sides[0], (2.5, 97.5))
    return means[1] - means[0], float(low), float(high)


def told(marks: Marks, plan: FitnessPlan, reference: Reference) -> dict[str, Any]:
    """The parts as a row of the report's fitness table, with the accuracy by speciality."""
    own = {name: round(float(right.mean()), 4) for name, right in marks.right.items()}
    return {**{k: round(v, 6) for k, v in parts(marks, plan, reference).items()}, "by_speciality": own}
