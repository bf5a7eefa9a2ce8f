"""Continuous batching: requests join and leave a running batch at any token.

:class:`Batch` is the batch itself and knows no threads. One turn reads a piece of the prompts that are new (several
at once, ragged; a long prompt in pieces, so that it does not hold the others up) and then draws one token for every
running row, all rows in one forward pass. :class:`Batcher` runs it in a thread of its own behind a bounded queue.

A request gets the same tokens alone and in any company: it has its own settings, random numbers and text, padding is
masked, and nothing is mixed between rows. What remains is rounding: a product of 32 rows may round unlike that of
one, so two tokens whose scores agree up to rounding may change places. ``together=False`` runs every row by itself,
which costs the speed of batching and leaves no difference at all.

Hugging Face models with ordinary caches (keys and values, whole or sliding) are batched the same way, but their
prompts are read one at a time. Models with any other cache (recurrent, hybrid, quantised) run row by row.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from queue import Empty, SimpleQueue
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from forgekit.config import Config
from forgekit.errors import ForgeError, ResourceError
from forgekit.infer.engine import Engine, Finish, Generation, evaluating, finished, next_tokens
from forgekit.infer.sampling import GREEDY, SamplingConfig, row_generator
from forgekit.infer.states import join_states, joinable, take_rows
from forgekit.infer.thinking import Speech

_log = logging.getLogger(__name__)

SMALLEST_SHARE = 32
"""Fewer tokens of a prompt than this are not worth a row of the pass that reads it."""
FAILURES = (RuntimeError, MemoryError, ValueError, LookupError)
"""What a forward pass may raise (out of memory, above all) without the batch being lost for the next requests."""


class QueueFull(ResourceError):
    """Every place is taken, also those to wait in."""


class Expired(ResourceError):
    """A request took longer than its limit."""


class Closed(ResourceError):
    """The batcher is shutting down, or its model has failed for good."""


class Cancelled(ForgeError):
    """The request was given up by who made it."""


class ModelFailure(ForgeError):
    """The model raised an error, or its scores are not numbers."""


class ContextExceeded(ForgeError):
    """A prompt is longer than the context."""


class BatchConfig(Config):
    """How many rows run and wait, and how prompts are read."""

    max_rows: Annotated[int, Field(gt=0)] = 32
    """Rows generated at the same time."""
    max_waiting: Annotated[int, Field(ge=0)] = 64
    """Rows that may wait for a place; more are refused."""
    prefill_tokens: Annotated[int, Field(gt=0)] = 256
    """Prompt tokens read between two tokens of the running rows: more reads faster, and stalls them longer."""
    context: Annotated[int, Field(gt=0)] | None = None
    """Most tokens of prompt and answer together; default: the limit of the model, if it has one."""
    together: bool = True
    """Advance all rows in one pass; False runs each by itself, bit for bit independent of its company."""


@dataclass(frozen=True)
class Request:
    """One continuation to be made.

    Attributes:
        prompt: token ids, or a text.
        config: sampling and stopping.
        place: which of several continuations of one prompt this is; each draws its own numbers.
        logprobs: report the log-probability of each token of the answer and this many of the likeliest; ``None``
            reports nothing.
    """

    prompt: str | list[int]
    config: SamplingConfig = GREEDY
    place: int = 0
    logprobs: int | None = None


@dataclass(frozen=True)
class Score:
    """How likely a drawn token was by the model alone: before penalty, temperature and filters.

    Attributes:
        token: its id.
        logprob: natural logarithm of its probability.
        top: the likeliest tokens and their logarithms, likeliest first.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Piece:
    """News of one row.

    Attributes:
        row: its place in the submitted requests.
        text: what was added to the answer; the pieces joined are the answer.
        scores: of the answer's tokens since the last piece, if they were asked for.
        result: the finished continuation, in the row's last piece only.
        thought: what was added to the thought before the answer.
    """

    row: int
    text: str
    scores: tuple[Score, ...] = ()
    result: Generation | None = None
    thought: str = ""

    def __add__(self, later: Piece) -> Piece:
        scores, thought = self.scores + later.scores, self.thought + later.thought
        return Piece(self.row, self.text + later.text, scores, later.result, thought)


class Job:
    """A submitted request: its pieces come out here, for one reader.

    Args:
        rows: continuations it consists of.
        limit: seconds until it expires; ``None`` never.
        stream: give pieces as they come, else only the finished continuations.
    """

    def __init__(self, rows: int, limit: float | None = None, stream: bool = True) -> None:
        self.stream = stream
        self.expires = math.inf if limit is None else time.monotonic() + limit
        self.ended = False
        """Given up, expired or failed: its rows leave the batch at the next turn."""
        self._news: SimpleQueue[Piece | ForgeError] = SimpleQueue()
        self._open = rows

    @property
    def done(self) -> bool:
        """Whether every row's last piece has been read."""
        return self._open == 0

    def next(self, timeout: float | None = None) -> list[Piece]:
        """What is new, at most one piece a row; waits for it up to ``timeout`` seconds, then gives an empty list.

        Raises:
            ForgeError: the request ended without a result: expired, cancelled, closed or failed.
        """
        pieces: dict[int, Piece] = {}
        try:
            news = self._news.get(timeout=timeout)
            while True:
                if isinstance(news, ForgeError):
                    raise news
                pieces[news.row] = pieces[news.row] + news if news.row in pieces else news
                self._open -= news.result is not None
                news = self._news.get_nowait()
        except Empty:
            return list(pieces.values())

    def __iter__(self) -> Iterator[Piece]:
        while not self.done:
            yield from self.next()

    def results(self) -> list[Generation]:
        """The finished continuations in the order they were submitted. Raises as :meth:`next`."""
        finished = {piece.row: piece.result for piece in self if piece.result is not None}
        return [finished[row] for row in sorted(finished)]

    def cancel(self) -> None:
        """Give the request up and free its places; nothing happens where it is done."""
        self.fail(Cancelled("the request was cancelled"))

    def put(self, piece: Piece) -> None:
        """Hand a piece to the reader."""
        self._news.put(piece)

    def fail(self, error: ForgeError) -> None:
        """End the request with an error, once."""
        if not self.ended:
            self.ended = True
            self._news.put(error)


# ---- the batch


@dataclass(eq=False)
class Row:
    """One continuation in the making."""

    number: int
    job: Job
    request: Request
    prompt: list[int]
    speech: Speech
    generator: torch.Generator
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    read: int = 0
    state: Any = None
    finish: Finish | None = None
    gone: bool = False

    @property
    def settings(self) -> tuple[float, ...]:
        """What decides how a token is drawn: rows that agree in it are drawn together."""
        c = self.request.config
        return (c.temperature, c.top_k, c.top_p, c.min_p, c.repetition_penalty)

    def tell(self) -> None:
        """Hand what is new to the reader."""
        if self.finish is None and not self.job.stream:
            return
        new = self.speech.take()
        if new or self.finish is not None:
            text, thought = ("".join(said.text for said in new if said.thought is which) for which in (False, True))
            result = finished(self, self.finish) if self.finish else None
            self.job.put(Piece(self.number, text, tuple(self.scores), result, thought))
            self.scores.clear()


@dataclass
class _Group:
    """Rows that advance in one pass, the state after them and the scores of their next tokens."""

    rows: list[Row]
    state: Any
    logits_BV: Tensor
    steps_B: Tensor | None

    def keep(self, places: list[int]) -> _Group:
        """The group of these rows only."""
        if len(places) == len(self.rows):
            return self
        index = torch.tensor(places, device=self.logits_BV.device)
        steps_B = None if self.steps_B is None else self.steps_B[index]
        return _Group([self.rows[i] for i in places], take_rows(self.state, index), self.logits_BV[index], steps_B)


def _joined(groups: list[_Group]) -> _Group:
    rows = [row for group in groups for row in group.rows]
    parts = ([getattr(g, name) for g in groups] for name in ("state", "logits_BV", "steps_B"))
    return _Group(rows, *map(join_states, parts))


class Batch:
    """Rows being read and rows being generated. Not for several threads.

    Args:
        engine: model and tokenizer; the model must be in eval mode.
        config: how much is done in one turn.
        left: called with every row that leaves, finished or not.
    """

    def __init__(self, engine: Engine, config: BatchConfig, left: Callable[[Row], None] = lambda row: None) -> None:
        self.engine, self.config, self._left = engine, config, left
        self.device = next(engine.model.parameters()).device
        self.context = min((n for n in (config.context, engine.context_limit) if n), default=None)
        empty = engine.model.initial_state(1)
        can_join, theirs = joinable(empty), hasattr(empty, "cache")
        self.together = config.together and can_join
        # Ragged prompts make the wrapper of Hugging Face models read everything anew, so they are read singly.
        singly = theirs or not self.together
        self._readers = 1 if singly else max(1, config.prefill_tokens // SMALLEST_SHARE)
        self._budget = None if theirs and not can_join else config.prefill_tokens
        self._reading: deque[Row] = deque()
        self._running: list[_Group] = []

    @property
    def rows(self) -> list[Row]:
        """Every row that has not left."""
        return [row for row in (*self._reading, *(r for g in self._running for r in g.rows)) if not row.gone]

    def add(self, row: Row) -> None:
        """Let a row in; its prompt is read from the next turn on."""
        row.state = self.engine.model.initial_state(1)
        self._reading.append(row)

    @torch.inference_mode()
    def turn(self) -> None:
        """Drop rows whose job has ended, read a piece of the new prompts, draw one token for every running row."""
        self._reading = deque(row for row in self._reading if self._stays(row))
        self._read()
        self._running = [after for group in self._running if (after := self._advance(group)) is not None]

    def clear(self) -> None:
        """Every row leaves."""
        for row in self.rows:
            self._leave(row)
        self._reading.clear()
        self._running.clear()

    def _stays(self, row: Row) -> bool:
        """Whether the row's job still wants it; a row that is not wanted leaves."""
        if row.job.ended:
            self._leave(row)
        return not row.gone

    def _leave(self, row: Row) -> None:
        """Once for every row: a forward pass may fail when some rows of its turn have left already."""
        if not row.gone:
            row.gone = True
            self._left(row)

    def _read(self) -> None:
        """One piece of the oldest prompts that are not read yet; who is not through goes to the end of the line."""
        rows = list(islice(self._reading, self._readers))
        if not rows:
            return
        share = self._budget // len(rows) if self._budget else max(len(row.prompt) for row in rows)
        pieces = [row.prompt[row.read : row.read + max(1, share)] for row in rows]
        longest, lengths = max(map(len, pieces)), [len(piece) for piece in pieces]
        ids_BT = torch.tensor([piece + [0] * (longest - len(piece)) for piece in pieces], device=self.device)
        lengths_B = None if min(lengths) == longest else torch.tensor(lengths, device=self.device)
        group = self._forward(rows, join_states([row.state for row in rows]), ids_BT, lengths_B)
        through = [i for i, row in enumerate(rows) if row.read + lengths[i] == len(row.prompt)]
        states = [None if i in through else group.keep([i]).state for i in range(len(rows))]
        running = [*self._running, group.keep(through)] if through else self._running
        if self.together and len(running) > 1:
            running = [_joined(running)]
        # Only now, when nothing can fail any more, do rows change places: none may get lost between them.
        self._running = running
        for row, length, state in zip(rows, lengths, states, strict=True):
            self._reading.popleft()
            row.read, row.state = row.read + length, state
            if state is not None:
                self._reading.append(row)

    def _forward(self, rows: list[Row], state: Any, ids_BT: Tensor, lengths_B: Tensor | None = None) -> _Group:
        out = self.engine.model(ids_BT, state, lengths_B)
        row, last = torch.arange(len(rows), device=self.device), -1 if lengths_B is None else lengths_B - 1
        return _Group(rows, out.state, out.logits[row, last], None if out.steps is None else out.steps[row, last])

    def _advance(self, group: _Group) -> _Group | None:
        """Draw a token for every row, drop the rows that finish, feed the others; ``None`` when none is left."""
        for row in _without_numbers(group):
            row.job.fail(ModelFailure("the scores are not numbers", remedy="check the model's weights for NaN"))
        wanted = [i for i, row in enumerate(group.rows) if self._stays(row)]
        if not wanted:
            return None
        group = group.keep(wanted)
        tokens = self._draw(group)
        ids_B = torch.tensor(tokens, device=self.device)
        scores = self._scores(group, ids_B)
        steps = [None] * len(group.rows) if group.steps_B is None else group.steps_B.tolist()
        for row, token, used, score in zip(group.rows, tokens, steps, scores, strict=True):
            row.steps += [] if used is None else [used]
            self._take(row, token, score)
        alive = [i for i, row in enumerate(group.rows) if not row.gone]
        if not alive:
            return None
        group, ids_B = group.keep(alive), ids_B[torch.tensor(alive, device=self.device)]
        return self._forward(group.rows, group.state, ids_B[:, None])

    def _draw(self, group: _Group) -> list[int]:
        """The next token of every row, by its own settings."""
        alike: dict[tuple[float, ...], list[int]] = {}
        for i, row in enumerate(group.rows):
            alike.setdefault(row.settings, []).append(i)
        tokens = [0] * len(group.rows)
        for places in alike.values():
            rows, index = [group.rows[i] for i in places], torch.tensor(places, device=self.device)
            drawn = next_tokens(group.logits_BV[index], rows, rows[0].request.config)
            for place, token in zip(places, drawn, strict=True):
                tokens[place] = token
        return tokens

    def _scores(self, group: _Group, ids_B: Tensor) -> list[Score | None]:
        """What each row's job wants to know about its token."""
        scores: list[Score | None] = [None] * len(group.rows)
        wanted = [i for i, row in enumerate(group.rows) if row.request.logprobs is not None]
        if not wanted:
            return scores
        index = torch.tensor(wanted, device=self.device)
        logp_BV = group.logits_BV[index].float().log_softmax(-1)
        chosen = logp_BV.gather(1, ids_B[index, None]).squeeze(1).tolist()
        most = max(group.rows[i].request.logprobs for i in wanted)
        values, tokens = (x.tolist() for x in logp_BV.topk(min(most, logp_BV.shape[1])))
        for b, i in enumerate(wanted):
            top = list(zip(tokens[b], values[b]))[: group.rows[i].request.logprobs]
            scores[i] = Score(int(ids_B[i]), chosen[b], tuple(top))
        return scores

    def _take(self, row: Row, token: int, score: Score | None) -> None:
        """Add a token to a row and see whether that ends it, as :class:`Engine` does."""
        row.tokens.append(token)
        if token in self.engine.end_ids:
            row.finish = "stop"
        else:
            thought = row.speech.thinking_tokens
            stopped = row.speech.push(token)
            # Scores go with the answer: what was thought is told apart from it and not scored.
            row.scores += [score] if score is not None and row.speech.thinking_tokens == thought else []
            if stopped:
                row.finish = "stop"
            elif len(row.tokens) >= row.request.config.max_tokens:
                row.finish = "length"
            elif self.context and len(row.prompt) + len(row.tokens) >= self.context:
                row.finish = "context"
        if row.finish and row.speech.close():
            row.finish = "stop"
        row.tell()
        if row.finish:
            self._leave(row)


def _without_numbers(group: _Group) -> list[Row]:
    broken = ~group.logits_BV.amax(-1).isfinite()
    return [group.rows[i] for i in broken.nonzero().flatten().tolist()] if broken.any() else []


# ---- the thread


class Batcher:
    """Runs a :class:`Batch` in a thread of its own. Use it as a context manager, or close it.

    Args:
        engine: model and tokenizer. The model stays in eval mode until the batcher is closed.
        config: places, waiting room, reading speed, context.
    """

    def __init__(self, engine: Engine, config: BatchConfig | None = None) -> None:
        self.engine, self.config = engine, config or BatchConfig()
        self._batch = Batch(engine, self.config, self._free)
        self.context = self._batch.context
        self._changed = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._inside = 0
        """Rows that wait, are read or run."""
        self._closing = self._stopping = False
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], limit: float | None = None, stream: bool = True) -> Job:
        """Ask for continuations, all or none of them.

        Args:
            requests: what to continue.
            limit: seconds for all of them together, waiting included.
            stream: give pieces as they come, else only the finished continuations.

        Raises:
            ContextExceeded: a prompt is longer than the context.
            NoThoughts: thoughts are wanted of a tokenizer that has no tokens for them.
            ForgeError: a prompt is empty or outside the vocabulary.
            QueueFull: no place to wait.
            Closed: shutting down.
        """
        job = Job(len(requests), limit, stream)
        prompts = self._encoded(requests)
        rows = [self._row(i, job, *pair) for i, pair in enumerate(zip(requests, prompts, strict=True))]
        with self._changed:
            if self._closing:
                raise Closed("shutting down", remedy="ask again later")
            places = self.config.max_rows + self.config.max_waiting
            if self._inside + len(rows) > places:
                raise QueueFull(f"all {places} places are taken", where="queue", remedy="ask again later")
            self._inside += len(rows)
            self._waiting.extend(rows)
            self._changed.notify_all()
        return job

    def load(self) -> dict[str, int]:
        """How many rows there are, and how many of them still wait for a place."""
        with self._changed:
            return {"rows": self._inside, "waiting": len(self._waiting)}

    @property
    def closing(self) -> bool:
        """Whether nothing new is taken any more."""
        return self._closing

    def close(self, grace: float = 0.0) -> None:
        """Take nothing new, let what runs go on for ``grace`` seconds, then end the rest with :class:`Closed`."""
        with self._changed:
            self._closing = True
            self._changed.wait_for(lambda: not self._inside, timeout=grace)
            self._stopping = True
            self._changed.notify_all()
        self._thread.join()

    def __enter__(self) -> Batcher:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _encoded(self, requests: Sequence[Request]) -> list[list[int]]:
        encode = self.engine.tokenizer.encode
        prompts = [encode(r.prompt).ids if isinstance(r.prompt, str) else r.prompt for r in requests]
        for i, ids in enumerate(prompts):
            if self.context and len(ids) > self.context:
                raise ContextExceeded(
                    f"{len(ids)} tokens, the context is {self.context}", where=f"prompt {i}", remedy="shorten it"
                )
        return self.engine.encode(prompts)

    def _row(self, number: int, job: Job, request: Request, prompt: list[int]) -> Row:
        generator = row_generator(request.config.seed, request.place)
        return Row(number, job, request, prompt, self.engine.speech(prompt, request.config, self.context), generator)

    def _free(self, row: Row) -> None:
        with self._changed:
            self._inside -= 1
            self._changed.notify_all()

    def _run(self) -> None:
        try:
            with evaluating(self.engine.model):
                while self._wait_for_work():
                    self._turn()
        except BaseException:
            _log.exception("the batcher stops")
            raise
        finally:
            self._end_all()

    def _wait_for_work(self) -> bool:
        """Sleep until there is something to do, let rows in while there is room; False when it is time to stop."""
        with self._changed:
            self._changed.wait_for(lambda: self._inside or self._stopping)
            now = time.monotonic()
            for row in (*self._waiting, *self._batch.rows):
                if now >= row.job.expires:
                    row.job.fail(Expired("took longer than its limit", where="time", remedy="ask for fewer tokens"))
            for row in [row for row in self._waiting if row.job.ended]:
                self._waiting.remove(row)
                self._free(row)
            while self._waiting and len(self._batch.rows) < self.config.max_rows:
                self._batch.add(self._waiting.popleft())
            return not self._stopping

    def _turn(self) -> None:
        """One turn; an error of the model ends the requests in the batch and nothing else."""
        try:
            self._batch.turn()
        except FAILURES as error:
            _log.exception("a forward pass failed")
            reason = next(iter(str(error).splitlines()), "")[:200]
            for row in self._batch.rows:
                row.job.fail(ModelFailure(f"{type(error).__name__}: {reason}", where="model"))
            self._batch.clear()

    def _end_all(self) -> None:
        with self._changed:
            self._closing = True
            for row in (*self._waiting, *self._batch.rows):
                row.job.fail(Closed("shutting down", remedy="ask again later"))
            for row in self._waiting:
                self._free(row)
            self._waiting.clear()
            self._batch.clear()
