"""The costly comparisons: what memory and recursion are worth when each side is trained for itself.

Recursion against plain: the plain family of the same width gets as many more steps as its cheaper tokens buy, so
both sides spend the same training FLOPs. Memory against none: the memory specialist is trained again, from the
same trunk data and for the same tokens, on a model that has no memory.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from agent_forge.phases.cognate.config import CognateConfig
from agent_forge.phases.cognate.data import CognateData, specialist_mixture, trunk_mixture
from agent_forge.phases.cognate.evidence import chance_of, far_mix, report_set
from agent_forge.pipeline.phase import Progress
from forgekit.measure.evidence import Evidence
from forgekit.measure.scores import score_problems, score_text
from forgekit.models.config import GPTConfig
from forgekit.models.io import build_model
from forgekit.train.config import TrainConfig
from forgekit.train.loop import Trainer

Show = Callable[[Progress], None]


def ablations(config: CognateConfig, shape, trunk, data: CognateData, show: Show) -> list[Evidence]:
    """Train and measure the ablations of this run; needs about twice the phase's own time."""
    return [*recursion_against_plain(config, shape, trunk, data, show), *memory_against_none(config, shape, data, show)]


def plain_shape(shape) -> GPTConfig:
    """The ``gpt`` of the same width, depth, window and vocabulary."""
    return GPTConfig(**{k: v for k, v in shape.model_dump().items() if k in GPTConfig.model_fields and k != "family"})


def recursion_against_plain(config, shape, trunk, data: CognateData, show: Show) -> list[Evidence]:
    """The trunk against the plain family at matched training FLOPs, on the trunk's skills and on text."""
    plain = plain_shape(shape)
    length = config.trunk.seq_len
    ratio = shape.flops_per_token(length) / plain.flops_per_token(length)
    train = config.trunk.replace(steps=round(config.trunk.steps * ratio))
    model = _train(plain, train, trunk_mixture(data, config), "plain, same FLOPs", show)
    tokens = train.steps * train.rows * length
    common = {
        "split": "report",
        "seeds": (config.trunk.seed,),
        "compute": {"train_flops": 3 * tokens * plain.flops_per_token(length), "plain_steps": train.steps},
    }
    problems = report_set(config.trunk_mix, config.evaluation.problems)
    before, after = (score_problems(m, data.tokenizer, problems) for m in (model, trunk))
    skill = Evidence.compare(
        claim="memory and recursion beat the plain family at matched training FLOPs (skills)",
        metric="exact_match",
        before=before.right,
        after=after.right,
        chance=chance_of(problems),
        parent_must_beat_chance=False,
        **common,
    )
    before, after = (
        score_text(m, data.tokenizer, data.report_texts, length, config.evaluation.windows).per_window
        for m in (model, trunk)
    )
    text = Evidence.compare(
        claim="memory and recursion beat the plain family at matched training FLOPs (text)",
        metric="bits_per_byte",
        before=before,
        after=after,
        chance=None,
        higher_is_better=False,
        **common,
    )
    return [skill, text]


def memory_against_none(config, shape, data: CognateData, show: Show) -> list[Evidence]:
    """The memory specialist's data, learned from scratch with and without a memory, tested beyond the window."""
    plan = next((s for s in config.specialists if any(m.family == "far_recall" for m in s.mix)), None)
    if plan is None or not shape.memories:
        return []
    train = config.training_of(plan)
    train = train.replace(steps=train.steps + config.trunk.steps // 2)
    mixture = specialist_mixture(data, config, plan, train)
    sides = {
        memory: _train(shape.replace(memory=memory), train, mixture, f"memory {memory}", show)
        for memory in ("none", shape.memory)
    }
    part = far_mix(config, sides[shape.memory])
    problems = report_set((part,), config.evaluation.problems)
    before, after = (score_problems(sides[m], data.tokenizer, problems) for m in ("none", shape.memory))
    return [
        Evidence.compare(
            claim="a model trained with memory recalls beyond the window better than one trained without",
            metric="exact_match",
            before=before.right,
            after=after.right,
            chance=chance_of(problems),
            parent_must_beat_chance=False,
            split="report",
            seeds=(train.seed,),
            compute={"train_tokens": train.steps * train.rows * train.seq_len, "gap_words": part.options["gap"]},
        )
    ]


def _train(shape, train: TrainConfig, mixture, name: str, show: Show):
    torch.manual_seed(train.seed)
    model = build_model(shape)
    Trainer(model, mixture, train, observer=lambda info: show(Progress(name, info.step, info.steps))).run()
    return model
