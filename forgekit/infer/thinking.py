"""A thought before the answer: when it begins, what may be drawn in it, when it ends by force.

A thought is what stands between ``<think>`` and ``</think>``. A text has at most one, at its very beginning. Where a
row is with its thought is a value, :class:`Thinking`; its rules say which token must come next and which must not, and
change nothing else, so that a model that never thinks draws exactly what it would draw without them.

* ``on``: the first token is ``<think>``. ``off``: there is no thought. ``auto``: the model's first token decides.
  A prompt that ends inside a thought is gone on with there (``off`` ends the thought at once); to one that ends behind
  a thought ``auto`` adds no second.
* Inside, a text cannot end and no second thought begin: only ``</think>`` ends it, by force when the budget is used up.
* Before and after it neither marker can be drawn, as in Quiet-STaR (Zelikman et al., 2403.09629), which masks the
  markers of a thought wherever text is generated.

A token that must come is not drawn and uses no random number. One that must not come is drawn again without those that
must not, which gives the same distribution as excluding them from the start.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

from forgekit.data.tokenizer import ASSISTANT, THINKING
from forgekit.errors import ForgeError
from forgekit.infer.sampling import SamplingConfig
from forgekit.infer.text import TextStream

OPEN, CLOSE = THINKING[:2]
SHARE = (3, 4)
"""Part of the room for tokens that a thought may take where no budget is named: the answer needs the rest."""

Stage = Literal["before", "inside", "after"]


class NoThoughts(ForgeError):
    """Thoughts were asked for, and the tokenizer has no tokens for them."""


@dataclass(frozen=True, slots=True)
class Markers:
    """The tokens that matter to thoughts.

    Attributes:
        open: ``<think>``.
        close: ``</think>``.
        ends: tokens that end a text.
        turns: tokens behind which a prompt's earlier turns lie.
    """

    open: int
    close: int
    ends: frozenset[int] = frozenset()
    turns: frozenset[int] = frozenset()

    @classmethod
    def of(cls, tokenizer: Any, vocabulary: int, ends: frozenset[int] = frozenset()) -> Markers | None:
        """A tokenizer's markers; ``None`` if it, or the model's vocabulary, does not have both."""
        pair = [tokenizer.token_to_id(OPEN), tokenizer.token_to_id(CLOSE)]
        if None in pair or max(pair) >= vocabulary:
            return None
        return cls(*pair, ends, ends | ({tokenizer.token_to_id(ASSISTANT)} - {None}))

    def reached(self, prompt: Sequence[int]) -> Stage:
        """Where a prompt's last turn is with its thought: some chat templates begin one, or put an empty one."""
        for token in reversed(prompt):
            if token == self.open:
                return "inside"
            if token == self.close:
                return "after"
            if token in self.turns:
                break
        return "before"


@dataclass(frozen=True, slots=True)
class Thinking:
    """Where a row is with its thought. Tokens are counted from 0, the first generated one.

    Attributes:
        markers: the tokens that begin and end a thought; ``None``: there are no thoughts.
        stage: before, inside or after the thought.
        budget: tokens of the thought at most, markers not counted.
        room: tokens that can be generated at most.
        forced: whether ``<think>`` must come first.
        end: the token at which an open thought is closed by force.
        barred: tokens that must not come next.
    """

    markers: Markers | None = None
    stage: Stage = "after"
    budget: int = 0
    room: int = 0
    forced: bool = False
    end: int = 0
    barred: frozenset[int] = frozenset()

    def must(self, count: int) -> int | None:
        """The token that must come as number ``count``; ``None`` leaves it to the model."""
        if self.stage == "inside":
            return self.markers.close if count >= self.end else None
        return self.markers.open if self.forced else None

    def then(self, token: int, count: int) -> Thinking:
        """Where the row is after ``token`` came as number ``count``."""
        if self.markers is None or self.stage == "after":
            return self
        if self.stage == "before" and token == self.markers.open:
            return self.inside(count + 1)
        if self.stage == "before" or token == self.markers.close:
            both = frozenset((self.markers.open, self.markers.close))
            return replace(self, stage="after", forced=False, barred=both)
        return self

    def inside(self, count: int) -> Thinking:
        """Inside a thought whose first token would be number ``count``; two places are left for what follows it."""
        end = max(count, min(count + self.budget, self.room - 2))
        barred = self.markers.ends | {self.markers.open}
        return replace(self, stage="inside", forced=False, end=end, barred=barred)


def begin(markers: Markers | None, config: SamplingConfig, prompt: Sequence[int], room: int) -> Thinking:
    """Where a row stands before its first token.

    Args:
        markers: of the tokenizer.
        config: whether to think, and how much.
        prompt: token ids.
        room: tokens that can be generated at most.

    Raises:
        NoThoughts: they are wanted, and the tokenizer does not know them.
    """
    if markers is None:
        if config.thinking == "on":
            what = f"the tokenizer has no {OPEN} and {CLOSE}"
            raise NoThoughts(what, where="thinking", remedy="use a model that thinks, or thinking=auto")
        return Thinking()
    part, whole = SHARE
    budget = config.thinking_budget or room * part // whole
    reached, both = markers.reached(prompt), frozenset((markers.open, markers.close))
    if reached == "inside":
        return Thinking(markers, "before", 0 if config.thinking == "off" else budget, room).inside(0)
    if config.thinking == "off" or (config.thinking == "auto" and reached == "after"):
        return Thinking(markers, barred=both)
    return Thinking(markers, "before", budget, room, config.thinking == "on", barred=frozenset((markers.close,)))


class Said(NamedTuple):
    """A piece of what a model says, of its thought or of its answer."""

    text: str
    thought: bool = False


class Speech:
    """One row's text as it comes, the thought apart from the answer.

    Args:
        tokenizer: of the model.
        stops: strings that end the answer; in a thought they mean nothing.
        thinking: where the row stands before its first token.

    Attributes:
        thinking: where it stands now.
        thinking_tokens: generated tokens of the thought, its markers included.
    """

    __slots__ = ("_answer", "_count", "_thought", "barred", "thinking", "thinking_tokens")

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), thinking: Thinking | None = None) -> None:
        self._answer = TextStream(tokenizer, stops)
        self._thought = TextStream(tokenizer, reserved=True)
        self._count = self.thinking_tokens = 0
        self.thinking = thinking or Thinking()
        self.barred = self.thinking.barred

    @property
    def must(self) -> int | None:
        """The token that must come next, if one must."""
        return None if self.thinking.stage == "after" else self.thinking.must(self._count)

    def push(self, token: int) -> bool:
        """Add a token; returns whether a stop string is now complete in the answer."""
        before = self.thinking
        count, self._count = self._count, self._count + 1
        if before.stage == "after":
            return self._answer.push(token)
        now = self.thinking = before.then(token, count)
        self.barred = now.barred
        if now.stage == before.stage:
            self._thought.push(token)
        elif now.stage == "after":
            if before.stage == "before":
                return self._answer.push(token)
            self._thought.close()  # an unfinished character belongs to it, and not behind the answer
        self.thinking_tokens += 1
        return False

    def close(self) -> bool:
        """Release everything held back; returns whether that completed a stop string."""
        self._thought.close()
        return self._answer.close()

    def take(self) -> list[Said]:
        """What was released since the last call: of the thought, of the answer."""
        new = (Said(self._thought.take(), True), Said(self._answer.take()))
        return [said for said in new if said.text]

    @property
    def text(self) -> str:
        """The answer released so far."""
        return self._answer.text

    @property
    def thought(self) -> str:
        """The thought released so far: what stands between the markers, other reserved tokens by their names."""
        return self._thought.text


def answers(pieces: Iterator[Said]) -> Iterator[str]:
    """The answer's pieces only."""
    return (piece.text for piece in pieces if not piece.thought)
