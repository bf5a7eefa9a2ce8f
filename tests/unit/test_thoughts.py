"""Thoughts: what is written about gym questions holds, what is changed does not, and only what should be is learned."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgekit.data.batches import ProblemSource
from forgekit.data.gym import FAMILIES, generate, solve, split_of
from forgekit.data.plans import GymMix
from forgekit.data.thoughts import (
    CLOSE,
    MARKERS,
    OPEN,
    STRATEGIES,
    Segment,
    Thought,
    TraceSource,
    check,
    conclusion,
    parse,
    strategy_of,
    write_traces,
)
from forgekit.data.thoughts.form import DOUBT, EXPERT, STEP
from forgekit.data.thoughts.views import WORDS, family_of, view
from forgekit.data.tokenizer import ASSISTANT, END, PAD, SYSTEM, THINKING, question, train_tokenizer
from forgekit.errors import ConfigError, DataError
from forgekit.models.constants import IGNORE

NOTATED = ("add", "state", "lookup", "words", "program")
LEVELS = tuple(range(1, 11))
quick = settings(max_examples=200, deadline=None, derandomize=True)
DEFAULT = (
    GymMix(family="add", levels=(2, 4, 5)),
    *(GymMix(family=name, levels=(3, 4, 5)) for name in ("state", "lookup", "words", "program")),
)


def thought_about(prompt: str, name: str, seed: int = 0) -> Thought | None:
    return STRATEGIES.get(name).write(view(prompt), np.random.default_rng(seed))


def said(*pieces: str) -> str:
    """A thought of steps, unless a piece brings its own marker."""
    return OPEN + "".join(p if p.startswith(MARKERS) else STEP + p for p in pieces) + CLOSE


@pytest.fixture(scope="module")
def tokenizer():
    prompts = [f"{p.prompt} {p.answer}" for name in FAMILIES.names() for p in generate(name, 2, 20, seed=0)]
    return train_tokenizer([*prompts, *WORDS, "guess now odd even links lines"], 420)


@pytest.fixture(scope="module")
def book():
    return write_traces(DEFAULT, 150, seed=1)


@pytest.mark.parametrize("name", STRATEGIES.names())
@pytest.mark.parametrize("family", FAMILIES.names())
def test_every_thought_holds_and_leads_to_the_answer(family, name):
    written = 0
    for level in LEVELS:
        for number, problem in enumerate(generate(family, level, 6, seed=level)):
            assert solve(problem).answer == view(problem.prompt).answer == problem.answer
            thought = thought_about(problem.prompt, name, number)
            if thought is None:
                continue
            written += 1
            text = str(thought)
            found = check(problem.prompt, text)
            assert found.valid and found.well_formed and not found.false, text
            assert found.mended == (name == "doubt") and found.statements + found.unchecked == len(thought.segments)
            assert str(parse(text)) == text and check(problem.prompt, parse(text)) == found
            assert conclusion(problem.prompt, text) == (problem.answer if family in NOTATED else None)
            assert strategy_of(text) == name
    assert written or (family not in NOTATED and name in ("mece", "falsify", "orthogonal", "bayes", "doubt"))
    if family in NOTATED:
        assert written > 50


@pytest.mark.parametrize("family", NOTATED)
def test_a_changed_symbol_in_a_step_is_found(family):
    """Every digit and letter of every step, replaced by another one."""
    rng, tried = np.random.default_rng(0), 0
    for level in (1, 3, 5, 8):
        for problem in generate(family, level, 4, seed=7):
            steps = view(problem.prompt).steps
            for number, step in enumerate(steps):
                for at in (i for i, c in enumerate(step) if c.isalnum()):
                    pool = "0123456789" if step[at].isdigit() else "abcdefghijklmnopqrstuvwxyz"
                    other = pool[int(rng.integers(len(pool)))]
                    changed = f"{step[:at]}{other}{step[at + 1 :]}"
                    if changed in steps or changed.strip() in view(problem.prompt).facts:
                        continue
                    found = check(problem.prompt, said(*steps[:number], changed, *steps[number + 1 :]))
                    assert found.false == 1 and not found.valid and found.well_formed, (problem.prompt, changed)
                    tried += 1
    assert tried > 70


def test_a_doubt_mends_the_slip_before_it_and_nothing_else():
    right, wrong = ("8+5+0=13", "3+2+1=6"), "8+5+0=12"
    for pieces, mended, false in [
        ((wrong, f"{DOUBT}{right[0]}", right[1]), 1, 0),
        ((wrong, right[1]), 0, 1),
        ((wrong, right[0], right[1]), 0, 1),
        ((wrong, f"{DOUBT}{wrong}", right[1]), 0, 2),
        ((wrong, f"{DOUBT}8+5+0=11", f"{DOUBT}{right[0]}", right[1]), 1, 1),
        ((wrong, f"{EXPERT}clerk", f"{DOUBT}{right[0]}"), 0, 1),
        ((right[0], f"{DOUBT}{right[0]}", right[1]), 0, 0),
        ((right[0], right[1], f"{DOUBT}{wrong}"), 0, 1),
        ((right[0], wrong), 0, 1),
    ]:
        found = check("add 38 25", said(*pieces))
        assert (found.mended, found.false, found.valid) == (mended, false, not false), pieces


def test_true_elsewhere_is_false_here():
    assert check("add 38 25", said("8+5+0=13", "3+2+1=6")).true == 2
    assert check("add 38 25", said("2+2=4")).false == 1
    assert check("please add", said("2+2=4")).true == 1
    for family in NOTATED:
        one, two = (generate(family, 3, 1, seed=seed)[0].prompt for seed in (1, 2))
        own = set(view(one).steps) & set(view(two).steps)
        foreign = [step for step in view(two).steps if step not in own]
        assert foreign and check(one, said(*foreign)).false == len(foreign)


def test_a_guess_and_a_role_are_neither_right_nor_wrong():
    for text in ("guess 7", "clerk", "as coins", "solver", "as a game"):
        found = check("add 38 25", said(text))
        assert (found.statements, found.unchecked, found.valid) == (0, 1, True), text
    assert check("add 38 25", said("now 64")).false == 1 and check("add 38 25", said("now 63")).true == 1


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("12 / 4 = 3", True),
        ("2+2=5", False),
        ("2+3*4=14", True),
        ("2+3*4=20", False),
        ("10-2-3=5", True),
        ("8/4/2=1", True),
        ("2*3/4*2=3", True),
        ("1/3+1/3+1/3=1", True),
        ("7/2=3", False),
        ("-3--2=-1", True),
        ("3*-2=-6", True),
        ("1/0=1", False),
        ("0/5=0", True),
        ("2 +\n2=4", True),
        ("so 2+2=4, and 3*3=8", False),
        ("1. 2+2=4", True),
        ("2+2=4.", True),
        ("2+2=4. 5 is next", True),
        ("(2+2=5)", False),
        ("2+2=4 (since)", True),
        ("2+2=5 -> b", False),
        ("x = 2+3 = 5", True),
        ("x = 2+3 = 6", False),
        ("1+1=2,2+2=5", False),
        ("9" * 39 + "+1=1" + "0" * 39, True),
        # What is not an equation between whole numbers, or only looks like one, is left alone.
        ("because it is so", None),
        ("2=2", None),
        ("1.5+2=3.5", None),
        ("0.5+2+1.5=4", None),
        ("1+2=3.5", None),
        ("7/2=3.5", None),
        ("y-2+3=1", None),
        ("x - 2+3 = 1", None),
        ("x -2+3=1", None),
        ("(1+2)*3=9", None),
        ("(4)-1+2=5", None),
        ("3+2=4+1", None),
        ("1+1=2+1=3", None),
        ("2+3=5x", None),
        ("2+3=5(x)", None),
        ("1,000+1=1001", None),
        ("1000+1=1,001", None),
        ("12 2+1=3", None),
        ("9" * 6000 + "+1=2", None),
        ("1+2=" + "3" * 6000, None),
        ("1+" * 5000, None),
        ("1+" * 5000 + "1=5001", None),
        ("1 +" + " " * 5000 + "x", None),
    ],
)
def test_equations_of_other_texts_are_computed(text, verdict):
    found = check("How much is it?", said(text))
    counts = {True: (1, 1, 0), False: (1, 0, 0), None: (0, 0, 1)}[verdict]
    assert (found.statements, found.true, found.unchecked) == counts
    assert found.valid is (verdict is not False)


@settings(quick, max_examples=100)
@given(st.lists(st.integers(-99, 99), min_size=2, max_size=6), st.data())
def test_equations_agree_with_python(numbers, data):
    signs = data.draw(st.lists(st.sampled_from("+-*"), min_size=len(numbers) - 1, max_size=len(numbers) - 1))
    blank = data.draw(st.sampled_from(["", " "]))
    left = str(numbers[0]) + "".join(f"{blank}{s}{blank}{n}" for s, n in zip(signs, numbers[1:]))
    off = data.draw(st.integers(-3, 3))
    # The left side holds whole numbers and + - * alone.
    assert check("?", said(f"{left}{blank}={blank}{eval(left) + off}")).true == (off == 0)


@quick
@given(st.text(alphabet="add folwtrackrun 0123456789+-*/=.,;:>?()x\n" + "".join("<step>"), max_size=60))
def test_no_text_breaks_the_checks(text):
    for prompt in (text, f"add {text}", f"track {text}", f"follow {text}", f"run {text}", f"{text} How many?", "?"):
        for thought in (text, said(text) if text.strip() and not any(t in text for t in THINKING) else OPEN):
            check(prompt, thought)
            conclusion(prompt, thought)


@pytest.mark.parametrize(
    "prompt",
    ["track 5", "follow a>b b>a ? a 0", "follow a>b b>a ? a -1", "Tom has 3 apples. How many?"]
    + ["add 1", "follow a>b ? a 2", "run print x", "run x = y + 1; print x", "larger 5", "sort", "recall ? a", ""]
    + ["follow a>b b>a ? a 999999999999", "add " + "9" * 5000 + " 1", "track " + "9" * 5000 + " +1"],
)
def test_questions_with_nothing_to_work_out_are_texts_like_others(prompt):
    assert view(prompt) is None and family_of(prompt) is None and conclusion(prompt, said("1+1=2")) is None
    assert check(prompt, said("1+1=2")).true == 1 and check(prompt, said("1+1=3")).false == 1


def test_names_of_several_letters_are_followed():
    known = view("follow ab>cd cd>ab ? ab 2")
    assert known.steps == (" ab>cd", " cd>ab") and known.inverse == "ab<cd"


@pytest.mark.parametrize(
    "text",
    [
        "",
        OPEN,
        CLOSE,
        OPEN + CLOSE,
        f"{OPEN}{STEP}{CLOSE}",
        f"{OPEN}{STEP} {CLOSE}",
        f"{OPEN}{STEP}1+1=2",
        f"{STEP}1+1=2{CLOSE}",
        f"{OPEN}1+1=2{CLOSE}",
        f"{OPEN}well {STEP}1+1=2{CLOSE}",
        f"{OPEN}{STEP}{STEP}1+1=2{CLOSE}",
        f"{OPEN}{STEP}a{OPEN}{STEP}b{CLOSE}{CLOSE}",
        f"{OPEN}{STEP}a{CLOSE}{STEP}b{CLOSE}",
        f"{OPEN}{STEP}a{CLOSE}2",
        f" {OPEN}{STEP}a{CLOSE}",
    ],
)
def test_what_is_no_thought_is_not_well_formed(text):
    assert parse(text) is None and conclusion("add 38 25", text) is None
    found = check("add 38 25", text)
    assert not found.well_formed and not found.valid and found.statements == 0


@pytest.mark.parametrize(("marker", "text"), [(OPEN, "a"), ("<hm>", "a"), (STEP, ""), (STEP, " "), (STEP, f"a{DOUBT}")])
def test_a_segment_that_is_none_is_refused(marker, text):
    with pytest.raises(DataError, match="is no segment"):
        Segment(marker, text)


def test_the_default_mix_gives_traces_enough(book):
    assert len(book.traces) >= 1600 and not book.refused
    assert len({(t.problem.prompt, str(t.thought)) for t in book.traces}) == len(book.traces)
    assert len(book.traces) + book.duplicates == 150 * 15
    table = book.table()
    assert set(table) == set(NOTATED) and sum(sum(row.values()) for row in table.values()) == len(book.traces)
    assert all(set(row) == set(STRATEGIES.names()) for row in table.values()), "seven strategies in every family"
    assert all(check(t.problem.prompt, str(t.thought)).valid for t in book.traces)
    assert {strategy_of(str(t.thought)) == t.strategy for t in book.traces} == {True}


def test_the_same_seed_writes_the_same_traces(book):
    mix = DEFAULT[:2]
    one, two, three = (write_traces(mix, 30, seed=seed) for seed in (4, 4, 5))
    assert one.traces == two.traces and one.duplicates == two.duplicates
    assert not {t.problem.prompt for t in one.traces} == {t.problem.prompt for t in three.traces}


@pytest.mark.parametrize("split", ["train", "select", "report"])
def test_traces_stay_in_their_split(split):
    traces = write_traces(DEFAULT, 20, seed=2, split=split).traces
    assert len(traces) > 200 and {split_of(t.problem.prompt) for t in traces} == {split}


def test_strategies_are_drawn_by_their_weights():
    mix = [GymMix(family="add", levels=(8,))]
    alike = Counter(t.strategy for t in write_traces(mix, 700, seed=0).traces)
    assert set(alike) == set(STRATEGIES.names()) and all(70 < n < 130 for n in alike.values()), alike
    drawn = Counter(t.strategy for t in write_traces(mix, 400, seed=0, weights={"mece": 3, "bayes": 1}).traces)
    assert set(drawn) == {"mece", "bayes"} and 255 < drawn["mece"] < 345, drawn
    assert set(Counter(t.strategy for t in write_traces(mix, 50, 0, weights={"doubt": 1, "mece": 0}).traces)) == {
        "doubt"
    }


def test_a_strategy_with_nothing_to_say_gives_way():
    mix = [GymMix(family="copy", levels=(2,))]
    traces = write_traces(mix, 40, seed=0, weights={"mece": 1.0, "expert": 1e-9}).traces
    assert {t.strategy for t in traces} == {"expert"}
    with pytest.raises(DataError, match="gym copy: no strategy can write about it"):
        write_traces(mix, 40, seed=0, weights={"mece": 1.0})


@pytest.mark.parametrize("family", sorted(set(FAMILIES.names()) - set(NOTATED)))
def test_families_without_a_notation_are_written_too(family):
    book = write_traces([GymMix(family=family, levels=(3, 7))], 40, seed=0)
    assert not book.refused and len(book.traces) + book.duplicates == 80
    assert {"expert", "domains"} <= {t.strategy for t in book.traces}


@pytest.mark.parametrize("weights", [{"mece": -1.0}, {"mece": 0.0}, {"mece": float("nan")}, {"mece": float("inf")}])
def test_weights_that_are_none_are_refused(weights):
    with pytest.raises(ConfigError, match="weights.*above 0"):
        write_traces(DEFAULT, 2, seed=0, weights=weights)


def test_unknown_strategies_and_empty_mixes_are_refused():
    with pytest.raises(ConfigError, match="mecee"):
        write_traces(DEFAULT, 2, seed=0, weights={"mecee": 1.0})
    with pytest.raises(DataError, match="no trace was written"):
        write_traces([], 2, seed=0)


def test_told_is_a_share():
    counts = [sum(t.told for t in write_traces(DEFAULT[:1], 300, 0, told=told).traces) for told in (0.0, 0.3, 1.0)]
    total = len(write_traces(DEFAULT[:1], 300, 0).traces)
    assert counts[0] == 0 and counts[2] == total and 0.24 < counts[1] / total < 0.36


def items(source) -> list[tuple[list[int], list[int], list[int]]]:
    """Prompt, answer and the answer's labels of everything in a packed source."""
    spans = zip(source.start.tolist(), source.prompt_size.tolist(), source.size.tolist())
    rows = [(source.tokens[s : s + n].tolist(), source.labels[s : s + n].tolist(), p) for s, p, n in spans]
    assert all(set(labels[:p]) == {IGNORE} for _, labels, p in rows), "prompts are not learned"
    return [(tokens[:p], tokens[p:], labels[p:]) for tokens, labels, p in rows]


def test_everything_but_slips_is_learned(tokenizer, book):
    traces = book.traces[::7]
    slips = 0
    for trace, (asked, answer, labels) in zip(traces, items(TraceSource(tokenizer, traces)), strict=True):
        prompt = tokenizer.decode(asked, skip_special_tokens=False)
        system = f"{SYSTEM}{trace.strategy}{END}" if trace.told else ""
        assert prompt == system + question(trace.problem.prompt)
        text = tokenizer.decode(answer, skip_special_tokens=False)
        assert text == f"{trace.thought}{trace.problem.answer}{END}"
        assert answer == tokenizer.encode(text).ids, "pieces are cut where the tokenizer cuts"
        assert all(label in (token, IGNORE) for token, label in zip(answer, labels))
        hidden = tokenizer.decode([t for t, label in zip(answer, labels) if label == IGNORE])
        assert hidden == "".join(s.text for s in trace.thought.segments if s.slip)
        slips += bool(hidden)
    assert slips == sum(trace.strategy == "doubt" for trace in traces) > 20
    assert 0 < sum(trace.told for trace in traces) < len(traces)


def test_packed_traces_are_whole_and_labels_follow(tokenizer, book):
    source = TraceSource(tokenizer, book.traces)
    inputs, labels = source.rows(np.random.default_rng(0), 12, 128)
    again, _ = source.rows(np.random.default_rng(0), 12, 128)
    assert inputs.shape == labels.shape == (12, 128) and np.array_equal(inputs, again)
    inside = labels[:, :-1] != IGNORE
    assert np.array_equal(labels[:, :-1][inside], inputs[:, 1:][inside])
    known = {str(trace.thought) + trace.problem.answer for trace in book.traces}
    for row in inputs.tolist():
        text = tokenizer.decode(row, skip_special_tokens=False)
        found = re.findall(rf"{re.escape(ASSISTANT)}(.*?){re.escape(END)}", text)
        assert len(found) >= 1 and set(found) <= known


def test_no_traces_are_refused(tokenizer):
    with pytest.raises(DataError, match="no traces"):
        TraceSource(tokenizer, [])


def test_problems_are_packed_as_they_were(tokenizer):
    """Against a construction of its own: one encoding per text, one list per row."""
    problems = generate("sort", 2, 30, seed=0) + generate("words", 5, 30, seed=0) + generate("copy", 9, 30, seed=0)
    pad, length, rows = tokenizer.token_to_id(PAD), 40, 25
    pairs = [(tokenizer.encode(question(p.prompt)).ids, tokenizer.encode(p.answer + END).ids) for p in problems]
    fits = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= length + 1]
    assert 0 < len(fits) < len(pairs)
    least = min(len(q) + len(a) for q, a in fits)
    drawn = np.random.default_rng(5).integers(0, len(fits), size=1 + rows * (1 + (length + 1) // least))
    queue = [fits[i] for i in drawn]
    inputs, labels = [], []
    for _ in range(rows):
        line, target = [], []
        while len(line) + len(queue[0][0]) + len(queue[0][1]) <= length + 1:
            asked, answer = queue.pop(0)
            line += asked + answer
            target += [IGNORE] * len(asked) + answer
        short = length + 1 - len(line)
        inputs.append((line + [pad] * short)[:-1])
        labels.append((target + [IGNORE] * short)[1:])
    found = ProblemSource(tokenizer, problems).rows(np.random.default_rng(5), rows, length)
    assert np.array_equal(found[0], inputs) and np.array_equal(found[1], labels)
