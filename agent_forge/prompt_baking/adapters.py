"""LoRA adapters in any model, through ``peft``: put in, scaled, merged, and nothing of them left behind."""

from __future__ import annotations

import warnings
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from agent_forge.prompt_baking.config import PromptBakingConfig
from forgekit.errors import ConfigError, ResourceError

_NAME = "default"


class Adapters:
    """The adapters of one baking. While they are in, the model's own weights are frozen.

    Args:
        model: gets the adapters in place; :meth:`merge` or :meth:`remove` takes them out again.
        config: rank, alpha, targets and seed.

    Attributes:
        parameters: the adapters' tensors by name.

    Raises:
        ConfigError: a target fits no linear map of the model.
        ResourceError: peft is not installed.
    """

    def __init__(self, model: nn.Module, config: PromptBakingConfig) -> None:
        require_peft()
        from peft import LoraConfig, inject_adapter_in_model

        names = linear_maps(model, config.targets)
        self.model = model
        self._wanted_gradients = {p: p.requires_grad for p in model.parameters()}
        lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, lora_dropout=0.0, target_modules=names)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft tells that GPT-2's layers are stored transposed; it handles them
            torch.manual_seed(config.seed)
            inject_adapter_in_model(lora, model, adapter_name=_NAME)
        self.layers = _layers(model)
        self.parameters: dict[str, Tensor] = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def scale(self, factor: float) -> None:
        """Let the adapters count ``factor`` times; 0 gives the model before baking, exactly."""
        for _, layer in self.layers:
            layer.set_scale(_NAME, factor)

    def copy(self) -> list[Tensor]:
        """A copy of the adapters' tensors."""
        return [p.detach().clone() for p in self.parameters.values()]

    @torch.no_grad()
    def load(self, tensors: list[Tensor]) -> None:
        """Put back what :meth:`copy` gave."""
        for p, value in zip(self.parameters.values(), tensors, strict=True):
            p.copy_(value)

    def merge(self) -> None:
        """Add the adapters, as scaled now, to the weights and take them out: same tensors, same names as before."""
        for _, layer in self.layers:
            layer.merge()
        self.remove()

    def remove(self) -> None:
        """Take the adapters out; what is not merged is lost."""
        for name, layer in self.layers:
            parent, _, child = name.rpartition(".")
            setattr(self.model.get_submodule(parent), child, layer.get_base_layer())
        del self.model.peft_config  # peft leaves it on the model it was given
        for p, wanted in self._wanted_gradients.items():
            p.requires_grad_(wanted)


def require_peft() -> None:
    """Make sure that adapters can be made, before anything is computed.

    Raises:
        ResourceError: peft is not installed.
    """
    if find_spec("peft") is None:
        raise ResourceError("needs the package peft", where="baking", remedy="pip install peft")


def _layers(model: nn.Module) -> list[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def linear_maps(model: nn.Module, ends: tuple[str, ...] = ()) -> list[str]:
    """Names of the linear maps that can carry an adapter: those that are called, and neither embedding nor head.

    Args:
        ends: keep only names that end so.

    Raises:
        ConfigError: an end fits none; or the model has none at all.
    """
    heads = [embedding for embedding in (_part(model, "embedding"), *_hf_heads(model)) if embedding is not None]
    outside = {id(module) for head in heads for module in head.modules()}
    names = [
        name
        for name, module in model.named_modules()
        # The halting head is read by its tensors, not called: an adapter around it would never be heard.
        if _is_linear(module) and id(module) not in outside and not name.endswith("recursion.halt")
    ]
    if not names:
        raise ConfigError("the model has no linear maps to adapt", where="baking", remedy="use another model")
    for end in ends:
        if not any(_ends(name, end) for name in names):
            known = ", ".join(dict.fromkeys(name.rpartition(".")[2] for name in names))
            raise ConfigError(f"{end!r} fits no linear map", where="targets", remedy=f"ends of names: {known}")
    return [name for name in names if not ends or any(_ends(name, end) for end in ends)]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith(f".{end}")


def _is_linear(module: nn.Module) -> bool:
    # GPT-2's Conv1D is a linear map stored transposed.
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _part(model: nn.Module, name: str) -> nn.Module | None:
    return getattr(model, name, None)


def _hf_heads(model: nn.Module) -> list[nn.Module | None]:
    hf = getattr(model, "hf", None)
    return [] if hf is None else [hf.get_input_embeddings(), hf.get_output_embeddings()]
