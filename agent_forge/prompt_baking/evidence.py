"""What a baking claims, measured on answers, questions and contexts that it neither trained nor decided on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from agent_forge.pipeline.phase import Progress
from agent_forge.prompt_baking.bake import Baked, HeldOut, Show
from agent_forge.prompt_baking.divergence import likelihoods
from agent_forge.prompt_baking.trajectories import answers_read
from forgekit.data.gym import FAMILIES
from forgekit.data.plans import GymMix
from forgekit.data.problems import REPORT_SEED, held_out
from forgekit.infer.engine import Engine
from forgekit.infer.sampling import SamplingConfig
from forgekit.measure.evidence import Evidence
from forgekit.measure.problems import chance_of
from forgekit.measure.stats import RESAMPLES

CLOSER = "the unprompted answers are closer to the prompted model's"
AGREEMENT = "prompted and baked find the same answers likely"
OTHERS = "other tasks after baking"
THOUGHT_ENDS = "</think>"
ROWS = 64


@dataclass(frozen=True)
class BakingTask:
    """Questions and what their answers are worth.

    Attributes:
        name: of the task.
        questions: what is asked.
        score: (number of the question, answer with its reserved tokens) to a value in [0, 1].
        chance: the score of guessing; None where there is no such thing.
        max_tokens: longest answer.
    """

    name: str
    questions: tuple[str, ...]
    score: Callable[[int, str], float]
    chance: float | None = None
    max_tokens: int = 96


def gym_tasks(count: int, levels: Sequence[int] = (1, 2, 3), max_tokens: int = 96) -> list[BakingTask]:
    """Every gym family on its report split: right is who gives the exact answer, after thoughts or without.

    Args:
        count: problems of every family, spread over the levels.
    """
    tasks = []
    for name in sorted(FAMILIES):
        mix = [GymMix(family=name, levels=tuple(levels))]
        problems = held_out(mix, -(-count // len(levels)))[:count]
        pairs = [(problem.prompt, problem.answer) for problem in problems]
        tasks.append(exact_task(name, pairs, chance_of(mix, problems), max_tokens))
    return tasks


def exact_task(
    name: str, pairs: Sequence[tuple[str, str]], chance: float | None = None, max_tokens: int = 96
) -> BakingTask:
    """Questions with one right answer each, given after thoughts or without."""
    answers = [answer for _, answer in pairs]

    def score(number: int, text: str) -> float:
        return float(text.rpartition(THOUGHT_ENDS)[2].strip() == answers[number])

    return BakingTask(name, tuple(question for question, _ in pairs), score, chance, max_tokens)


def answers_of(engine: Engine, baked: Baked, task: BakingTask, prompt: str = "") -> list[str]:
    """Greedy answers with their reserved tokens, the end token taken away; with a prompt or without."""
    plan, texts = SamplingConfig(max_tokens=task.max_tokens), []
    for start in range(0, len(task.questions), ROWS):
        asked = [baked.sides.ids(question, prompt) for question in task.questions[start : start + ROWS]]
        for found in engine.generate(asked, plan):
            tokens = found.tokens[:-1] if found.tokens[-1] in engine.end_ids else found.tokens
            texts.append(engine.tokenizer.decode(tokens, skip_special_tokens=False))
    return texts


def scores_of(engine: Engine, baked: Baked, task: BakingTask, prompt: str = "") -> np.ndarray:
    """What the greedy answers are worth."""
    return np.array([task.score(i, text) for i, text in enumerate(answers_of(engine, baked, task, prompt))])


def answer_likelihoods(model: nn.Module, held: HeldOut) -> np.ndarray:
    """Nats per token that a model, unprompted, gives every held-out answer."""
    features_ND = torch.cat(answers_read(model, held.trajectories, prompted=False))
    return _likelihoods(held, features_ND.to(next(model.parameters()).device), model)


def teacher_likelihoods(held: HeldOut) -> np.ndarray:
    """The same of the prompted teacher."""
    return _likelihoods(held, held.features(next(held.reader.parameters()).device), held.reader)


def _likelihoods(held: HeldOut, features_ND: torch.Tensor, model: Any) -> np.ndarray:
    ids_N = torch.tensor([token for one in held.trajectories for token in one.answer], device=features_ND.device)
    with torch.inference_mode():
        values = likelihoods(features_ND, model.read_out, ids_N, held.chunk).double().cpu()
    return np.array([float(part.mean()) for part in values.split([len(one.answer) for one in held.trajectories])])


def agreement(wanted: np.ndarray, given: np.ndarray) -> np.ndarray:
    """Coefficient of determination of ``given`` as it stands for ``wanted``, over the last axis: 1 is equal, below 0 is
    worse than the mean. No line is fitted: likelihoods that only move together do not agree."""
    rest = ((wanted - given) ** 2).sum(-1)
    spread = ((wanted - wanted.mean(-1, keepdims=True)) ** 2).sum(-1)
    return 1 - rest / np.maximum(spread, 1e-12)


@dataclass(frozen=True)
class Findings:
    """What was measured.

    Attributes:
        evidence: the claims.
        table: means by task and side: ``bare``, ``prompted``, ``baked``, ``re-prompted``; and ``r2`` by side.
    """

    evidence: list[Evidence]
    table: dict[str, Any]


def baking_evidence(
    model: nn.Module,
    baked: Baked,
    tasks: Sequence[BakingTask] = (),
    others: Sequence[BakingTask] = (),
    show: Show | None = None,
) -> Findings:
    """Measure a baking.

    Args:
        model: the model that was baked, as it was before.
        baked: the result.
        tasks: what the prompt is for. Prompted and re-prompted sides give all baked prompts together.
        others: what baking must leave alone, asked without the prompt.
        show: told the progress.
    """
    prompt = "\n\n".join(baked.prompts)
    common = {"seeds": (baked.config.seed, REPORT_SEED), "split": "report"}
    common["compute"] = {"tokens": float(sum(s.tokens for s in baked.stages)), "seconds": baked.seconds}
    found, r2 = _distributions(model, baked, common)
    before, after = (Engine(one, baked.sides.tokenizer) for one in (model, baked.model))
    total = 4 * len(tasks) + 2 * len(others)
    done, table = 0, {"r2": r2, "tasks": {}, "others": {}}
    known: dict[Any, list[str]] = {}

    def measured(engine: Engine, task: BakingTask, text: str = "") -> np.ndarray:
        nonlocal done
        key = (id(engine), task.questions, task.max_tokens, text)
        if key not in known:  # tasks may read the same answers in different ways
            known[key] = answers_of(engine, baked, task, text)
        done += 1
        if show:
            show(Progress("measuring", done, total, task.name))
        return np.array([task.score(i, answer) for i, answer in enumerate(known[key])])

    for task in tasks:
        sides = {
            "bare": measured(before, task),
            "prompted": measured(before, task, prompt),
            "baked": measured(after, task),
            "re-prompted": measured(after, task, prompt),
        }
        table["tasks"][task.name] = {name: float(values.mean()) for name, values in sides.items()}
        found += _task_claims(task, sides, common)
    pairs = {task.name: (measured(before, task), measured(after, task)) for task in others}
    if pairs:
        table["others"] = {name: {"bare": float(a.mean()), "baked": float(b.mean())} for name, (a, b) in pairs.items()}
        found.append(_forgetting(others, pairs, common))
    return Findings(found, table)


def _distributions(model: nn.Module, baked: Baked, common: dict[str, Any]) -> tuple[list[Evidence], dict[str, float]]:
    """Divergence and agreement of likelihoods on the report's answers."""
    closer = Evidence.compare(
        claim=CLOSER,
        metric="nats_to_prompted",
        before=np.concatenate(baked.before),
        after=np.concatenate(baked.after),
        chance=None,
        higher_is_better=False,
        **common,
    )
    wanted = np.concatenate([teacher_likelihoods(held) for held in baked.held])
    sides = [np.concatenate([answer_likelihoods(one, held) for held in baked.held]) for one in (model, baked.model)]
    bare, after = (float(agreement(wanted, side)) for side in sides)
    index = np.random.default_rng(baked.config.seed).integers(0, len(wanted), (RESAMPLES, len(wanted)))
    changes = agreement(wanted[index], sides[1][index]) - agreement(wanted[index], sides[0][index])
    low, high = np.percentile(changes, (2.5, 97.5))
    agrees = Evidence.of_statistic(
        claim=AGREEMENT,
        metric="likelihood_r2",
        before=bare,
        after=after,
        change=(after - bare, float(low), float(high)),
        n=len(wanted),
        chance=None,
        **common,
    )
    return [closer, agrees], {"bare": bare, "baked": after}


def _task_claims(task: BakingTask, sides: dict[str, np.ndarray], common: dict[str, Any]) -> list[Evidence]:
    pairs = {
        f"{task.name}: baked against bare": ("bare", "baked"),
        f"{task.name}: baked against prompted": ("prompted", "baked"),
        f"{task.name}: prompting the baked model": ("prompted", "re-prompted"),
    }
    return [
        Evidence.compare(
            claim=claim,
            metric="score",
            before=sides[first],
            after=sides[second],
            chance=task.chance,
            parent_must_beat_chance=False,
            **common,
        )
        for claim, (first, second) in pairs.items()
    ]


def _forgetting(
    others: Sequence[BakingTask], pairs: dict[str, tuple[np.ndarray, np.ndarray]], common: dict[str, Any]
) -> Evidence:
    weights = [len(pairs[task.name][0]) for task in others]
    known = all(task.chance is not None for task in others)
    return Evidence.compare(
        claim=OTHERS,
        metric="score",
        before=np.concatenate([a for a, _ in pairs.values()]),
        after=np.concatenate([b for _, b in pairs.values()]),
        chance=float(np.average([task.chance for task in others], weights=weights)) if known else None,
        **common,
    )
