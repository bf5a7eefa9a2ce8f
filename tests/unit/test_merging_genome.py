"""Merging in memory: any method on whole state dicts, the eight combinations, mutation, diversity."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_forge.merging import MERGERS
from agent_forge.merging.genome import (
    COMBINATIONS,
    GenomeOptions,
    MutationOptions,
    combination,
    combine,
    diversity,
    graft,
    merge_states,
    mutate,
)
from agent_forge.merging.operators_layers import layer_of
from forgekit.errors import ArtifactError, ConfigError
from forgekit.models.config import GPTConfig
from forgekit.models.io import build_model
from tests.unit.tiny import made, same, trm_config, weights

ALL = range(COMBINATIONS)
NAMES = ("embedding.weight", "blocks.0.w", "blocks.1.w", "blocks.2.w", "blocks.3.w", "norm.weight")


def noise(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state(seed: int, near: dict | None = None, spread: float = 0.1) -> dict[str, torch.Tensor]:
    """Six tensors; near another state, a little away from it."""
    fresh = {name: noise(100 * seed + i, 4, 3) for i, name in enumerate(NAMES)}
    return {name: (near[name] + spread * t if near else t) for name, t in fresh.items()}


BASE = state(0)
MODELS = [state(i, BASE) for i in (1, 2, 3)]


def close(a: dict, b: dict, tolerance: float = 1e-5) -> None:
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=tolerance, atol=tolerance)


def zero(like: dict) -> dict:
    return {name: torch.zeros_like(t) for name, t in like.items()}


# Whole state dicts


def test_a_method_works_on_every_tensor_of_a_model():
    base = made(trm_config(), stir=0.1)
    models = [weights(made(trm_config(), seed=i, stir=0.1)) for i in (1, 2)]
    merged = merge_states("ties", models, {"density": 0.5}, base=weights(base), seed=1)
    child = build_model(trm_config())
    child.load_state_dict(merged)
    assert child(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()
    for name in merged:
        alone = merge_states(
            "ties", [{name: m[name]} for m in models], {"density": 0.5}, base={name: base.state_dict()[name]}
        )
        assert torch.equal(alone[name], merged[name])


@pytest.mark.parametrize("method", ["dare_ties", "della", "dare_linear"])
def test_the_order_of_tensors_does_not_matter(method):
    def backwards(one):
        return dict(reversed(one.items()))

    forwards = merge_states(method, MODELS, base=BASE, seed=5)
    assert same(forwards, merge_states(method, [backwards(m) for m in MODELS], base=backwards(BASE), seed=5))


def test_stacking_layers_in_memory():
    slices = [{"model": 0, "start": 0, "stop": 4}, {"model": 1, "start": 2, "stop": 3}]
    merged = merge_states("passthrough", MODELS[:2], {"slices": slices})
    assert torch.equal(merged["blocks.4.w"], MODELS[1]["blocks.2.w"])
    assert torch.equal(merged["blocks.2.w"], MODELS[0]["blocks.2.w"]) and len(merged) == 7


def test_a_deeper_model_of_ours_is_stacked_from_its_own_layers():
    config = GPTConfig(vocab_size=24, d_model=16, n_heads=2, n_layers=2, ffn_hidden=16)
    slices = [{"model": 0, "start": 0, "stop": 2}, {"model": 0, "start": 0, "stop": 2}]
    merged = merge_states("passthrough", [weights(build_model(config))], {"slices": slices})
    build_model(config.replace(n_layers=4)).load_state_dict(merged)


def test_tensors_without_importance_are_averaged():
    matters = [{NAMES[0]: torch.full((4, 3), float(i == 0))} for i in range(3)]
    merged = merge_states("fisher", MODELS, importances=matters)
    close({"x": merged[NAMES[0]]}, {"x": MODELS[0][NAMES[0]]}, 1e-4)
    close({"x": merged[NAMES[1]]}, {"x": sum(m[NAMES[1]] for m in MODELS) / 3})


@pytest.mark.parametrize(
    ("models", "base", "message"),
    [
        ([BASE, {**BASE, "norm.weight": torch.zeros(2)}], None,
         "model 1: norm.weight has shape 2, in model 0 it is 4 x 3; merge models of one shape"),
        ([BASE, {k: v for k, v in BASE.items() if k != "norm.weight"}], None,
         r"model 1: has no tensor norm.weight \(shape 4 x 3 in model 0\)"),
        ([BASE, {**BASE, "more": torch.zeros(2)}], None, r"model 1: has a tensor more \(shape 2\) that model 0"),
        ([BASE, BASE], {**BASE, "norm.weight": torch.zeros(())}, "base: norm.weight has shape one number, in model 0"),
    ],
)  # fmt: skip
def test_states_that_do_not_fit_are_refused(models, base, message):
    with pytest.raises(ArtifactError, match=message) as refused:
        merge_states("linear", models, base=base)
    assert "\n" not in str(refused.value)
    if base is None:
        with pytest.raises(ArtifactError, match=message):
            combine(0, models, models[0])


def test_a_population_of_one_and_a_missing_base_are_refused():
    with pytest.raises(ConfigError, match="linear: needs 2 models or more, 1 given"):
        merge_states("linear", [BASE])
    with pytest.raises(ConfigError, match="linear: needs 2 models or more, 1 given"):
        combine(0, MODELS[:1], BASE)
    with pytest.raises(ConfigError, match="linear: needs 2 models or more, 0 given"):
        merge_states("linear", [])
    with pytest.raises(ConfigError, match="ties: needs the common ancestor"):
        merge_states("ties", MODELS)


# The eight combinations


def test_bits_choose_the_methods_from_the_first_stage_up():
    assert combination(0) == ("linear", "dare_linear", "frankenmerge")
    assert combination(1) == ("slerp", "dare_linear", "frankenmerge")
    assert combination(2) == ("linear", "ties", "frankenmerge")
    assert combination(4) == ("linear", "dare_linear", "dfs")
    assert len({combination(i) for i in ALL}) == 8
    for wrong in (-1, 8, True, 1.0, "1"):
        with pytest.raises(ConfigError, match="combo_id: no combination .*; choose 0 to 7"):
            combination(wrong)


@pytest.mark.parametrize("combo", ALL)
def test_models_that_learned_nothing_give_the_base(combo):
    close(combine(combo, [BASE] * 3, BASE), BASE, 1e-6)


@pytest.mark.parametrize("combo", ALL)
def test_copies_of_one_model_give_it_when_nothing_is_thinned(combo):
    options = GenomeOptions(drop_rate=0, density=1)
    close(combine(combo, [MODELS[0]] * 3, BASE, options), MODELS[0], 1e-5)


@pytest.mark.parametrize("combo", ALL)
def test_one_seed_one_child(combo):
    options = GenomeOptions(drop_rate=0.5)
    first = combine(combo, MODELS, BASE, options, seed=3)
    assert same(first, combine(combo, MODELS, dict(reversed(BASE.items())), options, seed=3))
    drawn = combination(combo)[1] == "dare_linear" or combination(combo)[2] == "frankenmerge"
    assert same(first, combine(combo, MODELS, BASE, options, seed=8)) is not drawn


def test_the_eight_children_differ():
    children = [combine(combo, MODELS, BASE, seed=1) for combo in ALL]
    assert diversity(children, BASE) > 0.1
    assert not any(same(a, b) for i, a in enumerate(children) for b in children[:i])


@pytest.mark.parametrize("combo", ALL)
def test_the_third_stage_keeps_what_it_is_told(combo):
    """keep = 1 leaves the second stage's result alone, so neither of the first two stages is lost."""
    first, second, third = combination(combo)
    mixed = merge_states(first, MODELS)
    told = {"drop_rate": 0.9} if second == "dare_linear" else {"density": 0.2}
    thinned = merge_states(second, [mixed], {**told, "lam": 1}, base=BASE, seed=2)
    close(combine(combo, MODELS, BASE, GenomeOptions(keep=1), seed=2), thinned, 1e-6)
    half = combine(combo, MODELS, BASE, GenomeOptions(keep=0.5), seed=2)
    if third == "dfs":
        fused = merge_states("dfs", MODELS, base=BASE)
        close(half, {name: (thinned[name] + fused[name]) / 2 for name in BASE})
    else:
        parts = [thinned, *MODELS]
        origin = {name: [i for i, p in enumerate(parts) if torch.equal(half[name], p[name])] for name in BASE}
        assert origin["embedding.weight"] == origin["norm.weight"] == [0]
        assert sorted(origin[name] == [0] for name in NAMES[1:5]) == [False, False, True, True]


def test_ties_of_the_merged_model_trims_and_keeps_signs():
    mixed = merge_states("linear", MODELS)
    child = combine(2, MODELS, BASE, GenomeOptions(keep=1, density=0.2))
    for name in BASE:
        delta, before = child[name] - BASE[name], mixed[name] - BASE[name]
        kept = delta.abs() > 1e-7
        assert int(kept.sum()) == 2  # a fifth of twelve, rounded down
        torch.testing.assert_close(delta[kept], before[kept], rtol=1e-4, atol=1e-6)


def test_grafted_layers_come_from_the_best_model():
    options = GenomeOptions(scores=(0.1, 0.9, 0.5))
    assert sorted(graft(4, 3, options, 0)) == [0, 0, 2, 2]
    child = combine(2, MODELS, BASE, options)
    from_best = [name for name in NAMES if torch.equal(child[name], MODELS[1][name])]
    assert len(from_best) == 2 and all(layer_of(name) is not None for name in from_best)
    chosen = combine(2, MODELS, BASE, GenomeOptions(choices=(0, 1, 2, 3)))
    assert all(torch.equal(chosen[f"blocks.{i}.w"], MODELS[i - 1][f"blocks.{i}.w"]) for i in (1, 2, 3))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 40), st.integers(2, 5), st.floats(0, 1), st.integers(0, 9))
def test_a_graft_keeps_at_least_one_layer(layers, models, keep, seed):
    choices = graft(layers, models, GenomeOptions(keep=keep), seed)
    assert len(choices) == layers and all(0 <= c <= models for c in choices)
    assert sum(c == 0 for c in choices) == (max(1, layers - round(layers * (1 - keep))) if layers else 0)


def test_fusion_follows_the_importances_given():
    matters = [{name: torch.full((4, 3), float(i == 2)) for name in BASE} for i in range(3)]
    options = GenomeOptions(keep=0, rule="normalised")
    close(combine(4, MODELS, BASE, options, importances=matters), MODELS[2])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scores": (1.0,)}, "scores: 1 scores for 3 models; give one score per model"),
        ({"choices": (0, 1)}, "frankenmerge.choices: 2 choices for 4 layers"),
        ({"choices": (0, 1, 2, 4)}, "frankenmerge.choices: model 4 is chosen, there are models 0 to 3"),
        ({"weights": (1.0, 2.0)}, r"linear.weights: 2 weights \[1.0, 2.0\] for 3 models"),
        ({"weights": (1.0, -1.0, 0.0)}, "linear: weights .* sum to zero"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        combine(0, MODELS, BASE, GenomeOptions(**options))


def test_a_sick_model_is_named():
    sick = {**MODELS[1], "blocks.2.w": torch.full((4, 3), math.nan)}
    with pytest.raises(
        ArtifactError, match="model 1: tensor blocks.2.w holds 12 of 12 values that are NaN or infinite"
    ):
        combine(3, [MODELS[0], sick, MODELS[2]], BASE)


def test_models_keep_their_type_and_integers():
    half = [{**{k: v.bfloat16() for k, v in m.items()}, "steps": torch.tensor([3])} for m in (BASE, *MODELS)]
    child = combine(7, half[1:], half[0])
    assert {t.dtype for name, t in child.items() if name != "steps"} == {torch.bfloat16}
    assert torch.equal(child["steps"], torch.tensor([3])) and child["steps"] is not half[1]["steps"]


# Mutation


def test_mutation_changes_its_share_by_its_size():
    parent = {"w": torch.zeros(300, 400), "steps": torch.tensor([1])}
    child = mutate(parent, 1, MutationOptions(sigma=0.5, rate=0.1))
    changed = child["w"][child["w"] != 0]
    assert changed.numel() / 120_000 == pytest.approx(0.1, rel=0.05)
    assert float(changed.std()) == pytest.approx(0.5, rel=0.05) and float(changed.mean()) == pytest.approx(0, abs=0.03)
    assert torch.equal(child["steps"], parent["steps"]) and not parent["w"].any()


def test_mutation_follows_its_seed_alone():
    options = MutationOptions(rate=0.5)
    child = mutate(BASE, 4, options)
    assert same(child, mutate(dict(reversed(BASE.items())), 4, options))
    assert not same(child, mutate(BASE, 5, options))
    noise_of = [child[name] - BASE[name] for name in NAMES[:2]]
    assert not torch.allclose(*noise_of, atol=1e-4), "every tensor draws its own"
    assert same(mutate(BASE, 4, MutationOptions(rate=0)), BASE)
    assert same(mutate(BASE, 4, MutationOptions(sigma=0)), BASE)


def test_relative_mutation_follows_the_tensors_size():
    small, large = ({"w": size * torch.ones(200, 200)} for size in (0.01, 10))
    options = MutationOptions(sigma=0.1, rate=1, relative=True)
    for parent, size in ((small, 0.01), (large, 10)):
        assert float((mutate(parent, 1, options)["w"] - size).std()) == pytest.approx(0.1 * size, rel=0.05)


def test_mutation_works_on_views_and_other_types():
    child = mutate({"w": torch.ones(6, 4).t(), "h": torch.ones(5, dtype=torch.float16), "e": torch.empty(0)}, 1)
    assert child["w"].shape == (4, 6) and child["h"].dtype == torch.float16 and child["e"].numel() == 0


# Diversity


def test_diversity_of_copies_is_zero_and_of_opposites_one():
    assert diversity([MODELS[0]] * 3, BASE) == pytest.approx(0, abs=1e-6)
    away = {name: 2 * BASE[name] - MODELS[0][name] for name in BASE}
    assert diversity([MODELS[0], away], BASE) == pytest.approx(1, abs=1e-6)
    assert diversity([BASE, BASE], BASE) == diversity([BASE], BASE) == diversity([]) == 0


def test_diversity_is_the_mean_over_pairs():
    def one(**values):
        return {name: torch.tensor([value]) for name, value in values.items()}

    population = [one(a=1.0, b=0.0), one(a=0.0, b=1.0), one(a=1.0, b=0.0)]
    assert diversity(population) == pytest.approx(2 * (math.sqrt(2) / 2) / 3)
    shifted = [{k: v + 5 for k, v in m.items()} for m in population]
    assert diversity(shifted, one(a=5.0, b=5.0)) == pytest.approx(diversity(population))


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(3)), st.floats(0.01, 100))
def test_diversity_knows_no_order_and_no_scale(order, scale):
    want = diversity(MODELS, BASE)
    scaled = [{k: BASE[k] + scale * (m[k] - BASE[k]) for k in m} for m in (MODELS[i] for i in order)]
    assert diversity(scaled, BASE) == pytest.approx(want, rel=1e-3)
    assert 0 <= want <= 1


def test_every_method_that_needs_no_importance_merges_states():
    for method in MERGERS:
        needs = MERGERS.get(method).needs
        if needs.importances != "required" and not needs.structure:
            merged = merge_states(method, MODELS, base=BASE)
            assert merged.keys() == BASE.keys() and not same(merged, zero(BASE))
