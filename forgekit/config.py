"""Frozen configurations that refuse bad input in one line.

Every configuration of the house derives from :class:`Config`: values are checked at construction, unknown keys
are an error (with the nearest known key), nothing can be set afterwards. Files are TOML or JSON.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from forgekit.errors import ConfigError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of all configurations: frozen, unknown keys refused, every field documented where it is declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    @classmethod
    def build(cls: type[C], values: dict[str, Any], source: str = "") -> C:
        """Construct from a plain mapping.

        Args:
            values: field values, nested mappings for nested configurations.
            source: the file or option they came from, for the message.

        Raises:
            ConfigError: names the field, the value, the rule and the remedy.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise explain(cls, error, source) from None

    def replace(self: C, **changes: Any) -> C:
        """A copy with some fields changed; validated like a fresh one."""
        return type(self).build({**self.model_dump(), **changes})

    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON of all values: equal configurations, equal fingerprints."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json")).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: one spelling per value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def explain(kind: type[Config], error: ValidationError, source: str = "") -> ConfigError:
    """Turn pydantic's report into our one line: field, value, rule, remedy. Further problems are counted."""
    problems = error.errors(include_url=False)
    first = problems[0]
    field = ".".join(str(part) for part in first["loc"]) or kind.__name__
    if first["type"] == "extra_forbidden":
        what, remedy = "unknown key", _nearest_field(kind, first["loc"])
    elif first["type"] == "missing":
        what, remedy = "missing", f"add {field} = ..."
    else:
        rule = first["msg"].removeprefix("Value error, ")
        what = f"value {first['input']!r} refused: {rule[:1].lower()}{rule[1:]}"
        remedy = f"see `agent-forge config --describe {field}`"
    if len(problems) > 1:
        remedy += f" (and {len(problems) - 1} more problem{'s' * (len(problems) > 2)})"
    return ConfigError(what, where=f"{source}: {field}" if source else field, remedy=remedy)


def field_of(kind: type[Config], path: tuple[str | int, ...]) -> tuple[type[Config] | None, Any]:
    """Walk ``path`` through nested configurations; returns (owning class, field info) or (class, None)."""
    owner: type[Config] | None = kind
    info = None
    for part in path:
        if owner is None or part not in owner.model_fields:
            return owner, None
        info = owner.model_fields[str(part)]
        nested = info.annotation
        owner_next = nested if isinstance(nested, type) and issubclass(nested, Config) else None
        if part == path[-1]:
            return owner, info
        owner = owner_next
    return owner, info


def _nearest_field(kind: type[Config], path: tuple[str | int, ...]) -> str:
    owner, _ = field_of(kind, path[:-1] + ("",)) if len(path) > 1 else (kind, None)
    names = list(owner.model_fields) if owner is not None else []
    near = difflib.get_close_matches(str(path[-1]), names, n=2, cutoff=0.4)
    return f"did you mean {' or '.join(near)}?" if near else f"known keys: {', '.join(names)}"


def read_config_file(path: Path | str) -> dict[str, Any]:
    """Read a TOML or JSON file into a mapping.

    Raises:
        ConfigError: the file is missing, unreadable, or not valid TOML/JSON.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError("no such file", where=str(path), remedy="check the path") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"not UTF-8 at byte {error.start}", where=str(path), remedy="save it as UTF-8") from None
    except OSError as error:
        raise ConfigError(
            f"cannot be read ({error.strerror})", where=str(path), remedy="check its permissions"
        ) from None
    try:
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(
            f"not valid {path.suffix.lstrip('.') or 'toml'}: {error}", where=str(path), remedy="mend the syntax"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError("holds no table of keys", where=str(path), remedy="write `key = value` lines")
    return values
