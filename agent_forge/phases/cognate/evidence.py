"""What phase 1 claims, measured on the report split.

Trunk against an untrained model on every skill and on text; every specialist against the trunk on its own
speciality and on the others'; memory read against memory silenced beyond the attention window; halting against
always taking all steps.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from agent_forge.phases.cognate.config import CognateConfig, SpecialistPlan
from agent_forge.phases.cognate.data import CognateData, supervised_share, trunk_mixture
from forgekit.data.batches import TextSource, encode_texts
from forgekit.data.gym import Problem
from forgekit.data.plans import GymMix
from forgekit.data.problems import REPORT_SEED, held_out
from forgekit.measure.evidence import Evidence, Gate
from forgekit.measure.problems import by_level, chance_of
from forgekit.measure.scores import rows_at_once, score_problems, score_text
from forgekit.models.io import build_model


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


def _common(config: CognateConfig, *plans: SpecialistPlan, **compute: float) -> dict[str, Any]:
    seeds = (config.trunk.seed, *(plan.seed for plan in plans), REPORT_SEED)
    return {"split": "report", "seeds": seeds, "compute": compute}


def _trunk_claims(config, blank, trunk, data: CognateData, tables) -> list[Evidence]:
    found, before_all, after_all = [], [], []
    tokens = config.trunk.steps * config.trunk.rows * config.trunk.seq_len
    share = supervised_share(trunk_mixture(data, config))
    cost = {"train_tokens": tokens}
    cost["train_flops"] = tokens * trunk.config.train_flops_per_token(config.trunk.seq_len, share)
    for part in config.trunk_mix:
        problems = held_out((part,), config.evaluation.problems)
        before, after = (score_problems(m, data.tokenizer, problems) for m in (blank, trunk))
        tables["levels"].setdefault("trunk", {}).update(by_level(problems, after.right))
        found.append(
            Evidence.compare(
                claim=trunk_claim(part.family),
                metric="exact_match",
                before=before.right,
                after=after.right,
                chance=chance_of((part,), problems),
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
        problems = held_out(speciality.plan.mix, config.evaluation.problems)
        chance, before = chance_of(speciality.plan.mix, problems), score_problems(trunk, data.tokenizer, problems)
        tables["levels"].setdefault("trunk", {}).update(by_level(problems, before.right))
        for subject in subjects:
            after = score_problems(subject.model, data.tokenizer, problems)
            tables["levels"].setdefault(subject.plan.name, {}).update(by_level(problems, after.right))
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
                    **_common(config, subject.plan, train_tokens=train.steps * train.rows * train.seq_len),
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
        problems = held_out((part,), config.evaluation.problems)
        mute = score_problems(silence_memory(subject.model), data.tokenizer, problems)
        heard = score_problems(subject.model, data.tokenizer, problems)
        found.append(
            Evidence.compare(
                claim=f"{subject.plan.name} recalls beyond the attention window with its memory",
                metric="exact_match",
                before=mute.right,
                after=heard.right,
                chance=chance_of((part,), problems),
                parent_must_beat_chance=False,
                **_common(
                    config, subject.plan, gap_words=part.options["gap"], attention_reach=subject.model.config.reach
                ),
            )
        )
    return found


def with_threshold(model, threshold: float):
    """A copy that halts at another threshold (1.0 never halts early)."""
    other = build_model(model.config.replace(act_threshold=threshold))
    other.load_state_dict(model.state_dict())
    return other.to(next(model.parameters()).device).eval()


def _halting_claims(config, trunk, subjects: list[Subject], data: CognateData, tables) -> list[Evidence]:
    """Steps saved and accuracy kept on each specialist's own set, and what share of tokens took how many steps."""
    texts, histogram = report_windows(data, config), {}
    found: list[Evidence] = []
    if recurses(trunk):
        skills = held_out(config.trunk_mix, config.evaluation.problems)
        histogram["trunk, its skills"] = step_histogram(trunk, data, skills)
        histogram["trunk, text"] = text_histogram(trunk, texts)
    for subject in subjects:
        if not recurses(subject.model):
            continue
        name = subject.plan.name
        problems = held_out(subject.plan.mix, config.evaluation.problems)
        halted = score_problems(subject.model, data.tokenizer, problems)
        full = score_problems(with_threshold(subject.model, 1.0), data.tokenizer, problems)
        histogram[f"{name}, its speciality"] = step_histogram(subject.model, data, problems)
        histogram[f"{name}, text"] = text_histogram(subject.model, texts)
        common = _common(config, subject.plan, threshold=subject.model.config.act_threshold)
        steps = {"metric": "steps_per_token", "before": full.steps, "after": halted.steps, "chance": None}
        kept = {"metric": "exact_match", "before": full.right, "after": halted.right}
        chance = chance_of(subject.plan.mix, problems)
        saves = f"{name} saves recursion steps by halting"
        found.append(Evidence.compare(claim=saves, **steps, higher_is_better=False, **common))
        keeps = f"{name} keeps its accuracy when it halts"
        found.append(Evidence.compare(claim=keeps, **kept, chance=chance, **common))
    if histogram:
        tables["act_histogram"] = histogram
    return found


def recurses(model) -> bool:
    """Whether the model takes recursion steps, and so can halt."""
    return bool(getattr(model.config, "t_max", 0))


def report_windows(data: CognateData, config: CognateConfig) -> torch.Tensor:
    """(windows, seq_len) token ids of held-out text."""
    source = TextSource(encode_texts(data.tokenizer, data.report_texts))
    ids, _ = source.rows(np.random.default_rng(REPORT_SEED), config.evaluation.windows, config.trunk.seq_len)
    return torch.from_numpy(ids.astype(np.int64))


def text_histogram(model, ids_BT: torch.Tensor) -> dict[str, float]:
    """Share of text positions that took 1, 2, ... steps."""
    device = next(model.parameters()).device
    with torch.inference_mode():
        chunks = ids_BT.split(rows_at_once(model, ids_BT.shape[1]))
        steps = torch.cat([model(chunk.to(device)).steps.flatten().cpu() for chunk in chunks])
    return _shares(np.bincount(steps.numpy()), model.config.t_max)


def step_histogram(model, data: CognateData, problems: list[Problem]) -> dict[str, float]:
    """Share of answer tokens that took 1, 2, ... steps."""
    return _shares(score_problems(model, data.tokenizer, problems).tokens_by_steps, model.config.t_max)


def _shares(counts: np.ndarray, t_max: int) -> dict[str, float]:
    """Counts of 0, 1, 2, ... steps as shares of 1 to ``t_max``."""
    counts = np.pad(counts, (0, max(0, t_max + 1 - len(counts))))[1:]
    return {str(i): round(float(n / counts.sum()), 4) for i, n in enumerate(counts, 1)}
