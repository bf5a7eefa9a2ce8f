"""The rules of a handoff, one function each. A rule notes what is broken and what cannot be told."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from agent_forge.merging.check import DIVERGED, check_finite
from agent_forge.pipeline.handoff import RELEASE, Case, is_number
from agent_forge.pipeline.handoff_subject import MISSING, Shape, Subject
from forgekit.errors import ArtifactError

GROWN = "vocabulary_added"
"""Metadata entry: by how many rows a phase made the vocabulary larger, which it may say and nobody else."""


def judge(case: Case) -> None:
    """Apply every rule. Weights are read only when nothing else is wrong: they are the most work."""
    for rule in RULES:
        rule(case)
    if not case.found:
        finite(case)


def number(case: Case) -> None:
    """As many models as the contract says, none of them twice."""
    wanted, given = case.contract.num_models, [subject.name for subject in case.subjects]
    keys = [subject.key for subject in case.subjects]
    for name in dict.fromkeys(one for one, key in zip(given, keys) if keys.count(key) > 1):
        case.refuse(name, f"is given {given.count(name)} times", "give every model once", "structure")
    if len(given) != wanted:
        what = f"num_models is {len(given)}, {case.contract.target} takes {wanted}"
        remedy = f"hand over {wanted}" if wanted else "it starts from nothing: leave the models out"
        if given and wanted:
            remedy += f", or --set {case.setting('num_models')}={len(given)}"
        case.refuse(", ".join(given) or "no models", what, remedy, "structure")


def parameters(case: Case) -> None:
    """Parameters within the range."""
    limits = case.contract.param_range
    if limits == "any":
        return
    span, said = limits, ""
    if limits == "profile":
        target, share = case.target_parameters, case.tolerance
        span = (round(target * (1 - share)), round(target * (1 + share)))
        said = f" (the profile's {target:,} within {share:.0%})"
    low, high = span
    for subject in case.subjects:
        if not low <= subject.parameters <= high:
            what = f"parameters {subject.parameters:,} outside {low:,} to {high:,}{said}"
            remedy = f"use models of this size, or --set {case.setting('param_range')}=any"
            case.refuse(subject.name, what, remedy, "structure")


def size(case: Case) -> None:
    """All weights together small enough."""
    total, limit = sum(subject.size_mb for subject in case.subjects), case.contract.max_total_mb
    if total > limit:
        names = ", ".join(subject.name for subject in case.subjects)
        remedy = f"use smaller models, or --set {case.setting('max_total_mb')}={total + 1:.0f}"
        case.refuse(names, f"combined size {total:,.1f} MB, at most {limit:,.6g} MB", remedy, "structure")


def architecture(case: Case) -> None:
    """All models alike."""
    if not case.contract.same_architecture or len(case.subjects) < 2:
        return
    first = case.subjects[0]
    for other in case.subjects[1:]:
        _alike(case, other, first.name, first.shape)


def ancestry(case: Case) -> None:
    """Every model like its parents."""
    if not case.contract.as_parents:
        return
    for subject in case.subjects:
        parents = subject.parents or {}
        for parent, shape in parents.items():
            if shape is None:
                case.note(f"{subject.name}: architecture of its parent {parent}, which is not there")
            else:
                expected = {k: v for k, v in shape.items() if k != "tokenizer"}
                grown = subject.entry(GROWN)
                if is_number(grown) and "vocabulary" in expected:  # phase 3 gives Hugging Face models its tokens
                    expected["vocabulary"] += int(grown)
                _alike(case, subject, f"its parent {parent}", expected)


def _alike(case: Case, subject: Subject, other: str, shape: Shape) -> None:
    """Compare what both state."""
    for part, theirs in shape.items():
        mine = subject.shape.get(part)
        if mine is not None and mine != theirs:
            mine, theirs = (f"{one[:12]}…" if part == "tokenizer" else one for one in (mine, theirs))
            what = f"{part} {mine} is not that of {other}, {theirs}"
            case.refuse(subject.name, what, "hand over models of one architecture", "structure")
    silent = [part for part in ("family", "width", "layers", "vocabulary") if part not in subject.shape]
    if silent:
        case.note(f"{subject.name}: {' and '.join(silent)}, which its config.json does not state")


def trainable(case: Case) -> None:
    """Weights that a phase can train; a release may be packed."""
    for subject in case.subjects if case.contract.target != RELEASE else ():
        if subject.dense:
            case.refuse(subject.name, "its weights are packed: it can be run, not trained", subject.dense, "structure")


def metadata(case: Case) -> None:
    """Every required entry there with a value, and finite where it is a number. A manifest stores NaN as null."""
    for subject in case.subjects:
        for key in case.contract.required_metadata:
            value = _entry(case, subject, key)
            empty = value is None and key not in case.contract.nullable
            if empty or (isinstance(value, float) and not is_number(value)):
                what = f"metadata {key} is {'null: unknown, or not finite' if empty else value}"
                case.refuse(subject.name, what, f"make it again, or {_waiving(case, key)}", "metadata")


def distinct(case: Case) -> None:
    """No two models with the same value; entries without one are not compared."""
    for key in case.contract.distinct:
        seen: dict[str, str] = {}
        for subject in case.subjects if key not in case.contract.waive else ():
            value = subject.entry(key)
            if value is MISSING or value is None:
                continue
            first = seen.setdefault(str(value), subject.name)
            if first != subject.name:
                remedy = f"hand over models that differ, or {_waiving(case, key)}"
                case.refuse(subject.name, f"{key} {value!r} is that of {first} too", remedy, "structure")


def thresholds(case: Case) -> None:
    """Every number on the right side of its limit."""
    contract, millions = case.contract, case.target_parameters / 1e6
    scaled = {key: value * millions for key, value in contract.maximum_per_million.items()}
    tables = (("minimum", contract.minimum), ("maximum", contract.maximum), ("maximum_per_million", scaled))
    for subject in case.subjects:
        for table, limits in tables:
            for key, limit in limits.items():
                _threshold(case, subject, (table, key, limit))


def _waiving(case: Case, key: str) -> str:
    return f"--set '{case.setting('waive')}=[\"{key}\"]'"


def _threshold(case: Case, subject: Subject, rule: tuple[str, str, float]) -> None:
    table, key, limit = rule
    value = _entry(case, subject, key)
    if value is MISSING:
        return
    setting = case.setting(f"{table}.{key}")
    if not is_number(value):
        case.refuse(subject.name, f"{key} is {value!r}, not a number", "make it again", "metadata")
    elif table == "minimum" and value < limit:
        remedy = f"improve it, or --set {setting}={value:.4g} if this is enough"
        case.refuse(subject.name, f"{key} {value:.6g} is below the minimum {limit:.6g}", remedy, "threshold")
    elif table != "minimum" and value > limit:
        remedy = f"improve it, or change {setting} in the profile"
        case.refuse(subject.name, f"{key} {value:.6g} is above the maximum {limit:.6g}", remedy, "threshold")


def _entry(case: Case, subject: Subject, key: str) -> object:
    """A metadata entry. Missing, it is refused or noted as not known, once; waived, it is noted."""
    if key in case.contract.waive:
        case.note(f"{subject.name}: {key} (waived)")
        return MISSING
    value = subject.entry(key)
    if value is not MISSING:
        return value
    if not subject.known:
        case.note(f"{subject.name}: {key}")
    elif not any(one.model == subject.name and one.what == f"metadata {key} is missing" for one in case.found):
        remedy = f"run {case.contract.source} to make it, or {_waiving(case, key)}"
        case.refuse(subject.name, f"metadata {key} is missing", remedy, "metadata")
    return MISSING


def finite(case: Case) -> None:
    """No NaN and no infinity in any weight; one tensor in memory at a time."""
    for subject in case.subjects:
        refusal = next(_infinite(subject), None)
        if refusal:
            case.refuse(subject.name, refusal.what, refusal.remedy, "weights")


def _infinite(subject: Subject) -> Iterator[ArtifactError]:
    for name, tensor in subject.tensors():
        try:
            check_finite(tensor, name, subject.name, DIVERGED)
        except ArtifactError as error:
            yield error


RULES: tuple[Callable[[Case], None], ...] = (
    number,
    parameters,
    size,
    architecture,
    ancestry,
    trainable,
    metadata,
    distinct,
    thresholds,
)
