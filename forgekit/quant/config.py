"""How weights and activations are quantised. No torch here: plans and ``--help`` need it fast."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from forgekit.config import Config


class GroupPlan(Config):
    """Weights rounded to nearest, symmetric around zero, with one fp16 scale per group of columns of a row."""

    bits: Annotated[int, Field(ge=4, le=8)] = 8
    """Bits of a code."""
    group: Annotated[int, Field(gt=0, lt=2**31)] = 32
    """Columns that share a scale; the last group of a row may be shorter."""

    @property
    def top(self) -> int:
        """The largest code; the smallest is its negative."""
        return 2 ** (self.bits - 1) - 1


class TernaryPlan(Config):
    """Weights in {-1, 0, 1} times a scale, activations in 8 bits.

    Sources: BitNet b1.58 (arXiv 2402.17764, section 2) is ``per="tensor"``, ``refit=False`` and the other defaults;
    the median is from BitNet b1.58 Reloaded (arXiv 2407.09527).
    """

    scale: Literal["mean", "median"] = "mean"
    """What a weight is compared with: the mean or the median of the magnitudes (mean where the median is 0)."""
    per: Literal["channel", "tensor"] = "channel"
    """One scale for each output row, or one for the whole matrix."""
    threshold: Annotated[float, Field(gt=0, lt=2)] = 0.5
    """A weight whose magnitude is above this many scales is not zero; 0.5 is rounding, as BitNet b1.58 does."""
    refit: bool = True
    """After the codes are chosen, take the scale with the least squared error; false keeps the first one."""
    activation_bits: Literal[0, 8] = 8
    """Bits of the activations, with one scale per token; 0 leaves them alone."""
    sub_norm: bool = False
    """Normalise the inputs of the maps that no norm stands before (SubLN), with a gain that calibration starts."""
    spared: tuple[str, ...] = ()
    """Maps that are rounded group-wise instead, by a component of their dotted name (``wo`` is the output map of every
    attention): those where a few bits more bring most of the skill back."""
    spared_groups: GroupPlan = GroupPlan(bits=6)
    """How they are rounded."""


MapPlan = TernaryPlan | GroupPlan
"""The grid of a model's linear maps: ternary, or group-wise rounding with activations left alone."""
