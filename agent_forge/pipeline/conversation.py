"""A short conversation with what a phase made: real held-out questions and what the model really answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from forgekit.data.batches import asked
from forgekit.data.gym import generate
from forgekit.data.plans import GymMix
from forgekit.infer.engine import Engine
from forgekit.infer.sampling import SamplingConfig

SEED, MAX_TOKENS = 7, 24


def converse(name: str, model, tokenizer, mix: Iterable[GymMix], count: int = 3) -> list[dict[str, Any]]:
    """Ask a model one question of each of the first ``count`` parts of a mix, at the part's highest level.

    Returns:
        One record per question: ``model``, ``asked``, ``answered``, ``expected``, ``right``.
    """
    parts: Sequence[GymMix] = list(mix)[:count]
    problems = [generate(p.family, p.levels[-1], 1, seed=SEED, split="report", **p.options)[0] for p in parts]
    greedy = SamplingConfig(max_tokens=MAX_TOKENS, temperature=0.0)
    answers = Engine(model, tokenizer).generate([asked(tokenizer, p.prompt) for p in problems], greedy)
    return [
        {"model": name, "asked": p.prompt, "answered": a.text, "expected": p.answer, "right": a.text == p.answer}
        for p, a in zip(problems, answers)
    ]
