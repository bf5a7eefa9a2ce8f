"""Numbers and sentences about thoughts that the terminal, the page and its Markdown share."""

from __future__ import annotations

from agent_forge.dashboard import words
from agent_forge.dashboard.thoughts import segments
from agent_forge.dashboard.tree import Condition, Estimate, Example, Theater, Thinking

SHARE = "exact_match"
"""A metric that is shown in per cent."""
CONTROLS = ("condition", "right (95 %)", "of the gain lost (95 %)", "questions", "what was done")
"""Names of what :func:`control_rows` gives."""
STRATEGIES = ("strategy", "chosen freely", "asked by name: followed", "valid", "right answers")
FAMILIES = ("task", "thoughts", "valid", "right answers")
NATS = (
    ("before", "before step 2"),
    ("after", "after step 2"),
    ("continued", "after as much training without thoughts"),
)
STATES = {True: ("improved", "+", "met"), False: ("worse", "−", "not met"), None: ("no-signal", "?", "not used")}
"""Whether a requirement is met, to its class, its mark and its words."""
CONTROLS_ABOUT = (
    "The same questions under several conditions. If the thoughts do the work, answers go wrong with another "
    "question's thought, and with a filler of the same length."
)
THOUGHTS_ABOUT = (
    "Valid means well formed, and no statement that can be checked is false. Right answers: of those asked that way."
)
EXAMPLES_ABOUT = "Written by the model, right ones and wrong ones: samples, not a score."


def estimate(found: Estimate | None, share: bool = True) -> str:
    """``83.0 % (80.0 to 86.0)``, or three digits for what is no share."""
    if found is None or found.value is None:
        return words.NOTHING
    ends = [one for one in (found.low, found.high) if one is not None]
    if not share:
        shown = [words.digits(one, 3) for one in (found.value, *ends)]
        return shown[0] + (f" ({' to '.join(shown[1:])})" if ends else "")
    shown = [words.value(one, SHARE) for one in (found.value, *ends)]
    return shown[0] + (f" ({' to '.join(one.removesuffix(' %') for one in shown[1:])})" if ends else "")


def control_rows(thinking: Thinking) -> list[list[str]]:
    """Every condition with its accuracy, what it loses of the gain, its questions and its meaning."""
    return [
        [
            words.plain(one.name),
            estimate(one.accuracy),
            estimate(one.lost),
            words.NOTHING if one.n is None else f"{one.n:,}",
            one.meaning,
        ]
        for one in thinking.conditions
    ]


def without(thinking: Thinking) -> Condition | None:
    """The condition that the gain is counted from."""
    return next((one for one in thinking.conditions if one.name == "without thoughts"), None)


def judgement(theater: Theater) -> tuple[str, str, str]:
    """Class, mark and sentence: do the thoughts carry the answers?"""
    return {
        True: ("worse", "−", "Theater detected: the thoughts were not shown to carry the answers."),
        False: ("improved", "+", "No theater: every requirement that could be computed is met."),
        None: ("no-signal", "?", "Whether the thoughts carry the answers was not judged."),
    }[theater.detected]


def requirement(reason: str) -> tuple[bool | None, str]:
    """A line of the judgement as (met, what was found); None: not used."""
    for word, met in (("yes: ", True), ("no: ", False), ("not used: ", None)):
        if reason.startswith(word):
            return met, reason.removeprefix(word)
    return None, reason


def measures(theater: Theater) -> list[tuple[str, str, str]]:
    """Name, value and meaning of the two measures beside the controls; none where neither was recorded."""
    rows = []
    if theater.power is not None:
        about = "share of questions whose right answer is likelier after their own thought than after another's"
        rows.append(("predictive power", estimate(theater.power), about))
    if theater.correlation is not None or theater.note:
        about = "; ".join(filter(None, ("of a thought's coherence and a right answer, −1 to 1", theater.note)))
        rows.append(("correlation", estimate(theater.correlation, share=False), about))
    return rows


def totals(thinking: Thinking) -> list[tuple[str, str]]:
    """What all thoughts together are like, as pairs of label and value."""
    found = thinking.totals
    total, valid, rate = (found.get(key) for key in ("total", "valid", "validity_rate"))
    told = "" if total is None or valid is None else f"{valid:,.0f} of {total:,.0f}"
    share = "" if rate is None else words.value(rate, SHARE)
    rows = [("Valid thoughts", f"{told} ({share})" if told and share else told or share)]
    length, time = found.get("length"), found.get("milliseconds")
    rows.append(("Tokens per thought, mean", "" if length is None else words.digits(length)))
    rows.append(("Time per thought", "" if time is None else f"{words.digits(time)} ms"))
    for part in ("coherence", "semantic", "logical", "relevance", "fluency"):
        name = part.capitalize() if part == "coherence" else f"Coherence, {part}"
        rows.append((name, words.digits(found[part]) if part in found else ""))
    return [(label, shown) for label, shown in rows if shown]


def totals_line(thinking: Thinking) -> str:
    """The same in one line."""
    found = dict(totals(thinking))
    names = {"Valid thoughts": "{} valid", "Tokens per thought, mean": "{} tokens on average", "Time per thought": "{}"}
    told = [name.format(found[label]) for label, name in names.items() if label in found]
    parts = [f"{label.partition(', ')[2]} {shown}" for label, shown in found.items() if label.startswith("Coherence,")]
    if "Coherence" in found or parts:
        told.append(f"coherence {found.get('Coherence', words.NOTHING)}" + (f" ({', '.join(parts)})" if parts else ""))
    return "; ".join(told)


def strategy_rows(thinking: Thinking) -> list[list[str]]:
    """Each strategy: its share of the free thoughts; where a system message asks for it, how often it is followed, and
    how many of those thoughts are valid and lead to right answers."""
    keys = ("share", "followed", "valid", "right")
    return [
        [words.plain(name), *(words.value(row.get(key), SHARE) for key in keys)]
        for name, row in thinking.strategies.items()
    ]


def family_rows(thinking: Thinking) -> list[list[str]]:
    """Each task family with its thoughts, the valid ones, and right answers after them."""
    return [
        [
            words.plain(name),
            words.NOTHING if row.get("n") is None else f"{row['n']:,.0f}",
            *(words.value(row.get(key), SHARE) for key in ("valid", "right")),
        ]
        for name, row in thinking.families.items()
    ]


def first_step(thinking: Thinking) -> str:
    """Step 1 in one or two sentences; nothing where nothing was recorded."""
    counts, told = thinking.one.counts, []
    if counts.get("traces") is not None:
        told.append(f"{words.several(int(counts['traces']), 'written thought')} to learn from")
    for key, name in (("duplicates", "left out as duplicates"), ("refused", "refused as wrong")):
        if counts.get(key) is not None:
            told.append(f"{counts[key]:,.0f} {name}")
    parts = [f"{', '.join(told)}."] if told else []
    if counts.get("held_out_valid") is not None:
        parts.append(f"After training, {words.value(counts['held_out_valid'], SHARE)} of held-out thoughts were valid.")
    if thinking.one.converged is not None:
        parts.append("It converged." if thinking.one.converged else "It did not converge.")
    return " ".join(parts)


def second_step(thinking: Thinking) -> list[str]:
    """Step 2: what it did to the validation loss whatever its sign, and which model was kept."""
    two, told = thinking.two, []
    loss = [f"{words.value(two.nats[key], 'nats_per_token')} {name}" for key, name in NATS if key in two.nats]
    if loss:
        told.append(f"Validation nats per token (less is better): {', '.join(loss)}.")
    if {"after", "continued"} <= two.nats.keys():
        moved = two.nats["after"] - two.nats["continued"]
        better = "better" if moved < 0 else "worse" if moved > 0 else "the same"
        told.append(f"Against as much training without thoughts, step 2 changed it by {words.change(moved)}: {better}.")
    chosen = [f"{words.plain(name)} {words.value(share, SHARE)}" for name, share in two.select.items()]
    if chosen:
        told.append(f"Right answers on the select split: {', '.join(chosen)}.")
    if two.chosen:
        why = f": {two.why.rstrip('.')}" if two.why else ""
        told.append(f"Kept: the model of {words.plain(two.chosen)}{why}.")
    return told


def thought_lines(thought: str) -> list[str]:
    """A thought for people: ``step: 8+5+0=13``, one marker per line."""
    return [": ".join(filter(None, pair)) for pair in segments(thought)]


ANSWERS = {
    True: ("improved", "✓", "right"),
    False: ("worse", "✗", "wrong"),
    None: ("no-signal", "?", "not marked"),
}
"""Whether an answer is right, to its class, its mark and its word."""
VALID = {True: "valid", False: "not valid", None: ""}
"""Whether a thought is valid, in words; nothing where that was not recorded."""


def remarks(example: Example) -> list[str]:
    """What is said beside an example: whether its thought is valid, and its note."""
    valid = VALID[example.valid]
    return [line for line in (f"thought {valid}" if valid else "", example.note) if line]
