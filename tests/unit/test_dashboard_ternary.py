"""Phase 4 in the session report: the verdict in words, its tables and drawings. The input is a sample session."""

from __future__ import annotations

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent_forge.dashboard import charts, ternary_charts, ternary_words
from agent_forge.dashboard.collect import collect
from agent_forge.dashboard.markdown import markdown
from agent_forge.dashboard.page import html_page
from agent_forge.dashboard.phase_section import phase_section
from agent_forge.dashboard.ternary import ternary
from agent_forge.dashboard.ternary_charts import ByteAxis, Spot
from agent_forge.dashboard.ternary_section import _means, ternary_section
from agent_forge.dashboard.tree import Curve, Estimate, Ternary
from forgekit.tracking.loggers import PipelineLogger
from tests.unit import sample_session as sample
from tests.unit.test_dashboard import WRONG, Page, plain, whole_rows


@pytest.fixture
def small(tmp_path):
    """The report of a session whose fourth phase made a model small."""
    return collect(sample.sample_session(tmp_path / "fourth", phases=4), sample.SESSION)


def made(**changes) -> Ternary:
    """The sample's phase 4 as it is read; a change of None takes a metric or an artifact away, ``gate`` is one."""
    result = sample.phase_4("packed", "dense", "thinker")
    for side in ("metrics", "artifacts"):
        known = result[side] | {key: value for key, value in changes.items() if key in result[side] or "/" in key}
        result[side] = {key: value for key, value in known.items() if value is not None}
    return ternary(result["metrics"], result["artifacts"])


def rows(*without: str, **changes) -> list[dict]:
    """The sample's models without some keys, with others changed."""
    return [{k: v for k, v in {**row, **changes}.items() if k not in without} for row in sample.sizes()]


def test_what_phase_4_left_is_read(small):
    phase = small.phases[3]
    found = phase.ternary
    assert (phase.number, phase.state, phase.inputs) == (4, "finished", small.phases[2].made)
    assert [one.name for one in found.models] == [row["model"] for row in sample.sizes()]
    assert (found.parent, found.made, found.rounded) == ("parent", "ternary", "ternary, not trained")
    parent, child = found.model(found.parent), found.model(found.made)
    assert parent.bytes == 3_540_000 and child.accuracy == Estimate(0.915, 0.887, 0.937) and child.n == 600
    assert (child.rate, child.blocks) == (840.0, (800.0, 840.0, 850.0)) and found.models[3].rate is None
    assert found.trained is True and found.gate.passed is False and len(found.gate.reasons) == 3
    assert found.losses["same bytes"][:2] == ((1, 7.0), (2, 6.98)) and len(found.losses["ternary"]) == 200
    assert found.recovery == {"skills": 0.969, "perplexity": 0.975} and found.levels["ternary"]["sort/10"] == 0.6
    assert found.facts["quality/accuracy_retention"] == 0.966 and "phase/success" not in found.facts
    assert found.packed.startswith("bitnet_ternary_2026") and found.dense == phase.made[0]
    assert all(phase.ternary == Ternary() for phase in small.phases[:3])


SAID = "10.3 times smaller; 97 % of the skills kept; perplexity 2.4 % higher; 1.4 times as fast"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, f"{SAID}; gate: no, because the skills were not shown to stay within what is allowed, and perplexity "
             "grew by 12.3 % (10 % is allowed)."),
        ({"gate": {"passed": True, "reasons": ["yes: x"]}}, f"{SAID}; gate: passed."),
        ({"gate": {"passed": False, "reasons": []}}, f"{SAID}; gate: no."),
        ({"gate": {"passed": False, "reasons": ["no: too few windows of text to tell: 8, it takes 20"]}},
         f"{SAID}; gate: no, because too few windows of text to tell: 8, it takes 20."),
        ({"gate": None}, f"{SAID}."),
        ({"gate": {"passed": False, "reasons": ["no: text, with grace needs improved, there is no evidence for it"]}},
         f"{SAID}; gate: no, because text was not shown to stay within what is allowed."),
        ({"gate": {"passed": False, "reasons": [
            "no: skills, with grace needs improved; a", "no: mastered skills, with grace needs improved; b",
            "no: text, with grace needs not-worse; c", "no: training brings back what rounding lost needs improved; d",
            "no: 7.25 times smaller than float32, 8 is asked for"]}},
         f"{SAID}; gate: no, because the skills, the levels that the parent had mastered and text were not shown to "
         "stay within what is allowed, and “training brings back what rounding lost” was not shown, and 7.25 times "
         "smaller than float32 (8 is asked for)."),
        ({"gate": None, "models": rows("bytes", "ratio")}, SAID.removeprefix("10.3 times smaller; ") + "."),
        ({"gate": None, "models": rows("bytes", ratio=12.0)}, SAID.replace("10.3", "12") + "."),
        ({"gate": None, "models": rows("perplexity")}, SAID.replace("perplexity 2.4 % higher; ", "") + "."),
        ({"gate": None, "models": rows(perplexity=3.0)}, SAID.replace("perplexity 2.4 % higher", "perplexity as before")
         + "."),
        ({"gate": None, "models": [row | {"perplexity": 50.0 - row["perplexity"] / 10} for row in sample.sizes()]},
         SAID.replace("2.4 % higher", "0.2 % lower") + "."),
        ({"gate": None, "models": rows("accuracy"), "quality/accuracy_retention": 0.966}, f"{SAID}."),
        ({"gate": None, "models": rows("accuracy"), "quality/accuracy_retention": None},
         SAID.replace("97 % of the skills kept; ", "") + "."),
        ({"gate": None, "quality/accuracy_retention": 0.0},
         SAID.replace("97 % of the skills kept", "right answers 94.0 → 91.5 %") + "."),
        ({"gate": None, "speed": None}, f"{SAID}."),
        ({"gate": None, "speed": None, "performance/inference_speedup": None},
         SAID.removesuffix("; 1.4 times as fast") + "."),
        ({"gate": None, "speed": {"parent": {"tokens_per_second": 100.0}, "ternary": {"tokens_per_second": 71.0}}},
         SAID.replace("1.4 times as fast", "0.71 times as fast, so slower") + "."),
        ({"models": None}, ""),
        ({"gate": None, "models": [{"model": "parent"}], "speed": None, "performance/inference_speedup": None,
          "quality/accuracy_retention": None}, ""),
    ],
)  # fmt: skip
def test_the_verdict_says_what_was_measured_and_nothing_else(changes, said):
    said = said[:1].upper() + said[1:]
    assert ternary_words.verdict(made(**changes)) == said


def test_nothing_is_said_to_be_kept_of_what_was_at_chance(tmp_path):
    storage = sample.sample_session(tmp_path / "fourth", phases=4)
    path = sample.folder(storage, 4) / "result.json"
    result = json.loads(path.read_text())
    result["evidence"].append(sample.claim("skills", "no-signal", before=0.94, after=0.915))
    path.write_text(json.dumps(result))
    found = collect(storage, sample.SESSION).phases[3].ternary
    kept = SAID.replace("97 % of the skills kept", "right answers 94.0 → 91.5 %")
    assert found.skilled is False and ternary_words.summary(found) == f"{kept}."


def test_the_page_tells_size_speed_and_skill_before_and_after(small):
    html = html_page(small)
    page = plain(html)
    order = ["The model is made small", SAID, "Size, speed and skill", "Before, after, and beside it: 600 questions",
             "Bytes against right answers", "perplexity between how many", "Speed Tokens per second",
             "What rounding took", "Training loss, nats per token", "Level by level", "sort/10 90.0 0.0 60.0 −30.0",
             "Right answers in per cent, level by level", "Further numbers", "Evidence The bar"]  # fmt: skip
    places = [page.find(told, page.find("Phase 4 Bitnet")) for told in order]
    assert -1 not in places and places == sorted(places), list(zip(order, places))
    for told in ("ternary linear maps in three values (−1, 0 or 1 times a scale), trained on that grid 345 kB 10.3 "
                 "91.5 % (88.7 to 93.7) 47.7 840",
                 "full precision, same bytes a narrower model in float16, trained from nothing on the same batches "
                 "338 kB 10.5 22.0 % (18.9 to 25.5) 120 –",
                 "1.4 times as fast 600 → 840 tokens per second", "10.3 times smaller 3.54 MB → 345 kB",
                 "counted above guessing; right answers 94.0 → 91.5 %", "ternary 840 800 to 850",
                 "Rounding alone, nothing trained: right answers 94.0 → 13.0 %; perplexity 46.6 → 90.9.",
                 "brought back 97 % of the lost answers and took back 98 % of the added perplexity.",
                 "on the select split, which decided: parent 94.5 %; ternary, not trained 14.0 %; ternary 92.0 %.",
                 "Of 4 levels, 2 lost right answers, 1 gained some and 1 stayed as it was.",
                 "Each point is the mean of 4 steps.", "8.66 times fewer bytes", "33 %",
                 "bits per token of text, before raised by what may be added (less is better)",
                 f"Packed, which chat and serve run: {small.phases[3].ternary.packed}"):  # fmt: skip
        assert told in page, told
    assert page.count("Training loss, nats per token") == 2, "its heading and its drawing's name"
    assert Page(html).wrong == [] and html.count("<table") == html.count("<caption>")
    glance = page[page.index("Verdicts at a glance") : page.index("One trunk is trained")]
    assert f"{SAID}." in glance


def test_the_page_of_a_small_model_is_whole_and_named(small):
    html = html_page(small)
    page = Page(html)
    assert not {"script", "link", "img"} & {tag for tag, _ in page.tags}
    assert html.count('role="img"') == len(re.findall(r'role="img"[^>]*><title>', html))
    own = html[html.index('id="bitnet"') : html.index('id="lineage"')]
    drawn = re.findall(r'aria-label="([^"]*)"', own)
    assert any("ternary: 345 kB, 91.5 % right, interval 88.7 to 93.7" in name for name in drawn)
    assert any("sort, right answers in per cent by level." in name and "ternary 1: 100, 2: 90, 10: 60" in name
               for name in drawn)  # fmt: skip
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:]))


@pytest.mark.parametrize("key", ["bytes", "ratio", "accuracy", "low", "n", "perplexity", "model"])
def test_a_row_of_the_models_may_miss_anything(key):
    found = made(models=rows(key))
    html = ternary_section(found)
    assert Page(html).wrong == [] and "nan" not in html and "None" not in html
    assert len(found.models) == (0 if key == "model" else 7)
    if key == "low":
        assert found.models[0].accuracy == Estimate(0.94) and "class=spot" not in html


def test_a_model_that_nobody_asked_is_told_by_its_text_and_speed():
    """Models without known skills, made small by another method."""
    models = [
        {k: v for k, v in row.items() if k in ("model", "bytes", "ratio", "perplexity")} for row in sample.sizes()
    ]
    names = (
        "parent",
        "int8",
        "int8, in floats",
        "int8, not trained",
        "int4, not trained",
        "ternary, not trained",
        "odd [one]",
    )
    for row, name in zip(models, names):
        row["model"] = name
    found = ternary({"models": models, "phase/finetuned": True}, {"chosen": "int8, not trained"})
    assert (found.parent, found.made, found.rounded) == ("parent", "int8", "int8, not trained")
    assert ternary_words.verdict(found) == "10.3 times smaller; perplexity 2.4 % higher."
    meanings = {one.name: ternary_words.meaning(found, one) for one in found.models}
    assert meanings["int8"] == "linear maps in 8 bits, trained on that grid" and meanings["odd [one]"] == ""
    assert meanings["int8, in floats"].startswith("the same weights as floats")
    assert meanings["int8, not trained"].startswith("rounded to the same grid")
    assert meanings["ternary, not trained"].startswith("linear maps in three values")
    measured = [{**row, "accuracy": 0.5 + i / 10} for i, row in enumerate(models)]
    html = ternary_section(ternary({"models": measured, "phase/finetuned": True}, {"chosen": "int8"}))
    spots = re.findall(r'class="spot (s\d)"><title>([^:]+):', html)
    assert [name for _, name in spots] == ["parent", "int8", "in floats", "not trained", "int4", "ternary", "odd [one]"]
    html = ternary_section(found)
    assert "Bytes against" not in html and "odd [one]" in html and Page(html).wrong == []
    assert "Level by level" not in html and "Speed" not in plain(html).replace("Size, speed", "")


def test_rounding_that_was_enough_is_told():
    found = made(losses={}, recovery={}, select={"parent": 0.9, "ternary, not trained": 0.9},
                 **{"phase/finetuned": False})  # fmt: skip
    told = ternary_words.rounding(found)
    assert "Nothing was trained: what was only rounded was handed on." in told
    assert not any("brought back" in line for line in told)
    html = ternary_section(found)
    assert "the same: it was handed on as it was rounded" in html and "brought back" not in plain(html)
    assert html.count('class="spot ') == 6 and "not trained" not in " ".join(re.findall("<title>[^<]*", html))
    kept = made(**{"phase/finetuned": False})
    assert "Training made it no better on the select split, so the rounded one was kept." in (
        ternary_words.rounding(kept)
    )
    assert not any("brought back" in line for line in ternary_words.rounding(kept))
    worse = made(recovery={"skills": -0.2, "perplexity": 1.1})
    assert "brought back none of the lost answers and took back 110 % of the added perplexity." in " ".join(
        ternary_words.rounding(worse)
    )


def test_levels_are_ordered_by_what_they_lost():
    before = {f"sort/{i}": 1.0 for i in range(12)}
    after = {f"sort/{i}": 1.0 - i / 20 for i in range(12)} | {"only/1": 0.0}
    found = made(levels={"parent": before, "ternary": after})
    lost = ternary_words.lost_rows(found)
    assert [row[0] for row in lost] == [f"sort/{i}" for i in range(11, 3, -1)]
    assert lost[0] == ["sort/11", "100.0", "–", "45.0", "−55.0"]
    assert ternary_words.lost_rows(made(levels={"parent": before, "ternary": before})) == []
    told = "Of 12 levels, 11 lost right answers, none gained some and 1 stayed as it was."
    assert ternary_words.lost_line(found) == told


def test_losses_of_an_interrupted_phase_come_from_the_events_and_are_drawn_once(tmp_path):
    storage = sample.sample_session(tmp_path / "fourth", phases=4)
    with PipelineLogger(storage.session_path(sample.SESSION), sample.SESSION) as log:
        phase = log.phase("bitnet")
        phase.event("phase_started", inputs=[])
        for step, loss in ((5, 2.0), (10, 1.5), (10, 1.25)):
            phase.event("bitnet_step", name="ternary", step=step, loss=loss)
        phase.event("bitnet_step", name="same bytes", step=5, loss="much")
    whole = collect(storage, sample.SESSION).phases[3]
    assert whole.losses == (Curve("ternary", ((5, 2.0), (10, 1.25))),)
    assert phase_section(whole).count("<figcaption>Training loss") == 1
    assert markdown(collect(storage, sample.SESSION)).count("### Training loss") == 1, "phase 1's"
    (sample.folder(storage, 4) / "result.json").unlink()
    cut = collect(storage, sample.SESSION).phases[3]
    assert cut.state == "interrupted" and cut.ternary == Ternary()
    assert phase_section(cut).count("<figcaption>Training loss") == 1


@pytest.mark.parametrize("value", [*WRONG, 10**400, -1, 1e300], ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize(
    "path",
    ["metrics", "artifacts", "metrics.models", "metrics.levels", "metrics.levels.parent", "metrics.speed",
     "metrics.speed.ternary", "metrics.speed.ternary.blocks", "metrics.speed.parent.tokens_per_second",
     "metrics.select", "metrics.select.ternary", "metrics.losses", "metrics.losses.ternary", "metrics.recovery",
     "metrics.recovery.skills", "metrics.phase/finetuned", "metrics.quality/accuracy_retention",
     "metrics.compression/sparsity_ratio", "artifacts.gate", "artifacts.chosen", "artifacts.packed",
     "metrics.models.0", "metrics.models.1", "metrics.models.1.bytes", "metrics.models.1.accuracy",
     "metrics.models.0.low", "metrics.models.0.perplexity", "metrics.models.1.model", "metrics.models.0.n"],
)  # fmt: skip
def test_no_damage_to_phase_4_spoils_the_rest(small, path, value):
    result = sample.phase_4("packed", "dense", "thinker")
    inside = result
    *above, last = path.split(".")
    for name in above:
        inside = inside[int(name) if isinstance(inside, list) else name]
    inside[int(last) if isinstance(inside, list) else last] = value
    metrics, artifacts = (result[k] if isinstance(result[k], dict) else {} for k in ("metrics", "artifacts"))
    phase = small.phases[3]
    broken = type(phase)(**{**phase.__dict__, "ternary": ternary(metrics, artifacts)})
    found = type(small)(**{**small.__dict__, "phases": (*small.phases[:3], broken)})
    html = html_page(found)
    assert not Page(html).wrong and whole_rows(markdown(found)) and "bitnet" in html
    own = plain(phase_section(broken))
    assert not {"nan", "None", "inf"} & set(re.split(r"[^\w.]+", own)), own


def test_names_of_models_stay_text():
    models = [{**row, "model": f"<b>{sample.NASTY}</b> {i}"} for i, row in enumerate(sample.sizes())]
    found = made(models=models, levels={row["model"]: {"<i>/1": 0.5, "x|y/2": 1.0} for row in models},
                 losses={models[1]["model"]: [1.0, 2.0]})  # fmt: skip
    html = ternary_section(found)
    assert Page(html).wrong == [] and not {"b", "script"} & {tag for tag, _ in Page(html).tags}
    assert {tag for tag, _ in Page(html).tags if tag == "i"} == {"i"}, "the mark of the verdict"
    assert "&lt;i&gt;" in html


# Its drawings


def test_equal_factors_of_bytes_are_equally_far_apart():
    axis = ByteAxis.around([1000.0, 64_000.0])
    places = [axis.share(1000.0 * 4**power) for power in range(4)]
    steps = [b - a for a, b in zip(places, places[1:])]
    assert steps == pytest.approx([steps[0]] * 3) and places[0] > 0 and places[-1] < 1
    assert [axis.label(tick) for tick in axis.ticks()] == ["1 kB", "10 kB"]


@given(st.lists(st.floats(1, 1e13), min_size=1, max_size=6))
def test_an_axis_of_bytes_holds_every_value_and_has_a_few_ticks(values):
    axis = ByteAxis.around(values)
    assert all(0 <= axis.share(value) <= 1 for value in values)
    assert 1 <= len(axis.ticks()) <= 6 and all(0 <= axis.share(tick) <= 1 for tick in axis.ticks())


SPOTS = st.builds(
    Spot, st.text("abcdefghij ", min_size=1, max_size=16), st.floats(1e3, 1e9),
    st.builds(Estimate, st.floats(0, 1)), st.integers(0, 6),
)  # fmt: skip


@given(st.lists(SPOTS, min_size=2, max_size=7))
def test_no_name_lies_on_another(spots):
    x = ByteAxis.around([spot.bytes for spot in spots])
    drops = ternary_charts._drops(spots, x)
    boxes = [
        (*ternary_charts._reach(spot, x), charts.down(ternary_charts.WHOLE, spot.accuracy.value) + drop)
        for spot, drop in zip(spots, drops)
    ]
    for i, (left, right, level) in enumerate(boxes):
        for start, end, other in boxes[:i]:
            assert left >= end or start >= right or abs(level - other) > ternary_charts.LINE - 1
    assert all(drop >= 0 for drop in drops)


def test_names_side_by_side_stay_at_their_marks():
    spots = [Spot(name, taken, Estimate(0.9), 0) for name, taken in (("int4", 1e6), ("int8", 3e6), ("parent", 1e7))]
    assert ternary_charts._drops(spots, ByteAxis.around([1e6, 3e6, 1e7])) == [0, 0, 0]
    spots.append(Spot("same", 1e6, Estimate(0.9), 0))
    assert ternary_charts._drops(spots, ByteAxis.around([1e6, 1e7])) == [0, 0, 0, ternary_charts.LINE]


def test_a_spot_stands_where_its_numbers_say():
    spots = [Spot("a", 1e5, Estimate(1.0), 0), Spot("b & c", 1e6, Estimate(0.5, 0.25, 0.75), 8)]
    drawn = ternary_charts.size_chart("title", spots)
    at = charts.across(ByteAxis.around([1e5, 1e6]), 1e6)
    assert f'<svg x="{at:.2f}%"' in drawn and 'class="spot s2"' in drawn
    assert '<circle cx="0" cy="100.0" r="4.5"/>' in drawn and '<circle cx="0" cy="10.0" r="4.5"/>' in drawn
    assert '<line x1="0" x2="0" y1="145.0" y2="55.0"/>' in drawn and drawn.count('<line x1="-4"') == 2
    assert "b &amp; c: 1 MB, 50.0 % right, interval 25.0 to 75.0" in drawn
    assert 'x="-10" text-anchor=end' in drawn, "a name at the right end stands on the left of its mark"


def test_a_small_chart_has_a_dot_per_level_and_model():
    lines = [charts.Line("parent", ((0, 1.0), (1, 0.5)), 1), charts.Line("ternary", ((0, 0.0),), 0)]
    drawn = ternary_charts.level_chart("sort & more", ["1", "10"], lines)
    assert drawn.count("<circle") == 3 and "sort &amp; more" in drawn
    assert '<circle class="dot s1" cx="16.00%" cy="8.0"' in drawn and 'cx="98.00%" cy="50.0"' in drawn
    assert "parent 1: 100, 10: 50; ternary 1: 0" in drawn
    one = ternary_charts.level_chart("copy", ["1"], [charts.Line("parent", ((0, 1.0),), 0)])
    assert "nan" not in one and one.count("<circle") == 1


@pytest.mark.parametrize("steps", [1, 2, 59, 60, 61, 400])
def test_a_loss_curve_keeps_its_mean_and_its_last_step(steps):
    found = made(losses={"ternary": [float(step) for step in range(steps)]})
    html = ternary_section(found)
    (drawn,) = re.findall(r'<polyline class="line s0" points="([^"]*)"', html[html.index("Training loss") :])[:1]
    assert 1 <= len(drawn.split()) <= 60 and "training step" in html
    assert drawn.split()[-1].startswith("1000.0,")


def test_a_point_of_a_loss_curve_stands_at_the_last_step_it_is_of():
    assert _means(((1, 1.0), (2, 3.0), (3, 5.0)), 2) == ((2, 2.0), (3, 5.0))


def test_a_model_has_one_look_in_every_drawing(small):
    html = ternary_section(small.phases[3].ternary)
    spots = re.findall(r'class="spot (s\d)"><title>([^:]+):', html)
    assert {name: look for look, name in spots} == {
        "parent": "s1", "ternary": "s0", "in floats": "s0", "not trained": "s2", "same bytes": "s3", "int8": "s4",
        "int4": "s5",
    }  # fmt: skip
    assert 'class="line s3"' in html and html.count('class="line s2"') == 3, "legend, two tasks"


def test_markdown_tells_of_the_small_model_too(small):
    told = markdown(small)
    for line in (f"**{SAID}; gate: no, because the skills were not shown",
                 "| ternary | 345 kB | 10.3 | 91.5 % (88.7 to 93.7) | 47.7 | 840 | linear maps in three values",
                 "- perplexity: between how many next tokens", "| ternary | 200 | 1.73 | 1.73 |",
                 "| sort/10 | 90.0 | 0.0 | 60.0 | −30.0 |", "| Weights in memory | 8.66 times fewer bytes |",
                 "| same bytes | 200 | 6.81 | 3.21 |", "- 10.3 times smaller: 3.54 MB → 345 kB"):  # fmt: skip
        assert line in told, line
    assert whole_rows(told) > 120
