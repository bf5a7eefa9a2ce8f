"""What the terminal shows of phase 3: the controls beside the gate, the judgement, examples, thoughts in the talk."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent_forge.cli.show import METRICS, show_results, show_thinking
from agent_forge.dashboard import words
from agent_forge.dashboard.thoughts import thinking
from forgekit.measure.evidence import Evidence
from tests.unit import sample_session as sample


@pytest.fixture
def shown(capsys, monkeypatch):
    """Shows a result as after a run; gives stdout, stderr, and both without line breaks."""
    monkeypatch.setenv("COLUMNS", "160")

    def show(result: dict[str, Any]) -> SimpleNamespace:
        evidence = [Evidence.build(record, "evidence") for record in result["evidence"]]
        parts = {key: result[key] for key in ("metrics", "artifacts", "duration_seconds")}
        show_results(
            SimpleNamespace(session_id="0123456789"), {"quietstar": SimpleNamespace(evidence=evidence, **parts)}
        )
        out, err = capsys.readouterr()
        return SimpleNamespace(out=out, err=err, all=" ".join(f"{out}\n{err}".split()))

    return show


def result(**artifacts: Any) -> dict[str, Any]:
    """The sample's phase 3."""
    found = sample.phase_3("thinker", "champion")
    found["artifacts"] |= artifacts
    return found


def rows(out: str, first: str) -> list[list[str]]:
    """The lines of a table that begin with a word, cut at two or more spaces."""
    lines = (line.strip() for line in out.splitlines())
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines if line.startswith(first)]


def test_the_controls_are_printed_with_their_intervals_in_order(shown):
    out = shown(result()).out
    assert "quietstar: do the thoughts carry the answers? 600 questions" in out
    names = [row["condition"] for row in sample.controls()]
    places = [out.index(f"\n {name}") for name in names]
    assert places == sorted(places)
    assert rows(out, "with thoughts") == [
        ["with thoughts", "83.0", "80.0 to 86.0", "-", "the model thinks, then answers"]
    ]
    assert rows(out, "shuffled") == [
        [
            "shuffled thoughts",
            "18.0",
            "15.0 to 21.0",
            "93.0",
            "88.0 to 97.0",
            "the thought of another question <of its kind>",
        ]
    ]


def test_a_condition_that_was_not_measured_is_a_dash(shown):
    found = result()
    del found["metrics"]["controls"][0]["accuracy"]
    (own,) = rows(shown(found).out, "with thoughts")
    assert own == ["with thoughts", "-", "-", "the model thinks, then answers"]


def test_the_judgement_stands_directly_before_the_gate(shown):
    err = shown(result()).err.splitlines()
    judged = err.index("No theater: every requirement that could be computed is met.")
    gate = err.index("gate quietstar: passed")
    assert err[judged + 1 : gate] == [
        "  + met: thoughts add +70.0 [+66.0, +74.0] points to thinking off; needs more than 0",
        "  + met: filler thoughts lose 101 % [97, 105] of the gain; needs at least 50%",
        "  ? not used: coherence and right answers: coherence was not scored",
        "  predictive power 99.0 % (98.0 to 100.0): share of questions whose right answer is likelier after their own "
        "thought than after another's",
        "  correlation 0.410 (0.330 to 0.490): of a thought's coherence and a right answer, −1 to 1; over 600 "
        "questions",
    ]


def test_theater_is_told(shown):
    found = result(gate={"passed": False, "reasons": ["no: the thoughts are theater [see above]", "yes: x"]})
    found["metrics"]["theater"] = sample.theater(detected=True)
    said = shown(found)
    assert "Theater detected: the thoughts were not shown to carry the answers." in said.err
    assert "− not met: filler thoughts lose 12 % [3, 21] of the gain" in said.all
    assert "gate quietstar: said no" in said.err and "no: the thoughts are theater [see above]" in said.err
    assert "yes: x" not in said.err


def test_a_thought_stands_apart_from_its_answer_line_by_line(shown):
    out = shown(result()).out
    lines = out[out.index("example thoughts") :].splitlines()
    at = next(i for i, line in enumerate(lines) if "add 57 66" in line)
    assert [line.split("  ")[0] for line in lines[at : at + 1]] == [" mece"]
    assert "step: 7+6+0=13" in lines[at] and "133" in lines[at] and "wrong, it is 123" in lines[at]
    assert "step: 5+6+1=13" in lines[at + 1] and "thought not valid" in lines[at + 1]
    assert "wrong: step 2 is false" in lines[at + 2]


def test_thoughts_and_answers_full_of_brackets_are_shown_as_they_are(shown):
    said = shown(result())
    assert "[red]as it is[/]" in said.out and "reason: [b]c" in said.out and sample.NASTY in said.out


def test_few_examples_are_printed_and_the_rest_is_named(shown):
    out = shown(result(examples=sample.examples() * 3)).out
    assert "example thoughts (6 of 9, all of them in the report)" in out
    assert out.count("add 38 25") == 3 and out.count("wrong, it is") == 3 + 1, "one more in the conversation"
    right, wrong, _ = sample.examples()
    out = shown(result(examples=[right] * 9 + [wrong])).out
    assert out.count("add 57 66") == 1 and "(6 of 10," in out, "a wrong one behind many right ones is shown"


def test_the_conversation_has_a_column_for_thoughts_only_where_there_are_some(shown):
    with_thoughts = shown(result()).out.partition("a short conversation")[2]
    assert rows(with_thoughts, "model") == [["model", "asked", "thought", "answered"]]
    assert "expert: clerk" in with_thoughts and "step: 1 2" in with_thoughts
    without = shown(result(conversation=sample.talk(("thinker",)))).out.partition("a short conversation")[2]
    assert rows(without, "model") == [["model", "asked", "answered"]] and "wrong, it is v3" in without


def test_the_steps_and_the_thoughts_are_told_in_lines(shown):
    said = shown(result()).all
    for line in (
        "thoughts: 540 of 600 (90.0 %) valid; 31.2 tokens on average; 2.10 ms; coherence 0.780 (semantic 0.710, "
        "logical 0.930, relevance 0.660, fluency 0.810)",
        "step 1: 22,424 written thoughts to learn from, 76 left out as duplicates, 0 refused as wrong. After training, "
        "88.0 % of held-out thoughts were valid. It converged.",
        "step 2: Against as much training without thoughts, step 2 changed it by +0.01: worse.",
        "step 2: Kept: the model of step 1: step 2 answers no better on the select split.",
        "mece 13.0 % 98.0 % 91.0 % 90.0 %",
    ):
        assert line in said, line


def test_small_changes_of_the_loss_keep_their_digits(shown):
    assert rows(shown(result()).out, "-") == [
        ["-", "step 2 at equal compute", "1.870", "1.880", "+0.004 +0.016", "-", "400"]
    ]


def test_every_metric_has_one_name_here_and_on_the_page():
    for metric in ("exact_match", "nats_per_token", "valid_thoughts", "skills_with_grace"):
        assert METRICS[metric].partition(" (")[0] == words.METRICS[metric][0]


def test_nothing_is_printed_of_what_was_not_measured(capsys):
    show_thinking("cognate", thinking({"levels": {}}, {"conversation": []}))
    assert capsys.readouterr() == ("", "")


WRONG = (None, [], {}, "text", 7, [None, 3, "x", [], {}], {"a": None, "b": [1]}, float("nan"))


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize(
    "path",
    ["metrics.controls", "metrics.theater", "metrics.thoughts", "metrics.steps", "metrics.levels",
     "metrics.theater.reasons", "metrics.theater.correlation", "metrics.thoughts.by_strategy",
     "metrics.thoughts.total", "metrics.steps.one", "metrics.steps.two", "metrics.steps.two.nats",
     "artifacts.examples", "artifacts.conversation", "artifacts.gate"],
)  # fmt: skip
def test_no_damage_spoils_the_rest(shown, path, value):
    found = result()
    inside: Any = found
    *above, last = path.split(".")
    for name in above:
        inside = inside[name]
    inside[last] = value
    said = shown(found)
    assert (
        "thoughts help where the parent is below half" in said.out and "next: agent-forge report 01234567" in said.err
    )
    assert "nan" not in said.all.split()


def test_the_terminal_needs_no_torch():
    code = "import agent_forge.cli.show, agent_forge.dashboard.thoughts_words, sys; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
