"""Parallel thoughts: many continuations from many positions of a batch, as one batch of rows.

Two ways to go on from the middle of a row, behind one interface (:class:`Reading`), with the same logits:

* from the model's *state*, for any model of the protocol: the context is read in segments that end at the chosen
  positions, and there the state is taken aside. Recurrent memories and convolutions allow nothing else.
* by the published *diagonal mask* (arXiv 2403.09629, section 4.2), for attention-only models: the context is read once,
  its keys and values are kept once, and a thought's token attends to its prefix in the context and to its own
  thought. The mask is never written out: attention to the context and to the own thought are two products under one
  softmax.

Shapes: B rows of context, T its tokens, N points, R branches, L new tokens of each, D width, H heads, K head width,
P own tokens so far, C branches per context row, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from agent_forge.phases.quietstar.injection import Points
from agent_forge.phases.quietstar.talk_config import Marks
from forgekit.errors import ConfigError
from forgekit.infer.states import join_states, joinable, take_rows
from forgekit.models.gpt import GPT
from forgekit.models.hidden import hidden, read_out

NEVER = -1e9
"""Score of a token that must not be said. Finite: -inf times a weight of zero is no number."""


class Reading(Protocol):
    """A batch of contexts that was read, and from whose points branches go on.

    Attributes:
        features_BTD: hidden states of the context, with gradients where they are on.
    """

    features_BTD: Tensor

    def start(self, point_R: Tensor) -> Any:
        """The state of branches that stand at these points (indices into N, repeated for several thoughts)."""

    def read(self, ids_RL: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Hidden states (R, L, D) of the branches' next tokens, and the state after them."""


def diagonal_works(model: nn.Module) -> bool:
    """Whether nothing but attention carries information between the model's positions, in a layout known here."""
    return isinstance(model, GPT)


def read_context(model: nn.Module, ids_BT: Tensor, points: Points, branching: str = "auto") -> Reading:
    """Read the contexts so that branches can start at the points.

    Args:
        model: a model of the protocol with ``features`` and ``read_out``.
        ids_BT: whole rows, without padding before a point.
        points: where branches start.
        branching: ``state``, ``diagonal``, or ``auto`` (diagonal where it works).

    Raises:
        ConfigError: diagonal was asked of a model that has more than attention.
    """
    if branching == "auto":
        branching = "diagonal" if diagonal_works(model) else "state"
    if branching == "state":
        return StateReading(model, ids_BT, points)
    if not diagonal_works(model):
        raise ConfigError(
            f"the diagonal mask does not work for {type(model).__name__}", where="branching", remedy="use auto or state"
        )
    return DiagonalReading(model, ids_BT, points)


class StateReading:
    """Branches go on from the states that the model had at the points."""

    def __init__(self, model: nn.Module, ids_BT: Tensor, points: Points) -> None:
        self.model = model
        # Hugging Face caches must grow evenly: all rows read on to every point of any row.
        ragged = not hasattr(model, "hf")
        state = model.initial_state(ids_BT.shape[0])
        self._whole = not ragged and not _can_join(model, state, ids_BT)
        if self._whole:
            ends_SB = torch.full_like(ids_BT[None, :, 0], ids_BT.shape[1])
        else:
            ends_SB = (_row_ends if ragged else _common_ends)(points, *ids_BT.shape)
        self.features_BTD, taken, order = self._segments(ids_BT, ends_SB, points, state)
        if self._whole:
            self._state = self._reread(ids_BT, points)
        else:
            back = torch.cat(order).argsort() if order else None
            self._state = take_rows(join_states(taken), back) if taken else None

    def _segments(self, ids_BT: Tensor, ends_SB: Tensor, points: Points, state: Any):
        """Read from end to end; hidden states of all, the states at the points, and which points those are."""
        begin_B, parts, taken, order = torch.zeros_like(ends_SB[0]), [], [], []
        offset, place_BT = 0, torch.zeros_like(ids_BT)
        column_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
        for end_B in ends_SB:
            length_B = end_B - begin_B
            longest = int(length_B.max())
            if longest:
                cut = (begin_B[:, None] + column_T[:longest]).clamp(max=ids_BT.shape[1] - 1)
                even = bool((length_B == longest).all())
                h_BLD, state = hidden(self.model, ids_BT.gather(1, cut), state, None if even else length_B)
                parts.append(h_BLD)
                inside = (column_T >= begin_B[:, None]) & (column_T < end_B[:, None])
                place_BT = torch.where(inside, offset + column_T - begin_B[:, None], place_BT)
                offset += longest
            here = (points.at_N + 1 == end_B[points.row_N]) & (length_B[points.row_N] > 0)
            if bool(here.any()) and not self._whole:
                taken.append(state.rows(points.row_N[here]))
                order.append(here.nonzero()[:, 0])
            begin_B = end_B
        h = torch.cat(parts, dim=1)
        return h.gather(1, place_BT[..., None].expand(-1, -1, h.shape[-1])), taken, order

    def _reread(self, ids_BT: Tensor, points: Points) -> Any:
        """For caches that cannot be joined: every point's prefix as a row of its own."""
        prefix_NT = ids_BT[points.row_N, : int(points.at_N.max()) + 1]
        return self.model(prefix_NT, self.model.initial_state(len(points)), points.at_N + 1).state

    def start(self, point_R: Tensor) -> Any:
        """See :class:`Reading`."""
        return self._state.rows(point_R)

    def read(self, ids_RL: Tensor, state: Any) -> tuple[Tensor, Any]:
        """See :class:`Reading`."""
        return hidden(self.model, ids_RL, state)


def _can_join(model: nn.Module, state: Any, ids_BT: Tensor) -> bool:
    """Whether the model's states can be joined; a cache shows its kind only once it was used."""
    with torch.no_grad():
        return joinable(hidden(model, ids_BT[:1, :1], state.rows(torch.zeros(1, dtype=torch.long)))[1])


def _row_ends(points: Points, B: int, T: int) -> Tensor:
    """Segment ends (S, B): each row's own points in order, then the end of the row."""
    count_B = torch.bincount(points.row_N, minlength=B)
    first_B = count_B.cumsum(0) - count_B
    rank_N = torch.arange(len(points), device=points.row_N.device) - first_B[points.row_N]
    ends = torch.zeros(int(count_B.max()) + 1, B, dtype=torch.long, device=points.row_N.device)
    ends[rank_N, points.row_N] = points.at_N + 1
    ends = ends.cummax(0).values  # a row with fewer points waits
    ends[-1] = T
    return ends


def _common_ends(points: Points, B: int, T: int) -> Tensor:
    """Segment ends (S, B): every point of any row, then the end of all rows."""
    last = points.at_N.new_tensor([T])
    return torch.cat([points.at_N + 1, last]).unique()[:, None].expand(-1, B)


@dataclass
class DiagonalState:
    """Branches of attention-only models.

    Attributes:
        point_R: which point each branch started from.
        next_R: absolute position of its next token.
        layers: per block the branch's own keys and values, (R, H, P, K) each; empty before the first token.
    """

    point_R: Tensor
    next_R: Tensor
    layers: list[tuple[Tensor, Tensor]]

    def rows(self, index: Tensor) -> DiagonalState:
        """The same state for a subset (or repetition) of branches."""
        return DiagonalState(self.point_R[index], self.next_R[index], [(k[index], v[index]) for k, v in self.layers])


class DiagonalReading:
    """Branches attend to their prefix of the context, which is kept once, and to themselves."""

    def __init__(self, model: GPT, ids_BT: Tensor, points: Points) -> None:
        self.model, self.points = model, points
        (B, T), device = ids_BT.shape, ids_BT.device
        pos_BT = torch.arange(T, device=device).expand(B, T)
        x_BTD, self._context = model.embedding.embed(ids_BT), []
        for block in model.blocks:
            q, k, v, _ = block.attn.project(block.norm1(x_BTD), pos_BT, None, None)
            self._context.append((k, v))
            x_BTD = _rest_of(block, x_BTD, block.attn.attend_fresh(q, k, v))
        self.features_BTD = model.norm(x_BTD)

    def start(self, point_R: Tensor) -> DiagonalState:
        """See :class:`Reading`."""
        return DiagonalState(point_R, self.points.at_N[point_R] + 1, [])

    def read(self, ids_RL: Tensor, state: DiagonalState) -> tuple[Tensor, DiagonalState]:
        """See :class:`Reading`."""
        pos_RL = state.next_R[:, None] + torch.arange(ids_RL.shape[1], device=ids_RL.device)
        table = _Table(self.points.row_N[state.point_R], self.features_BTD.shape[0])
        x_RLD, layers = self.model.embedding.embed(ids_RL), []
        for i, block in enumerate(self.model.blocks):
            q, k, v, _ = block.attn.project(block.norm1(x_RLD), pos_RL, None, None)
            if state.layers:
                k, v = (torch.cat(pair, dim=2) for pair in zip(state.layers[i], (k, v)))
            layers.append((k, v))
            out = self._attend(q, i, (k, v), pos_RL, (table, self.points.at_N[state.point_R]))
            x_RLD = _rest_of(block, x_RLD, out)
        return self.model.norm(x_RLD), DiagonalState(state.point_R, state.next_R + ids_RL.shape[1], layers)

    def _attend(self, q: Tensor, i: int, own: tuple[Tensor, Tensor], pos_RL: Tensor, place: tuple) -> Tensor:
        """One softmax over the visible context and the branch's own tokens; (R, H, L, K)."""
        (k_BHTK, v_BHTK), (k, v), (table, at_R) = self._context[i], own, place
        window = self.model.blocks[i].attn.shape.window or math.inf
        far, near = table.products(q, k_BHTK), q @ k.mT
        column_T = torch.arange(far.shape[-1], device=q.device)
        far_seen = (column_T <= at_R[:, None, None]) & (pos_RL[..., None] - column_T < window)
        own_RP = pos_RL[:, -1:] - torch.arange(near.shape[-1] - 1, -1, -1, device=q.device)
        gap_RLP = pos_RL[..., None] - own_RP[:, None]
        seen = torch.cat([far_seen, (gap_RLP >= 0) & (gap_RLP < window)], dim=-1)[:, None]
        scores = torch.cat([far, near], dim=-1).float() / math.sqrt(q.shape[-1])
        weights = scores.masked_fill(~seen, -math.inf).softmax(-1).to(v.dtype)
        far_w, near_w = weights.split([far.shape[-1], near.shape[-1]], dim=-1)
        return table.sums(far_w, v_BHTK.to(v.dtype)) + near_w @ v


def _rest_of(block: nn.Module, x: Tensor, attended: Tensor) -> Tensor:
    """A transformer block from its attention's heads (B, H, T, K) on."""
    x = x + block.attn.wo(attended.transpose(1, 2).reshape(x.shape))
    return x + block.ffn(block.norm2(x))


class _Table:
    """Branches laid out by their context row, so that one product per row serves all of its branches.

    Context rows with fewer branches are filled up; what stands there is thrown away.
    """

    def __init__(self, row_R: Tensor, B: int) -> None:
        count_B = torch.bincount(row_R, minlength=B)
        self.B, self.C = B, int(count_B.max())
        order_R = row_R.argsort(stable=True)
        rank_R = torch.empty_like(row_R)
        first_B = count_B.cumsum(0) - count_B
        rank_R[order_R] = torch.arange(len(row_R), device=row_R.device) - first_B[row_R[order_R]]
        self.slot_R = row_R * self.C + rank_R

    def _spread(self, x_RHLX: Tensor) -> Tensor:
        R, H, L, X = x_RHLX.shape
        full = x_RHLX.new_zeros(self.B * self.C, H, L, X).index_copy(0, self.slot_R, x_RHLX)
        return full.view(self.B, self.C, H, L, X).transpose(1, 2).reshape(self.B, H, self.C * L, X)

    def _gather(self, x_BHSX: Tensor, L: int) -> Tensor:
        x = x_BHSX.view(self.B, x_BHSX.shape[1], self.C, L, -1).transpose(1, 2)
        return x.flatten(0, 1)[self.slot_R]

    def products(self, q_RHLK: Tensor, k_BHTK: Tensor) -> Tensor:
        """Every query with every key of its own context, (R, H, L, T)."""
        return self._gather(self._spread(q_RHLK) @ k_BHTK.to(q_RHLK.dtype).mT, q_RHLK.shape[2])

    def sums(self, weights_RHLT: Tensor, v_BHTK: Tensor) -> Tensor:
        """Weighted values of the own context, (R, H, L, K)."""
        return self._gather(self._spread(weights_RHLT) @ v_BHTK, weights_RHLT.shape[2])


@dataclass(frozen=True)
class Thoughts:
    """Thoughts without their markers.

    Attributes:
        point_R: the point each one belongs to.
        ids_RL: tokens, filled up with the stop marker.
        length_R: real tokens.
        stopped_R: it said the stop marker itself; else its budget was used up.
        read: tokens that the model read to write them.
    """

    point_R: Tensor
    ids_RL: Tensor
    length_R: Tensor
    stopped_R: Tensor
    read: int

    def rows(self, index: Tensor) -> Thoughts:
        """Some of them."""
        parts = (x[index] for x in (self.point_R, self.ids_RL, self.length_R, self.stopped_R))
        return Thoughts(*parts, self.read)

    def without(self, which_R: Tensor) -> Thoughts:
        """The same, some of them emptied."""
        length_R = self.length_R.masked_fill(which_R, 0)
        return replace(self, length_R=length_R, stopped_R=self.stopped_R & ~which_R)


def thought_scores(model: nn.Module, h: Tensor, marks: Marks) -> Tensor:
    """Scores (..., V) of the next token of a thought; what must not be thought gets :data:`NEVER`."""
    return ruled_out(read_out(model, h), (marks.start, *marks.forbidden))


def ruled_out(logits: Tensor, ids: tuple[int, ...]) -> Tensor:
    """Float scores with :data:`NEVER` for some tokens."""
    index = torch.tensor(ids, dtype=torch.long, device=logits.device)
    return logits.float().index_fill(-1, index, NEVER)


@torch.no_grad()
def think(
    model: nn.Module, reading: Reading, point_R: Tensor, limit_R: Tensor, marks: Marks, temperature: float
) -> Thoughts:
    """Write one thought per branch, one token a step, all branches at once; finished ones leave the batch.

    Args:
        model: whose head scores the tokens.
        reading: the contexts.
        point_R: the point of each branch.
        limit_R: tokens it may have, markers not counted.
        marks: its markers and what it must not contain.
        temperature: of the draws, from torch's global generator; 0 takes the most likely token.
    """
    longest, count = int(limit_R.max()), len(point_R)
    ids_RL = torch.full((count, longest), marks.stop, dtype=torch.long, device=point_R.device)
    length_R, stopped_R = limit_R.clone(), torch.zeros_like(limit_R, dtype=torch.bool)
    state, alive, read = reading.start(point_R), torch.arange(count, device=point_R.device), 0
    token, going = torch.full_like(point_R, marks.start), torch.ones_like(stopped_R)
    for step in range(longest):
        h_RLD, state = reading.read(token[:, None], state)
        read += len(alive)
        token = _drawn(thought_scores(model, h_RLD[:, -1], marks), temperature)
        said_stop = going & (token == marks.stop)
        ids_RL[alive[going], step] = token[going]
        length_R[alive[said_stop]], stopped_R[alive[said_stop]] = step, True
        going = going & ~said_stop & (limit_R[alive] > step + 1)
        left = int(going.sum())
        if not left:
            break
        if left <= 0.875 * len(alive):  # copying the states costs about as much as one step
            keep = going.nonzero()[:, 0]
            alive, token, going, state = alive[keep], token[keep], going[keep], take_rows(state, keep)
    return Thoughts(point_R, ids_RL[:, : max(1, int(length_R.max()))], length_R, stopped_R, read)


def _drawn(logits_RV: Tensor, temperature: float) -> Tensor:
    """One token per row (R,)."""
    if not temperature:
        return logits_RV.argmax(-1)
    # By inverting the cumulative distribution: one random number a row, where clocks for all tokens take as long as
    # the model. ``right`` never hits a token of probability 0; rounding may reach beyond the last one.
    cdf_RV = (logits_RV / temperature).softmax(-1).cumsum(-1)
    target_R1 = torch.rand(len(cdf_RV), 1, device=cdf_RV.device) * cdf_RV[:, -1:]
    target_R1 = torch.minimum(target_R1, cdf_RV[:, -1:].nextafter(torch.zeros_like(target_R1)))
    return torch.searchsorted(cdf_RV, target_R1, right=True).clamp(max=cdf_RV.shape[1] - 1)[:, 0]


def with_truth(thoughts: Thoughts, ids_BT: Tensor, points: Points, marks: Marks, ahead: int) -> Tensor:
    """What a branch reads to be judged, (R, S): start, thought, stop, and the true tokens after its point.

    The last of ``ahead`` true tokens is only predicted, so ``ahead - 1`` are read. Rows are filled up on the right
    with the stop marker, and so are true tokens beyond the end of the context.
    """
    L, device = int(thoughts.length_R.max()), ids_BT.device
    R, width = len(thoughts.point_R), 2 + L + ahead - 1
    out_RS = torch.full((R, width), marks.stop, dtype=torch.long, device=device)
    out_RS[:, 0] = marks.start
    out_RS[:, 1 : 1 + L] = thoughts.ids_RL[:, :L]
    row_R, at_R = points.row_N[thoughts.point_R], points.at_N[thoughts.point_R]
    inside = torch.arange(L, device=device) < thoughts.length_R[:, None]
    out_RS[:, 1 : 1 + L] = out_RS[:, 1 : 1 + L].masked_fill(~inside, marks.stop)
    step = torch.arange(1, ahead, device=device)
    true_RA = F.pad(ids_BT, (0, ahead), value=marks.stop)[row_R[:, None], at_R[:, None] + step]
    return out_RS.scatter(1, 1 + thoughts.length_R[:, None] + step, true_RA)
