"""What to try, in which order, when memory runs out."""

from __future__ import annotations

from forgekit.compute.budget import BatchPlan

_MESSAGES = (
    "out of memory",  # CUDA and MPS, also where torch reports a plain RuntimeError
    "can't allocate memory",  # torch's CPU allocator on POSIX
    "not enough memory",  # torch's CPU allocator on Windows
    "CUBLAS_STATUS_ALLOC_FAILED",
)


def next_plan(plan: BatchPlan) -> BatchPlan | None:
    """The next cheaper plan for the same batch, or None when the ladder ends.

    First smaller micro batches with more accumulation (halved; an odd size is divided by its smallest prime
    factor, so that the product stays exactly the same), then recomputed activations, then the CPU.
    """
    if plan.micro_batch > 1:
        factor = _smallest_factor(plan.micro_batch)
        return plan.replace(micro_batch=plan.micro_batch // factor, accumulate=plan.accumulate * factor)
    if not plan.checkpoint_activations:
        return plan.replace(checkpoint_activations=True)
    if plan.device != "cpu":
        return plan.replace(device="cpu")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of whatever device, ran out."""
    import torch

    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(message in str(error) for message in _MESSAGES)


def _smallest_factor(number: int) -> int:
    return next((d for d in range(2, int(number**0.5) + 1) if number % d == 0), number)
