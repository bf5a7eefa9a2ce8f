"""What phase 1 claims, measured on the report split.

Trunk against an untrained model on every skill and on text; every specialist against the trunk on its own
speciality and on the others'; memory read against memory silenced beyond the attention window; halting against
always taking all steps.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from agent_forge.phases.cognate.config import CognateConfig, GymMix, SpecialistPlan
from agent_forge.phases.cognate.data import CognateData, draw
from forgekit.data.gym import FAMILIES, Problem
from forgekit.measure.evidence import Evidence, Gate
from forgekit.measure.scores import ProblemScores, majority_share, score_problems, score_text
from forgekit.models.io import build_model

REPORT_SEED = 20_000
"""Seed of the report problems; the split itself is decided by hashing each prompt."""


@dataclass(frozen=True)
class Subject:
    """A specialist under measurement."""

    plan: SpecialistPlan
    model: torch.nn.Module
    model_id: str


def measure(config: CognateConfig, blank, trunk, subjects: list[Subject], data: CognateData):
    """All claims, and tables for the report.

    Args:
        config: the phase's settings.
        blank: an untrained model of the trunk's shape.
        trunk: the trained trunk.
        subjects: the specialists.
        data: tokenizer and held-out texts.

    Returns:
        list of :class:`Evidence`, and a dict of JSON-able tables.
    """
    tables: dict[str, Any] = {"levels": {}}
    found = _trunk_claims(config, blank, trunk, data, tables)
    found += _specialist_claims(config, trunk, subjects, data, tables)
    found += _memory_claims(config, subjects, data)
    found += _halting_claims(config, trunk, subjects, data, tables)
    return found, tables


def gate(config: CognateConfig, policy: str) -> Gate:
    """What phase 1 must show: every trunk skill learned, every specialist better on its speciality."""
    needs = {trunk_claim(part.family): "improved" for part in config.trunk_mix}
    needs |= {own_claim(plan.name): "improved" for plan in config.specialists}
    return Gate(name="cognate", requires=needs, policy=policy)


def trunk_claim(family: str) -> str:
    """The claim about one skill of the trunk."""
    return f"trunk learned {family}"


def own_claim(name: str) -> str:
    """The claim about a specialist on its own speciality."""
    return f"{name} beats the trunk on its speciality"


def chance_of(problems: list[Problem]) -> float:
    """Best accuracy without reading the question: per family and level the larger of the declared chance and
    the most frequent answer's share, averaged."""
    groups = defaultdict(list)
    for p in problems:
        groups[p.family, p.level].append(p)
    rates = [max(FAMILIES.get(f).chance(level), majority_share(group)) for (f, level), group in groups.items()]
    return float(np.mean(rates))


def by_level(problems: list[Problem], scores: ProblemScores) -> dict[str, float]:
    """Accuracy by ``family/level``."""
    groups = defaultdict(list)
    for p, right in zip(problems, scores.right):
        groups[f"{p.family}/{p.level}"].append(right)
    return {name: round(float(np.mean(rights)), 4) for name, rights in groups.items()}


def report_set(mix: tuple[GymMix, ...], count: int) -> list[Problem]:
    """``count`` report problems of every family and level of a mix."""
    return draw(mix, count, REPORT_SEED, split="report")


def _common(config: CognateConfig, **compute: float) -> dict[str, Any]:
    return {"split": "report", "seeds": (config.trunk.seed, REPORT_SEED), "compute": compute}


def _trunk_claims(config, blank, trunk, data: CognateData, tables) -> list[Evidence]:
    found, before_all, after_all = [], [], []
    tokens = config.trunk.steps * config.trunk.rows * config.trunk.seq_len
    cost = {"train_tokens": tokens, "train_flops": 3 * tokens * trunk.flops_per_token(config.trunk.seq_len)}
    for part in config.trunk_mix:
        problems = report_set((part,), config.evaluation.problems)
        before, after = (score_problems(m, data.tokenizer, problems) for m in (blank, trunk))
        tables["levels"].setdefault("trunk", {}).update(by_level(problems, after))
        found.append(
            Evidence.compare(
                claim=trunk_claim(part.family),
                metric="exact_match",
                before=before.right,
                after=after.right,
                chance=chance_of(problems),
                parent_must_beat_chance=False,
                **_common(config, **cost),
            )
        )
        before_all.append(before.nats)
        after_all.append(after.nats)
    plan = config.evaluation
    lower = {"chance": None, "higher_is_better": False, **_common(config, **cost)}
    found.append(
        Evidence.compare(
            claim="trunk loss falls from the untrained model's",
            metric="nats_per_answer_token",
            before=np.concatenate(before_all),
            after=np.concatenate(after_all),
            **lower,
        )
    )
    texts = (
        score_text(m, data.tokenizer, data.report_texts, config.trunk.seq_len, plan.windows) for m in (blank, trunk)
    )
    before, after = (t.per_window for t in texts)
    claim = {"claim": "trunk models held-out text", "metric": "bits_per_byte"}
    return [*found, Evidence.compare(**claim, before=before, after=after, **lower)]


def _specialist_claims(config, trunk, subjects: list[Subject], data: CognateData, tables) -> list[Evidence]:
    found = []
    for speciality in subjects:
        problems = report_set(speciality.plan.mix, config.evaluation.problems)
        chance, before = chance_of(problems), score_problems(trunk, data.tokenizer, problems)
        tables["levels"].setdefault("trunk", {}).update(by_level(problems, before))
        for subject in subjects:
            after = score_problems(subject.model, data.tokenizer, problems)
            tables["levels"].setdefault(subject.plan.name, {}).update(by_level(problems, after))
            own = subject is speciality
            train = config.training_of(subject.plan)
            found.append(
                Evidence.compare(
                    claim=own_claim(subject.plan.name) if own else f"{subject.plan.name} on {speciality.plan.name}",
                    metric="exact_match",
                    before=before.right,
                    after=after.right,
                    chance=chance,
                    parent_must_beat_chance=False,
                    **_common(config, train_tokens=train.steps * train.rows * train.seq_len),
                )
            )
    return found


def silence_memory(model):
    """A copy whose memories still write but are never heard: what it knows without them."""
    mute = copy.deepcopy(model)
    with torch.no_grad():
        for block in mute.blocks:
            if hasattr(block, "gated"):
                block.gated.out_norm.weight.zero_()
    return mute


def far_mix(config: CognateConfig, model) -> GymMix:
    """Recall from beyond anything attention can reach through all layers."""
    gap = config.evaluation.far_gap or round(1.5 * model.config.reach)
    return GymMix(family="far_recall", levels=(1,), options={"gap": gap, "pairs": config.evaluation.far_pairs})


def _memory_claims(config, subjects: list[Subject], data: CognateData) -> list[Evidence]:
    found = []
    for subject in subjects:
        practised = any(part.family == "far_recall" for part in subject.plan.mix)
        if not practised or not getattr(subject.model.config, "memories", ()) or not subject.model.config.reach:
            continue
        part = far_mix(config, subject.model)
        problems = report_set((part,), config.evaluation.problems)
        mute = score_problems(silence_memory(subject.model), data.tokenizer, problems)
        heard = score_problems(subject.model, data.tokenizer, problems)
        found.append(
            Evidence.compare(
                claim=f"{subject.plan.name} recalls beyond the attention window with its memory",
                metric="exact_match",
                before=mute.right,
                after=heard.right,
                chance=chance_of(problems),
                parent_must_beat_chance=False,
                **_common(config, gap_words=part.options["gap"], attention_reach=subject.model.config.reach),
            )
        )
    return found


def with_threshold(model, threshold: float):
    """A copy that halts at another threshold (1.0 never halts early)."""
    other = build_model(model.config.replace(act_threshold=threshold))
    other.load_state_dict(model.state_dict())
    return other.eval()


def _halting_claims(config, trunk, subjects: list[Subject], data: CognateData, tables) -> list[Evidence]:
    """Steps saved and accuracy kept, on each specialist's own set; histograms over answers and text."""
    found: list[Evidence] = []
    if not getattr(trunk.config, "t_max", 0):
        return found
    tables["act_histogram"] = {"trunk": step_histogram(trunk, data, config)}
    for subject in subjects:
        tables["act_histogram"][subject.plan.name] = step_histogram(subject.model, data, config)
    for subject in subjects:
        problems = report_set(subject.plan.mix, config.evaluation.problems)
        halted = score_problems(subject.model, data.tokenizer, problems)
        full = score_problems(with_threshold(subject.model, 1.0), data.tokenizer, problems)
        claims = (
            (
                "steps_per_token",
                f"{subject.plan.name} saves recursion steps by halting",
                full.steps,
                halted.steps,
                None,
            ),
            (
                "exact_match",
                f"{subject.plan.name} keeps its accuracy when it halts",
                full.right,
                halted.right,
                chance_of(problems),
            ),
        )
        for metric, claim, before, after, chance in claims:
            found.append(
                Evidence.compare(
                    claim=claim,
                    metric=metric,
                    before=before,
                    after=after,
                    chance=chance,
                    higher_is_better=chance is not None,
                    **_common(config, threshold=subject.model.config.act_threshold),
                )
            )
    return found


def step_histogram(model, data: CognateData, config: CognateConfig) -> dict[str, float]:
    """Share of held-out text positions that took 1, 2, ... steps."""
    from forgekit.data.batches import TextSource, encode_texts

    length = config.trunk.seq_len
    source = TextSource(encode_texts(data.tokenizer, data.report_texts))
    ids, _ = source.rows(np.random.default_rng(REPORT_SEED), config.evaluation.windows, length)
    with torch.inference_mode():
        steps = model(torch.from_numpy(ids.astype(np.int64))).steps.flatten()
    counts = torch.bincount(steps, minlength=model.config.t_max + 1)[1:]
    return {str(i): round(float(n) / len(steps), 4) for i, n in enumerate(counts.tolist(), 1)}
