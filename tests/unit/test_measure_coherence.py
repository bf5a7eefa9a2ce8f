"""Coherence: what it gives to good thoughts and to spoilt ones, on a model whose language is known."""

from __future__ import annotations

import math
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from scripted import Scripted
from tiny import gpt_config, made, trm_config

from forgekit.data.gym import generate
from forgekit.data.plans import GymMix
from forgekit.data.thoughts import CLOSE, OPEN, write_traces
from forgekit.data.tokenizer import question, train_tokenizer
from forgekit.errors import ConfigError, DataError, ResourceError
from forgekit.measure.coherence import (
    Coherence,
    CoherenceConfig,
    CoherenceScorer,
    OwnStates,
    SentenceStates,
    Space,
    Stranger,
    contradicts,
)
from forgekit.measure.prepared import score_rows

WORDS = "the quick brown fox jumps over the lazy dog, while 0123456789 add counts + = . clerk odd even guess " * 40
MIX = [GymMix(family="add", levels=(3, 4, 5)), GymMix(family="state", levels=(2, 3, 4))]
PARTS = ("semantic", "logical", "relevance", "fluency")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS], 320)


@pytest.fixture(scope="module")
def traces():
    """Verified thoughts by split, as (prompt, thought)."""
    return {
        split: [(t.problem.prompt, str(t.thought)) for t in write_traces(MIX, 8, seed=3, split=split).traces]
        for split in ("select", "report")
    }


@pytest.fixture(scope="module")
def model(tokenizer, traces):
    """It would write exactly these thoughts."""
    known = dict(traces["select"] + traces["report"])
    inside = {prompt: thought.removeprefix(OPEN).removesuffix(CLOSE) for prompt, thought in known.items()}
    return Scripted(tokenizer, lambda prompt: inside.get(prompt, "<step>1"), lambda prompt, thought: "0", sure=6.0)


@pytest.fixture(scope="module")
def scorer(model, tokenizer, traces):
    return CoherenceScorer(model, tokenizer).calibrate(traces["select"])


def mean(found: list[Coherence], part: str = "coherence") -> float:
    return float(np.mean([getattr(item, part) for item in found]))


def other_digit(thought: str, rng: np.random.Generator) -> str:
    """One digit of the thought is another one."""
    places = [i for i, c in enumerate(thought) if c.isdigit()]
    at = places[int(rng.integers(len(places)))]
    return f"{thought[:at]}{(int(thought[at]) + int(rng.integers(1, 10))) % 10}{thought[at + 1 :]}"


def turned(thought: str) -> str:
    """The pieces from last to first."""
    pieces = thought.removeprefix(OPEN).removesuffix(CLOSE).replace("<", "\n<").strip().split("\n")
    return OPEN + "".join(reversed(pieces)) + CLOSE


def test_coherence_falls_for_every_way_to_spoil_a_thought(scorer, tokenizer, traces):
    items, rng = traces["report"], np.random.default_rng(0)
    prompts, thoughts = zip(*items)
    noise = [OPEN + "<step>" + tokenizer.decode(rng.integers(40, 320, 12).tolist()) + CLOSE for _ in items]
    spoilt = {
        "one digit changed": [other_digit(thought, rng) for thought in thoughts],
        "steps turned round": [turned(thought) for thought in thoughts],
        "of the next question": [*thoughts[1:], thoughts[0]],
        "of another family": np.roll(thoughts, len(thoughts) // 2).tolist(),
        "random": noise,
    }
    good = scorer.score(items)
    assert mean(good) > 0.85 and all(item.valid for item in good)
    assert {part: mean(good, part) > 0.6 for part in PARTS} == dict.fromkeys(PARTS, True)
    scores = {name: scorer.score(list(zip(prompts, texts))) for name, texts in spoilt.items()}
    for name, found in scores.items():
        worse = np.array([a.coherence for a in good]) - [b.coherence for b in found]
        assert (worse > 0).mean() > 0.9, name
    assert mean(scores["one digit changed"], "logical") < 0.9 < mean(good, "logical")
    assert mean(scores["one digit changed"]) > mean(scores["of the next question"]) > mean(scores["random"])
    assert mean(scores["of another family"], "semantic") < mean(good, "semantic") - 0.1
    assert abs(mean(scores["of the next question"], "relevance") - 0.5) < 0.1, "a stranger gets one half"
    assert not any(item.valid for name in ("random", "of another family") for item in scores[name])
    assert not any(item.valid for item in scores["of the next question"])


def test_all_scores_are_shares_and_coherence_is_their_weighted_mean(scorer, traces):
    items = traces["report"][:6] + [(traces["report"][0][0], "words <step> and more"), ("what?", "<reason>nothing")]
    for item in scorer.score(items):
        parts = [getattr(item, part) for part in PARTS]
        assert all(0 <= part <= 1 for part in parts)
        assert item.coherence == pytest.approx(np.dot(parts, (0.30, 0.30, 0.25, 0.15)))


def test_scores_do_not_depend_on_company_or_repetition(scorer, traces):
    items = traces["report"]
    together, again = scorer.score(items), scorer.score(items)
    assert together == again
    for i in (0, len(items) // 2, len(items) - 1):
        alone = scorer.score([items[i]])[0]
        assert [getattr(alone, p) for p in PARTS] == pytest.approx([getattr(together[i], p) for p in PARTS], abs=1e-5)


def test_the_outer_pair_may_be_left_off_but_not_half_of_it(scorer, traces):
    prompt, thought = traces["report"][0]
    inside = thought.removeprefix(OPEN).removesuffix(CLOSE)
    whole, bare, unclosed = scorer.score([(prompt, thought), (prompt, inside), (prompt, OPEN + inside)])
    assert whole == bare and whole.valid and not unclosed.valid
    assert unclosed.logical == 0 and unclosed.fluency == pytest.approx(whole.fluency), "without form, nothing holds"


def test_a_thought_without_form_or_truth_or_coherence_is_not_valid(model, tokenizer, scorer, traces):
    prompt, thought = next(item for item in traces["report"] if item[0].startswith("add") and "<doubt>" not in item[1])
    texts = [thought, thought.replace("<think>", "<think>well "), thought.replace("=1", "=2")]
    good, formless, false = scorer.score([(prompt, text) for text in texts])
    assert (good.valid, formless.valid, false.valid) == (True, False, False)
    high = CoherenceConfig(threshold=1.0)
    strict = CoherenceScorer(model, tokenizer, high, calibration=scorer.calibration)
    assert not strict.score([(prompt, thought)])[0].valid
    assert scorer.score([(prompt, ""), (prompt, OPEN + CLOSE)]) == [Coherence(0.0, 0.0, 0.0, 0.0, 0.0, False)] * 2
    assert scorer.score([]) == []


def test_mended_slips_count_as_true(scorer, traces):
    doubted = [item for item in traces["report"] + traces["select"] if "<doubt>" in item[1]]
    assert doubted, "the traces hold some"
    fresh = [item for item in doubted if item[0] not in scorer.calibration.questions]
    assert mean(scorer.score(fresh), "logical") == 1


def test_fluency_is_the_likelihood_on_the_scale_of_the_vocabulary(model, tokenizer, scorer, traces):
    prompt, thought = traces["report"][0]
    (found,) = scorer.score([(prompt, thought)])
    ids = tokenizer.encode(question(prompt) + thought).ids
    start = len(tokenizer.encode(question(prompt) + OPEN).ids)
    with torch.inference_mode():
        lines = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    nats = -lines[torch.arange(start - 1, len(ids) - 1), ids[start:]].mean().item()
    assert found.fluency == pytest.approx(1 - nats / math.log(320), abs=1e-5)


def test_what_cannot_be_checked_is_judged_by_its_order_and_by_contradictions(tokenizer, traces):
    """The model has a plan for each text: its order is likely, another is not."""
    plans = {
        f"how {i}?": f"<step>take {word}<step>cut {word}<step>eat {word}" for i, word in enumerate(WORDS.split()[:24])
    }
    model = Scripted(tokenizer, lambda prompt: plans.get(prompt, "<step>1"), lambda prompt, thought: "0", sure=6.0)
    items = list(plans.items())
    scorer = CoherenceScorer(model, tokenizer).calibrate(items[:12])
    prompts, thoughts = zip(*items[12:])
    straight = scorer.score(items[12:])
    backward = scorer.score(list(zip(prompts, map(turned, thoughts))))
    assert mean(straight, "logical") > 0.8 > 0.6 > mean(backward, "logical")
    one, against = scorer.score([(prompts[0], "<step>take it"), (prompts[0], "<step>x = 3<step>x is 4")])
    assert one.logical == 0.5, "one step has no order"
    assert against.logical == 0
    lone = CoherenceScorer(model, tokenizer).calibrate([(p, f"<step>take {i}") for i, p in enumerate(plans)][:12])
    assert lone.calibration.order is None and lone.score(items[12:13])[0].logical == 0.5


@pytest.mark.parametrize(
    "thought, found",
    [
        ("<step>x = 3<step>x = 4", True),
        ("<step>x is 3<reason>y is 4<step>x = 3", False),
        ("<step>x = 3<doubt>x = 4", False),
        ("<step>x = 3<doubt>x = 4<step>x = 3", True),
        ("<step>x = 3 + 1<step>x = 4 + 1", False),
        ("<think><step>cold is no<step> cold is yes.</think>", True),
    ],
)
def test_contradictions(thought, found):
    assert contradicts(thought) is found


def test_calibration_and_report_are_kept_apart(model, tokenizer, scorer, traces):
    with pytest.raises(DataError, match="coherence: is not calibrated; call calibrate with thoughts of a split"):
        CoherenceScorer(model, tokenizer).score(traces["report"])
    with pytest.raises(DataError, match="was calibrated on; report on another split"):
        scorer.score(traces["report"] + traces["select"][:1])
    with pytest.raises(DataError, match="3 distinct questions with 3 thoughts; give 8 or more"):
        CoherenceScorer(model, tokenizer).calibrate(traces["select"][:3] * 9)
    with pytest.raises(DataError, match="none empty"):
        CoherenceScorer(model, tokenizer).calibrate([*traces["select"], ("add 1 1", OPEN + CLOSE)])
    carried = CoherenceScorer(model, tokenizer, calibration=scorer.calibration)
    assert carried.score(traces["report"][:3]) == scorer.score(traces["report"][:3])


def test_a_diverged_model_is_refused(model, tokenizer, scorer, traces):
    broken = Scripted(tokenizer, model.thought, model.answer, sure=math.nan)
    with pytest.raises(DataError, match=r"model: gives \d+ of \d+ thoughts no finite likelihood"):
        CoherenceScorer(broken, tokenizer, calibration=scorer.calibration).score(traces["report"])


def test_weights_and_encoders_are_checked(model, tokenizer, monkeypatch):
    with pytest.raises(ConfigError, match="weights sum to 1.1; make them sum to 1"):
        CoherenceConfig.build({"semantic_weight": 0.4})
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(
        ResourceError, match=r"embedder: needs the package sentence-transformers; run `pip install agent"
    ):
        CoherenceScorer(model, tokenizer, CoherenceConfig(embedder="sentence-transformers"))


def test_a_sentence_encoder_sees_words_and_its_revision_is_pinned(model, tokenizer, traces, monkeypatch):
    asked_for = []

    class Encoder:
        def __init__(self, name, revision, trust_remote_code):
            if name == "gone":
                raise OSError("no such model\nlong story")
            asked_for.append((name, revision, trust_remote_code))

        def encode(self, texts, show_progress_bar, convert_to_numpy):
            assert not any("<step>" in text for text in texts)
            return np.array([[text.count(d) + 0.1 * len(text) for d in "0123456789"] for text in texts], np.float32)

    package = ModuleType("sentence_transformers")
    package.SentenceTransformer = Encoder
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    config = CoherenceConfig(embedder="sentence-transformers")
    scorer = CoherenceScorer(model, tokenizer, config).calibrate(traces["select"])
    assert (
        asked_for == [(config.sentence_model, config.sentence_revision, False)] and len(config.sentence_revision) == 40
    )
    items = traces["report"]
    rolled = [(prompt, items[i - len(items) // 2][1]) for i, (prompt, _) in enumerate(items)]
    assert mean(scorer.score(items), "semantic") > mean(scorer.score(rolled), "semantic") + 0.1
    with pytest.raises(ResourceError, match=r"gone cannot be loaded \(no such model\); give a folder"):
        SentenceStates("gone")


@pytest.mark.parametrize("config", [gpt_config(vocab_size=320), trm_config(vocab_size=320)], ids=["gpt", "trm_titans"])
def test_own_states_are_means_over_the_real_tokens_of_any_family(config, tokenizer):
    model = made(config, seed=1, stir=0.2).train()
    texts = ["add 12 30", "<step>2+0+0=2<step>1+3+0=4", "the lazy dog jumps over the quick brown fox", "1"]
    many = OwnStates(model, tokenizer)(texts)
    assert many.shape == (4, 16) and model.training
    np.testing.assert_allclose(many, OwnStates(model, tokenizer, batch_tokens=1)(texts), atol=1e-5)
    model.eval()
    with torch.inference_mode():
        alone = model.features(torch.tensor([tokenizer.encode(texts[0]).ids]), None, None)[0]
    np.testing.assert_allclose(many[0], alone[0].mean(0).numpy(), atol=1e-5)
    with pytest.raises(DataError, match="text 1: has no tokens"):
        OwnStates(model, tokenizer)(["a", ""])


def test_a_real_model_is_scored_and_left_in_its_mode(tokenizer, traces):
    model = made(trm_config(vocab_size=320), seed=1, stir=0.2).train()
    found = CoherenceScorer(model, tokenizer).calibrate(traces["select"]).score(traces["report"])
    assert model.training and all(0 <= getattr(item, part) <= 1 for item in found for part in PARTS)
    assert mean(found, "logical") == 1 and mean(found, "fluency") < 0.2, "it has learned nothing"


def test_what_all_embeddings_share_does_not_count():
    """A mean for each side and one loud direction hide what pairs have in common; the space takes both away."""
    rng = np.random.default_rng(0)
    content, loud = rng.normal(size=(60, 12)), rng.normal(size=12)

    def seen(centre: float) -> np.ndarray:
        return content + centre + 30 * rng.normal(size=(60, 1)) * loud

    questions, thoughts = seen(50.0), seen(-20.0)
    space = Space.of(questions[:40], thoughts[:40])
    for part in (slice(0, 40), slice(40, 60)):
        cosine_NN = space.questions(questions[part]) @ space.thoughts(thoughts[part]).T
        own, off = np.diag(cosine_NN), cosine_NN[~np.eye(len(cosine_NN), dtype=bool)]
        assert own.mean() > 0.6 and abs(off.mean()) < 0.1
    assert np.linalg.norm(space.questions(questions), axis=1) == pytest.approx(1)
    assert (space.question_centre, space.thought_centre) == (
        pytest.approx(questions[:40].mean(0)),
        pytest.approx(thoughts[:40].mean(0)),
    )
    assert np.isfinite(Space.of(np.ones((9, 4)), np.ones((9, 4))).thoughts(np.eye(4))).all()


def test_strangers_are_measured_on_pairs_that_do_not_belong_together(scorer, model, tokenizer, traces):
    known, thoughts = scorer.calibration, dict(traces["select"])
    inside = [thoughts[p].removeprefix(OPEN).removesuffix(CLOSE) for p in known.questions]
    cosine_NN = known.vectors_ND @ known.space.thoughts(scorer.embed(inside)).T
    foreign = cosine_NN[~np.eye(len(cosine_NN), dtype=bool)]
    assert (known.semantic.mean, known.semantic.spread) == pytest.approx((foreign.mean(), foreign.std()))
    # Compared with itself, every question would be no better than the others.
    nearest = CoherenceScorer(model, tokenizer, CoherenceConfig(others=1)).calibrate(traces["select"])
    assert nearest.calibration.relevance.spread > 0.1


def test_a_stranger_gets_one_half():
    stranger = Stranger.of([1.0, 3.0])
    assert (stranger.mean, stranger.spread) == (2.0, 1.0)
    assert stranger.above(np.array([2.0, 3.0, -1e9, 1e9])) == pytest.approx([0.5, 1 / (1 + math.exp(-1)), 0, 1])
    assert Stranger.of([2.0, 2.0]).above(np.array([2.0, 2.1])).tolist() == pytest.approx([0.5, 1.0])


def test_rows_of_token_ids_are_scored_as_texts_are(model, tokenizer):
    problems = generate("add", 2, 4, seed=1)
    prompts = [tokenizer.encode(question(p.prompt)).ids for p in problems]
    zero, one = ([tokenizer.encode(f"{digit}<|end|>").ids] * 4 for digit in "01")
    assert score_rows(model, tokenizer, prompts, zero).right.tolist() == [1.0] * 4
    assert score_rows(model, tokenizer, prompts, one).right.tolist() == [0.0] * 4
    model.train()
    muted = score_rows(model, tokenizer, prompts, one, muted=[zero[0][0]])
    assert model.training and muted.right.tolist() == [0.0] * 4, "among equals the lowest token is taken"
    assert (muted.nats < score_rows(model, tokenizer, prompts, one).nats).all()
    with pytest.raises(DataError, match="no rows, or an empty one"):
        score_rows(model, tokenizer, prompts, [[], *one[1:]])
    limited = SimpleNamespace(context_limit=3, config=model.config)
    with pytest.raises(DataError, match=r"row \d: \d+ tokens, the model's context is 3; lower the thinking budget"):
        score_rows(limited, tokenizer, prompts, one)
