"""Strategies: repeatable, resumable, within the space; each does what it is named after."""

from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pytest

from agent_forge.merging.recipes import Recipe
from agent_forge.merging.strategies import STRATEGIES, Scored, Space, Strategy, StrategySettings, immigrant
from forgekit.errors import ConfigError

SPACE = Space(
    originals=("reasoning", "memory", "computation"),
    base="trunk",
    slots=("blocks.0", "blocks.1", "outside"),
    granularity="layer",
    traits=("reasoning", "computation"),
)
NAMES = ("elite", "tournament", "cma_es", "random")


def made(name: str, seed: int = 3, space: Space = SPACE, **settings) -> Strategy:
    return STRATEGIES.get(name)(space, StrategySettings(**settings), seed)


def scored(recipes: list[Recipe], fitness, generation: int = 0) -> list[Scored]:
    return [Scored(f"g{generation}-{i}", recipe, float(fitness[i])) for i, recipe in enumerate(recipes)]


def luck(generation: int, count: int) -> np.ndarray:
    return np.random.default_rng(generation).permutation(count) / count


def go_on(strategy: Strategy, generations: int) -> list[list[Recipe]]:
    """Ask and tell with fitness that depends on the generation alone."""
    asked = []
    for _ in range(generations):
        recipes = strategy.ask()
        asked.append(recipes)
        generation = strategy.generation
        strategy.tell(scored(recipes, luck(generation, len(recipes)), generation))
    return asked


# All strategies


def test_the_registry():
    assert set(NAMES) <= set(STRATEGIES.names())
    assert all(STRATEGIES.get(name).name == name for name in NAMES)
    with pytest.raises(ConfigError, match="did you mean tournament"):
        STRATEGIES.get("tournement")


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_decides_everything(name):
    assert go_on(made(name), 4) == go_on(made(name), 4)
    assert go_on(made(name), 2) != go_on(made(name, seed=4), 2)


@pytest.mark.parametrize("name", NAMES)
def test_asking_changes_nothing(name):
    strategy = made(name)
    go_on(strategy, 2)
    before = strategy.state()
    assert strategy.ask() == strategy.ask()
    assert strategy.state() == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [0, 1, 3])
def test_a_restored_strategy_goes_on_alike(name, at):
    whole, first = made(name), made(name)
    expected = go_on(whole, 5)
    go_on(first, at)
    first.ask()  # interrupted between asking and telling
    second = made(name)
    second.restore(json.loads(json.dumps(first.state(), allow_nan=False)))
    assert go_on(second, 5 - at) == expected[at:]
    assert second.state() == whole.state()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("population", [2, 3, 8, 11])
def test_parents_exist_and_the_population_keeps_its_size(name, population):
    strategy = made(name, population=population)
    alive, champion = set(), False
    for generation in range(6):
        recipes = strategy.ask()
        assert len(recipes) == population == strategy.population
        allowed = {*SPACE.originals, SPACE.base, *alive} | ({"champion"} if champion else set())
        for recipe in recipes:
            assert set(recipe.parents) <= allowed and len(set(recipe.parents)) == len(recipe.parents)
            assert recipe.traits in SPACE.originals and recipe.granularity == "layer"
        fitness = luck(generation, population) - generation  # the champion is of generation 0
        told = scored(recipes, fitness, generation)
        strategy.tell(told)
        alive, champion = {one.name for one in told}, True


@pytest.mark.parametrize("name", ["tournament", "cma_es", "random"])
def test_other_strategies_have_no_notes(name):
    strategy = made(name)
    strategy.ask()
    assert strategy.notes == {}


@pytest.mark.parametrize("name", NAMES)
def test_recipes_differ_within_and_between_generations(name):
    asked = [recipe for generation in go_on(made(name), 3) for recipe in generation]
    assert len({recipe.fingerprint() for recipe in asked}) == len(asked)


@pytest.mark.parametrize("name", NAMES)
def test_every_trait_occurs(name):
    counts = Counter(recipe.traits for generation in go_on(made(name), 6) for recipe in generation)
    assert set(counts) == set(SPACE.traits)
    alone = SPACE.replace(traits=("memory",))
    assert {r.traits for g in go_on(made(name, space=alone), 3) for r in g} == {"memory"}


@pytest.mark.parametrize("name", NAMES)
def test_who_could_not_be_evaluated_is_no_parent(name):
    strategy = made(name)
    for generation in range(4):
        recipes = strategy.ask()
        fitness = np.where(np.arange(len(recipes)) % 2, np.nan, 1.0)
        failed = {f"g{generation}-{i}" for i in range(1, len(recipes), 2)}
        strategy.tell(scored(recipes, fitness, generation))
        assert not failed & {parent for recipe in strategy.ask() for parent in recipe.parents}
    json.dumps(strategy.state(), allow_nan=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_generation_of_failures_is_survived(name):
    strategy = made(name)
    strategy.tell(scored(strategy.ask(), [float("-inf")] * 8))
    parents = {parent for recipe in strategy.ask() for parent in recipe.parents}
    assert parents <= {*SPACE.originals, SPACE.base}


@pytest.mark.parametrize("name", NAMES)
def test_an_immigrant_may_take_a_place(name):
    strategy = made(name)
    told = scored(strategy.ask(), range(8))
    told[7] = Scored("g0-7", immigrant(SPACE, 5), 9.0)
    strategy.tell(told)
    assert len(strategy.ask()) == 8


@pytest.mark.parametrize("name", NAMES)
def test_telling_wrongly_is_refused(name):
    strategy = made(name)
    recipes = strategy.ask()
    with pytest.raises(ConfigError, match="generation: "):
        strategy.tell([])
    with pytest.raises(ConfigError, match="two individuals of one name"):
        strategy.tell([Scored("same", recipe, 1.0) for recipe in recipes])
    assert strategy.generation == 0


def test_an_immigrant_is_random_and_repeatable():
    one = immigrant(SPACE, 1)
    assert one == immigrant(SPACE, 1) != immigrant(SPACE, 2)
    assert one.kind == "weights" and one.parents == SPACE.originals and one.granularity == "layer"
    assert all(SPACE.low <= w <= SPACE.high for row in one.weights for w in row)


# Elite


def test_generation_zero_is_all_eight_combinations():
    for name in ("elite", "tournament"):
        recipes = made(name).ask()
        assert [recipe.combo for recipe in recipes] == list(range(8))
        assert all(recipe.parents == SPACE.originals for recipe in recipes)
        assert Counter(recipe.traits for recipe in recipes) == {"reasoning": 4, "computation": 4}


def test_a_small_population_meets_both_methods_of_every_stage():
    for population in (2, 4, 6):
        combos = [recipe.combo for recipe in made("elite", population=population).ask()]
        assert all(sum(combo >> stage & 1 for combo in combos) == population // 2 for stage in range(3))


def test_a_large_population_is_filled_with_weights():
    kinds = [recipe.kind for recipe in made("elite", population=11).ask()]
    assert kinds == ["combination"] * 8 + ["weights"] * 3


def test_the_two_best_are_mutated_three_times_and_the_worst_six_merged():
    strategy = made("elite")
    strategy.tell(scored(strategy.ask(), [0.1, 0.9, 0.3, 0.2, 0.8, 0.7, 0.6, 0.5]))
    recipes = strategy.ask()
    assert [recipe.kind for recipe in recipes] == ["mutation"] * 6 + ["combination"] * 2
    assert [recipe.parents for recipe in recipes[:6]] == [("g0-1",)] * 3 + [("g0-4",)] * 3
    assert [recipe.parents for recipe in recipes[6:]] == [("g0-5", "g0-6", "g0-7"), ("g0-2", "g0-3", "g0-0")]
    assert recipes[6].options["scores"] == [0.7, 0.6, 0.5]
    assert strategy.notes["elite_combo_usage"] == {1: 1, 4: 1}
    assert strategy.notes["loser_combo_chosen"] == [recipe.combo for recipe in recipes[6:]]


def test_the_champion_stays_an_elite_until_it_is_beaten():
    strategy = made("elite")
    strategy.tell(scored(strategy.ask(), [0, 0, 0, 9, 0, 0, 0, 1]))
    for generation in (1, 2):
        strategy.tell(scored(strategy.ask(), [1, 2, 3, 4, 5, 6, 7, 8], generation))
        recipes = strategy.ask()
        assert [recipe.parents for recipe in recipes[:6:3]] == [("champion",), (f"g{generation}-7",)]
        assert "champion" not in {parent for recipe in recipes[6:] for parent in recipe.parents}
        assert 3 in strategy.notes["elite_combo_usage"]  # its line goes back to combination 3
    strategy.tell(scored(strategy.ask(), [0, 0, 0, 0, 0, 0, 10, 8], 3))
    assert [recipe.parents for recipe in strategy.ask()[:6:3]] == [("g3-6",), ("g3-7",)]


def test_the_champion_does_not_push_the_worst_out_of_the_groups():
    strategy = made("elite")
    strategy.tell(scored(strategy.ask(), [0, 0, 0, 9, 0, 0, 0, 1]))
    strategy.tell(scored(strategy.ask(), [1, 2, 3, 4, 5, 6, 7, 8], 1))
    merged = strategy.ask()[6:]
    assert [recipe.parents for recipe in merged] == [("g1-5", "g1-4", "g1-3"), ("g1-2", "g1-1", "g1-0")]


def test_the_notes_follow_a_line_through_its_mutations():
    strategy = made("elite")
    strategy.tell(scored(strategy.ask(), [0, 0, 0, 0, 0, 0, 9, 8]))
    for generation in (1, 2):
        strategy.tell(scored(strategy.ask(), 10 * generation + np.arange(8)[::-1], generation))
        strategy.ask()
        assert strategy.notes["elite_combo_usage"] == {
            6: 2
        }  # all six children of the elites; the best are of the first


def test_the_notes_know_the_champion_under_its_own_name():
    strategy = made("elite")
    strategy.tell(scored(strategy.ask(), [0, 0, 0, 9, 0, 0, 0, 1]))
    strategy.tell(scored(strategy.ask(), range(8), 1))
    recipes = strategy.ask()
    assert recipes[0].parents == ("champion",)
    strategy.tell(scored([recipes[0].replace(parents=("g0-3",)), *recipes[1:]], [20, *range(7)], 2))
    strategy.ask()
    assert strategy.notes["elite_combo_usage"][3] >= 1


def test_elites_are_not_merged_in_a_small_population():
    strategy = made("elite", population=4)
    strategy.tell(scored(strategy.ask(), range(4)))
    recipes = strategy.ask()
    elites = {parent for recipe in recipes[:3] for parent in recipe.parents}
    assert elites == {"g0-3", "g0-2"} and not elites & set(recipes[3].parents)


def test_an_equal_fitness_does_not_replace_the_champion():
    strategy = made("elite")
    strategy.tell(scored(strategy.ask(), [0, 0, 0, 9, 0, 0, 0, 1]))
    strategy.tell(scored(strategy.ask(), [0, 0, 0, 0, 0, 0, 0, 9], 1))
    assert strategy.ask()[0].parents == ("champion",)
    assert strategy.ask()[3].parents == ("g1-7",)


def test_children_inherit_traits_and_now_and_then_switch():
    always, never = made("elite", trait_switch=1.0), made("elite", trait_switch=0.0)
    for strategy in (always, never):
        strategy.tell(scored(strategy.ask(), [9, 8, 0, 0, 0, 0, 0, 0]))
    traits = {f"g0-{i}": recipe.traits for i, recipe in enumerate(made("elite").ask())}
    assert all(recipe.traits == traits[recipe.parents[0]] for recipe in never.ask()[:6])
    assert all(recipe.traits != traits[recipe.parents[0]] for recipe in always.ask()[:6])


def test_loser_combinations_vary():
    chosen = {combo for seed in range(12) for combo in _losers(seed)}
    assert len(chosen) >= 6


def _losers(seed: int) -> list[int]:
    strategy = made("elite", seed=seed)
    strategy.tell(scored(strategy.ask(), range(8)))
    strategy.ask()
    return strategy.notes["loser_combo_chosen"]


def test_settings_of_the_stages_and_of_the_noise_are_passed_on():
    options = {"density": 0.7, "weights": (1.0, 2.0, 3.0)}
    strategy = made("elite", combination=options, mutation={"sigma": 0.5}, population=4)
    first = strategy.ask()
    assert all(recipe.options["density"] == 0.7 and recipe.options["weights"] == [1, 2, 3] for recipe in first)
    strategy.tell(scored(first, range(4)))
    assert strategy.ask()[0].options["sigma"] == 0.5


def test_weights_of_the_originals_are_not_forced_on_a_group_of_another_size():
    space = SPACE.replace(originals=("reasoning", "computation"))
    strategy = made("elite", space=space, combination={"weights": (1.0, 3.0)})
    strategy.tell(scored(strategy.ask(), range(8)))
    assert [(len(recipe.parents), recipe.options["weights"]) for recipe in strategy.ask()[6:]] == [(3, [])] * 2


# Tournament


def test_the_champion_is_always_a_parent():
    strategy = made("tournament")
    strategy.tell(scored(strategy.ask(), [0, 0, 9, 0, 0, 0, 0, 0]))
    assert strategy.ask()[0].parents[0] == "g0-2"
    for generation in range(1, 5):
        strategy.tell(scored(strategy.ask(), luck(generation, 8), generation))
        assert strategy.ask()[0].parents[0] == "champion"


def test_the_crossover_rate_decides_between_two_parents_and_one():
    for rate, kinds in ((0.0, {"mutation"}), (1.0, {"crossover"})):
        asked = go_on(made("tournament", crossover_rate=rate), 4)[1:]
        assert {recipe.kind for generation in asked for recipe in generation} == kinds


def test_a_larger_tournament_selects_harder():
    def wins(size: int) -> float:
        found = []
        for seed in range(10):
            strategy = made("tournament", seed=seed, tournament_size=size, crossover_rate=0.0)
            strategy.tell(scored(strategy.ask(), range(8)))
            found += [int(recipe.parents[0].removeprefix("g0-")) for recipe in strategy.ask()[1:]]
        return float(np.mean(found))

    assert wins(8) == 7.0
    assert wins(8) > wins(3) > wins(1) + 0.5


def test_one_slot_is_blended():
    space = SPACE.replace(slots=("model",), granularity="model")
    asked = go_on(made("tournament", space=space, crossover_rate=1.0, blend_rate=0.0), 3)[1:]
    assert all(recipe.blends for generation in asked for recipe in generation)


# CMA-ES and random search

TARGET = np.random.default_rng(1).uniform(-0.1, 1.0, size=(3, 3))


def closeness(recipe: Recipe, traits: str = "") -> float:
    miss = float(np.linalg.norm(np.array(recipe.weights) - TARGET))
    return -miss - (0.5 if traits and recipe.traits != traits else 0.0)


def best(name: str, seed: int, generations: int, traits: str = "") -> float:
    strategy, found = made(name, seed=seed), []
    for generation in range(generations):
        recipes = strategy.ask()
        fitness = [closeness(recipe, traits) for recipe in recipes]
        strategy.tell(scored(recipes, fitness, generation))
        found += fitness
    return max(found)


@pytest.mark.parametrize("seed", range(5))
def test_cma_es_beats_random_search_at_equal_evaluations(seed):
    assert best("cma_es", seed, 20) > 0.5 * best("random", seed, 20)  # less than half as far from the target
    assert best("cma_es", seed, 20) > 0.6 * best("cma_es", seed, 4)


@pytest.mark.parametrize("wanted", SPACE.traits)
def test_cma_es_learns_the_traits(wanted):
    strategy, taken = made("cma_es", seed=0), []
    for generation in range(30):
        recipes = strategy.ask()
        strategy.tell(scored(recipes, [closeness(r, wanted) for r in recipes], generation))
        taken.append(np.mean([recipe.traits == wanted for recipe in recipes]))
    assert np.mean(taken[20:]) > 0.75


def test_cma_es_starts_around_the_average_of_the_originals():
    recipes = made("cma_es", population=400).ask()
    values = np.array([recipe.weights for recipe in recipes])
    assert values.mean() == pytest.approx(1 / 3, abs=0.02) and values.std() == pytest.approx(0.2, abs=0.02)
    moved = made("cma_es", population=100, start=1.0, sigma=0.01).ask()
    assert np.array([recipe.weights for recipe in moved]).mean() == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize("name", ["cma_es", "random"])
def test_weights_stay_in_their_range(name):
    for generation in go_on(made(name, sigma=2.0), 5):
        for recipe in generation:
            assert all(SPACE.low <= w <= SPACE.high for row in recipe.weights for w in row)


def test_cma_es_chooses_its_population():
    assert len(made("cma_es", population=0).ask()) == 4 + int(3 * np.log(3 * 3 + 2))
    assert len(made("elite", population=0).ask()) == 8


def test_cma_es_learns_from_an_immigrant():
    plain, guided = made("cma_es"), made("cma_es")
    recipes = plain.ask()
    plain.tell(scored(recipes, range(8)))
    rows = tuple(map(tuple, np.full((3, 3), 1.2).tolist()))
    guest = immigrant(SPACE, 0).replace(weights=rows)
    guided.tell(scored([guest, *recipes[1:]], [9, *range(1, 8)]))
    means = [np.mean(strategy.state()["search"]["mean"][:9]) for strategy in (plain, guided)]
    assert means[1] > means[0] + 0.05


def test_cma_es_refuses_what_has_no_coordinates():
    strategy = made("cma_es")
    told = scored(strategy.ask(), range(8))
    told[2] = Scored("g0-2", made("elite").ask()[0], 1.0)
    with pytest.raises(ConfigError, match="generation: 7 individuals, 8 were asked"):
        strategy.tell(told[:7])
    with pytest.raises(ConfigError, match=r"cma_es: g0-2 \(combination of .*\) does not weigh the originals"):
        strategy.tell(told)
    assert strategy.generation == 0 and strategy.state() == made("cma_es").state()


def test_cma_es_refuses_a_start_outside_the_range_and_a_foreign_state():
    with pytest.raises(ConfigError, match=r"start: 2 is outside .* -0.25 to 1.25"):
        made("cma_es", start=2.0)
    smaller = SPACE.replace(slots=("model",), granularity="model")
    with pytest.raises(ConfigError, match="cma_es: a state of 5 dimensions, this search has 11"):
        made("cma_es").restore(made("cma_es", space=smaller).state())


def test_random_weights_fill_the_range():
    values = np.array([r.weights for g in go_on(made("random", population=100), 2) for r in g])
    assert values.min() < -0.2 and values.max() > 1.2
    assert values.mean() == pytest.approx(0.5, abs=0.05)
