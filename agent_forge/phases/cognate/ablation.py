"""The costly comparisons: what memory, recursion and specialisation are worth when each side is trained for itself.

- Against the plain family, and against the same family with recursion (without, where the trunk recurses), at equal
  training FLOPs: the cheaper side gets as many more steps as its cheaper tokens buy.
- Every specialist that recurses against the same specialist without, at equal training FLOPs.
- Memory against none: the memory specialist's data, learned from scratch by a model with and one without a memory.
- Specialisation against more of the same: the trunk trained on for as long as the reasoning specialist was.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from agent_forge.phases.cognate.config import CognateConfig, SpecialistPlan
from agent_forge.phases.cognate.data import CognateData, specialist_mixture, supervised_share, trunk_mixture
from agent_forge.phases.cognate.evidence import Subject, far_mix, own_claim, recurses
from agent_forge.pipeline.phase import Progress
from forgekit.data.plans import GymMix
from forgekit.data.problems import REPORT_SEED, held_out
from forgekit.measure.evidence import Evidence
from forgekit.measure.problems import chance_of
from forgekit.measure.scores import score_problems, score_text
from forgekit.models.config import GPTConfig
from forgekit.models.io import build_model
from forgekit.train.config import TrainConfig
from forgekit.train.distributed import gathered
from forgekit.train.loop import StepInfo, Trainer

Show = Callable[[Progress], None]


@dataclass(frozen=True)
class Bench:
    """What the comparisons are made with.

    Attributes:
        config: the phase's settings.
        data: tokenizer, texts and problems.
        trunk: the trained trunk.
        subjects: the trained specialists.
        show: called with :class:`Progress`.
        folder: where the trainings keep their checkpoints; ``None`` keeps none.
    """

    config: CognateConfig
    data: CognateData
    trunk: torch.nn.Module
    subjects: list[Subject]
    show: Show
    folder: Path | None = None

    def train(self, shape, train: TrainConfig, mixture, name: str, *, start=None):
        """A model trained from nothing, or from the weights of ``start``; goes on where it was interrupted."""
        torch.manual_seed(train.seed)
        model = build_model(shape)
        if start is not None:
            model.load_state_dict(start.state_dict())
        folder = self.folder and self.folder / re.sub(r"\W+", "-", name)

        def observe(info: StepInfo) -> None:
            self.show(Progress(name, info.step, info.steps))

        Trainer(model, mixture, train, folder, observer=observe).run()
        return gathered(model, lambda: build_model(shape)).eval()

    def seeds(self, *plans: SpecialistPlan) -> tuple[int, ...]:
        """Of the trunk, of the specialists concerned and of the report problems."""
        return (self.config.trunk.seed, *(plan.seed for plan in plans), REPORT_SEED)

    def skill(self, claim: str, mix: tuple[GymMix, ...], sides: tuple, **facts: Any) -> Evidence:
        """Exact answers of two models on a mix's report problems; ``facts`` are the evidence's compute and seeds."""
        problems = held_out(mix, self.config.evaluation.problems)
        before, after = (score_problems(m, self.data.tokenizer, problems) for m in sides)
        return Evidence.compare(
            claim=claim,
            metric="exact_match",
            before=before.right,
            after=after.right,
            baseline=before.accuracy,
            chance=chance_of(mix, problems),
            parent_must_beat_chance=False,
            split="report",
            **facts,
        )

    def text(self, claim: str, sides: tuple, **facts: Any) -> Evidence:
        """Bits per byte of two models on held-out text."""
        length, windows = self.config.trunk.seq_len, self.config.evaluation.windows
        scores = (score_text(m, self.data.tokenizer, self.data.report_texts, length, windows) for m in sides)
        before, after = (score.per_window for score in scores)
        return Evidence.compare(
            claim=claim,
            metric="bits_per_byte",
            before=before,
            after=after,
            baseline=float(before.mean()),
            chance=None,
            higher_is_better=False,
            split="report",
            **facts,
        )


def ablations(bench: Bench) -> list[Evidence]:
    """Train and measure the ablations of this run; needs about twice the phase's own time."""
    shape = bench.trunk.config
    sides = {"the plain family": plain_shape(shape)} | recursion_switched(shape, bench.subjects)
    found = [e for name, side in sides.items() for e in at_equal_flops(bench, name, side)]
    found += [recursion_against_none(bench, subject) for subject in bench.subjects if recurses(subject.model)]
    return [*found, *memory_against_none(bench), specialist_against_longer_trunk(bench, bench.subjects[0])]


def plain_shape(shape) -> GPTConfig:
    """The ``gpt`` of the same width, depth, window and vocabulary, its feed-forward widened to as many parameters."""
    same = {k: v for k, v in shape.model_dump().items() if k in GPTConfig.model_fields and k != "family"}
    return widened(GPTConfig(**same), shape.parameters())


def widened(shape: GPTConfig, parameters: int) -> GPTConfig:
    """A shape with the feed-forward width that brings it nearest to so many parameters."""
    more = round((parameters - shape.parameters()) / (2 * shape.d_model * shape.n_layers))
    return shape.replace(ffn_hidden=shape.ffn_hidden + more)


def recursion_switched(shape, subjects: list[Subject]) -> dict[str, GPTConfig]:
    """The trunk's shape with its recursion switched the other way: off, or on for as many steps as a specialist's."""
    if getattr(shape, "t_max", 0):
        return {"the same family without recursion": shape.replace(t_max=0)}
    steps = max((getattr(s.model.config, "t_max", 0) for s in subjects), default=0)
    return {"the same family with recursion": shape.replace(t_max=steps)} if steps else {}


def at_equal_flops(bench: Bench, name: str, side: GPTConfig) -> list[Evidence]:
    """The trunk against another shape at equal training FLOPs, on the trunk's skills and on text."""
    config, trunk = bench.config, bench.trunk
    mixture, length = trunk_mixture(bench.data, config), config.trunk.seq_len
    share = supervised_share(mixture)
    spent = trunk.config.train_flops_per_token(length, share)
    ratio = spent / side.train_flops_per_token(length, share)
    train = config.trunk.replace(steps=round(config.trunk.steps * ratio))
    sides = bench.train(side, train, mixture, name.removeprefix("the ")), trunk
    flops = config.trunk.steps * config.trunk.rows * length * spent
    compute = {"train_flops": flops, "trunk_steps": config.trunk.steps, "other_steps": train.steps}
    claim = f"the trunk beats {name} at equal training FLOPs"
    facts = {"compute": compute, "seeds": bench.seeds()}
    skill = bench.skill(f"{claim} (skills)", config.trunk_mix, sides, **facts)
    return [skill, bench.text(f"{claim} (text)", sides, **facts)]


def recursion_against_none(bench: Bench, subject: Subject) -> Evidence:
    """A specialist that recurses against its like that does not, both from the trunk, at equal training FLOPs."""
    plan, shape = subject.plan, subject.model.config
    train = bench.config.training_of(plan)
    mixture = specialist_mixture(bench.data, bench.config, plan, train)
    share, without = supervised_share(mixture), shape.replace(t_max=0)
    ratio = shape.train_flops_per_token(train.seq_len, share) / without.train_flops_per_token(train.seq_len, share)
    longer = train.replace(steps=round(train.steps * ratio))
    other = bench.train(without, longer, mixture, f"{plan.name} without recursion", start=bench.trunk)
    claim = f"{plan.name} is better with recursion than without, at equal training FLOPs"
    compute = {"specialist_steps": train.steps, "other_steps": longer.steps}
    return bench.skill(claim, plan.mix, (other, subject.model), compute=compute, seeds=bench.seeds(plan))


def memory_against_none(bench: Bench) -> list[Evidence]:
    """The memory specialist's data, learned from scratch with and without a memory, tested beyond the window."""
    config, shape = bench.config, bench.trunk.config
    plan = next((s for s in config.specialists if any(m.family == "far_recall" for m in s.mix)), None)
    if plan is None or not getattr(shape, "memories", ()):
        return []
    train = config.training_of(plan)
    train = train.replace(steps=train.steps + config.trunk.steps // 2)
    mixture = specialist_mixture(bench.data, config, plan, train)
    sides = tuple(
        bench.train(shape.replace(memory=memory), train, mixture, f"memory {memory}")
        for memory in ("none", shape.memory)
    )
    part = far_mix(config, sides[1])
    compute = {"train_tokens": train.steps * train.rows * train.seq_len, "gap_words": part.options["gap"]}
    claim = "trained with a memory, recall beyond the window is better than trained without"
    return [bench.skill(claim, (part,), sides, compute=compute, seeds=bench.seeds(plan))]


def specialist_against_longer_trunk(bench: Bench, subject: Subject) -> Evidence:
    """The first specialist against the trunk trained on with its own data for as many steps."""
    train, trunk = bench.config.training_of(subject.plan), bench.trunk
    mixture = trunk_mixture(bench.data, bench.config)
    longer = bench.train(trunk.config, train, mixture, "trunk trained on", start=trunk)
    claim = own_claim(subject.plan.name).replace("the trunk", "a trunk trained on for as long")
    compute = {"train_tokens": train.steps * train.rows * train.seq_len}
    facts = {"compute": compute, "seeds": bench.seeds(subject.plan)}
    return bench.skill(claim, subject.plan.mix, (longer, subject.model), **facts)
