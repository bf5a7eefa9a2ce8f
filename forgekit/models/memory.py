"""Neural long-term memory: what lies beyond the attention window.

``TitansMemory`` is the linear (matrix-valued) memory of Titans (Behrouz et al., arXiv 2501.00663, eq. 8-14):
a fast weight M is trained at test time to map keys to values, by gradient with momentum and forgetting,

    e_t = v_t - M_{t-1} k_t                      surprise: the gradient of |M k - v|^2 / 2 is -e k^T
    S_t = eta_t S_{t-1} + theta_t e_t k_t^T      past surprise + momentary surprise
    M_t = (1 - alpha_t) M_{t-1} + S_t            data-dependent forgetting
    o_t = M_t q_t

The paper takes gradients at the start of each chunk; chunking is known to cost accuracy (arXiv 2510.09551).
A linear memory does not need that approximation: within a chunk the errors e solve a unit lower-triangular
system, so the chunked form below equals the token-by-token recurrence for every chunk length.

``DecayMemory`` is the simple alternative: a factorised state that fades by a constant 0.99 per token.

Shapes: B batch, T tokens, D model width, H memory heads, K head width, C chunk length, J convolution taps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forgekit.infer import kernels
from forgekit.models.layers import CONV_TAPS, RMSNorm, generating, identity_taps, linear, short_conv

MOMENTUM = 0.5
"""Most momentum a memory may have: with steps up to 1 the largest that is stable for every order of keys."""
MOST = 0.999
"""Most that a token may make forgotten."""


@dataclass
class MemoryState:
    """What a memory carries across segments and through generation.

    Attributes:
        M_BHKK: fast weights (for the decay memory: the faded sum, (B, 1, 1, K)).
        S_BHKK: momentum, the past surprise (empty for the decay memory).
        tail_BJD: the last inputs of the short convolution, J = taps - 1 (empty for the decay memory).
    """

    M_BHKK: Tensor
    S_BHKK: Tensor
    tail_BJD: Tensor

    def rows(self, index: Tensor) -> MemoryState:
        """The same state for a subset (or repetition) of rows."""
        return MemoryState(self.M_BHKK[index], self.S_BHKK[index], self.tail_BJD[index])


@dataclass(frozen=True)
class MemoryShape:
    """Size and character of a memory.

    ``capacity`` (tokens) floors the forgetting at 1/capacity per token. ``surprise_weight`` scales how strongly
    an error is written and ``novelty_weight`` how readily old content makes room; both are neutral at 0.5.
    """

    width: int
    inner: int
    heads: int
    chunk: int
    capacity: int
    surprise_weight: float
    novelty_weight: float


@lru_cache
def limits(shape: MemoryShape) -> Tensor:
    """The bounds of the gates, as compiled code wants them (:data:`forgekit.infer.kernels.llvm_memory.LIMITS`)."""
    numbers = [1.0 / shape.capacity, 2 * shape.novelty_weight, MOST, MOMENTUM, 2 * shape.surprise_weight]
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


class TitansMemory(nn.Module):
    """Linear Titans memory in its exact chunked parallel form."""

    def __init__(self, shape: MemoryShape) -> None:
        super().__init__()
        self.shape = shape
        d, m = shape.width, shape.inner
        self.wqkv = linear(d, 3 * m)
        self.conv_CJ = nn.Parameter(identity_taps(3 * m))
        with torch.no_grad():
            self.conv_CJ[m:, -2] = 0.5  # keys and values begin by looking one token back: pairs need it
        self.gates = nn.Linear(d, 3 * shape.heads)
        nn.init.zeros_(self.gates.weight)
        # alpha starts near 0 (forget little), eta low (short momentum), theta near one half.
        bias = torch.tensor([-5.0, -2.0, 0.0]).repeat_interleave(shape.heads)
        with torch.no_grad():
            self.gates.bias.copy_(bias)
        self.norm = RMSNorm(m // shape.heads)
        self.wo = linear(m, d)

    def initial_state(self, batch: int, device: torch.device) -> MemoryState:
        """An empty memory."""
        k = self.shape.inner // self.shape.heads
        zero = torch.zeros(batch, self.shape.heads, k, k, device=device)
        tail = torch.zeros(batch, CONV_TAPS - 1, 3 * self.shape.inner, device=device)
        return MemoryState(zero, zero.clone(), tail)

    def forward(
        self, x_BTD: Tensor, state: MemoryState | None, lengths_B: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """Write the tokens, read what they ask for.

        Args:
            x_BTD: normalised inputs.
            state: memory so far, or ``None`` for an empty one.
            lengths_B: real tokens per right-padded row; padding is neither written nor remembered.

        Returns:
            (B, T, D) what was recalled, and the memory after each row's last real token.
        """
        one = generating(x_BTD, state, lengths_B)
        state = state or self.initial_state(x_BTD.shape[0], x_BTD.device)
        projected = self.wqkv(x_BTD).float()
        gate_logits = self.gates(x_BTD).float()
        before = (state.M_BHKK, state.S_BHKK, state.tail_BJD)
        whole = one and self._wide and all(len(part) == len(projected) for part in before)
        if whole and kernels.takes(projected, gate_logits, *before, self.conv_CJ, self.norm.weight):
            writing = kernels.Writing(self.conv_CJ, limits(self.shape), self.norm.weight)
            out, after = kernels.remember(projected, gate_logits, before, writing)
            return self.wo(out.to(x_BTD.dtype)), MemoryState(*after)
        with torch.autocast(x_BTD.device.type, enabled=False):
            q, k, v, tail = self._keys(projected, state.tail_BJD, lengths_B)
            alpha, eta, theta = self._gates(gate_logits)
            if one:
                out, M, S = one_token((q, k, v), (alpha, eta, theta), state)
                return self._read(out, x_BTD.dtype), MemoryState(M, S, tail)
            live = None
            if lengths_B is not None:
                live = (torch.arange(x_BTD.shape[1], device=x_BTD.device) < lengths_B[:, None])[:, None].float()
                alpha, theta, eta = alpha * live, theta * live, torch.where(live > 0, eta, 1.0)
            out, M, S = scan_chunks((q, k, v), (alpha, eta, theta), state, self.shape.chunk, live)
        return self._read(out, x_BTD.dtype), MemoryState(M, S, tail)

    @property
    def _wide(self) -> bool:
        """Whether compiled code can take the width of a head."""
        return (self.shape.inner // self.shape.heads) % kernels.MEMORY_STEP == 0

    def _read(self, out_BHTK: Tensor, dtype: torch.dtype) -> Tensor:
        """(B, T, D) of what the heads recall."""
        return self.wo(self.norm(out_BHTK).transpose(1, 2).flatten(2).to(dtype))

    def _keys(self, projected: Tensor, tail: Tensor, lengths_B: Tensor | None):
        """Short causal depthwise convolution, then unit queries and keys, per head (B, H, T, K)."""
        B, T, _ = projected.shape
        mixed, tail = short_conv(projected, tail, self.conv_CJ, lengths_B)
        q, k, v = F.silu(mixed).view(B, T, 3, self.shape.heads, -1).permute(2, 0, 3, 1, 4)
        return F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, tail

    def _gates(self, logits_BTG: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Forgetting alpha, momentum eta and step theta, each (B, H, T) in [0, 1].

        A write of theta goes on to sum to theta / (1 - eta); above 2 it overshoots the value it aims at by more than
        it missed it, and the memory grows without bound. Hence eta stays at or below :data:`MOMENTUM`.
        """
        alpha, eta, theta = logits_BTG.sigmoid().transpose(1, 2).chunk(3, dim=1)
        floor = 1.0 / self.shape.capacity
        alpha = (floor + 2 * self.shape.novelty_weight * alpha).clamp(max=MOST)
        return alpha, eta.clamp(max=MOMENTUM), (2 * self.shape.surprise_weight * theta).clamp(max=1.0)


def one_token(
    qkv: tuple[Tensor, Tensor, Tensor], gates: tuple[Tensor, Tensor, Tensor], state: MemoryState
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`scan_chunks` for one token: the recurrence of the module docstring as it stands there."""
    q_BHK1, k_BHK1, v_BHK1 = (x.mT for x in qkv)
    alpha, eta, theta = (gate.unsqueeze(-1) for gate in gates)
    e_BHK1 = v_BHK1 - state.M_BHKK @ k_BHK1
    S_BHKK = torch.addcmul(eta * state.S_BHKK, theta * e_BHK1, k_BHK1.mT)
    M_BHKK = torch.addcmul(S_BHKK, 1 - alpha, state.M_BHKK)
    return (M_BHKK @ q_BHK1).mT, M_BHKK, S_BHKK


def scan_chunks(
    qkv: tuple[Tensor, Tensor, Tensor],
    gates: tuple[Tensor, Tensor, Tensor],
    state: MemoryState,
    chunk: int,
    live_B1T: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence of the module docstring over T tokens, chunk by chunk.

    Args:
        qkv: queries, keys, values, each (B, H, T, K).
        gates: alpha, eta, theta, each (B, H, T).
        state: M and S before the first token.
        chunk: tokens handled in parallel; the result does not depend on it (up to rounding).
        live_B1T: 1 for real tokens; where 0, momentum is held but not added to M.

    Returns:
        reads (B, H, T, K), final M and S (B, H, K, K).
    """
    T = qkv[0].shape[2]
    C = min(chunk, T)
    pad = -T % C
    if pad:
        live_B1T = torch.ones_like(gates[0][:, :1]) if live_B1T is None else live_B1T
        qkv = tuple(F.pad(x, (0, 0, 0, pad)) for x in qkv)
        alpha, eta, theta = gates
        gates = (F.pad(alpha, (0, pad)), F.pad(eta, (0, pad), value=1.0), F.pad(theta, (0, pad)))
        live_B1T = F.pad(live_B1T, (0, pad))
    q, k, v = (x.unflatten(2, (-1, C)) for x in qkv)
    alpha, eta, theta = (g.unflatten(2, (-1, C)) for g in gates)
    live = None if live_B1T is None else live_B1T.unflatten(2, (-1, C))
    plan = _chunk_plan(k, q, alpha, eta, theta, live)
    M, S, reads = state.M_BHKK, state.S_BHKK, []
    for n in range(k.shape[2]):
        out, M, S = _one_chunk(q[:, :, n], k[:, :, n], v[:, :, n], M, S, {key: x[:, :, n] for key, x in plan.items()})
        reads.append(out)
    return torch.cat(reads, dim=2)[:, :, :T], M, S


def _decay_matrix(factor: Tensor) -> Tensor:
    """(..., C) factors f to (..., C, C) products P[t, s] = f_{s+1} ... f_t for s <= t, else 0."""
    log = factor.clamp_min(1e-9).log().cumsum(-1)
    C = factor.shape[-1]
    keep = torch.ones(C, C, dtype=torch.bool, device=factor.device).tril()
    return (log[..., :, None] - log[..., None, :]).masked_fill(~keep, -torch.inf).exp()


def _chunk_plan(k, q, alpha, eta, theta, live) -> dict[str, Tensor]:
    """Everything about all chunks that does not depend on the memory: decays, couplings, the triangular inverse."""
    forget, momentum = _decay_matrix(1 - alpha), _decay_matrix(eta)
    forget0 = (1 - alpha).clamp_min(1e-9).log().cumsum(-1).exp()
    momentum0 = eta.clamp_min(1e-9).log().cumsum(-1).exp()
    added = forget if live is None else forget * live[..., None, :]
    # Coefficient of the write at s in M_t: sum over j of forget(t, j) * momentum(j, s).
    write = (added @ momentum) * theta[..., None, :]
    carry = (added @ momentum0[..., None])[..., 0]
    before = F.pad(write, (0, 0, 1, 0))[..., :-1, :]  # same at t - 1: the memory that token t meets
    gram = k @ k.transpose(-1, -2)
    system = torch.eye(k.shape[-2], device=k.device) + before * gram
    inverse = torch.linalg.solve_triangular(
        system, torch.eye(k.shape[-2], device=k.device).expand_as(system), upper=False, unitriangular=True
    )
    return {
        "inverse": inverse,
        "read": write * (q @ k.transpose(-1, -2)),
        "forget": forget0[..., None],
        "carry": carry[..., None],
        "forget_before": F.pad(forget0, (1, 0), value=1.0)[..., :-1, None],
        "carry_before": F.pad(carry, (1, 0))[..., :-1, None],
        "write_end": write[..., -1, :, None],
        "past_end": momentum0[..., -1:, None],
        "new_end": (momentum[..., -1, :] * theta)[..., None],
    }


def _one_chunk(q, k, v, M, S, p) -> tuple[Tensor, Tensor, Tensor]:
    """Errors, reads and the memory after one chunk; q, k, v are (B, H, C, K)."""
    Mt, St = M.transpose(-1, -2), S.transpose(-1, -2)
    error = p["inverse"] @ (v - p["forget_before"] * (k @ Mt) - p["carry_before"] * (k @ St))
    out = p["forget"] * (q @ Mt) + p["carry"] * (q @ St) + p["read"] @ error
    last_forget, last_carry = p["forget"][..., -1:, :], p["carry"][..., -1:, :]
    M_new = last_forget * M + last_carry * S + (p["write_end"] * error).transpose(-1, -2) @ k
    S_new = p["past_end"] * S + (p["new_end"] * error).transpose(-1, -2) @ k
    return out, M_new, S_new


class DecayMemory(nn.Module):
    """The factorised memory of the V2 specification: half width, constant decay 0.99, no surprise."""

    DECAY = 0.99

    def __init__(self, shape: MemoryShape) -> None:
        super().__init__()
        self.shape = shape
        self.down, self.up = linear(shape.width, shape.inner), linear(shape.inner, shape.width)
        self.norm = RMSNorm(shape.inner)

    def initial_state(self, batch: int, device: torch.device) -> MemoryState:
        """An empty memory."""
        faded = torch.zeros(batch, 1, 1, self.shape.inner, device=device)
        return MemoryState(faded, torch.zeros(batch, 0, device=device), torch.zeros(batch, 0, device=device))

    def forward(
        self, x_BTD: Tensor, state: MemoryState | None, lengths_B: Tensor | None = None
    ) -> tuple[Tensor, MemoryState]:
        """m_t = 0.99 m_{t-1} + 0.01 W x_t; same arguments and returns as :class:`TitansMemory`."""
        B, T, _ = x_BTD.shape
        state = state or self.initial_state(B, x_BTD.device)
        inputs = (1 - self.DECAY) * self.down(x_BTD).float()
        power = torch.arange(T, device=x_BTD.device, dtype=torch.float32)
        weight = torch.where(power[:, None] >= power, self.DECAY ** (power[:, None] - power), 0.0)
        with torch.autocast(x_BTD.device.type, enabled=False):
            m = weight @ inputs + self.DECAY ** (power[:, None] + 1) * state.M_BHKK[:, 0]
        last = m[:, -1:] if lengths_B is None else _last_real(m, state.M_BHKK[:, 0], lengths_B)
        return self.up(self.norm(m).to(x_BTD.dtype)), replace(state, M_BHKK=last[:, None])


def _last_real(m_BTK: Tensor, before_B1K: Tensor, lengths_B: Tensor) -> Tensor:
    """Row i's entry at its last real token; what was there before if the row is empty."""
    both = torch.cat([before_B1K, m_BTK], dim=1)
    return both.gather(1, lengths_B[:, None, None].expand(-1, 1, both.shape[2]))
