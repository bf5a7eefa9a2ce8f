"""How far the unprompted distribution is from the prompted one, token by token over the whole vocabulary.

Distributions are computed a chunk of positions at a time and again in the backward pass, so that memory holds those of
one chunk only: 4,096 positions of 32,768 tokens would be 0.5 GB for every tensor of that shape, and there are about
eight. Positions where the teacher is left out (top-p truncation) are not offered: it fails (arXiv 2409.13697).

Shapes: N positions, D model width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Head = Callable[[Tensor], Tensor]
"""Features (N, D) to logits (N, V)."""
CHUNK_VALUES = 2**24
"""Logits in memory at once when nothing is said: 64 MB of float32."""


def chunk_size(vocabulary: int, wanted: int = 0) -> int:
    """Positions in a chunk."""
    return wanted or max(1, CHUNK_VALUES // vocabulary)


def divergence(teacher_ND: Tensor, student_ND: Tensor, heads: tuple[Head, Head], chunk: int) -> Tensor:
    """KL(teacher || student) in nats at every position, (N,), in float32.

    Args:
        teacher_ND: the teacher's features; no gradient reaches them.
        student_ND: the student's features at the same positions.
        heads: of the teacher, and of the student.
        chunk: positions at once.
    """
    parts = []
    for teacher, student in zip(teacher_ND.split(chunk), student_ND.split(chunk)):
        if torch.is_grad_enabled() and len(student_ND) > chunk:
            parts.append(checkpoint(_divergence, teacher, student, *heads, use_reentrant=False))
        else:
            parts.append(_divergence(teacher, student, *heads))
    return torch.cat(parts) if parts else student_ND.new_zeros(0)


def _divergence(teacher_ND: Tensor, student_ND: Tensor, teacher_head: Head, student_head: Head) -> Tensor:
    with torch.no_grad():
        wanted_NV = teacher_head(teacher_ND).float().log_softmax(-1)
    given_NV = student_head(student_ND).float().log_softmax(-1)
    return (wanted_NV.exp() * (wanted_NV - given_NV)).sum(-1)


def likelihoods(features_ND: Tensor, head: Head, ids_N: Tensor, chunk: int) -> Tensor:
    """Log-probability in nats of a token at every position, (N,)."""
    parts = [
        head(h).float().log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        for h, ids in zip(features_ND.split(chunk), ids_N.split(chunk))
    ]
    return torch.cat(parts) if parts else features_ND.new_zeros(0)
