"""Strategies of the merge evolution: each asks for a generation of recipes and is told how good their children were.

Sources: ``elite``, V2 specification, 2.2.5 (elite mutation and loser merging); ``cma_es``, Hansen, arXiv 1604.00772,
over merge weights as in Akiba et al. (2403.13187); ``tournament`` and ``random`` are the textbook's.

``ask`` changes nothing: every draw comes from the seed, the strategy's name, the generation and the individual's index,
so until the next ``tell`` it gives the same recipes, also in another process that restored the state. No torch here.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

import numpy as np

from agent_forge.merging.cma import CMAES, default_population
from agent_forge.merging.genome_config import COMBINATIONS
from agent_forge.merging.strategies_config import CHAMPION, STRATEGIES, Recipe, Space, StrategySettings
from forgekit.errors import ConfigError

__all__ = ["STRATEGIES", "Recipe", "Scored", "Space", "Strategy", "StrategySettings", "immigrant"]

POPULATION = 8
"""Individuals per generation where the settings leave it to the strategy."""
GROUP = 3
"""Losers merged into one child."""
# Every two in a row differ in all three stages, so that a smaller population still meets every method.
_SPREAD = (0, 7, 3, 4, 5, 2, 6, 1)


@dataclass(frozen=True)
class Scored:
    """An individual and how good it was.

    Attributes:
        name: under which its model is found until the next generation is told.
        recipe: how it was made.
        fitness: higher is better; NaN or infinite: it could not be told, which ranks last.
    """

    name: str
    recipe: Recipe
    fitness: float


@dataclass(frozen=True)
class _Known:
    """What a strategy remembers of an individual: plain values only."""

    name: str
    traits: str
    fitness: float | None = None
    combo: int | None = None
    """The combination that its line goes back to through mutations."""

    @property
    def rank(self) -> float:
        """For sorting, best first."""
        return math.inf if self.fitness is None else -self.fitness


class Strategy(ABC):
    """Chooses what is made next. Generations are of one size.

    Args:
        space: what may be combined.
        settings: how to search.
        seed: decides every draw.

    Raises:
        ConfigError: the settings do not fit the space.
    """

    name: ClassVar[str]
    breeds: ClassVar[bool] = False
    """Whether children are made of the last generation, whose models then have to be kept."""

    def __init__(self, space: Space, settings: StrategySettings, seed: int) -> None:
        self.space, self.settings, self.seed = space, settings, seed
        self.population = settings.population or POPULATION
        self.generation = 0
        self.notes: dict[str, Any] = {}
        """What the last :meth:`ask` chose, for metrics; empty where there is nothing to tell."""
        self._told: list[_Known] = []
        self._champion: _Known | None = None

    @abstractmethod
    def ask(self) -> list[Recipe]:
        """The next generation."""

    def tell(self, scored: Sequence[Scored]) -> None:
        """Learn how good the generation was, in the order asked; some may have been replaced by the caller.

        Raises:
            ConfigError: nobody is told, or two have one name.
        """
        names = [one.name for one in scored]
        if not scored or len(set(names)) < len(names):
            what = "two individuals of one name" if scored else "no individual"
            raise ConfigError(what, where="generation", remedy="tell every individual of the generation once")
        known = {one.name: one for one in self._told}
        self._told = [_remembered(one, known, self._champion) for one in scored]
        best = min(self._told, key=lambda one: one.rank)
        if best.rank < (math.inf if self._champion is None else self._champion.rank):
            self._champion = best
        elif self._champion is not None:
            self._champion = replace(self._champion, name=CHAMPION)
        self.generation += 1

    def state(self) -> dict[str, Any]:
        """Everything learned, as plain values that JSON keeps exactly."""
        champion = asdict(self._champion) if self._champion else None
        return {"generation": self.generation, "told": [asdict(one) for one in self._told], "champion": champion}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where another of the same space, settings and seed was."""
        self.generation = int(state["generation"])
        self._told = [_Known(**one) for one in state["told"]]
        self._champion = _Known(**state["champion"]) if state["champion"] else None

    def _draws(self, index: int) -> np.random.Generator:
        return _generator(self.seed, self.name, self.generation, index)

    def _pool(self) -> list[_Known]:
        """Who may be a parent, best first: the generation told, and the champion if it is older.

        Nobody whose fitness could not be told: such a model may hold NaN, or not exist.
        """
        older = [self._champion] if self._champion and self._champion.name == CHAMPION else []
        return sorted((one for one in older + self._told if one.fitness is not None), key=lambda one: one.rank)

    def _dealt_traits(self) -> list[str]:
        """Traits for a whole generation: each as often as the others, in random order."""
        traits = self.space.traits
        order = self._draws(self.population).permutation(self.population)
        return [traits[i % len(traits)] for i in order.tolist()]

    def _combinations(self) -> list[Recipe]:
        """Generation 0: the combinations of all originals.

        A smaller population gets those that differ most; in a larger one random weights fill up, because most
        combinations would give the same child again.
        """
        count = min(self.population, COMBINATIONS)
        combos = range(count) if count == COMBINATIONS else _SPREAD[:count]
        originals = [_Known(name, name) for name in self.space.originals]
        traits = self._dealt_traits()
        first = [self._combined(combo, originals, traits[i], i) for i, combo in enumerate(combos)]
        rest = [_random(self.space, self._draws(i), traits[i]) for i in range(count, self.population)]
        return first + rest

    def _combined(self, combo: int, models: Sequence[_Known], traits: str, index: int) -> Recipe:
        """A combination; the models' fitness decides whose layers are grafted, where all of it is known."""
        options = self.settings.combination
        scores = [one.fitness for one in models]
        values = options.model_dump(mode="json")
        if not options.scores and None not in scores:
            values["scores"] = scores
        for name in ("weights", "scores"):  # said for the originals: of no use to a group of another size
            if len(values[name]) != len(models):
                values[name] = []
        return Recipe(
            kind="combination",
            parents=tuple(one.name for one in models),
            traits=traits,
            seed=_seed(self._draws(index)),
            combo=combo,
            options=values,
            granularity=self.space.granularity,
        )

    def _switched(self, traits: str, draws: np.random.Generator) -> str:
        """The same traits or, now and then, another original's."""
        others = [name for name in self.space.traits if name != traits]
        if others and draws.random() < self.settings.trait_switch:
            return others[int(draws.integers(len(others)))]
        return traits

    def _mutated(self, parent: _Known, draws: np.random.Generator) -> Recipe:
        return Recipe(
            kind="mutation",
            parents=(parent.name,),
            traits=self._switched(parent.traits, draws),
            seed=_seed(draws),
            options=self.settings.mutation.model_dump(mode="json"),
            granularity=self.space.granularity,
        )


class EliteStrategy(Strategy):
    """Mutate the best, merge the worst.

    Generation 0 is the eight combinations. Then the two best of the generation and the champion so far are mutated
    three times each, and the worst six of the generation, in two groups, are merged by a random combination each. In a
    population too small for that at least one child is merged; in a larger one all beyond the mutated are.
    """

    name = "elite"
    breeds = True

    def ask(self) -> list[Recipe]:
        """See :class:`Strategy`. Sets ``notes``: the combinations that the elites go back to, and those just drawn."""
        pool = self._pool()
        if not pool:
            recipes = self._combinations()
            used = Counter(recipe.combo for recipe in recipes if recipe.combo is not None)
            self._note(used, [])
            return recipes
        elites = pool[: self.settings.elites]
        count = min(self.settings.elites * self.settings.children_per_elite, self.population - 1)
        shares = sorted(i % len(elites) for i in range(count))
        children = [self._mutated(elites[which], self._draws(i)) for i, which in enumerate(shares)]
        names = {one.name for one in elites}
        losers = [one for one in pool if one.name not in names]
        merged = self._merged(losers, self.population - count)
        self._note(Counter(one.combo for one in elites if one.combo is not None), [recipe.combo for recipe in merged])
        return children + merged

    def _note(self, used: Counter, chosen: list[int]) -> None:
        self.notes = {"elite_combo_usage": dict(sorted(used.items())), "loser_combo_chosen": chosen}

    def _merged(self, losers: list[_Known], groups: int) -> list[Recipe]:
        """One child per group of the worst, each by a combination drawn at random."""
        worst = losers[-GROUP * groups :]
        recipes = []
        for i, part in enumerate(np.array_split(np.arange(len(worst)), groups)):
            index = self.population - groups + i
            draws = _generator(self.seed, f"{self.name} losers", self.generation, index)
            group = self._filled([worst[k] for k in part.tolist()], worst, draws)
            best = min(group, key=lambda one: one.rank)
            recipes.append(self._combined(int(draws.integers(COMBINATIONS)), group, best.traits, index))
        return recipes

    def _filled(self, group: list[_Known], worst: list[_Known], draws: np.random.Generator) -> list[_Known]:
        """A group that is too small is filled with other losers and originals."""
        names = {one.name for one in group}
        others = [one for one in worst if one.name not in names]
        others += [_Known(name, name) for name in self.space.originals]
        order = draws.permutation(len(others)).tolist()
        return group + [others[k] for k in order[: max(0, GROUP - len(group))]]


class TournamentStrategy(Strategy):
    """Parents win tournaments; two of them are crossed, module by module, or one is mutated.

    Generation 0 is the eight combinations. The best so far takes part in every generation and is always a parent of the
    first child.
    """

    name = "tournament"
    breeds = True

    def ask(self) -> list[Recipe]:
        """See :class:`Strategy`."""
        pool = self._pool()
        if not pool:
            return self._combinations()
        return [self._child(pool, index) for index in range(self.population)]

    def _child(self, pool: list[_Known], index: int) -> Recipe:
        draws = self._draws(index)
        first = pool[0] if index == 0 else self._winner(pool, draws)  # the best of all is the champion
        others = [one for one in pool if one.name != first.name]
        if not others or draws.random() >= self.settings.crossover_rate:
            return self._mutated(first, draws)
        second = self._winner(others, draws)
        blend = bool(draws.random() < self.settings.blend_rate) or len(self.space.slots) < 2
        giver = (first, second)[int(draws.integers(2))]
        return Recipe(
            kind="crossover",
            parents=(first.name, second.name),
            traits=self._switched(giver.traits, draws),
            seed=_seed(draws),
            options={"blend": blend, **self.settings.mutation.model_dump(mode="json")},
            granularity=self.space.granularity,
        )

    def _winner(self, pool: list[_Known], draws: np.random.Generator) -> _Known:
        size = min(self.settings.tournament_size, len(pool))
        return pool[int(draws.choice(len(pool), size=size, replace=False).min())]


class RandomStrategy(Strategy):
    """Random merge weights and traits in every generation: what every other strategy must beat."""

    name = "random"

    def ask(self) -> list[Recipe]:
        """See :class:`Strategy`."""
        return [_random(self.space, self._draws(index)) for index in range(self.population)]


class CMAStrategy(Strategy):
    """CMA-ES over the merge weights of every original and slot, and over the traits.

    Where originals differ in traits there is one more coordinate for each; the highest decides. It starts at the plain
    average of the originals.
    """

    name = "cma_es"

    def __init__(self, space: Space, settings: StrategySettings, seed: int) -> None:
        super().__init__(space, settings, seed)
        start = 1 / len(space.originals) if settings.start is None else settings.start
        if not space.low <= start <= space.high:
            what = f"{start:g} is outside the merge weights' range {space.low:g} to {space.high:g}"
            raise ConfigError(what, where="start", remedy="choose a value inside")
        self._weights = len(space.originals) * len(space.slots)
        dimensions = self._weights + (len(space.traits) if len(space.traits) > 1 else 0)
        self.population = settings.population or default_population(dimensions)
        search_seed = _seed(_generator(seed, self.name, 0, 0))
        bounds = (space.low, space.high)
        self._search = CMAES([start] * dimensions, settings.sigma, self.population, search_seed, bounds)

    def ask(self) -> list[Recipe]:
        """See :class:`Strategy`."""
        return [self._recipe(point, index) for index, point in enumerate(self._search.ask())]

    def tell(self, scored: Sequence[Scored]) -> None:
        """See :class:`Strategy`. A recipe that was not asked teaches too, if it weighs the originals.

        Raises:
            ConfigError: not as many as asked, or a recipe that has no place among the coordinates.
        """
        if len(scored) != self.population:
            what = f"{len(scored)} individuals, {self.population} were asked"
            raise ConfigError(what, where="generation", remedy="tell every individual of the generation once")
        points = self._search.ask()
        for index, one in enumerate(scored):
            asked = self._recipe(points[index], index)
            if (one.recipe.weights, one.recipe.traits) != (asked.weights, asked.traits):
                points[index] = self._placed(one)
        values = [one.fitness if math.isfinite(one.fitness) else math.nan for one in scored]
        super().tell(scored)
        self._search.tell(points, values)

    def _recipe(self, point: np.ndarray, index: int) -> Recipe:
        traits = self.space.traits
        chosen = int(np.argmax(point[self._weights :])) if len(traits) > 1 else 0
        return _weights(self.space, point[: self._weights], traits[chosen], _seed(self._draws(index)))

    def _placed(self, one: Scored) -> np.ndarray:
        """The coordinates of a recipe made elsewhere."""
        recipe, space = one.recipe, self.space
        shape = (len(recipe.weights), len(recipe.weights[0]) if recipe.weights else 0)
        if recipe.parents != space.originals or shape != (len(space.originals), len(space.slots)):
            what = f"{one.name} ({recipe.kind} of {', '.join(recipe.parents)}) does not weigh the originals"
            raise ConfigError(what, where=self.name, remedy="replace individuals by recipes from immigrant()")
        point = self._search.mean_N.copy()
        point[: self._weights] = np.array(recipe.weights).ravel()
        votes = point[self._weights :]
        if votes.size and recipe.traits in space.traits:
            best, wanted = int(np.argmax(votes)), space.traits.index(recipe.traits)
            votes[best], votes[wanted] = votes[wanted], votes[best]
        return point

    def state(self) -> dict[str, Any]:
        """See :class:`Strategy`."""
        return {**super().state(), "search": self._search.state()}

    def restore(self, state: dict[str, Any]) -> None:
        """See :class:`Strategy`.

        Raises:
            ConfigError: the state is of another space.
        """
        super().restore(state)
        try:
            self._search.restore(state["search"])
        except ValueError as error:
            remedy = "resume with the originals and granularity that it was started with"
            raise ConfigError(str(error), where=self.name, remedy=remedy) from None


def immigrant(space: Space, rng_seed: int) -> Recipe:
    """A random weighing of the originals, to bring new blood into a population that has become too alike."""
    return _random(space, _generator(rng_seed, "immigrant", 0, 0))


def _remembered(one: Scored, known: dict[str, _Known], champion: _Known | None) -> _Known:
    recipe, combo = one.recipe, one.recipe.combo
    # A parent that is not of the last generation is the champion, under whichever of its names.
    if recipe.kind == "mutation" and (parent := known.get(recipe.parents[0], champion)):
        combo = parent.combo
    return _Known(one.name, recipe.traits, float(one.fitness) if math.isfinite(one.fitness) else None, combo)


def _random(space: Space, draws: np.random.Generator, traits: str = "") -> Recipe:
    values = draws.uniform(space.low, space.high, size=len(space.originals) * len(space.slots))
    traits = traits or space.traits[int(draws.integers(len(space.traits)))]
    return _weights(space, values, traits, _seed(draws))


def _weights(space: Space, values: np.ndarray, traits: str, seed: int) -> Recipe:
    rows = values.reshape(len(space.originals), len(space.slots)).tolist()
    return Recipe(
        kind="weights",
        parents=space.originals,
        traits=traits,
        seed=seed,
        weights=tuple(map(tuple, rows)),
        granularity=space.granularity,
    )


def _seed(draws: np.random.Generator) -> int:
    return int(draws.integers(2**32))


def _generator(seed: int, name: str, generation: int, index: int) -> np.random.Generator:
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4").tolist()
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, generation, index, *words])))
