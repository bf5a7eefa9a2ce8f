"""States of several rows as one value: joined when a row enters a running batch, cut out when it leaves.

A state belongs to whole rows, so this knows nothing of models: any dataclass of tensors whose first dimension is the
row can be joined, our attention caches and the ordinary caches of transformers with them.

Shapes: B rows, P cached tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from forgekit.models.layers import EMPTY, AttentionState


def join_states(states: Sequence[Any]) -> Any:
    """One state of all rows of several states, in their order.

    Works on any dataclass of tensors whose first dimension is the row, and on what is in it: lists, attention rings,
    Hugging Face caches. Rings written at different places are turned so that slot 0 is the oldest in all; caches
    that grow are padded at their old end.

    Raises:
        TypeError: a part is none of these.
    """
    first = states[0]
    if len(states) == 1 or first is None:
        return first
    if isinstance(first, Tensor):
        return torch.cat(list(states))
    if isinstance(first, AttentionState):
        return _join_attention(states)
    if isinstance(first, list):
        return [join_states(parts) for parts in zip(*states, strict=True)]
    if hasattr(first, "cache"):
        return _join_caches(states)
    if is_dataclass(first):
        return type(first)(**{f.name: join_states([getattr(s, f.name) for s in states]) for f in fields(first)})
    raise TypeError(f"states of type {type(first).__name__} cannot be joined")


def joinable(state: Any) -> bool:
    """Whether states of this kind can be joined. Hugging Face caches that cannot also take their prompt whole."""
    if hasattr(state, "cache"):
        return _ordinary(state)
    try:
        join_states([state, state])
    except TypeError:
        return False
    return True


def take_rows(state: Any, index: Tensor) -> Any:
    """The state of some rows, without columns that are padding in all of them.

    Without that, the cache of a batch in which rows come and go would grow for ever.
    """
    return _trimmed(state.rows(index))


def _trimmed(state: Any) -> Any:
    if isinstance(state, AttentionState):
        return _trim_attention(state)
    if isinstance(state, list):
        return [_trimmed(part) for part in state]
    if hasattr(state, "cache"):
        return _with_columns(state, int(state.real_BP.sum(1).max()))
    if is_dataclass(state):
        return replace(state, **{f.name: _trimmed(getattr(state, f.name)) for f in fields(state)})
    return state


def _grows(state: AttentionState) -> bool:
    """Whether it is unlimited attention, which appends, and not a ring."""
    return state.cursor < 0 or state.pos_BP.shape[1] == 0


def _join_attention(states: Sequence[AttentionState]) -> AttentionState:
    cursor = states[0].cursor
    if any(_grows(s) for s in states):
        longest = max(s.pos_BP.shape[1] for s in states)
        states, cursor = [_pad_old_end(s, longest - s.pos_BP.shape[1]) for s in states], -1
    elif any(s.cursor != cursor for s in states):
        states, cursor = [_oldest_first(s) for s in states], 0
    keys, values, pos, tail = (
        join_states([getattr(s, name) for s in states]) for name in ("k_BHPK", "v_BHPK", "pos_BP", "tail_BJC")
    )
    return AttentionState(keys, values, pos, cursor, tail)


def _oldest_first(state: AttentionState) -> AttentionState:
    """The same ring, turned so that its cursor is 0: only the order of the slots is different."""
    keys, values = (x.roll(-state.cursor, dims=2) for x in (state.k_BHPK, state.v_BHPK))
    return replace(state, k_BHPK=keys, v_BHPK=values, pos_BP=state.pos_BP.roll(-state.cursor, dims=1), cursor=0)


def _pad_old_end(state: AttentionState, columns: int) -> AttentionState:
    keys, values = (F.pad(x, (0, 0, columns, 0)) for x in (state.k_BHPK, state.v_BHPK))
    return replace(state, k_BHPK=keys, v_BHPK=values, pos_BP=F.pad(state.pos_BP, (columns, 0), value=EMPTY))


def _trim_attention(state: AttentionState) -> AttentionState:
    spare = state.pos_BP.shape[1] - int((state.pos_BP != EMPTY).sum(1).max()) if _grows(state) else 0
    if not spare:
        return state
    keys, values = state.k_BHPK[:, :, spare:], state.v_BHPK[:, :, spare:]
    return replace(state, k_BHPK=keys, v_BHPK=values, pos_BP=state.pos_BP[:, spare:])


def _ordinary(state: Any) -> bool:
    """Whether a Hugging Face state's cache holds keys and values and nothing else."""
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    kinds = {type(layer) for layer in state.cache.layers}
    return bool(kinds) and kinds <= {DynamicLayer, DynamicSlidingWindowLayer}


def _with_columns(state: Any, columns: int) -> Any:
    """A Hugging Face state with its old end cut or padded to this many columns; as it is where it cannot be."""
    change = columns - state.ids_BP.shape[1]
    if not change or not _ordinary(state):
        return state
    from forgekit.models.hf import fork

    cache = fork(state.cache)
    for layer in cache.layers:
        if not layer.is_initialized:  # a layer that shares another one's keys and values
            continue
        wanted = columns
        if layer.is_sliding:
            wanted, layer.cumulative_length = min(columns, layer.sliding_window - 1), columns
        more = wanted - layer.keys.shape[-2]
        layer.keys, layer.values = (F.pad(x, (0, 0, more, 0)) for x in (layer.keys, layer.values))
    ids_BP, real_BP = (F.pad(x, (change, 0)) for x in (state.ids_BP, state.real_BP))
    return replace(state, cache=cache, ids_BP=ids_BP, real_BP=real_BP)


def _join_caches(states: Sequence[Any]) -> Any:
    """Hugging Face states are padded on the left already: bring them to one width."""
    from forgekit.models.hf import fork

    longest = max(s.ids_BP.shape[1] for s in states)
    states = [_with_columns(s, longest) for s in states]
    cache = fork(states[0].cache)
    for i, layer in enumerate(cache.layers):
        if layer.is_initialized:
            layer.keys = torch.cat([s.cache.layers[i].keys for s in states])
            layer.values = torch.cat([s.cache.layers[i].values for s in states])
    ids_BP, real_BP = (torch.cat([getattr(s, name) for s in states]) for name in ("ids_BP", "real_BP"))
    return replace(states[0], cache=cache, ids_BP=ids_BP, real_BP=real_BP)
