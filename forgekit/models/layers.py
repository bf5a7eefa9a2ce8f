"""Parts shared by our model families.

Shapes: B batch, T new tokens, P cached tokens, W attention window, D model width, H heads, K head width,
F feed-forward width. A name's suffix gives its shape.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forgekit.models.base import placed_like

EMPTY = -1
"""Position of a cache slot that holds no token."""
SMALL_WINDOW = 64
"""Up to this window the written-out attention is three times as fast to train on a CPU as the fused one
(docs/results/cpu_kernels.md)."""
CONV_TAPS = 4
"""Taps of the short convolutions."""


def short_conv(
    x_BTC: Tensor, tail_BJC: Tensor | None, taps_CJ: Tensor, lengths_B: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution over a few tokens, and the inputs the next segment needs of this one.

    Args:
        x_BTC: new inputs.
        tail_BJC: the last ``taps - 1`` inputs before them; ``None`` before the first token (zeros).
        taps_CJ: weights, the last one is the token's own.
        lengths_B: real tokens per right-padded row; padding does not enter the tail.
    """
    (B, T, C), J = x_BTC.shape, taps_CJ.shape[1] - 1
    tail_BJC = x_BTC.new_zeros(B, J, C) if tail_BJC is None else tail_BJC.to(x_BTC.dtype)
    padded, taps_CJ = torch.cat([tail_BJC, x_BTC], dim=1), taps_CJ.to(x_BTC.dtype)
    if T == 1:
        mixed = (padded * taps_CJ.T).sum(1, keepdim=True)
    else:  # faster than a sum of shifted products (docs/results/cpu_kernels.md)
        mixed = F.conv1d(padded.mT, taps_CJ[:, None], groups=C).mT.contiguous()
    if lengths_B is None:
        return mixed, padded[:, T:].clone()  # a view would keep the whole segment alive in the state
    keep = lengths_B[:, None] + torch.arange(J, device=x_BTC.device)
    return mixed, padded.gather(1, keep[:, :, None].expand(-1, -1, C))


def linear(fan_in: int, fan_out: int, std: float | None = None) -> nn.Linear:
    """A bias-free linear map, normal init with std 1/sqrt(fan_in) unless given (0 makes it start silent)."""
    layer = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.normal_(layer.weight, std=fan_in**-0.5) if std is None else nn.init.normal_(layer.weight, std=std)
    return layer


def identity_taps(channels: int) -> Tensor:
    """Convolution weights (C, J) that pass the token's own input through."""
    taps_CJ = torch.zeros(channels, CONV_TAPS)
    taps_CJ[:, -1] = 1.0
    return taps_CJ


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned gain (Zhang and Sennrich, 2019)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self.weight.to(x.dtype), eps=1e-6)


def rope(x_BHTK: Tensor, pos_BT: Tensor, base: float) -> Tensor:
    """Rotary position embedding (Su et al., 2021), half-split layout, at absolute positions."""
    half = x_BHTK.shape[-1] // 2
    freq_K = base ** (-torch.arange(half, device=x_BHTK.device, dtype=torch.float32) / half)
    angle = pos_BT[:, None, :, None].float() * freq_K
    cos, sin = angle.cos().to(x_BHTK.dtype), angle.sin().to(x_BHTK.dtype)
    a, b = x_BHTK[..., :half], x_BHTK[..., half:]
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


@dataclass
class AttentionState:
    """The last W keys and values of every row, as a ring.

    Attributes:
        k_BHPK, v_BHPK: rotated keys and values.
        pos_BP: absolute position of each slot, :data:`EMPTY` where none.
        cursor: the slot that the next token overwrites: in every row the oldest.
        tail_BJC: the last inputs of the short convolution, queries, keys and values side by side; None without one.
    """

    k_BHPK: Tensor
    v_BHPK: Tensor
    pos_BP: Tensor
    cursor: int
    tail_BJC: Tensor | None = None


@dataclass(frozen=True)
class AttentionShape:
    """Width, heads and reach of an attention layer; ``window`` 0 sees everything before.

    ``conv`` mixes each query, key and value with its three predecessors (Titans, arXiv 2501.00663, section 4.4).
    """

    width: int
    heads: int
    window: int
    rope_base: float
    qk_norm: bool
    conv: bool = False


class Attention(nn.Module):
    """Causal attention over a sliding window, with rotary positions and normalised queries and keys."""

    def __init__(self, shape: AttentionShape) -> None:
        super().__init__()
        d = shape.width
        self.shape = shape
        self.wq, self.wk, self.wv = linear(d, d), linear(d, d), linear(d, d)
        self.wo = linear(d, d, std=0.0)
        # With normalised q and k the logit is gain * cos: a learned, per-head inverse temperature.
        self.gain_H = nn.Parameter(torch.full((shape.heads,), 8.0)) if shape.qk_norm else None
        self.conv_CJ = nn.Parameter(identity_taps(3 * d)) if shape.conv else None
        self.register_buffer("longest_2H", torch.zeros(2, shape.heads), persistent=False)

    @property
    def logit_bound_H(self) -> Tensor:
        """Upper bound of each head's logits in the training forwards since the last clip: max|q|·max|k|/sqrt(K)."""
        return (self.longest_2H.prod(0) / (self.shape.width // self.shape.heads)).sqrt()

    def forward(
        self, x_BTD: Tensor, pos_BT: Tensor, state: AttentionState | None, lengths_B: Tensor | None
    ) -> tuple[Tensor, AttentionState | None]:
        """Attend. Without ``state`` nothing before the first token is seen and no state is returned."""
        q, k, v, tail = self.project(x_BTD, pos_BT, state, lengths_B)
        if state is None:
            out = self.attend_fresh(q, k, v)
        elif q.shape[2] == 1 and lengths_B is None:
            state = ring_write(state, k, v, pos_BT)
            out = attend_masked(q, state.k_BHPK, state.v_BHPK, self._visible(pos_BT, state.pos_BP))
        else:
            out, state = self._attend_segment(q, k, v, pos_BT, state, lengths_B)
        if state is not None:
            state = replace(state, tail_BJC=tail)
        return self.wo(out.transpose(1, 2).reshape(x_BTD.shape)), state

    def project(self, x_BTD: Tensor, pos_BT: Tensor, state: AttentionState | None, lengths_B: Tensor | None):
        """Rotated queries and keys, values, each (B, H, T, K), and the convolution's tail."""
        B, T, _ = x_BTD.shape
        parts, tail = [w(x_BTD) for w in (self.wq, self.wk, self.wv)], None
        if self.conv_CJ is not None:
            mixed, tail = short_conv(torch.cat(parts, -1), state and state.tail_BJC, self.conv_CJ, lengths_B)
            parts = mixed.chunk(3, -1)
        q, k, v = (x.view(B, T, self.shape.heads, -1).transpose(1, 2) for x in parts)
        if self.gain_H is not None:
            # SDPA divides by sqrt(K): fold that and the gain into q.
            q = F.normalize(q, dim=-1) * (self.gain_H.to(q.dtype)[:, None, None] * math.sqrt(q.shape[-1]))
            k = F.normalize(k, dim=-1)
        if self.training:
            # Queries and keys apart, since the last clip: so micro batches clip exactly as the whole batch would.
            self.longest_2H = torch.maximum(self.longest_2H, longest(q.detach(), k.detach()))
        return rope(q, pos_BT, self.shape.rope_base), rope(k, pos_BT, self.shape.rope_base), v, tail

    def attend_fresh(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention among new tokens with nothing before them; all (B, H, T, K)."""
        T, W = q.shape[2], self.shape.window
        if W == 0 or T <= W:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)
        pad = -T % W  # what follows the last token is seen by none before it
        if pad:
            q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        return attend_blocks(q, k, v, W)[:, :, :T]

    def _attend_segment(self, q, k, v, pos_BT, state, lengths_B):
        """Several new tokens after a state: see ring and segment together, keep each row's last W."""
        new_pos = pos_BT
        if lengths_B is not None:
            inside = torch.arange(pos_BT.shape[1], device=pos_BT.device) < lengths_B[:, None]
            new_pos = torch.where(inside, pos_BT, EMPTY)
        order = (torch.arange(state.pos_BP.shape[1], device=q.device) + state.cursor) % max(1, state.pos_BP.shape[1])
        keys = torch.cat([state.k_BHPK[:, :, order], k], dim=2)
        values = torch.cat([state.v_BHPK[:, :, order], v], dim=2)
        pos_BP = torch.cat([state.pos_BP[:, order], new_pos], dim=1)
        out = attend_masked(q, keys, values, self._visible(pos_BT, pos_BP))
        return out, keep_last(keys, values, pos_BP, self.shape.window)

    def _visible(self, pos_BT: Tensor, pos_BP: Tensor) -> Tensor:
        gap = pos_BT[:, :, None] - pos_BP[:, None, :]
        seen = (gap >= 0) & (pos_BP[:, None, :] != EMPTY)
        return seen if self.shape.window == 0 else seen & (gap < self.shape.window)

    def initial_state(self, batch: int, device: torch.device) -> AttentionState:
        """An empty ring of W slots (no slots for unlimited attention, which grows)."""
        heads, width = self.shape.heads, self.shape.width // self.shape.heads
        empty = self.longest_2H.new_zeros(batch, heads, self.shape.window, width)  # a packed wk would unpack its weight
        pos = torch.full((batch, self.shape.window), EMPTY, dtype=torch.long, device=device)
        tail = None if self.conv_CJ is None else empty.new_zeros(batch, CONV_TAPS - 1, 3 * self.shape.width)
        return AttentionState(empty, empty.clone(), pos, 0, tail)

    @torch.no_grad()
    def clip_logits(self, tau: float) -> Tensor:
        """QK-Clip (Kimi K2, arXiv 2507.20534): shrink heads whose logits may exceed ``tau``.

        :attr:`logit_bound_H` is Cauchy-Schwarz, so no logit seen since the last clip stays above tau. Rotation keeps
        norms, hence nothing rotary is rescaled apart from its head. Starts a new record; returns the factor applied
        per head (1 where none).
        """
        bound_H = self.logit_bound_H
        factor_H = torch.where(bound_H > tau, tau / bound_H.clamp_min(1e-12), 1.0)
        if self.gain_H is not None:
            self.gain_H.mul_(placed_like(factor_H, self.gain_H))
        else:
            root = factor_H.sqrt().repeat_interleave(self.shape.width // self.shape.heads)[:, None]
            for weight in (self.wq.weight, self.wk.weight):
                weight.mul_(placed_like(root.expand(weight.shape), weight))
        self.longest_2H.zero_()
        return factor_H


def longest(q_BHTK: Tensor, k_BHTK: Tensor) -> Tensor:
    """Per head, the largest squared length of a query and of a key, (2, H)."""
    return torch.stack([x.float().square().sum(-1).amax((0, 2)) for x in (q_BHTK, k_BHTK)])


def attend_masked(q: Tensor, k: Tensor, v: Tensor, seen_BTP: Tensor) -> Tensor:
    """Attention with an explicit mask. Rows that see nothing (padding) give zeros, not NaN."""
    blind = ~seen_BTP.any(-1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=(seen_BTP | blind[..., None])[:, None])
    return out.masked_fill(blind[:, None, :, None], 0)


def attend_blocks(q: Tensor, k: Tensor, v: Tensor, W: int) -> Tensor:
    """Sliding-window attention in O(T·W): each block of W queries sees its own and the previous block."""
    B, H, T, K = q.shape
    n = T // W

    def blocks(x: Tensor) -> Tensor:
        return x.view(B, H, n, W, K).transpose(1, 2)

    def with_previous(x: Tensor) -> Tensor:
        x = blocks(x)
        return torch.cat([F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:, :-1], x], dim=3).flatten(0, 1)

    i, j = torch.arange(W, device=q.device)[:, None] + W, torch.arange(2 * W, device=q.device)
    band = (i - j >= 0) & (i - j < W)
    seen = torch.stack([band & (j >= W)] + [band] * (n - 1)).repeat(B, 1, 1)[:, None]
    # Folding blocks into the batch keeps the tensors four-dimensional, which the fused kernels require.
    q, k, v = blocks(q).flatten(0, 1), with_previous(k), with_previous(v)
    if q.is_cpu and W <= SMALL_WINDOW:
        bias = torch.zeros(seen.shape, dtype=q.dtype).masked_fill_(~seen, -torch.inf)
        out = torch.matmul(q * K**-0.5, k.mT).add(bias).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    return out.view(B, n, H, W, K).transpose(1, 2).reshape(B, H, T, K)


def ring_write(state: AttentionState, k: Tensor, v: Tensor, pos_B1: Tensor) -> AttentionState:
    """Put one token per row into the ring (append when attention is unlimited)."""
    size = state.pos_BP.shape[1]
    if size == 0 or state.cursor < 0:
        grown = [torch.cat(pair, dim=2) for pair in ((state.k_BHPK, k), (state.v_BHPK, v))]
        return AttentionState(*grown, torch.cat([state.pos_BP, pos_B1], dim=1), -1)
    keys, values, pos = state.k_BHPK.clone(), state.v_BHPK.clone(), state.pos_BP.clone()
    keys[:, :, state.cursor], values[:, :, state.cursor] = k[:, :, 0].to(keys.dtype), v[:, :, 0].to(values.dtype)
    pos[:, state.cursor] = pos_B1[:, 0]
    return AttentionState(keys, values, pos, (state.cursor + 1) % size)


def keep_last(keys: Tensor, values: Tensor, pos_BP: Tensor, window: int) -> AttentionState:
    """Each row's ``window`` newest tokens in order, empty slots first, so that slot 0 is the oldest everywhere."""
    order = pos_BP.argsort(dim=1, stable=True)
    order = order if window == 0 else order[:, -window:]
    pick = order[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
    return AttentionState(
        keys.gather(2, pick), values.gather(2, pick), pos_BP.gather(1, order), -1 if window == 0 else 0
    )


def select_rows(state: AttentionState, rows: Tensor) -> AttentionState:
    """The same state for a subset (or repetition) of rows."""
    tail = None if state.tail_BJC is None else state.tail_BJC[rows]
    return AttentionState(state.k_BHPK[rows], state.v_BHPK[rows], state.pos_BP[rows], state.cursor, tail)


class SquaredReLU(torch.autograd.Function):
    """relu(x)^2, remembering only relu(x): half of autograd's time and memory."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        """relu(x)^2."""
        positive = F.relu(x)
        ctx.save_for_backward(positive)
        return positive * positive

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        """2 relu(x) times the gradient."""
        (positive,) = ctx.saved_tensors
        return (grad * positive).mul_(2)


class FeedForward(nn.Module):
    """Squared-ReLU feed-forward (So et al., 2021)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = linear(width, hidden), linear(hidden, width, std=0.0)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(SquaredReLU.apply(self.up(x_BTD)))


class Embedding(nn.Module):
    """Tied token embedding and output head, factorised through ``rank`` when 0 < rank < width.

    Tying and factorising keep the vocabulary's share of a small model's parameters small (ALBERT, 2019).
    """

    def __init__(self, vocab: int, width: int, rank: int) -> None:
        super().__init__()
        self.rank = rank if 0 < rank < width else 0
        self.table = nn.Embedding(vocab, self.rank or width)
        nn.init.normal_(self.table.weight, std=0.02)
        self.lift = linear(self.rank, width) if self.rank else None
        self.lower = linear(width, self.rank) if self.rank else None

    def embed(self, ids_BT: Tensor) -> Tensor:
        """(B, T) ids to (B, T, D)."""
        x = self.table(ids_BT)
        return x if self.lift is None else self.lift(x)

    def unembed(self, h: Tensor) -> Tensor:
        """(..., D) to (..., V) logits."""
        h = h if self.lower is None else self.lower(h)
        # A packed table multiplies without being unpacked (forgekit.quant.layers.GroupedEmbedding).
        return self.table.logits(h) if hasattr(self.table, "logits") else F.linear(h, self.table.weight)
