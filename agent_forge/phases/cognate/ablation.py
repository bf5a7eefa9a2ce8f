"""The costly comparisons: what memory, recursion and specialisation are worth when each side is trained for itself.

- Against the plain family, and against the same family without recursion, at equal training FLOPs: the cheaper side
  gets as many more steps as its cheaper tokens buy.
- Memory against none: the memory specialist's data, learned from scratch by a model with and one without a memory.
- Specialisation against more of the same: the trunk trained on for as long as the reasoning specialist was.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from agent_forge.phases.cognate.config import CognateConfig, GymMix
from agent_forge.phases.cognate.data import CognateData, specialist_mixture, trunk_mixture
from agent_forge.phases.cognate.evidence import Subject, chance_of, far_mix, own_claim, report_set
from agent_forge.pipeline.phase import Progress
from forgekit.measure.evidence import Evidence
from forgekit.measure.scores import score_problems, score_text
from forgekit.models.config import GPTConfig
from forgekit.models.io import build_model
from forgekit.train.config import TrainConfig
from forgekit.train.loop import Trainer

Show = Callable[[Progress], None]


def ablations(config: CognateConfig, trunk, subjects: list[Subject], data: CognateData, show: Show) -> list[Evidence]:
    """Train and measure the ablations of this run; needs about twice the phase's own time."""
    shape = trunk.config
    sides = {"the plain family": plain_shape(shape)}
    if getattr(shape, "t_max", 0):
        sides["the same family without recursion"] = shape.replace(t_max=0)
    found = [e for name, side in sides.items() for e in at_equal_flops(config, trunk, (name, side), data, show)]
    found += memory_against_none(config, shape, data, show)
    return found + specialist_against_longer_trunk(config, trunk, subjects[0], data, show)


def plain_shape(shape) -> GPTConfig:
    """The ``gpt`` of the same width, depth, window and vocabulary."""
    return GPTConfig(**{k: v for k, v in shape.model_dump().items() if k in GPTConfig.model_fields and k != "family"})


def supervised_share(mixture, batches: int = 8) -> float:
    """Share of a mixture's tokens that carry a label."""
    drawn = [mixture.batch(i) for i in range(batches)]
    return sum(b.supervised for b in drawn) / sum(b.inputs.size for b in drawn)


def at_equal_flops(config, trunk, other: tuple[str, GPTConfig], data: CognateData, show: Show) -> list[Evidence]:
    """The trunk against another shape at equal training FLOPs, on the trunk's skills and on text."""
    name, side = other
    mixture, length = trunk_mixture(data, config), config.trunk.seq_len
    share = supervised_share(mixture)
    spent = trunk.config.train_flops_per_token(length, share)
    ratio = spent / side.train_flops_per_token(length, share)
    train = config.trunk.replace(steps=round(config.trunk.steps * ratio))
    model = _train(side, train, mixture, name.removeprefix("the "), show)
    flops = config.trunk.steps * config.trunk.rows * length * spent
    compute = {"train_flops": flops, "trunk_steps": config.trunk.steps, "other_steps": train.steps}
    common = {"split": "report", "seeds": (config.trunk.seed,), "compute": compute}
    problems = report_set(config.trunk_mix, config.evaluation.problems)
    before, after = (score_problems(m, data.tokenizer, problems) for m in (model, trunk))
    skill = Evidence.compare(
        claim=f"the trunk beats {name} at equal training FLOPs (skills)",
        metric="exact_match",
        before=before.right,
        after=after.right,
        baseline=before.accuracy,
        chance=chance_of(config.trunk_mix, problems),
        parent_must_beat_chance=False,
        **common,
    )
    windows = config.evaluation.windows
    texts = (score_text(m, data.tokenizer, data.report_texts, length, windows).per_window for m in (model, trunk))
    before, after = texts
    text = Evidence.compare(
        claim=f"the trunk beats {name} at equal training FLOPs (text)",
        metric="bits_per_byte",
        before=before,
        after=after,
        baseline=float(before.mean()),
        chance=None,
        higher_is_better=False,
        **common,
    )
    return [skill, text]


def memory_against_none(config, shape, data: CognateData, show: Show) -> list[Evidence]:
    """The memory specialist's data, learned from scratch with and without a memory, tested beyond the window."""
    plan = next((s for s in config.specialists if any(m.family == "far_recall" for m in s.mix)), None)
    if plan is None or not getattr(shape, "memories", ()):
        return []
    train = config.training_of(plan)
    train = train.replace(steps=train.steps + config.trunk.steps // 2)
    mixture = specialist_mixture(data, config, plan, train)
    sides = {
        memory: _train(shape.replace(memory=memory), train, mixture, f"memory {memory}", show)
        for memory in ("none", shape.memory)
    }
    part = far_mix(config, sides[shape.memory])
    compute = {"train_tokens": train.steps * train.rows * train.seq_len, "gap_words": part.options["gap"]}
    claim = "trained with a memory, recall beyond the window is better than trained without"
    return [_skill(claim, (part,), (sides["none"], sides[shape.memory]), data, (config, compute))]


def specialist_against_longer_trunk(config, trunk, subject: Subject, data: CognateData, show: Show) -> list[Evidence]:
    """The first specialist against the trunk trained on with its own data for as many steps."""
    train = config.training_of(subject.plan)
    model = build_model(trunk.config)
    model.load_state_dict(trunk.state_dict())
    Trainer(model, trunk_mixture(data, config), train, observer=_shower("trunk trained on", show)).run()
    claim = own_claim(subject.plan.name).replace("the trunk", "a trunk trained on for as long")
    compute = {"train_tokens": train.steps * train.rows * train.seq_len}
    return [_skill(claim, subject.plan.mix, (model, subject.model), data, (config, compute))]


def _skill(claim: str, mix: tuple[GymMix, ...], sides: tuple, data: CognateData, run: tuple) -> Evidence:
    """Exact answers of two models on a mix's report problems."""
    config, compute = run
    problems = report_set(mix, config.evaluation.problems)
    before, after = (score_problems(m, data.tokenizer, problems) for m in sides)
    return Evidence.compare(
        claim=claim,
        metric="exact_match",
        before=before.right,
        after=after.right,
        baseline=before.accuracy,
        chance=chance_of(mix, problems),
        parent_must_beat_chance=False,
        split="report",
        seeds=(config.trunk.seed,),
        compute=compute,
    )


def _shower(name: str, show: Show):
    return lambda info: show(Progress(name, info.step, info.steps))


def _train(shape, train: TrainConfig, mixture, name: str, show: Show):
    torch.manual_seed(train.seed)
    model = build_model(shape)
    Trainer(model, mixture, train, observer=_shower(name, show)).run()
    return model
