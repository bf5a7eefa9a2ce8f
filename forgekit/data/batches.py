"""Training batches: real text and gym problems, packed, and a pure function of (seed, step).

Because batch ``i`` depends on nothing but the seed and ``i``, the position in the data is one integer: resuming,
skipping and sharding over processes need no other state. Tokenising happens once, before training; a batch
is then a few array copies.

Shapes: B rows, T tokens per row.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from forgekit.data.tokenizer import END, PAD, chat_text, in_pieces
from forgekit.errors import DataError
from forgekit.models.constants import IGNORE


@dataclass(frozen=True)
class Batch:
    """One batch: inputs (B, T) and already shifted labels (B, T), ``IGNORE`` where nothing is supervised."""

    inputs: np.ndarray
    labels: np.ndarray

    @property
    def supervised(self) -> int:
        """Tokens that carry a label."""
        return int((self.labels != IGNORE).sum())


def end_token(tokenizer) -> tuple[str, int]:
    """Text and id of the token that ends a text, in the house's tokenizer or a Hugging Face one.

    Raises:
        DataError: it has none.
    """
    end = tokenizer.fast.eos_token if hasattr(tokenizer, "fast") else END
    index = None if end is None else tokenizer.token_to_id(end)
    if index is None:
        raise DataError("has no token that ends a text", where="tokenizer", remedy="set its eos_token")
    return end, index


def asked(tokenizer, prompt: str) -> str:
    """A question as the model reads it: in the house's chat format, in its own, or as plain text where it has none."""
    return told(tokenizer, prompt, "")


def told(tokenizer, prompt: str, system: str) -> str:
    """As :func:`asked`, after a system message where there is one."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": prompt})
    if not hasattr(tokenizer, "chat_text"):
        return chat_text(messages, generate=True)
    return tokenizer.chat_text(messages) or "\n\n".join(m["content"] for m in messages) + "\n\n"


def encode_texts(tokenizer, texts: Iterable[str]) -> np.ndarray:
    """All texts as one array of token ids, each closed by the end token; raises as :func:`end_token`."""
    _, end = end_token(tokenizer)
    parts: list[np.ndarray] = []
    pieces = [piece for text in texts for piece in (*in_pieces(text), None)]
    encoded = iter(tokenizer.encode_batch([p for p in pieces if p is not None], add_special_tokens=False))
    for piece in pieces:
        parts.append(np.array([end] if piece is None else next(encoded).ids, dtype=np.int32))
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int32)


class TextSource:
    """Random windows of a token stream.

    Args:
        tokens: the stream.
        supervised: share of the tokens that carry a label, drawn anew for every window. A row of text has a label at
            every token where a row of problems has few; supervising a share keeps text from drowning them.
    """

    def __init__(self, tokens: np.ndarray, supervised: float = 1.0) -> None:
        self.tokens, self.supervised = tokens, supervised

    def rows(self, rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """``rows`` windows of ``length`` inputs and their next tokens."""
        if len(self.tokens) <= length:
            raise DataError(
                f"{len(self.tokens)} tokens are fewer than one row of {length}", where="text", remedy="give more text"
            )
        start = rng.integers(0, len(self.tokens) - length, size=rows)
        window = self.tokens[start[:, None] + np.arange(length + 1)]
        labels = window[:, 1:]
        if self.supervised < 1:
            labels = np.where(rng.random(labels.shape) < self.supervised, labels, IGNORE)
        return window[:, :-1], labels


class PackedSource:
    """Prompts with their answers, packed into rows; prompts are not supervised (they are random and teach nothing).

    Args:
        tokenizer: whose ids they are.
        prompts, answers: token ids of each item.
        learned: for every token of every answer, whether it is supervised; all of them unless given.
    """

    def __init__(self, tokenizer, prompts: list, answers: list, learned: list | None = None) -> None:
        pad = tokenizer.token_to_id(PAD)
        self.pad = end_token(tokenizer)[1] if pad is None else pad  # padding is never scored: any token will do
        self.prompt_size = np.array([len(ids) for ids in prompts])
        self.answer_size = np.array([len(ids) for ids in answers])
        self.size = self.prompt_size + self.answer_size
        self.start = np.concatenate([[0], np.cumsum(self.size)[:-1]])
        self.tokens = np.array([t for pair in zip(prompts, answers) for ids in pair for t in ids], dtype=np.int32)
        learned = learned or [[True] * len(ids) for ids in answers]
        flags = [flag for ids, own in zip(prompts, learned) for flag in ([False] * len(ids), own)]
        self.labels = np.where([f for part in flags for f in part], self.tokens, IGNORE).astype(np.int32)

    def rows(self, rng: np.random.Generator, rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Fill ``rows`` rows of ``length`` with whole items drawn at random."""
        fits = np.flatnonzero(self.size <= length + 1)
        if not len(fits):
            raise DataError(f"no problem fits {length} tokens", where="gym", remedy="raise the context or lower levels")
        line = np.full((rows, length + 1), self.pad, dtype=np.int32)
        target = np.full((rows, length + 1), IGNORE, dtype=np.int32)
        draws = iter(fits[rng.integers(0, len(fits), size=1 + rows * (1 + (length + 1) // int(self.size[fits].min())))])
        i = next(draws)
        for row in range(rows):
            at = 0
            while at + self.size[i] <= length + 1:
                start, size = self.start[i], self.size[i]
                line[row, at : at + size] = self.tokens[start : start + size]
                target[row, at : at + size] = self.labels[start : start + size]
                at += size
                i = next(draws)  # what does not fit here opens the next row: long problems are not passed over
        return line[:, :-1], target[:, 1:]


class ProblemSource(PackedSource):
    """Gym problems packed into rows.

    Args:
        tokenizer: whose ids they are.
        problems: what is asked and answered.
        systems: a system message before each of them, "" for none; none at all unless given.
    """

    def __init__(self, tokenizer, problems: list, systems: list[str] | None = None) -> None:
        if not problems:
            raise DataError("no problems", where="gym", remedy="give at least one family and level")
        end, _ = end_token(tokenizer)
        pairs = zip(problems, systems or [""] * len(problems), strict=True)
        prompts = tokenizer.encode_batch([told(tokenizer, p.prompt, s) for p, s in pairs], add_special_tokens=False)
        answers = tokenizer.encode_batch([p.answer + end for p in problems], add_special_tokens=False)
        super().__init__(tokenizer, [q.ids for q in prompts], [a.ids for a in answers])


@dataclass(frozen=True)
class Mixture:
    """Sources with their share of each batch's rows.

    Attributes:
        sources: (source, share) pairs; shares are normalised.
        rows: rows per batch.
        length: tokens per row.
        seed: with the step number, decides every draw.
    """

    sources: tuple[tuple[TextSource | PackedSource, float], ...]
    rows: int
    length: int
    seed: int

    def batch(self, step: int) -> Batch:
        """Batch number ``step``."""
        rng = np.random.default_rng([self.seed, step])
        parts = [s.rows(rng, n, self.length) for (s, _), n in zip(self.sources, self._counts()) if n]
        inputs, labels = (np.concatenate(column).astype(np.int64) for column in zip(*parts))
        return Batch(inputs, labels)

    def _counts(self) -> list[int]:
        """Rows per source: largest remainders, so that they sum to ``rows``."""
        total = sum(share for _, share in self.sources)
        exact = [self.rows * share / total for _, share in self.sources]
        counts = [int(x) for x in exact]
        for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: self.rows - sum(counts)]:
            counts[i] += 1
        return counts
