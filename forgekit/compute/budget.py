"""How much memory training takes, and the batch that fits into what is free."""

from __future__ import annotations

from pydantic import Field

from forgekit.config import Config
from forgekit.errors import ConfigError


class BatchPlan(Config):
    """How one batch is computed: ``micro_batch * accumulate`` sequences contribute to each optimizer step."""

    micro_batch: int = Field(ge=1)
    """Sequences in memory at once."""
    accumulate: int = Field(default=1, ge=1)
    """Micro batches per optimizer step."""
    checkpoint_activations: bool = False
    """Recompute activations in the backward pass instead of keeping them."""
    device: str = "cpu"
    """Where it is computed."""

    def sizes(self, total: int) -> list[int]:
        """Micro batch sizes that sum to ``total``, as equal as can be and none above ``micro_batch``.

        A batch of ``micro_batch * accumulate`` gives ``accumulate`` equal ones; any other total (the last batch
        of an epoch) gives unequal ones, to be weighted by their size.
        """
        count = -(-total // self.micro_batch)
        return [total // count + (i < total % count) for i in range(count)]


def training_bytes(
    parameters: int, activations_per_token: int, tokens: int, optimizer_slots: int, dtype_bytes: int = 4
) -> int:
    """Bytes that training holds at its peak.

    Args:
        parameters: number of trained parameters; each has a weight, a gradient and the optimizer's slots.
        activations_per_token: values kept per token for the backward pass.
        tokens: tokens in one micro batch.
        optimizer_slots: values per parameter in the optimizer (AdamW 2, Muon 1, plus 1 for Grokfast's average).
        dtype_bytes: bytes per value; with autocast this overstates the activations, which is the safe side.
    """
    return dtype_bytes * (parameters * (2 + optimizer_slots) + activations_per_token * tokens)


def adaptive_batch(free_bytes: int, per_sample_bytes: int, wanted: int, safety: float = 0.8) -> int:
    """The batch size that fits: ``wanted`` if it does, else the largest power of two that does, at least 1.

    Raises:
        ConfigError: ``wanted`` or ``per_sample_bytes`` is not positive.
    """
    for name, value in (("wanted", wanted), ("per_sample_bytes", per_sample_bytes)):
        if value < 1:
            raise ConfigError(f"value {value} is below 1", where=name, remedy="give a positive number")
    fitting = int(free_bytes * safety) // per_sample_bytes
    if fitting >= wanted:
        return wanted
    return 1 << (fitting.bit_length() - 1) if fitting >= 1 else 1


def plan_batch(wanted: int, free_bytes: int, fixed_bytes: int, per_sample_bytes: int, device: str = "cpu") -> BatchPlan:
    """The fastest plan for a batch of exactly ``wanted`` sequences that fits into the free memory.

    The micro batch divides ``wanted``, so a prime batch that does not fit whole runs one sequence at a time: give
    batches with small factors. Where not even one sequence fits, activations are recomputed from the start.

    Args:
        wanted: sequences per optimizer step.
        free_bytes: free on the device now.
        fixed_bytes: weights, gradients and optimizer slots (:func:`training_bytes` with no tokens).
        per_sample_bytes: activations of one sequence.
        device: where it is computed.
    """
    room = max(free_bytes - fixed_bytes, 0)
    fitting = adaptive_batch(room, per_sample_bytes, wanted)
    micro = next(size for size in range(fitting, 0, -1) if wanted % size == 0)
    return BatchPlan(
        micro_batch=micro,
        accumulate=wanted // micro,
        checkpoint_activations=per_sample_bytes > room,
        device=device,
    )
