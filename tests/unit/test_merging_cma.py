"""CMA-ES: convergence on functions with a known optimum, invariances, bounds, and a state that loses no bit."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from agent_forge.merging.cma import CMAES, _Rates, default_population, reflected

ROTATION = np.linalg.qr(np.random.default_rng(0).standard_normal((6, 6)))[0]


def sphere(x):
    return float((x**2).sum())


def ellipsoid(x):
    """Axes of lengths from 1 to 1000."""
    return float((10 ** (6 * np.arange(len(x)) / (len(x) - 1)) * x**2).sum())


def cigar(x):
    """One long axis: the evolution path pays."""
    return float(x[0] ** 2 + 1e6 * (x[1:] ** 2).sum())


def turned(x):
    return ellipsoid(ROTATION @ x)


def rosenbrock(x):
    return float((100 * (x[1:] - x[:-1] ** 2) ** 2 + (1 - x[:-1]) ** 2).sum())


def evaluations(search: CMAES, cost, target: float = 1e-9, most: int = 20_000) -> int:
    """How many points it takes to get below the target."""
    used = 0
    while used < most:
        points = search.ask()
        costs = [cost(x) for x in points]
        used += len(points)
        if min(costs) < target:
            return used
        search.tell(points, [-c for c in costs])
    return most


@pytest.mark.parametrize(
    ("cost", "dimensions", "start", "most"),
    [
        # About a third above the worst of ten seeds.
        (sphere, 10, 1.0, 2300),
        (ellipsoid, 6, 1.0, 3100),
        (turned, 6, 1.0, 2800),
        (rosenbrock, 5, 0.0, 2800),
        (cigar, 8, 1.0, 4600),
    ],
)
def test_it_finds_the_optimum_within_a_known_number_of_evaluations(cost, dimensions, start, most):
    counts = [evaluations(CMAES([start] * dimensions, 0.4, seed=seed), cost) for seed in range(3)]
    assert max(counts) < most, counts


def test_the_parameters_are_the_published_ones():
    rates = _Rates.of(10, 10)  # numbers of the `cma` package 4 for 10 dimensions and 10 points
    weights = [0.456272647, 0.270753097, 0.162231117, 0.085233547, 0.025509592]
    weights += [-0.080012608, -0.221764161, -0.344554942, -0.452864086, -0.549749918]
    np.testing.assert_allclose(rates.weights_L, weights, atol=1e-8)
    learned = [rates.mu_eff, rates.c_1, rates.c_mu, rates.c_c]
    assert learned == pytest.approx([3.167299281, 0.015283825, 0.023551777, 0.294990383])
    assert rates.c_sigma == pytest.approx(5.167299281 / 18.167299281)  # (55); the package adds 3 where it says 5
    assert rates.d_sigma == pytest.approx(1 + rates.c_sigma)


def test_turning_the_coordinates_costs_nothing():
    straight = [evaluations(CMAES([1.0] * 6, 0.4, seed=seed), ellipsoid) for seed in range(3)]
    askew = [evaluations(CMAES(ROTATION.T @ np.ones(6), 0.4, seed=seed), turned) for seed in range(3)]
    assert np.mean(askew) == pytest.approx(np.mean(straight), rel=0.25)


def test_only_the_order_of_values_matters():
    plain, bent = CMAES([1.0] * 4, 0.3, seed=2), CMAES([1.0] * 4, 0.3, seed=2)
    for _ in range(6):
        points = plain.ask()
        plain.tell(points, [-sphere(x) for x in points])
        bent.tell(points, [math.exp(-3 * sphere(x)) for x in points])
    assert plain.state() == bent.state()


def test_shifting_the_start_shifts_everything():
    here, there = CMAES([0.0] * 3, 0.3, seed=1), CMAES([8.0] * 3, 0.3, seed=1)
    for _ in range(5):
        mine, theirs = here.ask(), there.ask()
        np.testing.assert_allclose(mine + 8.0, theirs, rtol=0, atol=1e-12)
        here.tell(mine, [-sphere(x - 1) for x in mine])
        there.tell(theirs, [-sphere(x - 9) for x in theirs])


def test_the_covariance_learns_the_shape():
    search = CMAES([1.0] * 4, 0.3, seed=0)
    evaluations(search, ellipsoid, target=1e-12)
    assert search.deviations[0] / search.deviations[3] == pytest.approx(1000, rel=0.7)


def test_it_agrees_with_the_reference_implementation():
    cma = pytest.importorskip("cma")
    options = {"verbose": -9, "ftarget": 1e-9, "tolfun": 0, "tolfunhist": 0, "tolx": 0}
    for cost in (sphere, turned):
        ours = [evaluations(CMAES([1.0] * 6, 0.4, seed=seed), cost) for seed in range(5)]
        theirs = []
        for seed in range(1, 6):
            reference = cma.CMAEvolutionStrategy([1.0] * 6, 0.4, {**options, "seed": seed})
            theirs.append(reference.optimize(cost).result.evaluations)
        assert np.mean(ours) < 1.15 * np.mean(theirs)


# Draws and state


def test_asking_twice_gives_the_same_points_and_another_seed_gives_others():
    search = CMAES([0.0] * 3, 0.5, seed=4)
    assert (search.ask() == search.ask()).all()
    assert (search.ask() != CMAES([0.0] * 3, 0.5, seed=5).ask()).all()
    before = search.ask()
    search.tell(before, [0.0] * len(before))
    assert (search.ask() != before).all()


def test_a_restored_state_goes_on_to_the_same_bits():
    one = CMAES([0.2] * 5, 0.3, population=6, seed=9, bounds=(-1, 1))
    for _ in range(4):
        points = one.ask()
        one.tell(points, [-rosenbrock(x) for x in points])
    other = CMAES([0.2] * 5, 0.3, population=6, seed=9, bounds=(-1, 1))
    other.ask()
    other.restore(json.loads(json.dumps(one.state(), allow_nan=False)))
    for _ in range(4):
        assert one.ask().tobytes() == other.ask().tobytes()
        for search in (one, other):
            points = search.ask()
            search.tell(points, [-rosenbrock(x) for x in points])
    assert one.state() == other.state()


def test_a_state_of_other_dimensions_is_refused():
    with pytest.raises(ValueError, match="a state of 3 dimensions, this search has 4"):
        CMAES([0.0] * 4, 1.0).restore(CMAES([0.0] * 3, 1.0).state())


# Bounds


@pytest.mark.parametrize("sigma", [0.1, 1.0, 30.0])
def test_no_point_leaves_the_bounds(sigma):
    search = CMAES([0.9, -0.9, 0.0], sigma, seed=3, bounds=(-1.0, 1.0))
    for _ in range(10):
        points = search.ask()
        assert points.min() >= -1 and points.max() <= 1
        search.tell(points, [x[0] - x[1] for x in points])


def test_an_optimum_in_a_corner_is_found():
    search = CMAES([0.0] * 4, 0.3, seed=1, bounds=(-1.0, 1.0))
    for _ in range(60):
        points = search.ask()
        search.tell(points, [x.sum() for x in points])
    assert search.ask().sum(1).max() > 3.9


def test_reflection_mirrors_and_keeps_what_is_inside():
    values = np.array([-1.25, -0.5, 0.25, 1.5, 3.25])
    np.testing.assert_allclose(reflected(values, 0.0, 1.0), [0.75, 0.5, 0.25, 0.5, 0.75])
    assert reflected(np.array([0.0, 1.0]), 0.0, 1.0).tolist() == [0.0, 1.0]


# Bad input


def test_nan_is_worst_wherever_it_stands():
    one, other = CMAES([0.0] * 3, 0.5, population=6, seed=1), CMAES([0.0] * 3, 0.5, population=6, seed=1)
    points = one.ask()
    one.tell(points, [1.0, float("nan"), 3.0, 2.0, 5.0, 4.0])
    other.tell(points, [1.0, -9.0, 3.0, 2.0, 5.0, 4.0])
    assert one.state() == other.state()


def test_a_point_from_far_away_does_not_tear_the_search_apart():
    search = CMAES([0.0] * 4, 0.1, population=8, seed=0)
    points = search.ask()
    points[0] = 1e6
    search.tell(points, [1.0, *np.zeros(7)])
    assert np.linalg.norm(search.mean_N) < 1.0 and search.sigma < 0.3


def test_equal_values_and_a_collapsed_step_do_no_harm():
    search = CMAES([0.0] * 3, 1e-3, population=2, seed=0)
    for _ in range(300):
        points = search.ask()
        search.tell(points, [1.0, 1.0])
    assert np.isfinite(search.ask()).all() and np.isfinite(search.sigma)


def test_a_covariance_that_lost_an_axis_to_rounding_is_usable():
    search = CMAES([0.0] * 2, 1.0, population=4)
    search.restore({**search.state(), "covariance": [1.0, 1.0, 1.0 - 1e-15]})
    for _ in range(3):
        points = search.ask()
        search.tell(points, list(range(4)))
    assert np.isfinite(search.ask()).all() and np.isfinite(search.sigma)


def test_default_population():
    assert [default_population(n) for n in (1, 2, 10, 60)] == [4, 6, 10, 16]
    assert len(CMAES([0.0] * 10, 1.0).ask()) == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mean": []}, "no point"),
        ({"mean": [float("nan")]}, "no point"),
        ({"sigma": 0.0}, "not above zero"),
        ({"population": 1}, "a population of one cannot evolve"),
        ({"bounds": (1.0, -1.0)}, "outside the bounds"),
        ({"mean": [2.0], "bounds": (0.0, 1.0)}, "outside the bounds"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        CMAES(**{"mean": [0.0, 0.0], "sigma": 1.0, **arguments})


def test_a_value_too_few_is_refused():
    search = CMAES([0.0] * 2, 1.0, population=4)
    with pytest.raises(ValueError, match="4 of 2 dimensions were asked"):
        search.tell(search.ask(), [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="were asked"):
        search.tell(search.ask()[:3], [1.0, 2.0, 3.0])
