"""Data sets by name: where they are, what they may be used for, and what came instead.

A set is looked for in the given folder, in ``AGENT_FORGE_DATA``, on the Hugging Face hub when that is possible, and is
else replaced by its declared fallback. :func:`load` always says which it was.

Rows come out in one of two shapes whatever the source's own: ``{"text"}``, or ``{"prompt", "answer"}`` where a worked
solution, if the set has one, is kept apart under ``"trace"``. Multiple choice is asked with letters and answered by
one. Files under ``bench/`` are benchmarks: they load only as split ``bench`` and never for training.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import re
import sys
import urllib.request
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from forgekit.config import Config, canonical_json
from forgekit.data.formats import LRUCache, is_readable, read_rows, row_text
from forgekit.errors import ConfigError, DataError
from forgekit.registry import Registry, unknown

FOLDER_VARIABLE = "AGENT_FORGE_DATA"
BENCH = "bench"
SPLITS = ("train", "valid", BENCH)
Row = dict[str, Any]
_HUB_SECONDS = 5
_CACHE = LRUCache(400_000_000)
_log = logging.getLogger(__name__)


class MissingDataset(DataError):
    """A data set is nowhere to be found, and nothing is declared to take its place."""


class DatasetSpec(Config):
    """One data set of the catalogue."""

    name: str
    """Under which it is asked for."""
    kind: Literal["text", "qa", "math", "code", "state", "tasks"]
    """What it teaches."""
    license: str
    """Terms of its rows."""
    to_text: str = "text"
    """Name of the function that turns a source row into rows of ours (see ``ROW_READERS``)."""
    files: dict[str, str] = Field(default_factory=dict)
    """Glob pattern per split, relative to the data folder; ``<name>/<split>.*`` is found without being declared."""
    hub: str = ""
    """Repository on the Hugging Face hub."""
    hub_config: str | None = None
    """Configuration there."""
    hub_splits: dict[str, str] = Field(default_factory=lambda: {"train": "train"})
    """Hub split per split of ours."""
    embedded: str = ""
    """Name of the generator of a set that needs no files (see ``EMBEDDED``)."""
    fallback: str | None = None
    """Set whose training rows replace this one's where it is not found."""

    @model_validator(mode="after")
    def _benchmarks_apart(self) -> DatasetSpec:
        for split, pattern in self.files.items():
            if (split == BENCH) != pattern.startswith(f"{BENCH}/"):
                raise ValueError(f"split {split!r} reads {pattern!r}: bench/ and split bench belong together")
        return self


@dataclass(frozen=True)
class Loaded:
    """Rows, and where they came from."""

    name: str
    split: str
    source: Literal["local", "hub", "fallback", "embedded"]
    used: str
    """Name of the set the rows belong to; differs from ``name`` for a fallback."""
    path: str
    """File, folder or hub address."""
    rows: list[Row]
    sha256: str
    """Over the canonical JSON of the rows, in order."""
    note: str
    """One sentence for people: what was used, and why."""

    @property
    def row_count(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def train_allowed(self) -> bool:
        """False for benchmarks."""
        return self.split != BENCH

    def for_training(self) -> list[Row]:
        """The rows, unless they are a benchmark's.

        Raises:
            DataError: the split is a benchmark.
        """
        if not self.train_allowed:
            raise DataError("is a benchmark and may not be trained on", where=self.name, remedy='load split="train"')
        return self.rows

    def provenance(self) -> dict[str, Any]:
        """What a run's manifest records."""
        keys = ("name", "split", "source", "used", "path", "row_count", "sha256", "note")
        return {key: getattr(self, key) for key in keys}


@dataclass(frozen=True)
class Status:
    """Whether a set can be had here."""

    name: str
    kind: str
    license: str
    found: bool
    """On disk or embedded; False says nothing about the hub."""
    where: str
    """Splits and places, or why not."""


DATASETS = Registry("dataset")
ROW_READERS = Registry("row reader")
EMBEDDED = Registry("embedded dataset")


def load(
    name: str,
    split: str = "train",
    *,
    folder: Path | str | None = None,
    limit: int | None = None,
    allow_hub: bool = True,
) -> Loaded:
    """Find a data set and read it.

    Args:
        name: of the catalogue.
        split: ``train``, ``valid`` or ``bench``; a published test set is ``bench``.
        folder: looked in first, before ``AGENT_FORGE_DATA``.
        limit: first rows only.
        allow_hub: whether the hub may be asked.

    Raises:
        ConfigError: unknown name or split; the nearest are given.
        MissingDataset: not found and without fallback (a DataError).
        DataError: a broken file, or rows that are not what the set should hold.
    """
    spec: DatasetSpec = DATASETS.get(name)
    if split not in SPLITS:
        raise unknown("split", split, list(SPLITS))
    if spec.embedded and split == "train":
        rows = _cached(spec.fingerprint(), EMBEDDED.get(spec.embedded))[:limit]
        return _loaded(spec, split, "embedded", (spec.name, "embedded"), rows, "made here, no download")
    reasons = []
    for root in _roots(folder):
        if paths := _local(spec, split, root):
            note = f"{len(paths)} file{'s' * (len(paths) > 1)} of {root}"
            return _loaded(spec, split, "local", (spec.name, _shown(paths)), _read(spec, paths, limit), note)
        reasons.append(f"no {split} split in {root}")
    reasons = reasons or [f"no data folder given and {FOLDER_VARIABLE} not set"]
    if allow_hub:
        rows, reason = _from_hub(spec, split, limit)
        if rows is not None:
            return _loaded(spec, split, "hub", (spec.name, f"hf://datasets/{spec.hub}"), rows, reason)
        reasons.append(reason)
    why = ", ".join(reasons)
    _log.info("%s/%s: %s", name, split, why)
    if spec.fallback and split == "train":
        found = load(spec.fallback, folder=folder, limit=limit, allow_hub=allow_hub)
        note = f"{found.used} instead of {spec.name} ({why})"
        return _loaded(spec, split, "fallback", (found.used, found.path), found.rows, note)
    remedy = f"put {spec.files.get(split, f'{spec.name}/{split}.jsonl')} into the folder given by --data"
    raise MissingDataset(f"missing data set offline: {why}", where=f"{spec.name}/{split}", remedy=remedy)


def available(folder: Path | str | None = None) -> list[Status]:
    """Every set of the catalogue, and where it is or why it is not; the hub is named but not asked."""
    roots = list(_roots(folder))
    return [_status(DATASETS.get(name), roots) for name in DATASETS]


def split_rows(rows: Iterable[Row], seed: int, shares: dict[str, float] | None = None) -> dict[str, list[Row]]:
    """Divide rows by what they ask or say, so that equal ones share a split whatever their order and company.

    Args:
        rows: of either shape; what is hashed is the prompt or the text, case and white space aside.
        seed: another seed, another division.
        shares: split names to shares that sum to 1; 96 % train, 2 % select, 2 % report by default.

    Raises:
        ConfigError: shares that are negative or do not sum to 1.
    """
    shares = shares or {"train": 0.96, "select": 0.02, "report": 0.02}
    if min(shares.values()) < 0 or abs(sum(shares.values()) - 1) > 1e-9:
        raise ConfigError(f"{shares} do not sum to 1", where="shares", remedy="give shares that sum to 1")
    parts: dict[str, list[Row]] = {split: [] for split in shares}
    names, bounds = list(shares), list(accumulate(shares.values()))
    for row in rows:
        subject = " ".join(row.get("prompt", row.get("text", "")).casefold().split())
        digest = hashlib.blake2b(f"{seed}:{subject}".encode(), digest_size=8).digest()
        place = bisect_right(bounds, int.from_bytes(digest, "big") / 2**64)
        parts[names[min(place, len(names) - 1)]].append(row)
    return parts


def _roots(folder: Path | str | None) -> Iterator[Path]:
    """The data folders, given one first.

    Raises:
        DataError: one of them is not a folder; a mistyped path must not become a silent fallback.
    """
    for where, value in (("data folder", folder), (FOLDER_VARIABLE, os.environ.get(FOLDER_VARIABLE))):
        if value:
            root = Path(value).expanduser()
            if not root.is_dir():
                what = f"{root} is a file" if root.exists() else f"no folder {root}"
                raise DataError(what, where=where, remedy="give the folder that holds the data sets")
            yield root


def _local(spec: DatasetSpec, split: str, root: Path) -> list[Path]:
    """Files of a split in one folder, in sorted order."""
    for pattern in filter(None, (spec.files.get(split), f"{spec.name}/{split}.*")):
        if paths := sorted(path for path in root.glob(pattern) if is_readable(path)):
            return paths
    return []


def _shown(paths: list[Path]) -> str:
    return str(paths[0] if len(paths) == 1 else paths[0].parent)


def _status(spec: DatasetSpec, roots: list[Path]) -> Status:
    places = []
    for split in SPLITS:
        paths = next((paths for root in roots if (paths := _local(spec, split, root))), [])
        if spec.embedded and split == "train":
            places.append("train: embedded")
        elif paths:
            places.append(f"{split}: {_shown(paths)}")
    if places:
        return Status(spec.name, spec.kind, spec.license, True, ", ".join(places))
    why = f"not in {', '.join(map(str, roots))}" if roots else f"no data folder given and {FOLDER_VARIABLE} not set"
    others = [f"hub {spec.hub}"] * bool(spec.hub) + [f"fallback {spec.fallback}"] * bool(spec.fallback)
    return Status(spec.name, spec.kind, spec.license, False, "; ".join([why, *others]))


def _loaded(spec: DatasetSpec, split: str, source: Any, origin: tuple[str, str], rows: list[Row], note: str) -> Loaded:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical_json(row).encode() + b"\n")
    return Loaded(spec.name, split, source, *origin, rows, digest.hexdigest(), note)


def _cached(key: Any, make: Callable[[], Iterable[Row]]) -> list[Row]:
    """The rows kept under ``key``, made now if need be; every caller gets rows of its own."""
    rows = _CACHE.get(key)
    if rows is None:
        rows = list(make())
        _CACHE.put(key, rows, sum(len(row_text(row)) for row in rows))
    return [dict(row) for row in rows]


def _read(spec: DatasetSpec, paths: list[Path], limit: int | None) -> list[Row]:
    stamps = [(str(path), (stat := path.stat()).st_mtime_ns, stat.st_size) for path in paths]
    rows = (row for path in paths for row in _converted(spec, path, read_rows(path)))
    return _cached((spec.fingerprint(), tuple(stamps), limit), lambda: islice(rows, limit))


def _converted(spec: DatasetSpec, source: Path | str, rows: Iterable[Row]) -> Iterator[Row]:
    reader = ROW_READERS.get(spec.to_text)
    wanted = (reader.__doc__ or spec.to_text).partition("\n")[0]
    for number, row in enumerate(rows, 1):
        try:
            yield from reader(row)
        except (KeyError, ValueError, TypeError, IndexError, AttributeError) as error:
            told = f"no {error}" if isinstance(error, KeyError) else str(error)
            what = f"row {number} cannot become a row of {spec.name} ({told}; its keys: {', '.join(map(str, row))})"
            raise DataError(what, where=str(source), remedy=f"wanted: {wanted}") from None


def _from_hub(spec: DatasetSpec, split: str, limit: int | None) -> tuple[list[Row] | None, str]:
    """Rows and where they are from, or None and why not."""
    if not spec.hub or split not in spec.hub_splits:
        return None, f"no {split} split on the hub"
    for variable in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        if os.environ.get(variable, "").lower() in ("1", "true", "yes", "on"):
            return None, f"the hub not asked ({variable} is set)"
    if importlib.util.find_spec("datasets") is None:
        return None, "the hub not asked (the package datasets is not installed)"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        # Asked first because the client itself retries for minutes where there is no network.
        urllib.request.urlopen(f"{endpoint}/api/datasets/{spec.hub}", timeout=_HUB_SECONDS).close()
        import datasets

        kept = limit is None  # a whole set is worth keeping in the client's cache, the head of one is not
        table = datasets.load_dataset(spec.hub, spec.hub_config, split=spec.hub_splits[split], streaming=not kept)
        rows = list(islice(_converted(spec, f"hf://datasets/{spec.hub}", table), limit))
    except _hub_errors() as error:
        return None, f"the hub failed ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return rows, f"{spec.hub} on the hub"


def _hub_errors() -> tuple[type[Exception], ...]:
    """What a fetch may fail with; the clients' own families count only where they are loaded."""
    named = (("httpx", "HTTPError"), ("aiohttp", "ClientError"), ("datasets.exceptions", "DatasetsError"))
    clients = (getattr(sys.modules[module], name) for module, name in named if module in sys.modules)
    return (OSError, ValueError, RuntimeError, ImportError, *clients)


# --- how source rows become ours -------------------------------------------------------------------------------------


def _question(text: str) -> str:
    return f"Question: {text.strip()}\nAnswer:"


def _choice_row(question: str, choices: Sequence[str], gold: int) -> Row:
    if not 0 <= gold < len(choices):
        raise ValueError(f"answer {gold} of {len(choices)} choices")
    options = "\n".join(f"{letter}. {choice.strip()}" for letter, choice in zip("ABCDEFGH", choices))
    return {"prompt": f"Question: {question.strip()}\n{options}\nAnswer:", "answer": "ABCDEFGH"[gold]}


@ROW_READERS.register("text")
def text_rows(row: Row) -> list[Row]:
    """A document as it is."""
    return [{"text": row["text"]}] if row["text"].strip() else []


@ROW_READERS.register("wikitext")
def wikitext_rows(row: Row) -> list[Row]:
    """Articles, cut before every first-level heading (``= Title =``)."""
    return [{"text": part} for part in re.split(r"(?m)^(?= = [^=].* = $)", row["text"]) if part.strip()]


@ROW_READERS.register("play")
def play_rows(row: Row) -> list[Row]:
    """Scenes' worth of speeches: runs of about 4,000 characters, never cut inside a speech."""
    parts, held = [], ""
    for speech in re.split(r"(?<=\n)\n+", row["text"]):
        held += speech + "\n"
        if len(held) >= 4000:
            parts.append(held)
            held = ""
    return [{"text": part} for part in [*parts, held] if part.strip()]


@ROW_READERS.register("choice")
def choice_rows(row: Row) -> list[Row]:
    """Multiple choice in the shapes it is published in: instruction files, benchmark files and the hub's tables."""
    if "instruction" in row:
        stem, *choices = re.split(r"\s*Answer\d: ", row["instruction"].partition("\n\nAnswer format:")[0])
        question = stem.partition("the question: ")[2] or stem
        return [_choice_row(question, choices, int(row["answer"].removeprefix("answer")) - 1)]
    if "query" in row:
        return [_choice_row(row["query"].removeprefix("Question: "), row["choices"], row["gold"])]
    question = row.get("question_stem") or row["question"]
    held = row
    if isinstance(question, dict):
        held, question = question, question["stem"]
    choices = held["choices"]
    if isinstance(choices, list):
        choices = {key: [choice[key] for choice in choices] for key in ("label", "text")}
    return [_choice_row(question, choices["text"], choices["label"].index(row["answerKey"]))]


@ROW_READERS.register("piqa")
def piqa_rows(row: Row) -> list[Row]:
    """A goal and two ways to it; rows without a label cannot be answered and are refused."""
    return [_choice_row(row["goal"], (row["sol1"], row["sol2"]), int(row["label"]))]


@ROW_READERS.register("yes_no")
def yes_no_rows(row: Row) -> list[Row]:
    """BoolQ: a question, after its passage where the source has one, answered yes or no."""
    if "instruction" in row:
        text = row["instruction"].partition("question: ")[2].partition("\n\nAnswer format:")[0]
        return [{"prompt": _question(text), "answer": {"true": "yes", "false": "no"}[row["answer"]]}]
    if "query" in row:
        return [{"prompt": f"{row['query'].strip()}\nAnswer:", "answer": row["choices"][row["gold"]]}]
    prompt = f"Passage: {row['passage'].strip()}\n{_question(row['question'].strip().removesuffix('?') + '?')}"
    return [{"prompt": prompt, "answer": "yes" if row["answer"] else "no"}]


@ROW_READERS.register("gsm8k")
def gsm8k_rows(row: Row) -> list[Row]:
    """A word problem, its number, and the worked solution (without calculator marks) as the trace."""
    solution, mark, number = row["answer"].rpartition("####")
    if not mark:
        raise ValueError("the answer has no #### line")
    trace = re.sub(r"<<.*?>>", "", solution).strip()
    return [{"prompt": _question(row["question"]), "answer": number.strip().replace(",", ""), "trace": trace}]


@ROW_READERS.register("svamp")
def svamp_rows(row: Row) -> list[Row]:
    """A word problem, its number, and the equation as the trace."""
    number = float(row["Answer"])
    answer = str(int(number)) if number.is_integer() else repr(number)
    return [{"prompt": _question(f"{row['Body']} {row['Question']}"), "answer": answer, "trace": row["Equation"]}]


@ROW_READERS.register("mbpp")
def mbpp_rows(row: Row) -> list[Row]:
    """A task with the tests it must pass, answered by a program."""
    tests = "\n".join(row["test_list"])
    prompt = f"{row['text'].strip()}\nThe code must pass these tests:\n{tests}\n"
    return [{"prompt": prompt, "answer": row["code"].replace("\r\n", "\n").strip() + "\n"}]


@ROW_READERS.register("babi")
def babi_rows(row: Row) -> list[Row]:
    """Every question of a bAbI file after the story so far; a line numbered 1 begins a new story."""
    rows, story = [], []
    for line in row["text"].splitlines():
        number, _, statement = line.partition(" ")
        story = [] if number == "1" else story
        asked = re.fullmatch(r"(.*?)\s*[\t|]\s*(.*?)\s*[\t|]\s*[\d ]+", statement)
        if asked:
            prompt = "\n".join([*story, _question(asked[1])])
            rows.append({"prompt": prompt, "answer": asked[2]})
        elif statement.strip():
            story.append(statement.strip())
    if not rows:
        raise ValueError("no questions")
    return rows


@EMBEDDED.register("python_prose")
def _prose() -> Iterator[Row]:
    from forgekit.data.python_corpus import python_prose

    return ({"text": text} for text in python_prose())


@EMBEDDED.register("python_code")
def _code() -> Iterator[Row]:
    from forgekit.data.python_corpus import python_code

    return ({"text": text} for text in python_code())


@EMBEDDED.register("gym")
def _gym() -> Iterator[Row]:
    """Training problems of every gym family, level by level, each once."""
    from forgekit.data.gym import FAMILIES, generate

    seen: set[str] = set()
    for level in range(1, 11):
        for family in FAMILIES:
            for problem in generate(family, level, 64, seed=0):
                if problem.prompt not in seen:
                    seen.add(problem.prompt)
                    yield {"prompt": problem.prompt, "answer": problem.answer}


# --- the sets --------------------------------------------------------------------------------------------------------

_ARC = {"kind": "qa", "license": "CC BY-SA 4.0", "to_text": "choice", "hub": "allenai/ai2_arc", "fallback": "gym"}
_BOOKS = {"kind": "text", "fallback": "python_prose"}
_WITH_BENCH = {"train": "train", "valid": "validation", BENCH: "test"}
_SETS: dict[str, Row] = {
    "arc_easy": _ARC
    | {"files": {"train": "qa/ARC-Easy_train.json", BENCH: "bench/arc_easy_test.jsonl"}}
    | {"hub_config": "ARC-Easy", "hub_splits": _WITH_BENCH},
    "arc_challenge": _ARC
    | {"files": {"train": "qa/ARC-Challenge_train.json", BENCH: "bench/arc_challenge_test.jsonl"}}
    | {"hub_config": "ARC-Challenge", "hub_splits": _WITH_BENCH},
    "gsm8k": {
        "kind": "math",
        "license": "MIT",
        "to_text": "gsm8k",
        "files": {"train": "math/gsm8k_train.jsonl", BENCH: "bench/gsm8k_test.jsonl"},
        "hub": "openai/gsm8k",
        "hub_config": "main",
        "hub_splits": {"train": "train", BENCH: "test"},
        "fallback": "gym",
    },
    "mbpp": {
        "kind": "code",
        "license": "CC BY 4.0 (to confirm)",
        "to_text": "mbpp",
        "files": {"train": "code/mbpp_train_prompt_474.jsonl", BENCH: "bench/mbpp_test.jsonl"},
        "hub": "google-research-datasets/mbpp",
        "hub_config": "full",
        "hub_splits": _WITH_BENCH,
        "fallback": "python_code",
    },
    "piqa": {
        "kind": "qa",
        "license": "AFL 3.0 (to confirm)",
        "to_text": "piqa",
        "files": {BENCH: "bench/piqa_valid.jsonl"},
        "hub": "ybisk/piqa",
        "hub_splits": {"train": "train", BENCH: "validation"},
        "fallback": "gym",
    },
    "svamp": {
        "kind": "math",
        "license": "MIT",
        "to_text": "svamp",
        "files": {BENCH: "bench/svamp.jsonl"},
        "hub": "ChilleD/SVAMP",
        "hub_splits": {"train": "train", BENCH: "test"},
        "fallback": "gym",
    },
    "boolq": {
        "kind": "qa",
        "license": "CC BY-SA 3.0",
        "to_text": "yes_no",
        "files": {"train": "qa/boolq_train.json", BENCH: "bench/boolq_valid.jsonl"},
        "hub": "google/boolq",
        "hub_splits": {"train": "train", BENCH: "validation"},
        "fallback": "gym",
    },
    "openbookqa": {
        "kind": "qa",
        "license": "ODC-By bundle (owner's terms to confirm)",
        "to_text": "choice",
        "files": {"train": "qa/openbookqa_train.json"},
        "hub": "allenai/openbookqa",
        "hub_config": "main",
        "hub_splits": _WITH_BENCH,
        "fallback": "gym",
    },
    "commonsenseqa": {
        "kind": "qa",
        "license": "MIT (to confirm)",
        "to_text": "choice",
        "files": {"train": "qa/commonsenseqa_train.jsonl"},
        "hub": "tau/commonsense_qa",
        "hub_splits": {"train": "train", BENCH: "validation"},
        "fallback": "gym",
    },
    "babi": {
        "kind": "state",
        "license": "CC BY 3.0",
        "to_text": "babi",
        "files": {"train": "babi/qa*_train.txt"},
        "fallback": "gym",
    },
    "tinystories": _BOOKS
    | {"license": "CDLA-Sharing 1.0", "files": {"train": "corpus/tinystories_sample.txt"}}
    | {"hub": "roneneldan/TinyStories", "hub_splits": {"train": "train", "valid": "validation"}},
    "wikitext": _BOOKS
    | {"license": "CC BY-SA 3.0 (to confirm)", "files": {"valid": "corpus/wikitext2_valid.txt"}}
    | {"to_text": "wikitext", "hub": "Salesforce/wikitext", "hub_config": "wikitext-2-raw-v1"}
    | {"hub_splits": _WITH_BENCH},
    "tinyshakespeare": _BOOKS
    | {"license": "public domain", "files": {"train": "corpus/tinyshakespeare.txt"}, "to_text": "play"},
    "books_core": _BOOKS | {"license": "public domain", "files": {"train": "corpus/books_core.jsonl.xz"}},
    "eltec_novels": _BOOKS
    | {"license": "public domain, markup CC BY 4.0", "files": {"train": "corpus/eltec_novels.jsonl.xz"}},
    "speeches": _BOOKS | {"license": "public domain", "files": {"train": "corpus/speeches_masc.jsonl"}},
    "philosophy": _BOOKS | {"license": "CC BY 4.0", "files": {"train": "corpus/openstax_philosophy.jsonl"}},
    "python_prose": {"kind": "text", "license": "PSF 2.0", "embedded": "python_prose"},
    "python_code": {"kind": "code", "license": "PSF 2.0", "embedded": "python_code"},
    "gym": {"kind": "tasks", "license": "Apache-2.0", "embedded": "gym"},
}

for _name, _values in _SETS.items():
    DATASETS.register(_name)(DatasetSpec(name=_name, **_values))
