"""A language model that follows a script: what it thinks and answers is a function of the question, and known."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from forgekit.data.tokenizer import ASSISTANT, END, THINKING, USER
from forgekit.models.base import Loss, Output, mean_nats, supervised_positions

OPEN, CLOSE = THINKING[:2]
Script = Callable[[str, str | None], str]
"""Question and thought (``None``: without one) to the answer."""


@dataclass
class Seen:
    """The tokens each row has read."""

    rows_: list[list[int]]

    def rows(self, index: torch.Tensor) -> Seen:
        return Seen([self.rows_[i] for i in index.tolist()])


class Scripted(torch.nn.Module):
    """Writes ``thought`` between its markers when it is opened, and ``answer`` after it or without one.

    Tokens are expected by their place, so a deviation costs only itself. Its features are the tokens it reads.

    Args:
        tokenizer: of the house.
        thought: question to thought.
        answer: question and the thought that was read to the answer.
        sure: logit of the expected token; all others have 0.
    """

    def __init__(self, tokenizer: Any, thought: Callable[[str], str], answer: Script, sure: float = 8.0) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.tokenizer, self.thought, self.answer, self.sure = tokenizer, thought, answer, sure
        self.config = SimpleNamespace(vocab_size=tokenizer.get_vocab_size())
        self._ids, self._texts = {}, {}  # the same few texts are asked for at every place
        self.marks = {name: tokenizer.token_to_id(name) for name in (OPEN, CLOSE, USER, ASSISTANT, END)}

    def expected(self, seen: list[int]) -> int:
        """The token that should come after those read."""
        if self.marks[ASSISTANT] not in seen:
            return self.marks[END]
        at = len(seen) - seen[::-1].index(self.marks[ASSISTANT])
        question, said = self._text(seen[seen.index(self.marks[USER]) + 1 : at - 2]), seen[at:]
        if not said or said[0] != self.marks[OPEN]:
            return self._next(self.answer(question, None) + END, len(said))
        if self.marks[CLOSE] not in said:
            return self._next(self.thought(question) + CLOSE, len(said) - 1)
        close = said.index(self.marks[CLOSE])
        return self._next(self.answer(question, self._text(said[1:close])) + END, len(said) - close - 1)

    def _text(self, ids: list[int]) -> str:
        key = tuple(ids)
        if key not in self._texts:
            self._texts[key] = self.tokenizer.decode(ids, skip_special_tokens=False)
        return self._texts[key]

    def _next(self, text: str, place: int) -> int:
        if text not in self._ids:
            self._ids[text] = self.tokenizer.encode(text).ids
        ids = self._ids[text]
        return ids[place] if place < len(ids) else self.marks[END]

    def initial_state(self, batch: int) -> Seen:
        return Seen([[] for _ in range(batch)])

    def forward(self, ids_BT: torch.Tensor, state: Seen | None = None, lengths_B: torch.Tensor | None = None) -> Output:
        B, T = ids_BT.shape
        lengths = [T] * B if lengths_B is None else lengths_B.tolist()
        logits_BTV, rows = torch.zeros(B, T, self.config.vocab_size), []
        for b, ids in enumerate(ids_BT.tolist()):
            before = state.rows_[b] if state else []
            for t in range(lengths[b]):
                logits_BTV[b, t, self.expected(before + ids[: t + 1])] = self.sure
            rows.append(before + ids[: lengths[b]])
        return Output(logits_BTV + 0 * self.weight, Seen(rows) if state else None)

    def features(self, ids_BT: torch.Tensor, state: Any = None, lengths_B: torch.Tensor | None = None):
        return torch.nn.functional.one_hot(ids_BT, self.config.vocab_size).float(), state

    def training_loss(self, ids_BT: torch.Tensor, labels_BT: torch.Tensor) -> Loss:
        at_N = supervised_positions(labels_BT)
        nats = mean_nats(self(ids_BT).logits.flatten(0, 1)[at_N], labels_BT.flatten()[at_N])
        return Loss(nats, nats.detach(), at_N.numel())

    def flops_per_token(self, context: int) -> float:
        return 0.0
