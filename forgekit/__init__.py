"""forgekit: what both products mean by a config, an artifact, a model, a number.

Importing this package loads neither torch nor transformers. Public names are imported when first used; when
transformers itself is imported, our model families make themselves known to its ``AutoModelForCausalLM``.
"""

from importlib import import_module
from typing import Any

from forgekit.version import __version__

_PUBLIC = {
    "ForgeError": "forgekit.errors",
    "Config": "forgekit.config",
    "Registry": "forgekit.registry",
    "ModelRegistry": "forgekit.store.database",
    "ModelStorage": "forgekit.store.storage",
    "SessionCleanupManager": "forgekit.store.cleanup",
    "Artifact": "forgekit.store.artifact",
    "CheckpointManager": "forgekit.train.checkpoints",
    "ComputeManager": "forgekit.compute.manager",
    "ResourceMonitor": "forgekit.compute.monitor",
    "MuonGrokfast": "forgekit.train.muon_grokfast",
    "MuGrokConfig": "forgekit.train.optim_config",
    "PhaseLogger": "forgekit.tracking.loggers",
    "PipelineLogger": "forgekit.tracking.loggers",
    "Evidence": "forgekit.measure.evidence",
}

__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'forgekit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)


import_module("forgekit.hub").install_hook()
