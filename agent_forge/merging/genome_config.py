"""What the combinations and the mutation of evolution can be told, as data. No torch here: profiles need it fast.

Source: V2 specification, 2.2.4 (three stages, one of two methods each) and 2.2.5 (mutation).
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from agent_forge.merging.operators_config import Number, Rate, Share
from forgekit.config import Config
from forgekit.errors import ConfigError

STAGES = (("linear", "slerp"), ("dare_linear", "ties"), ("frankenmerge", "dfs"))
"""The methods of each stage: the first where the stage's bit is 0, the second where it is 1."""
COMBINATIONS = 2 ** len(STAGES)


class GenomeOptions(Config):
    """Settings of the three stages."""

    weights: tuple[Number, ...] = ()
    """Linear: one weight per model; empty weighs all alike."""
    t: Annotated[float, Field(ge=0, le=1)] = 0.5
    """SLERP: where each pairwise fold stops."""
    drop_rate: Rate = 0.9
    """DARE: chance of each entry of the task vector to be dropped."""
    density: Share = 0.2
    """TIES: share of the task vector that is kept."""
    lam: Number = 1.0
    """Factor on the task vector of the second stage."""
    keep: Annotated[float, Field(ge=0, le=1)] = 0.5
    """How much of the second stage's result the third keeps: a share of the layers, or of every value."""
    scores: tuple[Number, ...] = ()
    """FrankenMerge: fitness of each model; layers are grafted from the best. Empty draws a model for each layer."""
    choices: tuple[Annotated[int, Field(ge=0)], ...] = ()
    """FrankenMerge: for each layer 0 (the second stage's result) or the number of a model counted from 1. Empty draws
    the grafted layers."""
    rule: Literal["softmax", "normalised"] = "softmax"
    """DFS: how importances become shares."""
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """DFS: softmax temperature."""


class MutationOptions(Config):
    """Gaussian noise on a few values."""

    sigma: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    """Standard deviation of the noise."""
    rate: Annotated[float, Field(ge=0, le=1)] = 0.01
    """Chance of each value to be changed."""
    relative: bool = False
    """Measure sigma in root mean squares of the tensor instead of absolutely."""


def combination(combo_id: int) -> tuple[str, str, str]:
    """The methods of a combination, stage by stage; bit 0 decides the first stage.

    Raises:
        ConfigError: not a number from 0 to 7.
    """
    if isinstance(combo_id, bool) or not isinstance(combo_id, int) or not 0 <= combo_id < COMBINATIONS:
        what = f"no combination {combo_id!r}"
        raise ConfigError(what, where="combo_id", remedy=f"choose 0 to {COMBINATIONS - 1}")
    return tuple(pair[combo_id >> stage & 1] for stage, pair in enumerate(STAGES))
