"""Low-bit linear maps and embeddings: the ones that train, and the ones that run from packed weights.

Training modules take the parameters of the module they replace over, under the same names: checkpoints and optimizers
notice nothing. ``strength`` moves them from the plain map (0, the same bits) to the quantised one (1, what the packed
module computes, up to rounding). The gradient passes the rounding straight through (BitNet b1.58, arXiv 2402.17764).

Shapes: R rows (outputs), C columns (inputs), G groups of a row, V vocabulary, D width of the table.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from forgekit.errors import ArtifactError
from forgekit.infer.kernels import (
    TernaryMaps,
    grouped_matmul,
    plain_floats,
    prepared_maps,
    ternary_matmul,
    ternary_matmul_float,
    traced,
)
from forgekit.quant.config import GroupPlan, TernaryPlan
from forgekit.quant.grid import Ternary, fake_activations, fake_ternary, straight_through, ternarise
from forgekit.quant.groupwise import Grouped, fake_groups
from forgekit.quant.pack import pack2, unpack2


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' ``Conv1D`` (GPT-2): a linear map that stores its weight as (C, R)."""
    return type(module).__name__ == "Conv1D" and type(module).__module__.startswith("transformers.")


def ternary_of(weight_RC: Tensor, plan: TernaryPlan) -> Ternary:
    """The weight on the ternary grid as files hold it: its scales are numbers of float16.

    Then a dequantised weight is exact in float16 too, and packing it again finds the same codes; and, where the plan
    refits the scale, the same scales: without that the mean of a row with zeros is smaller.

    Raises:
        ArtifactError: weights that are not finite, or a scale beyond float16.
    """
    exact = ternarise(weight_RC, plan)
    scale_R1 = exact.scale_R1.half().float()
    if not scale_R1.isfinite().all():
        raise ArtifactError("a scale exceeds float16", where="weights", remedy="scale the model down first")
    return replace(exact, scale_R1=scale_R1)


def fake_weight(weight_RC: Tensor, plan: TernaryPlan, strength: float) -> Tensor:
    """The weight moved towards :func:`ternary_of`, straight-through. What is not finite comes out as NaN."""
    with torch.no_grad():
        dense_RC = fake_ternary(weight_RC.detach().float(), plan)
        scale_R1 = dense_RC.abs().amax(1, keepdim=True).half().float()
        mixed_RC = weight_RC.float().lerp(dense_RC.sign() * scale_R1, strength)
    return straight_through(mixed_RC.to(weight_RC.dtype), weight_RC)


def sub_norm(x: Tensor, gain_C: Tensor | None) -> Tensor:
    """Inputs of a map, RMS-normalised with a gain (the sub-layer norm of BitNet b1.58 2B4T, arXiv 2504.12285); as they
    are without a gain."""
    return x if gain_C is None else F.rms_norm(x, (x.shape[-1],), gain_C.to(x.dtype), eps=1e-6)


class TernaryLinear(nn.Module):
    """A linear map that trains for the ternary grid.

    Args:
        source: ``nn.Linear`` or transformers' ``Conv1D``; its parameters become this module's.
        plan: the grid.
        strength: 0 is the plain map bit for bit, 1 is fully quantised (weights and activations).
        gain_C: where the gain of a sub-layer norm starts; None for none.

    Attributes:
        weight: the latent weight as the source stores it, (R, C), or (C, R) where ``transposed``.
        gain: parameter (C,) or None.
    """

    def __init__(
        self, source: nn.Module, plan: TernaryPlan, strength: float = 1.0, gain_C: Tensor | None = None
    ) -> None:
        super().__init__()
        self.plan, self.strength, self.transposed = plan, float(strength), is_conv1d(source)
        self.register_parameter("weight", source.weight)
        self.register_parameter("bias", source.bias)
        self.register_parameter("gain", None if gain_C is None else nn.Parameter(gain_C.to(source.weight)))

    @property
    def weight_RC(self) -> Tensor:
        """The latent weight, rows first."""
        return self.weight.T if self.transposed else self.weight

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., R)."""
        if not self.strength:
            return F.linear(x, self.weight_RC, self.bias)
        snapped = fake_activations(sub_norm(x, self.gain), self.plan.activation_bits)
        if self.strength < 1:
            snapped = torch.lerp(x, snapped, self.strength)
        return F.linear(snapped, fake_weight(self.weight_RC, self.plan, self.strength), self.bias)

    def extra_repr(self) -> str:
        """Shape and strength."""
        return f"{tuple(self.weight_RC.shape)}, strength={self.strength}"


class PackedLinear(nn.Module):
    """A ternary linear map in two bits a weight, for inference. Make it with :meth:`from_ternary`.

    Attributes:
        codes: uint8 (R, P), the layout of :func:`~forgekit.quant.pack.pack2`.
        scale: float32 (R,).
        bias: (R,) or None.
        gain: (C,) of the sub-layer norm, or None.
        columns: C.
        transposed: whether the module it stands for stores its weight as (C, R).
    """

    def __init__(self, ternary: Ternary, bias: Tensor | None, plan: TernaryPlan) -> None:
        super().__init__()
        self.plan, self.columns, self.transposed = plan, ternary.codes_RC.shape[1], False
        self._made: dict[int, TernaryMaps | None] = {}
        self.register_buffer("codes", pack2(ternary.codes_RC))
        self.register_buffer("scale", ternary.scale_R1.flatten().float().clone())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())
        self.register_buffer("gain", None)

    @classmethod
    def from_ternary(
        cls, ternary: Ternary, bias: Tensor | None, plan: TernaryPlan, transposed: bool = False
    ) -> PackedLinear:
        """Pack codes and scales."""
        packed = cls(ternary, bias, plan)
        packed.transposed = transposed
        return packed

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._made.clear()  # it would keep the tensors that are moved from here
        return super()._apply(fn, recurse)

    @property
    def ternary(self) -> Ternary:
        """Codes and scales, unpacked."""
        return Ternary(unpack2(self.codes, self.columns), self.scale[:, None])

    @property
    def weight(self) -> Tensor:
        """The dense weight as the replaced module would hold it; made anew each time."""
        dense_RC = self.ternary.dense()
        return dense_RC.T if self.transposed else dense_RC

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., R), in the dtype of ``x``."""
        buffers = self._buffers  # a token passes here dozens of times: attributes of modules are looked up slowly
        bias, gain = buffers["bias"], buffers["gain"]
        maps = self._ready((self,), x)
        if maps is not None and (gain is None or plain_floats(gain)):
            out = maps(x, gain)
            return out if bias is None else out + bias
        product = ternary_matmul if self.plan.activation_bits else ternary_matmul_float
        out = product(self.codes, self.scale, sub_norm(x, gain), self.columns)
        return (out if bias is None else out + bias).to(x.dtype)

    @staticmethod
    def side_by_side(maps: Sequence[nn.Module], x: Tensor, norm: nn.Module | None = None) -> Tensor:
        """What several maps, the first of them packed, make of the same input, side by side in the last dimension.

        Args:
            maps: packed or not.
            x: (..., C).
            norm: an RMSNorm that x passes first.
        """
        gain = None if norm is None else norm.weight
        alike = all(type(one) is PackedLinear and one.alone and one.columns == maps[0].columns for one in maps)
        if alike and (gain is None or plain_floats(gain)):
            ready = maps[0]._ready(maps, x)
            if ready is not None:
                return ready(x, gain)
        x = x if norm is None else norm(x)
        return torch.cat([one(x) for one in maps], -1)

    @property
    def alone(self) -> bool:
        """Whether it is a product with rounded activations and nothing else."""
        return self._buffers["bias"] is None and self._buffers["gain"] is None and bool(self.plan.activation_bits)

    def _ready(self, maps: Sequence[PackedLinear], x: Tensor) -> TernaryMaps | None:
        """What multiplies ``x`` with the maps, of which this is the first, in one call; None where that cannot be."""
        if not (plain_floats(x) and self.plan.activation_bits and x.shape[-1] == self.columns) or traced():
            return None
        tensors = [one._buffers[part] for one in maps for part in ("codes", "scale")]
        ready = self._made.get(len(maps))
        if ready is None or not ready.hold(tensors):
            ready = self._made[len(maps)] = prepared_maps(list(zip(tensors[::2], tensors[1::2])), self.columns)
        return ready

    def extra_repr(self) -> str:
        """Shape."""
        return f"{(len(self.scale), self.columns)}"


class _FakeGroups(nn.Module):
    """A weight that trains for group-wise rounding.

    ``weight`` is the rounded one, for code that reads it (a tied head); the latent one is the parameter of that name.
    """

    def __init__(self, source: nn.Module, plan: GroupPlan, strength: float = 1.0) -> None:
        super().__init__()
        self.plan, self.strength = plan, float(strength)
        self._parameters["weight"] = source.weight  # not by register_parameter: the property has the name

    @property
    def latent(self) -> nn.Parameter:
        """What trains."""
        return self._parameters["weight"]

    @property
    def weight(self) -> Tensor:
        """The weight moved towards its rounded image, straight-through."""
        return self._fake(self.latent)

    def _fake(self, weight: Tensor) -> Tensor:
        return fake_groups(weight, self.plan, self.strength) if self.strength else weight


class FakeGroupedEmbedding(_FakeGroups):
    """A token embedding that trains for group-wise rounding; its parameters are those of the ``nn.Embedding``."""

    def __init__(self, source: nn.Embedding, plan: GroupPlan, strength: float = 1.0) -> None:
        super().__init__(source, plan, strength)
        self.padding_idx = source.padding_idx

    def forward(self, ids: Tensor) -> Tensor:
        """Ids to rows (..., D)."""
        if not self.strength or ids.numel() >= len(self.latent):
            return F.embedding(ids, self.weight, self.padding_idx)
        rows = F.embedding(ids, self.latent, self.padding_idx)  # groups lie inside rows: round those asked for only
        return self._fake(rows.flatten(0, -2)).view_as(rows)


class FakeGroupedLinear(_FakeGroups):
    """A linear map that trains for group-wise rounding; ``nn.Linear`` or transformers' ``Conv1D``."""

    def __init__(self, source: nn.Module, plan: GroupPlan, strength: float = 1.0) -> None:
        super().__init__(source, plan, strength)
        self.transposed = is_conv1d(source)
        self.register_parameter("bias", source.bias)

    @property
    def weight_RC(self) -> Tensor:
        """The latent weight, rows first."""
        return self.latent.T if self.transposed else self.latent

    @property
    def weight(self) -> Tensor:
        """The weight moved towards its rounded image, as the source stores it."""
        rounded_RC = self._fake(self.weight_RC)
        return rounded_RC.T if self.transposed else rounded_RC

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., R)."""
        return F.linear(x, self._fake(self.weight_RC), self.bias)


class _Groups(nn.Module):
    """Codes int8 (R, C) and scales float16 (R, G), for inference."""

    def __init__(self, grouped: Grouped, bias: Tensor | None = None) -> None:
        super().__init__()
        self.group, self.bits = grouped.group, grouped.bits
        self.register_buffer("codes", grouped.codes_RC.contiguous())
        self.register_buffer("scale", grouped.scale_RG.contiguous())
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def grouped(self) -> Grouped:
        """Codes and scales with what they mean."""
        return Grouped(self.codes, self.scale, self.group, self.bits)

    @property
    def weight(self) -> Tensor:
        """The dense weight, float32; made anew each time."""
        return self.grouped.dense()

    def product(self, x: Tensor) -> Tensor:
        """(..., C) to (..., R), in the dtype of ``x``."""
        return grouped_matmul(self.codes, self.scale, x, self.group).to(x.dtype)

    def extra_repr(self) -> str:
        """Shape and bits."""
        return f"{tuple(self.codes.shape)}, bits={self.bits}, group={self.group}"


class GroupedEmbedding(_Groups):
    """A token embedding in 4 to 8 bits, and the output head tied to it.

    Attributes:
        padding_idx: of the embedding that it stands for.
    """

    padding_idx: int | None = None

    def forward(self, ids: Tensor) -> Tensor:
        """Ids to rows (..., D), float32."""
        flat = ids.flatten()
        rows = Grouped(self.codes[flat], self.scale[flat], self.group, self.bits).dense()
        return rows.view(*ids.shape, -1)

    def logits(self, h: Tensor) -> Tensor:
        """(..., D) to scores (..., V)."""
        return self.product(h)


class GroupedLinear(_Groups):
    """A linear map in 4 to 8 bits, activations untouched.

    Attributes:
        transposed: whether the module it stands for stores its weight as (C, R).
    """

    transposed = False

    @property
    def weight(self) -> Tensor:
        """The dense weight as the replaced module would hold it, float32; made anew each time."""
        dense_RC = self.grouped.dense()
        return dense_RC.T if self.transposed else dense_RC

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) to (..., R)."""
        out = self.product(x)
        return out if self.bias is None else out + self.bias.to(out.dtype)


class TiedHead(nn.Module):
    """An output head that owns nothing but perhaps a bias: its weight is the embedding's."""

    def __init__(self, table: GroupedEmbedding, bias: Tensor | None = None) -> None:
        super().__init__()
        self.__dict__["table"] = table  # not a child: its codes belong to the embedding
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        """The embedding's dense weight."""
        return self.table.weight

    def forward(self, h: Tensor) -> Tensor:
        """(..., D) to scores (..., V)."""
        out = self.table.logits(h)
        return out if self.bias is None else out + self.bias.to(out.dtype)
