"""Merging: many models of one shape become one. Importing this package loads nothing heavy.

:data:`MERGERS` knows every method by name; what it registers is an
:class:`agent_forge.merging.operators_config.Merger`. A user's method enters by the same door, as an entry point of the
group ``forgekit.merge_method``. Methods alone work on folders (:mod:`.folders`) and on state dicts in memory
(:mod:`.genome`), which also holds the eight combinations that evolution starts from.
"""

from importlib import import_module
from typing import Any

from forgekit.registry import Registry

MERGERS = Registry("merge_method", aliases={"dare": "dare_linear"})
for _name in (
    "linear",
    "slerp",
    "karcher",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "breadcrumbs",
    "model_stock",
    "fisher",
    "dfs",
    "frankenmerge",
    "passthrough",
):
    MERGERS.lazy(_name, f"{__name__}.operators_config:{_name.upper()}")

_PUBLIC = {
    "Merger": "operators_config",
    "MergePlan": "folders",
    "merge_folders": "folders",
    "plan_text": "folders",
    "merge_states": "genome",
    "combine": "genome",
    "mutate": "genome",
    "diversity": "genome",
}

__all__ = ["MERGERS", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
