"""Hugging Face in and out. Importing this module loads neither torch nor transformers.

Out: :func:`install_hook` lets ``AutoConfig``, ``AutoTokenizer`` and ``AutoModelForCausalLM`` open our artifact
folders; our model types enter transformers' tables when (and only when) transformers itself is imported.
In: :func:`read_hf_model` opens a Hugging Face folder as a model and tokenizer of the house.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from forgekit.errors import ArtifactError

if TYPE_CHECKING:
    from forgekit.models.hf import HFCausalLM


@cache
def forge_config_class(family: str) -> type:
    """The transformers configuration class of one of our families; ``forge`` holds the house's own configuration."""
    from transformers.configuration_utils import PreTrainedConfig

    name = f"Forge{family.title().replace('_', '')}Config"
    return type(name, (PreTrainedConfig,), {"model_type": family, "__module__": __name__})


def register_configs() -> None:
    """Make our model types known to ``AutoConfig`` (which must be importable by now)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, AutoConfig

    from forgekit.models.config import MODEL_CONFIGS

    for family in MODEL_CONFIGS:
        kind = forge_config_class(family)
        ours = family in CONFIG_MAPPING and CONFIG_MAPPING[family].__module__ == __name__
        AutoConfig.register(family, kind, exist_ok=ours)


def register_models() -> None:
    """Make our models known to ``AutoModelForCausalLM``."""
    from transformers.models.auto.modeling_auto import AutoModelForCausalLM

    from forgekit.models.config import MODEL_CONFIGS
    from forgekit.models.hf import forge_model_class

    register_configs()
    for family in MODEL_CONFIGS:
        AutoModelForCausalLM.register(forge_config_class(family), forge_model_class(family), exist_ok=True)


# Two moments: AutoConfig is imported while transformers is still loading its model classes, when ours cannot be made.
_TARGETS: dict[str, Callable[[], None]] = {
    "transformers.models.auto.configuration_auto": register_configs,
    "transformers.models.auto.modeling_auto": register_models,
}


class _AfterImport(Loader):
    """Loads a module as its own loader would, then acts."""

    def __init__(self, inner: Loader, action: Callable[[], None]) -> None:
        self.inner, self.action = inner, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__loader__ = module.__spec__.loader = self.inner
        self.inner.exec_module(module)
        self.action()


class _Hook(MetaPathFinder):
    """Waits for transformers' auto modules; leaves when it has met them all."""

    def __init__(self, waiting: dict[str, Callable[[], None]]) -> None:
        self.waiting = waiting

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in self.waiting:
            return None
        others = (finder.find_spec(fullname, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((found for found in others if found is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _AfterImport(spec.loader, lambda: self._met(fullname))
        return spec

    def _met(self, fullname: str) -> None:
        self.waiting.pop(fullname)()
        if not self.waiting:
            sys.meta_path.remove(self)


def install_hook() -> None:
    """Register our models with transformers: now where it is imported already, else when it will be. Idempotent."""
    # By name, so that a hook of an earlier import of this module is replaced too: two would ask each other forever.
    sys.meta_path[:] = [f for f in sys.meta_path if (type(f).__module__, type(f).__name__) != (__name__, "_Hook")]
    waiting = {}
    for name, action in _TARGETS.items():
        if name in sys.modules:
            action()
        else:
            waiting[name] = action
    if waiting:
        sys.meta_path.insert(0, _Hook(waiting))


class HFTokenizer:
    """A Hugging Face fast tokenizer with the interface the house uses (that of ``tokenizers.Tokenizer``).

    Attributes:
        fast: the transformers tokenizer, for its template and for saving.
        end_ids: tokens that end a text.
    """

    def __init__(self, fast: Any) -> None:
        self.fast, self.backend = fast, fast.backend_tokenizer
        # A saved tokenizer may carry the padding and truncation of its last training batch.
        self.backend.no_padding()
        self.backend.no_truncation()
        self.end_ids = frozenset({fast.eos_token_id} - {None})

    def __getattr__(self, name: str) -> Any:
        if name in ("backend", "fast"):  # not there yet while being copied
            raise AttributeError(name)
        return getattr(self.backend, name)

    def chat_text(self, messages: list[dict[str, str]]) -> str | None:
        """The conversation in the model's own chat format with the answer opened; ``None`` if it has no template."""
        if not self.fast.chat_template:
            return None
        return self.fast.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write everything ``AutoTokenizer.from_pretrained`` needs."""
        self.fast.save_pretrained(str(folder))


def read_hf_model(folder: Path) -> tuple[HFCausalLM, HFTokenizer]:
    """Load a causal language model in Hugging Face's layout, on the CPU, in eval mode and in the stored precision.

    Only safetensors weights are read, and no code from the folder is run.

    Raises:
        ArtifactError: not a causal model transformers knows, files missing or corrupt, or weights that do not fit.
    """
    from forgekit.models.hf import HFCausalLM, load_causal_lm

    folder = Path(folder)
    model = load_causal_lm(folder)
    return HFCausalLM(model).eval(), read_hf_tokenizer(folder)


_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def read_hf_tokenizer(folder: Path) -> HFTokenizer:
    """Load a fast tokenizer.

    Raises:
        ArtifactError: missing or corrupt, or there is only a slow one.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    remedy = "add tokenizer.json and tokenizer_config.json"
    # Without any of these, transformers would make an empty tokenizer up.
    if not any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
        raise ArtifactError("no tokenizer here", where=str(folder), remedy=remedy)
    try:
        fast = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError, StrictDataclassError) as error:
        raise ArtifactError(f"no readable tokenizer ({first_line(error)})", where=str(folder), remedy=remedy) from None
    if not getattr(fast, "is_fast", False):
        raise ArtifactError("has no fast tokenizer", where=str(folder), remedy=remedy)
    return HFTokenizer(fast)


def first_line(error: BaseException) -> str:
    """The first line of a library's message, with the next where it only announces that, short enough for ours."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()] or [type(error).__name__]
    return (f"{lines[0]} {lines[1]}" if lines[0].endswith(":") and len(lines) > 1 else lines[0])[:200]
