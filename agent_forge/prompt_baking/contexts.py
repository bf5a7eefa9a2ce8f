"""What stands before the answers that baking learns from: questions that have nothing to do with the prompt.

Contexts to train on, to decide on and to report on share no text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from forgekit.data.gym import FAMILIES, generate, split_of
from forgekit.data.python_corpus import library_folder, python_prose
from forgekit.errors import DataError

FEWEST = 3
GYM_LEVELS = (1, 2, 3)
PROSE_SHARE = 0.25
_PROSE_WORDS = (4, 24)


@dataclass(frozen=True)
class Contexts:
    """Contexts by use; no text is in two of them."""

    train: tuple[str, ...]
    decide: tuple[str, ...]
    report: tuple[str, ...]


def default_contexts(count: int, held_out: int, seed: int) -> Contexts:
    """Gym questions of every family at levels 1 to 3, and a quarter lines of the help topics of this Python.

    Args:
        count: contexts to train on, at most.
        held_out: contexts to decide on, and to report on, at most.
        seed: same seed, same contexts; which of the three a text belongs to does not depend on it.
    """
    prose: dict[str, list[str]] = {"train": [], "select": [], "report": []}
    for line in _lines():
        prose[split_of(line)].append(line)
    sizes = {"train": count, "select": held_out, "report": held_out}
    return Contexts(*(tuple(_mixed(split, sizes[split], prose[split], seed)) for split in prose))


def _mixed(split: str, count: int, prose: list[str], seed: int) -> list[str]:
    texts = min(round(PROSE_SHARE * count), len(prose))
    cells = [(family, level) for level in GYM_LEVELS for family in sorted(FAMILIES)]
    each = -(-(count - texts) // len(cells))
    questions = []
    for family, level in cells:
        questions += [problem.prompt for problem in generate(family, level, each, seed=seed, split=split)]
    order = random.Random(seed)
    found = list(dict.fromkeys(questions))
    order.shuffle(found)
    found = [*found[: count - texts], *order.sample(prose, texts)]
    order.shuffle(found)
    return found


def _lines() -> list[str]:
    low, high = _PROSE_WORDS
    topics = python_prose(root=library_folder() / "pydoc_data")  # the help topics: prose enough, and read at once
    lines = [line.strip() for text in topics for line in text.splitlines()]
    return list(dict.fromkeys(line for line in lines if low <= len(line.split()) <= high and line[0].isalpha()))


def divided(contexts: Sequence[str], seed: int) -> Contexts:
    """A user's contexts by use: an eighth each (at least one) to decide and to report on.

    Raises:
        DataError: fewer than three different ones.
    """
    found = list(dict.fromkeys(text for text in contexts if text.strip()))
    if len(found) < FEWEST:
        what = f"{len(found)} different contexts: to train, to decide and to report on takes {FEWEST}"
        raise DataError(what, where="contexts", remedy="give more, one a line")
    random.Random(seed).shuffle(found)
    part = max(1, len(found) // 8)
    return Contexts(tuple(found[2 * part :]), tuple(found[:part]), tuple(found[part : 2 * part]))
