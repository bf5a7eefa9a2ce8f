"""Data of phase 1: the trunk's text and problems, the specialists' mixes, the report sets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from agent_forge.phases.cognate.config import CognateConfig, SpecialistPlan
from forgekit.data.batches import Mixture, ProblemSource, TextSource, encode_texts
from forgekit.data.gym import Problem
from forgekit.data.problems import draw
from forgekit.data.texts import load_texts
from forgekit.data.tokenizer import chat_text, train_tokenizer
from forgekit.train.config import TrainConfig


@dataclass
class CognateData:
    """Everything the phase trains on and reports with.

    Attributes:
        tokenizer: trained on the train split of text and problems.
        train_texts, select_texts, report_texts: disjoint documents; the held-out ones share no 13 words in a row with
        the training texts.
        trunk_problems: the trunk's training problems.
        provenance: what was used, for the manifest; ``data_hash`` over all of it.
        notes: sentences for people.
    """

    tokenizer: Any
    train_texts: list[str]
    select_texts: list[str]
    report_texts: list[str]
    trunk_problems: list[Problem]
    provenance: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)

    @cached_property
    def train_tokens(self) -> np.ndarray:
        """The training texts as one stream of token ids, encoded once for all models."""
        return encode_texts(self.tokenizer, self.train_texts)

    @cached_property
    def trunk_gym(self) -> ProblemSource:
        """The trunk's problems, encoded once for all models."""
        return ProblemSource(self.tokenizer, self.trunk_problems)

    @property
    def data_hash(self) -> str:
        """SHA-256 over what is really trained and reported on: texts, problems and the tokenizer."""
        digest = hashlib.sha256()
        for text in (*self.train_texts, "", *self.report_texts, "", *(p.prompt for p in self.trunk_problems)):
            digest.update(text.encode() + b"\0")
        digest.update(self.tokenizer.to_str().encode())
        return digest.hexdigest()


def prepare(config: CognateConfig, vocab_size: int, folder: Path | None) -> CognateData:
    """Load, clean and split the text, draw the trunk's problems, train the tokenizer.

    Args:
        config: the phase's settings.
        vocab_size: rows of the vocabulary.
        folder: a data folder, or None for what every machine has.
    """
    texts, provenance, notes = load_texts(config.text, folder)
    train_texts = texts["train"]
    problems = draw(config.trunk_mix, config.pool, config.trunk.seed)
    shown = [
        chat_text([{"role": "user", "content": p.prompt}, {"role": "assistant", "content": p.answer}])
        for mix in (config.trunk_mix, *(s.mix for s in config.specialists))
        for p in draw(mix, 100, config.trunk.seed)
    ]
    tokenizer = train_tokenizer([*shown, *(t[:20_000] for t in train_texts)], vocab_size)
    gym = {
        "name": "gym",
        "source": "generated",
        "seed": config.trunk.seed,
        "row_count": len(problems),
        "mix": [m.model_dump() for m in config.trunk_mix],
    }
    return CognateData(tokenizer, train_texts, texts["select"], texts["report"], problems, [*provenance, gym], notes)


def supervised_share(mixture: Mixture, batches: int = 8) -> float:
    """Share of a mixture's tokens that carry a label."""
    drawn = [mixture.batch(i) for i in range(batches)]
    return sum(b.supervised for b in drawn) / sum(b.inputs.size for b in drawn)


def trunk_mixture(data: CognateData, config: CognateConfig) -> Mixture:
    """Batches of the trunk."""
    text, gym = TextSource(data.train_tokens), data.trunk_gym
    sources = ((text, config.text.share), (gym, 1 - config.text.share))
    return Mixture(sources, config.trunk.rows, config.trunk.seq_len, config.trunk.seed)


def specialist_mixture(data: CognateData, config: CognateConfig, plan: SpecialistPlan, train: TrainConfig) -> Mixture:
    """Batches of a specialist: its speciality, and a share of the trunk's data so that it forgets little."""
    text, gym = TextSource(data.train_tokens, plan.text_labels), data.trunk_gym
    own = ProblemSource(data.tokenizer, draw(plan.mix, config.pool, plan.seed))
    old = plan.rehearse
    sources = ((own, 1 - old), (gym, old * (1 - config.text.share)), (text, old * config.text.share))
    return Mixture(sources, train.rows, train.seq_len, plan.seed)
