"""Parts shared by our model families.

Shapes: B batch, T new tokens, P cached tokens, W attention window, D model width, H heads, K head width,
F feed-forward width. A name's suffix gives its shape.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forgekit.infer import kernels
from forgekit.models.base import placed_like

EMPTY = -1
"""Position of a cache slot that holds no token."""
SMALL_WINDOW = 64
"""Up to this window the written-out attention is three times as fast to train on a CPU as the fused one
(docs/results/cpu_kernels.md)."""
CONV_TAPS = 4
"""Taps of the short convolutions."""
LEAST_ROOM = 16
"""Tokens for which a :class:`Log` has room at least."""
Turns = tuple[Tensor, Tensor]


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

    def one_token(self, x: Tensor) -> Tensor:
        """:meth:`forward` up to rounding, without gradients: for a few rows torch's takes longer to begin than to
        do."""
        return kernels.rms_norm(x, self.weight) if kernels.takes(x, self.weight) else self(x)


def turns(pos_BT: Tensor, width: int, base: float) -> Turns:
    """Cosines and sines (B, 1, T, K) of the rotary angles at absolute positions, for heads of width K.

    The first half of the sines has the other sign.
    """
    half = width // 2
    freq_K = base ** (-torch.arange(half, device=pos_BT.device, dtype=torch.float32) / half)
    angle = pos_BT[:, None, :, None].float() * freq_K
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([cos, cos], -1), torch.cat([-sin, sin], -1)


def rope(x_BHTK: Tensor, pos_BT: Tensor, base: float) -> Tensor:
    """Rotary position embedding (Su et al., 2021), half-split layout, at absolute positions."""
    return turned(x_BHTK, turns(pos_BT, x_BHTK.shape[-1], base))


def turned(x_BHTK: Tensor, by: Turns) -> Tensor:
    """:func:`rope` with angles that are known."""
    half = x_BHTK.shape[-1] // 2
    cos, sin = (part.to(x_BHTK.dtype)[..., half:] for part in by)
    a, b = x_BHTK.chunk(2, -1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def turned_fast(x: Tensor, by: Turns) -> Tensor:
    """:func:`turned`, the same bits in fewer steps; its gradient would add up in another order."""
    cos, sin = by
    return x * cos.to(x.dtype) + x.roll(x.shape[-1] // 2, -1) * sin.to(x.dtype)


class Log:
    """Keys and values with room behind them: a token is added without copying those before it.

    States are values, and several may share a log: only the newest goes on in it, in memory that no other state looks
    at. Any other copies what it needs.
    """

    def __init__(self, state: AttentionState, pos_B1: Tensor, keep: int) -> None:
        """The last ``keep`` slots of a state whose next token has the positions ``pos_B1``, and room for a quarter
        more: each slot is copied four times on average."""
        room = max(LEAST_ROOM, keep // 4)
        start = state.k_BHPK.shape[2] - keep
        self.end, self.size = keep, keep + room
        self.k_BHLK, self.v_BHLK = (self._roomy(x, start) for x in (state.k_BHPK, state.v_BHPK))
        coming = pos_B1 + torch.arange(room, device=pos_B1.device)
        self.pos_BL = torch.cat([state.pos_BP[:, start:], coming], 1)
        self._newest: list[Tensor] = [state.k_BHPK]

    def _roomy(self, x_BHPK: Tensor, start: int) -> Tensor:
        B, H, _, K = x_BHPK.shape
        roomy = x_BHPK.new_empty(B, H, self.size, K)
        roomy[:, :, : self.end] = x_BHPK[:, :, start:]
        return roomy

    def free(self, state: AttentionState) -> bool:
        """Whether the state may go on here; if so, it has to: nobody else may until it has :meth:`grown`."""
        if self.end == self.size or (self.k_BHLK.is_inference() and not torch.is_inference_mode_enabled()):
            return False
        try:
            newest = self._newest.pop()  # of two threads only one gets it
        except IndexError:
            return False
        if newest is state.k_BHPK:
            return True
        self._newest.append(newest)
        return False

    def span(self, window: int) -> tuple[int, int]:
        """The first slot that the next token sees, and its own."""
        return (max(0, self.end + 1 - window) if window else 0), self.end

    def put(self, k_BHK: Tensor, v_BHK: Tensor) -> None:
        """Write the next token; :meth:`grown` is what makes it count."""
        self.k_BHLK.select(2, self.end).copy_(k_BHK)
        self.v_BHLK.select(2, self.end).copy_(v_BHK)

    def grown(self, whole: bool, window: int) -> AttentionState:
        """The state after the token that was written."""
        start, end = self.span(window)
        self.end = end + 1
        count = self.end - start
        k_BHPK, v_BHPK = self.k_BHLK.narrow(2, start, count), self.v_BHLK.narrow(2, start, count)
        self._newest.append(k_BHPK)
        return AttentionState(k_BHPK, v_BHPK, self.pos_BL.narrow(1, start, count), -1, None, whole, self)


@dataclass
class AttentionState:
    """The last keys and values of every row, the oldest first; at most W of them where there is a window.

    Attributes:
        k_BHPK, v_BHPK: rotated keys and values.
        pos_BP: absolute position of each slot, :data:`EMPTY` where none; without gaps behind the empty ones.
        cursor: -1: what comes next is put behind the last slot.
        tail_BJC: the last inputs of the short convolution, queries, keys and values side by side; None without one.
        whole: no slot is empty in any row, so attention needs no mask. False means that nobody knows.
        log: where the slots lie, if there is room behind them.
    """

    k_BHPK: Tensor
    v_BHPK: Tensor
    pos_BP: Tensor
    cursor: int = -1
    tail_BJC: Tensor | None = None
    whole: bool = False
    log: Log | None = None


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

    def turns(self, pos_BT: Tensor) -> Turns:
        """:func:`turns` for this layer's heads."""
        return turns(pos_BT, self.shape.width // self.shape.heads, self.shape.rope_base)

    @property
    def logit_bound_H(self) -> Tensor:
        """Upper bound of each head's logits in the training forwards since the last clip: max|q|·max|k|/sqrt(K)."""
        return (self.longest_2H.prod(0) / (self.shape.width // self.shape.heads)).sqrt()

    def forward(
        self,
        x_BTD: Tensor,
        pos_BT: Tensor,
        state: AttentionState | None,
        lengths_B: Tensor | None,
        turn: Turns | None = None,
        norm: RMSNorm | None = None,
    ) -> tuple[Tensor, AttentionState | None]:
        """Attend. Without ``state`` nothing before the first token is seen and no state is returned.

        Args:
            x_BTD: inputs.
            pos_BT: their absolute positions.
            state: after the tokens before them.
            lengths_B: real tokens per right-padded row.
            turn: :func:`turns` at ``pos_BT``, which are the same in all layers.
            norm: what the inputs pass first.
        """
        if generating(x_BTD, state, lengths_B) and not self.training:
            return self._attend_one(x_BTD, pos_BT, state, turn, norm)
        if norm is not None:
            x_BTD = norm(x_BTD)
        q, k, v, tail = self.project(x_BTD, pos_BT, state, lengths_B, turn)
        if state is None:
            out = self.attend_fresh(q, k, v)
        else:
            out, state = self._attend_segment(q, k, v, pos_BT, state, lengths_B)
            state = replace(state, tail_BJC=tail)
        return self.wo(out.transpose(1, 2).reshape(x_BTD.shape)), state

    def project(
        self,
        x_BTD: Tensor,
        pos_BT: Tensor,
        state: AttentionState | None,
        lengths_B: Tensor | None,
        turn: Turns | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
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
        turn = turn or self.turns(pos_BT)
        return turned(q, turn), turned(k, turn), v, tail

    def _attend_one(
        self, x_B1D: Tensor, pos_B1: Tensor, state: AttentionState, turn: Turns | None, norm: RMSNorm | None
    ) -> tuple[Tensor, AttentionState]:
        """One new token a row without gradients, as generation goes: :meth:`forward` in the fewest steps."""
        qkv = side_by_side((self.wq, self.wk, self.wv), x_B1D, norm)
        log, turn = with_room(state, pos_B1, self.shape.window), turn or self.turns(pos_B1)
        if self._compiled(qkv, log, state.tail_BJC):
            conv = None if self.conv_CJ is None else (self.conv_CJ, state.tail_BJC)
            token = kernels.Token(*log.span(self.shape.window), pos_B1.long().contiguous(), conv, self.gain_H)
            out, tail = kernels.attend(qkv, token, turn, (log.k_BHLK, log.v_BHLK))
            state = log.grown(state.whole, self.shape.window)
        else:
            out, state, tail = self._attend_plainly(qkv, log, state, turn, pos_B1)
        state.tail_BJC = tail
        return self.wo(out), state

    def _compiled(self, qkv: Tensor, log: Log, tail_BJC: Tensor | None) -> bool:
        """Whether compiled code can attend."""
        fits = (self.shape.width // self.shape.heads) % kernels.HEAD_STEP == 0 and len(qkv) == len(log.k_BHLK)
        if self.conv_CJ is not None and (tail_BJC is None or len(tail_BJC) != len(qkv)):
            return False
        return fits and kernels.takes(qkv, log.k_BHLK, log.v_BHLK, self.gain_H, self.conv_CJ, tail_BJC)

    def _attend_plainly(self, qkv: Tensor, log: Log, state: AttentionState, turn: Turns, pos_B1: Tensor) -> tuple:
        """One token in torch: (B, 1, D), the state after it, the convolution's tail."""
        tail = None
        if self.conv_CJ is not None:
            qkv, tail = short_conv(qkv, state.tail_BJC, self.conv_CJ, None)
        heads_B3HK = qkv.view(len(qkv), 3, self.shape.heads, -1)
        qk, v = heads_B3HK[:, :2], heads_B3HK.select(1, 2)
        if self.gain_H is not None:
            qk = F.normalize(qk, dim=-1)
        q, k = turned_fast(qk, turn).unbind(1)
        scale = None
        if self.gain_H is not None:
            q, scale = q * self.gain_H.to(q.dtype).unsqueeze(1), 1.0
        log.put(k, v)
        state, q = log.grown(state.whole, self.shape.window), q.unsqueeze(2)
        if state.whole:
            out = F.scaled_dot_product_attention(q, state.k_BHPK, state.v_BHPK, scale=scale)
        else:
            out = attend_masked(q, state.k_BHPK, state.v_BHPK, self._visible(pos_B1, state.pos_BP), scale)
        return out.view(len(qkv), 1, -1), state, tail

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
        """New tokens after a state: see what is kept and the segment together, keep each row's last W."""
        new_pos, whole = pos_BT, state.whole and lengths_B is None
        if lengths_B is not None:
            inside = torch.arange(pos_BT.shape[1], device=pos_BT.device) < lengths_B[:, None]
            new_pos = torch.where(inside, pos_BT, EMPTY)
        keys = torch.cat([state.k_BHPK, k], dim=2)
        values = torch.cat([state.v_BHPK, v], dim=2)
        pos_BP = torch.cat([state.pos_BP, new_pos], dim=1)
        if whole and not state.pos_BP.shape[1]:
            out = self.attend_fresh(q, k, v)
        else:
            out = attend_masked(q, keys, values, self._visible(pos_BT, pos_BP))
        return out, keep_last(keys, values, pos_BP, self.shape.window, whole)

    def _visible(self, pos_BT: Tensor, pos_BP: Tensor) -> Tensor:
        gap = pos_BT[:, :, None] - pos_BP[:, None, :]
        seen = (gap >= 0) & (pos_BP[:, None, :] != EMPTY)
        return seen if self.shape.window == 0 else seen & (gap < self.shape.window)

    def initial_state(self, batch: int, device: torch.device) -> AttentionState:
        """No slots yet."""
        heads, width = self.shape.heads, self.shape.width // self.shape.heads
        empty = self.longest_2H.new_zeros(batch, heads, 0, width)  # a packed wk would unpack its weight
        pos = torch.full((batch, 0), EMPTY, dtype=torch.long, device=device)
        tail = None if self.conv_CJ is None else empty.new_zeros(batch, CONV_TAPS - 1, 3 * self.shape.width)
        return AttentionState(empty, empty, pos, tail_BJC=tail, whole=True)

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


def attend_masked(q: Tensor, k: Tensor, v: Tensor, seen_BTP: Tensor, scale: float | None = None) -> Tensor:
    """Attention with an explicit mask. Rows that see nothing (padding) give zeros, not NaN."""
    blind = ~seen_BTP.any(-1)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=(seen_BTP | blind[..., None])[:, None], scale=scale)
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


def with_room(state: AttentionState, pos_B1: Tensor, window: int) -> Log:
    """A log in which the state may go on with a token at these positions."""
    log = state.log
    if log is None or not log.free(state):
        kept = state.k_BHPK.shape[2]
        log = Log(state, pos_B1, kept if window == 0 else min(kept, window - 1))
        log.free(state)
    return log


def keep_last(keys: Tensor, values: Tensor, pos_BP: Tensor, window: int, whole: bool) -> AttentionState:
    """Each row's ``window`` newest tokens in order, empty slots first. ``whole``: there are none, and all in order."""
    if whole:
        if window and pos_BP.shape[1] > window:  # copies: a view would keep the whole segment alive in the state
            keys, values, pos_BP = keys[:, :, -window:].clone(), values[:, :, -window:].clone(), pos_BP[:, -window:]
        return AttentionState(keys, values, pos_BP, whole=True)
    order = pos_BP.argsort(dim=1, stable=True)
    order = order if window == 0 else order[:, -window:]
    pick = order[:, None, :, None].expand(-1, keys.shape[1], -1, keys.shape[3])
    return AttentionState(keys.gather(2, pick), values.gather(2, pick), pos_BP.gather(1, order))


def select_rows(state: AttentionState, rows: Tensor) -> AttentionState:
    """The same state for a subset (or repetition) of rows."""
    tail = None if state.tail_BJC is None else state.tail_BJC[rows]
    return AttentionState(state.k_BHPK[rows], state.v_BHPK[rows], state.pos_BP[rows], -1, tail, state.whole)


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


def squared_relu(x: Tensor) -> Tensor:
    """relu(x)^2. What autograd adds to a call is more than a token's work."""
    if torch.is_grad_enabled():
        return SquaredReLU.apply(x)
    positive = F.relu(x)
    return positive.mul_(positive)


def generating(x_BTD: Tensor, state: object, lengths_B: Tensor | None) -> bool:
    """Whether it is one new token in every row, without gradients."""
    return x_BTD.shape[1] == 1 and state is not None and lengths_B is None and not torch.is_grad_enabled()


def side_by_side(maps: Sequence[nn.Module], x: Tensor, norm: RMSNorm | None = None) -> Tensor:
    """What several maps make of the same input, normed first where a norm is given, side by side in the last
    dimension."""
    # Packed maps do it in one step (forgekit.quant.layers.PackedLinear).
    if hasattr(type(maps[0]), "side_by_side"):
        return maps[0].side_by_side(maps, x, norm)
    x = x if norm is None else norm(x)
    return maps[0](x) if len(maps) == 1 else torch.cat([one(x) for one in maps], -1)


class FeedForward(nn.Module):
    """Squared-ReLU feed-forward (So et al., 2021)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = linear(width, hidden), linear(hidden, width, std=0.0)

    def forward(self, x_BTD: Tensor, norm: RMSNorm | None = None) -> Tensor:
        """(B, T, D) to (B, T, D); with a ``norm`` the input passes it first."""
        return self.down(squared_relu(side_by_side((self.up,), x_BTD, norm)))


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
