"""Choosing the next token from its scores.

Every filter is a pure function from logits to logits: what it rules out becomes -inf, and the most likely
token always survives. They apply in this order: repetition penalty, temperature, top-k, top-p, min-p.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from forgekit.config import Config


class SamplingConfig(Config):
    """How a continuation is drawn and when it ends."""

    max_tokens: Annotated[int, Field(gt=0)] = 256
    """Tokens generated at most, the end token included."""
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Divides the logits; 0 always takes the most likely token."""
    top_k: Annotated[int, Field(ge=0)] = 0
    """Sample among this many most likely tokens; 0 switches it off."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample among the fewest tokens that together have this probability; 1 switches it off."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Drop tokens less likely than this share of the most likely one; 0 switches it off."""
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Weakens tokens already in the prompt or the answer; 1 switches it off."""
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Strings that end the text; they are not part of it. In a thought they mean nothing."""
    seed: int = 0
    """Where the randomness of every row starts."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Think before answering: always, never, or as the model decides by its first token."""
    thinking_budget: Annotated[int, Field(ge=0)] = 0
    """Tokens of a thought at most, before it is ended by force; 0 is three quarters of max_tokens. The answer always
    keeps room for a token."""


GREEDY = SamplingConfig()
"""The most likely token, always."""


def penalise_repeats(logits_BV: Tensor, history: Sequence[Sequence[int]], penalty: float) -> Tensor:
    """Weaken tokens of each row's history: positive logits are divided, negative ones multiplied (CTRL, 1909.05858).

    The paper only divides, which would *favour* a repeated token with a negative logit; transformers does as here.
    """
    logits_BV = logits_BV.clone()
    for row, seen in zip(logits_BV, history, strict=True):
        ids = torch.tensor(sorted(set(seen)), dtype=torch.long, device=row.device)
        row[ids] = torch.where(row[ids] > 0, row[ids] / penalty, row[ids] * penalty)
    return logits_BV


COLDEST = 1e-4
"""Below this temperature the best token is taken: float32 would soon divide nothing by nothing."""


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Keep exactly the ``k`` highest logits of each row; among equals the lower token id is kept."""
    if k >= logits_BV.shape[-1]:
        return logits_BV
    kth_B1 = logits_BV.topk(k).values[:, -1:]
    above, level = logits_BV > kth_B1, logits_BV == kth_B1
    room_B1 = k - above.sum(-1, keepdim=True)
    return logits_BV.masked_fill(~(above | (level & (level.cumsum(-1) <= room_B1))), -math.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep the smallest set of tokens whose probability reaches ``p`` (Holtzman et al., 1904.09751).

    Among equals the lower token id counts first.
    """
    ordered, order = logits_BV.sort(dim=-1, descending=True, stable=True)
    mass_before = ordered.softmax(-1).cumsum(-1).roll(1, dims=-1)
    mass_before[:, 0] = 0
    drop = mass_before >= p
    return logits_BV.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), -math.inf)


def keep_min_p(logits_BV: Tensor, share: float) -> Tensor:
    """Drop tokens whose probability is below ``share`` of the most likely token's (2407.01082)."""
    return logits_BV.masked_fill(logits_BV < logits_BV.amax(-1, keepdim=True) + math.log(share), -math.inf)


def draw(logits_BV: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """One token per row by inverting the cumulative distribution, row b with its own CPU generator.

    Done in float64 on the CPU: the same draws on every device, and a token of probability 0 is never taken.
    """
    cdf_BV = logits_BV.softmax(-1).cpu().double().cumsum(-1)
    total_B1 = cdf_BV[:, -1:]
    uniform_B1 = torch.stack([torch.rand(1, generator=g, dtype=torch.float64) for g in generators])
    # Rounding may lift u * total to the total itself, beyond the last token.
    target_B1 = torch.minimum(uniform_B1 * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    return torch.searchsorted(cdf_BV, target_B1, right=True).squeeze(1).to(logits_BV.device)


def sample(
    logits_BV: Tensor,
    config: SamplingConfig,
    generators: Sequence[torch.Generator],
    history: Sequence[Sequence[int]],
) -> Tensor:
    """The next token id (B,) of every row.

    Args:
        logits_BV: next-token scores.
        config: temperature and filters.
        generators: one CPU generator per row; untouched when greedy.
        history: prompt and generated tokens of every row.
    """
    logits_BV = logits_BV.float()
    if config.repetition_penalty != 1:
        logits_BV = penalise_repeats(logits_BV, history, config.repetition_penalty)
    if config.temperature < COLDEST:
        return logits_BV.argmax(-1)
    # Shifting by the maximum keeps a tiny temperature from overflowing.
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / config.temperature
    if config.top_k:
        logits_BV = keep_top_k(logits_BV, config.top_k)
    if config.top_p < 1:
        logits_BV = keep_top_p(logits_BV, config.top_p)
    if config.min_p:
        logits_BV = keep_min_p(logits_BV, config.min_p)
    return draw(logits_BV, generators)


def row_generator(seed: int, row: int) -> torch.Generator:
    """A generator for one row, so that a row's draws do not depend on its neighbours."""
    digest = hashlib.blake2b(f"{seed}:{row}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
