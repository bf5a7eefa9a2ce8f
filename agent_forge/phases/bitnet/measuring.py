"""Measuring models that are to be compared: right answers, text, bytes, memory, speed.

Shapes: R rows, C columns of a matrix, N questions.
"""

from __future__ import annotations

import dataclasses
import math
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from agent_forge.phases.bitnet.config import SpeedPlan
from forgekit.data.batches import asked
from forgekit.data.gym import Problem
from forgekit.errors import ConfigError
from forgekit.infer.engine import Engine, Generation, evaluating
from forgekit.infer.sampling import SamplingConfig
from forgekit.measure.scores import TextScores, TextWindows, score_problems, score_windows
from forgekit.models.base import parameter_count
from forgekit.models.budget import solve_budget
from forgekit.models.config import FAMILIES, GPTConfig
from forgekit.models.io import build_model
from forgekit.quant.config import MapPlan, TernaryPlan
from forgekit.quant.files import read_packed, write_packed
from forgekit.quant.grid import weighted_error
from forgekit.quant.layers import PackedLinear, is_conv1d
from forgekit.quant.model import InputStatistics, image, plans_of

ROOM = 24
"""Tokens of an answer, after its thought where there is one."""
PLAIN = SamplingConfig(max_tokens=ROOM)
AT_ONCE = 256
"""Questions answered in one batch."""
EMBEDDING_SHARES = (0.4, 0.7, 0.9)
"""Shares of its parameters that a narrow model's embedding may take; the first that has a shape is taken."""


@dataclass(frozen=True)
class Reading:
    """What a model shows.

    Attributes:
        right: 1.0 where the greedy answer is right, (N,); empty where nothing was asked.
        thought: 1.0 where it thought before, (N,).
        text: bits of held-out text; ``length`` is the tokens of each window.
    """

    right: np.ndarray
    thought: np.ndarray
    text: TextScores
    length: int

    @property
    def accuracy(self) -> float | None:
        """Share of right answers; None where nothing was asked."""
        return float(self.right.mean()) if len(self.right) else None

    @property
    def bits_per_token(self) -> np.ndarray:
        """Of every window."""
        return self.text.bits / self.length

    @property
    def perplexity(self) -> float:
        """Per token, over all windows."""
        return float(2 ** self.bits_per_token.mean())


class Left(Exception):
    """Nobody wants to know any more."""


@dataclass(frozen=True)
class Asked:
    """What is asked of every model: questions of a split, text windows of it, and whether it may think; ``leaving`` is
    set when nobody wants to know any more."""

    problems: Sequence[Problem]
    windows: TextWindows
    thinks: bool
    thinking_budget: int
    leaving: threading.Event | None = None

    def of(self, model: nn.Module, tokenizer: Any) -> Reading:
        """Ask a model, greedily. One that thinks decides by itself about what."""
        text = score_windows(model, self.windows)
        length = self.windows.ids.shape[1] - 1
        if not self.problems:
            return Reading(np.zeros(0), np.zeros(0), text, length)
        if not self.thinks:  # one forward pass tells what generation would do
            right = score_problems(model, tokenizer, list(self.problems)).right
            return Reading(right, np.zeros(len(right)), text, length)
        return Reading(*self._generated(model, tokenizer), text, length)

    def _generated(self, model: nn.Module, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
        right, thought = np.zeros(len(self.problems)), np.zeros(len(self.problems))
        for i, one in self.answers(model, tokenizer):
            right[i] = is_right(one, self.problems[i])
            thought[i] = bool(one.thinking_tokens)
        return right, thought

    def answers(self, model: nn.Module, tokenizer: Any) -> Iterator[tuple[int, Generation]]:
        """Numbers of the questions and the greedy answers to them; questions of similar length are asked together."""
        engine, order = Engine(model, tokenizer), sorted(range(len(self.problems)), key=self._length)
        budget = self.thinking_budget if self.thinks else 0
        sampling = SamplingConfig(max_tokens=budget + ROOM, thinking_budget=budget) if budget else PLAIN
        for at in range(0, len(order), AT_ONCE):
            if self.leaving is not None and self.leaving.is_set():
                raise Left
            chosen = order[at : at + AT_ONCE]
            said = engine.generate([asked(tokenizer, self.problems[i].prompt) for i in chosen], sampling)
            yield from zip(chosen, said, strict=True)

    def _length(self, i: int) -> int:
        return len(self.problems[i].prompt)


def is_right(said: Generation, problem: Problem) -> bool:
    """Whether an answer is exactly right, and came to its end."""
    return said.finish_reason == "stop" and said.text == problem.answer


# Quantisation before training


def matrix(module: nn.Module) -> Tensor:
    """The weight of a linear map, plain or in training for the grid, rows first."""
    weight = getattr(module, "weight_RC", module.weight).detach()
    return weight.T if is_conv1d(module) else weight


def output_error(model: nn.Module, plan: MapPlan, statistics: Mapping[str, InputStatistics]) -> float:
    """Share of the energy of a map's outputs that its rounding changes, mean over the maps that calibration reached.

    Args:
        model: plain.
        plan: the grid.
        statistics: of :func:`forgekit.quant.model.calibrate`.
    """
    found = []
    for name, one in plans_of(model, plan).items():
        if name not in statistics:
            continue
        W_RC = matrix(model.get_submodule(name))
        moment_C = statistics[name].second_moment_C.to(W_RC.device)
        found.append(weighted_error(W_RC, image(W_RC, one), moment_C))
    return float(np.mean(found))


def chosen_threshold(
    model: nn.Module, plan: TernaryPlan, statistics: Mapping[str, InputStatistics], candidates: Sequence[float]
) -> tuple[TernaryPlan, dict[str, float]]:
    """The plan with the threshold that changes the outputs of all maps least, and the error of every candidate.

    A file has one plan, so the candidates are compared over all maps.

    Args:
        model: plain.
        plan: the grid; its own threshold where there are no candidates.
        statistics: of :func:`forgekit.quant.model.calibrate`.
        candidates: thresholds.
    """
    plans = [plan.replace(threshold=threshold) for threshold in candidates or (plan.threshold,)]
    errors = {one.threshold: output_error(model, one, statistics) for one in plans}
    best = min(errors, key=errors.__getitem__)
    return plan.replace(threshold=best), {f"{threshold:g}": error for threshold, error in errors.items()}


def grid_distance(model: nn.Module, plan: MapPlan) -> float:
    """Mean distance of a weight from its place on the grid, over all maps."""
    total = count = 0.0
    for name, one in plans_of(model, plan).items():
        W_RC = matrix(model.get_submodule(name)).float()
        total += float((W_RC - image(W_RC, one).dense()).abs().sum())
        count += W_RC.numel()
    return total / count


def zero_share(model: nn.Module, maps: Iterable[str]) -> float:
    """Share of a packed model's codes that are zero, over its linear maps of those names (at least one)."""
    zeros = count = 0
    for module in map(model.get_submodule, maps):
        codes_RC = module.ternary.codes_RC if isinstance(module, PackedLinear) else module.codes
        zeros, count = zeros + int((codes_RC == 0).sum()), count + codes_RC.numel()
    return zeros / count


def unique(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Stored tensors, each once."""
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def packed_bytes(model: nn.Module) -> int:
    """Bytes of a packed model's weights on disk, header included: it is written, and deleted again."""
    with tempfile.TemporaryDirectory() as folder:
        return write_packed(model, None, Path(folder))["total"]


def opens_alike(folder: Path, model: nn.Module) -> bool:
    """Whether a packed model, read back from disk, is the one that was measured, tensor for tensor."""
    again, own = read_packed(folder)[0].state_dict(), model.state_dict()
    return again.keys() == own.keys() and all(torch.equal(again[name], one.cpu()) for name, one in own.items())


def map_bits(plan: MapPlan) -> float:
    """Bits of a code of a linear map: of three values log2(3)."""
    return math.log2(3) if isinstance(plan, TernaryPlan) else float(plan.bits)


def bytes_float32(model: nn.Module) -> int:
    """Bytes of a model's stored tensors with four for every number that is no integer."""
    return sum(t.numel() * (4 if t.is_floating_point() else t.element_size()) for _, t in unique(model))


def bytes_stored(model: nn.Module) -> int:
    """Bytes of a model's stored tensors as they are."""
    return sum(t.nbytes for _, t in unique(model))


def narrow(config: Any, size: int, seed: int) -> nn.Module | None:
    """A fresh full-precision model whose float16 weights take ``size`` bytes; None where no shape is as small.

    Args:
        config: of the model it stands beside: its family, layers and vocabulary are taken over. Of a Hugging Face
            model, vocabulary, layers and context are, as a plain transformer.
        size: bytes.
        seed: of the initialisation.
    """
    template = config
    if getattr(config, "family", None) not in FAMILIES:
        length = config.max_seq_len or 1024
        template = GPTConfig(vocab_size=config.vocab_size, n_layers=config.n_layers, max_seq_len=length)
    for share in EMBEDDING_SHARES:
        try:
            shape = solve_budget(template, size // 2, tolerance=0.1, embedding_share=share).config
        except ConfigError:
            continue
        torch.manual_seed(seed)
        return build_model(shape)
    return None


# What it costs to run


@dataclass(frozen=True)
class Speed:
    """Decoding one row, one token at a time, models in turns.

    Attributes:
        rates: tokens per second of every block, by model.
        milliseconds: of every token, by model.
        state: bytes that the model keeps of what it has read, by model.
    """

    rates: dict[str, list[float]]
    milliseconds: dict[str, list[float]]
    state: dict[str, int]

    def rate(self, name: str) -> float:
        """Median tokens per second."""
        return float(np.median(self.rates[name]))


def decoding_speed(models: Mapping[str, nn.Module], prompt: Sequence[int], plan: SpeedPlan) -> Speed:
    """Time greedy decoding of one row.

    Args:
        models: by name, all with the prompt's vocabulary.
        prompt: token ids; every block starts behind them.
        plan: how long and how often.
    """
    speed = Speed({n: [] for n in models}, {n: [] for n in models}, dict.fromkeys(models, 0))
    for round_ in range(plan.rounds + 1):
        for name in list(models)[:: 1 if round_ % 2 else -1]:
            times, state = _block(models[name], prompt, plan.tokens)
            if round_:  # the first round warms up
                speed.rates[name].append(len(times) / sum(times))
                speed.milliseconds[name] += [1000 * seconds for seconds in times]
                speed.state[name] = held(state)
    return speed


@torch.inference_mode()
def _block(model: nn.Module, prompt: Sequence[int], tokens: int) -> tuple[list[float], Any]:
    """Seconds of every token, and the state after the last."""
    device, times = next(model.parameters()).device, []
    with evaluating(model):
        out = model(torch.tensor([list(prompt)], device=device), model.initial_state(1))
        for _ in range(tokens):
            began = time.perf_counter()
            out = model(out.logits[:, -1:].argmax(-1), out.state)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
    return times, out.state


def held(value: Any) -> int:
    """Bytes behind all tensors in a value made of containers, dataclasses and plain objects, each once: of views what
    they are views of, spare room included."""
    seen: set[int] = set()
    memory: dict[int, int] = {}

    def visit(one: Any) -> None:
        if id(one) in seen or isinstance(one, str | bytes | int | float | type | None):
            return
        seen.add(id(one))
        if isinstance(one, Tensor):
            memory[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        if isinstance(one, Mapping):
            parts: Iterable[Any] = one.values()
        elif isinstance(one, list | tuple):
            parts = one
        elif dataclasses.is_dataclass(one) or hasattr(one, "__dict__"):
            parts = [] if isinstance(one, Tensor | nn.Module) else vars(one).values()
        else:
            parts = []
        for part in parts:
            visit(part)

    visit(value)
    return sum(memory.values())


def size_of(model: nn.Module) -> int:
    """Bytes of a plain model's weights in float16."""
    return 2 * parameter_count(model)
