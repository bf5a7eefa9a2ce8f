"""One lazy registry for everything that can be extended.

Built-ins enter by dotted path (nothing is imported until it is asked for), users by decorator or by an entry
point of the group ``forgekit.<kind>``. An unknown name is answered with the nearest ones, a name taken twice
is refused.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from forgekit.errors import ConfigError


class Registry:
    """Names to objects, in the order of registration.

    Args:
        kind: what is registered, in the singular; used in messages and as the entry-point group.
        aliases: other spellings that resolve to a registered name.
    """

    def __init__(self, kind: str, aliases: dict[str, str] | None = None) -> None:
        self.kind = kind
        self._aliases = dict(aliases or {})
        self._items: dict[str, Any] = {}
        self._lazy: dict[str, str] = {}
        self._scanned = False

    def lazy(self, name: str, target: str) -> None:
        """Register ``package.module:attribute`` under ``name`` without importing it."""
        self._claim(name)
        self._lazy[name] = target

    def register(self, name: str) -> Callable[[Any], Any]:
        """Decorator that registers an object under ``name``."""

        def keep(item: Any) -> Any:
            self._claim(name)
            self._items[name] = item
            return item

        return keep

    def resolve(self, name: str) -> str:
        """The registered spelling of ``name`` (aliases followed).

        Raises:
            ConfigError: the name is unknown; the nearest names are given.
        """
        name = self._aliases.get(name, name)
        if name not in self._items and name not in self._lazy:
            self._scan()
        if name not in self._items and name not in self._lazy:
            raise unknown(self.kind, name, [*self.names(), *self._aliases])
        return name

    def get(self, name: str) -> Any:
        """The object registered under ``name``, imported now if it was lazy."""
        name = self.resolve(name)
        if name not in self._items:
            module, _, attribute = self._lazy[name].partition(":")
            self._items[name] = getattr(import_module(module), attribute)
        return self._items[name]

    def names(self) -> list[str]:
        """Every registered name, built-ins first, then users', each in order of registration."""
        self._scan()
        return list(dict.fromkeys([*self._lazy, *self._items]))

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def __contains__(self, name: str) -> bool:
        return self._aliases.get(name, name) in self.names()

    def _claim(self, name: str) -> None:
        if name in self._items or name in self._lazy:
            raise ConfigError(f"{self.kind} {name!r} is registered twice", remedy="rename one of the two")

    def _scan(self) -> None:
        """Add what installed distributions offer, once, in a stable order."""
        if self._scanned:
            return
        self._scanned = True
        for point in sorted(entry_points(group=f"forgekit.{self.kind}"), key=lambda p: p.name):
            self.lazy(point.name, point.value)


def unknown(kind: str, name: str, choices: list[str]) -> ConfigError:
    """The error for an unknown ``name`` of a ``kind``, naming the nearest choices."""
    near = difflib.get_close_matches(name, choices, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(choices)}"
    return ConfigError(f"unknown {kind} {name!r}", where=kind, remedy=hint)
