"""A model's tensors and numbers as one of llama.cpp's architectures, where the mapping is exact.

llama.cpp has no graph of its own for the family ``gpt``, but two of its architectures compute the same function once
the weights are rearranged (read off ``src/models/arcee.cpp``, ``apertus.cpp`` and ``ggml_xielu``):

``arcee``: Llama with an ungated squared ReLU and neighbouring rotary pairs. It is ``gpt`` with ``qk_norm`` off; rows of
the query and key maps change places because ours pairs halves.

``apertus``: the same with RMS-normalised queries and keys, halves paired as ours, and xIELU between the feed-forward
maps. xIELU(x) is a x^2 for x > 0 and 0 elsewhere when its negative side and its slope are switched off; a = 64 comes
out exactly, and the up map is divided by 8. RMS normalisation times a weight of gain / sqrt(K) is our unit length times
gain, but one weight serves all heads of a layer and our gain is per head. Where gains differ, heads get twice their
width: a query carries a q and, where the norm sees it but keys hold zeros, b q, with a^2 + b^2 = 1. So head h is scaled
by a = gain_h / largest gain. The attention maps and the cache then take twice their bytes; nothing is lost.

A factorised embedding is multiplied out into two tables. ``llama`` takes Hugging Face's Llama type as it is.
Whatever has no exact place is refused by the name of its setting.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from agent_forge.merging.folders_weights import WeightFolder
from forgekit.errors import ArtifactError, ConfigError
from forgekit.models.config import FAMILIES, GPTConfig
from forgekit.store.packed import says_packed, way_to_dense

if TYPE_CHECKING:
    from torch import Tensor

SQUARE_SCALE = 64.0
"""xIELU's factor on the square: its softplus returns what exceeds 20 unchanged, and the root is a power of two."""
NO_NEGATIVE_SIDE = -200.0
"""softplus of this is 0 in single precision, so xIELU is 0 below 0."""
QUERY_LENGTH = 64.0
"""Typical entry of queries and keys before their normalisation. Its epsilon of 1e-6, which ours lacks, then changes
them by 1e-10 of their length; their own length means nothing."""
EPSILON = 1e-6
"""Of :class:`forgekit.models.layers.RMSNorm`."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the file.

    Attributes:
        name, shape: as llama.cpp expects them; outputs first, as in torch.
        make: computes it in float32.
        kind: vector, map (a linear layer inside the blocks) or table (embedding and head).
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]
    kind: Literal["vector", "map", "table"] = "map"

    @property
    def count(self) -> int:
        """Number of values."""
        return self.shape[0] * (self.shape[1] if len(self.shape) > 1 else 1)


@dataclass(frozen=True)
class Layout:
    """A model as one of llama.cpp's architectures.

    Attributes:
        arch: its name there.
        fields: its numbers; ``{arch}.`` stands before each in the file.
        entries: all tensors.
        extra: fields without the architecture's name before them.
        notes: what a person should know about the mapping.
    """

    arch: str
    fields: dict[str, Any]
    entries: list[Entry]
    extra: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def check_settings(config: dict[str, Any], source: Path) -> None:
    """Refuse what no architecture of llama.cpp computes exactly, by ``config.json`` alone.

    Raises:
        ConfigError: names the setting.
    """
    kind = config.get("model_type")
    if kind == "gpt":
        _check_gpt(_gpt_config(config, source), source)
    elif kind == "llama":
        _check_llama(config, source)
    else:
        what = f"model type {kind!r} has no exact place in llama.cpp here"
        remedy = "export a gpt or Llama-type model, or use --format hf"
        remedy += "" if kind in FAMILIES else " (llama.cpp converts further types from there)"
        raise _refused(source, what, remedy)
    if says_packed(config):
        what = "the weights are packed, and llama.cpp rounds activations otherwise"
        raise _refused(
            source, what, f"{way_to_dense(source)}; export that, with --dtype q8_0, or tq2_0 where every map is ternary"
        )


def _refused(source: Path, what: str, remedy: str) -> ConfigError:
    return ConfigError(what, where=str(source / "config.json"), remedy=remedy)


def _gpt_config(config: dict[str, Any], source: Path) -> GPTConfig:
    return GPTConfig.build(config.get("forge", {}), source=str(source / "config.json"))


def _check_gpt(config: GPTConfig, source: Path) -> None:
    if 0 < config.window < config.max_seq_len:
        what = f"window {config.window} is below max_seq_len {config.max_seq_len}"
        remedy = "use --format hf: the architectures with a squared ReLU see everything before a token"
        raise _refused(source, what, remedy)


def _check_llama(config: dict[str, Any], source: Path) -> None:
    """Settings of transformers' LlamaConfig that must have one value."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = {
        "hidden_act": (config.get("hidden_act", "silu"), "silu"),
        "attention_bias": (config.get("attention_bias", False), False),
        "mlp_bias": (config.get("mlp_bias", False), False),
        "rope_type": (rope.get("rope_type", rope.get("type", "default")), "default"),
        "partial_rotary_factor": (rope.get("partial_rotary_factor", config.get("partial_rotary_factor", 1)), 1),
        "quantization_config": (config.get("quantization_config"), None),
    }
    for name, (value, needed) in found.items():
        if value != needed:
            what = f"{name} {json.dumps(value, default=str)[:60]} has no exact place here (only {json.dumps(needed)})"
            raise _refused(source, what, "use --format hf and llama.cpp's own convert_hf_to_gguf.py")


def layout_of(folder: WeightFolder) -> Layout:
    """The architecture, numbers and tensors of a model whose settings passed :func:`check_settings`.

    Raises:
        ArtifactError: a tensor is missing, surplus or of another shape than the configuration says.
    """
    if folder.ours:
        return gpt_layout(folder, _gpt_config(folder.config, folder.path))
    return llama_layout(folder)


# The family gpt -------------------------------------------------------------------------------------------------------


def gpt_layout(folder: WeightFolder, config: GPTConfig) -> Layout:
    """The plain family as ``arcee`` (no ``qk_norm``) or ``apertus``."""
    gains = [folder.read(f"blocks.{i}.attn.gain_H").float() for i in range(config.n_layers)] if config.qk_norm else []
    wide = any(bool((gain.abs() != gain[0].abs()).any()) for gain in gains)  # a sign goes into the query map
    width = config.d_model // config.n_heads * (2 if wide else 1)
    fields = _numbers(config.d_model, config.n_layers, config.n_heads, width) | {
        "context_length": config.max_seq_len,
        "feed_forward_length": config.ffn_hidden,
        "vocab_size": config.vocab_size,
        "attention.head_count_kv": config.n_heads,
        "attention.layer_norm_rms_epsilon": EPSILON,
        "rope.freq_base": float(config.rope_base),
    }
    entries = [*_tables(folder, config), _vector(folder, "output_norm.weight", "norm.weight")]
    for i in range(config.n_layers):
        entries += _gpt_block(folder, config, i, (gains[i] if gains else None, width))
    if not config.qk_norm:
        return Layout("arcee", fields, entries)
    extra = {"xielu.alpha_p": SQUARE_SCALE, "xielu.alpha_n": NO_NEGATIVE_SIDE, "xielu.beta": 0.0, "xielu.eps": -1e-6}
    note = "heads have twice their width, because their temperatures differ and llama.cpp has one for a layer's heads"
    return Layout("apertus", fields, entries, extra, (note,) if wide else ())


def _numbers(width: int, layers: int, heads: int, head_width: int) -> dict[str, Any]:
    return {
        "embedding_length": width,
        "block_count": layers,
        "attention.head_count": heads,
        "attention.key_length": head_width,
        "attention.value_length": head_width,
        "rope.dimension_count": head_width,
        "rope.scaling.type": "none",
    }


def _tables(folder: WeightFolder, config: GPTConfig) -> Iterator[Entry]:
    """Embedding and head, multiplied out where they are factorised; ``arcee`` shares one table, ``apertus`` needs two.

    Our embedding is ``lift(table[id])`` and the head ``lower(h) @ table^T``.
    """
    shape = (config.vocab_size, config.d_model)

    def product(name: str, transposed: bool) -> Tensor:
        table, factor = folder.read("embedding.table.weight").double(), folder.read(name).double()
        return (table @ (factor.mT if transposed else factor)).float()

    if config.emb_rank:
        yield Entry("token_embd.weight", shape, lambda: product("embedding.lift.weight", True), "table")
        yield Entry("output.weight", shape, lambda: product("embedding.lower.weight", False), "table")
        return
    for name in ("token_embd.weight", "output.weight")[: 2 if config.qk_norm else 1]:
        yield Entry(name, shape, lambda: folder.read("embedding.table.weight").float(), "table")


def _vector(folder: WeightFolder, name: str, source: str) -> Entry:
    return Entry(name, folder.tensors[source].shape, lambda: folder.read(source).float(), "vector")


def _gpt_block(folder: WeightFolder, config: GPTConfig, i: int, heads: tuple[Tensor | None, int]) -> Iterator[Entry]:
    """Tensors of one block.

    Args:
        heads: temperatures of its heads (None without ``qk_norm``), and their width in the file.
    """
    ours, theirs = f"blocks.{i}", f"blk.{i}"
    gain_H, width = heads
    D, F, H = config.d_model, config.ffn_hidden, config.n_heads

    def read(part: str) -> Tensor:
        return folder.read(f"{ours}.{part}.weight").float()

    def query_key(part: str) -> Tensor:
        if gain_H is None:
            return neighbours(read(part), H)
        own_H, copy_H = shares(gain_H) if part == "attn.wq" else (gain_H.new_ones(H), gain_H.new_zeros(H))
        weight = steady(read(part), read("norm1"))
        return interleaved(weight, own_H, copy_H) if width > D // H else weight * _per_row(signs(own_H), D // H)

    yield _vector(folder, f"{theirs}.attn_norm.weight", f"{ours}.norm1.weight")
    yield Entry(f"{theirs}.attn_q.weight", (H * width, D), lambda: query_key("attn.wq"))
    yield Entry(f"{theirs}.attn_k.weight", (H * width, D), lambda: query_key("attn.wk"))
    yield Entry(f"{theirs}.attn_v.weight", (H * width, D), lambda: padded_rows(read("attn.wv"), H, width))
    yield Entry(f"{theirs}.attn_output.weight", (D, H * width), lambda: padded_rows(read("attn.wo").mT, H, width).mT)
    if gain_H is not None:
        yield Entry(f"{theirs}.attn_q_norm.weight", (width,), lambda: query_norm(gain_H, width), "vector")
        yield Entry(f"{theirs}.attn_k_norm.weight", (width,), lambda: gain_H.new_ones(width), "vector")
    yield _vector(folder, f"{theirs}.ffn_norm.weight", f"{ours}.norm2.weight")
    up = 1.0 if gain_H is None else SQUARE_SCALE**-0.5
    yield Entry(f"{theirs}.ffn_up.weight", (F, D), lambda: read("ffn.up") * up)
    yield Entry(f"{theirs}.ffn_down.weight", (D, F), lambda: read("ffn.down"))


def neighbours(weight_RC: Tensor, heads: int) -> Tensor:
    """Rows reordered so that a rotary pair (k, k + K/2) of each head becomes (2k, 2k + 1), llama.cpp's NORM pairs."""
    R, C = weight_RC.shape
    return weight_RC.reshape(heads, 2, R // heads // 2, C).transpose(1, 2).reshape(R, C)


def shares(gain_H: Tensor) -> tuple[Tensor, Tensor]:
    """What of a query is kept and what only its norm sees, per head: a = gain / largest gain, and b with a^2 + b^2 = 1.

    A head whose gain is 0 keeps nothing, so that all its logits are 0.
    """
    largest = gain_H.abs().max().clamp_min(1e-30)
    own_H = (gain_H.double() / largest).clamp(-1, 1)
    return own_H.float(), (1 - own_H.square()).sqrt().float()


def signs(share_H: Tensor) -> Tensor:
    """1 or -1 per head."""
    return share_H.sign() + (share_H == 0)


def steady(weight_RC: Tensor, gain_C: Tensor) -> Tensor:
    """Times a power of two that brings typical outputs of normalised inputs to :data:`QUERY_LENGTH`."""
    import torch

    typical = (weight_RC * gain_C).double().square().sum(1).mean().sqrt()
    return weight_RC * float(2.0 ** torch.round(torch.log2(QUERY_LENGTH / typical))) if typical > 0 else weight_RC


def interleaved(weight_RC: Tensor, own_H: Tensor, copy_H: Tensor) -> Tensor:
    """Heads of twice the width: row k of a head goes to 2k scaled by ``own``, a copy scaled by ``copy`` to 2k + 1.

    Halves are paired, so the pair (k, k + K/2) lands on (2k, 2k + K), whose frequency base^(-2k/K) is its old one.
    """
    import torch

    R, C = weight_RC.shape
    width = R // own_H.numel()
    pair = [weight_RC * _per_row(share_H, width) for share_H in (own_H, copy_H)]
    return torch.stack(pair, dim=1).reshape(2 * R, C)


def _per_row(share_H: Tensor, width: int) -> Tensor:
    return share_H.repeat_interleave(width)[:, None]


def padded_rows(weight_RC: Tensor, heads: int, width: int) -> Tensor:
    """Rows of zeros after each head's own, up to ``width`` rows a head."""
    R, C = weight_RC.shape
    result = weight_RC.new_zeros(heads, width, C)
    result[:, : R // heads] = weight_RC.reshape(heads, R // heads, C)
    return result.reshape(heads * width, C)


def query_norm(gain_H: Tensor, width: int) -> Tensor:
    """Weights (width,) of the query norm; those of the key norm are 1.

    Unit length times sqrt(width) on both sides and 1/sqrt(width) at the product must give the largest gain.
    """
    return (gain_H.abs().max() / width**0.5).expand(width).clone()


# Hugging Face's Llama type --------------------------------------------------------------------------------------------

_LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def llama_layout(folder: WeightFolder) -> Layout:
    """A Hugging Face checkpoint of the type ``llama``."""
    from transformers import LlamaConfig

    config = LlamaConfig.from_dict(folder.config).to_dict()  # fills in what the file leaves out
    D, F, V, L, H = (
        config[name]
        for name in ("hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads")
    )
    kv, width = config["num_key_value_heads"], config["head_dim"]
    fields = _numbers(D, L, H, width) | {
        "context_length": config["max_position_embeddings"],
        "feed_forward_length": F,
        "vocab_size": V,
        "attention.head_count_kv": kv,
        "attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        "rope.freq_base": float(config["rope_parameters"]["rope_theta"]),
    }
    tables = {"token_embd.weight": "model.embed_tokens.weight"}
    if not config["tie_word_embeddings"]:
        tables["output.weight"] = "lm_head.weight"
    plain = {"output_norm.weight": "model.norm.weight"}
    for i in range(L):
        plain |= {f"blk.{i}.{a}.weight": f"model.layers.{i}.{b}.weight" for a, b in _LLAMA_BLOCK.items()}
    sizes = {"attn_norm": (D,), "attn_q": (H * width, D), "attn_k": (kv * width, D), "attn_v": (kv * width, D)}
    sizes |= {"attn_output": (D, H * width), "ffn_norm": (D,), "ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F)}
    shapes = dict.fromkeys(tables, (V, D)) | {"output_norm.weight": (D,)}
    shapes |= {name: sizes[name.split(".")[2]] for name in plain if name.startswith("blk.")}
    sources = tables | plain
    _check_tensors(folder, {sources[name]: shape for name, shape in shapes.items()})
    heads = {"attn_q": H, "attn_k": kv}
    entries = [
        Entry(name, shapes[name], _reader(folder, source, heads.get(name.split(".")[-2])), _kind(name, shapes[name]))
        for name, source in sources.items()
    ]
    return Layout("llama", fields, entries)


def _kind(name: str, shape: tuple[int, ...]) -> Literal["vector", "map", "table"]:
    return "vector" if len(shape) == 1 else "map" if name.startswith("blk.") else "table"


def _reader(folder: WeightFolder, source: str, heads: int | None) -> Callable[[], Tensor]:
    if heads is None:
        return lambda: folder.read(source).float()
    return lambda: neighbours(folder.read(source).float(), heads)


def _check_tensors(folder: WeightFolder, expected: dict[str, tuple[int, ...]]) -> None:
    """The tensors are those expected, of these shapes; constants and a head that is tied anyway may be there too."""
    found = {name: place.shape for name, place in folder.tensors.items() if not name.endswith("rotary_emb.inv_freq")}
    if "lm_head.weight" not in expected:
        found.pop("lm_head.weight", None)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            what = f"tensor {name} is {found.get(name, 'missing')}, config.json says {expected.get(name, 'none')}"
            raise ArtifactError(what, where=str(folder.path), remedy="use the weights written with this config.json")
