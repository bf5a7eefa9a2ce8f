"""Scores of answers behind prompts that are token ids already, such as a question with a thought given to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from forgekit.data.batches import PackedSource
from forgekit.errors import DataError
from forgekit.measure.scores import ProblemScores, score_source
from forgekit.models.base import CausalLM, Output, score_at

_LOGITS = 2**25  # scores held at once (128 MB in float32): a large vocabulary must not exhaust a small machine


def score_rows(
    model: CausalLM,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    muted: Sequence[int] = (),
) -> ProblemScores:
    """As :func:`forgekit.measure.scores.score_problems`, on token ids: is each answer what greedy decoding writes?

    Args:
        model: scores the rows; left in the mode it was in.
        tokenizer: whose ids they are.
        prompts: what is read, at least one token each.
        answers: what must come, the end token included.
        muted: tokens that decoding could not draw; they lose their probability to the others.

    Raises:
        DataError: no rows, an empty prompt or answer, or a row longer than the model's context.
    """
    if not prompts or not all(map(len, prompts)) or not all(map(len, answers)):
        raise DataError("no rows, or an empty one", where="rows", remedy="give a prompt and an answer to each")
    source = PackedSource(tokenizer, prompts, answers)
    limit = getattr(model, "context_limit", None)
    if limit and int(source.size.max()) > limit:
        what = f"{int(source.size.max())} tokens, the model's context is {limit}"
        raise DataError(what, where=f"row {int(source.size.argmax())}", remedy="lower the thinking budget")
    batch_tokens = max(1, min(16384, _LOGITS // model.config.vocab_size))
    return score_source(_Muted(model, muted) if muted else model, source, batch_tokens)


class _Muted(nn.Module):
    """A model that never draws certain tokens."""

    def __init__(self, model: nn.Module, muted: Sequence[int]) -> None:
        super().__init__()
        self.model, self.muted, self.training = model, list(muted), model.training

    def score_at(self, ids_BT: Tensor, at_N: Tensor) -> Output:
        out = score_at(self.model, ids_BT, at_N)
        muted = torch.tensor(self.muted, device=out.logits.device)
        return replace(out, logits=out.logits.index_fill(-1, muted, -torch.inf))
