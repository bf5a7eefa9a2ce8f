"""The steps of a generated token between its maps, compiled: attention, memory, norm.

Each does little work that torch needs dozens of calls for. They are for every model on a CPU, packed or not; without
LLVM the layers do the same in torch. See :mod:`forgekit.infer.kernels.cpu` on how they are compiled.

Shapes: B batch, C columns, D model width, H heads, K head width, L slots of a cache.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from forgekit.infer.kernels.cpu import Compiled, attempted, compile_text, machine, once, with_scratch
from forgekit.infer.kernels.llvm_attention import attention_bytes, attention_module
from forgekit.infer.kernels.llvm_memory import memory_bytes, memory_module
from forgekit.infer.kernels.llvm_ternary import norm_module

SHARED = 1 << 20
"""Multiplications from which on threads are worth waking."""


class Token(NamedTuple):
    """What :func:`attend` knows of a token.

    Attributes:
        start, end: the first slot that it sees, and its own.
        pos_B1: tokens before it in each row, int64; no more slots are seen than these.
        conv: taps of the convolution (3 D, 4) and its last inputs (B, 3, 3 D), if there is one.
        gain_H: what normed queries are multiplied with; None: nothing is normed.
    """

    start: int
    end: int
    pos_B1: Tensor
    conv: tuple[Tensor, Tensor] | None
    gain_H: Tensor | None


@once
def compiled() -> bool:
    """Whether all of these can be compiled."""
    return all(attempted(step) is not None for step in (norm, attention, memory))


@once
def attention() -> Compiled:
    """One token's attention."""
    return compile_text(attention_module(machine().openmp), "attend", "p" * 12 + "n" * 7)


def attend(qkv: Tensor, token: Token, turn: tuple[Tensor, Tensor], cache: tuple[Tensor, Tensor]) -> tuple:
    """One new token of every row: convolved, normed, rotated, put into the cache, attended.

    Args:
        qkv: (B, 1, 3 D) queries, keys and values.
        token: see there.
        turn: cosines and sines (B, 1, 1, K), of :func:`forgekit.models.layers.turns`.
        cache: keys and values (B, H, L, K); slot ``end`` is written.

    Returns:
        (B, 1, D), and the last inputs of the convolution (None without one). All tensors are contiguous float32 on the
        CPU, K a multiple of 32: the caller has seen to it.
    """
    keys, values = cache
    (batch, heads, slots, width), (taps, tail) = keys.shape, token.conv or (None, None)
    out, after = qkv.new_empty(batch, 1, heads * width), None if tail is None else torch.empty_like(tail)
    seen = token.end + 1 - token.start
    threads = torch.get_num_threads() if 2 * batch * heads * seen * width >= SHARED else 1
    pointers = (qkv, taps, tail, after, token.gain_H, *turn, token.pos_B1, keys, values, out)
    with_scratch(
        attention_bytes((batch, heads, width), seen, taps is not None),
        attention(),
        [0 if x is None else x.data_ptr() for x in pointers],
        (batch, heads, width, slots, token.start, token.end, threads),
    )
    return out, after


@once
def norm() -> Compiled:
    """The norm that ternary products may begin with, alone."""
    return compile_text(norm_module(), "norm", "pppnn")


def rms_norm(x: Tensor, gain_C: Tensor) -> Tensor:
    """(..., C) over its root mean square, times the gain; contiguous float32 on the CPU: the caller has seen to it."""
    out, columns = torch.empty_like(x), gain_C.numel()
    norm().call(x.data_ptr(), gain_C.data_ptr(), out.data_ptr(), x.numel() // columns, columns)
    return out


@once
def memory() -> Compiled:
    """One token of a Titans memory."""
    return compile_text(memory_module(machine().openmp), "remember", "p" * 13 + "n" * 4)


class Writing(NamedTuple):
    """What :func:`remember` knows beside token and state: taps of the convolution (3 H K, 4), bounds of the gates
    (:data:`~forgekit.infer.kernels.llvm_memory.LIMITS`), and the gain (K) of the norm of what is read."""

    taps: Tensor
    limits: Tensor
    gain: Tensor


def remember(qkv: Tensor, gates: Tensor, state: tuple[Tensor, Tensor, Tensor], writing: Writing) -> tuple:
    """One new token of every row for a Titans memory: convolved, written, read, normed.

    Args:
        qkv: (B, 1, 3 H K) queries, keys and values.
        gates: (B, 1, 3 H), logits.
        state: M and S (B, H, K, K), and the convolution's last inputs (B, 3, 3 H K).
        writing: see there.

    Returns:
        (B, 1, H K), and M, S and last inputs after the token. All tensors are contiguous float32 on the CPU, K a
        multiple of 16: the caller has seen to it.
    """
    M, S, tail = state
    batch, heads, width, _ = M.shape
    out, after = qkv.new_empty(batch, 1, heads * width), tuple(torch.empty_like(x) for x in state)
    threads = torch.get_num_threads() if 4 * M.numel() >= SHARED else 1
    pointers = (qkv, writing.taps, tail, after[2], gates, writing.limits, writing.gain, M, S, *after[:2], out)
    places, numbers = [x.data_ptr() for x in pointers], (batch, heads, width, threads)
    with_scratch(memory_bytes(batch, heads, width), memory(), places, numbers)
    return out, after
