"""Where to think: ranks, distances, budgets, and the signs of difficulty."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import VOCAB, gpt_config, made, trm_config

from agent_forge.phases.quietstar.injection import (
    attention_dispersion,
    choose_points,
    entropy,
    outside_thoughts,
    ranks,
    signals_of,
    weighted,
)
from agent_forge.phases.quietstar.talk_config import Marks, PointPlan
from forgekit.models.constants import IGNORE
from forgekit.models.hidden import hidden

quick = settings(max_examples=50, deadline=None, derandomize=True)


@st.composite
def rows(draw):
    B, T = draw(st.integers(1, 4)), draw(st.integers(1, 20))
    seed = draw(st.integers(0, 10**6))
    g = torch.Generator().manual_seed(seed)
    # Few levels, so that equals happen.
    signals = {name: torch.randint(0, 6, (B, T), generator=g) / 5 for name in ("entropy", "dispersion", "loss")}
    return signals, torch.rand(B, T, generator=g) < draw(st.sampled_from([0.2, 0.8, 1.0]))


@quick
@given(rows(), st.integers(1, 5), st.integers(1, 6))
def test_points_keep_every_rule(case, most, interval):
    signals, eligible = case
    plan = PointPlan(most=most, interval=interval, min_length=3, max_length=9)
    points = choose_points(signals, eligible, plan)
    score = weighted({n: ranks(s, eligible) for n, s in signals.items()}, plan)
    assert eligible[points.row_N, points.at_N].all()
    assert ((points.limit_N >= 3) & (points.limit_N <= 9)).all()
    for row in range(len(eligible)):
        mine = points.at_N[points.row_N == row].tolist()
        assert mine == sorted(mine) and len(mine) <= most
        assert all(b - a >= interval for a, b in zip(mine, mine[1:]))
        free = [t for t in range(eligible.shape[1]) if eligible[row, t] and all(abs(t - a) >= interval for a in mine)]
        assert len(mine) == most or not free, "a point is left out only where none fits"
        if mine:
            best = score[row].masked_fill(~eligible[row], -1).max()
            assert max(score[row, t] for t in mine) == best, "the hardest position is always among them"
    assert (points.row_N.diff() >= 0).all()


@quick
@given(rows())
def test_ranks_are_shares_of_the_row(case):
    signals, eligible = case
    found = ranks(signals["entropy"], eligible)
    for row, may, rank in zip(signals["entropy"], eligible, found):
        values = row[may]
        for value, r in zip(values, rank[may]):
            below, equal = (values < value).sum(), (values == value).sum()
            assert r == pytest.approx(float((below + equal / 2) / len(values)))
        assert (rank[~may] == 0).all()
        assert not may.any() or rank[may].mean() == pytest.approx(0.5, abs=1e-5)


@quick
@given(rows())
def test_ranks_do_not_depend_on_scale_nor_on_other_rows(case):
    signals, eligible = case
    score = signals["loss"]
    torch.testing.assert_close(ranks(score, eligible), ranks(score.exp() * 7, eligible))
    torch.testing.assert_close(ranks(score, eligible)[:1], ranks(score[:1], eligible[:1]))


def test_what_is_no_number_is_never_hard():
    score = torch.tensor([[0.1, math.nan, 0.3, math.inf]])
    found = ranks(score, torch.ones(1, 4, dtype=torch.bool))
    assert found.argmax() == 2 and found[0, 1] == found[0, 3] < found[0, 0]


def test_weights_of_missing_signals_count_for_nothing():
    plan = PointPlan(entropy=1.0, dispersion=3.0, loss=2.0)
    a, b = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(weighted({"entropy": a, "loss": b}, plan), torch.tensor([[1 / 3, 2 / 3]]))
    torch.testing.assert_close(weighted({"entropy": a}, plan), a)
    torch.testing.assert_close(weighted({"dispersion": a, "entropy": b}, plan), torch.tensor([[0.75, 0.25]]))


def test_harder_positions_may_think_longer():
    plan = PointPlan(most=3, interval=1, entropy=1.0, dispersion=0.0, loss=0.0, min_length=8, max_length=64)
    points = choose_points({"entropy": torch.tensor([[0.0, 0.5, 1.0]])}, torch.ones(1, 3, dtype=torch.bool), plan)
    assert points.limit_N.tolist() == [8, 36, 64]


def test_rows_where_nothing_is_eligible_have_no_points():
    signals = {"entropy": torch.rand(3, 5)}
    eligible = torch.zeros(3, 5, dtype=torch.bool)
    assert len(choose_points(signals, eligible, PointPlan())) == 0
    eligible[1, 2] = True
    points = choose_points(signals, eligible, PointPlan())
    assert (points.row_N.tolist(), points.at_N.tolist()) == ([1], [2])


def test_entropy_of_known_distributions():
    assert entropy(torch.zeros(5)) == pytest.approx(math.log(5))
    assert entropy(torch.tensor([0.0, -math.inf, 0.0])) == pytest.approx(math.log(2))
    assert entropy(torch.tensor([100.0, 0.0])) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("config", [gpt_config(), trm_config(t_max=0)], ids=["gpt", "trm"])
def test_signals_are_those_of_the_models_own_scores(config, monkeypatch):
    monkeypatch.setattr("agent_forge.phases.quietstar.injection.CHUNK", 7)  # cut in the middle of rows
    model = made(config, stir=0.2)
    ids = torch.randint(VOCAB, (3, 6), generator=torch.Generator().manual_seed(0))
    labels = ids.roll(-1, 1)
    labels[0, 2] = IGNORE
    found = signals_of(model, hidden(model, ids)[0], labels)
    log_p = model(ids).logits.log_softmax(-1)
    torch.testing.assert_close(found["entropy"], -(log_p.exp() * log_p).sum(-1) / math.log(VOCAB))
    missed = 1 - log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0].exp()
    missed[0, 2] = 0
    torch.testing.assert_close(found["loss"], missed, rtol=1e-4, atol=1e-5)
    assert "loss" not in signals_of(model, hidden(model, ids)[0], None)


@pytest.mark.parametrize("config", [gpt_config(), gpt_config(window=3), trm_config()], ids=["gpt", "window", "trm"])
def test_dispersion_is_one_for_uniform_attention_and_zero_for_sharp(config):
    model = made(config, stir=0.2)
    ids = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(0))

    def measured(gain: float):
        for layer in model.attentions():
            layer.gain_H.data.fill_(gain)
        return attention_dispersion(model, lambda: hidden(model, ids)[0])

    features, flat = measured(0.0)
    torch.testing.assert_close(features, hidden(model, ids)[0])
    torch.testing.assert_close(flat[:, 1:], torch.ones(2, 7))
    assert (flat[:, 0] == 0).all(), "the first token has no choice"
    _, sharp = measured(1e4)
    assert sharp.max() < 0.6 and sharp.mean() < 0.2
    assert not any(layer._forward_pre_hooks for layer in model.attentions())


def test_without_attention_layers_to_see_there_is_no_dispersion():
    class Closed(torch.nn.Module):
        def attentions(self):
            return []

    assert attention_dispersion(Closed(), lambda: "read") == ("read", None)


def test_hooks_go_even_when_reading_fails():
    model = made(gpt_config())
    with pytest.raises(IndexError):
        attention_dispersion(model, lambda: hidden(model, torch.tensor([[VOCAB]])))
    assert not any(layer._forward_pre_hooks for layer in model.attentions())


def test_a_written_thought_is_no_place_to_think():
    marks = Marks(start=1, stop=2)
    ids = torch.tensor([[5, 1, 6, 7, 2, 8], [5, 6, 7, 8, 9, 5], [1, 6, 7, 8, 9, 9]])
    assert outside_thoughts(ids, marks).int().tolist() == [[1, 0, 0, 0, 1, 1], [1] * 6, [0] * 6]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"min_length": 9, "max_length": 8}, "min_length 9 is above max_length 8"),
        ({"entropy": 0, "dispersion": 0, "loss": 0}, "all weigh nothing"),
        ({"entropy": 0, "dispersion": 0}, "not known when generating"),
        ({"interval": 0}, "greater than 0"),
    ],
)
def test_senseless_plans_are_refused(values, said):
    with pytest.raises(ValidationError, match=said):
        PointPlan(**values)
