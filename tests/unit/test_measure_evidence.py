import json

import numpy as np
import pytest

from forgekit.errors import ConfigError, DataError
from forgekit.measure.evidence import Evidence, Gate, Question, judge, skill

FIELDS = "claim metric before after baseline ci95 n seeds split chance compute verdict".split()


def right(share, n=200):
    """n items of which the first ``share`` are right."""
    return np.arange(n) < share * n


def compare(before, after, **changes):
    question = {
        "claim": "the model sorts better",
        "metric": "accuracy",
        "chance": 0.1,
        "split": "report",
        "seeds": (42,),
        "compute": {"tokens": 1000},
    }
    return Evidence.compare(before=before, after=after, **{**question, **changes})


def test_the_fields_are_exactly_those_of_the_design():
    assert list(Evidence.model_fields) == FIELDS
    evidence = compare(right(0.5), right(0.7), baseline=0.6)
    stored = json.loads(json.dumps(evidence.model_dump(mode="json")))
    assert list(stored) == FIELDS and Evidence.build(stored) == evidence
    assert evidence.before == 0.5 and evidence.after == 0.7 and evidence.baseline == 0.6 and evidence.n == 200
    assert evidence.ci95[0] < 0.2 < evidence.ci95[1]


@pytest.mark.parametrize(
    "before, after, verdict",
    [
        (0.5, 0.7, "improved"),
        (0.7, 0.5, "worse"),
        (0.5, 0.5, "no-difference"),
        (0.5, 0.505, "no-difference"),
        (0.1, 0.9, "no-signal"),  # the parent is at chance
        (0.13, 0.9, "no-signal"),  # the parent's interval includes chance
        (0.0, 0.9, "no-signal"),  # the parent is below chance
    ],
)
def test_verdicts_of_right_and_wrong_items(before, after, verdict):
    assert compare(right(before), right(after)).verdict == verdict


def test_too_few_items_carry_no_verdict_but_are_reported():
    evidence = compare([1] * 10 + [0] * 9, [1] * 19)
    assert evidence.verdict == "no-signal" and evidence.n == 19 and evidence.ci95[0] > 0
    assert compare([1] * 10 + [0] * 10, [1] * 20).verdict == "improved"


def test_a_new_skill_needs_a_result_above_chance():
    assert compare(right(0.1), right(0.9), parent_must_beat_chance=False).verdict == "improved"
    assert compare(right(0.0), right(0.1), parent_must_beat_chance=False).verdict == "no-signal"
    assert compare(right(0.9), right(0.1), parent_must_beat_chance=False).verdict == "worse"


def test_where_less_is_better():
    rng = np.random.default_rng(0)
    before = rng.normal(2.0, 0.1, 100)
    better = before - 0.2 + rng.normal(0, 0.05, 100)
    less = {"metric": "loss", "higher_is_better": False, "chance": 2.3}
    evidence = compare(before, better, **less)
    assert evidence.verdict == "improved" and evidence.ci95[1] < 0
    assert compare(better, before, **less).verdict == "worse"
    assert compare(before, better, **{**less, "chance": 2.0}).verdict == "no-signal"
    assert compare(before, better, **{**less, "chance": None}).verdict == "improved"


def test_unmeasured_sides_give_no_signal():
    evidence = compare(right(0.5), None)
    assert (evidence.before, evidence.after, evidence.ci95, evidence.n) == (0.5, None, None, 0)
    assert evidence.verdict == "no-signal" and "not measured" in str(evidence)
    assert compare([], right(0.5)).verdict == "no-signal" and compare(None, None).before is None


def test_a_perfect_pair_is_not_certain():
    evidence = compare(right(1.0, 20), right(1.0, 20))
    assert evidence.ci95[0] < 0 < evidence.ci95[1] and evidence.verdict == "no-difference"


def test_the_same_items_give_the_same_evidence():
    question = Question(claim="c", metric="m", chance=0.0, split="report", seeds=(), compute={})
    values = np.random.default_rng(0).random((2, 50))
    assert judge(*values, question) == judge(*values, question)


def test_bad_questions_and_scores_are_refused_in_one_line():
    with pytest.raises(ConfigError, match="did you mean split"):
        compare(right(0.5), right(0.5), splitt="x")
    with pytest.raises(ConfigError, match="chance"):
        Evidence.compare(before=[1], after=[1], claim="c", metric="m", split="s", seeds=(), compute={})
    with pytest.raises(DataError, match="after: 1 of 2 values not finite"):
        compare([1.0, 2.0], [1.0, float("nan")])
    with pytest.raises(DataError, match="2 items before, 1 after"):
        compare([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"verdict": "better"}, "verdict"),
        ({"before": float("nan")}, "before"),
        ({"after": float("inf")}, "after"),
        ({"ci95": (0.3, 0.1)}, "low end"),
        ({"ci95": None}, "without"),
        ({"after": None}, "without"),
        ({"n": -1}, "n"),
        ({"claim": ""}, "claim"),
        ({"compute": {"flops": float("nan")}}, "compute"),
        ({"p_value": 0.1}, "unknown key"),
    ],
)
def test_evidence_that_contradicts_itself_is_refused(changes, said):
    stored = compare(right(0.5), right(0.7)).model_dump(mode="json") | changes
    with pytest.raises(ConfigError, match=said) as caught:
        Evidence.build(stored)
    assert "\n" not in str(caught.value)


# --- gates -----------------------------------------------------------------------------------------------------

IMPROVED = compare(right(0.5), right(0.7), claim="sorts", metric="sort/accuracy")
SAME = compare(right(0.5), right(0.5), claim="copies", metric="copy/accuracy")
WORSE = compare(right(0.7), right(0.5), claim="reverses", metric="reverse/accuracy")
SILENT = compare(right(0.1), right(0.9), claim="adds", metric="add/accuracy")


@pytest.mark.parametrize(
    "requires, passed",
    [
        ({"sorts": "improved"}, True),
        ({"sort/accuracy": "improved", "copies": "not-worse"}, True),
        ({"sorts": "not-worse"}, True),
        ({"copies": "improved"}, False),
        ({"copies": "improved", "sorts": "improved"}, False),
        ({"reverses": "not-worse"}, False),
        ({"adds": "improved"}, False),
        ({"adds": "not-worse"}, False),
        ({"sorts": "improved", "flies": "not-worse"}, False),
    ],
)
def test_gates_pass_only_what_evidence_carries(requires, passed):
    result = Gate(name="phase", requires=requires).decide([IMPROVED, SAME, WORSE, SILENT])
    assert result.passed is passed and len(result.reasons) == len(requires)
    assert any(reason.startswith("no: ") for reason in result.reasons) is not passed
    assert all("\n" not in reason for reason in result.reasons)


def test_every_evidence_for_a_requirement_counts():
    other = WORSE.replace(metric="sort/accuracy")
    for given in ([IMPROVED, other], [other, IMPROVED]):
        result = Gate(name="g", requires={"sort/accuracy": "improved"}).decide(iter(given))
        assert not result.passed and len(result.reasons) == 2


def test_a_gate_without_evidence_or_requirements():
    result = Gate(name="g", requires={"sorts": "not-worse"}).decide([])
    assert not result.passed and "no evidence" in result.reasons[0]
    assert Gate(name="g", requires={"sorts": "improved"}).policy == "fall_back"
    for values in ({"requires": {}}, {"requires": {"a": "better"}}, {"requires": {"a": "improved"}, "policy": "go"}):
        with pytest.raises(ConfigError):
            Gate.build({"name": "g", **values})


def test_skill_is_the_chance_corrected_score():
    assert skill(0.55, chance=0.1) == pytest.approx(0.5)
