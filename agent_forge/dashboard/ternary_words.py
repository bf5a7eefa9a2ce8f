"""Numbers and sentences about phase 4 that the terminal, the page and its Markdown share.

Every sentence is built from what was measured; where a value is missing its part of the sentence is, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from agent_forge.dashboard import words
from agent_forge.dashboard.ternary import COPY, ROUNDED, SAME_BYTES
from agent_forge.dashboard.thoughts_words import SHARE, estimate
from agent_forge.dashboard.tree import Gate, Sized, Ternary

MODELS = ("model", "weights", "times smaller", "right (95 %)", "perplexity", "tokens per second")
"""Names of what :func:`model_rows` gives."""
LOST = ("level", "before", "not trained", "after", "change")
"""Names of what :func:`lost_rows` gives."""
LOSSES = ("training", "steps", "nats per token, first tenth", "last tenth")
"""Names of what :func:`loss_rows` gives."""
GRIDS = {
    "ternary": "linear maps in three values (−1, 0 or 1 times a scale)",
    "int8": "linear maps in 8 bits",
    "int4": "linear maps in 4 bits",
}
"""What the weights of a model are, by the first word of its name."""
CLAIMS = {
    "skills, with grace": "the skills",
    "mastered skills, with grace": "the levels that the parent had mastered",
    "text, with grace": "text",
}
"""Claims of the gate that leave something to lose, and what they are about."""
BACK = (("skills", "brought back", "the lost answers"), ("perplexity", "took back", "the added perplexity"))
"""What of a loss is recorded as recovered, and how that is said."""
TERMS = (
    ("ternary", "weights of three values: −1, 0 or 1 times a scale"),
    ("weights", "their bytes on disk; the parent's in float32, four bytes for every number"),
    ("right", "share of held-out questions whose answer is exactly right, with its 95 % interval"),
    ("perplexity", "between how many next tokens the model wavers in held-out text; 1 is certainty, less is better"),
    ("not trained", "rounded to fewer bits and measured as it is"),
    (
        "same bytes",
        "fewer weights at full precision in as many bytes, trained from nothing for as many steps",
    ),
    ("with grace", "what may be lost is taken off the parent's score first; improved then says: no more was lost"),
    ("gate", "what must be shown for the phase to count as a success; where it says no, it says why"),
)
"""Words that a newcomer may not know, and what they mean here."""
LOST_ABOUT = "A level is only a few questions: single levels are rough, the intervals above are of all levels."


def verdict(found: Ternary) -> str:
    """The phase in one sentence, the gate last; nothing where nothing was measured."""
    return _sentence([*(head for head, _ in glance(found)), gate_words(found.gate)])


def summary(found: Ternary) -> str:
    """The same without the gate."""
    return _sentence([head for head, _ in glance(found)])


def _sentence(parts: list[str]) -> str:
    told = "; ".join(filter(None, parts))
    return f"{told[0].upper()}{told[1:]}." if told else ""


def glance(found: Ternary) -> list[tuple[str, str]]:
    """Size, skill, text and speed, each as what changed and the values before and after; without those not measured."""
    parent, made = found.model(found.parent), found.model(found.made)
    parts = [_size(parent, made), _skill(found, parent, made), _text(parent, made), _speed(found, parent, made)]
    return [part for part in parts if part[0]]


def _size(parent: Sized | None, made: Sized | None) -> tuple[str, str]:
    times = ratio(parent, made)
    if times is None:
        return "", ""
    return f"{_times(times)} smaller", _moved(parent, made, lambda one: one.bytes and words.size(one.bytes))


def ratio(parent: Sized | None, made: Sized | None) -> float | None:
    """How many times smaller it is: by the bytes of both, else as it was recorded."""
    if parent and made and parent.bytes and made.bytes:
        return parent.bytes / made.bytes
    return made.ratio if made else None


def _skill(found: Ternary, parent: Sized | None, made: Sized | None) -> tuple[str, str]:
    """Share of the skills that is kept, where there certainly were any; else right answers as they are."""
    share = found.facts.get("quality/accuracy_retention")
    answers = _moved(parent, made, _right)
    if found.skilled and share is not None and share > 0:
        return (
            f"{words.percent(share)} of the skills kept",
            answers and f"counted above guessing; right answers {answers}",
        )
    return (f"right answers {answers}", "") if answers else ("", "")


def _text(parent: Sized | None, made: Sized | None) -> tuple[str, str]:
    moved = _moved(parent, made, _perplexity)
    if not (moved and parent and made and parent.perplexity and made.perplexity):
        return "", ""
    added = made.perplexity / parent.perplexity - 1
    if abs(added) < 0.0005:
        return "perplexity as before", moved
    return f"perplexity {100 * abs(added):.1f} % {'higher' if added > 0 else 'lower'}", moved


def _speed(found: Ternary, parent: Sized | None, made: Sized | None) -> tuple[str, str]:
    moved = _moved(parent, made, lambda one: one.rate and words.digits(one.rate))
    rates = [one.rate if one else None for one in (parent, made)]
    times = rates[1] / rates[0] if None not in rates else found.facts.get("performance/inference_speedup")
    if times is None or times <= 0:
        return "", ""
    slower = ", so slower" if times < 0.995 else ""
    return f"{_times(times)} as fast{slower}", f"{moved} tokens per second" if moved else ""


def _right(one: Sized) -> str | None:
    return words.value(one.accuracy.value, SHARE) if one.accuracy else None


def _perplexity(one: Sized) -> str | None:
    return words.digits(one.perplexity) if one.perplexity else None


def _moved(parent: Sized | None, made: Sized | None, shown: Callable[[Sized], str | None]) -> str:
    """``94.3 → 91.8 %``; nothing unless both were measured."""
    before, after = (shown(one) if one else None for one in (parent, made))
    if not before or not after:
        return ""
    return f"{before.removesuffix(' %') if after.endswith('%') else before} → {after}"


def _times(number: float) -> str:
    """``10.2 times``, ``0.71 times``, ``1.4 times``."""
    return f"{words.digits(number, 3 if number >= 10 else 2)} times"


def gate_words(gate: Gate | None) -> str:
    """``gate: passed``, or why it said no; nothing where it was not asked."""
    if gate is None:
        return ""
    if gate.passed:
        return "gate: passed"
    reasons = _reasons([reason.removeprefix("no: ") for reason in gate.reasons if reason.startswith("no: ")])
    return f"gate: no, because {', and '.join(reasons)}" if reasons else "gate: no"


def _reasons(lines: list[str]) -> list[str]:
    """The refusals, each in a clause; those that leave something to lose in one."""
    within, others = [], []
    for line in lines:
        claim = re.match(r"(.+?) needs (?:improved|not-worse)[,;]", line)
        if claim is None:
            others.append(re.sub(r", (\S+(?: %)? is (?:asked for|allowed))$", r" (\1)", line))
        elif claim[1] in CLAIMS:
            within.append(CLAIMS[claim[1]])
        else:
            others.append(f"“{words.plain(claim[1])}” was not shown")
    if within:
        listed = " and ".join(filter(None, (", ".join(within[:-1]), within[-1])))
        plural = len(within) > 1 or within[0] != "text"
        others.insert(0, f"{listed} {'were' if plural else 'was'} not shown to stay within what is allowed")
    return others


def meaning(found: Ternary, one: Sized) -> str:
    """What a model is, in a clause; nothing for one that is not known."""
    if one.name == found.parent:
        return "as it came into this phase, weights in float32"
    if one.name == SAME_BYTES:
        return "a narrower model in float16, trained from nothing on the same batches"
    kind, _, rest = one.name.partition(", ")
    grid = GRIDS.get(kind, "")
    if not grid:
        return ""
    if one.name == found.made:
        return grid + {True: ", trained on that grid", False: ", rounded and not trained", None: ""}[found.trained]
    if one.name == f"{found.made}, {COPY}":
        return "the same weights as floats, which later phases train; activations not rounded"
    if one.name == found.rounded and found.trained is not None:
        same, apart = "the same: it was handed on as it was rounded", "the difference is what training adds"
        return f"rounded to the same grid and left so: {apart}" if found.trained else same
    return f"{grid}, rounded and not trained" if rest == ROUNDED else grid


def different(found: Ternary) -> list[Sized]:
    """The models that differ: one that was only rounded is what was made, where training was not taken."""
    return [one for one in found.models if found.trained is not False or one.name != found.rounded]


def model_rows(found: Ternary) -> list[list[str]]:
    """Every model with its bytes, its skills with their interval, its text and its speed."""
    parent = found.model(found.parent)
    return [
        [
            words.plain(one.name),
            words.size(one.bytes),
            words.NOTHING if (times := ratio(parent, one)) is None else words.digits(times),
            estimate(one.accuracy),
            words.digits(one.perplexity),
            words.digits(one.rate),
        ]
        for one in found.models
    ]


def questions(found: Ternary) -> str:
    """``600 questions``; nothing where that was not recorded."""
    counts = sorted({one.n for one in found.models if one.n is not None})
    return f"{' to '.join(f'{n:,}' for n in counts[:: max(1, len(counts) - 1)])} questions" if counts else ""


def rounding_title(found: Ternary) -> str:
    """A heading for :func:`rounding`."""
    return "What rounding took" + (", what training brought back" if found.trained else "")


def rounding(found: Ternary) -> list[str]:
    """What rounding alone did, and what training brought back, in sentences."""
    told = []
    parent, alone = found.model(found.parent), found.model(found.rounded)
    if found.trained is False:
        alone = alone or found.model(found.made)
    moved = [_moved(parent, alone, _right), _moved(parent, alone, _perplexity)]
    parts = [f"right answers {moved[0]}" if moved[0] else "", f"perplexity {moved[1]}" if moved[1] else ""]
    if any(parts):
        told.append(f"Rounding alone, nothing trained: {'; '.join(filter(None, parts))}.")
    back = [
        f"{verb} {words.percent(share) if share >= 0 else 'none'} of {what}"
        for key, verb, what in BACK
        if (share := found.recovery.get(key)) is not None
    ]
    if found.trained and back:
        told.append(f"Training with the rounding in place {' and '.join(back)}.")
    return told + _chosen(found)


def _chosen(found: Ternary) -> list[str]:
    """Which of the two was kept, and by which numbers."""
    told = []
    if found.trained is False and found.made in found.select:
        told.append("Training made it no better on the select split, so the rounded one was kept.")
    elif found.trained is False and found.rounded in found.select:
        told.append("Nothing was trained: what was only rounded was handed on.")
    chosen = [f"{words.plain(name)} {words.value(share, SHARE)}" for name, share in found.select.items()]
    if chosen:
        told.append(f"Right answers on the select split, which decided: {'; '.join(chosen)}.")
    return told


def loss_rows(found: Ternary) -> list[list[str]]:
    """Every training: its steps, its loss in the first and in the last tenth of them, on average."""
    rows = []
    for name, points in found.losses.items():
        tenth = max(1, len(points) // 10)
        ends = (points[:tenth], points[-tenth:])
        means = [words.digits(sum(value for _, value in end) / len(end)) for end in ends]
        rows.append([words.plain(name), f"{points[-1][0]:,.0f}", *means])
    return rows


def lost_rows(found: Ternary, most: int = 8) -> list[list[str]]:
    """The levels that lost most right answers, in per cent, the largest loss first; none where none was lost."""
    before, after = (found.levels.get(name, {}) for name in (found.parent, found.made))
    alone = found.levels.get(found.rounded, {})
    moved = sorted((after[cell] - share, cell) for cell, share in before.items() if cell in after)
    return [
        [
            words.plain(cell),
            *(words.value(side.get(cell), SHARE).removesuffix(" %") for side in (before, alone, after)),
            words.change(change, SHARE),
        ]
        for change, cell in moved[:most]
        if change < 0
    ]


def lost_line(found: Ternary) -> str:
    """How many levels lost right answers and how many gained some; nothing where levels were not recorded."""
    before, after = (found.levels.get(name, {}) for name in (found.parent, found.made))
    moved = [after[cell] - share for cell, share in before.items() if cell in after]
    if not moved:
        return ""
    down, up = sum(change < 0 for change in moved), sum(change > 0 for change in moved)
    return (
        f"Of {words.several(len(moved), 'level')}, {down or 'none'} lost right answers, {up or 'none'} gained some and "
        f"{len(moved) - down - up or 'none'} stayed as {'it was' if len(moved) - down - up == 1 else 'they were'}."
    )


def facts(found: Ternary) -> list[tuple[str, str]]:
    """Further numbers, as pairs of label and value."""
    known, rows = found.facts, []

    def add(label: str, name: str, shown: Callable[[float], str]) -> None:
        if name in known:
            rows.append((label, shown(known[name])))

    add("Weights in memory", "performance/memory_reduction", lambda n: f"{words.digits(n)} times fewer bytes")
    add("Weights that are zero", "compression/sparsity_ratio", words.percent)
    add("Linear maps made small", "compression/layers_compressed", lambda n: f"{n:,.0f}")
    add("A weight is zero up to", "compression/threshold", lambda n: f"{words.digits(n)} scales")
    add("Time of a token, median", "bitnet/speed/latency_p50_ms", lambda n: f"{words.digits(n)} ms")
    add("Slowest 5 % of tokens, from", "bitnet/speed/latency_p95_ms", lambda n: f"{words.digits(n)} ms")
    add("Rows calibrated on", "bitnet/calibration_samples", lambda n: f"{n:,.0f}")
    add("Mean distance from the grid", "bitnet/quantization_error", words.digits)
    return rows


def outputs(found: Ternary) -> list[tuple[str, str]]:
    """Both models that came out: what each is for, and its id."""
    names = (("Packed, which chat and serve run", found.packed), ("Its float copy, to be trained on", found.dense))
    return [pair for pair in names if pair[1]]
