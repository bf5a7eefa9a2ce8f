"""How coherent a thought is: does it fit its question, hold, belong to it, and read like the model's language?

Four scores in [0, 1], each computed from the model or from the checks of :mod:`forgekit.data.thoughts`:

- *semantic*: similarity of thought and question, each read alone. States of small models all look alike: they share a
  mean and a few directions along which everything varies. So the mean of a calibration set is taken off both sides
  (questions and thoughts have different ones), and the directions that vary most there are squeezed to the size of the
  others, before the cosine is taken.
- *logical*: share of the statements that hold, mended slips included; 0 for a thought without form. A thought in which
  nothing can be checked gets 0 where it contradicts itself, else a score for how much likelier its steps are in their
  order than in another one: steps that follow from each other have an order.
- *relevance*: how much likelier the thought is, per token, after its own question than after the most similar others.
- *fluency*: ``1 - nats / log V``, the likelihood of the thought after its question on the scale of the vocabulary.

Cosines and differences have no natural scale. Calibration measures what thoughts of *other* questions get (for the
order: what steps in any order get), and a value is told as the logistic of its distance from their mean in standard
deviations: 0.5 is a stranger, 1 is far above one. Calibrate on a split that does not report; scoring a question of the
calibration set is refused.

Shapes: N texts, D dimensions of the embedding, B rows, T tokens.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from forgekit.data.batches import asked
from forgekit.data.thoughts import CLOSE, MARKERS, OPEN, Check, check
from forgekit.data.tokenizer import THINKING
from forgekit.errors import DataError, ResourceError
from forgekit.measure.prepared import score_rows
from forgekit.measure.thought_config import CoherenceConfig
from forgekit.models.base import CausalLM
from forgekit.models.hidden import hidden

__all__ = ["Calibration", "Coherence", "CoherenceConfig", "CoherenceScorer", "OwnStates", "SentenceStates", "Stranger"]

Item = tuple[str, str]
"""A question, and a thought about it with or without its outer pair."""
Embedder = Callable[[Sequence[str]], np.ndarray]
"""Texts to their embeddings (N, D); thoughts come with their markers."""

SMALLEST_CALIBRATION = 8
"""Fewer distinct calibration questions than this tell nothing about strangers."""
FLOOR = 2.0
"""Variance, in medians over the principal directions, at which whitening begins: louder directions are brought down to
about it, quieter ones stay. On a nano model that thinks, with 16 to 200 calibration questions, 1 to 3 told own thoughts
from others of the same family and level alike, and better than dividing each dimension by its spread."""
_MARKED = re.compile(f"({'|'.join(map(re.escape, MARKERS))})")
_VALUE = re.compile(r"\s*([A-Za-z]\w*)\s*(?:=|\bis\b)\s*(-?\w+)\s*\.?\s*")


@dataclass(frozen=True)
class Coherence:
    """Scores of one thought, all in [0, 1].

    Attributes:
        semantic, logical, relevance, fluency: see the module.
        coherence: their weighted mean.
        valid: it is well formed, no false statement is left, its steps lead to the right answer where
            that can be read, and its coherence reaches the threshold.
    """

    semantic: float
    logical: float
    relevance: float
    fluency: float
    coherence: float
    valid: bool


@dataclass(frozen=True)
class Stranger:
    """What a measure gives for thoughts that belong elsewhere: mean and standard deviation."""

    mean: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Stranger:
        """Measured; a spread of nothing becomes the smallest number that can divide."""
        return cls(float(np.mean(values)), max(float(np.std(values)), 1e-6))

    def above(self, values: np.ndarray) -> np.ndarray:
        """Logistic of the distance from the mean in standard deviations: 0.5 is a stranger."""
        return 1 / (1 + np.exp(-np.clip((values - self.mean) / self.spread, -50, 50)))


@dataclass(frozen=True)
class Space:
    """Where embeddings are compared: each side off its mean, common directions of large variation squeezed.

    Attributes:
        question_centre, thought_centre: (D,) means of the calibration set.
        axes_RD: its principal directions, of length 1.
        squeeze_R: factor for each of them; what is perpendicular to all keeps its length.
    """

    question_centre: np.ndarray
    thought_centre: np.ndarray
    axes_RD: np.ndarray
    squeeze_R: np.ndarray

    @classmethod
    def of(cls, questions_ND: np.ndarray, thoughts_ND: np.ndarray) -> Space:
        """Whitening by the covariance of both sides together, softened by :data:`FLOOR`."""
        centres = questions_ND.mean(0), thoughts_ND.mean(0)
        both = np.concatenate([questions_ND - centres[0], thoughts_ND - centres[1]])
        _, size_R, axes_RD = np.linalg.svd(both, full_matrices=False)
        variance_R = size_R**2 / len(both)
        there = variance_R > 1e-9 * variance_R.max()
        floor = FLOOR * np.median(variance_R[there]) if there.any() else 1.0
        squeeze_R = np.sqrt(floor / (variance_R + floor))
        return cls(*centres, axes_RD, squeeze_R)

    def questions(self, raw_ND: np.ndarray) -> np.ndarray:
        """Embeddings (N, D) of questions, of length 1."""
        return self._unit(raw_ND - self.question_centre)

    def thoughts(self, raw_ND: np.ndarray) -> np.ndarray:
        """Embeddings (N, D) of thoughts, of length 1."""
        return self._unit(raw_ND - self.thought_centre)

    def _unit(self, x_ND: np.ndarray) -> np.ndarray:
        x_ND = x_ND + (x_ND @ self.axes_RD.T * (self.squeeze_R - 1)) @ self.axes_RD
        return x_ND / np.maximum(np.linalg.norm(x_ND, axis=1, keepdims=True), 1e-12)


@dataclass(frozen=True)
class Calibration:
    """What was measured on the calibration set.

    Attributes:
        questions: its distinct questions.
        space: where their embeddings are compared.
        vectors_ND: the questions there.
        semantic, relevance: what thoughts of other questions get.
        order: what steps in a shuffled order get; ``None`` where no thought has two different steps.
    """

    questions: tuple[str, ...]
    space: Space
    vectors_ND: np.ndarray
    semantic: Stranger
    relevance: Stranger
    order: Stranger | None


class CoherenceScorer:
    """Scores thoughts with a model, in batches; an item's scores do not depend on what else is in the batch.

    Args:
        model: whose likelihoods, and by default whose states, are used.
        tokenizer: what came with it.
        config: weights, threshold, embedder.
        calibration: from an earlier :meth:`calibrate`; nothing can be scored without one.
        embed: an embedder of your own, instead of the one the configuration names.
        judge: checks a thought, outer pair included, against its question.

    Raises:
        ResourceError: the configured encoder cannot be loaded.
    """

    def __init__(
        self,
        model: CausalLM,
        tokenizer: Any,
        config: CoherenceConfig = CoherenceConfig(),  # noqa: B008  frozen
        *,
        calibration: Calibration | None = None,
        embed: Embedder | None = None,
        judge: Callable[[str, str], Check] = check,
    ) -> None:
        self.model, self.tokenizer, self.config, self.judge = model, tokenizer, config, judge
        self.calibration = calibration
        if embed is None:
            own, named = config.embedder == "own", (config.sentence_model, config.sentence_revision)
            embed = OwnStates(model, tokenizer) if own else SentenceStates(*named)
        self.embed = embed

    def calibrate(self, items: Sequence[Item]) -> CoherenceScorer:
        """Measure what strangers get, on thoughts of a split that does not report; returns the scorer itself.

        Raises:
            DataError: fewer than eight distinct questions, or an empty thought.
        """
        distinct = {prompt: _inside(text) for prompt, text in items}
        prompts, thoughts = list(distinct), list(distinct.values())
        if len(prompts) < SMALLEST_CALIBRATION or not all(text.strip() for text in thoughts):
            what = f"{len(prompts)} distinct questions with {sum(map(bool, thoughts))} thoughts"
            raise DataError(what, where="calibration", remedy=f"give {SMALLEST_CALIBRATION} or more, none empty")
        asked_ND, told_ND = self.embed(prompts), self.embed(thoughts)
        space = Space.of(asked_ND, told_ND)
        vectors_ND = space.questions(asked_ND)
        near = self._near(tuple(prompts), vectors_ND, vectors_ND, prompts)
        cosine_NN = vectors_ND @ space.thoughts(told_ND).T
        relevance, _ = self._relevance(prompts, [distinct[p] for p in _strangers(prompts, near)], near)
        mixed = self._order(prompts, [_mixed(text, "calibration", 1)[0] for text in thoughts])
        order = [gain for gain in mixed if gain is not None]
        self.calibration = Calibration(
            tuple(prompts),
            space,
            vectors_ND,
            Stranger.of(cosine_NN[~np.eye(len(prompts), dtype=bool)]),
            Stranger.of(relevance),
            Stranger.of(order) if len(order) > 1 else None,
        )
        return self

    def score(self, items: Sequence[Item]) -> list[Coherence]:
        """Scores of every thought.

        Raises:
            DataError: not calibrated yet, a question that was calibrated on, or a model without finite likelihoods.
        """
        known = self._calibrated([prompt for prompt, _ in items])
        results: list[Coherence | None] = [None] * len(items)
        said = [i for i, (_, text) in enumerate(items) if _inside(text).strip()]
        if said:
            prompts, thoughts = [items[i][0] for i in said], [_inside(items[i][1]) for i in said]
            vectors_ND = known.space.questions(self.embed(prompts))
            cosine = (vectors_ND * known.space.thoughts(self.embed(thoughts))).sum(1)
            near = self._near(known.questions, known.vectors_ND, vectors_ND, prompts)
            relevance, nats = self._relevance(prompts, thoughts, near)
            fluency = np.clip(1 - nats / math.log(self.model.config.vocab_size), 0, 1)
            checks = [self.judge(items[i][0], _outer(items[i][1])) for i in said]
            logical = self._logical(prompts, thoughts, checks, known)
            columns = (known.semantic.above(cosine), logical, known.relevance.above(relevance), fluency)
            for i, found, values in zip(said, checks, np.stack(columns, 1), strict=True):
                results[i] = self._joined(values, found)
        # An empty thought says nothing that could fit, hold, belong or read well.
        return [Coherence(0.0, 0.0, 0.0, 0.0, 0.0, False) if result is None else result for result in results]

    def _joined(self, values: np.ndarray, found: Check) -> Coherence:
        total = float(np.dot(values, self.config.weights))
        return Coherence(*map(float, values), total, found.sound and total >= self.config.threshold)

    def _calibrated(self, prompts: Sequence[str]) -> Calibration:
        if self.calibration is None:
            remedy = "call calibrate with thoughts of a split that does not report"
            raise DataError("is not calibrated", where="coherence", remedy=remedy)
        seen = set(self.calibration.questions)
        again = next((prompt for prompt in prompts if prompt in seen), None)
        if again is not None:
            remedy = "report on another split than the one that calibrates"
            raise DataError(f"{again[:40]!r} was calibrated on", where="coherence", remedy=remedy)
        return self.calibration

    def _near(self, known: tuple[str, ...], known_MD, vectors_ND, prompts: Sequence[str]) -> list[list[str]]:
        """For each question the most similar *other* questions of the calibration set, nearest first."""
        similar_NM = vectors_ND @ known_MD.T
        place = {prompt: i for i, prompt in enumerate(known)}
        for row, prompt in enumerate(prompts):
            if prompt in place:
                similar_NM[row, place[prompt]] = -np.inf
        order_NM = np.argsort(-similar_NM, axis=1, kind="stable")[:, : self.config.others]
        return [[known[i] for i in row] for row in order_NM]

    def _relevance(self, prompts, thoughts, near) -> tuple[np.ndarray, np.ndarray]:
        """Nats per token saved by the thought's own question over the other ones, and nats after its own."""
        rows = [
            (question, thought) for own, thought, others in zip(prompts, thoughts, near) for question in (own, *others)
        ]
        nats_NK = self._nats(rows).reshape(len(prompts), -1)
        return nats_NK[:, 1:].mean(1) - nats_NK[:, 0], nats_NK[:, 0]

    def _nats(self, rows: Sequence[Item]) -> np.ndarray:
        """Mean cross-entropy per token of each thought (N,), its end included, after a question."""
        heads, tails = (
            [e.ids for e in self.tokenizer.encode_batch(texts, add_special_tokens=False)]
            for texts in (
                [asked(self.tokenizer, prompt) + OPEN for prompt, _ in rows],
                [thought + CLOSE for _, thought in rows],
            )
        )
        nats = score_rows(self.model, self.tokenizer, heads, tails).nats
        if not np.isfinite(nats).all():
            what = f"gives {int((~np.isfinite(nats)).sum())} of {len(nats)} thoughts no finite likelihood"
            raise DataError(what, where="model", remedy="use a checkpoint from before it diverged")
        return nats

    def _logical(self, prompts, thoughts, checks, known: Calibration) -> np.ndarray:
        scores = np.array([(c.true + c.mended) / c.statements if c.statements else 0.0 for c in checks])
        open_ = [i for i, c in enumerate(checks) if c.well_formed and not c.statements and not contradicts(thoughts[i])]
        gains = self._order([prompts[i] for i in open_], [thoughts[i] for i in open_])
        # One step has no order, and without calibration there is no scale: neither better nor worse than a stranger.
        for i, gain in zip(open_, gains, strict=True):
            has_scale = gain is not None and known.order is not None
            scores[i] = known.order.above(np.array(gain)) if has_scale else 0.5
        return scores

    def _order(self, prompts: Sequence[str], thoughts: Sequence[str]) -> list[float | None]:
        """Nats per token saved by each thought's order over other orders; ``None`` where it has only one."""
        others = [_mixed(text, prompt, self.config.orders) for prompt, text in zip(prompts, thoughts)]
        movable = [i for i, found in enumerate(others) if found[0] != thoughts[i]]
        if not movable:
            return [None] * len(thoughts)
        nats = self._nats([(prompts[i], text) for i in movable for text in (thoughts[i], *others[i])])
        nats_NK = nats.reshape(len(movable), -1)
        gains = dict(zip(movable, (nats_NK[:, 1:].mean(1) - nats_NK[:, 0]).tolist()))
        return [gains.get(i) for i in range(len(thoughts))]


class OwnStates:
    """Embeds texts by a model's own states: the mean over the text's tokens of the features before the head.

    Args:
        model: any model of the house or a wrapped Hugging Face one.
        tokenizer: what came with it.
        batch_tokens: tokens read at once.
    """

    def __init__(self, model: CausalLM, tokenizer: Any, batch_tokens: int = 16384) -> None:
        self.model, self.tokenizer, self.batch_tokens = model, tokenizer, batch_tokens

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D); raises :class:`DataError` where a text has no token."""
        from forgekit.infer.engine import evaluating

        rows = [e.ids for e in self.tokenizer.encode_batch(list(texts), add_special_tokens=False)]
        if not all(rows):
            raise DataError("has no tokens", where=f"text {list(map(bool, rows)).index(False)}", remedy="leave it out")
        device, found, at = next(self.model.parameters()).device, {}, 0
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        with evaluating(self.model), torch.inference_mode():
            while at < len(order):
                widest = len(rows[order[min(len(order), at + max(1, self.batch_tokens // len(rows[order[at]]))) - 1]])
                chosen = order[at : at + max(1, self.batch_tokens // widest)]
                found |= dict(zip(chosen, self._pooled([rows[i] for i in chosen], device), strict=True))
                at += len(chosen)
        return np.stack([found[i] for i in range(len(rows))])

    def _pooled(self, rows: list[list[int]], device: torch.device) -> np.ndarray:
        longest = max(map(len, rows))
        ids_BT = torch.tensor([ids + [0] * (longest - len(ids)) for ids in rows], device=device)
        real_BT1 = (torch.arange(longest) < torch.tensor([len(ids) for ids in rows])[:, None]).to(device)[..., None]
        h_BTD, _ = hidden(self.model, ids_BT)
        total_BD = h_BTD.double().masked_fill(~real_BT1, 0).sum(1)
        return (total_BD / real_BT1.sum(1)).cpu().numpy()


class SentenceStates:
    """Embeds texts by a sentence encoder of the ``sentence-transformers`` package, which is an optional extra.

    Args:
        name: on the Hugging Face hub, or a folder.
        revision: pinned, so that scores stay comparable.

    Raises:
        ResourceError: the package is not installed, or the encoder cannot be loaded.
    """

    def __init__(self, name: str, revision: str | None = None) -> None:
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            remedy = "run `pip install agent-forge[coherence]`, or set embedder to own"
            raise ResourceError("needs the package sentence-transformers", where="embedder", remedy=remedy) from None
        try:
            self._encoder = SentenceTransformer(name, revision=revision, trust_remote_code=False)
        except (OSError, ValueError) as error:
            what = f"{name} cannot be loaded ({str(error).splitlines()[0][:80]})"
            raise ResourceError(what, where="embedder", remedy="give a folder, or set embedder to own") from None

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """(N, D). Markers mean nothing to the encoder and become blanks."""
        plain = [_MARKED.sub(" ", text).strip() or text for text in texts]
        return np.asarray(self._encoder.encode(plain, show_progress_bar=False, convert_to_numpy=True), dtype=np.float64)


def contradicts(thought: str) -> bool:
    """Whether two pieces of a thought give one name two values (``x = 3`` and then ``x is 4``), undoubted."""
    values: dict[str, str] = {}
    for piece in _pieces(_inside(thought)):
        marker, text = piece
        match = _VALUE.fullmatch(text)
        if match is None:
            continue
        name, value = match.groups()
        # A doubt is there to take back what was said.
        if marker != THINKING[-1] and values.get(name, value) != value:
            return True
        values[name] = value
    return False


def _inside(thought: str) -> str:
    return thought.removeprefix(OPEN).removesuffix(CLOSE)


def _outer(thought: str) -> str:
    """With its outer pair; a thought that has only one end of it stays as it is, and is malformed."""
    return thought if thought.startswith(OPEN) or thought.endswith(CLOSE) else f"{OPEN}{thought}{CLOSE}"


def _pieces(inside: str) -> list[tuple[str, str]]:
    """Marker and text of every piece; what comes before the first marker has none."""
    before, *rest = _MARKED.split(inside)
    return ([("", before)] if before.strip() else []) + list(zip(rest[::2], rest[1::2]))


def _mixed(thought: str, salt: str, count: int) -> list[str]:
    """The thought with its pieces in ``count`` other orders; the thought itself where no other order differs."""
    pieces = _pieces(thought)
    if len(set(pieces)) < 2:
        return [thought] * count
    digest = hashlib.blake2b(f"{salt}\n{thought}".encode(), digest_size=8).digest()
    rng, found = np.random.default_rng(int.from_bytes(digest)), []
    while len(found) < count:
        order = rng.permutation(len(pieces))
        mixed = "".join("".join(pieces[i]) for i in order)
        if mixed != thought:
            found.append(mixed)
    return found


def _strangers(prompts: Sequence[str], near: Sequence[Sequence[str]]) -> list[str]:
    """For each question the next one that it is not compared with: its thought is a stranger's."""
    found = []
    for i, others in enumerate(near):
        following = [*prompts[i + 1 :], *prompts[:i]]
        found.append(next((other for other in following if other not in others), following[0]))
    return found
