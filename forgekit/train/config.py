"""Settings of the training loop. No torch here."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from forgekit.config import Config
from forgekit.train.optim_config import MuGrokConfig

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class TrainConfig(Config):
    """One training run: how long, how big, how careful."""

    steps: Positive = 300
    """Optimizer steps."""
    rows: Positive = 48
    """Sequences per optimizer step, over all processes."""
    seq_len: Positive = 96
    """Tokens per sequence."""
    seed: int = 0
    """Seed of initialisation and of every data draw."""
    optimizer: MuGrokConfig = MuGrokConfig()
    """MuonGrokfast's settings."""
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"
    """Learning-rate shape: warm-up-stable-decay, warm-up and cosine, or warm-up only."""
    warmup: Share = 0.05
    """Share of the steps that warm up."""
    cooldown: Share = 0.4
    """Share of the steps that decay to zero (wsd)."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Gradient norm ceiling; 0 is off."""
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Decay of the weight average that becomes the result; 0 is off."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast type; auto takes bf16 where the hardware multiplies it natively."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    parallel: Literal["replicate", "fsdp"] = "replicate"
    """How several processes share a model: every process holds it all, or FSDP2 shards it."""
    micro_batch: Annotated[int, Field(ge=0)] = 0
    """Sequences in memory at once; 0 chooses from the free memory."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 100
    """Steps between checkpoints; 0 keeps none."""
    keep_checkpoints: Positive = 2
    """Checkpoints kept."""
    checkpoints: Literal["whole", "sharded"] = "whole"
    """Written by the first process, or by every process its own part: for models that no single one should hold."""
    log_every: Positive = 10
    """Steps between logged metrics."""
    recoveries: Annotated[int, Field(ge=0)] = 3
    """Times a diverged run may go back to its last good checkpoint at a lower rate."""
    backoff: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Factor on the learning rate after a divergence."""


def lr_factor(config: TrainConfig, step: int) -> float:
    """Learning-rate factor in [0, 1] of optimizer step ``step`` (counted from 0)."""
    warm = max(1, round(config.steps * config.warmup))
    if step < warm:
        return (step + 1) / warm
    if config.schedule == "constant":
        return 1.0
    if config.schedule == "cosine":
        progress = (step - warm) / max(1, config.steps - warm)
        return 0.5 * (1 + math.cos(math.pi * progress))
    cool = max(1, round(config.steps * config.cooldown))
    return min(1.0, (config.steps - step) / cool)
