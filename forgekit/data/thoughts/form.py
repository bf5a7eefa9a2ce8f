"""What a thought looks like: ``<think>`` MARKER text MARKER text ... ``</think>``, then the answer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from forgekit.data.tokenizer import THINKING
from forgekit.errors import DataError

OPEN, CLOSE = THINKING[:2]
MARKERS = THINKING[2:]
STEP, REASON, MECE, FALSIFY, EXPERT, DOUBT = MARKERS
_MARKER = re.compile("|".join(map(re.escape, MARKERS)))
_ANY = re.compile("|".join(map(re.escape, THINKING)))


@dataclass(frozen=True)
class Segment:
    """One marked piece of a thought.

    Attributes:
        marker: one of :data:`MARKERS`.
        text: what is said; never empty, without markers.
        slip: a deliberate mistake that the next segment mends; it is shown in training and never learned.
    """

    marker: str
    text: str
    slip: bool = False

    def __post_init__(self) -> None:
        if self.marker not in MARKERS or not self.text.strip() or _ANY.search(self.text):
            remedy = f"start with one of {' '.join(MARKERS)} and say something without markers"
            raise DataError(f"{self.marker}{self.text} is no segment", where="thought", remedy=remedy)


@dataclass(frozen=True)
class Thought:
    """Segments in their order; written out by ``str``."""

    segments: tuple[Segment, ...]

    def __str__(self) -> str:
        return f"{OPEN}{''.join(s.marker + s.text for s in self.segments)}{CLOSE}"


def parse(text: str) -> Thought | None:
    """The thought that a text is, ``None`` where it is not one: unclosed, empty, or beginning without a marker."""
    if not (text.startswith(OPEN) and text.endswith(CLOSE)):
        return None
    inside = text[len(OPEN) : len(text) - len(CLOSE)]
    markers = _MARKER.findall(inside)
    before, *texts = _MARKER.split(inside)
    if before or not texts or any(not piece.strip() or OPEN in piece or CLOSE in piece for piece in texts):
        return None
    return Thought(tuple(map(Segment, markers, texts)))
