"""Models to folders and back. Weights are safetensors, configurations JSON; nothing is ever pickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.overrides import TorchFunctionMode

from forgekit.errors import ArtifactError
from forgekit.models.base import parameter_count
from forgekit.models.config import FAMILIES, MODEL_CONFIGS, GPTConfig
from forgekit.store.packed import says_packed


def build_model(config: GPTConfig) -> torch.nn.Module:
    """A freshly initialised model of the configuration's family (seed torch before, for reproducibility)."""
    return FAMILIES.get(config.family)(config)


class _Unset(TorchFunctionMode):
    """Leaves initialisation out. Tensors without memory have nothing to initialise, and their random functions import
    torch's compiler first: a second, and 70 MB."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.Tensor.normal_, torch.Tensor.uniform_) or getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def hollow_model(config: GPTConfig) -> torch.nn.Module:
    """A model of the configuration whose tensors have shapes and no memory (torch's device ``meta``)."""
    with torch.device("meta"), _Unset():
        return build_model(config)


def hub_config(config: GPTConfig) -> dict[str, Any]:
    """The ``config.json`` that both we and ``AutoConfig`` read: our values under ``forge``, plus standard names."""
    return {
        "model_type": config.family,
        "architectures": ["ForgeForCausalLM"],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "max_position_embeddings": config.max_seq_len,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
        "forge": config.model_dump(mode="json"),
    }


def write_model(model: torch.nn.Module, tokenizer: Any, folder: Path) -> None:
    """Write ``config.json``, ``model.safetensors`` and, when given, the tokenizer into an existing folder.

    Our families are written as they are; a wrapped Hugging Face model writes itself in its own layout, and a packed
    model of either kind as a packed artifact.

    Raises:
        ArtifactError: the model is in training for low bits.
    """
    from forgekit.quant.model import is_fake, is_packed

    folder = Path(folder)
    if is_packed(model):
        from forgekit.quant.files import write_packed

        write_packed(model, tokenizer, folder)
        return
    if is_fake(model):
        remedy = "write packed(model, ...) or dequantised(model, ...) of forgekit.quant.model, or restored(model)"
        raise ArtifactError("its weights are not those it computes with", where="fake-quantised model", remedy=remedy)
    if hasattr(model, "write_to"):
        model.write_to(folder)
    else:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
        text = json.dumps(hub_config(model.config), indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
    write_tokenizer(tokenizer, folder)


def write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the tokenizer's files, of the house or of Hugging Face, into an existing folder; nothing for ``None``."""
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
    elif tokenizer is not None:
        from forgekit.data.tokenizer import save_tokenizer

        save_tokenizer(tokenizer, folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The parsed ``config.json`` of a model folder.

    Raises:
        ArtifactError: missing, or no JSON object.
    """
    path = Path(folder) / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(
            "no model here", where=str(path), remedy="give an artifact or Hugging Face folder"
        ) from None
    except (ValueError, OSError) as error:
        raise ArtifactError(f"unreadable ({error})", where=str(path), remedy="restore the artifact") from None
    if not isinstance(values, dict):
        raise ArtifactError("is no JSON object", where=str(path), remedy="restore the artifact")
    return values


def read_model(folder: Path) -> tuple[torch.nn.Module, Any]:
    """Load a model and its tokenizer from an artifact or a Hugging Face folder, on the CPU, in eval mode.

    A packed model stays packed: it runs, but has no weights to train (:func:`forgekit.models.unpacked.unpacked`).

    Raises:
        ArtifactError: a file is missing, truncated, or its tensors do not fit the configuration.
    """
    folder = Path(folder)
    values = read_config(folder)
    if says_packed(values):
        from forgekit.quant.files import read_packed

        return read_packed(folder)
    if values.get("model_type") not in FAMILIES:
        from forgekit.hub import read_hf_model

        return read_hf_model(folder)
    from forgekit.data.tokenizer import load_tokenizer

    kind = MODEL_CONFIGS.get(values["model_type"])
    model = build_model(kind.build(values.get("forge", {}), source=str(folder / "config.json")))
    load_weights(model, folder / "model.safetensors")
    return model.eval(), load_tokenizer(folder)


def _sharded(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of all files that the index beside ``path`` names."""
    placed = json.loads(path.with_name(f"{path.name}.index.json").read_text(encoding="utf-8"))["weight_map"]
    files = dict.fromkeys(placed.values())
    return {name: tensor for file in files for name, tensor in load_file(str(path.parent / file)).items()}


def load_weights(model: torch.nn.Module, path: Path) -> None:
    """Fill a model from a safetensors file; every tensor must be there and fit.

    Raises:
        ArtifactError: missing or truncated file, missing, surplus or misshapen tensor.
    """
    try:
        tensors = load_file(str(path)) if path.exists() else _sharded(path)
    except FileNotFoundError:
        raise ArtifactError("no weights here", where=str(path), remedy="use a complete artifact folder") from None
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"corrupt weights ({error})", where=str(path), remedy="restore the artifact") from None
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        if _holds_packed(path):
            what = "its weights are packed, and config.json does not say so"
            raise ArtifactError(what, where=str(path), remedy="restore config.json") from None
        reason = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
        what = f"weights do not fit: {reason[:200]}"
        raise ArtifactError(what, where=str(path), remedy="check config.json") from None


def _holds_packed(path: Path) -> bool:
    """Whether a readable file of weights is that of a packed model (:mod:`forgekit.quant.files`)."""
    from forgekit.quant.files import METADATA

    if not path.exists():
        return False
    with safe_open(str(path), "pt") as file:
        return METADATA in (file.metadata() or {})


__all__ = [
    "build_model",
    "hollow_model",
    "hub_config",
    "load_weights",
    "parameter_count",
    "read_config",
    "read_model",
    "write_model",
    "write_tokenizer",
]
