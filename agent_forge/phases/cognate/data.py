"""Data of phase 1: the trunk's text and problems, the specialists' mixes, the report sets."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agent_forge.phases.cognate.config import CognateConfig, GymMix, SpecialistPlan
from forgekit.data import catalogue
from forgekit.data.batches import Mixture, ProblemSource, TextSource, encode_texts
from forgekit.data.contamination import bench_texts, ngram_index, scan
from forgekit.data.gym import Problem, generate
from forgekit.data.quality import QualityConfig, clean
from forgekit.data.tokenizer import chat_text, train_tokenizer
from forgekit.errors import DataError
from forgekit.train.config import TrainConfig

SHARES = {"train": 0.9, "select": 0.04, "report": 0.06}
SPLIT_SEED = 1
"""Which documents are held out; changes when a report split has been looked at while choosing (docs/LOG.md)."""

GRAM = 13
"""Words in a row that count as the same text (the GPT-3 paper's contamination test)."""


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
    texts, provenance, notes = load_texts(config, folder)
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


def load_texts(config: CognateConfig, folder: Path | None):
    """(texts by split, provenance, notes); documents are split by content, benchmarks kept out."""
    plan = config.text
    names = list(plan.names)
    if folder is not None:
        status = {s.name: s.found for s in catalogue.available(folder)}
        names += [n for n in plan.local if status.get(n)]
    rows, provenance, notes = [], [], []
    for name in names:
        split = "train" if _has_split(name, "train", folder) else "valid"
        loaded = catalogue.load(name, split, folder=folder, allow_hub=False)
        part = _take(loaded.for_training(), plan.bytes_each)
        provenance.append({**loaded.provenance(), "rows_used": len(part)})
        notes.append(f"{name}: {len(part):,} of {loaded.row_count:,} rows, {loaded.note}")
        rows += part
    rows, report = clean(rows, QualityConfig())
    notes.append(f"quality: {report.kept} of {report.total} documents kept, dropped {report.counts or 'none'}")
    rows = _without_benchmarks(rows, folder, notes)
    parts = {name: [r["text"] for r in part] for name, part in catalogue.split_rows(rows, SPLIT_SEED, SHARES).items()}
    # Only the held-out grams are held in memory; the training texts, ten times as many, stream past them.
    held_out = set().union(*(_grams(text) for name in ("select", "report") for text in parts[name]))
    seen = set().union(*(held_out & _grams(text) for text in parts["train"]))
    for name in ("select", "report"):
        fresh = [text for text in parts[name] if not seen & _grams(text)]
        notes.append(f"{name}: {len(fresh)} of {len(parts[name])} held-out documents share nothing with training")
        parts[name] = fresh
    if not all(parts.values()):
        raise DataError("too little text is left after cleaning", where="text", remedy="raise text.bytes_each")
    return parts, provenance, notes


def _grams(text: str) -> set[int]:
    """Hashes of every 13 words in a row (of the whole text where it is shorter)."""
    words = text.split()
    return {hash(tuple(words[i : i + GRAM])) for i in range(max(1, len(words) - GRAM + 1))}


def _has_split(name: str, split: str, folder: Path | None) -> bool:
    where = next((s.where for s in catalogue.available(folder) if s.name == name), "")
    return f"{split}:" in where


def _take(rows: list[dict], limit: int) -> list[dict]:
    """Rows from the front until ``limit`` bytes."""
    taken, total = [], 0
    for row in rows:
        total += len(row["text"].encode())
        taken.append(row)
        if total >= limit:
            break
    return taken


def _without_benchmarks(rows: list[dict], folder: Path | None, notes: list[str]) -> list[dict]:
    """Rows that share no 13-gram with a benchmark of the data folder."""
    if folder is None or not any((folder / catalogue.BENCH).glob("*")):
        return rows
    index = ngram_index(bench_texts(folder))
    kept = [row for row in rows if scan(index, [row["text"]]).clean]
    dropped = len(rows) - len(kept)
    notes.append(f"contamination: {dropped} of {len(rows)} documents share 13 words with a benchmark and were dropped")
    return kept


def draw(mix: tuple[GymMix, ...], per_level: int, seed: int, split: str = "train") -> list[Problem]:
    """``per_level`` problems (times the part's weight when training) of every family and level of a mix."""
    problems = []
    for part in mix:
        count = round(per_level * part.weight) if split == "train" else per_level
        for level in part.levels:
            problems += generate(part.family, level, count, seed=seed, split=split, **part.options)
    return problems


def supervised_share(mixture: Mixture, batches: int = 8) -> float:
    """Share of a mixture's tokens that carry a label."""
    drawn = [mixture.batch(i) for i in range(batches)]
    return sum(b.supervised for b in drawn) / sum(b.inputs.size for b in drawn)


def trunk_mixture(data: CognateData, config: CognateConfig) -> Mixture:
    """Batches of the trunk."""
    text = TextSource(encode_texts(data.tokenizer, data.train_texts))
    gym = ProblemSource(data.tokenizer, data.trunk_problems)
    sources = ((text, config.text.share), (gym, 1 - config.text.share))
    return Mixture(sources, config.trunk.rows, config.trunk.seq_len, config.trunk.seed)


def specialist_mixture(data: CognateData, config: CognateConfig, plan: SpecialistPlan, train: TrainConfig) -> Mixture:
    """Batches of a specialist: its speciality, and a share of the trunk's data so that it forgets little."""
    text = TextSource(encode_texts(data.tokenizer, data.train_texts), plan.text_labels)
    gym = ProblemSource(data.tokenizer, data.trunk_problems)
    own = ProblemSource(data.tokenizer, draw(plan.mix, config.pool, plan.seed))
    old = plan.rehearse
    sources = ((own, 1 - old), (gym, old * (1 - config.text.share)), (text, old * config.text.share))
    return Mixture(sources, train.rows, train.seq_len, plan.seed)
