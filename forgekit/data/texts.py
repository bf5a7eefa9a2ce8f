"""Real text, cleaned and split by content: the same plan gives the same three splits to every phase."""

from __future__ import annotations

from pathlib import Path

from forgekit.data import catalogue
from forgekit.data.contamination import bench_texts, ngram_index, scan
from forgekit.data.plans import TextPlan
from forgekit.data.quality import QualityConfig, clean
from forgekit.errors import DataError

SHARES = {"train": 0.9, "select": 0.04, "report": 0.06}
SPLIT_SEED = 1
"""Which documents are held out; changes when a report split has been looked at while choosing (docs/LOG.md)."""

GRAM = 13
"""Words in a row that count as the same text (the GPT-3 paper's contamination test)."""


def load_texts(plan: TextPlan, folder: Path | None):
    """Load, clean and split text. Documents are split by content and benchmarks kept out.

    Args:
        plan: which sets, and how much of each.
        folder: a data folder, or None for what every machine has.

    Returns:
        texts by split (``train``, ``select``, ``report``), provenance of every set, notes for people. Held-out
        documents share no 13 words in a row with the training documents.

    Raises:
        DataError: a split has no text left.
    """
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
