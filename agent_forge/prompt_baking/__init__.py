"""Prompt baking: a prompt's effect moved into the weights (arXiv 2409.13697). Names are imported when first used.

``bake_prompt(model, prompt, PromptBakingConfig(...), tokenizer=tokenizer)`` returns a :class:`Baked` whose model
answers without the prompt as the given one does with it.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {
    "Baked": "bake",
    "BakingTask": "evidence",
    "PromptBakingConfig": "config",
    "bake_prompt": "bake",
    "baking_evidence": "evidence",
    "bake_folder": "folders",
}

__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
