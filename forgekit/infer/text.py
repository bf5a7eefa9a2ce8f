"""From a stream of tokens to text that may be shown: whole characters only, and never a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

UNFINISHED = "\ufffd"
"""What a decoder writes for bytes that are not (yet) a character."""


class TextStream:
    """Decodes one row's tokens as they come.

    The released pieces joined are the text, however the tokens were cut. Held back are bytes of an unfinished
    character and whatever might be the beginning of a stop string. Without stop strings nothing is decoded before
    somebody asks for it.

    Args:
        tokenizer: anything with ``decode(ids, skip_special_tokens)``.
        stops: strings that end the text; the one that is complete first counts.
        reserved: render reserved tokens by their names instead of leaving them out.
    """

    __slots__ = ("_anchor", "_held", "_pending", "_pieces", "_skip", "_stops", "_taken", "_tokenizer")

    def __init__(self, tokenizer: Any, stops: Sequence[str] = (), reserved: bool = False) -> None:
        self._tokenizer, self._stops, self._skip = tokenizer, stops, not reserved
        self._anchor: list[int] = []
        self._pending: list[int] = []
        self._held = ""
        self._pieces: list[str] = []
        self._taken = 0

    def push(self, token: int) -> bool:
        """Add a token; returns whether a stop string is now complete."""
        self._pending.append(token)
        return bool(self._stops) and self._advance()

    def close(self) -> bool:
        """Release everything held back; returns whether that completed a stop string."""
        new, self._pending = self._decode_pending(), []
        stopped = self._absorb(new)
        self._pieces.append(self._held)
        self._held = ""
        return stopped

    def take(self) -> str:
        """What was released since the last call."""
        self._advance()
        new, self._taken = "".join(self._pieces[self._taken :]), len(self._pieces)
        return new

    @property
    def text(self) -> str:
        """Everything released so far."""
        self._advance()
        return "".join(self._pieces)

    def _advance(self) -> bool:
        """Release what is whole; returns whether that completed a stop string."""
        new = self._decode_pending()
        if not new or new.endswith(UNFINISHED):
            return False
        self._anchor, self._pending = self._pending, []
        return self._absorb(new)

    def _decode_pending(self) -> str:
        """The pending tokens' text, decoded after their predecessors: decoders treat a beginning differently."""
        if not self._pending:
            return ""
        both = self._tokenizer.decode(self._anchor + self._pending, skip_special_tokens=self._skip)
        if not self._anchor:
            return both
        return both[len(self._tokenizer.decode(self._anchor, skip_special_tokens=self._skip)) :]

    def _absorb(self, new: str) -> bool:
        self._held += new
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self._pieces.append(self._held[: min(found)[1]])
            self._held = ""
            return True
        keep = self._possible_stop()
        self._pieces.append(self._held[: len(self._held) - keep])
        self._held = self._held[len(self._held) - keep :]
        return False

    def _possible_stop(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stops):
                return size
        return 0
