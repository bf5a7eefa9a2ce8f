"""Merge methods as typed functions on the tensors of ONE name from several models.

Sources: linear, Wortsman et al., Model soups (2203.05482); SLERP, Shoemake (1985); task arithmetic, Ilharco et al.
(2212.04089); TIES, Yadav et al. (2306.01708); DARE, Yu et al. (2311.03099); DELLA, Deep et al. (2406.11617);
Breadcrumbs, Davari and Belilovsky (2312.06795); Model Stock, Jang et al. (2403.19522); Fisher, Matena and Raffel
(2111.09832); Karcher mean, Karcher (1977).

Notation: x_i is model i's tensor, b the base's, d_i = x_i - b the task vector, w_i the weight, n the number of values.

A function takes a :class:`TensorGroup` and its options and returns the merged tensor, computed in working precision
(float32; float64 for float64 models); :func:`merge_tensor` is the entry that checks, calls it and returns the first
model's dtype. Values are computed block by block in buffers that are made once per tensor: temporary memory is small
whatever the tensor's size, and no operation waits for fresh pages. Everything that mixes whole tensors by scalars
(SLERP, Karcher, Model Stock) finds the scalars from inner products in float64 and touches the tensors once. Nothing
depends on the number of threads or on the order in which tensors are visited.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from agent_forge.merging.check import check_finite
from agent_forge.merging.operators_config import (
    BreadcrumbsOptions,
    ConsensusOptions,
    DareOptions,
    DareTiesOptions,
    DellaOptions,
    DfsOptions,
    FisherOptions,
    FrankenmergeOptions,
    KarcherOptions,
    LinearOptions,
    MergeOptions,
    Merger,
    ModelStockOptions,
    PassthroughOptions,
    SlerpOptions,
    TaskArithmeticOptions,
    TiesOptions,
    WeightedOptions,
    normalised,
)
from agent_forge.merging.operators_layers import layer_of
from forgekit.errors import ArtifactError

BLOCK = 2**17
"""Values computed at a time: a few of these fit into a CPU's cache."""
DOT_BLOCK = 2**15 - 2**6
"""Values per partial inner product: below torch's threshold for splitting a sum among threads."""
TOO_LARGE = "lower the weights or lam, or store the models in a wider type"

Sift = Callable[[Tensor], object]
"""Takes the next block of a task vector and changes it in place to what is kept of it. Blocks come in order."""


@dataclass(frozen=True)
class TensorGroup:
    """The tensors of one name.

    Attributes:
        name: the tensor's name; with the seed it decides what is drawn.
        models: one per model, all of one shape.
        base: the common ancestor's.
        importances: one per model, same shape, zero or more; None where there are none for this tensor.
        seed: of everything random.
        labels: names of the models and, last, of the base, for messages.
    """

    name: str
    models: Sequence[Tensor]
    base: Tensor | None = None
    importances: Sequence[Tensor] | None = None
    seed: int = 0
    labels: tuple[str, ...] = ()

    @property
    def layer(self) -> int | None:
        """The layer it stands in; None outside the layers."""
        return layer_of(self.name)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the result: the first model's."""
        return self.models[0].dtype

    @property
    def work(self) -> torch.dtype:
        """The precision it is computed in."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def label(self, index: int) -> str:
        """The name of a model for messages; the base comes after the last model."""
        if index < len(self.labels):
            return self.labels[index]
        return f"model {index}" if index < len(self.models) else "base"


def merge_tensor(merger: Merger, group: TensorGroup, options: MergeOptions) -> Tensor:
    """Merge the tensors of one name.

    Integer and boolean tensors are taken over where all models agree. Structural methods choose, whatever the dtype.

    Returns:
        A new tensor of the first model's shape and dtype.

    Raises:
        ArtifactError: a value is NaN or infinite, integers differ, an importance does not fit.
    """
    first = group.models[0]
    if merger.needs.structure:
        result = merger.run(group, options)
    elif not first.is_floating_point():
        result = _settled(group)
    else:
        _check_values(group)
        result = merger.run(group, options) if first.numel() else first
    result = result.to(first.dtype)
    if result.is_floating_point() and not _finite(result):
        check_finite(result, group.name, f"the {merger.name} result", TOO_LARGE)
    return result.clone() if any(result is t for t in _every(group)) else result


def _settled(group: TensorGroup) -> Tensor:
    """The tensor all models share, where averaging would be meaningless."""
    first, *rest = _every(group)
    for index, tensor in enumerate(rest, start=1):
        if tensor.dtype != first.dtype or not torch.equal(tensor, first):
            what = f"{group.name} ({str(first.dtype).removeprefix('torch.')}) differs from that of {group.label(0)}"
            remedy = "integers cannot be averaged: make it equal in all models, or choose layers with frankenmerge"
            raise ArtifactError(what, where=group.label(index), remedy=remedy)
    return first


def _every(group: TensorGroup) -> list[Tensor]:
    """The models' tensors and, last, the base's."""
    return [*group.models, *([group.base] if group.base is not None else [])]


def _check_values(group: TensorGroup) -> None:
    for index, tensor in enumerate(_every(group)):
        if not tensor.is_floating_point():
            what = f"{group.name} is {str(tensor.dtype).removeprefix('torch.')}, in {group.label(0)} it is not"
            raise ArtifactError(what, where=group.label(index), remedy="merge models stored in floating point")
        if not _finite(tensor):
            check_finite(tensor, group.name, group.label(index))
    for index, tensor in enumerate(group.importances or ()):
        label = f"importances of {group.label(index)}"
        if not _finite(tensor):
            check_finite(tensor, group.name, label)
        if tensor.shape != group.models[0].shape:
            what = f"{group.name} has shape {tuple(tensor.shape)}, the model's is {tuple(group.models[0].shape)}"
            raise ArtifactError(what, where=label, remedy="measure them on this model")
        if tensor.numel() and tensor.min() < 0:
            what = f"{group.name} holds {tensor.min():.3g}; an importance is zero or more"
            raise ArtifactError(what, where=label, remedy="give squared gradients (the diagonal Fisher)")


def _finite(tensor: Tensor) -> bool:
    """Whether no value is NaN or infinite for sure; False where only a look at every value can tell.

    A sum is finite unless a value is not, or it overflows. In short pieces, because torch adds up long tensors of
    narrow types ten times as slowly.
    """
    if tensor.element_size() == 1:
        return False
    flat, precision = tensor.detach().reshape(-1), torch.promote_types(tensor.dtype, torch.float32)
    return all(math.isfinite(flat[block].sum(dtype=precision).item()) for block in _blocks(flat.numel()))


# Building blocks


def stream(seed: int, name: str, index: int) -> np.random.Generator:
    """The random numbers of one tensor of one model, whenever and wherever it is visited."""
    words = np.frombuffer(hashlib.sha256(name.encode()).digest(), dtype="<u4").tolist()
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([seed, index, *words])))


def _blocks(count: int, size: int = BLOCK) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


def _flat(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.detach().reshape(-1) for t in tensors]


def _buffers(number: int, count: int, dtype: torch.dtype, size: int = BLOCK) -> Tensor:
    """Room (number, size) for blocks of a tensor of ``count`` values."""
    return torch.empty(number, min(size, count), dtype=dtype)


def _block_of(x: Tensor, block: slice, buffer: Tensor) -> Tensor:
    """A block in the buffer's precision: the tensor's own memory where it has that precision, else a copy."""
    part = x[block]
    return part if part.dtype == buffer.dtype else buffer[: part.numel()].copy_(part)


def weighted_sum(
    tensors: Sequence[Tensor], factors: Sequence[float], work: torch.dtype, dtype: torch.dtype | None = None
) -> Tensor:
    """sum f_i x_i in ``work`` precision; a factor of zero leaves its tensor out, a single factor of one is exact.

    Args:
        tensors: of one shape.
        factors: one per tensor.
        work: precision of the sum.
        dtype: type of the result; ``work`` when unset.
    """
    used = [(x, f) for x, f in zip(_flat(tensors), factors) if f]
    out = torch.empty(tensors[0].numel(), dtype=dtype or work)
    total, wide = _buffers(2, out.numel(), work)
    for block in _blocks(out.numel()):
        here = out[block]
        summed = here if out.dtype == work else total[: here.numel()]
        if not used:
            summed.zero_()
        for number, (x, f) in enumerate(used):
            part = _block_of(x, block, wide)
            summed.add_(part, alpha=f) if number else torch.mul(part, f, out=summed)
        if summed is not here:
            here.copy_(summed)
    return out.reshape(tensors[0].shape)


def gram(tensors: Sequence[Tensor], base: Tensor | None = None) -> np.ndarray:
    """Inner products (k, k) of k tensors, or of their task vectors when a base is given, in float64."""
    k, flat = len(tensors), _flat(tensors)
    origin = base.detach().reshape(-1) if base is not None else None
    products = np.zeros((k, k))
    room = _buffers(k + 2, flat[0].numel(), torch.float64, DOT_BLOCK)
    for block in _blocks(flat[0].numel(), DOT_BLOCK):
        *rows, start, product = room[:, : block.stop - block.start]
        if origin is not None:
            start.copy_(origin[block])
        for row, x in zip(rows, flat):
            row.copy_(x[block])
            if origin is not None:
                row.sub_(start)
        for i in range(k):
            for j in range(i, k):
                products[i, j] += torch.mul(rows[i], rows[j], out=product).sum().item()
    return np.maximum(products, products.T) if k == 1 else np.triu(products) + np.triu(products, 1).T


@dataclass(frozen=True)
class _Fusion:
    """base + lam * (merged task vectors), where ``sifts`` decide what is kept of each."""

    lam: float
    weights: Sequence[float]
    sifts: Sequence[Sift | None]
    consensus: ConsensusOptions | None = None
    block: int = BLOCK


def _fuse(group: TensorGroup, fusion: _Fusion) -> Tensor:
    models, base = _flat(group.models), _flat([group.base])[0]
    out = torch.empty(base.numel(), dtype=group.dtype)
    room = _buffers(len(models) + 5, base.numel(), group.work, fusion.block)
    for block in _blocks(base.numel(), fusion.block):
        *parts, wide, origin, first, second, third = room[:, : block.stop - block.start]
        origin = _block_of(base, block, origin)
        for x, weight, sift, part in zip(models, fusion.weights, fusion.sifts, parts):
            torch.sub(_block_of(x, block, wide), origin, out=part)
            if sift:
                sift(part)
            if weight != 1:
                part.mul_(weight)
        if fusion.consensus:
            merged = _agreeing(parts, fusion.weights, fusion.consensus.normalize, (wide, first, second, third))
        else:
            merged = parts[0]
            for part in parts[1:]:
                merged.add_(part)
        here = out[block]
        if out.dtype == group.work:
            torch.add(origin, merged, alpha=fusion.lam, out=here)
        else:
            here.copy_(torch.add(origin, merged, alpha=fusion.lam, out=wide))
    return out.reshape(group.base.shape)


def _agreeing(parts: Sequence[Tensor], weights: Sequence[float], normalize: bool, room: tuple[Tensor, ...]) -> Tensor:
    """Elect a sign per entry by the summed mass, then the mean (or sum) of the entries that have it.

    Where the masses cancel exactly no sign is elected and nothing is added (TIES, section 3: sgn(0) = 0). Works in the
    four buffers of ``room`` and returns one of them.
    """
    sign, agreeing, total, agreed = room
    sign.copy_(parts[0])
    for part in parts[1:]:
        sign.add_(part)
    sign.sign_()
    total.zero_(), agreed.zero_()
    for part, weight in zip(parts, weights):
        torch.mul(part, sign, out=agreeing).clamp_(min=0)
        total.add_(agreeing)
        if normalize:
            agreed.add_(agreeing.sign_(), alpha=weight)
    if normalize:
        total.div_(agreed.clamp_(min=torch.finfo(agreed.dtype).tiny))  # nothing divided by next to nothing is nothing
    return total.mul_(sign)


def _magnitudes(group: TensorGroup, index: int) -> np.ndarray:
    """|d_i|, flat, in working precision; the caller owns it."""
    x, base = _flat([group.models[index], group.base])
    out = torch.empty(x.numel(), dtype=group.work)
    wide, origin = _buffers(2, x.numel(), group.work)
    for block in _blocks(x.numel()):
        torch.sub(_block_of(x, block, wide), _block_of(base, block, origin), out=out[block]).abs_()
    return out.numpy()


def _share(share: float, count: int) -> int:
    """``share`` of ``count`` entries, rounded down (0.29 of 100 is 29, whatever binary makes of it)."""
    return math.floor(share * count + 1e-9)


def _within(low: float, high: float) -> Sift:
    """Keep magnitudes from ``low`` to ``high``, both included."""

    def sift(part: Tensor) -> None:
        kind = part.numpy().dtype.type
        if low > 0:
            below = float(np.nextafter(kind(low), kind(0)))  # the largest magnitude that goes
            torch.ops.aten.hardshrink.out(part, below, out=part)
        if high < math.inf:
            part.masked_fill_(part.abs() > high, 0)

    return sift


# Interpolation


def linear(group: TensorGroup, options: LinearOptions) -> Tensor:
    """Weighted average, sum w_i x_i / sum w_i."""
    weights = normalised(options.weights_for(len(group.models), group.layer))
    return weighted_sum(group.models, weights, group.work, group.dtype)


def slerp(group: TensorGroup, options: SlerpOptions) -> Tensor:
    """sin((1-t)O)/sin O * a + sin(tO)/sin O * c, where O is the angle between a and c; more than two fold pairwise.

    On the straight line where the directions are (anti)parallel or one of the two is zero.
    """
    count = len(group.models)
    steps = options.t * (count - 1) if len(options.t) == 1 else options.t
    products = gram(group.models)
    factors = np.eye(1, count)[0]
    for place, t in enumerate(steps, start=1):
        arm = np.eye(1, count, place)[0]
        left, right = _slerp_factors(factors, arm, products, t, options.parallel)
        factors = left * factors + right * arm
    return weighted_sum(group.models, factors.tolist(), group.work, group.dtype)


def _slerp_factors(a: np.ndarray, c: np.ndarray, products: np.ndarray, t: float, parallel: float) -> tuple:
    """Factors of two tensors that are themselves combinations ``a`` and ``c`` of those behind ``products``."""
    size = math.sqrt(max(a @ products @ a, 0.0) * max(c @ products @ c, 0.0))
    cosine = float(a @ products @ c) / size if size > 0 else 1.0
    if abs(cosine) > parallel or t in (0.0, 1.0):
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def karcher(group: TensorGroup, options: KarcherOptions) -> Tensor:
    """Direction: the point of the unit sphere with the least weighted sum of squared angles to all; norm: the mean.

    Found by gradient steps m <- exp_m(sum w_i log_m(u_i)), all of which stay in the span of the unit vectors u_i, so
    only their inner products are needed. Zero tensors count for the norm alone; where the directions cancel out
    (antipodes) the average itself is returned.
    """
    weights = np.array(normalised(options.weights_for(len(group.models), group.layer)))
    products = gram(group.models)
    norms = np.sqrt(products.diagonal())
    units = np.divide(1.0, norms, out=np.zeros_like(norms), where=norms > 0)
    factors = _mean_direction(products * np.outer(units, units), weights * (norms > 0), options)
    if factors is None:
        return weighted_sum(group.models, weights.tolist(), group.work, group.dtype)
    return weighted_sum(group.models, (factors * units * (weights @ norms)).tolist(), group.work, group.dtype)


def _mean_direction(cosines: np.ndarray, weights: np.ndarray, options: KarcherOptions) -> np.ndarray | None:
    """Factors on the unit vectors of their mean direction; None where there is none."""
    if not weights.sum():
        return None
    weights = weights / weights.sum()
    length = math.sqrt(max(weights @ cosines @ weights, 0.0))
    if length < 1e-6:
        return None
    factors = weights / length
    for _ in range(options.iterations):
        cosine = np.clip(cosines @ factors, -1.0, 1.0)
        angle = np.arccos(cosine)
        stretch = weights / np.maximum(np.sinc(angle / np.pi), 1e-6)  # angle / sin(angle), 1 at 0
        step = stretch - (stretch @ cosine) * factors
        size = math.sqrt(max(step @ cosines @ step, 0.0))
        if size < options.tolerance:
            break
        factors = math.cos(size) * factors + math.sin(size) / size * step
        factors = factors / math.sqrt(factors @ cosines @ factors)
    return factors


# Task vectors


def _fusion(group: TensorGroup, options: WeightedOptions, sifts: Sequence[Sift | None] | None = None) -> _Fusion:
    weights = options.weights_for(len(group.models), group.layer)
    consensus = options if isinstance(options, ConsensusOptions) else None
    return _Fusion(options.lam, weights, sifts or [None] * len(group.models), consensus)


def task_arithmetic(group: TensorGroup, options: TaskArithmeticOptions) -> Tensor:
    """b + lam * sum w_i d_i."""
    return _fuse(group, _fusion(group, options))


def ties(group: TensorGroup, options: TiesOptions) -> Tensor:
    """Trim each d_i to its largest share, elect a sign per entry, b + lam * mean of those that agree.

    Entries as large as the smallest kept one are kept too, so that no order among equals is needed.
    """
    sifts: list[Sift | None] = []
    for index, x in enumerate(group.models):
        drop = x.numel() - max(1, _share(options.density, x.numel()))
        if drop:
            size = _magnitudes(group, index)
            size.partition(drop)
            sifts.append(_within(float(size[drop]), math.inf))
        else:
            sifts.append(None)
    return _fuse(group, _fusion(group, options, sifts))


def _dropping(group: TensorGroup, rate: float) -> list[Sift | None]:
    """One sift per model: drop each entry with chance ``rate``, divide the rest by ``1 - rate``."""

    numbers = np.empty(min(BLOCK, group.base.numel()), np.float32)

    def sift(draws: np.random.Generator) -> Sift:
        def keep(part: Tensor) -> None:
            drawn = draws.random(dtype=np.float32, out=numbers[: part.numel()])
            part.mul_(torch.from_numpy(drawn).ge_(rate))  # 1 or 0
            part.mul_(1 / (1 - rate))

        return keep

    return [sift(stream(group.seed, group.name, index)) if rate else None for index in range(len(group.models))]


def dare_linear(group: TensorGroup, options: DareOptions) -> Tensor:
    """Task arithmetic on d_i whose entries are dropped with chance p, the rest divided by 1 - p."""
    return _fuse(group, _fusion(group, options, _dropping(group, options.drop_rate)))


def dare_ties(group: TensorGroup, options: DareTiesOptions) -> Tensor:
    """Drop and rescale as DARE, then elect signs and average as TIES."""
    return _fuse(group, _fusion(group, options, _dropping(group, options.drop_rate)))


def della(group: TensorGroup, options: DellaOptions) -> Tensor:
    """Drop by magnitude (MagPrune), rescale by the chance to stay, then elect signs and average as TIES.

    Within a row (last dimensions flattened; a vector is one row) the chance to be dropped falls linearly with the rank
    of the magnitude, from p + epsilon for the smallest to p - epsilon for the largest.
    """
    shape = group.models[0].shape
    row = math.prod(shape[1:]) if len(shape) > 1 else math.prod(shape)

    def sift(draws: np.random.Generator) -> Sift:
        def keep(part: Tensor) -> None:
            order = part.view(-1, row).abs().argsort(dim=1, stable=True)
            rank = torch.empty_like(order).scatter_(1, order, torch.arange(row).expand_as(order))
            slope = 2 * options.epsilon / (row - 1) if row > 1 else 0.0
            top = options.drop_rate + (options.epsilon if row > 1 else 0.0)
            drop = rank.view(-1).to(torch.float32).mul_(-slope).add_(top)
            kept = torch.from_numpy(draws.random(part.numel(), dtype=np.float32)) >= drop
            part.mul_(kept).div_(1 - drop)

        return keep

    exact = options.drop_rate == 0 and options.epsilon == 0
    sifts = [None if exact else sift(stream(group.seed, group.name, i)) for i in range(len(group.models))]
    whole_rows = max(1, BLOCK // row) * row
    return _fuse(group, replace(_fusion(group, options, sifts), block=whole_rows))


def breadcrumbs(group: TensorGroup, options: BreadcrumbsOptions) -> Tensor:
    """Drop the smallest and the largest entries of each d_i, then b + lam * sum w_i d_i."""
    sifts = []
    for index, x in enumerate(group.models):
        low, high = _share(options.low, x.numel()), x.numel() - 1 - _share(options.high, x.numel())
        size = _magnitudes(group, index)
        size.partition((low, high))
        sifts.append(_within(float(size[low]), float(size[high])))
    return _fuse(group, _fusion(group, options, sifts))


def model_stock(group: TensorGroup, options: ModelStockOptions) -> Tensor:
    """t * mean + (1 - t) * b with t = k c / (1 + (k - 1) c), c the mean cosine between the d_i of this tensor.

    A mean cosine below zero counts as zero: the models agree on nothing, the base stays.
    """
    k = len(group.models)
    products = gram(group.models, group.base)
    norms = np.sqrt(products.diagonal())
    sizes = np.outer(norms, norms)
    cosines = np.divide(products, sizes, out=np.zeros_like(products), where=sizes > 0)
    cosine = min(max(float(cosines[np.triu_indices(k, 1)].mean()), 0.0), 1.0)
    t = k * cosine / (1 + (k - 1) * cosine)
    return _fuse(group, _Fusion(t, [1 / k] * k, [None] * k))


# Importance


def fisher(group: TensorGroup, options: FisherOptions) -> Tensor:
    """sum w_i F_i x_i / sum w_i F_i, entry by entry; the plain average where there is no importance."""
    weights = normalised(options.weights_for(len(group.models), group.layer))
    if group.importances is None:
        return weighted_sum(group.models, weights, group.work, group.dtype)
    models, matters = _flat(group.models), _flat(group.importances)
    floor = options.floor * sum(f.double().mean().item() for f in matters) / len(matters)
    out = torch.empty(models[0].numel(), dtype=group.dtype)
    room = _buffers(5, out.numel(), group.work)
    for block in _blocks(out.numel()):
        top, bottom, plain, share, wide = room[:, : block.stop - block.start]
        top.zero_(), bottom.zero_(), plain.zero_()
        for x, f, weight in zip(models, matters, weights):
            torch.clamp(_block_of(f, block, wide), min=floor, out=share).mul_(weight)
            value = _block_of(x, block, wide)
            bottom.add_(share)
            top.addcmul_(share, value)
            plain.add_(value, alpha=weight)
        out[block] = torch.where(bottom > 0, top.div_(bottom.masked_fill(bottom == 0, 1)), plain)
    return out.reshape(group.models[0].shape)


def dfs(group: TensorGroup, options: DfsOptions) -> Tensor:
    """Dynamic fusion: sum s_i x_i, where the share s_i follows the importance of this tensor to model i."""
    return weighted_sum(group.models, fusion_shares(group, options), group.work, group.dtype)


def fusion_shares(group: TensorGroup, options: DfsOptions) -> list[float]:
    """One share per model, adding up to one.

    The importance of a tensor is the mean of its importance tensor; without one, how far training moved it: the root
    mean square of d_i. Equal importances, or none at all, give shares in proportion to the weights.
    """
    weights = np.array(normalised(options.weights_for(len(group.models), group.layer)))
    if group.importances is not None:
        values = np.array([f.double().mean().item() for f in group.importances])
    elif group.base is not None:
        values = np.sqrt(gram(group.models, group.base).diagonal())
    else:
        values = np.zeros(len(group.models))
    if not values.sum():
        return weights.tolist()
    values = values / values.mean()
    if options.rule == "softmax":
        values = np.exp((values - values.max()) / options.temperature)
    shares = weights * values
    return normalised(shares.tolist()) if shares.sum() else weights.tolist()


# Structure


def frankenmerge(group: TensorGroup, options: FrankenmergeOptions) -> Tensor:
    """The tensor of the model chosen for its layer, as it is."""
    layer = group.layer
    return group.models[options.outside if layer is None else options.choices[layer]]


def passthrough(group: TensorGroup, options: PassthroughOptions) -> Tensor:
    """The tensor as it is: stacking decided before which one that is."""
    return group.models[0]
