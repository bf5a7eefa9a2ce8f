"""The session report: what is read, what is drawn, what is told of what is missing. The input is a sample session."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from agent_forge.dashboard import charts, words
from agent_forge.dashboard.charts import Axis
from agent_forge.dashboard.collect import collect
from agent_forge.dashboard.markdown import markdown, safe
from agent_forge.dashboard.page import drawn_models, html_page
from agent_forge.dashboard.phase_section import phase_section
from agent_forge.dashboard.style import CSS
from agent_forge.dashboard.thoughts import conversation, segments, thinking
from agent_forge.dashboard.thoughts_section import thinking_section
from agent_forge.dashboard.tree import Curve, Estimate, Thinking
from agent_forge.dashboard.values import number
from forgekit.errors import ArtifactError
from forgekit.measure.evidence import Evidence
from forgekit.store.storage import ModelStorage
from forgekit.tracking.loggers import PipelineLogger
from tests.unit import sample_session as sample

VOID = {"meta"}


class Page(HTMLParser):
    """The tags of a page, and whether they close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.tags, self.wrong = [], [], []
        self.feed(html)
        self.wrong += self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if not self.open or self.open.pop() != tag:
            self.wrong.append(f"/{tag}")

    def of(self, tag: str) -> list[dict]:
        return [attrs for name, attrs in self.tags if name == tag]


def plain(html: str) -> str:
    """The text of a page in one line."""
    return " ".join(re.sub(r"<[^>]+>", " ", html.split("</style>")[-1]).split())


@pytest.fixture
def storage(tmp_path) -> ModelStorage:
    return sample.sample_session(tmp_path / "storage")


@pytest.fixture
def report(storage):
    return collect(storage, sample.SESSION)


@pytest.fixture
def thoughtful(tmp_path):
    """The report of a session whose third phase taught a model to think."""
    return collect(sample.sample_session(tmp_path / "third", phases=3), sample.SESSION)


# What is read


def test_everything_a_session_left_is_read(report):
    assert (report.status, report.profile, report.gate_policy, report.starts) == ("completed", "nano", "fall_back", 1)
    assert report.environments == (sample.ENVIRONMENT,) and report.peak_bytes == 1.5e9 and report.notes == ()
    assert [m.name for m in report.models] == ["trunk", *sample.SPECIALISTS, "champion"]
    assert {m.weights for m in report.models} == {1000} and len(report.models[-1].parents) == 4
    first, second = report.phases
    assert [p.state for p in report.phases] == ["finished", "finished"] and len(report.evidence) == 6
    assert first.seconds == 61.0 and first.tokens == {"trunk": 12_000} and first.gate.passed
    assert len(first.conversation) == 6 and first.conversation[1].right is False
    assert second.inputs == first.made and not second.gate.passed
    merge = second.merge
    assert merge.floor == 0.125 and merge.gains == {"select": 0.06, "report": 0.04}
    assert [row["generation"] for row in merge.history] == [0, 1, 2, 3] and "elite_combo_usage" not in merge.history[0]
    assert [s.seed for s in merge.strategies[:3]] == ["1", "2", "3"] and merge.recipe == "ties <0.5>"


def test_losses_carry_the_models_names_and_the_later_of_two_values_of_a_step(report):
    curves = {c.name: c.points for c in report.phases[0].losses}
    assert curves["trunk"] == ((10, 5.0), (20, 3.5), (30, 2.0))
    assert list(curves) == ["trunk", *sample.SPECIALISTS] and curves["memory_integration"] == ((10, 3.0), (20, 1.0))


def test_an_interrupted_session_tells_what_it_has(tmp_path):
    storage = sample.sample_session(tmp_path, phases=1, status="paused")
    (sample.folder(storage) / "result.json").unlink()
    found = collect(storage, sample.SESSION)
    (phase,) = found.phases
    assert (
        phase.state == "interrupted" and phase.gate is None and phase.evidence == () and found.not_run == ("evomerge",)
    )
    assert [c.name for c in phase.losses] == ["trunk", "model 1", "model 2", "model 3"]
    page = plain(html_page(found))
    for told in ("was paused", "interrupted before it finished", "Planned and not run: evomerge", "has not been asked",
                 "nothing is claimed for it", "No conversation was recorded"):  # fmt: skip
        assert told in page, told


def test_a_session_that_has_only_begun_has_a_page(tmp_path):
    found = collect(sample.sample_session(tmp_path, phases=0, status="failed"), sample.SESSION)
    page = html_page(found)
    assert "No model was finished" in page and "no such event log" in page and not Page(page).wrong
    assert "No phase of this session has left anything yet" in page and markdown(found)


def test_an_unknown_session_is_refused(storage):
    with pytest.raises(ArtifactError, match="no session 'other'; see `agent-forge status`"):
        collect(storage, "other")


@pytest.mark.parametrize("content", ['{"half": ', "[1, 2]", "\xff"])
def test_a_damaged_result_is_told_and_the_rest_is_kept(storage, content):
    (sample.folder(storage, 2) / "result.json").write_text(content, encoding="latin-1")
    found = collect(storage, sample.SESSION)
    assert [p.state for p in found.phases] == ["finished", "damaged"] and len(found.evidence) == 5
    assert "phase2_evomerge/result.json" in found.notes[0] and "cannot be told" in plain(html_page(found))


def test_damaged_event_lines_are_counted_and_left_out(storage):
    path = storage.session_path(sample.SESSION) / "events.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"no event\n" + whole + b'{"half": ')
    found = collect(storage, sample.SESSION)
    assert found.notes == (
        "1 unreadable line of events.jsonl left out (line 1).",
        "The last line of events.jsonl is not complete; it is left out.",
    )
    assert len(found.phases[0].losses) == 4


def test_values_of_the_wrong_kind_spoil_nothing_else(storage):
    path = sample.folder(storage, 2) / "result.json"
    result = json.loads(path.read_text())
    result["metrics"] |= {
        "levels": [1],
        "gains": {"select": "much", "report": float("nan")},
        "fitness_history": [7, {}],
    }
    result["metrics"] |= {"strategies": ["x", {"curve": [None, 0.5]}], "fitness_table": {"a": None, "b": {"select": 3}}}
    result["artifacts"] |= {"conversation": [{"right": "yes"}, 5], "gate": {"passed": "no"}}
    result["evidence"] = [{"claim": "half"}, *result["evidence"]]
    path.write_text(json.dumps(result))
    found = collect(storage, sample.SESSION)
    phase = found.phases[1]
    assert phase.levels == {} and phase.gate is None and phase.merge.gains == {} and phase.merge.history == ()
    assert phase.merge.strategies[0].curve == ((2, 0.5),) and phase.conversation[0].right is None
    assert len(phase.evidence) == 1 and "Evidence 1 of evomerge is left out" in found.notes[0]
    assert not Page(html_page(found)).wrong and markdown(found)


def test_an_unreadable_model_and_lost_weights_are_told(storage):
    (sample.folder(storage) / "trunk" / "manifest.json").write_text("{}")
    (sample.folder(storage) / "reasoning" / "model.safetensors").unlink()
    found = collect(storage, sample.SESSION)
    assert [m.name for m in found.models] == [*sample.SPECIALISTS, "champion"]
    told = " ".join(found.notes)
    assert "phase1_cognate/trunk is left out" in told and "weights of reasoning are gone" in told
    assert "Parents from elsewhere: cognate_trunk" in html_page(found)


def test_generations_of_an_interrupted_search_come_from_the_events(storage):
    (sample.folder(storage, 2) / "result.json").unlink()
    line = {"time": "2026-11-21T13:30:00Z", "monotonic": 1.0, "session": sample.SESSION, "phase": "evomerge"}
    with open(storage.session_path(sample.SESSION) / "events.jsonl", "a") as log:
        for step, group in enumerate(("generation", "generation_1")):
            data = {"step": step, "values": {f"{group}/best_fitness": 0.5 + step, "other/x": 1.0}}
            log.write(json.dumps({**line, "kind": "metrics", "data": data}) + "\n")
            row = {"generation": step, "diversity_score": 0.25, "elite_combo_usage": {}}
            log.write(json.dumps({**line, "kind": "generation", "data": row}) + "\n")
    merge = collect(storage, sample.SESSION).phases[1].merge
    assert merge.history == (
        {"generation": 0, "best_fitness": 0.5, "diversity_score": 0.25},
        {"generation": 1, "best_fitness": 1.5, "diversity_score": 0.25},
    )


def test_handoffs_and_the_error_that_ended_a_session_are_told(storage):
    names = {m.name: m.model_id for m in collect(storage, sample.SESSION).models}
    storage.registry.record_handoff(
        names["memory_integration"], names["memory_integration"], target_phase="evomerge",
        validation_status="failed", validation_metrics={"rule": "loss < 2", "final_loss": 2.5},
    )  # fmt: skip
    with PipelineLogger(storage.session_path(sample.SESSION), sample.SESSION) as log:
        log.event("session_ended", status="failed", error="the gate said no: copy & add")
    storage.registry.update_session(sample.SESSION, status="failed")
    found = collect(storage, sample.SESSION)
    told = "memory integration evomerge failed rule: loss &lt; 2; final loss: 2.5"
    assert told in plain(html_page(found)) and "The session failed: the gate said no: copy &amp; add." in html_page(
        found
    )
    assert "| memory integration | evomerge | failed | rule: loss &lt; 2; final loss: 2.5 |" in markdown(found)


def test_time_at_work_leaves_out_the_pauses(storage):
    path = storage.session_path(sample.SESSION) / "events.jsonl"
    lines = [("session_started", "10:00:00"), ("a", "10:01:00"), ("session_started", "12:00:00"), ("a", "12:00:30")]
    with open(path, "w") as log:
        for kind, clock in lines:
            event = {"time": f"2026-11-21T{clock}Z", "phase": "", "kind": kind, "data": {"environment": {"threads": 2}}}
            log.write(json.dumps(event) + "\n")
    found = collect(storage, sample.SESSION)
    assert found.seconds == 90.0 and found.starts == 2 and found.environments == ({"threads": 2},)
    assert ("Starts", "2: it was resumed") in words.facts(found)


# What is told


def test_a_gate_that_said_no_is_told_in_plain_words_with_what_happened_then(report):
    failed = report.phases[1]
    assert words.refusals(failed) == [
        "“champion keeps reasoning” had to be shown not to get worse. Measured: worse, share of exact answers "
        "60.0 → 50.0 %, change −10.0 points (−15.0 to −5.0), chance 12.5 %, 400 items.",
        "“champion answers” had to be shown to improve, and there is no evidence for it.",
    ]
    assert "go on with the models that the phase was given (gate = fall_back)" in words.aftermath(report, failed)
    first = report.phases[0]
    assert "Phase 2 (evomerge) went on with what this phase made" in words.aftermath(report, first)
    page = plain(html_page(report))
    assert "said no: 0 of 2 requirements met" in page and "passed: 1 of 1 requirement met" in page


def test_the_winners_curse_is_told_only_where_there_is_one(report):
    merge = report.phases[1].merge
    assert "+0.06 on the split that chose the champion, +0.04 on the report split" in words.curse(merge)
    assert "difference, 0.0200, is the winner's curse" in words.curse(merge)
    other = type(merge)(gains={"select": 0.04, "report": 0.05})
    assert "did not flatter" in words.curse(other) and words.curse(type(merge)(gains={"select": 0.04})) == ""


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (words.digits(0.0121734), "0.0122"), (words.digits(884531.0), "884,531"), (words.digits(1.5e-7), "1.5e-07"),
        (words.digits(-2.0), "−2"), (words.digits(None), "–"), (words.digits(0.0), "0"),
        (words.size(3_543_568), "3.54 MB"), (words.size(999), "999 bytes"), (words.amount(884_531), "885 thousand"),
        (words.value(0.0705, "exact_match"), "7.0 %"), (words.value(2.25, "bits_per_byte"), "2.25"),
        (words.change(-0.0125, "exact_match"), "−1.2"), (words.duration(89), "89 seconds"),
        (words.duration(150), "2.5 minutes"), (words.duration(5400), "1.5 hours"),
        (words.duration(None), "an unknown time"),
        (words.date("2026-11-21T13:26:03+00:00"), "21 November 2026, 13:26 UTC"), (words.date("soon"), "soon"),
        (words.metric_name("bits_per_byte"), "bits per byte of held-out text (less is better)"),
        (words.metric_name("own_metric"), "own metric"), (words.in_words("some reason", {}), "some reason"),
    ],
)  # fmt: skip
def test_numbers_and_names_read_well(shown, expected):
    assert shown == expected


@pytest.mark.parametrize("value", [10**400, -(10**400), float("inf"), float("nan"), True, "1"])
def test_what_no_float_can_hold_is_no_number(value):
    assert number(value) is None
    assert number(10**300) == 10**300 and number(0) == 0


# The page


def test_the_page_needs_nothing_else_and_its_tags_close(report):
    html = html_page(report)
    page = Page(html)
    assert page.wrong == [], page.wrong
    assert not {"script", "link", "img", "iframe", "object", "base"} & {tag for tag, _ in page.tags}
    assert not any(k.startswith("on") or k in ("src", "srcset") for _, attrs in page.tags for k in attrs)
    assert all(a["href"].startswith("#") for a in page.of("a"))
    assert "url(" not in CSS and "@import" not in CSS and "default-src 'none'" in html
    places = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    assert {a["href"][1:] for a in page.of("a")} <= places


def test_answers_full_of_markup_stay_text(report):
    html = html_page(report)
    assert "<script" not in html and "<b>bold" not in html and "ties <0.5>" not in html and "<small>: 3" not in html
    assert "&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; &amp; | `77`" in html


def test_every_drawing_has_a_name_and_every_table_a_caption(report):
    html = html_page(report)
    drawings = [a for a in Page(html).of("svg") if a.get("role") == "img"]
    assert len(drawings) > 15 and all(a["aria-label"] for a in drawings)
    others = [a for a in Page(html).of("svg") if a.get("role") != "img"]
    assert all(a.get("aria-hidden") == "true" or "viewBox" in a or "viewbox" in a for a in others)
    assert html.count('role="img"') == len(re.findall(r'role="img"[^>]*><title>', html))
    assert html.count("<table") == html.count("<caption>")
    levels = [int(tag[1]) for tag, _ in Page(html).tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1 and all(b - a <= 1 for a, b in zip(levels, levels[1:]))


def test_the_page_says_what_was_measured_in_the_order_people_ask(report):
    page = plain(html_page(report))
    order = ["5 models of 250 parameters each", "Verdicts at a glance", "One trunk is trained", "trunk learned copy",
             "The specialists are merged", "Lineage Lineage: trunk from nothing", "Sizes Weights",
             "Sample conversation",
             "What failed its gate", "How to reproduce it"]  # fmt: skip
    places = [page.find(told) for told in order]
    assert -1 not in places and places == sorted(places), list(zip(order, places))
    for told in ("40.0 → 50.0 %", "+10.0 (+6.0 to +14.0)", "12.5 %", "floor 0.125", "AVX2, 2 threads, torch 2.13.0",
                 "It stopped because no better champion in 5 generations.", "at most 3 points below the specialist",
                 "reasoning 60.0 % 50.0 % −10.0 − lost", "text – 100.0 % – ? –",
                 "agent-forge run --profile nano", "After phase 1: 3 of 6 right", "expected: v3",
                 "1 step 25 %, 2 steps 75 %",
                 "0.540 (0.530\u2060–\u20600.550)", "1.50 million", "f" * 64):  # fmt: skip
        assert told in page, told


def test_levels_stand_in_the_order_of_their_numbers(report):
    html = html_page(report)
    table = html[html.index("<table class=heat") :]
    assert re.findall(r"<th scope=row>(\d+)</th>", table[: table.index("</table>")]) == ["1", "2", "10", "3"]
    assert '<td class=none>–</td><td style="--v:0.00">0</td>' in table


def test_the_lineage_draws_what_was_handed_on_and_counts_the_rest(storage):
    for second in range(20, 24):
        sample.model(storage, f"child_{second}", "evomerge", second, [])
    found = collect(storage, sample.SESSION)
    drawn, left = drawn_models(found)
    assert [m.name for m in drawn] == ["trunk", *sample.SPECIALISTS, "champion"] and left == 4
    assert "4 further models of this session not drawn" in html_page(found)
    picture = charts.lineage(drawn, frozenset({drawn[-1].model_id}), lambda m: [m.phase])
    assert picture.count('class="edge"') + picture.count("class=edge ") == 6 and picture.count("edge base") == 3
    assert "champion from reasoning and memory_integration and adaptive_computation and trunk" in picture
    assert picture.count('class="box lead"') == 1


def test_models_in_a_circle_are_drawn_all_the_same(report):
    one = report.models[0]
    loop = type(one)(**{**one.__dict__, "parents": (one.model_id,)})
    assert "Lineage: trunk from trunk." in charts.lineage([loop], frozenset(), lambda m: [])


# Drawings


def test_an_interval_is_drawn_where_its_numbers_are():
    axis = Axis(-0.5, 0.5)
    drawn = charts.interval_mark(axis, 0.0, (-0.5, 0.25), "worse", "told & told")
    assert 'class="mark worse"' in drawn and "told &amp; told" in drawn
    assert '<circle cx="50.00%"' in drawn and '<line x1="7.00%" x2="71.50%"' in drawn
    assert '<line class=zero x1="50.00%"' in drawn


@pytest.mark.parametrize(
    ("values", "zero", "expected"),
    [
        ([0.06, 0.14], True, ["0.00", "0.05", "0.10", "0.15"]),
        ([2.0, 5.76], True, ["0", "2", "4", "6"]),
        ([-0.6, -0.2], False, ["−0.6", "−0.5", "−0.4", "−0.3", "−0.2"]),
        ([3.0, 3.0], False, ["1", "2", "3", "4", "5"]),
        ([1e-9, 4e-9], True, ["0", "1", "2", "3", "4"]),
    ],
)
def test_axes_have_few_round_numbers_that_hold_every_value(values, zero, expected):
    axis = Axis.around(values, zero=zero)
    labels = [axis.label(t) for t in axis.ticks()]
    assert axis.low <= min(values) and axis.high >= max(values) and 3 <= len(labels) <= 8
    if max(values) > 1e-6:
        assert [x.replace("0.00", "0") for x in labels] == [x.replace("0.00", "0") for x in expected]


def test_a_chart_of_one_point_and_of_equal_values_is_drawn():
    for points in (((3.0, 2.0),), ((0.0, 2.0), (1.0, 2.0))):
        line = charts.Line("a<b", points, 0)
        x, y = Axis.across([p[0] for p in points]), Axis.around([p[1] for p in points])
        drawn = charts.line_chart("chart", [line], x, y, "step", rule=2.0)
        assert "a&lt;b" in drawn and 'class="line rule"' in drawn and "nan" not in drawn


def test_runs_of_unequal_length_are_averaged_where_all_have_values(storage):
    path = sample.folder(storage, 2) / "result.json"
    result = json.loads(path.read_text())
    result["metrics"]["strategies"][0]["curve"] = [0.5, 0.54]
    path.write_text(json.dumps(result))
    page = html_page(collect(storage, sample.SESSION))
    assert "<title>default: 0.537 at 2</title>" in page and "<title>random search: 0.540 at 3</title>" in page


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_colours_have_the_contrast_of_wcag_aa(scheme):
    light, dark = CSS.split("@media (prefers-color-scheme: dark)")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light.split("}")[0]))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", dark.split("}")[0]))
    pairs = [(c, g) for c in ("ink", "soft", "accent") for g in ("page", "card", "track")]
    pairs += [(tone, f"{tone}-bg") for tone in ("good", "bad", "even", "mute")]
    pairs += [(tone, "card") for tone in ("good", "bad", "even", "mute")] + [("card", f"s{i}") for i in range(4)]
    pairs += [(c, f"{tone}-bg") for c in ("ink", "soft") for tone in ("good", "bad", "even", "mute")]
    pairs += [(c, f"{tone}-bg") for c in ("good", "bad", "mute") for tone in ("good", "bad", "mute")]
    assert {pair: round(r, 2) for pair in pairs if (r := contrast(*(colours[c] for c in pair))) < 4.5} == {}
    assert all(contrast(colours[f"s{i}"], colours["card"]) >= 3 for i in range(6))


def contrast(one: str, other: str) -> float:
    """WCAG 2.2, relative luminance and contrast ratio."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


# Markdown


def test_markdown_tells_the_same_and_no_table_breaks(report):
    told = markdown(report)
    for line in ("# 5 models of 250 parameters each", "| improved | 2 |", "### Fitness: chosen against reported",
                 "champion (evomerge) from reasoning, memory\\_integration, adaptive\\_computation, trunk; handed on",
                 "Floor of diversity: 0.125.", "What happened then:", "## How to reproduce it"):  # fmt: skip
        assert line in told, line
    assert whole_rows(told) > 40


def whole_rows(told: str) -> int:
    """The number of table rows; fails where one has more or fewer cells than the row above it."""
    rows, last = 0, 0
    for line in told.splitlines():
        cells = len(re.findall(r"(?<!\\)\|", line)) if line.startswith("|") else 0
        assert not (last and cells) or cells == last, line
        rows, last = rows + bool(cells), cells
    return rows


def test_markdown_escapes_what_would_be_markup():
    assert safe("a|b <i> & *x* [y](z) `c`\nd_e") == "a\\|b &lt;i&gt; &amp; \\*x\\* \\[y\\](z) \\`c\\` d\\_e"


def test_answers_in_markdown_stand_in_longer_fences(report):
    assert "`` <script>alert('x')</script> & \\| `77` ``" in markdown(report)


# Thoughts


def test_what_phase_3_left_is_read(thoughtful):
    phase = thoughtful.phases[2]
    found = phase.thinking
    assert (phase.number, phase.state, phase.inputs) == (3, "finished", thoughtful.phases[1].made)
    assert [one.name for one in found.conditions][:3] == ["with thoughts", "without thoughts", "shuffled thoughts"]
    assert found.conditions[2].lost == Estimate(0.93, 0.88, 0.97) and found.conditions[0].lost is None
    assert found.theater.detected is False and found.theater.power == Estimate(0.99, 0.98, 1.0)
    assert found.totals["valid"] == 540 and "by_strategy" not in found.totals
    assert found.strategies["multi_domain"] == {"share": 0.2} and found.families["add"]["n"] == 300
    assert found.one.converged is True and found.one.losses == ((100, 2.0), (200, 0.9), (300, 0.5))
    assert found.two.chosen == "step 1" and found.two.nats["continued"] == 1.87 and len(found.two.listening) == 2
    assert [one.right for one in found.examples] == [True, False, False] and found.examples[1].valid is False
    assert phase.conversation[0].thought == "<expert>clerk<step>1 2" and phase.conversation[1].thought == ""
    assert thoughtful.phases[0].thinking == Thinking()


@pytest.mark.parametrize(
    ("thought", "expected"),
    [
        ("<think><expert>clerk<step>8+5+0=13</think>", [("expert", "clerk"), ("step", "8+5+0=13")]),
        ("as money <doubt> no", [("", "as money"), ("doubt", "no")]),
        ("<step><step>1", [("step", ""), ("step", "1")]),
        ("<think>", []),
        ("", []),
    ],
)
def test_a_thought_is_cut_at_its_markers_whatever_it_is(thought, expected):
    assert segments(thought) == expected


def test_the_page_tells_whether_the_thoughts_carry_the_answers(thoughtful):
    html = html_page(thoughtful)
    page = plain(html)
    order = ["The model learns to think before it answers", "Do the thoughts carry the answers?",
             "No theater: every requirement", "Measured beside the controls", "Example thoughts",
             "What the thoughts are like", "Step 1: learning to think", "Step 2: Quiet-STaR", "thoughts help where",
             "no thoughts add 2 0 100 25"]  # fmt: skip
    places = [page.find(told, page.find("The model learns")) for told in order]
    assert -1 not in places and places == sorted(places), list(zip(order, places))
    for told in ("Finished: phases 1 (cognate), 2 (evomerge) and 3 (quietstar).",
                 "with thoughts the model thinks, then answers 83.0 % (80.0 to 86.0) – 600",
                 "18.0 % (15.0 to 21.0) 93.0 % (88.0 to 97.0) 600", "? not used coherence and right answers",
                 "99.0 % (98.0 to 100.0)", "0.410 (0.330 to 0.490)", "540 of 600 (90.0 %)", "2.10 ms",
                 "mece 13.0 % 98.0 % 91.0 % 90.0 %", "walk 300 80.0 % –", "22,424 written thoughts", "It converged.",
                 "1.900 before step 2, 1.880 after step 2, 1.870 after as much training without thoughts.",
                 "step 2 changed it by +0.01: worse.", "Kept: the model of step 1: step 2 answers no better",
                 "share of exact answers, before lowered by what may be lost",
                 "validation nats per predicted token (less is", "share of valid thoughts",
                 "thought, not valid step 7+6+0=13 step 5+6+1=13 answered 133",
                 "wrong: step 2 is false", "After phase 3: 1 of 2 right"):  # fmt: skip
        assert told in page, told
    assert page.count("Training loss on written thoughts") == 2, "its heading and its chart's name"
    assert "passed: 1 of 1 requirement met No theater" in page


def test_a_thought_stands_apart_and_stays_text(thoughtful):
    html = html_page(thoughtful)
    page = Page(html)
    assert page.wrong == [] and not {"script", "step", "reason", "b>"} & {tag for tag, _ in page.tags}
    assert len([a for a in page.of("div") if a.get("class") == "thought"]) == 4
    assert "&lt;/step&gt;" in html and "[red]as it is[/]" in html
    assert "asked copy 1 2 thought expert clerk step 1 2 answered 1 2 thinker" in plain(html)
    assert html.count("<table") == html.count("<caption>")


@pytest.mark.parametrize(
    ("detected", "said", "looks"),
    [
        (True, "Theater detected", "judged worse"),
        (False, "No theater", "judged improved"),
        (None, "not judged", "no-"),
    ],
)
def test_the_judgement_is_told_as_it_was_recorded(thoughtful, detected, said, looks):
    phase = thoughtful.phases[2]
    record = sample.theater(bool(detected))
    record["reasons"].append("no: <b>bold</b>")
    theater = thinking({"theater": {**record, "detected": detected}}, {})
    html = phase_section(type(phase)(**{**phase.__dict__, "thinking": theater}))
    assert said in plain(html) and looks in html and "not met &lt;b&gt;bold" in plain(html)
    assert ("not met filler thoughts lose 12 % [3, 21]" in plain(html)) is bool(detected)


def test_accuracies_are_drawn_from_nothing_to_all():
    drawn = charts.level_mark(Axis(0, 1, 100), 0.5, (0.25, 0.75), "told & told", "s1", 0.25)
    assert '<rect class="fill s1" x="7.00%" width="43.00%"' in drawn and "told &amp; told" in drawn
    assert '<line x1="28.50%" x2="71.50%"' in drawn and '<line class=zero x1="28.50%"' in drawn
    assert "class=span" not in charts.level_mark(Axis(0, 1), 0.5, None, "no interval")


WRONG = (None, [], {}, "text", 7, True, [None, 3, "x", [], {}], {"a": None, "b": [1], "c": {"d": "e"}}, float("nan"))


@pytest.mark.parametrize("value", WRONG, ids=repr)
@pytest.mark.parametrize(
    "path",
    ["metrics", "artifacts", "metrics.controls", "metrics.theater", "metrics.thoughts", "metrics.steps",
     "metrics.levels", "metrics.theater.reasons", "metrics.theater.correlation", "metrics.theater.predictive_power",
     "metrics.thoughts.by_strategy", "metrics.thoughts.by_family", "metrics.thoughts.total", "metrics.steps.one",
     "metrics.steps.one.losses", "metrics.steps.one.traces", "metrics.steps.two", "metrics.steps.two.nats",
     "metrics.steps.two.rewards", "metrics.steps.two.why", "artifacts.examples", "artifacts.conversation"],
)  # fmt: skip
def test_no_damage_to_phase_3_spoils_the_rest(thoughtful, path, value):
    result = sample.phase_3("thinker", "champion")
    inside = result
    *above, last = path.split(".")
    for name in above:
        inside = inside[name]
    inside[last] = value
    metrics, artifacts = (result[k] if isinstance(result[k], dict) else {} for k in ("metrics", "artifacts"))
    phase = thoughtful.phases[2]
    changes = {"thinking": thinking(metrics, artifacts), "conversation": conversation(artifacts.get("conversation"))}
    broken = type(phase)(**{**phase.__dict__, **changes})
    found = type(thoughtful)(**{**thoughtful.__dict__, "phases": (*thoughtful.phases[:2], broken)})
    assert not Page(html_page(found)).wrong and whole_rows(markdown(found))
    assert "nan" not in plain(phase_section(broken))


@pytest.mark.parametrize("place", range(6))
def test_a_row_of_the_controls_may_miss_anything(place):
    keys = ("condition", "accuracy", "low", "n", "lost", "meaning")
    rows = [{k: v for k, v in row.items() if k != keys[place]} for row in sample.controls()]
    found = thinking({"controls": rows}, {})
    assert len(found.conditions) == 6 and not Page(thinking_section(found)).wrong
    own = found.conditions[0].accuracy
    missing = keys[place] in ("low", "accuracy")
    assert [own.low is None, own.high is None] == [missing, missing], "half an interval is none"


def test_nothing_right_is_a_number_and_not_a_gap():
    found = thinking({"controls": [{"condition": "parent", "accuracy": 0, "low": 0, "high": 0.01, "n": 0}]}, {})
    assert "0.0 % (0.0 to 1.0) – 0" in plain(thinking_section(found))


def test_a_training_loss_is_drawn_once(thoughtful):
    phase = thoughtful.phases[2]
    logged = {**phase.__dict__, "losses": (Curve("thinker", ((1, 2.0), (2, 1.0))),)}
    assert "Nats per token on the batch" not in phase_section(type(phase)(**logged))
    alone = type(phase)(**{**logged, "thinking": Thinking()})
    assert "Training loss" in phase_section(alone) and "Branched" not in phase_section(alone)
    phases = (*thoughtful.phases[:2], type(phase)(**logged))
    told = markdown(type(thoughtful)(**{**thoughtful.__dict__, "phases": phases}))
    assert told.count("### Training loss") == 1, "phase 1's"


def test_markdown_tells_of_thoughts_too(thoughtful):
    told = markdown(thoughtful)
    for line in ("| with thoughts | 83.0 % (80.0 to 86.0) | – | 600 | the model thinks, then answers |",
                 "**No theater: every requirement that could be computed is met.**", "### Step 2: Quiet-STaR",
                 "| `expert: clerk → step: 8+5+0=13 → step: 3+2+1=6` | `63` | right | thought valid |",
                 "| thinker | `copy 1 2` | `expert: clerk → step: 1 2` | `1 2` | right |",
                 "- not used: coherence and right answers"):  # fmt: skip
        assert line in told, line
    assert "&lt;of its kind&gt;" in told and whole_rows(told) > 80


# The house


def test_the_report_loads_nothing_that_trains(tmp_path, storage):
    code = f"""
import sys
from pathlib import Path
from agent_forge.dashboard.collect import collect
from agent_forge.dashboard.markdown import markdown
from agent_forge.dashboard.page import html_page
from forgekit.store.storage import ModelStorage
found = collect(ModelStorage({str(storage.base_path)!r}), {sample.SESSION!r})
assert html_page(found) and markdown(found)
assert "torch" not in sys.modules and "transformers" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_same_session_gives_the_same_page(storage, report):
    again = collect(ModelStorage(storage.base_path), sample.SESSION)
    assert html_page(again) == html_page(report) and markdown(again) == markdown(report)
    assert all(isinstance(e, Evidence) for e in report.evidence)
