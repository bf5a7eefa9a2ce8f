"""THE generation engine: one ragged prefill, then one token a step, finished rows leave the batch.

Works with every model of :class:`forgekit.models.base.CausalLM`, on the device its parameters are on. All state
is an explicit value, so a conversation is continued by prefilling only what is new. A thought is generated like the
answer after it, one forward pass a token; how the two are told apart is in :mod:`forgekit.infer.thinking`.

Shapes: B rows still generating, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from forgekit.data.tokenizer import END
from forgekit.errors import ForgeError
from forgekit.infer.sampling import GREEDY, SamplingConfig, row_generator, sample
from forgekit.infer.thinking import Markers, Said, Speech, answers, begin
from forgekit.models.base import CausalLM

Finish = Literal["stop", "length", "context"]
Prompt = str | list[int]
MOST_SCORES = 2**27
"""Scores that reading prompts may make at once (512 MB in float32): more prompts are answered in several batches."""


@dataclass(frozen=True)
class Generation:
    """A finished continuation.

    Attributes:
        text: the answer, as it may be shown: no thought, no reserved tokens, nothing from a stop string on.
        tokens: every generated token, the end token included.
        prompt_tokens: length of the prompt in tokens.
        finish_reason: "stop" (end token or stop string), "length" (max_tokens) or "context" (the model's limit).
        mean_steps: recursion steps per generated token; ``None`` for models without adaptive computation.
        thought: what was thought before the answer, without the pair of markers around it; markers inside it, such as
            ``<step>``, are in the text. Empty if there was no thought.
        thinking_tokens: how many of ``tokens`` are the thought, the pair of markers included.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    finish_reason: Finish
    mean_steps: float | None
    thought: str = ""
    thinking_tokens: int = 0


@dataclass
class _Row:
    """One continuation in the making."""

    prompt: list[int]
    generator: torch.Generator
    speech: Speech
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def result(self) -> Generation:
        return finished(self, self.finish)


class InTheMaking(Protocol):
    """What drawing and finishing need of a row."""

    prompt: list[int]
    generator: torch.Generator
    speech: Speech
    tokens: list[int]
    steps: list[int]


def finished(row: InTheMaking, reason: Finish) -> Generation:
    """The continuation of a row that has come to its end."""
    steps, speech = sum(row.steps) / len(row.steps) if row.steps else None, row.speech
    counts = (len(row.prompt), reason, steps)
    return Generation(speech.text, row.tokens, *counts, speech.thought, speech.thinking_tokens)


def next_tokens(logits_BV: Tensor, rows: Sequence[InTheMaking], config: SamplingConfig) -> list[int]:
    """The next token of every row: the one that must come, or one drawn that may.

    Args:
        logits_BV: scores of the next token.
        rows: to draw for; each with its own random numbers.
        config: how all of them draw.
    """
    tokens = [row.speech.must for row in rows]
    free = [i for i, token in enumerate(tokens) if token is None]
    _draw_into(tokens, free, logits_BV, rows, config)
    barred = [i for i in free if tokens[i] in rows[i].speech.barred]
    if barred:
        allowed_BV = logits_BV.clone()
        for i in barred:
            # Some tokenizers name end tokens that the model has no scores for.
            allowed_BV[i, [token for token in rows[i].speech.barred if token < logits_BV.shape[1]]] = -torch.inf
        _draw_into(tokens, barred, allowed_BV, rows, config)
    return tokens


def _draw_into(
    tokens: list[int | None], places: list[int], logits_BV: Tensor, rows: Sequence[InTheMaking], config: SamplingConfig
) -> None:
    """Draw the tokens of the rows at some places."""
    if not places:
        return
    if len(places) < len(rows):
        logits_BV, rows = logits_BV[torch.tensor(places, device=logits_BV.device)], [rows[i] for i in places]
    history = [row.prompt + row.tokens for row in rows] if config.repetition_penalty != 1 else []
    drawn = sample(logits_BV, config, [row.generator for row in rows], history).tolist()
    for place, token in zip(places, drawn, strict=True):
        tokens[place] = token


@dataclass(frozen=True)
class _Mark:
    """What a model knows after a sequence of tokens: its state and the scores of the next token."""

    tokens: list[int]
    state: Any
    logits_BV: Tensor
    steps_B: Tensor | None


class Engine:
    """Generates text with a model and its tokenizer.

    Args:
        model: a model of the house protocol; put into eval mode while it runs, and back.
        tokenizer: what came with it (``encode_batch``, ``decode``, ``token_to_id``).
    """

    def __init__(self, model: CausalLM, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        ends = {tokenizer.token_to_id(END), *getattr(tokenizer, "end_ids", ()), *getattr(model, "end_ids", ())}
        self.end_ids = frozenset(ends - {None})
        self.context_limit: int | None = getattr(model, "context_limit", None)
        self.markers = Markers.of(tokenizer, model.config.vocab_size, self.end_ids)

    def generate(
        self,
        prompts: Sequence[Prompt],
        config: SamplingConfig = GREEDY,
        seeds: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Continue every prompt, as one batch where memory allows.

        Args:
            prompts: texts, or token ids.
            config: sampling and stopping.
            seeds: one seed per prompt; the default derives them from ``config.seed`` and the prompt's place.

        Raises:
            ForgeError: a prompt is empty, too long for the model's context, or outside its vocabulary; thoughts are
                wanted of a tokenizer that has no tokens for them.
        """
        if not prompts:
            return []
        if seeds is None:
            generators = [row_generator(config.seed, i) for i in range(len(prompts))]
        else:
            generators = [row_generator(seed, 0) for seed in seeds]
        rows = [
            _Row(ids, generator, self.speech(ids, config, self.context_limit))
            for ids, generator in zip(self.encode(prompts), generators, strict=True)
        ]
        longest = max(len(row.prompt) for row in rows)
        size = max(1, MOST_SCORES // (longest * self.model.config.vocab_size))
        with evaluating(self.model):
            for start in range(0, len(rows), size):
                decoding = _Decoding(self, rows[start : start + size], config)
                decoding.prefill()
                while decoding.active:
                    decoding.step()
        return [row.result() for row in rows]

    def stream(self, prompt: Prompt, config: SamplingConfig = GREEDY) -> Iterator[str]:
        """Continue one prompt, giving the answer in pieces as it comes; joined they equal ``generate``'s text.

        Raises:
            ForgeError: as :meth:`generate`, at once.
        """
        return Session(self).stream(prompt, config)

    def speech(self, prompt: list[int], config: SamplingConfig, context: int | None) -> Speech:
        """The text of a continuation that has yet to begin.

        Args:
            prompt: token ids.
            config: sampling and stopping.
            context: most tokens of prompt and continuation together, if there is a limit.

        Raises:
            NoThoughts: thoughts are wanted of a tokenizer that has no tokens for them.
        """
        room = min(config.max_tokens, context - len(prompt)) if context else config.max_tokens
        return Speech(self.tokenizer, config.stop, begin(self.markers, config, prompt, room))

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of the prompts, checked.

        Raises:
            ForgeError: as :meth:`generate`.
        """
        texts = iter(self.tokenizer.encode_batch([p for p in prompts if isinstance(p, str)]))
        encoded = [next(texts).ids if isinstance(p, str) else list(p) for p in prompts]
        for i, ids in enumerate(encoded):
            self._check(ids, f"prompt {i}")
        return encoded

    def _check(self, ids: list[int], where: str) -> None:
        vocabulary, limit = self.model.config.vocab_size, self.context_limit
        if not ids:
            raise ForgeError("has no tokens", where=where, remedy="give at least one token to continue from")
        if limit and len(ids) > limit:
            raise ForgeError(f"{len(ids)} tokens, the model's context is {limit}", where=where, remedy="shorten it")
        if not 0 <= min(ids) <= max(ids) < vocabulary:
            wrong = next(i for i in ids if not 0 <= i < vocabulary)
            raise ForgeError(
                f"token {wrong} is outside the model's vocabulary of {vocabulary}",
                where=where,
                remedy="use the tokenizer saved with the model",
            )


@contextmanager
def evaluating(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every module is as it was."""
    training = [module for module in model.modules() if module.training]
    if training:
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Decoding:
    """A batch being generated: its rows, the model's state after them, the scores of their next tokens."""

    def __init__(self, engine: Engine, rows: list[_Row], config: SamplingConfig) -> None:
        self.engine, self.config, self.active = engine, config, rows
        self.state = self.logits_BV = self.steps_B = None
        self.device = next(engine.model.parameters()).device

    @torch.inference_mode()
    def prefill(self, mark: _Mark | None = None) -> None:
        """Feed the prompts, or (one row) what of the prompt comes after ``mark``."""
        done = 0
        if mark is None:
            self.state = self.engine.model.initial_state(len(self.active))
        else:
            done = len(mark.tokens)
            self.state, self.logits_BV, self.steps_B = mark.state, mark.logits_BV, mark.steps_B
        new = [row.prompt[done:] for row in self.active]
        longest = max(map(len, new))
        if not longest:
            return
        lengths = torch.tensor([len(ids) for ids in new], device=self.device)
        ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in new], device=self.device)
        self._forward(ids_BT, lengths)

    @torch.inference_mode()
    def step(self) -> None:
        """Draw a token for every row, drop the rows that finish, feed the others."""
        rows = self.active
        tokens = next_tokens(self.logits_BV, rows, self.config)
        ids_B = torch.tensor(tokens, device=self.device)
        steps = [None] * len(rows) if self.steps_B is None else self.steps_B.tolist()
        for row, token, used in zip(rows, tokens, steps, strict=True):
            self._take(row, token)
            if used is not None:
                row.steps.append(used)
        alive = [i for i, row in enumerate(rows) if row.finish is None]
        self.active = [rows[i] for i in alive]
        if not alive:
            return
        if len(alive) < len(rows):
            index = torch.tensor(alive, device=self.device)
            self.state, ids_B = self.state.rows(index), ids_B[index]
        self._forward(ids_B[:, None])

    def _forward(self, ids_BT: Tensor, lengths_B: Tensor | None = None) -> None:
        ragged = lengths_B is not None and bool((lengths_B != ids_BT.shape[1]).any())
        with evaluating(self.engine.model):
            out = self.engine.model(ids_BT, self.state, lengths_B if ragged else None)
        last = lengths_B - 1 if ragged else -1
        row = torch.arange(ids_BT.shape[0], device=self.device)
        self.state, self.logits_BV = out.state, out.logits[row, last]
        self.steps_B = None if out.steps is None else out.steps[row, last]

    def _take(self, row: _Row, token: int) -> None:
        row.tokens.append(token)
        limit = self.engine.context_limit
        if token in self.engine.end_ids or row.speech.push(token):
            row.finish = "stop"
        elif len(row.tokens) >= self.config.max_tokens:
            row.finish = "length"
        elif limit and len(row.prompt) + len(row.tokens) >= limit:
            row.finish = "context"
        if row.finish and row.speech.close():
            row.finish = "stop"


class Session:
    """A conversation that is prefilled once.

    Each turn is given as the whole conversation so far; what the model has already read is not read again. The
    result equals starting afresh, also where the caller rewrote the past: then only the common beginning is kept.

    Attributes:
        last: the finished continuation of the last turn, ``None`` while it runs.
        prefilled: prompt tokens that the last turn had to read.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.last: Generation | None = None
        self.prefilled = 0
        self._marks: list[_Mark] = []

    def stream(self, conversation: Prompt, config: SamplingConfig = GREEDY) -> Iterator[str]:
        """Continue the conversation, giving the answer in pieces. Arguments and errors as :meth:`Engine.stream`."""
        return answers(self.speak(conversation, config))

    def speak(self, conversation: Prompt, config: SamplingConfig = GREEDY) -> Iterator[Said]:
        """Continue the conversation, giving thought and answer in pieces that say which of them they are.

        Arguments and errors as :meth:`Engine.stream`.
        """
        (ids,) = self.engine.encode([conversation])
        speech = self.engine.speech(ids, config, self.engine.context_limit)
        return self._pieces(_Row(ids, row_generator(config.seed, 0), speech), config)

    def _pieces(self, row: _Row, config: SamplingConfig) -> Iterator[Said]:
        self.last = None
        known = [mark for mark in self._marks if row.prompt[: len(mark.tokens)] == mark.tokens]
        mark = max(known, key=lambda m: len(m.tokens), default=None)
        decoding = _Decoding(self.engine, [row], config)
        decoding.prefill(mark)
        self.prefilled = len(row.prompt) - (len(mark.tokens) if mark else 0)
        read = self._mark(decoding, row)
        self._marks = [read]
        while decoding.active:
            decoding.step()
            # After the prompt and after the answer: a template may rewrite the answer, hardly the question.
            self._marks = [read, self._mark(decoding, row)]
            yield from row.speech.take()
        self.last = row.result()

    @staticmethod
    def _mark(decoding: _Decoding, row: _Row) -> _Mark:
        """The last token of a finished row was drawn but never fed."""
        fed = row.prompt + (row.tokens[:-1] if row.finish else row.tokens)
        return _Mark(fed, decoding.state, decoding.logits_BV, decoding.steps_B)
