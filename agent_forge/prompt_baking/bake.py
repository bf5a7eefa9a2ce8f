"""``bake_prompt``: weights that answer without a prompt as they did with it (arXiv 2409.13697).

The teacher is the model with the prompt before the context, the student the same weights with LoRA adapters and
without the prompt. On answers sampled from the teacher the student learns the teacher's whole distribution at every
token. The adapters are merged in the end. Training runs in :class:`forgekit.train.loop.Trainer`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agent_forge.pipeline.phase import Progress
from agent_forge.prompt_baking.adapters import Adapters, require_peft
from agent_forge.prompt_baking.config import PromptBakingConfig
from agent_forge.prompt_baking.contexts import Contexts, default_contexts, divided
from agent_forge.prompt_baking.divergence import chunk_size, divergence
from agent_forge.prompt_baking.sides import Sides, sides_of
from agent_forge.prompt_baking.trajectories import Lessons, Trajectory, answers_read, sample
from forgekit.errors import ConfigError
from forgekit.infer.engine import Engine
from forgekit.models.base import Loss, supervised_positions
from forgekit.models.hidden import check_head, hidden
from forgekit.models.unpacked import check_plain
from forgekit.train.loop import StepInfo, Trainer
from forgekit.train.setup import training_device

Show = Callable[[Progress], None]
NOTHING = 1e-4
"""Nats per token below which a prompt changes nothing worth baking."""
_USES = ("train", "decide", "report")
HALVINGS = 12
"""Steps of the bisection that scales the adapters: to one part in four thousand."""


@dataclass(frozen=True)
class HeldOut:
    """Answers that were not trained on, and what the teacher knew at every token.

    Attributes:
        prompt: the teacher's.
        trajectories: the answers.
        teacher: its features (T, D) for every answer, on the CPU.
        reader: a model with the teacher's output head.
        chunk: positions whose distributions are computed at once.
    """

    prompt: str
    trajectories: list[Trajectory]
    teacher: list[Tensor]
    reader: Any
    chunk: int

    def features(self, device: torch.device) -> Tensor:
        """The teacher's features of all answers, (N, D), and its head with them on the device."""
        self.reader.to(device)
        return torch.cat(self.teacher).to(device)

    def divergence(self, model: nn.Module) -> np.ndarray:
        """KL(teacher || unprompted model) in nats per token, one mean per answer."""
        device = next(model.parameters()).device
        given_ND = torch.cat(answers_read(model, self.trajectories, prompted=False)).to(device)
        with torch.inference_mode():
            heads = (self.reader.read_out, model.read_out)
            flat = divergence(self.features(device), given_ND, heads, self.chunk)
        sizes = [len(one.answer) for one in self.trajectories]
        return np.array([float(part.double().mean()) for part in flat.cpu().split(sizes)])


@dataclass
class Stage:
    """One baking of one prompt: all there is, or one of a sequence or of the rounds of a pursuit.

    Attributes:
        prompt: what was baked.
        losses: divergence in nats per token of every training step.
        before, after: divergence on the answers that decide, to this stage's teacher.
        scale: factor on the adapters when they were merged.
        tokens: input tokens trained on.
        checks: (step, divergence) on the answers that decide.
    """

    prompt: str
    losses: list[float] = field(default_factory=list)
    before: float = 0.0
    after: float = 0.0
    scale: float = 1.0
    tokens: int = 0
    checks: list[tuple[int, float]] = field(default_factory=list)

    @property
    def strength(self) -> float:
        """Share of the divergence that went."""
        return 1 - self.after / self.before if self.before else 0.0


@dataclass
class Baked:
    """A baked model and how it came about.

    Attributes:
        model: a new model; the given one is untouched.
        sides: how it is asked.
        config: as given.
        contexts: what was asked while baking, by use.
        stages: what was done, in order.
        held: for every prompt, the answers to report on, of the model it was first baked into.
        before, after: divergence on those, one array per prompt, one mean per answer.
        notes: what a user should know.
        seconds: wall time.
    """

    model: nn.Module
    sides: Sides
    config: PromptBakingConfig
    contexts: Contexts
    stages: list[Stage] = field(default_factory=list)
    held: list[HeldOut] = field(default_factory=list)
    before: list[np.ndarray] = field(default_factory=list)
    after: list[np.ndarray] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def prompts(self) -> tuple[str, ...]:
        """What was baked."""
        return tuple(held.prompt for held in self.held)

    @property
    def losses(self) -> list[float]:
        """Of all stages."""
        return [loss for stage in self.stages for loss in stage.losses]

    @property
    def divergence_before(self) -> float:
        """Nats per token between prompted and unprompted before baking, on the report's answers."""
        return float(np.concatenate(self.before).mean())

    @property
    def divergence_after(self) -> float:
        """The same after baking."""
        return float(np.concatenate(self.after).mean())

    @property
    def trajectories(self) -> dict[str, int]:
        """Answers used, by use."""
        held = sum(len(one.trajectories) for one in self.held)
        stages = len(self.stages)
        return {"train": stages * self.config.trajectories, "decide": stages * self.config.held_out, "report": held}


def bake_prompt(
    model: nn.Module,
    prompt: str | Sequence[str],
    config: PromptBakingConfig | None = None,
    *,
    tokenizer: Any,
    contexts: Sequence[str] | Contexts | None = None,
    show: Show | None = None,
) -> Baked:
    """Bake a prompt (in mode ``sequential``, several) into a copy of a model.

    Args:
        model: any model of the house's protocol, Hugging Face models included.
        prompt: what the model should do without being told.
        config: how; the defaults fit models of about a million parameters.
        tokenizer: the model's.
        contexts: questions unrelated to the prompt, to answer while learning; by default the gym's and Python's prose.
        show: told the progress.

    Raises:
        ConfigError: no prompt, an empty one, or several without mode ``sequential``; a target that fits nothing.
        DataError: prompt, context and answer are longer than the model's context; too few contexts.
        ArtifactError: the chat template cannot be asked without a system prompt, or the model's head stands not alone;
            its weights are packed.
        ResourceError: peft is not installed, or memory is too small.
        TrainingError: diverged in spite of lower rates.
    """
    began, config = time.perf_counter(), config or PromptBakingConfig()
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    if not prompts or (len(prompts) > 1 and config.mode != "sequential"):
        remedy = "use mode sequential for several" if prompts else "give the text to bake"
        raise ConfigError(f"{len(prompts)} prompts in mode {config.mode}", where="prompt", remedy=remedy)
    check_plain(model)
    sides = sides_of(model, tokenizer)
    chosen = _contexts(contexts, config, sides, prompts)
    check_head(model)
    require_peft()
    baked = Baked(copy.deepcopy(model).eval(), sides, config, chosen, notes=list(sides.notes))
    baked.model.to(training_device(config.device))
    oven = _Oven(baked, show or (lambda progress: None))
    for number, text in enumerate(prompts):
        report = oven.held_out(text, chosen.report, (number, 0, 2))
        baked.held.append(report)
        baked.before.append(report.divergence(baked.model))
        for round_ in range(config.rounds if config.mode == "pursuit" else 1):
            baked.stages.append(oven.bake(text, (number, round_)))
    baked.after = [held.divergence(baked.model) for held in baked.held]
    baked.model.to(next(model.parameters()).device)
    baked.seconds = time.perf_counter() - began
    return baked


def _contexts(
    given: Sequence[str] | Contexts | None, config: PromptBakingConfig, sides: Sides, prompts: list[str]
) -> Contexts:
    """The contexts to use; given ones must fit, of the default ones those are taken that do."""
    for text in prompts:
        sides.check(text, [""], config.max_tokens)
    if given is None:
        found = default_contexts(config.trajectories, config.held_out, config.seed)
        room = sides.limit - config.max_tokens if sides.limit else None
        longest = max(prompts, key=lambda text: len(sides.ids("", text)))
        kept = [
            tuple(text for text in texts if room is None or len(sides.ids(text, longest)) <= room)
            for texts in (found.train, found.decide, found.report)
        ]
        if not all(kept):
            sides.check(longest, [*found.train, *found.decide, *found.report], config.max_tokens)
        return Contexts(*kept)
    chosen = given if isinstance(given, Contexts) else divided(given, config.seed)
    for text in prompts:
        sides.check(text, [*chosen.train, *chosen.decide, *chosen.report], config.max_tokens)
    return chosen


class _Reached(Exception):
    """The wanted strength is reached: leaves the training loop, which knows of no such end."""


class Student(nn.Module):
    """What the training loop trains: the adapters alone. The frozen model is out of its sight, or every snapshot and
    every average would copy it; it stays in eval mode, because dropout would be noise between two equal sides."""

    def __init__(self, model: nn.Module, adapters: Adapters, teacher: tuple[Tensor, nn.Module], chunk: int) -> None:
        super().__init__()
        self.adapters = nn.ParameterList(adapters.parameters.values())
        self.config, self.chunk = model.config, chunk
        self.teacher_ND, reader = teacher
        self.__dict__.update(base=model, reader=reader)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self.base._apply(fn)
        if self.reader is not self.base:
            self.reader._apply(fn)
        return super()._apply(fn, recurse)

    def training_loss(self, input_ids_BT: Tensor, labels_BT: Tensor) -> Loss:
        """Mean divergence in nats over the answers' tokens; a label is a row of the teacher's features."""
        h_BTD, _ = hidden(self.base, input_ids_BT)
        at_N = supervised_positions(labels_BT)
        rows_N = labels_BT.reshape(-1)[at_N].to(self.teacher_ND.device)
        teacher_ND = self.teacher_ND[rows_N].to(h_BTD.device)
        heads = (self.reader.read_out, self.base.read_out)
        nats_N = divergence(teacher_ND, h_BTD.flatten(0, 1)[at_N], heads, self.chunk)
        nats = nats_N.sum() / max(1, nats_N.numel())
        return Loss(nats, nats.detach(), nats_N.numel())


class _Oven:
    """One model being baked in place, prompt after prompt."""

    def __init__(self, baked: Baked, show: Show) -> None:
        self.baked, self.show, self.config, self.model = baked, show, baked.config, baked.model
        self.chunk = chunk_size(self.model.config.vocab_size, self.config.chunk)
        self.engine = Engine(self.model, baked.sides.tokenizer)

    def held_out(self, prompt: str, contexts: Sequence[str], key: tuple[int, ...]) -> HeldOut:
        """Answers of the model as it is now, prompted, and what it knew."""
        found = self._sampled(prompt, contexts, self.config.held_out, key)
        teacher = answers_read(self.model, found, prompted=True)
        return HeldOut(prompt, found, teacher, self._reader(), self.chunk)

    def bake(self, prompt: str, key: tuple[int, int]) -> Stage:
        """Move the prompt's effect into the weights."""
        stage, contexts = Stage(prompt), self.baked.contexts
        lessons = self._sampled(prompt, contexts.train, self.config.trajectories, (*key, 0))
        decide = self.held_out(prompt, contexts.decide, (*key, 1))
        teacher = torch.cat(answers_read(self.model, lessons, prompted=True))
        stage.before = stage.after = float(decide.divergence(self.model).mean())
        if stage.before < NOTHING:
            self.baked.notes.append(f"the prompt {prompt[:40]!r} changes nothing: {stage.before:.1e} nats per token")
        if not self.config.steps(len(lessons)):
            return stage
        adapters = Adapters(self.model, self.config)
        try:
            student = Student(self.model, adapters, (teacher, decide.reader), self.chunk)
            best = self._train(student, lessons, decide, stage)
            adapters.load(best)
            self._scale(adapters, decide, stage)
        except BaseException:
            adapters.remove()
            raise
        adapters.merge()
        return stage

    def _sampled(self, prompt: str, contexts: Sequence[str], count: int, key: tuple[int, ...]) -> list[Trajectory]:
        found: list[Trajectory] = []
        asked = [contexts[i % len(contexts)] for i in range(count)]
        for part in sample(self.engine, self.baked.sides, (prompt, asked), self.config, key):
            found += part
            self.show(Progress(f"answers to {_USES[key[-1]]}", len(found), count))
        return found

    def _reader(self) -> nn.Module:
        """A model whose output head stays as it is now; adapters reach it only where a recursion belongs to it."""
        return copy.deepcopy(self.model) if getattr(self.model.config, "t_max", 0) else self.model

    def _train(self, student: Student, found: list[Trajectory], decide: HeldOut, stage: Stage) -> list[Tensor]:
        """Train; the adapters' tensors where the held-out answers were best, or where the strength was reached."""
        config, wanted = self.config, (1 - self.config.share) * stage.before
        lessons = Lessons(found, config.rows, config.seed)
        plan = config.training(len(found), lessons.length)
        every, best = config.every(plan.steps), [stage.before, [p.detach().clone() for p in student.adapters]]

        def watch(info: StepInfo) -> None:
            self.show(Progress("baking", info.step, info.steps, f"{info.loss:.4f} nats per token"))
            if info.step % every and info.step != info.steps:
                return
            stage.checks.append((info.step, float(decide.divergence(self.model).mean())))
            if stage.checks[-1][1] < best[0]:
                best[:] = stage.checks[-1][1], [p.detach().clone() for p in student.adapters]
            if config.share < 1 and stage.checks[-1][1] <= wanted:
                raise _Reached

        trainer = Trainer(student, lessons, plan, observer=watch)
        try:
            trainer.run()
        except _Reached:
            self.show(Progress("baking", plan.steps, plan.steps, "strength reached"))
        position = trainer.state.position
        stage.losses, stage.tokens, stage.after = list(position["losses"]), position["tokens"], best[0]
        return best[1]

    def _scale(self, adapters: Adapters, decide: HeldOut, stage: Stage) -> None:
        """Scale the adapters back, by bisection, to the wanted strength where it was passed."""
        if self.config.share == 1:
            return
        wanted = (1 - self.config.share) * stage.before
        if stage.after > wanted:
            what = f"strength {self.config.share:g} was not reached: {stage.strength:.3f}"
            self.baked.notes.append(f"{what}; more num_epochs or a higher learning_rate may")
            return
        low, high = 0.0, 1.0
        for _ in range(HALVINGS):
            middle = (low + high) / 2
            adapters.scale(middle)
            now = float(decide.divergence(self.model).mean())
            low, high = (middle, high) if now > wanted else (low, middle)
        adapters.scale(high)
        stage.scale, stage.after = high, float(decide.divergence(self.model).mean())
