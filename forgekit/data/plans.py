"""Which problems and which texts, as settings that several phases share. No torch here."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, Field, model_validator

from forgekit.config import Config
from forgekit.data.gym import FAMILIES
from forgekit.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class GymMix(Config):
    """Problems of one family."""

    family: str
    """A gym family."""
    levels: Annotated[tuple[Annotated[int, Field(ge=1, le=10)], ...], Field(min_length=1)] = (1, 2, 3)
    """Levels, in equal parts."""
    weight: Annotated[float, Field(gt=0)] = 1.0
    """How often it is practised, relative to the others."""
    options: dict[str, int] = {}
    """Extra generator options of the family, such as far_recall's gap."""

    @model_validator(mode="after")
    def _family_known(self):
        try:
            family = FAMILIES.get(self.family)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        surplus = set(self.options) - set(family.options)
        if surplus:
            raise ValueError(f"{self.family} has no option {sorted(surplus)}; it has {list(family.options)}")
        return self


def _each_once(mix: tuple[GymMix, ...]) -> tuple[GymMix, ...]:
    """Scores are told by family and level: two parts that share one would be mixed up."""
    cells = [(part.family, level) for part in mix for level in part.levels]
    twice = next((cell for cell in cells if cells.count(cell) > 1), None)
    if twice:
        raise ValueError(f"{twice[0]} level {twice[1]} is there twice; name each level of a family once")
    return mix


def minus(mix: Iterable[GymMix], taken: Iterable[GymMix]) -> tuple[GymMix, ...]:
    """A mix without the families and levels of another; a level that several parts name stays with the first."""
    seen = {(part.family, level) for part in taken for level in part.levels}
    found = []
    for part in mix:
        levels = tuple(level for level in part.levels if (part.family, level) not in seen)
        seen |= {(part.family, level) for level in levels}
        if levels:
            found.append(part.replace(levels=levels))
    return tuple(found)


Mix = Annotated[tuple[GymMix, ...], Field(min_length=1), AfterValidator(_each_once)]


class TextPlan(Config):
    """Real text for the trunk."""

    names: tuple[str, ...] = ("python_prose", "python_code")
    """Data sets of the catalogue that are always used."""
    local: tuple[str, ...] = ("tinystories", "philosophy", "wikitext")
    """Further sets, used when a data folder is given and holds them."""
    bytes_each: Positive = 1_500_000
    """Bytes taken of each set at most."""
    share: Share = 0.3
    """Share of the trunk's rows."""
