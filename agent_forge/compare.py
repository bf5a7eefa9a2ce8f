"""Compare models on the same problems and the same held-out text, with paired statistics.

The first model is the one the others are measured against. Problems come from the gym, whose splits are made by
hashing each prompt; text is cut into windows of bytes, not of tokens, so that models with different tokenizers read
exactly the same and every difference is a paired one. Models are loaded one after the other.

Shapes: B rows, T tokens, N scored tokens.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from agent_forge.compare_items import CompareConfig, draw_problems, text_windows
from agent_forge.pipeline.phase import Progress
from forgekit.data.gym import Problem
from forgekit.data.plans import GymMix
from forgekit.data.problems import REPORT_SEED
from forgekit.data.texts import SHARES, SPLIT_SEED
from forgekit.data.tokenizer import END, PAD
from forgekit.errors import ArtifactError, ConfigError, DataError
from forgekit.measure.evidence import Evidence
from forgekit.measure.problems import chance_of
from forgekit.measure.stats import bootstrap_mean, mcnemar, proportion
from forgekit.store.artifact import MANIFEST, Artifact

TEXT_SPLIT = "text_split"
"""Key of a manifest's metadata that names the rule by which its text was divided: ``{"seed", "shares"}``."""
SIGNIFICANT = 0.05
_SCORES = 2**25
"""Logits held at once, 128 MB in single precision."""
_BATCH_TOKENS = 16_384
_QUESTION = re.compile(r"<\|user\|>(.*)<\|end\|><\|assistant\|>", re.DOTALL)

Lineage = Callable[[str], dict[str, Any] | None]
"""Metadata of a model by its id; None where it is not known."""


@dataclass(frozen=True)
class Subject:
    """A model to compare.

    Attributes:
        name: in tables; unique.
        folder: where it lies.
        artifact: if it is one of ours.
    """

    name: str
    folder: Path
    artifact: Artifact | None


@dataclass(frozen=True)
class Items:
    """What every model is asked.

    Attributes:
        problems: gym problems, family by family.
        windows: pieces of text.
        notes: sentences for people: where they come from, what is missing.
    """

    problems: list[Problem]
    windows: list[str]
    notes: list[str]


@dataclass(frozen=True)
class Scores:
    """One model's scores, an entry per item; NaN where the item is longer than the model's context.

    Attributes:
        right: 1.0 where the greedy answer to a problem is exactly right.
        bits: bits to predict a window.
        tokens: tokens of a window.
        facts: size and cost of the model.
    """

    right: np.ndarray
    bits: np.ndarray
    tokens: np.ndarray
    facts: dict[str, Any]


def compare(
    folders: list[Path],
    config: CompareConfig,
    show: Callable[[Progress], None] = lambda progress: None,
    lineage: Lineage = lambda model_id: None,
) -> dict[str, Any]:
    """Measure every model on the same items and the others against the first.

    Args:
        folders: model folders, ours or Hugging Face's; at least two different ones.
        config: what is measured.
        show: called with signs of life.
        lineage: finds the ancestors of a model, to learn how their text was divided.

    Returns:
        JSON-able: ``models``, ``families``, ``text``, ``notes`` and what was measured.

    Raises:
        ConfigError: fewer than two models.
        ArtifactError: a model is there twice, damaged, without a tokenizer, or its tokenizer does not fit its weights.
        DataError: no problem or no text is left to compare on.
    """
    subjects = subjects_of(folders)
    show(Progress("items", 0, 1, "problems and text"))
    problems, problem_notes = draw_problems(config)
    windows, text_notes = text_windows(config)
    items = Items(problems, windows, [*problem_notes, *text_notes])
    show(Progress("items", 1, 1, f"{len(problems)} problems, {len(windows)} windows"))
    scores = {subject.name: measure(subject, items, show) for subject in subjects}
    families, dropped = family_rows(problems, scores, config.split)
    text, short = text_row(windows, scores, config.split)
    return {
        "models": [{"name": s.name, "folder": str(s.folder), **scores[s.name].facts} for s in subjects],
        "against": subjects[0].name,
        "split": config.split,
        "families": families,
        "text": text,
        "notes": [*items.notes, *dropped, *short, *seen_notes(subjects, config, lineage), *_holm_note(families)],
    }


def subjects_of(folders: list[Path]) -> list[Subject]:
    """The models with names that tell them apart; artifacts are checked against their hashes."""
    if len(folders) < 2:
        raise ConfigError("one model cannot be compared", where="compare", remedy="name two models or more")
    found: dict[Any, Path] = {}
    artifacts = []
    for folder in folders:
        artifact = Artifact.open(folder) if (folder / MANIFEST).is_file() else None
        key = artifact.manifest.model_id if artifact else folder.resolve()
        if key in found:
            what = f"the same model twice ({key if artifact else folder})"
            raise ArtifactError(what, where="compare", remedy="name every model once")
        found[key] = folder
        artifacts.append(artifact)
    names = [a.manifest.model_name if a else f.resolve().name for a, f in zip(artifacts, folders)]
    full = [a.manifest.model_id if a else str(f) for a, f in zip(artifacts, folders)]
    names = [name if names.count(name) == 1 else longer for name, longer in zip(names, full)]
    return [Subject(*values) for values in zip(names, folders, artifacts)]


# --- one model -------------------------------------------------------------------------------------------------------


class Speaker:
    """A tokenizer that is not ours, addressed in the house's terms.

    Questions go through the model's own chat template (plain text where it has none), answers and documents end
    with its own end token.

    Args:
        tokenizer: a :class:`forgekit.hub.HFTokenizer`.
        where: the model's folder, for messages.
    """

    def __init__(self, tokenizer: Any, where: str) -> None:
        self.tokenizer, self.end = tokenizer, tokenizer.fast.eos_token_id
        if self.end is None:
            raise ArtifactError("its tokenizer has no end token", where=where, remedy="set eos_token in its settings")
        begin = tokenizer.fast.bos_token_id
        self.begin = self.end if begin is None else begin

    def token_to_id(self, token: str) -> int | None:
        """The id of the model's own token in the place of one of ours."""
        return self.end if token in (END, PAD) else self.tokenizer.token_to_id(token)

    def encode_batch(self, texts: list[str], add_special_tokens: bool = False) -> list[SimpleNamespace]:
        """Ids of texts in the house's format; only questions and ends are told apart."""
        return [SimpleNamespace(ids=self._ids(text)) for text in texts]

    def _ids(self, text: str) -> list[int]:
        from forgekit.infer.chat import conversation_ids

        if asked := _QUESTION.fullmatch(text):
            return conversation_ids(self.tokenizer, [{"role": "user", "content": asked[1]}])
        ids = self.tokenizer.encode(text.removesuffix(END), add_special_tokens=False).ids
        return [*ids, self.end] if text.endswith(END) else ids


def measure(subject: Subject, items: Items, show: Callable[[Progress], None]) -> Scores:
    """Load a model, score it and let it go; raises as :func:`compare`."""
    from agent_forge.export.hf import check_vocabulary
    from agent_forge.merging.folders_weights import WeightFolder
    from forgekit.measure.scores import score_problems
    from forgekit.models.io import read_model
    from forgekit.quant.model import logical_parameters

    model, tokenizer = read_model(subject.folder)
    rows = model.config.vocab_size
    check_vocabulary(tokenizer, rows, subject.folder)
    foreign = hasattr(tokenizer, "chat_text")
    tokenizer = Speaker(tokenizer, str(subject.folder)) if foreign else tokenizer
    limit = getattr(model, "context_limit", None) or math.inf
    kept = [i for i, size in enumerate(_lengths(tokenizer, items.problems)) if size <= limit]
    right = np.full(len(items.problems), np.nan)
    batch = max(256, min(_BATCH_TOKENS, _SCORES // rows))
    for number, part in enumerate(parts := np.array_split(kept, max(1, len(kept) // 200)) if kept else []):
        show(Progress(subject.name, number, len(parts) + 1, "problems"))
        right[part] = score_problems(model, tokenizer, [items.problems[i] for i in part], batch).right
    show(Progress(subject.name, len(parts), len(parts) + 1, "text"))
    bits, tokens, steps = score_pieces(model, tokenizer, items.windows, limit)
    show(Progress(subject.name, len(parts) + 1, len(parts) + 1, "done"))
    scored = np.isfinite(bits)
    read = tokens[scored].sum() / max(1, scored.sum())
    per_token = model.flops_per_token(round(read), steps) if steps else model.flops_per_token(round(read))
    size = sum(len(w.encode()) for w, there in zip(items.windows, scored) if there)
    facts = {
        "model_id": subject.artifact.manifest.model_id if subject.artifact else None,
        "family": model.config.family,
        "parameters": logical_parameters(model),
        "weight_bytes": sum(p.stat().st_size for p in WeightFolder.open(subject.folder, subject.name).weight_files),
        "vocabulary": rows,
        "format": "its own chat template or plain text" if foreign else "the house's chat format",
        "flops_per_token": float(per_token),
        "flops_per_byte": float(per_token * tokens[scored].sum() / size) if size else None,
        "context_tokens": float(read),
        "steps_per_token": steps or None,
    }
    return Scores(right, bits, tokens, facts)


def _lengths(tokenizer: Any, problems: list[Problem]) -> np.ndarray:
    """Tokens of question and answer together."""
    from forgekit.data.batches import ProblemSource

    return ProblemSource(tokenizer, problems).size


def score_pieces(model: Any, tokenizer: Any, windows: list[str], limit: float) -> tuple[np.ndarray, np.ndarray, float]:
    """Bits and tokens of each window, read after a begin (or end) token, and the mean recursion steps per token.

    Windows of more than ``limit`` tokens get NaN bits.
    """
    begin = getattr(tokenizer, "begin", None)
    begin = tokenizer.token_to_id(END) if begin is None else begin
    rows = [[begin, *e.ids] for e in tokenizer.encode_batch(windows, add_special_tokens=False)]
    sizes = np.array([len(row) - 1 for row in rows])
    bits, steps, order = np.full(len(rows), np.nan), 0.0, np.argsort(sizes, kind="stable")
    order = [int(i) for i in order if 1 <= sizes[i] <= limit]
    while order:
        at_once = max(1, min(_BATCH_TOKENS, _SCORES // model.config.vocab_size) // int(sizes[order[-1]]))
        chosen, order = order[-at_once:], order[:-at_once]
        bits[chosen], more = _score_rows(model, [rows[i] for i in chosen])
        steps += more
    return bits, sizes, steps / max(1, int(sizes[np.isfinite(bits)].sum()))


def _score_rows(model: Any, rows: list[list[int]]) -> tuple[np.ndarray, float]:
    """Bits (B,) of rows of ids, the first id of each given, and the recursion steps of all tokens together."""
    import torch
    import torch.nn.functional as F

    from forgekit.models.base import score_at, supervised_positions
    from forgekit.models.constants import IGNORE

    longest = max(map(len, rows)) - 1
    ids_BT = torch.full((len(rows), longest), rows[0][0])
    labels_BT = torch.full_like(ids_BT, IGNORE)
    for b, row in enumerate(rows):
        ids_BT[b, : len(row) - 1], labels_BT[b, : len(row) - 1] = torch.tensor(row[:-1]), torch.tensor(row[1:])
    device = next(model.parameters()).device
    at_N = supervised_positions(labels_BT)
    with torch.inference_mode():
        out = score_at(model, ids_BT.to(device), at_N.to(device))
        nats_N = F.cross_entropy(out.logits.float(), labels_BT.flatten()[at_N].to(device), reduction="none")
    total_B = torch.zeros(len(rows), dtype=torch.float64).index_add_(0, at_N // longest, nats_N.double().cpu())
    return total_B.numpy() / math.log(2), 0.0 if out.steps is None else float(out.steps.sum())


# --- the models against each other -----------------------------------------------------------------------------------


def family_rows(
    problems: list[Problem], scores: dict[str, Scores], split: str
) -> tuple[list[dict[str, Any]], list[str]]:
    """Accuracies per family and over all, differences to the first model, p-values adjusted over all tests."""
    fits = np.all([np.isfinite(s.right) for s in scores.values()], axis=0)
    if not fits.any():
        raise DataError("no problem fits every model's context", where="gym", remedy="choose lower levels")
    kept = [p for p, there in zip(problems, fits) if there]
    right = {name: s.right[fits] for name, s in scores.items()}
    names = list(dict.fromkeys(p.family for p in kept))
    rows = []
    for name in [*names, "all"] if len(names) > 1 else names:
        pick = np.array([name in ("all", p.family) for p in kept])
        chosen = [p for p, there in zip(kept, pick) if there]
        rows.append(_row(name, chosen, {model: r[pick] for model, r in right.items()}, split))
    tests = [test for row in rows if row["family"] != "all" for test in row["differences"]]
    for test, adjusted in zip(tests, holm([test["mcnemar_p"] for test in tests])):
        test["holm_p"] = adjusted
    gone = len(problems) - len(kept)
    return rows, [f"{gone} problems are longer than a model's context and were left out for all"] if gone else []


def _row(name: str, problems: list[Problem], right: dict[str, np.ndarray], split: str) -> dict[str, Any]:
    first, *others = right
    cells = {(p.family, p.level) for p in problems}
    chance = chance_of([GymMix(family=family, levels=(level,)) for family, level in cells], problems)
    differences = []
    for other in others:
        told = Evidence.compare(
            claim=f"{other} against {first} on {name}",
            metric="exact_match",
            before=right[first],
            after=right[other],
            chance=chance,
            split=split,
            seeds=(REPORT_SEED,),
            compute={},
            parent_must_beat_chance=False,
        )
        p = mcnemar(right[first], right[other])
        differences.append({"model": other, **_told(told), "mcnemar_p": p, "holm_p": None})
    accuracy = {model: _interval(proportion(r)) for model, r in right.items()}
    levels = sorted({p.level for p in problems})
    return {
        "family": name,
        "levels": levels,
        "n": len(problems),
        "chance": chance,
        "accuracy": accuracy,
        "differences": differences,
    }


def text_row(windows: list[str], scores: dict[str, Scores], split: str) -> tuple[dict[str, Any], list[str]]:
    """Bits per byte of every model over the same windows, and the differences to the first."""
    fits = np.all([np.isfinite(s.bits) for s in scores.values()], axis=0)
    if not fits.any():
        raise DataError("no window fits every model's context", where="text", remedy="give a smaller --window-bytes")
    sizes = np.array([len(w.encode()) for w in windows], dtype=float)[fits]
    values = {name: s.bits[fits] / sizes for name, s in scores.items()}
    first, *others = values
    differences = []
    for other in others:
        told = Evidence.compare(
            claim=f"{other} against {first} on text",
            metric="bits_per_byte",
            before=values[first],
            after=values[other],
            chance=None,
            split=split,
            seeds=(SPLIT_SEED,),
            compute={},
            higher_is_better=False,
        )
        differences.append({"model": other, **_told(told)})
    gone = len(windows) - len(sizes)
    row = {
        "windows": len(sizes),
        "bytes": int(sizes.sum()),
        "bits_per_byte": {name: _interval(bootstrap_mean(v)) for name, v in values.items()},
        "differences": differences,
    }
    return row, [f"{gone} windows are longer than a model's context and were left out for all"] if gone else []


def _interval(values: tuple[float, float, float]) -> dict[str, Any]:
    return {"mean": values[0], "ci95": [values[1], values[2]]}


def _told(evidence: Evidence) -> dict[str, Any]:
    return {
        "difference": evidence.after - evidence.before,
        "ci95": list(evidence.ci95),
        "n": evidence.n,
        "verdict": evidence.verdict,
    }


def holm(p: list[float]) -> list[float]:
    """p-values adjusted for their number, in the order given (S. Holm, Scandinavian Journal of Statistics 6, 1979)."""
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        highest = max(highest, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = highest
    return adjusted


# --- what the numbers do not say -------------------------------------------------------------------------------------


def seen_notes(subjects: list[Subject], config: CompareConfig, lineage: Lineage) -> list[str]:
    """Whether the text can have been in a model's training, as far as the manifests tell."""
    if config.split == "train":
        return ["the training split was practised by models of the Forge: this is no measure of what they learned"]
    if config.data is not None and config.data.is_file():
        return []
    rule = {"seed": SPLIT_SEED, "shares": SHARES}
    told = {s.name: text_splits(s.artifact.manifest.flat(), lineage) if s.artifact else None for s in subjects}
    same = [name for name, found in told.items() if found == [rule]]
    other = [name for name, found in told.items() if found and found != [rule]]
    silent = [name for name, found in told.items() if not found]
    notes = []
    if same:
        notes.append(f"{', '.join(same)}: trained with these documents held out, as the manifests say")
    if other:
        notes.append(f"{', '.join(other)}: trained with another division of the documents; the text may have been seen")
    if silent:
        notes.append(
            f"{', '.join(silent)}: nothing tells which documents were trained on. Phase 1 of this version holds "
            "these out; of models made otherwise the text may have been seen"
        )
    return notes


def text_splits(metadata: dict[str, Any], lineage: Lineage) -> list[dict[str, Any]]:
    """The different divisions of text in a model's ancestry, its own included; empty if any of its roots is silent."""
    found: list[dict[str, Any]] = []
    waiting, visited = [metadata], set()
    while waiting:
        one = waiting.pop()
        if rule := one.get(TEXT_SPLIT):
            found += [rule] if rule not in found else []
            continue
        parents = [parent for parent in one.get("parents") or [] if parent not in visited]
        visited.update(parents)
        known = [lineage(parent) for parent in parents]
        if not one.get("parents") or None in known:
            return []
        waiting += known
    return found


def _holm_note(families: list[dict[str, Any]]) -> list[str]:
    tests = [test for row in families for test in row["differences"] if test["holm_p"] is not None]
    if len(tests) < 2:
        return []
    hold = sum(test["holm_p"] < SIGNIFICANT for test in tests)
    return [
        f"{len(tests)} comparisons were made: about {SIGNIFICANT * len(tests):.1f} would come out at p < {SIGNIFICANT} "
        f"by chance alone; {hold} hold after Holm's adjustment. Intervals and verdicts are those of one comparison each"
    ]
