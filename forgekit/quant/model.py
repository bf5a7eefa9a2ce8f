"""Whole models on the low-bit grids: which parts, the training form, the packed form, the plain form again.

Works for the families of the house and for Hugging Face models in :class:`~forgekit.models.hf.HFCausalLM`.
:data:`KEPT` says what does not get the grid of the linear maps and why; everything else that is a linear map does. That
grid is ternary, or group-wise with 4 to 8 bits (a :data:`~forgekit.quant.config.MapPlan`).

Shapes: R rows (outputs), C columns (inputs), B batch, T tokens.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from forgekit.errors import ArtifactError, ConfigError, DataError
from forgekit.quant.config import GroupPlan, MapPlan, TernaryPlan
from forgekit.quant.grid import Ternary, check_strength
from forgekit.quant.groupwise import Grouped, round_groups
from forgekit.quant.layers import (
    FakeGroupedEmbedding,
    FakeGroupedLinear,
    GroupedEmbedding,
    GroupedLinear,
    PackedLinear,
    TernaryLinear,
    TiedHead,
    is_conv1d,
    ternary_of,
)

Kind = Literal["ternary", "grouped", "half", "float32"]


@dataclass(frozen=True)
class Kept:
    """A part of a dotted name whose tensors do not get the grid of the linear maps.

    Attributes:
        part: a whole component of the name: ``gates`` means ``blocks.1.gated.memory.gates.weight``, not ``gates_x``.
        kind: ``grouped`` 4 to 8 bits with a scale per group of columns, ``half`` float16, ``float32`` untouched.
        why: the reason.
    """

    part: str
    kind: Kind
    why: str


KEPT: tuple[Kept, ...] = (
    Kept("embedding", "grouped", "every token passes it twice; ternary rows of neighbours would coincide"),
    Kept("lm_head", "grouped", "the output head: its rounding errors reach the scores directly"),
    Kept("embed_out", "grouped", "the output head of GPT-NeoX"),
    Kept("halt", "float32", "one row; its logit is multiplied by 30 and compared with a threshold"),
    Kept("teacher_weight", "float32", "the halting head that decides; see halt"),
    Kept("teacher_bias", "float32", "see halt"),
    Kept("gates", "half", "three rows per memory head; they set forgetting, momentum and step of the memory"),
    Kept("gate_in", "half", "small; with gate_out it decides how loud the memory is"),
    Kept("gate_out", "half", "small, starts at zero"),
    Kept("gate", "half", "router of a mixture of experts: its order of scores must not change"),
    Kept("shared_expert_gate", "half", "one row"),
    Kept("router", "half", "see gate"),
)
"""The first entry that fits counts. Tensors of no linear map and no embedding (norms, biases, convolutions, gains,
learned positions, stacked experts) are ``half``."""
SUB_NORMED = ("attn.wo", "ffn.down", "g.down", "h.down", "o_proj", "down_proj", "c_proj", "out_proj", "fc2")
"""Ends of the names of maps whose input no norm precedes: attention outputs and second maps of feed-forwards. They get
a sub-layer norm where the plan asks for one. (What a memory recalls is normed before its output map.)"""
SMALLEST_HALF = 2.0**-14
"""Below it float16 loses digits: a tensor whose largest magnitude is smaller stays float32."""


def kind_of(name: str) -> Kind | None:
    """What :data:`KEPT` says of a dotted name; ``None`` if nothing."""
    parts = name.split(".")
    return next((kept.kind for kept in KEPT if kept.part in parts), None)


def _is_map(module: nn.Module) -> bool:
    """Linear maps we can replace. Subclasses of ``nn.Linear`` may do more than it does, so they are left alone."""
    return type(module) is nn.Linear or isinstance(module, TernaryLinear | FakeGroupedLinear) or is_conv1d(module)


def targets(model: nn.Module) -> list[str]:
    """Names of the linear maps that get the grid (also of those that already train for one), in the model's order.

    Raises:
        ArtifactError: there are none.
    """
    ends = _ends(model)
    found = [name for name, module in _modules(model) if _is_map(module) and not kind_of(name) and name not in ends]
    if not found:
        what, where = "no linear layers that could be made small", type(getattr(model, "hf", model)).__name__
        remedy = "it is packed already" if is_packed(model) else "give a model made of nn.Linear or Conv1D maps"
        raise ArtifactError(what, where=where, remedy=remedy)
    return found


def grouped_targets(model: nn.Module) -> list[str]:
    """Names of the embeddings and maps that are rounded group-wise: token embedding, its factors, output head."""
    kinds, ends = (nn.Embedding, nn.Linear, FakeGroupedEmbedding, FakeGroupedLinear), _ends(model)
    return [
        name
        for name, module in _modules(model)
        if type(module) in kinds and (name in ends or ("embedding" in name.split(".") and not hasattr(model, "hf")))
    ]


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every module under each of its names."""
    return list(model.named_modules(remove_duplicate=False))


def _ends(model: nn.Module) -> set[str]:
    """Names of a Hugging Face model's token embedding and output head; empty for our families."""
    if not hasattr(model, "hf"):
        return set()
    ends = [model.hf.get_input_embeddings(), model.hf.get_output_embeddings()]
    return {name for name, module in _modules(model) if any(module is end for end in ends)}


def swap(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put a module in the place of the one of that name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def is_packed(model: nn.Module) -> bool:
    """Whether some of it is packed (:func:`packed`, or read from a packed artifact)."""
    return any(isinstance(module, PackedLinear | GroupedLinear | GroupedEmbedding) for module in model.modules())


def is_fake(model: nn.Module) -> bool:
    """Whether some of it trains for the grids (:func:`fake_quantised`)."""
    kinds = (TernaryLinear, FakeGroupedEmbedding, FakeGroupedLinear)
    return any(isinstance(module, kinds) for module in model.modules())


def plan_of(name: str, plan: MapPlan) -> MapPlan:
    """The grid of one map: that of the plan, unless the plan spares it."""
    if isinstance(plan, TernaryPlan) and not set(plan.spared).isdisjoint(name.split(".")):
        return plan.spared_groups
    return plan


def plans_of(model: nn.Module, plan: MapPlan) -> dict[str, MapPlan]:
    """The grid of every map in :func:`targets`, by name.

    Raises:
        ArtifactError: there are no maps.
        ConfigError: no name has any of the parts that are to be spared, or all maps are spared.
    """
    found = {name: plan_of(name, plan) for name in targets(model)}
    if isinstance(plan, TernaryPlan) and plan.spared:
        if all(isinstance(one, TernaryPlan) for one in found.values()):
            told, remedy = " or ".join(map(repr, plan.spared)), "leave it empty: ternary.spared=[]"
            raise ConfigError(f"no map has {told} in its name", where="ternary.spared", remedy=remedy)
        if not any(isinstance(one, TernaryPlan) for one in found.values()):
            raise ConfigError("spares every map", where="ternary.spared", remedy="spare fewer, or use int4 or int8")
    return found


def image(weight_RC: Tensor, plan: MapPlan) -> Ternary | Grouped:
    """A weight on the grid of the linear maps, as files hold it.

    Raises:
        ArtifactError: weights that are not finite, or a scale beyond float16.
    """
    return ternary_of(weight_RC, plan) if isinstance(plan, TernaryPlan) else round_groups(weight_RC, plan)


def fake_quantised(
    model: nn.Module,
    plan: MapPlan,
    groups: GroupPlan | None,
    strength: float = 1.0,
    statistics: Mapping[str, InputStatistics] | None = None,
) -> nn.Module:
    """Make a model train for the grids, in place; its parameters stay the same objects under the same names.

    Args:
        model: plain; make the optimizer before or after (after, where the plan asks for sub-layer norms).
        plan: grid of the linear maps.
        groups: rounding of embedding and head; ``None`` leaves them alone.
        strength: see :func:`set_strength`.
        statistics: of :func:`calibrate`; sub-layer norms need them. A gain starts as the mean RMS of its inputs, so
            that the norm starts near the identity.

    Raises:
        ArtifactError: no linear layers, or the model is quantised already.
        ConfigError: the strength is outside [0, 1].
        DataError: sub-layer norms are wanted without statistics.
    """
    check_strength(strength)
    if is_fake(model):
        what, remedy = "trains for a grid already", "use set_strength, or restored(model) first"
        raise ArtifactError(what, where=type(getattr(model, "hf", model)).__name__, remedy=remedy)
    plans = plans_of(model, plan)
    gains = {name: _first_gain(model.get_submodule(name), name, one, statistics) for name, one in plans.items()}
    ends = grouped_targets(model) if groups else ()
    for name, one in plans.items():
        source = model.get_submodule(name)
        if isinstance(one, TernaryPlan):
            new: nn.Module = TernaryLinear(source, one, strength, gains[name])
        else:
            new = FakeGroupedLinear(source, one, strength)
        swap(model, name, new.train(model.training))
    for name in ends:
        source = model.get_submodule(name)
        kind = FakeGroupedEmbedding if isinstance(source, nn.Embedding) else FakeGroupedLinear
        swap(model, name, kind(source, groups, strength).train(model.training))
    return model


def _first_gain(
    source: nn.Module, name: str, plan: MapPlan, statistics: Mapping[str, InputStatistics] | None
) -> Tensor | None:
    """Where the gain of a map's sub-layer norm starts; None if it gets none."""
    if not gets_sub_norm(name, plan):
        return None
    if statistics is None:
        remedy = "give statistics=calibrate(model, batches)"
        raise DataError("sub-layer norms start from calibration", where="statistics", remedy=remedy)
    columns = source.weight.shape[0 if is_conv1d(source) else 1]
    seen = statistics.get(name)  # a map that no token reached, or only zeros: nothing to go by
    return torch.full((columns,), seen.mean_rms if seen is not None and seen.mean_rms else 1.0)


def gets_sub_norm(name: str, plan: MapPlan) -> bool:
    """Whether a map of that name, on that grid, gets a sub-layer norm."""
    return getattr(plan, "sub_norm", False) and f".{name}".endswith(tuple(f".{end}" for end in SUB_NORMED))


def _gains(model: nn.Module) -> dict[str, Tensor]:
    """Gains of sub-layer norms by the name of their map."""
    found = {name: getattr(module, "gain", None) for name, module in _modules(model)}
    kinds = (TernaryLinear, PackedLinear)
    return {n: g.detach() for n, g in found.items() if g is not None and isinstance(model.get_submodule(n), kinds)}


def set_strength(model: nn.Module, strength: float) -> None:
    """How quantised the forward pass is: 0 gives the plain model's bits, 1 the quantised model.

    Raises:
        ConfigError: outside [0, 1].
    """
    check_strength(strength)
    for module in model.modules():
        if isinstance(module, TernaryLinear | FakeGroupedEmbedding | FakeGroupedLinear):
            module.strength = float(strength)


def restored(model: nn.Module) -> nn.Module:
    """Undo :func:`fake_quantised`, in place: plain modules with the latent parameters.

    Raises:
        ArtifactError: the model has sub-layer norms, which plain modules have not.
    """
    if gains := _gains(model):
        remedy = "pack it, or train without sub_norm"
        raise ArtifactError("its sub-layer norm has no place in a plain model", where=next(iter(gains)), remedy=remedy)
    return _restored(model)


def _restored(model: nn.Module) -> nn.Module:
    """:func:`restored`, dropping gains."""
    for name, module in _modules(model):
        if isinstance(module, TernaryLinear | FakeGroupedEmbedding | FakeGroupedLinear):
            swap(model, name, _plain(module).train(model.training))
    return model


def _plain(module: nn.Module) -> nn.Module:
    """The kind of module that a training module replaced, with its parameters."""
    if isinstance(module, FakeGroupedEmbedding):
        plain = nn.Embedding(*module.latent.shape, module.padding_idx, device="meta")
        plain.weight = module.latent
        return plain
    weight = module.weight if isinstance(module, TernaryLinear) else module.latent
    if module.transposed:
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            plain = Conv1D(*reversed(weight.shape))
        plain.weight, plain.bias = weight, module.bias
        return plain
    plain = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    plain.weight, plain.bias = weight, module.bias
    return plain


@torch.no_grad()
def packed(model: nn.Module, plan: MapPlan, groups: GroupPlan | None) -> nn.Module:
    """A copy that runs from packed weights, in eval mode and float32: exactly what a packed artifact holds.

    What is neither ternary nor grouped has the values of float16, as on disk (:func:`rest_dtype`).

    Args:
        model: plain, or one that trains for the grids.
        plan: grid of the linear maps.
        groups: rounding of embedding and head; ``None`` keeps them in float16.

    Raises:
        ArtifactError: no linear layers, or weights that are not finite; names the tensor.
    """
    plans, gains = plans_of(model, plan), _gains(model)  # refuses before the copy is paid for
    if wanted := {name for name, one in plans.items() if gets_sub_norm(name, one)} ^ set(gains):
        one, has = min(wanted), min(wanted) in gains
        what = f"{one} has {'a' if has else 'no'} sub-layer norm, the plan wants {'none' if has else 'one'}"
        raise ArtifactError(what, where="sub_norm", remedy="pack with the plan that it was trained with")
    copied = _restored(copy.deepcopy(model)).float().eval().requires_grad_(False)
    ends = grouped_targets(copied) if groups else []
    for name, one in plans.items():
        new = _packed_map(name, copied.get_submodule(name), one)
        if name in gains:
            new.gain = gains[name].float().clone()
        swap(copied, name, new)
    tables: dict[int, GroupedEmbedding] = {}
    for name in sorted(ends, key=lambda one: not isinstance(copied.get_submodule(one), nn.Embedding)):
        source = copied.get_submodule(name)
        if id(source.weight) in tables:
            swap(copied, name, TiedHead(tables[id(source.weight)], source.bias))
            continue
        grouped = _named(name, round_groups, source.weight, groups)
        if isinstance(source, nn.Embedding):
            new = tables[id(source.weight)] = GroupedEmbedding(grouped)
            new.padding_idx = source.padding_idx
        else:
            new = GroupedLinear(grouped, source.bias)
        swap(copied, name, new)
    round_rest(copied)
    return copied.eval()


def _packed_map(name: str, source: nn.Module, plan: MapPlan) -> PackedLinear | GroupedLinear:
    """The packed module of a linear map."""
    conv = is_conv1d(source)
    found = _named(name, image, source.weight.T if conv else source.weight, plan)
    if isinstance(found, Ternary):
        return PackedLinear.from_ternary(found, source.bias, plan, conv)
    new = GroupedLinear(found, source.bias)
    new.transposed = conv
    return new


@torch.no_grad()
def dequantised(model: nn.Module, plan: MapPlan, groups: GroupPlan | None) -> nn.Module:
    """A copy made of plain modules whose weights lie on the grids: for training on, and for code that wants floats.

    Its ternary weights are exact in float16 (those of other grids in float32). Packed again with the same plans it
    gives the same codes, and where activations are not rounded it computes what the packed model computes.

    Raises:
        ArtifactError: as :func:`packed`; or the model has sub-layer norms.
    """
    plans = plans_of(model, plan)
    copied = restored(copy.deepcopy(model))
    done: set[int] = set()
    for name, one in plans.items():
        source = copied.get_submodule(name)
        conv = is_conv1d(source)
        dense_RC = _named(name, image, source.weight.T if conv else source.weight, one).dense()
        source.weight.copy_(dense_RC.T if conv else dense_RC)
        done.add(id(source.weight))
    for name in grouped_targets(copied) if groups else ():
        weight = copied.get_submodule(name).weight
        if id(weight) not in done:
            weight.copy_(_named(name, round_groups, weight, groups).dense())
            done.add(id(weight))
    round_rest(copied, done)
    return copied


@torch.no_grad()
def halved(model: nn.Module) -> nn.Module:
    """Keep in float16 what float16 holds exactly, in place; every other tensor stays as it is. Read as float32 again it
    is the same model."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.dtype == torch.float32 and torch.equal(tensor.half().float(), tensor):
            tensor.data = tensor.half()
    return model


def _named(name: str, function: Any, weight: Tensor, plan: Any) -> Any:
    """Call a quantiser; its refusal names the tensor."""
    try:
        return function(weight, plan)
    except ArtifactError as error:
        raise ArtifactError(error.what, where=f"{name}.weight", remedy=error.remedy) from None


def rest(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Stored tensors that no low-bit module holds as codes or scales, each under its first name: (name, tensor)."""
    kept, seen = model.state_dict(keep_vars=True), set()
    for name in quantised_modules(model):
        for part in ("codes", "scale"):
            kept.pop(f"{name}.{part}", None)
    for name, tensor in kept.items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def quantised_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The packed modules by name."""
    kinds = (PackedLinear, GroupedEmbedding, GroupedLinear, TiedHead)
    return {name: module for name, module in _modules(model) if isinstance(module, kinds)}


def rest_dtype(name: str, tensor: Tensor) -> torch.dtype:
    """How a tensor that is not quantised is stored: float16, unless :data:`KEPT` or its range forbids it."""
    if not tensor.is_floating_point():
        return tensor.dtype
    if not tensor.isfinite().all():
        raise ArtifactError("NaN or infinite values", where=name, remedy="use a checkpoint from before that")
    largest = tensor.abs().max().item() if tensor.numel() else 0.0
    fits = largest == 0 or SMALLEST_HALF <= largest <= torch.finfo(torch.float16).max
    return torch.float16 if fits and kind_of(name) != "float32" else torch.float32


@torch.no_grad()
def round_rest(model: nn.Module, but: Iterable[int] = ()) -> None:
    """Give what is not quantised the values it has on disk, in place; ``but`` are ids of tensors to leave."""
    but = set(but)
    for name, tensor in rest(model):
        if id(tensor) not in but and tensor.is_floating_point():
            tensor.copy_(tensor.to(rest_dtype(name, tensor)))


def sizes(model: nn.Module) -> dict[str, int]:
    """Bytes of a model's stored tensors in memory, by what becomes or has become of them, and in total.

    A plain or training model is split as :func:`packed` with groups would split it (a plain one for the ternary grid),
    at its present width.
    """
    parts: Counter[str] = Counter(dict.fromkeys(("ternary", "grouped", "half", "float32"), 0))
    packed_ones = quantised_modules(model).items()
    low = {name: "ternary" if isinstance(module, PackedLinear) else "grouped" for name, module in packed_ones}
    if not low:
        low = dict.fromkeys(targets(model), "ternary") | dict.fromkeys(grouped_targets(model), "grouped")
        low |= {name: "grouped" for name, module in _modules(model) if isinstance(module, FakeGroupedLinear)}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        owner, _, leaf = name.rpartition(".")
        kept = "float32" if kind_of(name) == "float32" else "half"
        parts[kept if leaf in ("bias", "gain") else low.get(owner, kept)] += tensor.numel() * tensor.element_size()
    return {**parts, "total": sum(parts.values())}


def logical_parameters(model: nn.Module) -> int:
    """Numbers in the model whatever their width; tied ones count once. For a plain model its parameter count."""
    low, packed_ones = 0, quantised_modules(model)
    for module in packed_ones.values():
        if not isinstance(module, TiedHead):
            low += len(module.codes) * (module.columns if isinstance(module, PackedLinear) else module.codes.shape[1])
        low += sum(one.numel() for one in (module.bias, getattr(module, "gain", None)) if one is not None)
    return low + sum(p.numel() for p in model.parameters())


@dataclass(frozen=True)
class InputStatistics:
    """What a linear map's inputs looked like in calibration.

    Attributes:
        second_moment_C: mean square of each column, float32, for :func:`~forgekit.quant.grid.weighted_error`.
        absmax: largest magnitude.
        mean_rms: mean over tokens of the root mean square over columns.
        tokens: how many there were.
    """

    second_moment_C: Tensor
    absmax: float
    mean_rms: float
    tokens: int

    def told(self) -> dict[str, float]:
        """What is one number for the whole map."""
        return {"absmax": self.absmax, "mean_rms": self.mean_rms, "tokens": self.tokens}


class _Gather:
    """Sums over one map's inputs."""

    def __init__(self) -> None:
        self.square_C: Tensor | float = 0.0
        self.absmax, self.rms, self.tokens = 0.0, 0.0, 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        x_BC = args[0].detach().reshape(-1, args[0].shape[-1]).double()
        if not len(x_BC):
            return
        square = x_BC.square()
        self.square_C = self.square_C + square.sum(0)
        self.absmax = max(self.absmax, x_BC.abs().max().item())
        self.rms += square.mean(1).sqrt().sum().item()
        self.tokens += len(x_BC)

    def result(self) -> InputStatistics:
        moment_C = (self.square_C / self.tokens).float().cpu()
        return InputStatistics(moment_C, self.absmax, self.rms / self.tokens, self.tokens)


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Any]) -> dict[str, InputStatistics]:
    """Statistics of the inputs of every map in :func:`targets`, over some text.

    Args:
        model: plain or training; run in eval mode, and left as it was.
        batches: token ids (B, T) as tensors or arrays, or :class:`~forgekit.data.batches.Batch`.

    Returns:
        By name; a map that no token reached (a recursion that is switched off) is absent.

    Raises:
        DataError: no tokens.
        ArtifactError: no linear layers, or activations that are not finite.
    """
    gathers = {name: _Gather() for name in targets(model)}
    hooks = [model.get_submodule(name).register_forward_pre_hook(gather) for name, gather in gathers.items()]
    training, device, tokens = model.training, next(model.parameters()).device, 0
    model.eval()
    try:
        for batch in batches:
            ids_BT = torch.as_tensor(getattr(batch, "inputs", batch), device=device)
            tokens += ids_BT.numel()
            if ids_BT.numel():
                model(ids_BT)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    if not tokens:
        raise DataError("no tokens", where="calibration", remedy="give at least one batch of text")
    found = {name: gather.result() for name, gather in gathers.items() if gather.tokens}
    for name, statistics in found.items():
        if not statistics.second_moment_C.isfinite().all():
            raise ArtifactError("its inputs are not finite", where=name, remedy="use a checkpoint from before that")
    return found
