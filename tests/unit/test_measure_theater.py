"""Anti-theater: models whose use of their thoughts is known are told apart by the controls, each by the right one."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scripted import Scripted
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from forgekit.data.gym import Problem, generate
from forgekit.data.thoughts import check
from forgekit.data.tokenizer import question, train_tokenizer
from forgekit.errors import ConfigError, DataError, ForgeError
from forgekit.infer.engine import Engine
from forgekit.infer.sampling import SamplingConfig
from forgekit.measure.coherence import CoherenceScorer
from forgekit.measure.evidence import Gate
from forgekit.measure.stats import paired_difference
from forgekit.measure.theater import (
    TheaterConfig,
    anti_theater,
    correlation,
    evidence,
    share_lost,
    strangers,
    think,
)
from forgekit.models.base import CausalLM

WORDS = "the quick brown fox jumps over the lazy dog, while 0123456789 add counts + = . " * 40
FEW = TheaterConfig(thinking_budget=24, rows=7)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS], 320)


@pytest.fixture(scope="module")
def problems() -> list[Problem]:
    return [p for level in (1, 2) for p in {q.prompt: q for q in generate("add", level, 40, seed=4)}.values()][:40]


def total(prompt: str) -> str:
    a, b = prompt.split()[1:]
    return str(int(a) + int(b))


def told(prompt: str) -> str:
    """A thought that names the answer."""
    return f"<step>{total(prompt)}"


def copied(prompt: str, thought: str | None) -> str:
    """The answer of a model that reads it from its thought, and knows nothing without."""
    last = (thought or "").rpartition("<step>")[2]
    return last if last.isdigit() else "0"


def failed(report) -> set[str]:
    return {finding.name for finding in report.findings if finding.passed is False}


def run(tokenizer, problems, thought, answer, **rest):
    model = Scripted(tokenizer, thought, answer)
    assert isinstance(model, CausalLM)
    return anti_theater(model, tokenizer, problems, FEW, **rest)


def test_a_model_that_copies_from_its_thought_is_no_theater(tokenizer, problems):
    report = run(tokenizer, problems, told, copied)
    assert not report.theater_detected and failed(report) == set()
    assert {name: value[0] for name, value in report.accuracy.items() if name != "shuffled"} == {
        "with": 1.0,
        "without": 0.0,
        "filler": 0.0,
    }
    same = [p.answer == problems[i].answer for p, i in zip(problems, strangers(problems, 0))]
    assert report.rights["shuffled"].tolist() == same, "a stranger's answer is right only where it is the same"
    assert report.lost["filler"][0] == 1 and report.lost["filler"][1] < 1, "agreement of all is not certainty"
    assert report.power[0] > 0.9 and report.generated[0] == 1
    assert [thought.text for thought in report.thoughts] == [told(p.prompt) for p in problems]


def test_a_model_that_thinks_decoratively_is_caught(tokenizer, problems):
    """It thinks of the right answer, and answers right whatever was thought, also without."""
    report = run(tokenizer, problems, told, lambda prompt, thought: total(prompt))
    assert report.theater_detected
    assert failed(report) == {"improvement over without", "predictive power"}
    assert report.power[0] == 0.5, "equal likelihoods are ties"
    assert report.lost == {"shuffled": None, "filler": None} and "no gain" in " ".join(report.reasons)


def test_a_gain_that_any_thought_gives_is_caught_by_both_controls(tokenizer, problems):
    """It answers right as soon as it was allowed to think, whatever the thought says."""
    report = run(tokenizer, problems, told, lambda prompt, thought: "0" if thought is None else total(prompt))
    assert report.theater_detected and report.accuracy["with"][0] == 1
    assert failed(report) == {"lost by shuffled", "lost by filler", "predictive power"}


def test_a_gain_that_more_tokens_give_is_caught_by_the_filler(tokenizer, problems):
    """A stranger's thought misleads it, so only the filler says that its thoughts are mere room to compute."""

    def answer(prompt: str, thought: str | None) -> str:
        if thought and not thought.replace("<reason>", ""):
            return total(prompt)
        return copied(prompt, thought)

    report = run(tokenizer, problems, told, answer)
    assert report.theater_detected and failed(report) == {"lost by filler"}
    assert report.lost["filler"][0] == 0


def test_the_filler_is_as_long_as_the_thought(tokenizer, problems):
    def wordy(prompt: str) -> str:
        return told(prompt) + "<reason>1" * (int(total(prompt)) % 5)

    def answer(prompt: str, thought: str | None) -> str:
        own = len(tokenizer.encode(wordy(prompt)).ids)
        return total(prompt) if thought and len(tokenizer.encode(thought).ids) == own else "0"

    report = run(tokenizer, problems, wordy, answer)
    assert report.accuracy["with"][0] == report.accuracy["filler"][0] == 1
    assert failed(report) >= {"lost by filler"}


def test_requirements_are_met_by_intervals_and_not_by_estimates(tokenizer, problems):
    """A gain on two of forty questions is no gain yet; a filler that loses six tenths may have lost four."""
    two = {p.prompt for p in problems[3:5]}
    report = run(tokenizer, problems, told, lambda p, t: copied(p, t) if p in two or t is None else "x")
    assert report.differences["without"][0] == 0.05 and "improvement over without" in failed(report)
    lucky = {p.prompt for p in problems[::5] + problems[1::5]}

    def answer(prompt: str, thought: str | None) -> str:
        filled = thought and not thought.replace("<reason>", "")
        return total(prompt) if filled and prompt in lucky else copied(prompt, thought)

    report = run(tokenizer, problems, told, answer)
    share, low, _ = report.lost["filler"]
    assert share == 0.6 and low < 0.5 and failed(report) == {"lost by filler"}


def test_an_answer_that_does_not_end_is_wrong(tokenizer, problems):
    report = run(tokenizer, problems[:20], told, lambda prompt, thought: total(prompt) + "<reason>" * 40)
    assert report.accuracy["with"][0] == report.generated[0] == 0


def test_a_model_with_random_thoughts_that_answers_right_is_caught(tokenizer, problems):
    rng = np.random.default_rng(0)
    noise = {p.prompt: f"<reason>{''.join(map(str, rng.integers(0, 10, 5)))}" for p in problems}
    report = run(tokenizer, problems, noise.__getitem__, lambda prompt, thought: total(prompt))
    assert report.theater_detected and "improvement over without" in failed(report)
    assert report.accuracy["with"][0] == report.accuracy["without"][0] == 1


def test_equal_compute_without_thoughts_is_a_requirement_when_it_was_measured(tokenizer, problems):
    n = len(problems)
    report = run(tokenizer, problems, told, copied, baselines={"no_thought": np.ones(n), "parent": np.zeros(n)})
    assert failed(report) == {"improvement over no_thought"} and report.differences["no_thought"][0] == 0
    assert report.differences["parent"][0] == 1
    assert not run(tokenizer, problems, told, copied, baselines={"no_thought": np.zeros(n)}).theater_detected


def test_too_few_questions_show_nothing(tokenizer, problems):
    report = run(tokenizer, problems[:10], told, copied)
    assert failed(report) == {"items"} and "10 questions are fewer than 20" in report.reasons[0]


def test_a_thought_that_never_ends_is_closed_and_answered(tokenizer, problems):
    report = run(tokenizer, problems[:20], lambda prompt: told(prompt) + "<reason>" * 60, copied)
    assert {len(thought.tokens) for thought in report.thoughts} == {24}
    assert report.accuracy["with"][0] == 0


def test_the_forward_pass_judges_as_generation_does(tokenizer, problems):
    """Given its own thought, an answer is right exactly where the model generates it; and so without a thought."""

    def thought(prompt: str) -> str:
        return told(prompt) if int(total(prompt)) % 3 else "<step>7"

    def answer(prompt: str, said: str | None) -> str:
        return copied(prompt, said) if said else total(prompt)[: 1 + int(total(prompt)) % 2]

    report = run(tokenizer, problems, thought, answer)
    assert report.rights["with"].tolist() == [float(t.answered) for t in report.thoughts]
    assert 0 < report.generated[0] < 1
    engine = Engine(Scripted(tokenizer, thought, answer), tokenizer)
    plain = engine.generate([question(p.prompt) for p in problems], SamplingConfig(thinking="off", max_tokens=8))
    right = [float(said.text == p.answer) for said, p in zip(plain, problems)]
    assert report.rights["without"].tolist() == right and 0 < sum(right) < len(right)


def test_a_model_that_always_opens_a_thought_is_not_called_wrong_without_one(tokenizer, problems):
    """With thinking off the marker cannot be drawn: what counts is the likeliest of the other tokens."""

    class Eager(Scripted):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits[..., self.marks["<think>"]] = 2 * self.sure
            return out

    model = Eager(tokenizer, told, lambda prompt, thought: total(prompt))
    report = anti_theater(model, tokenizer, problems, FEW)
    assert report.accuracy["without"][0] == report.accuracy["shuffled"][0] == 1
    assert np.isfinite(report.nats["without"]).all()


def test_coherence_is_held_against_right_answers(tokenizer, problems):
    """Thoughts that are false where the answer is wrong correlate; coherent nonsense beside wrong answers does not."""

    def columns(prompt: str) -> str:
        a, b = prompt.split()[1:]
        width, carry, said = max(len(a), len(b)), 0, []
        for x, y in zip(reversed(a.zfill(width)), reversed(b.zfill(width))):
            said.append(f"<step>{x}+{y}+{carry}={int(x) + int(y) + carry}")
            carry = (int(x) + int(y) + carry) // 10
        return "".join(said)

    def slipping(prompt: str) -> str:
        said = columns(prompt)
        return said if int(total(prompt)) % 3 else said.replace("=", "=9")

    def answer(prompt: str, thought: str | None) -> str:
        return total(prompt) if thought == columns(prompt) else "0"

    model = Scripted(tokenizer, slipping, answer)
    others = [(p.prompt, columns(p.prompt)) for p in generate("add", 3, 30, seed=9, split="select")]
    scorer = CoherenceScorer(model, tokenizer).calibrate(others)
    report = anti_theater(model, tokenizer, problems, FEW, scorer=scorer)
    assert report.correlation[1] > 0.3 and "coherence correlation" not in failed(report)
    assert report.summary()["coherence"][0] == pytest.approx(np.mean([item.coherence for item in report.scored]))
    assert report.summary()["valid_thoughts"][0] == np.mean([item.valid for item in report.scored])
    valid = np.array([check(p.prompt, f"<think>{t.text}</think>").valid for p, t in zip(problems, report.thoughts)])
    assert report.rights["with"].tolist() == valid.astype(float).tolist() and 5 <= valid.sum() <= len(valid) - 5
    backwards = Scripted(tokenizer, slipping, lambda p, t: "0" if t in (None, columns(p)) else total(p))
    against = anti_theater(backwards, tokenizer, problems, FEW, scorer=scorer)
    assert against.correlation[2] < 0.3 and "coherence correlation" in failed(against)


def test_the_report_is_told_by_level_and_as_json(tokenizer, problems):
    report = run(tokenizer, problems, told, lambda p, t: copied(p, t) if len(p) > 7 else total(p))
    assert list(report.levels) == ["add/1", "add/2"]
    for level, row in enumerate(report.levels.values(), 1):
        at = [i for i, p in enumerate(problems) if p.level == level]
        assert row["n"] == len(at)
        for condition in ("with", "without", "shuffled", "filler"):
            assert row[condition] == report.rights[condition][at].mean()
        assert row["gain"] == paired_difference(report.rights["without"][at], report.rights["with"][at])
    told_again = json.loads(json.dumps(report.summary()))
    assert told_again["n"] == len(problems) and told_again["theater_detected"] is report.theater_detected
    assert told_again["reasons"] == list(report.reasons)
    assert told_again["thinking_tokens"] == np.mean([len(thought.tokens) for thought in report.thoughts]) > 3


def test_evidence_and_a_gate(tokenizer, problems):
    given = {"baselines": {"no_thought": np.zeros(len(problems)), "parent": np.zeros(len(problems))}}
    about = {"split": "report", "chance": 0.01, "seeds": (1,), "compute": {"flops": 1.0}}
    claims = ("thoughts help", "shuffled thoughts lose the gain", "filler thoughts lose the gain")
    gate = Gate(name="thinking", requires=dict.fromkeys((*claims, "answers follow from their thoughts"), "improved"))
    good = evidence(run(tokenizer, problems, told, copied, **given), **about)
    assert {item.claim: item.verdict for item in good} == {
        "thoughts help": "improved",
        "thoughts beat equal compute": "improved",
        "thoughts beat the parent": "improved",
        "shuffled thoughts lose the gain": "improved",
        "filler thoughts lose the gain": "improved",
        "answers follow from their thoughts": "improved",
        "coherence tells right from wrong": "no-signal",
    }
    assert gate.decide(good).passed
    empty = evidence(run(tokenizer, problems, told, lambda p, t: "0" if t is None else total(p)), **about)
    verdicts = {item.claim: item.verdict for item in empty}
    assert verdicts["thoughts help"] == "improved" and verdicts["filler thoughts lose the gain"] == "worse"
    assert not gate.decide(empty).passed and "thoughts beat the parent" not in verdicts


def test_nobody_gets_the_own_thought_and_everybody_one_of_the_same_kind():
    some = generate("state", 1, 60, seed=1) + generate("add", 3, 31, seed=1) + generate("add", 2, 2, seed=8)
    lender = strangers(some, seed=3)
    assert sorted(lender) == list(range(len(some))), "a permutation"
    for own, other in zip(some, (some[i] for i in lender)):
        assert own.prompt != other.prompt and (own.family, own.level) == (other.family, other.level)
    assert len({p.prompt for p in some[:60]}) < 60, "some questions repeat"
    assert strangers(some, seed=3) == lender != strangers(some, seed=4)


def test_a_lonely_question_is_refused(problems):
    lonely = [Problem("add", 9, "add 1 2", "3")]
    with pytest.raises(DataError, match="add/9: 1 of 1 problems ask the same; give at least one other"):
        strangers([*problems, *lonely], 0)
    with pytest.raises(DataError, match="add/9: 2 of 3 problems"):
        strangers([*lonely, *lonely, Problem("add", 9, "add 2 2", "4")], 0)


def test_what_cannot_be_used_is_refused_in_one_line(tokenizer, problems):
    model = Scripted(tokenizer, told, copied)
    for filler in ("two words", "</think>"):
        with pytest.raises(ConfigError, match="no single token that a thought can repeat"):
            anti_theater(model, tokenizer, problems, TheaterConfig(filler=filler))
    with pytest.raises(ConfigError, match="baselines: unknown name 'better'; use no_thought or parent"):
        anti_theater(model, tokenizer, problems, FEW, baselines={"better": [1]})
    with pytest.raises(DataError, match=r"baselines: parent: shape \(2,\) does not say"):
        anti_theater(model, tokenizer, problems, FEW, baselines={"parent": [1, 0]})
    with pytest.raises(ConfigError, match="min_lost"):
        TheaterConfig.build({"min_lost": 0})
    bare = Tokenizer(WordLevel({"<|end|>": 0, "<reason>": 1, "?": 2}, unk_token="?"))
    with pytest.raises(ForgeError, match="the tokenizer has no <think> and </think>; use a model that thinks"):
        anti_theater(model, bare, problems, FEW)
    model.context_limit = 14
    with pytest.raises(ForgeError, match="context is 14"):
        anti_theater(model, tokenizer, problems, FEW)


def test_thoughts_do_not_depend_on_how_many_are_thought_at_once(tokenizer, problems):
    model = Scripted(tokenizer, told, copied)
    alone = think(model, tokenizer, problems[:9], FEW.replace(rows=1))
    assert alone == think(model, tokenizer, problems[:9], FEW)


def test_share_lost_against_hand_made_numbers():
    own = np.array([1.0] * 80 + [0.0] * 20)
    without = np.array([1.0] * 20 + [0.0] * 80)
    half = np.array([1.0] * 50 + [0.0] * 50)
    share, low, high = share_lost(own, without, half)
    assert share == pytest.approx(0.5) and 0.3 < low < 0.5 < high < 0.7
    whole, none = share_lost(own, without, without), share_lost(own, without, own)
    assert whole[0] == 1 and 0.8 < whole[1] < 1 < whole[2] < 1.2, "agreement of all is not certainty"
    assert none[0] == 0 and -0.2 < none[1] < 0 < none[2] < 0.2
    assert share_lost(own, without, np.zeros(100))[0] > 1, "a control can do harm"
    assert share_lost(own, own, half) is None and share_lost(without, own, half) is None


def test_the_correlation_is_pearsons_and_knows_when_it_is_none():
    rng = np.random.default_rng(0)
    right = (rng.random(200) < 0.6).astype(float)
    value = 1000 + 0.001 * (right + rng.normal(size=200))
    found = correlation(value, right)
    assert found[0] == pytest.approx(np.corrcoef(value, right)[0, 1]) and found[1] < found[0] < found[2]
    assert correlation(value, np.ones(200)) is None
    assert correlation(value, np.r_[np.zeros(4), np.ones(196)]) is None
    assert correlation(np.full(200, 0.3), right) is None
