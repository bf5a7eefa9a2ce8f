"""Agent Forge: eight measured phases that make small agents. Public names are imported when first used."""

from importlib import import_module
from typing import Any

from forgekit.version import __version__

_PUBLIC = {
    "PipelineOrchestrator": "agent_forge.pipeline.orchestrator",
    "ModelHandoffValidator": "agent_forge.pipeline.handoff",
    "PhaseController": "agent_forge.pipeline.phase",
    "PhaseResult": "agent_forge.pipeline.phase",
    "Profile": "agent_forge.profile",
    "load_profile": "agent_forge.profile",
    "bake_prompt": "agent_forge.prompt_baking",
    "PromptBakingConfig": "agent_forge.prompt_baking",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'agent_forge' has no attribute {name!r}")
