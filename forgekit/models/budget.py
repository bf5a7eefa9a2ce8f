"""The parameter-budget solver: from a target size to a shape, with the arithmetic shown. No torch here."""

from __future__ import annotations

import math
from dataclasses import dataclass

from forgekit.errors import ConfigError
from forgekit.models.config import GPTConfig

FFN_RATIO = 4.0
"""The feed-forward to model width ratio that the solver stays close to."""


@dataclass(frozen=True)
class Budget:
    """A solved shape.

    Attributes:
        config: the complete configuration.
        target: parameters asked for.
        split: parameters by part.
    """

    config: GPTConfig
    target: int
    split: dict[str, int]

    @property
    def parameters(self) -> int:
        """Parameters of the solved shape."""
        return sum(self.split.values())

    @property
    def deviation(self) -> float:
        """Relative distance from the target."""
        return self.parameters / self.target - 1

    def table(self) -> list[tuple[str, int, float]]:
        """(part, parameters, share) rows, for people."""
        return [(part, n, n / self.parameters) for part, n in self.split.items()]


def solve_budget(
    template: GPTConfig, target: int, *, width: int = 0, tolerance: float = 0.1, embedding_share: float = 0.4
) -> Budget:
    """Find the shape closest to ``target`` parameters.

    The embedding is factorised when it would take more than its share. For every width the feed-forward width
    is what remains; among the shapes within tolerance the one whose feed-forward ratio is nearest to 4 wins, then
    the one nearest to the target.

    Args:
        template: gives layers, heads, vocabulary and everything that is not a width.
        target: parameters wanted.
        width: fixes ``d_model``; 0 lets the solver choose.
        tolerance: allowed relative deviation.
        embedding_share: ceiling of the embedding's share of all parameters.

    Raises:
        ConfigError: no shape fits; names what is in the way.
    """
    step = math.lcm(2 * template.n_heads, 2 * getattr(template, "memory_heads", 1), 8)
    widths = [width] if width else range(step, 8192 + step, step)
    best: tuple[float, float, GPTConfig] | None = None
    for d in widths:
        config = _shape(template, target, d, embedding_share)
        if config is None:
            continue
        error = abs(config.parameters() / target - 1)
        share = config.split()["embedding"] / config.parameters()
        if error > tolerance or share > embedding_share + 1e-9:
            continue
        # Half the tolerance is as good as exact: the ratio matters more to the model than the last per cent.
        rank = (round(abs(math.log(config.ffn_hidden / d / FFN_RATIO)), 2), error)
        if best is None or rank < best[:2]:
            best = (*rank, config)
    if best is None:
        raise ConfigError(
            f"no shape of {template.n_layers} layers and a {template.vocab_size} vocabulary "
            f"has {target} parameters within {tolerance:.0%}",
            where="target_parameters",
            remedy="change n_layers, vocab_size, d_model or the target",
        )
    return Budget(best[2], target, best[2].split())


def _shape(template: GPTConfig, target: int, d: int, embedding_share: float) -> GPTConfig | None:
    """The configuration of width ``d`` whose feed-forward fills the rest of the target; None if it cannot."""
    if d % (2 * template.n_heads):
        return None
    rank = 0
    if template.vocab_size * d > embedding_share * target:
        rank = int(embedding_share * target / (template.vocab_size + 2 * d)) // 8 * 8
        if not 8 <= rank < d:
            return None
    changes = {"d_model": d, "emb_rank": rank, "ffn_hidden": 16}
    if template.family == "trm_titans":
        heads = template.memory_heads
        changes |= {"d_mem": max(heads, d // 2 // heads * heads), "gate_hidden": max(8, d // 4)}
        # A quarter of the width: recursion has never paid for more (docs/LOG.md), and all siblings carry it.
        changes["trm_hidden"] = max(8, d // 4) if template.trm_hidden else 0
    small = template.replace(**changes)
    left = target - small.parameters()
    ffn = 16 + round(left / (2 * d * template.n_layers) / 16) * 16
    return small.replace(ffn_hidden=ffn) if ffn >= 16 else None
