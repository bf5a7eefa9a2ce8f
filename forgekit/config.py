"""Frozen configurations that refuse bad input in one line.

Every configuration of the house derives from :class:`Config`: values are checked at construction, unknown keys
are an error (with the nearest known key), nothing can be set afterwards. Files are TOML or JSON.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import reprlib
import tomllib
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, ValidationError

from forgekit.errors import ConfigError

C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of all configurations: frozen, unknown keys refused, every field documented where it is declared."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())

    @classmethod
    def build(cls: type[C], values: dict[str, Any], source: str = "", path: str = "") -> C:
        """Construct from a plain mapping.

        Args:
            values: field values, nested mappings for nested configurations.
            source: the file or option they came from, for the message.
            path: dotted place of this configuration inside a larger one, for the message.

        Raises:
            ConfigError: names the field, the value, the rule and the remedy.
        """
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise explain(cls, error, source, path) from None
        except ConfigError as error:  # a validator's own, about a configuration inside this one
            where = ".".join(filter(None, (path, error.where)))
            raise ConfigError(error.what, where=_place(source, where), remedy=error.remedy) from None

    def replace(self: C, **changes: Any) -> C:
        """A copy with some fields changed; validated like a fresh one."""
        return type(self).build({**self.model_dump(), **changes})

    def fingerprint(self) -> str:
        """SHA-256 over the canonical JSON of all values: equal configurations, equal fingerprints."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json")).encode()).hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: one spelling per value, for hashing."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, default=str)


def explain(kind: type[Config], error: ValidationError, source: str = "", path: str = "") -> ConfigError:
    """Turn pydantic's report into our one line: field, value, rule, remedy. Further problems are counted."""
    problems = error.errors(include_url=False)
    first = problems[0]
    inner = ".".join(str(part) for part in first["loc"])
    field = ".".join(filter(None, (path, inner))) or kind.__name__
    rule = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        what, remedy = "unknown key", _nearest_field(kind, first["loc"])
    elif first["type"] == "missing":
        what, remedy = "missing", f"add {field} = ..."
    elif first["type"] == "value_error" and isinstance(first["input"], dict):
        # The rule joins several fields of a table and names them itself; the table would be pages long.
        what, remedy = rule, ""
    else:
        what = f"value {reprlib.repr(first['input'])} refused: {rule[:1].lower()}{rule[1:]}"
        remedy = _meaning(kind, first["loc"])
    if len(problems) > 1:
        more = f"and {len(problems) - 1} more problem{'s' * (len(problems) > 2)}"
        remedy = f"{remedy} ({more})" if remedy else more
    return ConfigError(what, where=_place(source, field), remedy=remedy)


def config_in(annotation: Any) -> type[Config] | None:
    """The configuration class inside an annotation such as ``tuple[TrainConfig, ...]``; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    return next((found for part in get_args(annotation) if (found := config_in(part)) is not None), None)


def _place(source: str, field: str) -> str:
    return f"{source}: {field}" if source and field else source or field


def _field(kind: type[Config], path: tuple[str | int, ...]) -> tuple[type[Config] | None, Any]:
    """Walk ``path`` through nested configurations: (class inside the last field, that field's description)."""
    inside: type[Config] | None = kind
    info = None
    for part in path:
        if isinstance(part, int):  # an entry of a tuple of configurations
            continue
        if inside is None or part not in inside.model_fields:
            return None, None
        info = inside.model_fields[part]
        inside = config_in(info.annotation)
    return inside, info


def _meaning(kind: type[Config], path: tuple[str | int, ...]) -> str:
    """The remedy for a refused value: what the field is for, and what it is when nobody sets it."""
    info = _field(kind, path)[1]
    if info is None:
        return "give another value"
    default = "" if info.is_required() else f" Default: {reprlib.repr(info.default)}."
    return f"give another value. {info.description or ''}{default}".strip()


def _nearest_field(kind: type[Config], path: tuple[str | int, ...]) -> str:
    owner = _field(kind, path[:-1])[0]
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
