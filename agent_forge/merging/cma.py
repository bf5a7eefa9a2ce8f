"""CMA-ES in numpy: full covariance, cumulative step-size adaptation, and a state of plain numbers.

Source: N. Hansen, The CMA Evolution Strategy: A Tutorial, arXiv 1604.00772 (equation numbers below are its appendix A
and table 1), with the negative weights it recommends; points made elsewhere (repaired at the bounds, or injected) are
shortened as in Hansen, Injecting external solutions into CMA-ES, arXiv 1110.4181. This one maximises.

Legend: n dimensions, L (lambda) points per generation, m mean, s step size, C covariance, y = (x - m) / s.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

RESAMPLE = 10
"""Draws of a point that falls outside the bounds before it is reflected into them."""


@dataclass(frozen=True)
class _Rates:
    """Default parameters of table 1."""

    weights_L: np.ndarray
    """Recombination weights: the positive ones sum to 1, the others shrink C along bad directions."""
    parents: int
    mu_eff: float
    c_sigma: float
    d_sigma: float
    c_c: float
    c_1: float
    c_mu: float
    length: float
    """E |N(0, I)|."""

    @classmethod
    def of(cls, n: int, count: int) -> _Rates:
        """For ``n`` dimensions and ``count`` points per generation."""
        raw = math.log((count + 1) / 2) - np.log(np.arange(1, count + 1))  # (49)
        parents = count // 2
        up, down = raw[:parents], raw[parents:]
        mu_eff = up.sum() ** 2 / (up**2).sum()
        mu_eff_down = down.sum() ** 2 / (down**2).sum()
        c_1 = 2 / ((n + 1.3) ** 2 + mu_eff)  # (57)
        c_mu = min(1 - c_1, 2 * (0.25 + mu_eff + 1 / mu_eff - 2) / ((n + 2) ** 2 + mu_eff))  # (58)
        bound = min(
            1 + c_1 / c_mu,  # (50)
            1 + 2 * mu_eff_down / (mu_eff + 2),  # (51)
            (1 - c_1 - c_mu) / (n * c_mu),  # (52)
        )
        weights_L = np.where(raw >= 0, raw / up.sum(), raw * max(bound, 0.0) / np.abs(raw[raw < 0]).sum())  # (53)
        c_sigma = (mu_eff + 2) / (n + mu_eff + 5)  # (55)
        d_sigma = 1 + 2 * max(0.0, math.sqrt(max(mu_eff - 1, 0.0) / (n + 1)) - 1) + c_sigma
        c_c = (4 + mu_eff / n) / (n + 4 + 2 * mu_eff / n)  # (56)
        length = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
        return cls(weights_L, parents, float(mu_eff), c_sigma, d_sigma, c_c, c_1, c_mu, length)


class CMAES:
    """Covariance matrix adaptation: :meth:`ask` for points, :meth:`tell` how good they are, repeat.

    ``ask`` changes nothing: until the next ``tell`` it gives the same points, also in another process that restored
    the state.

    Args:
        mean: where to start, (n,).
        sigma: initial standard deviation in every direction.
        population: points per generation, 2 or more; 0 for 4 + floor(3 ln n).
        seed: decides every draw.
        bounds: lowest and highest value of every coordinate.

    Raises:
        ValueError: no dimension, a population of one, sigma that is not positive, or a mean outside the bounds.
    """

    def __init__(
        self,
        mean: Sequence[float],
        sigma: float,
        population: int = 0,
        seed: int = 0,
        bounds: tuple[float, float] | None = None,
    ) -> None:
        self.mean_N = np.array(mean, dtype=np.float64)
        n = self.mean_N.size
        if self.mean_N.ndim != 1 or not n or not np.isfinite(self.mean_N).all():
            raise ValueError(f"mean {mean!r} is no point; give one finite number per dimension")
        if not (sigma > 0 and math.isfinite(sigma)):
            raise ValueError(f"sigma {sigma} is not above zero")
        if bounds and not (bounds[0] < bounds[1] and bounds[0] <= self.mean_N.min() <= self.mean_N.max() <= bounds[1]):
            raise ValueError(f"the mean lies outside the bounds {bounds}")
        self.population = population or default_population(n)
        if self.population < 2:
            raise ValueError(f"population {population}: a population of one cannot evolve; choose 2 or more")
        self.sigma, self.seed, self.bounds, self.generation = float(sigma), seed, bounds, 0
        self._rates = _Rates.of(n, self.population)
        self._path_sigma_N, self._path_c_N = np.zeros(n), np.zeros(n)
        self._cov_NN = np.eye(n)
        self._factors: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def dimensions(self) -> int:
        """Coordinates of a point."""
        return self.mean_N.size

    @property
    def deviations(self) -> np.ndarray:
        """Standard deviation of every coordinate of the points to come, (n,)."""
        return self.sigma * np.sqrt(np.diag(self._cov_NN))

    def ask(self) -> np.ndarray:
        """The points of this generation, (population, n)."""
        return np.stack([self._point(index) for index in range(self.population)])

    def _point(self, index: int) -> np.ndarray:
        """(38) to (40): x = m + s B D z; drawn again while outside the bounds, in the end reflected."""
        axes_NN, lengths_N = self._decomposed()
        draws = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self.seed, self.generation, index])))
        for _ in range(RESAMPLE if self.bounds else 1):
            x = self.mean_N + self.sigma * (axes_NN @ (lengths_N * draws.standard_normal(self.dimensions)))
            if self.bounds is None or (x.min() >= self.bounds[0] and x.max() <= self.bounds[1]):
                return x
        return reflected(x, *self.bounds)

    def tell(self, points: Sequence[Sequence[float]], values: Sequence[float]) -> None:
        """Learn from points; higher values are better, NaN is worst.

        Args:
            points: those of :meth:`ask`, in any order; some may be replaced by points made elsewhere.
            values: one per point.

        Raises:
            ValueError: not one value per point, or not as many points as asked.
        """
        x_LN, value_L = np.array(points, dtype=np.float64), np.array(values, dtype=np.float64)
        if x_LN.shape != (self.population, self.dimensions) or value_L.shape != (self.population,):
            what = f"{x_LN.shape} points and {value_L.shape} values"
            raise ValueError(f"{what}; {self.population} of {self.dimensions} dimensions were asked")
        order_L = np.argsort(-value_L, kind="stable")  # numpy puts NaN last
        y_LN = self._shortened((x_LN - self.mean_N) / self.sigma)[order_L]
        self._learn(y_LN)
        self.generation += 1

    def _shortened(self, y_LN: np.ndarray) -> np.ndarray:
        """Steps no longer than a sample of this distribution plausibly is (1110.4181, equation 3)."""
        longest = math.sqrt(self.dimensions) + 2 * self.dimensions / (self.dimensions + 2)
        lengths_L = np.linalg.norm(self._whitened(y_LN), axis=1)
        return y_LN * np.minimum(1.0, longest / np.maximum(lengths_L, 1e-300))[:, None]

    def _whitened(self, y_LN: np.ndarray) -> np.ndarray:
        """C^(-1/2) y."""
        axes_NN, lengths_N = self._decomposed()
        return ((y_LN @ axes_NN) / lengths_N) @ axes_NN.T

    def _learn(self, y_LN: np.ndarray) -> None:
        """One update from steps sorted best first."""
        r, n = self._rates, self.dimensions
        step_N = r.weights_L[: r.parents] @ y_LN[: r.parents]  # (41)
        white_LN = self._whitened(y_LN)
        white_step_N = self._whitened(step_N[None])[0]
        gain = math.sqrt(r.c_sigma * (2 - r.c_sigma) * r.mu_eff)
        self._path_sigma_N = (1 - r.c_sigma) * self._path_sigma_N + gain * white_step_N  # (43)
        length = float(np.linalg.norm(self._path_sigma_N))
        settled = math.sqrt(1 - (1 - r.c_sigma) ** (2 * (self.generation + 1)))
        h = float(length / settled < (1.4 + 2 / (n + 1)) * r.length)
        gain = math.sqrt(r.c_c * (2 - r.c_c) * r.mu_eff)
        self._path_c_N = (1 - r.c_c) * self._path_c_N + h * gain * step_N  # (45)
        norms_L = np.maximum((white_LN**2).sum(1), 1e-300)
        weights_L = np.where(r.weights_L >= 0, r.weights_L, r.weights_L * n / norms_L)  # (46)
        lost = (1 - h) * r.c_c * (2 - r.c_c)
        cov_NN = (1 + r.c_1 * lost - r.c_1 - r.c_mu * r.weights_L.sum()) * self._cov_NN  # (47)
        cov_NN += r.c_1 * np.outer(self._path_c_N, self._path_c_N) + r.c_mu * (y_LN.T * weights_L) @ y_LN
        self._cov_NN = np.triu(cov_NN) + np.triu(cov_NN, 1).T
        self.mean_N = self.mean_N + self.sigma * step_N  # (42)
        self.sigma *= math.exp(min(1.0, r.c_sigma / r.d_sigma * (length / r.length - 1)))  # (44)
        self._factors = None

    def _decomposed(self) -> tuple[np.ndarray, np.ndarray]:
        """Axes (columns) and their lengths: C = B D^2 B^T."""
        if self._factors is None:
            squares_N, axes_NN = np.linalg.eigh(self._cov_NN)
            # Rounding can make the smallest negative; 1e-14 of the largest is as thin as double precision can tell.
            squares_N = np.maximum(squares_N, max(squares_N[-1] * 1e-14, 1e-300))
            self._factors = axes_NN, np.sqrt(squares_N)
        return self._factors

    def state(self) -> dict[str, Any]:
        """Everything learned, as plain numbers that JSON keeps exactly."""
        upper = np.triu_indices(self.dimensions)
        return {
            "generation": self.generation,
            "sigma": self.sigma,
            "mean": self.mean_N.tolist(),
            "path_sigma": self._path_sigma_N.tolist(),
            "path_c": self._path_c_N.tolist(),
            "covariance": self._cov_NN[upper].tolist(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on where another of the same dimensions, population and seed was.

        Raises:
            ValueError: the state is of other dimensions.
        """
        n = self.dimensions
        if len(state["mean"]) != n:
            raise ValueError(f"a state of {len(state['mean'])} dimensions, this search has {n}")
        self.generation, self.sigma = int(state["generation"]), float(state["sigma"])
        self.mean_N = np.array(state["mean"], dtype=np.float64)
        self._path_sigma_N = np.array(state["path_sigma"], dtype=np.float64)
        self._path_c_N = np.array(state["path_c"], dtype=np.float64)
        upper_NN = np.zeros((n, n))
        upper_NN[np.triu_indices(n)] = state["covariance"]
        self._cov_NN = np.triu(upper_NN) + np.triu(upper_NN, 1).T
        self._factors = None


def default_population(dimensions: int) -> int:
    """4 + floor(3 ln n), (48)."""
    return 4 + int(3 * math.log(dimensions))


def reflected(x: np.ndarray, low: float, high: float) -> np.ndarray:
    """Mirror values at the bounds, as often as it takes to be inside."""
    width = high - low
    place = np.mod(x - low, 2 * width)
    return np.clip(low + np.minimum(place, 2 * width - place), low, high)
