"""The search: ask a strategy for children, build and score them, tell it, and keep a checkpoint of every generation.

A checkpoint is one JSON file, written when a generation's scores are known and before its files replace the last
one's. Every draw is decided by seed, generation and index, so a search that is resumed takes the same turns.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import load, save

from agent_forge.merging.strategies import STRATEGIES, Scored, Strategy, immigrant
from agent_forge.merging.strategies_config import CHAMPION, Recipe, Space, StrategySettings
from agent_forge.merging.variety import differences, variety
from agent_forge.phases.evomerge.evaluate import Candidate, Evaluator
from agent_forge.phases.evomerge.population import Population
from forgekit.errors import ArtifactError
from forgekit.store import fsio

Parts = dict[str, float]
FILE = "evolution.json"


@dataclass(frozen=True)
class Rules:
    """When a search goes on and when it stops.

    Attributes:
        generations: at most; ``evaluations``: candidates scored at most, 0 for no limit.
        patience: generations without a better champion.
        min_gain: how much better counts as better.
        min_diversity: floor of a breeding population's diversity.
    """

    generations: int
    patience: int
    min_gain: float = 0.0
    min_diversity: float = 0.0
    evaluations: int = 0


@dataclass
class Individual:
    """A scored child: the recipe names its parents as they were then."""

    name: str
    recipe: Recipe
    parts: Parts

    @property
    def fitness(self) -> float:
        return self.parts["composite"]

    def record(self) -> dict[str, Any]:
        """As JSON-able values."""
        return {"name": self.name, "recipe": self.recipe.model_dump(mode="json"), "parts": self.parts}

    @classmethod
    def read(cls, record: Mapping[str, Any]) -> Individual:
        """From :meth:`record`."""
        return cls(record["name"], Recipe.build(record["recipe"], FILE), dict(record["parts"]))


@dataclass
class Progress:
    """Where a search stands after a generation; everything a checkpoint holds."""

    generation: int = 0
    population: list[Individual] = field(default_factory=list)
    champion: Individual | None = None
    first_best: Individual | None = None
    stale: int = 0
    evaluations: int = 0
    stopped: str = ""
    history: list[dict[str, Any]] = field(default_factory=list)
    curve: list[float] = field(default_factory=list)
    cache: dict[str, Parts] = field(default_factory=dict)


class Evolution:
    """One search. Same space, settings, seed and scores: same champion, resumed or not.

    Args:
        space: what may be combined.
        strategy: name and settings of the strategy, and the seed.
        rules: when to stop.
        evaluator: scores candidates.
        population: their weights; it is emptied of whatever an earlier search of another key left.
        checkpoint: the file to write after every generation, and a fingerprint of everything that decides the search;
            it is read when it is there and of the same fingerprint. None keeps nothing.
    """

    def __init__(
        self,
        space: Space,
        strategy: tuple[str, StrategySettings, int],
        rules: Rules,
        evaluator: Evaluator,
        population: Population,
        checkpoint: tuple[Path, str] | None = None,
    ) -> None:
        name, settings, seed = strategy
        self.space, self.rules, self.evaluator, self.population = space, rules, evaluator, population
        self.strategy: Strategy = STRATEGIES.get(name)(space, settings, seed)
        self.seed, self.progress = seed, Progress()
        self._checkpoint = checkpoint
        if checkpoint is None or not checkpoint[0].is_file() or not self._resume(*checkpoint):
            population.keep([], {})

    def run(self, show: Callable[[Progress], None] = lambda progress: None) -> Progress:
        """Search until a rule says stop; ``show`` is called after every generation.

        Raises:
            ResourceError: workers died twice; the finished generations are kept.
        """
        while not self.progress.stopped:
            self._generation()
            show(self.progress)
        return self.progress

    def _generation(self) -> None:
        progress, population = self.progress, self.population
        asked = self.strategy.ask()
        whole = len(asked)
        if self.rules.evaluations:
            asked = asked[: self.rules.evaluations - progress.evaluations]
        names = [f"g{progress.generation}-{i}" for i in range(len(asked))]
        asked, children, spread = self._children(asked)
        weights = {name: save(child) for name, child in zip(names, children)}
        scored = [
            Individual(name, self._resolved(recipe), found)
            for name, recipe, found in zip(names, asked, self._score(weights, asked))
        ]
        if len(asked) == whole:  # cut short, it is the last one and nobody learns from it
            self.strategy.tell([Scored(one.name, recipe, one.fitness) for one, recipe in zip(scored, asked)])
        population.lineage |= {one.name: one.recipe for one in scored}
        self._judge(scored, spread)
        kept = [one.name for one in scored] if self.strategy.breeds else []
        population.champion = progress.champion.name
        population.lineage = population.ancestors([*kept, progress.champion.name, progress.first_best.name])
        self._save()
        population.keep([*kept, progress.champion.name], weights)

    def _children(self, asked: list[Recipe]) -> tuple[list[Recipe], list[dict], float]:
        """The children, and how different they are; where that is below the floor, redundant ones make room."""
        base, asked = self.population.state(self.space.base), list(asked)
        children = [self.population.make(recipe) for recipe in asked]
        distances = differences(children, base)
        tried: set[int] = set()
        most = len(asked) // 2 if self.strategy.breeds else 0
        while variety(distances) < self.rules.min_diversity and len(tried) < most:
            index = _most_redundant(distances, tried)
            tried.add(index)
            recipe = immigrant(self.space, _number(self.seed, self.progress.generation, index))
            others = [*children[:index], self.population.make(recipe), *children[index + 1 :]]
            fresh = differences(others, base)
            if variety(fresh) > variety(distances):
                asked[index], children, distances = recipe, others, fresh
        return asked, children, variety(distances)

    def _resolved(self, recipe: Recipe) -> Recipe:
        """The recipe with the champion under its own name: who the champion is changes."""
        own = self.progress.champion.name if self.progress.champion else CHAMPION
        return recipe.replace(parents=tuple(own if name == CHAMPION else name for name in recipe.parents))

    def _score(self, weights: Mapping[str, bytes], asked: list[Recipe]) -> list[Parts]:
        """Every child's parts; children whose weights and traits were scored before are not scored again."""
        cache = self.progress.cache
        keys = [
            hashlib.sha256(data + recipe.traits.encode()).hexdigest() for data, recipe in zip(weights.values(), asked)
        ]
        fresh = {
            key: Candidate(data, recipe.traits)
            for key, data, recipe in zip(keys, weights.values(), asked)
            if key not in cache
        }
        cache |= dict(zip(fresh, self.evaluator.worth(list(fresh.values()))))
        return [cache[key] for key in keys]

    def _judge(self, scored: list[Individual], spread: float) -> None:
        """Find the champion, write the generation's history, decide whether to go on."""
        progress, rules = self.progress, self.rules
        best = max(scored, key=lambda one: one.fitness)
        before = progress.champion.fitness if progress.champion else None
        for one in scored:
            progress.curve.append(max([one.fitness, *progress.curve[-1:]]))
        if before is None or best.fitness > before:
            progress.champion = best
        progress.first_best = progress.first_best or best
        progress.stale = 0 if before is None or best.fitness > before + rules.min_gain else progress.stale + 1
        progress.population, progress.evaluations = scored, progress.evaluations + len(scored)
        values = [one.fitness for one in scored]
        progress.history.append(
            {
                "generation": progress.generation,
                "best_fitness": best.fitness,
                "avg_fitness": statistics.fmean(values),
                "min_fitness": min(values),
                "max_fitness": max(values),
                "fitness_std": statistics.pstdev(values),
                "diversity_score": spread,
                "champion_fitness": progress.champion.fitness,
                "best": best.parts,
                "evaluations": progress.evaluations,
                "elite_combo_usage": {str(k): v for k, v in self.strategy.notes.get("elite_combo_usage", {}).items()},
                "loser_combo_chosen": list(self.strategy.notes.get("loser_combo_chosen", [])),
            }
        )
        progress.generation += 1
        if rules.evaluations and progress.evaluations >= rules.evaluations:
            progress.stopped = f"{progress.evaluations} candidates were scored"
        elif progress.generation >= rules.generations:
            progress.stopped = f"{rules.generations} generations were made"
        elif progress.stale >= rules.patience:
            progress.stopped = f"no better champion in {rules.patience} generations"

    def _save(self) -> None:
        if self._checkpoint is None:
            return
        path, key = self._checkpoint
        progress = self.progress
        record = {
            "key": key,
            "strategy": self.strategy.state(),
            "lineage": {name: recipe.model_dump(mode="json") for name, recipe in self.population.lineage.items()},
            **{k: v for k, v in progress.__dict__.items() if k not in ("population", "champion", "first_best")},
            "population": [one.record() for one in progress.population],
            "champion": progress.champion.record(),
            "first_best": progress.first_best.record(),
        }
        fsio.write_atomic(path, json.dumps(record).encode())

    def _resume(self, path: Path, key: str) -> bool:
        """Go on from a checkpoint of the same key; another's is left to be written over.

        Returns:
            Whether it was of the same key.

        Raises:
            ArtifactError: it is damaged.
        """
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            if record.pop("key") != key:
                return False
            lineage = {name: Recipe.build(recipe, str(path)) for name, recipe in record.pop("lineage").items()}
            members = [Individual.read(one) for one in record.pop("population")]
            champion, first = (Individual.read(record.pop(name)) for name in ("champion", "first_best"))
            self.strategy.restore(record.pop("strategy"))
            self.progress = Progress(population=members, champion=champion, first_best=first, **record)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            what = f"is damaged ({type(error).__name__}: {error})"
            raise ArtifactError(what, where=str(path), remedy="delete it to search again from the start") from None
        self.population.lineage, self.population.champion = lineage, champion.name
        kept = [one.name for one in members] if self.strategy.breeds else []
        self.population.keep([*kept, champion.name], {})
        return True

    def weights(self, individual: Individual) -> dict:
        """The tensors of an individual of the lineage."""
        return load(save(dict(self.population.state(individual.name))))


def _number(*parts: int) -> int:
    """A seed of its own for every combination of numbers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4])


def _most_redundant(distances: np.ndarray, spared: set[int]) -> int:
    """The individual that is nearest to another one."""
    own = distances + np.diag(np.full(len(distances), np.inf))
    return min((i for i in range(len(own)) if i not in spared), key=lambda i: own[i].min())
