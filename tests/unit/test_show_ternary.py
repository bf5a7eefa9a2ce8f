"""What the terminal shows of phase 4: the verdict, every model, what rounding and training did, levels that fit."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from agent_forge.cli.show import METRICS, show_evidence, show_results, show_ternary
from agent_forge.dashboard import words
from agent_forge.dashboard.ternary import ternary
from forgekit.measure.evidence import Evidence
from tests.unit import sample_session as sample

VERDICT = (
    "bitnet: 10.3 times smaller; 97 % of the skills kept; perplexity 2.4 % higher; 1.4 times as fast; gate: no, "
    "because the skills were not shown to stay within what is allowed, and perplexity grew by 12.3 % (10 % is allowed)."
)


@pytest.fixture
def shown(capsys, monkeypatch):
    """Shows a result as after a run; gives stdout, stderr, and both without line breaks."""

    def show(result: dict[str, Any], columns: int = 160) -> SimpleNamespace:
        monkeypatch.setenv("COLUMNS", str(columns))
        evidence = [Evidence.build(record, "evidence") for record in result["evidence"]]
        parts = {key: result[key] for key in ("metrics", "artifacts", "duration_seconds")}
        show_results(SimpleNamespace(session_id="0123456789"), {"bitnet": SimpleNamespace(evidence=evidence, **parts)})
        out, err = capsys.readouterr()
        return SimpleNamespace(out=out, err=err, all=" ".join(f"{out}\n{err}".split()))

    return show


def result(**metrics: Any) -> dict[str, Any]:
    """The sample's phase 4."""
    found = sample.phase_4("packed_id", "dense_id", "thinker")
    found["metrics"] |= metrics
    return found


def cells(out: str, first: str) -> list[list[str]]:
    """The lines of a table that begin with a word, cut at two or more spaces."""
    lines = (line.strip() for line in out.splitlines())
    return [[cell.strip() for cell in line.split("  ") if cell.strip()] for line in lines if line.startswith(first)]


def test_the_verdict_and_every_model_are_printed(shown):
    said = shown(result())
    assert VERDICT in said.all
    assert "bitnet: size, speed and skill, 600 questions of the report split" in said.out
    table = said.out.partition("size, speed and skill")[2]
    assert cells(table, "parent")[0] == ["parent", "3.54 MB", "1", "94.0", "91.5 to 95.8", "46.6", "600"]
    assert cells(table, "ternary")[:3] == [
        ["ternary", "345 kB", "10.3", "91.5", "88.7 to 93.7", "47.7", "840"],
        ["ternary, in floats", "3.54 MB", "1", "91.7", "88.9 to 93.8", "47.6", "–"],
        ["ternary, not trained", "345 kB", "10.3", "13.0", "10.5 to 16.0", "90.9", "–"],
    ]
    assert cells(table, "full")[0][:3] == ["full precision, same bytes", "338 kB", "10.5"]


def test_the_order_is_verdict_models_training_losses_gate(shown):
    err = shown(result()).err
    places = [err.index(told) for told in (
        "bitnet: 10.3 times smaller", "Rounding alone, nothing trained: right answers 94.0 → 13.0 %",
        "brought back 97 % of the lost answers", "Of 4 levels, 2 lost right answers", "perplexity: between how many",
        "gate bitnet: said no")]  # fmt: skip
    assert places == sorted(places)
    assert "Packed, which chat and serve run: packed_id" in err and "to be trained on: dense_id" in err


def test_levels_that_lost_most_are_printed_with_what_rounding_did(shown):
    out = shown(result()).out.partition("levels that lost most, in per cent")[2]
    assert cells(out, "sort/") == [
        ["sort/10", "90.0", "0.0", "60.0", "−30.0"],
        ["sort/2", "95.0", "95.0", "90.0", "−5.0"],
    ]


@pytest.mark.parametrize("columns", [80, 90, 100, 120])
def test_every_table_fits_the_terminal_and_no_word_or_number_is_cut(shown, columns):
    found = result()
    for scores in found["metrics"]["levels"].values():
        scores["far_recall/10"] = 1.0
    said = shown(found, columns)
    assert all(len(line.rstrip()) <= columns for line in said.out.splitlines())
    levels = said.out.partition("exact answers in per cent")[2]
    copy = ["90"] if columns > 80 else []
    assert cells(levels, "sort/10")[0] == ["sort/10", "90", "60", "0", "90", "90", "90", *copy]
    assert cells(levels, "far_recall/10")
    assert ("no room here for ternary, in floats: in the report" in said.all) == (columns == 80)
    head = levels[: levels.index("sort/1 ")].split()
    for word in ("family/level", "parent", "ternary,", "not", "trained", "precision,", "bytes"):
        assert word in head, word
    table = said.out.partition("size, speed and skill")[2]
    assert cells(table, "parent")[0] == ["parent", "3.54 MB", "1", "94.0", "91.5 to 95.8", "46.6", "600"]
    for word in ("precision,", "perplexity", "tokens/s", "smaller", "weights"):
        assert word in table.split(), word


def test_models_that_find_no_room_are_named(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    levels = {row["model"]: {"far_recall/10": 1.0} for row in sample.sizes()}
    show_evidence("bitnet", [], {"levels": levels})
    out, err = capsys.readouterr()
    assert cells(out, "far_recall/10") == [["far_recall/10", "100", "100", "100", "100", "100"]]
    assert "no room here for full precision, same bytes; ternary, in floats: in the report" in " ".join(err.split())
    monkeypatch.setenv("COLUMNS", "10")
    show_evidence("bitnet", [], {"levels": {"a_very_long_name": {"far_recall/10": 1.0}, "b": {}}})
    assert "no room here for b" in " ".join(capsys.readouterr().err.split()), "one model is shown whatever the room"


def test_a_model_without_known_skills_is_shown_by_its_text(shown):
    models = [{k: v for k, v in row.items() if k not in ("accuracy", "low", "high", "n")} for row in sample.sizes()]
    found = result(models=models, levels={}, select={}, recovery={"skills": None, "perplexity": 0.9})
    del found["metrics"]["quality/accuracy_retention"]
    said = shown(found)
    assert "bitnet: 10.3 times smaller; perplexity 2.4 % higher; 1.4 times as fast; gate: no" in said.all
    assert cells(said.out, "ternary")[0] == ["ternary", "345 kB", "10.3", "-", "47.7", "840"]
    assert "Rounding alone, nothing trained: perplexity 46.6 → 90.9." in said.all
    assert "in place took back 90 % of the added perplexity." in said.all and "levels that lost" not in said.out


def test_every_metric_has_one_name_here_and_on_the_page():
    for metric in ("skills_with_grace", "bits_per_token_with_grace", "bits_per_byte", "exact_match"):
        assert METRICS[metric].partition(" (")[0] == words.METRICS[metric][0]
        assert not any(letter.isdigit() for letter in METRICS[metric]), "how much grace is given is a setting"


def test_nothing_is_printed_of_what_was_not_measured(capsys):
    show_ternary("cognate", ternary({"levels": {"trunk": {"copy/1": 1.0}}}, {"gate": {"passed": True, "reasons": []}}))
    assert capsys.readouterr() == ("", "")


WRONG = (None, [], {}, "text", 7, [None, 3, "x", [], {}], {"a": None, "b": [1]}, float("nan"), 10**400)


@pytest.mark.parametrize("value", WRONG, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize(
    "path",
    ["metrics.models", "metrics.levels", "metrics.speed", "metrics.speed.parent", "metrics.select", "metrics.losses",
     "metrics.recovery", "metrics.quality/accuracy_retention", "artifacts.gate", "artifacts.packed",
     "artifacts.chosen", "artifacts.conversation"],
)  # fmt: skip
def test_no_damage_spoils_the_rest(shown, path, value):
    found = result()
    inside: Any = found
    *above, last = path.split(".")
    for name in above:
        inside = inside[name]
    inside[last] = value
    said = shown(found)
    assert "skills, with grace" in said.out and "next: agent-forge report 01234567" in said.err
    assert not {"nan", "None"} & set(said.all.split())


def test_the_terminal_needs_no_torch():
    code = "import agent_forge.cli.show, agent_forge.dashboard.ternary_words, sys; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
