"""Scores of a model: exact answers on problems, bits per byte on text.

Greedy generation reproduces an answer exactly when, reading the right answer, every next-token argmax is the
answer's own token. So one forward pass over prompt and answer tells what generation would do (a test holds it
to the engine), for all tokens at once and without generating.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from forgekit.data.batches import ProblemSource, encode_texts
from forgekit.data.gym import Problem
from forgekit.errors import DataError
from forgekit.models.base import score_at, supervised_positions
from forgekit.models.constants import IGNORE


@dataclass(frozen=True)
class ProblemScores:
    """One entry per problem, in the order given.

    Attributes:
        right: 1.0 where the greedy answer is exactly right.
        nats: mean cross-entropy per answer token.
        steps: mean recursion steps per answer token (zeros for families without adaptive computation).
        tokens: answer tokens, the end token included.
        tokens_by_steps: how many answer tokens of all problems took 0, 1, 2, ... steps.
    """

    right: np.ndarray
    nats: np.ndarray
    steps: np.ndarray
    tokens: np.ndarray
    tokens_by_steps: np.ndarray

    @property
    def accuracy(self) -> float:
        """Share of exactly right answers."""
        return float(self.right.mean())

    @property
    def mean_steps(self) -> float:
        """Recursion steps per answer token."""
        return float((self.steps * self.tokens).sum() / self.tokens.sum())


def score_problems(model, tokenizer, problems: list[Problem], batch_tokens: int = 16384) -> ProblemScores:
    """Score greedy answers and likelihoods; the model is left in the mode it was in.

    Args:
        model: satisfies :class:`forgekit.models.base.CausalLM`.
        tokenizer: its tokenizer.
        problems: at least one.
        batch_tokens: tokens scored at once; problems of similar length share a batch.
    """
    return score_source(model, ProblemSource(tokenizer, problems), batch_tokens)


def score_source(model, source: ProblemSource, batch_tokens: int = 16384) -> ProblemScores:
    """As :func:`score_problems`, on problems that are tokenized already: a search scores the same ones often."""
    device = next(model.parameters()).device
    columns = np.zeros((4, len(source.size)))
    order = np.argsort(source.size, kind="stable")
    was_training, at, taken = model.training, 0, np.zeros(1, dtype=np.int64)
    model.eval()
    with torch.inference_mode():
        while at < len(order):
            widest = int(source.size[order[at : at + max(1, batch_tokens // int(source.size[order[at]]))]].max())
            chosen = order[at : at + max(1, batch_tokens // widest)]
            columns[:, chosen], steps = _score_rows(model, source, chosen, device)
            longer, shorter = sorted((taken, np.bincount(steps)), key=len, reverse=True)
            taken = longer + np.pad(shorter, (0, len(longer) - len(shorter)))
            at += len(chosen)
    model.train(was_training)
    return ProblemScores(*columns, taken)


def _score_rows(model, source: ProblemSource, chosen: np.ndarray, device: torch.device):
    """(4, B): right, nats, steps, tokens of the chosen problems; and the steps (N,) of each answer token."""
    length = int(source.size[chosen].max())
    ids = np.full((len(chosen), length), source.pad, dtype=np.int64)
    labels = np.full((len(chosen), length), IGNORE, dtype=np.int64)
    for row, i in enumerate(chosen):
        start, size, prompt = source.start[i], source.size[i], source.prompt_size[i]
        ids[row, :size] = source.tokens[start : start + size]
        labels[row, prompt - 1 : size - 1] = source.tokens[start + prompt : start + size]
    labels_BT = torch.from_numpy(labels).to(device)
    at_N = supervised_positions(labels_BT)
    out = score_at(model, torch.from_numpy(ids).to(device), at_N)
    target_N, row_N = labels_BT.flatten()[at_N], at_N // length
    steps_N = torch.zeros_like(target_N) if out.steps is None else out.steps
    values = (
        (out.logits.argmax(-1) != target_N).double(),
        F.cross_entropy(out.logits, target_N, reduction="none").double(),
        steps_N.double(),
        torch.ones_like(target_N, dtype=torch.float64),
    )
    wrong_B, nats_B, steps_B, tokens_B = (
        torch.zeros(len(chosen), dtype=torch.float64, device=device).index_add_(0, row_N, v) for v in values
    )
    rows = ((wrong_B == 0).double(), nats_B / tokens_B, steps_B / tokens_B, tokens_B)
    return torch.stack(rows).cpu().numpy(), steps_N.cpu().numpy()


@dataclass(frozen=True)
class TextScores:
    """Windows of held-out text: ``bits`` and ``bytes`` of each, so that any share of them can be averaged."""

    bits: np.ndarray
    bytes: np.ndarray

    @property
    def per_window(self) -> np.ndarray:
        """Bits per byte of every window."""
        return self.bits / self.bytes

    @property
    def bits_per_byte(self) -> float:
        """Bits per UTF-8 byte over all windows: comparable between tokenizers."""
        return float(self.bits.sum() / self.bytes.sum())


def rows_at_once(model, length: int) -> int:
    """Rows of ``length`` tokens whose logits stay below 128 MB: a large vocabulary must not exhaust a small GPU."""
    return max(1, 2**25 // (length * model.config.vocab_size))


@dataclass(frozen=True)
class TextWindows:
    """Windows of tokenized text: ``ids`` (N, length + 1) and the UTF-8 ``bytes`` (N,) that are predicted in each."""

    ids: np.ndarray
    bytes: np.ndarray


def score_text(model, tokenizer, texts: Iterable[str], length: int, windows: int) -> TextScores:
    """Score up to ``windows`` windows of ``length`` tokens, evenly spread over the texts; each starts fresh.

    Raises:
        DataError: the texts are shorter than one window.
    """
    return score_windows(model, cut_windows(tokenizer, texts, length, windows))


def cut_windows(tokenizer, texts: Iterable[str], length: int, windows: int) -> TextWindows:
    """The windows that :func:`score_text` scores; raises as it does."""
    tokens = encode_texts(tokenizer, texts)
    count = min(windows, (len(tokens) - 1) // length)
    if count < 1:
        raise DataError(f"{len(tokens)} tokens are fewer than a window of {length}", where="text", remedy="give more")
    starts = np.linspace(0, len(tokens) - 1 - length, count).astype(int)
    ids = tokens[starts[:, None] + np.arange(length + 1)].astype(np.int64)
    if hasattr(tokenizer, "fast"):  # its vocabulary need not be one of bytes: count what the tokens say
        sizes = np.array([len(tokenizer.decode(row.tolist()).encode()) for row in ids[:, 1:]])
    else:
        sizes = byte_lengths(tokenizer)[ids[:, 1:]].sum(1)
    return TextWindows(ids, np.maximum(1, sizes).astype(float))


def score_windows(model, windows: TextWindows) -> TextScores:
    """As :func:`score_text`, on windows that are cut already."""
    count, length = len(windows.ids), windows.ids.shape[1] - 1
    device, bits = next(model.parameters()).device, []
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for chunk in np.array_split(windows.ids, math.ceil(count / rows_at_once(model, length))):
            ids, labels = (torch.from_numpy(part).to(device) for part in (chunk[:, :-1], chunk[:, 1:]))
            nats = F.cross_entropy(model(ids).logits.transpose(1, 2).float(), labels, reduction="none")
            bits.append(nats.double().sum(1).cpu().numpy() / math.log(2))
    model.train(was_training)
    return TextScores(np.concatenate(bits), windows.bytes)


def byte_lengths(tokenizer) -> np.ndarray:
    """UTF-8 bytes that each token of a byte-level vocabulary stands for; reserved tokens stand for none."""
    reserved = set(tokenizer.get_added_tokens_decoder())
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    sizes = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for token, index in vocabulary.items():
        # In a byte-level vocabulary every character of a token's name stands for exactly one byte.
        sizes[index] = 0 if index in reserved else len(token)
    return sizes
