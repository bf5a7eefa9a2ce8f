"""The modelling code that travels with an exported model, for machines without agent-forge.

transformers runs a folder's own Python files with ``trust_remote_code=True``. The files are those of
``forgekit/models``, statement for statement; only what they import is renamed, and the bridge to transformers is cut
out of ``forgekit/models/hf.py``. So there is one implementation, and what it needs is torch and transformers alone.
Configurations are checked when a model is made; the copy takes the finished values as they are.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

from forgekit.errors import ConfigError
from forgekit.models.config import FAMILIES, MODEL_CONFIGS
from forgekit.version import __version__

CONFIG_FILE, MODEL_FILE = "configuration_forge", "modeling_forge"
AUTO_MAP = {
    "AutoConfig": f"{CONFIG_FILE}.ForgeConfig",
    "AutoModelForCausalLM": f"{MODEL_FILE}.ForgeForCausalLM",
}
"""What ``config.json`` says so that transformers finds the code."""
_BRIDGE = ("StateCache", "ForgeForCausalLM")
_STAND_INS = {
    "forgekit.config": "forge_config",
    "forgekit.models.config": "forge_config",
    "forgekit.infer": "forge_config",
}
"""Modules of which the copy needs a few names only, and where it finds them."""
_IMPORT = re.compile(r"(?m)^(\s*from )(forgekit[.\w]*)( import )")
_HEAD = f"""# Part of agent-forge {__version__}, SPDX-License-Identifier: Apache-2.0.
# Written by `agent-forge export`; the original is {{origin}}.
"""

_CONFIGURATION = '''"""The transformers configuration of the model family {family}."""

from transformers.configuration_utils import PreTrainedConfig


class ForgeConfig(PreTrainedConfig):
    """Standard names as in every configuration; ``forge`` holds the family's own values."""

    model_type = "{family}"
'''

_VALUES = '''"""The family's configuration as plain values; they were checked when the model was made."""

from types import SimpleNamespace


class Config(SimpleNamespace):
    """The values under ``forge`` in config.json."""

    @property
    def memories(self):
        """Blocks that really own a memory."""
        return () if self.memory == "none" else tuple(self.memory_layers)


GPTConfig = TRMTitansConfig = Config


class kernels:
    """Stands for the compiled steps of a generated token, which are agent-forge's: here the layers take torch's."""

    HEAD_STEP = MEMORY_STEP = 1

    @staticmethod
    def takes(*tensors):
        """Nothing can be taken."""
        return False


class MODEL_CONFIGS:
    """Stands for the registry of families: this folder holds one."""

    @classmethod
    def get(cls, family):
        return cls

    @staticmethod
    def build(values, source=""):
        """The configuration in ``values``."""
        return Config(**values)
'''


def bundle(family: str) -> dict[str, str]:
    """File names to sources: everything transformers needs to run a model of ``family``.

    Raises:
        ConfigError: the family is not ours, or its module imports what cannot travel.
    """
    module, _, kind = _target(family).partition(":")
    files = {
        f"{CONFIG_FILE}.py": _HEAD.format(origin="forgekit/hub.py") + _CONFIGURATION.format(family=family),
        "forge_config.py": _HEAD.format(origin="forgekit/models/config.py") + _VALUES,
    }
    waiting = [module, "forgekit.models.base"]
    bridge = _bridge(module, kind)
    waiting += _imported(bridge)
    while waiting:
        name = waiting.pop()
        file = f"{_file(name)}.py"
        if name in _STAND_INS or file in files:
            continue
        source = _source(name)
        waiting += _imported(source)
        files[file] = _HEAD.format(origin=f"{name.replace('.', '/')}.py") + _renamed(source)
    files[f"{MODEL_FILE}.py"] = _HEAD.format(origin="forgekit/models/hf.py") + _renamed(bridge)
    return dict(sorted(files.items()))


def _target(family: str) -> str:
    MODEL_CONFIGS.resolve(family)
    kind = FAMILIES.get(family)
    return f"{kind.__module__}:{kind.__name__}"


def _source(module: str) -> str:
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.origin or not spec.origin.endswith(".py"):
        raise ConfigError(f"{module} has no source", where="export", remedy="install agent-forge with its sources")
    return Path(spec.origin).read_text(encoding="utf-8")


def _file(module: str) -> str:
    """Where a module of ours lies in the bundle."""
    if module in _STAND_INS:
        return _STAND_INS[module]
    if not re.fullmatch(r"forgekit\.(models\.)?\w+", module):
        remedy = "models may import forgekit.models and forgekit.errors only"
        raise ConfigError(
            f"a model family imports {module}, which cannot travel with it", where="export", remedy=remedy
        )
    return f"forge_{module.rpartition('.')[2]}"


def _imported(source: str) -> list[str]:
    """Modules of ours that a source imports."""
    return [found[2] for found in _IMPORT.finditer(source)]


def _renamed(source: str) -> str:
    return _IMPORT.sub(lambda found: f"{found[1]}.{_file(found[2])}{found[3]}", source)


def _bridge(module: str, kind: str) -> str:
    """The source of the transformers model: the bridge's classes, and the imports they use."""
    source = _source("forgekit.models.hf")
    tree = ast.parse(source)
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef) and node.name in _BRIDGE]
    used = {node.id for kept in classes for node in ast.walk(kept) if isinstance(node, ast.Name)}
    imports = [line for node in tree.body for line in _kept_imports(node, used - {"build_model"})]
    cut = [ast.get_source_segment(source, node) for node in classes]
    return f'''"""The model as transformers sees it."""

from __future__ import annotations

{chr(10).join(imports)}
from .{CONFIG_FILE} import ForgeConfig
from {module} import {kind}


def build_model(config):
    """The family's own model."""
    return {kind}(config)


{f"{chr(10)}{chr(10)}{chr(10)}".join(cut)}


class ForgeForCausalLM(ForgeForCausalLM):
    __doc__ = ForgeForCausalLM.__doc__
    config_class = ForgeConfig
'''


def _kept_imports(node: ast.stmt, used: set[str]) -> Iterator[str]:
    """The import statement with only the names in ``used``; those in annotations count as used."""
    if not isinstance(node, ast.Import | ast.ImportFrom):
        return
    names = [a for a in node.names if (a.asname or a.name.partition(".")[0]) in used]
    if isinstance(node, ast.ImportFrom) and names:
        yield f"from {node.module} import {', '.join(ast.unparse(a) for a in names)}"
    for alias in names if isinstance(node, ast.Import) else ():
        yield f"import {ast.unparse(alias)}"
