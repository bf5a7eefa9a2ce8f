"""How different the models of a population are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from agent_forge.merging.operators import gram

State = Mapping[str, Tensor]


def differences(population: Sequence[State], base: State | None = None) -> np.ndarray:
    """|d_i - d_j| / (|d_i| + |d_j|) for every pair, (n, n).

    d_i is model i's task vector over all floating-point tensors (without a base, the model itself). 0 means alike, 1
    opposed; two of equal length at right angles give 0.71. Two models that equal the base differ by 0.
    """
    products = np.zeros((len(population), len(population)))
    for name in sorted(population[0]) if population else ():  # sums depend on their order, files have one of their own
        if population[0][name].is_floating_point():
            products += gram([model[name] for model in population], None if base is None else base[name])
    norms = np.sqrt(np.maximum(products.diagonal(), 0.0))
    squares = np.add.outer(products.diagonal(), products.diagonal()) - 2 * products
    sizes = np.add.outer(norms, norms)
    distances = np.sqrt(np.maximum(squares, 0.0))
    return np.minimum(np.divide(distances, sizes, out=np.zeros_like(distances), where=sizes > 0), 1.0)


def variety(distances: np.ndarray) -> float:
    """The mean of :func:`differences` over pairs; 0 for fewer than two models."""
    upper = np.triu_indices(len(distances), 1)
    return float(distances[upper].mean()) if len(upper[0]) else 0.0
