"""Recipes: slots, children that are exact where they must be, JSON round trips, refusals."""

from __future__ import annotations

import json
import random
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_forge.merging.genome import GenomeOptions, combine
from agent_forge.merging.recipes import Recipe, Space, build, slot_of, slots
from agent_forge.merging.strategies_config import StrategySettings
from forgekit.errors import ArtifactError, ConfigError
from forgekit.models.io import build_model
from tests.unit.tiny import made, same, trm_config, weights

BASE = weights(made(trm_config(), seed=0, stir=0.1))
MODELS = {
    name: weights(made(trm_config(), seed=i, stir=0.1)) for i, name in enumerate(("first", "second", "third"), start=1)
}
MODELS["trunk"] = BASE
THREE = ("first", "second", "third")
GRANULARITIES = ("model", "layer", "module")


def child(recipe: Recipe, models: dict | None = None) -> dict[str, torch.Tensor]:
    return build(recipe, (models or MODELS).__getitem__, BASE)


def weighed(rows, granularity: str = "module", parents: tuple[str, ...] = THREE) -> Recipe:
    """One number per parent, the same in every slot, or whole rows."""
    count = len(slots(BASE, granularity))
    rows = [row if isinstance(row, tuple) else (row,) * count for row in rows]
    return Recipe(kind="weights", parents=parents, weights=rows, granularity=granularity)


def counted(model: dict, counter: torch.Tensor) -> dict:
    return {**model, "steps": counter}


# Slots


def test_slots_of_a_model():
    assert slots(BASE, "model") == ("model",)
    assert slots(BASE, "layer") == ("blocks.0", "blocks.1", "outside")
    modules = slots(BASE, "module")
    assert {"blocks.0.attn", "blocks.1.gated", "embedding", "recursion", "norm"} <= set(modules)
    assert not any(slot.count(".") > 2 for slot in modules)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_every_tensor_has_its_slot_whatever_the_order_of_names(granularity):
    names = list(BASE)
    random.Random(0).shuffle(names)
    assert slots(names, granularity) == slots(BASE, granularity)
    assert {slot_of(name, granularity) for name in BASE} == set(slots(BASE, granularity))


def test_slots_of_other_families():
    names = ["model.layers.10.self_attn.q_proj.weight", "model.layers.2.mlp.up_proj.weight"]
    names += ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"]
    assert slots(names, "layer") == ("model.layers.2", "model.layers.10", "outside")
    assert slots(names, "module") == (
        "lm_head",
        "model.embed_tokens",
        "model.layers.2.mlp",
        "model.layers.10.self_attn",
        "model.norm",
    )
    assert slot_of("bias", "module") == "bias"


# Weights


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("which", range(3))
def test_a_single_weight_of_one_gives_that_model_bit_for_bit(granularity, which):
    rows = [1.0 if i == which else 0.0 for i in range(3)]
    assert same(child(weighed(rows, granularity)), MODELS[THREE[which]])


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_no_weight_at_all_gives_the_base(granularity):
    assert same(child(weighed([0.0, 0.0, 0.0], granularity)), BASE)


def test_signed_zeros_survive():
    model = {"w": torch.tensor([-0.0, 1.0])}
    recipe = Recipe(kind="weights", parents=("m",), weights=((1.0,),), granularity="model")
    assert build(recipe, {"m": model}.get, {"w": torch.ones(2)})["w"].signbit().tolist() == [True, False]


def test_weights_are_factors_on_the_task_vectors():
    result = child(weighed([0.5, -0.25, 1.2]))
    for name, start in BASE.items():
        vectors = [MODELS[one][name] - start for one in THREE]
        expected = start + 0.5 * vectors[0] - 0.25 * vectors[1] + 1.2 * vectors[2]
        torch.testing.assert_close(result[name], expected, rtol=1e-5, atol=1e-5)


def test_each_slot_has_weights_of_its_own():
    parts = slots(BASE, "layer")
    rows = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 0.0)]  # blocks.0, blocks.1, outside
    result = child(weighed(rows, "layer"))
    takes = {parts[0]: "first", parts[1]: "second", "outside": "trunk"}
    for name, tensor in result.items():
        assert torch.equal(tensor, MODELS[takes[slot_of(name, "layer")]][name]), name


def test_the_order_of_parents_does_not_matter():
    there, back = child(weighed([0.3, 0.2, 0.7])), child(weighed([0.7, 0.2, 0.3], parents=THREE[::-1]))
    for name in there:
        torch.testing.assert_close(there[name], back[name], rtol=1e-6, atol=1e-6)


@given(row=st.lists(st.floats(-0.25, 1.25), min_size=3, max_size=3))
@settings(max_examples=20, deadline=None)
def test_merging_a_model_with_itself_gives_it_where_the_weights_sum_to_one(row):
    if abs(total := sum(row)) < 0.1:
        return
    result = child(weighed([w / total for w in row], parents=("first",) * 3))
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, MODELS["first"][name], rtol=1e-5, atol=2e-5)


def test_models_that_equal_the_base_change_nothing():
    result = child(weighed([0.3, 0.4, 0.9], parents=("trunk",) * 3))
    for name, tensor in result.items():
        torch.testing.assert_close(tensor, BASE[name], rtol=1e-5, atol=1e-6)


def test_the_child_of_real_models_runs():
    model = build_model(trm_config())
    model.load_state_dict(child(weighed([0.4, 0.3, 0.5])))
    assert model(torch.zeros(1, 4, dtype=torch.long)).logits.isfinite().all()


def test_half_precision_is_kept():
    half = {name: {k: t.bfloat16() for k, t in model.items()} for name, model in MODELS.items()}
    recipe = weighed([0.5, 0.5, 0.5])
    result = build(recipe, half.__getitem__, half["trunk"])
    assert {t.dtype for t in result.values()} == {torch.bfloat16}
    crossed = build(Recipe(kind="crossover", parents=THREE[:2], options={"blend": True}), half.get, half["trunk"])
    assert {t.dtype for t in crossed.values()} == {torch.bfloat16}


# Integers


def test_integers_are_taken_over_where_all_agree():
    models = {name: counted(model, torch.tensor([7])) for name, model in MODELS.items()}
    recipe = Recipe(kind="weights", parents=THREE, weights=((0.5,), (0.2,), (0.1,)), granularity="model")
    assert build(recipe, models.get, models["trunk"])["steps"].tolist() == [7]
    blended = Recipe(kind="crossover", parents=THREE[:2], options={"blend": True}, granularity="layer")
    assert build(blended, models.get, models["trunk"])["steps"].tolist() == [7]


def test_integers_that_differ_cannot_be_averaged_but_can_be_taken():
    models = {name: counted(model, torch.tensor([i])) for i, (name, model) in enumerate(MODELS.items())}
    base = models["trunk"]
    mixed = Recipe(kind="weights", parents=THREE, weights=((0.5,), (0.2,), (0.1,)), granularity="model")
    with pytest.raises(ArtifactError, match=r"second: steps .* differs from that of first"):
        build(mixed, models.get, base)
    blended = Recipe(kind="crossover", parents=THREE[:2], options={"blend": True}, granularity="layer")
    with pytest.raises(ArtifactError, match="second: steps"):
        build(blended, models.get, base)
    only = Recipe(kind="weights", parents=THREE, weights=((0.0,), (1.0,), (0.0,)), granularity="model")
    assert same(build(only, models.get, base), models["second"])


def test_large_integers_cross_unrounded():
    models = {
        name: {"a.n": torch.tensor([2**40 + 1 + 2 * i]), "b.w": torch.ones(1)} for i, name in enumerate(("x", "y"))
    }
    for seed in range(4):
        result = build(Recipe(kind="crossover", parents=("x", "y"), seed=seed), models.get, models["x"])
        assert result["a.n"].item() - 2**40 in (1, 3) and result["a.n"].dtype == torch.int64


# Other kinds


def test_an_original_is_a_copy():
    result = child(Recipe(kind="original", parents=("second",)))
    assert same(result, MODELS["second"])
    assert all(result[name].data_ptr() != MODELS["second"][name].data_ptr() for name in result)


@pytest.mark.parametrize("combo", range(8))
def test_a_combination_is_that_of_the_genome(combo):
    recipe = Recipe(kind="combination", parents=THREE, combo=combo, seed=4, options={"density": 0.5})
    models = [MODELS[name] for name in THREE]
    assert same(child(recipe), combine(combo, models, BASE, GenomeOptions(density=0.5), 4))


def test_mutation_without_a_rate_is_the_parent_and_with_one_is_not():
    still = Recipe(kind="mutation", parents=("first",), seed=1, options={"rate": 0.0})
    assert same(child(still), MODELS["first"])
    moved = child(Recipe(kind="mutation", parents=("first",), seed=1, options={"rate": 0.5, "sigma": 0.1}))
    changed = sum(int((moved[n] != t).sum()) for n, t in MODELS["first"].items())
    assert 0.4 < changed / sum(t.numel() for t in moved.values()) < 0.6


@pytest.mark.parametrize("blend", [False, True])
def test_crossing_a_model_with_itself_gives_it(blend):
    recipe = Recipe(kind="crossover", parents=("first", "first"), seed=3, options={"blend": blend})
    assert same(child(recipe), MODELS["first"])


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("granularity", ["layer", "module"])
def test_crossover_takes_whole_slots_and_at_least_one_from_each(seed, granularity):
    result = child(Recipe(kind="crossover", parents=("first", "second"), seed=seed, granularity=granularity))
    givers = {}
    for name, tensor in result.items():
        fits = {p for p in ("first", "second") if torch.equal(tensor, MODELS[p][name])}
        givers.setdefault(slot_of(name, granularity), {"first", "second"}).intersection_update(fits)
    assert all(givers.values())
    assert {giver for fits in givers.values() for giver in fits} == {"first", "second"}


def test_two_slots_are_never_both_from_one_parent():
    models = {name: {"a.w": torch.full((2,), v), "b.w": torch.full((2,), v)} for name, v in (("x", 1.0), ("y", 2.0))}
    for seed in range(20):
        recipe = Recipe(kind="crossover", parents=("x", "y"), seed=seed)
        result = build(recipe, models.get, models["x"])
        assert {result["a.w"][0].item(), result["b.w"][0].item()} == {1.0, 2.0}


def test_a_blend_lies_between_its_parents_in_every_slot():
    result = child(Recipe(kind="crossover", parents=("first", "second"), seed=2, options={"blend": True}))
    for name, tensor in result.items():
        x, y = MODELS["first"][name], MODELS["second"][name]
        low, high = torch.minimum(x, y) - 1e-6, torch.maximum(x, y) + 1e-6
        assert ((low <= tensor) & (tensor <= high)).all(), name
    assert not same(result, MODELS["first"]) and not same(result, MODELS["second"])


def test_a_crossover_can_be_followed_by_noise():
    plain = Recipe(kind="crossover", parents=("first", "second"), seed=2)
    noisy = plain.replace(options={"rate": 0.5, "sigma": 0.1})
    assert plain.noise() is None and noisy.noise().rate == 0.5
    assert not same(child(plain), child(noisy))
    assert same(child(plain), child(plain.replace(options={"rate": 0.0})))


# Every kind

ROWS = len(slots(BASE, "module"))
RECIPES = [
    Recipe(kind="original", parents=("first",), traits="second"),
    Recipe(kind="mutation", parents=("first",), seed=5, options={"sigma": 0.1, "rate": 0.1, "relative": True}),
    Recipe(kind="crossover", parents=("first", "second"), seed=6, options={"blend": True, "rate": 0.2}),
    Recipe(kind="combination", parents=THREE, seed=7, combo=3, options={"weights": (0.1, 0.2, 0.7), "t": 0.1}),
    weighed([(0.1 + 0.2,) * ROWS, (1 / 3,) * ROWS, (-0.25,) * ROWS]),
]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.kind)
def test_a_recipe_survives_json_and_makes_the_same_child(recipe):
    again = Recipe.build(json.loads(json.dumps(recipe.model_dump(mode="json"), allow_nan=False)))
    assert again == recipe and again.fingerprint() == recipe.fingerprint()
    shuffled = {name: dict(reversed(model.items())) for name, model in MODELS.items()}
    assert same(child(recipe), child(again)) and same(child(recipe), child(recipe, shuffled))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.kind)
def test_building_changes_no_parent_and_shares_no_memory(recipe):
    before = {name: {k: t.clone() for k, t in model.items()} for name, model in MODELS.items()}
    for tensor in child(recipe).values():
        tensor.zero_()
    assert all(same(before[name], MODELS[name]) for name in MODELS)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.kind)
def test_a_description_is_one_short_line_with_the_parents(recipe):
    text = recipe.describe()
    assert "\n" not in text and len(text) < 160
    assert all(name in text for name in recipe.parents)


def test_descriptions():
    words = "SLERP, then TIES, then layers grafted (combination 3) of first, second and third"
    assert RECIPES[3].describe() == words
    assert RECIPES[0].describe() == "first as it is; traits of second"
    assert "each module from one of x and y" == Recipe(kind="crossover", parents=("x", "y")).describe()
    mixed = weighed([0.5, -0.25, 1.0], "layer").describe()
    assert mixed == "task vectors +0.50 first -0.25 second +1.00 third, weighted layer by layer (means)"


@pytest.mark.parametrize(("seeds"), [(1, 2)])
@pytest.mark.parametrize("recipe", RECIPES[1:4], ids=lambda recipe: recipe.kind)
def test_another_seed_gives_another_child(recipe, seeds):
    one, other = (child(recipe.replace(seed=seed, combo=0 if recipe.combo else None)) for seed in seeds)
    assert not same(one, other)


# Bad input


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kind": "mutation", "parents": ("a", "b")}, "mutation takes 1 parents, got"),
        ({"kind": "crossover", "parents": ("a",)}, "crossover takes 2 parents"),
        ({"kind": "combination", "parents": ("a",), "combo": 1}, "2 or more parents"),
        ({"kind": "combination", "parents": ("a", "b")}, "combo is None in a combination"),
        ({"kind": "combination", "parents": ("a", "b"), "combo": 8}, "no combination 8"),
        ({"kind": "original", "parents": ("a",), "combo": 1}, "combo is 1 in a original"),
        ({"kind": "weights", "parents": ("a", "b"), "weights": ((1.0,),)}, "weights for 2 parents"),
        ({"kind": "weights", "parents": ("a", "b"), "weights": ((1.0,), (1.0, 2.0))}, "weights for 2 parents"),
        ({"kind": "weights", "parents": ("a",), "weights": ((),)}, "weights for 1 parents"),
        ({"kind": "weights", "parents": ("a",), "weights": ((float("nan"),),)}, "weights"),
        ({"kind": "original", "parents": ("a",), "weights": ((1.0,),)}, "takes no weights"),
        ({"kind": "original", "parents": ("a",), "options": {"sigma": 1}}, "takes no options"),
        ({"kind": "original", "parents": ()}, "parents"),
        ({"kind": "mutation", "parents": ("a",), "options": {"sigme": 1}}, "options.sigme: unknown key"),
        ({"kind": "mutation", "parents": ("a",), "options": {"rate": 2}}, "options.rate"),
        ({"kind": "combination", "parents": ("a", "b"), "combo": 1, "options": {"denstiy": 1}}, "did you mean density"),
        ({"kind": "crossover", "parents": ("a", "b"), "options": {"blend": "yes"}}, "options.blend"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused_in_one_line(values, message):
    with pytest.raises(ConfigError, match=message) as caught:
        Recipe.build(values)
    assert "\n" not in str(caught.value)


def test_models_of_another_shape_are_named():
    models = {**MODELS, "second": {**MODELS["second"], "norm.weight": torch.ones(3)}}
    for recipe in (weighed([0.5, 0.5, 0.0]), Recipe(kind="crossover", parents=("first", "second"))):
        with pytest.raises(ArtifactError, match=r"second: norm.weight has shape 3, in base it is 16"):
            child(recipe, models)


def test_nan_weights_are_named():
    sick = {**MODELS["third"], "norm.weight": torch.full((16,), float("nan"))}
    with pytest.raises(ArtifactError, match=r"third: tensor norm.weight holds 16 of 16"):
        child(weighed([0.5, 0.2, 0.1]), {**MODELS, "third": sick})
    with pytest.raises(ArtifactError, match="norm.weight holds 16 of 16"):
        child(Recipe(kind="crossover", parents=("third", "third")), {**MODELS, "third": sick})


def test_weights_too_large_for_the_type_are_refused():
    models = {"m": {"w": torch.ones(2, dtype=torch.float16)}}
    recipe = Recipe(kind="weights", parents=("m",), weights=((1e5,),), granularity="model")
    with pytest.raises(ArtifactError, match="the child: tensor w holds 2 of 2 .*lower the weights"):
        build(recipe, models.get, {"w": torch.zeros(2, dtype=torch.float16)})


def test_weights_for_another_model_are_refused():
    recipe = Recipe(kind="weights", parents=THREE, weights=((1.0, 0.5),) * 3)
    with pytest.raises(ConfigError, match=r"rows of 2 weights for a model of \d+ slots \(module\)"):
        child(recipe)


def test_one_slot_cannot_be_crossed_but_blended():
    recipe = Recipe(kind="crossover", parents=("first", "second"), granularity="model")
    with pytest.raises(ConfigError, match="one slot"):
        child(recipe)
    child(recipe.replace(options={"blend": True}))


SPACE = {"originals": THREE, "base": "trunk", "slots": ("model",), "granularity": "model", "traits": ("first",)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"originals": ("first",)}, "originals"),
        ({"base": "first"}, "named twice"),
        ({"base": "champion"}, "champion is the name of the best"),
        ({"traits": ("trunk",)}, "is no original"),
        ({"traits": ()}, "traits"),
        ({"slots": ("a", "a")}, "slots has an entry twice"),
        ({"low": 1.0, "high": 1.0}, "is not below"),
    ],
)
def test_a_space_that_makes_no_sense_is_refused(changes, message):
    assert Space.build(SPACE).high == 1.25
    with pytest.raises(ConfigError, match=message):
        Space.build({**SPACE, **changes})


def test_a_population_of_one_is_refused_in_one_line():
    with pytest.raises(ConfigError, match=r"strategy.population: value 1 refused: a population of one cannot evolve"):
        StrategySettings.build({"population": 1}, path="strategy")
    with pytest.raises(ConfigError, match="population"):
        StrategySettings.build({"population": -3})


def test_the_search_space_needs_no_torch():
    code = "import sys, agent_forge.merging.strategies; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
