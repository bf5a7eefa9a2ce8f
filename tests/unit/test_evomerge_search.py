"""The search of phase 2 on a fitness that can be computed by hand: same bits resumed or not, few files, no waste."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save

from agent_forge.merging.genome import diversity
from agent_forge.merging.recipes import slots
from agent_forge.merging.strategies_config import Space, StrategySettings
from agent_forge.merging.variety import differences, variety
from agent_forge.phases.evomerge import population as population_module
from agent_forge.phases.evomerge.evaluate import Candidate, Evaluator
from agent_forge.phases.evomerge.evolution import FILE, Evolution, Rules
from agent_forge.phases.evomerge.population import Population
from forgekit.errors import ArtifactError
from tests.unit.tiny import gpt_config, made

ORIGINALS = ("left", "middle", "right")
SETTINGS = {
    "elite": StrategySettings(mutation={"sigma": 0.05, "rate": 0.5}),
    "tournament": StrategySettings(population=6, mutation={"sigma": 0.05, "rate": 0.5}),
    "cma_es": StrategySettings(population=6),
    "random": StrategySettings(population=6),
}


@pytest.fixture(scope="module")
def states():
    base = made(gpt_config(), seed=1).state_dict()
    found = {"base": {name: tensor.clone() for name, tensor in base.items()}}
    for seed, name in enumerate(ORIGINALS, 2):
        other = made(gpt_config(), seed=seed, stir=0.3).state_dict()
        found[name] = {key: base[key] + 0.2 * (other[key] - base[key]) for key in base}
    return found


class Hill(Evaluator):
    """A fitness everybody can check: how near the weights are to a hidden mixture. Counts what it was asked."""

    def __init__(self, states) -> None:
        mix = {"left": 0.7, "middle": 0.1, "right": 0.4}
        self.goal = {
            key: base + sum(w * (states[name][key] - base) for name, w in mix.items())
            for key, base in states["base"].items()
        }
        self.asked: list[bytes] = []
        self.die_after = math.inf

    def score(self, candidates):
        raise AssertionError("the search asks for worth")

    def worth(self, candidates: list[Candidate]) -> list[dict[str, float]]:
        found = []
        for one in candidates:
            if len(self.asked) >= self.die_after:
                raise KeyboardInterrupt
            self.asked.append(one.weights)
            state = load(one.weights)
            far = sum(float((state[key] - goal).square().sum()) for key, goal in self.goal.items())
            found.append({"composite": 1 / (1 + far), "seconds": 1.0})
        return found


def search(states, home: Path, strategy: str = "elite", hill: Hill | None = None, **rules) -> Evolution:
    space = Space(originals=ORIGINALS, base="base", slots=slots(states["base"], "module"), traits=("left", "right"))
    limits = Rules(**{"generations": 5, "patience": 5, **rules})
    kept = Population(home / "population", states.__getitem__, "base")
    hill = hill or Hill(states)
    return Evolution(space, (strategy, SETTINGS[strategy], 3), limits, hill, kept, (home / FILE, "key"))


def outcome(evolution: Evolution) -> tuple:
    progress = evolution.progress
    return progress.history, progress.curve, progress.champion.record(), save(evolution.weights(progress.champion))


@pytest.mark.parametrize("strategy", list(SETTINGS))
def test_killed_in_any_generation_it_ends_with_the_same_bits(states, tmp_path, strategy):
    whole = search(states, tmp_path / "whole", strategy)
    whole.run()
    for cut in range(1, len(whole.evaluator.asked), 5):
        home = tmp_path / f"cut-{cut}"
        hill = Hill(states)
        hill.die_after = cut
        with pytest.raises(KeyboardInterrupt):
            search(states, home, strategy, hill).run()
        again = search(states, home, strategy)
        again.run()
        assert outcome(again) == outcome(whole), cut
        assert len(again.evaluator.asked) < len(whole.evaluator.asked) or cut < 8, "finished generations are not redone"


@pytest.mark.parametrize("strategy", ["elite", "tournament"])
def test_killed_between_any_two_writes_it_ends_with_the_same_bits(states, tmp_path, strategy, monkeypatch):
    """The disk is touched by writing a file whole and by removing one: stop before each of them once."""
    whole = search(states, tmp_path / "whole", strategy, generations=3)
    whole.run()
    write, unlink, left = population_module.fsio.write_atomic, Path.unlink, [10**9]

    def counted(call):
        def touch(*args, **options):
            left[0] -= 1
            if left[0] < 0:
                raise KeyboardInterrupt
            return call(*args, **options)

        return touch

    monkeypatch.setattr(population_module.fsio, "write_atomic", counted(write))
    monkeypatch.setattr(Path, "unlink", counted(unlink))
    cuts = 0
    for cut in range(48):
        home = tmp_path / f"cut-{cut}"
        left[0] = cut
        try:
            search(states, home, strategy, generations=3).run()
        except KeyboardInterrupt:
            cuts += 1
        left[0] = 10**9
        again = search(states, home, strategy, generations=3)
        again.run()
        assert outcome(again) == outcome(whole), cut
    assert cuts > 8


def test_files_an_interruption_took_are_made_again_to_the_same_bits(states, tmp_path):
    whole = search(states, tmp_path / "whole", generations=6)
    whole.run()
    half = search(states, tmp_path / "half", generations=3)
    half.run()
    lost = sorted((tmp_path / "half" / "population").iterdir())
    assert len(lost) in (8, 9)
    for path in lost[::2]:
        path.unlink()
    lost[1].write_bytes(lost[1].read_bytes()[:100])
    record = json.loads((tmp_path / "half" / FILE).read_text())
    (tmp_path / "half" / FILE).write_text(json.dumps({**record, "stopped": ""}))
    again = search(states, tmp_path / "half", generations=6)
    again.run()
    assert outcome(again)[1:] == outcome(whole)[1:]


@pytest.mark.parametrize("strategy", ["elite", "tournament"])
def test_there_are_never_more_than_one_generation_and_the_champion_on_disk(states, tmp_path, monkeypatch, strategy):
    seen = []
    write = population_module.fsio.write_atomic

    def counted(path, data):
        write(path, data)
        seen.append(len(list(Path(path).parent.glob("*.safetensors"))))

    monkeypatch.setattr(population_module.fsio, "write_atomic", counted)
    evolution = search(states, tmp_path, strategy)
    evolution.run()
    assert max(seen) <= evolution.strategy.population + 1 <= 12 - len(ORIGINALS)
    assert evolution.population.names() == {
        evolution.progress.champion.name,
        *(one.name for one in evolution.progress.population),
    }


def test_strategies_that_do_not_breed_keep_the_champion_alone(states, tmp_path):
    evolution = search(states, tmp_path, "cma_es")
    evolution.run()
    assert evolution.population.names() == {evolution.progress.champion.name}
    assert len(evolution.population.lineage) <= 2


def test_equal_weights_are_scored_once(states, tmp_path):
    """Without noise a mutated child is its parent: the cache knows it."""
    hill = Hill(states)
    kept = Population(tmp_path / "population", states.__getitem__, "base")
    space = Space(originals=ORIGINALS, base="base", slots=slots(states["base"], "module"), traits=("left",))
    still = StrategySettings(mutation={"sigma": 0.0})
    evolution = Evolution(space, ("elite", still, 3), Rules(4, 4), hill, kept)
    evolution.run()
    assert evolution.progress.evaluations == 32 and len(hill.asked) == len(set(hill.asked)) < 20


def test_the_search_stops_for_a_stated_reason(states, tmp_path):
    for rules, reason, generations in (
        ({"generations": 3}, "3 generations were made", 3),
        ({"generations": 50, "patience": 2, "min_gain": 10.0}, "no better champion in 2 generations", 3),
        ({"generations": 50, "evaluations": 11}, "11 candidates were scored", 2),
    ):
        evolution = search(states, tmp_path / reason, **rules)
        evolution.run()
        assert evolution.progress.stopped == reason and evolution.progress.generation == generations
    assert evolution.progress.evaluations == 11 == len(evolution.progress.curve)


def test_a_champion_is_never_lost_and_the_curve_never_falls(states, tmp_path):
    evolution = search(states, tmp_path, "random", generations=6)
    progress = evolution.run()
    assert progress.curve == sorted(progress.curve) and progress.curve[-1] == progress.champion.fitness
    champions = [row["champion_fitness"] for row in progress.history]
    assert champions == sorted(champions) and progress.first_best.fitness == champions[0]
    scored = evolution.evaluator.worth([Candidate(save(evolution.weights(progress.champion)), "")])
    assert scored[0]["composite"] == progress.champion.fitness, "the weights kept are the ones that were scored"


def test_cma_es_finds_the_hill_better_than_chance(states, tmp_path):
    found = {
        name: search(states, tmp_path / name, name, generations=50, patience=50, evaluations=240).run().champion.fitness
        for name in ("cma_es", "random")
    }
    assert found["cma_es"] > found["random"]


def test_below_the_floor_of_diversity_newcomers_replace_the_redundant(states, tmp_path):
    for generations in (1, 2):
        floors = {
            floor: search(states, tmp_path / f"{floor}-{generations}", generations=generations, min_diversity=floor)
            for floor in (0.0, 0.5, 0.9)
        }
        spread = {floor: one.run().history[-1]["diversity_score"] for floor, one in floors.items()}
        newcomers = {f: sum(i.recipe.kind == "weights" for i in one.progress.population) for f, one in floors.items()}
        assert newcomers[0.0] == 0 and newcomers[0.9] <= 4, "half of a generation at most"
        assert spread[0.0] <= spread[0.5] <= spread[0.9]
    assert newcomers[0.9] > 0 and spread[0.9] > spread[0.0]


def test_diversity_is_the_mean_of_the_pairs(states):
    models = [states[name] for name in ORIGINALS]
    distances = differences(models, states["base"])
    assert variety(distances) == pytest.approx(diversity(models, states["base"]), abs=1e-12)
    assert torch.allclose(torch.tensor(distances), torch.tensor(distances.T)) and (distances.diagonal() < 1e-6).all()
    assert variety(differences(models[:1])) == 0.0 and variety(differences([models[0]] * 3)) < 1e-6


def test_another_key_starts_afresh_and_a_damaged_checkpoint_is_told(states, tmp_path):
    search(states, tmp_path, generations=2).run()
    path = tmp_path / FILE
    record = json.loads(path.read_text())
    path.write_text(json.dumps({**record, "key": "other"}))
    afresh = search(states, tmp_path)
    assert afresh.progress.generation == 0 and not afresh.population.names(), "nothing of the other search is taken"
    champion = afresh.run().champion
    scored = afresh.evaluator.worth([Candidate(save(afresh.weights(champion)), "")])
    assert scored[0]["composite"] == champion.fitness
    record = json.loads(path.read_text())
    for text in ("{", json.dumps({**record, "champion": None}), json.dumps({k: record[k] for k in ("key", "cache")})):
        path.write_text(text)
        with pytest.raises(ArtifactError, match=r"evolution.json: is damaged .*; delete it to search again"):
            search(states, tmp_path)
