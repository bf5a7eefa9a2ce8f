"""The models of a search on disk: one generation and the champion, nothing else.

A child is data (:class:`Recipe`), so a file that an interruption took can be made again from its lineage, to the same
bits. That is why old files go before new ones come, and the disk never holds more than it must.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from agent_forge.merging.recipes import build
from agent_forge.merging.strategies_config import CHAMPION, Recipe
from forgekit.store import fsio

State = Mapping[str, Tensor]
SUFFIX = ".safetensors"


class Population:
    """Weights of individuals by name, in a folder.

    Args:
        folder: where they lie.
        originals: gives the weights of an original or of the base by name.
        base: the base's name.
    """

    def __init__(self, folder: Path, originals: Callable[[str], State], base: str) -> None:
        self.folder, self._originals, self._base = fsio.make_folder(folder), originals, base
        self.lineage: dict[str, Recipe] = {}
        self.champion = ""
        self._near: dict[str, State] = {}

    def state(self, name: str) -> State:
        """The weights of an original, the base, the champion, or an individual; made again if its file is gone."""
        name = self.champion if name == CHAMPION else name
        if name not in self.lineage:
            return self._originals(name)
        if name not in self._near:
            self._near[name] = self._read(name) or self.make(self.lineage[name])
        return self._near[name]

    def make(self, recipe: Recipe) -> dict[str, Tensor]:
        """The child of a recipe."""
        return build(recipe, self.state, self._originals(self._base))

    def _read(self, name: str) -> State | None:
        try:
            return load(self._path(name).read_bytes())
        except (FileNotFoundError, SafetensorError):  # gone, or cut short: its recipe makes it again
            return None

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}{SUFFIX}"

    def names(self) -> set[str]:
        """Individuals that lie on disk."""
        return {path.name.removesuffix(SUFFIX) for path in self.folder.glob(f"*{SUFFIX}")}

    def keep(self, wanted: Iterable[str], weights: Mapping[str, bytes]) -> None:
        """Make the folder hold exactly ``wanted``; what it lacks is taken from ``weights`` or made again."""
        wanted = list(dict.fromkeys(wanted))
        for name in sorted(self.names() - set(wanted)):
            self._path(name).unlink()
        self._near = {}
        for name in wanted:
            if name in weights:  # written over whatever an earlier search left under this name
                fsio.write_atomic(self._path(name), weights[name])
            elif not self._path(name).is_file():
                fsio.write_atomic(self._path(name), save(dict(self.state(name))))

    def ancestors(self, names: Iterable[str]) -> dict[str, Recipe]:
        """The recipes of individuals and of everything they were made of, oldest first."""
        found: dict[str, Recipe] = {}

        def visit(name: str) -> None:
            if name in self.lineage and name not in found:
                for parent in self.lineage[name].parents:
                    visit(parent)
                found[name] = self.lineage[name]

        for name in names:
            visit(name)
        return found
