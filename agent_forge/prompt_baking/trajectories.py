"""Answers of the prompted model, what the teacher knew at each of their tokens, and batches of them.

Shapes: B rows, T tokens, N positions of answers, D model width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from agent_forge.prompt_baking.config import PromptBakingConfig
from agent_forge.prompt_baking.sides import Sides
from forgekit.data.batches import Batch
from forgekit.infer.engine import Engine, evaluating
from forgekit.infer.sampling import SamplingConfig
from forgekit.models.constants import IGNORE
from forgekit.models.hidden import hidden

ROWS = 32
"""Answers read at once where nothing is trained."""


@dataclass(frozen=True)
class Trajectory:
    """An answer after a context.

    Attributes:
        context: its number in the list it came from.
        bare: token ids of the context without the prompt, the answer opened.
        prompted: the same with the prompt.
        answer: token ids, the end token included where it came.
    """

    context: int
    bare: tuple[int, ...]
    prompted: tuple[int, ...]
    answer: tuple[int, ...]

    def ids(self, prompted: bool) -> list[int]:
        """Context and answer as the model reads them: the last token is only predicted."""
        return [*(self.prompted if prompted else self.bare), *self.answer[:-1]]


def sample(
    engine: Engine, sides: Sides, asked: tuple[str, Sequence[str]], config: PromptBakingConfig, key: tuple[int, ...]
) -> Iterator[list[Trajectory]]:
    """Answers of the prompted model, in batches.

    Args:
        asked: the prompt, and one context per answer (repeated, a context gets several answers).
        key: with the seed and an answer's number, decides its draws.
    """
    prompt, contexts = asked
    plan = SamplingConfig(max_tokens=config.max_tokens, temperature=config.temperature)
    seeds = np.random.SeedSequence([config.seed, *key]).generate_state(len(contexts)).tolist()
    for start in range(0, len(contexts), ROWS):
        part = range(start, min(start + ROWS, len(contexts)))
        prompts = [sides.ids(contexts[i], prompt) for i in part]
        found = engine.generate(prompts, plan, [seeds[i] for i in part])
        yield [
            Trajectory(i, tuple(sides.ids(contexts[i])), tuple(ids), tuple(answer.tokens))
            for i, ids, answer in zip(part, prompts, found)
        ]


def read(model: nn.Module, rows: Sequence[list[int]], lengths: Sequence[int]) -> list[Tensor]:
    """Features (length, D) of the last ``length`` tokens of every row; no gradients, on the CPU."""
    device, found = next(model.parameters()).device, {}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # alike beside alike: less padding
    with evaluating(model), torch.no_grad():
        for start in range(0, len(rows), ROWS):
            part = order[start : start + ROWS]
            h_BTD, _ = hidden(model, torch.from_numpy(padded([rows[i] for i in part])).to(device))
            for i, h_TD in zip(part, h_BTD):
                found[i] = h_TD[len(rows[i]) - lengths[i] : len(rows[i])].cpu().clone()
    return [found[i] for i in range(len(rows))]


def answers_read(model: nn.Module, trajectories: Sequence[Trajectory], prompted: bool) -> list[Tensor]:
    """Features (answer, D) from which every answer's tokens are predicted."""
    rows = [one.ids(prompted) for one in trajectories]
    return read(model, rows, [len(one.answer) for one in trajectories])


def padded(rows: Sequence[Sequence[int]], fill: int = 0) -> np.ndarray:
    """Rows as one array (B, T), padded on the right."""
    array = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for line, row in zip(array, rows):
        line[: len(row)] = row
    return array


class Lessons:
    """Unprompted trajectories in batches. A label is the number of the teacher's features at that position.

    Args:
        trajectories: what to train on.
        rows: per batch.
        seed: of the order.
    """

    def __init__(self, trajectories: Sequence[Trajectory], rows: int, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self.lines = [one.ids(prompted=False) for one in trajectories]
        self.sizes = [len(one.answer) for one in trajectories]
        self.starts = np.concatenate([[0], np.cumsum(self.sizes)[:-1]])

    @property
    def length(self) -> int:
        """Tokens of the longest row."""
        return max(map(len, self.lines))

    def batch(self, step: int) -> Batch:
        """Batch number ``step``: every pass over the trajectories has an order of its own."""
        each = -(-len(self.lines) // self.rows)
        order = np.random.default_rng([self.seed, step // each]).permutation(len(self.lines))
        chosen = order[step % each :: each]
        inputs = padded([self.lines[i] for i in chosen])
        labels = np.full_like(inputs, IGNORE)
        for line, i in zip(labels, chosen):
            end = len(self.lines[i])
            line[end - self.sizes[i] : end] = self.starts[i] + np.arange(self.sizes[i])
        return Batch(inputs, labels)
