"""Decisions a training run takes before its first step: device, precision, micro batches."""

from __future__ import annotations

import torch
from torch import nn

from forgekit.compute.budget import BatchPlan, plan_batch, training_bytes
from forgekit.compute.device import detect_device
from forgekit.compute.manager import ComputeManager
from forgekit.errors import ConfigError
from forgekit.models.base import parameter_count
from forgekit.train.config import TrainConfig


def training_device(prefer: str) -> torch.device:
    """The device to train on (see :func:`forgekit.compute.device.detect_device`)."""
    return detect_device(prefer)


def check_rows(rows: int, sharded: bool, size: int) -> None:
    """Refuse a batch that ``size`` processes cannot share.

    Raises:
        ConfigError: fewer rows than processes; or, sharded, rows that are no multiple of them.
    """
    if rows < size or (sharded and rows % size):
        rule = "a multiple of" if sharded else "at least"
        raise ConfigError(
            f"{rows} rows cannot be shared by {size} processes", where="train.rows", remedy=f"use {rule} {size}"
        )


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast type, or None for full precision.

    ``auto`` takes bfloat16 only where matrix products in it are native: elsewhere it is emulated and slower.
    """
    if precision == "fp32":
        return None
    if precision == "bf16" or device.type == "mps":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else None
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if native else None


def activations_per_token(config) -> int:
    """Values kept per token for the backward pass, generously: about 40 widths per block, and the logits per answer.

    A test holds it above what our families really keep.
    """
    width, layers, steps = getattr(config, "d_model", 512), getattr(config, "n_layers", 8), getattr(config, "t_max", 0)
    kept = 40 * width * layers + 3 * getattr(config, "vocab_size", 0) * max(1, steps)
    if steps:
        kept += steps * (config.micro_steps + 1) * 3 * (width + config.trm_hidden)
    if getattr(config, "memories", ()):
        kept += len(config.memories) * (16 * config.memory_heads * config.memory_chunk + 24 * config.d_mem)
    return kept


def choose_plan(
    model: nn.Module, config: TrainConfig, device: torch.device, share: int = 1, memory: float = 1.0
) -> BatchPlan:
    """Micro batches for this process: as configured, else as many sequences as the free memory holds.

    Args:
        share: number of processes that divide the rows among them.
        memory: the part of the free memory that is this training's.
    """
    rows = max(1, config.rows // share)
    if config.micro_batch:
        micro = min(config.micro_batch, rows)
        return BatchPlan(micro_batch=micro, accumulate=-(-rows // micro), device=device.type)
    parameters, per_token = parameter_count(model), activations_per_token(model.config)
    return plan_batch(
        wanted=rows,
        free_bytes=int(memory * ComputeManager(device.type).free_bytes()),
        fixed_bytes=training_bytes(parameters, 0, 0, optimizer_slots=3),
        per_sample_bytes=training_bytes(0, per_token, config.seq_len, optimizer_slots=0),
        device=device.type,
    )
