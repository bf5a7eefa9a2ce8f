"""Explanations of configuration fields, from where they are declared."""

from __future__ import annotations

from typing import Any

from forgekit.config import Config, config_in
from forgekit.errors import ConfigError
from forgekit.registry import unknown


def describe_field(path: str) -> str:
    """One paragraph on a field given by its dotted path: meaning, type, default.

    Raises:
        ConfigError: no such field; the nearest are given.
    """
    from agent_forge.profile import PHASE_CONFIGS, Profile
    from forgekit.models.config import TRMTitansConfig

    owner: type[Config] = Profile
    parts = path.split(".")
    while parts:
        part = parts.pop(0)
        if owner is Profile and part == "phases" and parts:
            owner = PHASE_CONFIGS.get(parts.pop(0))
            continue
        if owner.__name__ == "ModelPlan" and part == "settings" and parts:
            owner = TRMTitansConfig
            continue
        if part.isdigit():
            continue
        if part not in owner.model_fields:
            raise unknown("field", part, list(owner.model_fields))
        info = owner.model_fields[part]
        nested = config_in(info.annotation)
        if not parts or nested is None:
            if parts and nested is None:
                raise ConfigError(
                    f"{part} holds no fields", where=path, remedy=f"describe {path.rsplit('.', len(parts))[0]}"
                )
            return _text(path, info)
        owner = nested
    return f"{path}: fields {', '.join(owner.model_fields)}"


def _text(path: str, info: Any) -> str:
    rules = ", ".join(str(m) for m in info.metadata)
    kind = getattr(info.annotation, "__name__", str(info.annotation))
    default = "required" if info.is_required() else f"default {info.default!r}"
    nested = config_in(info.annotation)
    fields = f"\nfields: {', '.join(nested.model_fields)}" if nested else ""
    return f"{path} ({kind}{'; ' + rules if rules else ''}; {default})\n{info.description or ''}{fields}"
