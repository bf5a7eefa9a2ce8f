"""The grids: rounding as the papers state it, training and packing on the same numbers, gradients straight through."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from forgekit.errors import ArtifactError, ConfigError
from forgekit.quant.config import GroupPlan, TernaryPlan
from forgekit.quant.grid import (
    Ternary,
    fake_activations,
    fake_ternary,
    quantise_activations,
    straight_through,
    ternarise,
    weighted_error,
)
from forgekit.quant.groupwise import fake_groups, round_groups

quick = settings(max_examples=150, deadline=None, derandomize=True)
B158 = TernaryPlan(per="tensor", refit=False)
SCALES = (-41, -30, -9, -3, 0, 3, 9, 30)


@st.composite
def matrices(draw, scales=SCALES, columns=70) -> Tensor:
    """Weights of odd shapes: normal or small integers (ties), rows of very different size, rows and spots of zeros."""
    shape = draw(st.integers(1, 6)), draw(st.integers(1, columns))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    W_RC = random.integers(-4, 5, shape).astype(float) if draw(st.booleans()) else random.normal(size=shape)
    W_RC *= 10.0 ** np.array([[draw(st.sampled_from(scales))] for _ in range(shape[0])])
    W_RC *= random.random(shape) >= draw(st.sampled_from((0, 0.3, 0.7)))
    W_RC *= random.random((shape[0], 1)) >= draw(st.sampled_from((0, 0.5, 1)))
    return torch.from_numpy(W_RC.astype(np.float32))


plans = st.builds(
    TernaryPlan,
    scale=st.sampled_from(("mean", "median")),
    per=st.sampled_from(("channel", "tensor")),
    threshold=st.sampled_from((0.05, 0.3, 0.5, 0.7, 1.0, 1.5, 1.95)),
    refit=st.booleans(),
)
group_plans = st.builds(GroupPlan, bits=st.integers(4, 8), group=st.sampled_from((1, 2, 7, 16, 32, 10**9)))


def bits_of(x: Tensor) -> Tensor:
    """The bytes of the numbers: tells -0 from 0 too."""
    return x.contiguous().view(torch.uint8)


def reference(W_RC: Tensor, plan: TernaryPlan) -> tuple[np.ndarray, np.ndarray]:
    """The definition, one row (or all of them) at a time: codes and scale."""
    w = W_RC.numpy()
    codes, scales = np.zeros(w.shape), np.zeros((len(w), 1), np.float32)
    for rows in [slice(None)] if plan.per == "tensor" else [slice(i, i + 1) for i in range(len(w))]:
        size = np.sort(np.abs(w[rows]), axis=None)
        scale = np.float32(size.mean(dtype=np.float64))
        if plan.scale == "median" and size[(size.size - 1) // 2] > 0:
            scale = size[(size.size - 1) // 2]
        if scale > 0:
            with np.errstate(over="ignore"):
                codes[rows] = np.sign(w[rows]) * (np.abs(w[rows]) / scale > plan.threshold)
        if plan.refit:
            count = np.abs(codes[rows]).sum()
            scale = np.float32((w[rows] * codes[rows]).sum(dtype=np.float64) / count) if count else 0
        scales[rows] = scale
    return codes, scales


def assert_mixed(got: Tensor, w: Tensor, q: Tensor, strength: float) -> None:
    got, w, q = (x.detach().double() for x in (got, w, q))
    assert ((got - (w + strength * (q - w))).abs() <= 1e-6 * (w.abs() + q.abs()) + 1e-44).all()


# Ternary weights


@quick
@given(matrices(), plans)
def test_codes_and_scales_are_the_defined_ones(W_RC, plan):
    got = ternarise(W_RC, plan)
    codes, scales = reference(W_RC, plan)
    assert (got.codes_RC.dtype, got.scale_R1.dtype) == (torch.int8, torch.float32)
    np.testing.assert_array_equal(got.codes_RC.numpy(), codes)
    np.testing.assert_allclose(got.scale_R1.numpy(), scales, rtol=2e-7)
    assert got.scale_R1.isfinite().all() and got.sparsity == pytest.approx((codes == 0).mean())
    torch.testing.assert_close(got.dense(), got.codes_RC.float() * got.scale_R1, rtol=0, atol=0)
    if plan.per == "tensor":
        assert len(got.scale_R1.unique()) == 1


@quick
@given(matrices())
def test_the_plan_of_b158_is_its_formula(W_RC):
    gamma = W_RC.abs().double().mean().float()
    expected = (W_RC / gamma).round().clamp(-1, 1) if gamma else torch.zeros_like(W_RC)
    got = ternarise(W_RC, B158)
    assert torch.equal(got.codes_RC.float(), expected) and got.scale_R1.eq(gamma).all()
    assert torch.equal(got.dense(), expected * gamma)


def test_a_weight_at_half_the_scale_rounds_to_zero_as_torch_rounds():
    W_RC = torch.tensor([[0.5, -0.5, 0.50000006, -0.50000006, 2.0, -1.9999999]])
    assert W_RC.abs().double().mean().float() == 1
    assert ternarise(W_RC, B158).codes_RC.tolist() == [[0, 0, 1, -1, 1, -1]]


@quick
@given(matrices(), plans)
def test_full_strength_is_what_gets_packed_bit_for_bit(W_RC, plan):
    assert torch.equal(bits_of(fake_ternary(W_RC, plan)), bits_of(ternarise(W_RC, plan).dense()))
    assert torch.equal(fake_ternary(W_RC, plan, 0.0), W_RC)


@quick
@given(matrices(), plans, st.floats(0, 1))
def test_strength_mixes_and_the_gradient_passes_through(W_RC, plan, strength):
    W_RC.requires_grad_()
    fake_RC = fake_ternary(W_RC, plan, strength)
    slope_RC = torch.arange(1.0, W_RC.numel() + 1).view_as(W_RC)
    (fake_RC * slope_RC).sum().backward()
    assert torch.equal(W_RC.grad, slope_RC)
    assert_mixed(fake_RC, W_RC, ternarise(W_RC, plan).dense(), strength)


@quick
@given(matrices(scales=SCALES[1:]), plans)
def test_a_refitted_scale_is_the_least_squares_one(W_RC, plan):
    refitted, plain = (ternarise(W_RC, plan.replace(refit=refit)) for refit in (True, False))
    assert torch.equal(refitted.codes_RC, plain.codes_RC)

    def errors(ternary, factor=1.0):
        squares_RC = (W_RC.double() - ternary.codes_RC.double() * ternary.scale_R1.double() * factor).square()
        return squares_RC.sum(1) if plan.per == "channel" else squares_RC.sum()

    for other in (errors(refitted, 0.999), errors(refitted, 1.001), errors(plain) * (1 + 1e-6)):
        assert (errors(refitted) <= other).all()


@quick
@given(matrices(scales=SCALES[1:]), plans)
def test_what_is_on_the_grid_stays_there(W_RC, plan):
    plan = plan.replace(refit=True, threshold=min(plan.threshold, 0.7))
    once = ternarise(W_RC, plan)
    again = ternarise(once.dense(), plan)
    assert torch.equal(again.codes_RC, once.codes_RC) and torch.equal(again.scale_R1, once.scale_R1)


@quick
@given(matrices(scales=(-9, 0, 9)), plans, st.integers(-20, 20))
def test_a_power_of_two_changes_the_scale_and_nothing_else(W_RC, plan, power):
    one, other = ternarise(W_RC, plan), ternarise(W_RC * 2.0**power, plan)
    assert torch.equal(one.codes_RC, other.codes_RC) and torch.equal(one.scale_R1 * 2.0**power, other.scale_R1)
    mirrored = ternarise(-W_RC, plan)
    assert torch.equal(one.codes_RC, -mirrored.codes_RC) and torch.equal(one.scale_R1, mirrored.scale_R1)


@quick
@given(matrices(), plans)
def test_rows_are_strangers_per_channel_and_layout_does_not_matter(W_RC, plan):
    whole = ternarise(W_RC, plan)
    if plan.per == "channel":
        last = ternarise(W_RC[-1:], plan)
        assert torch.equal(last.codes_RC, whole.codes_RC[-1:]) and torch.equal(last.scale_R1, whole.scale_R1[-1:])
    strided = ternarise(W_RC.T.contiguous().T, plan)
    assert torch.equal(strided.codes_RC, whole.codes_RC) and torch.equal(strided.scale_R1, whole.scale_R1)


@pytest.mark.parametrize("refit", [True, False])
@pytest.mark.parametrize("scale", ["mean", "median"])
def test_rows_of_zeros_stay_zeros(scale, refit):
    W_RC = torch.tensor([[0.0, -0.0, 0.0], [3.0, -3.0, 3.0]])
    got = ternarise(W_RC, TernaryPlan(scale=scale, refit=refit))
    assert got.codes_RC.tolist() == [[0, 0, 0], [1, -1, 1]] and got.scale_R1.tolist() == [[0.0], [3.0]]
    nothing = ternarise(W_RC[:1], TernaryPlan(scale=scale, refit=refit, per="tensor"))
    assert not nothing.codes_RC.any() and not nothing.scale_R1.any() and nothing.sparsity == 1


def test_the_median_of_mostly_zeros_gives_way_to_the_mean():
    W_RC = torch.tensor([[0.0, 0.0, 0.0, 2.0, -2.0]])
    got = ternarise(W_RC, TernaryPlan(scale="median"))
    assert got.codes_RC.tolist() == [[0, 0, 0, 1, -1]] and got.scale_R1.item() == 2


def test_the_largest_numbers_neither_overflow_nor_vanish():
    W_RC = torch.tensor([[3.4e38, -3.4e38, 3.4e38, 1e38]])
    got = ternarise(W_RC, TernaryPlan(refit=False))
    assert got.codes_RC.tolist() == [[1, -1, 1, 0]] and got.scale_R1.item() == pytest.approx(2.8e38)
    assert ternarise(W_RC * 0 + 1e-45, TernaryPlan()).dense().eq(1e-45).all()
    lost = ternarise(torch.tensor([[1e-45, 0.0, 0.0, 0.0]]), TernaryPlan())  # its mean is below the least float32
    assert not lost.codes_RC.any() and not lost.scale_R1.any()


@pytest.mark.parametrize(
    ("W_RC", "what"),
    [
        (torch.tensor([[1.0, float("nan")]]), "weights: NaN or infinite"),
        (torch.tensor([[1.0], [float("-inf")]]), "weights: NaN or infinite"),
        (torch.tensor([[1e39]], dtype=torch.float64), "weights: NaN or infinite"),
        (torch.zeros(3), r"weights: shape \(3,\) refused"),
        (torch.zeros(1, 2, 3), r"weights: shape \(1, 2, 3\) refused"),
        (torch.zeros(0, 3), r"weights: shape \(0, 3\) refused"),
        (torch.zeros(3, 0), r"weights: shape \(3, 0\) refused"),
    ],
)
def test_what_is_no_matrix_of_numbers_is_refused(W_RC, what):
    for quantise, plan in ((ternarise, TernaryPlan()), (round_groups, GroupPlan())):
        with pytest.raises(ArtifactError, match=f"^{what}"):
            quantise(W_RC, plan)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
def test_a_weight_that_is_not_finite_reaches_the_loss(value, strength):
    W_RC = torch.ones(3, 40)
    W_RC[1, 7] = value
    for fake_RC in (fake_ternary(W_RC, TernaryPlan(), strength), fake_groups(W_RC, GroupPlan(), strength)):
        assert fake_RC.sum().isnan()


@pytest.mark.parametrize("strength", [-0.01, 1.01, float("nan")])
def test_a_strength_outside_its_range_is_refused(strength):
    for fake, plan in ((fake_ternary, TernaryPlan()), (fake_groups, GroupPlan())):
        with pytest.raises(ConfigError, match="^strength: "):
            fake(torch.ones(2, 2), plan, strength)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_computed_in_float32_and_come_back_as_they_were(dtype):
    W_RC = torch.randn(3, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    dense_RC = ternarise(W_RC.float(), TernaryPlan()).dense()
    assert torch.equal(ternarise(W_RC, TernaryPlan()).dense(), dense_RC)
    assert torch.equal(fake_ternary(W_RC, TernaryPlan()), dense_RC.to(dtype))
    x = fake_activations(W_RC)
    assert x.dtype == dtype and torch.equal(x, fake_activations(W_RC.float()).to(dtype))


def test_a_parameter_gives_codes_without_gradients():
    W_RC = torch.nn.Parameter(torch.randn(3, 5))
    ternary, grouped = ternarise(W_RC, TernaryPlan()), round_groups(W_RC, GroupPlan())
    assert not ternary.dense().requires_grad and not grouped.dense().requires_grad


def test_the_straight_through_value_is_exact_where_the_usual_form_rounds():
    source, value = torch.tensor([1e8], requires_grad=True), torch.tensor([0.1])
    passed = straight_through(value, source)
    passed.sum().backward()
    assert passed.item() == value.item() and source.grad.item() == 1
    assert (source + (value - source).detach()).item() != value.item()


# Activations


@quick
@given(matrices(scales=(-41, -30, -3, 0, 3, 37)))
def test_fake_activations_are_the_codes_times_the_scale_bit_for_bit(x_BC):
    codes_BC, scale_B1 = quantise_activations(x_BC)
    assert (codes_BC.dtype, scale_B1.dtype, scale_B1.shape) == (torch.int8, torch.float32, (len(x_BC), 1))
    assert torch.equal(bits_of(fake_activations(x_BC)), bits_of(codes_BC.float() * scale_B1))
    assert codes_BC.min() >= -127
    error, step = (x_BC.double() - codes_BC.double() * scale_B1.double()).abs(), scale_B1.double()
    assert (error <= step * 0.50001 + 1e-43).all()
    seen = x_BC.abs().amax(1) > 1e-35
    assert (codes_BC[seen].abs().amax(1) == 127).all()
    assert not codes_BC[x_BC.abs().amax(1) == 0].any()


@quick
@given(matrices(scales=(-3, 0, 3)), st.integers(2, 8))
def test_activations_keep_their_gradient_and_their_number_of_levels(x_BC, bits):
    x_BC.requires_grad_()
    fake_BC = fake_activations(x_BC, bits)
    slope_BC = torch.arange(1.0, x_BC.numel() + 1).view_as(x_BC)
    (fake_BC * slope_BC).sum().backward()
    assert torch.equal(x_BC.grad, slope_BC)
    for token in fake_BC.detach():
        assert len(token.unique()) <= 2**bits - 1
    top = x_BC.detach().abs().amax(1)
    torch.testing.assert_close(fake_BC.detach().abs().amax(1), top, rtol=1e-6, atol=0)


def test_tokens_are_scaled_one_by_one_whatever_is_in_front():
    x = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(2)) * torch.tensor([1e-4, 1.0, 1e4])[:, None]
    flat = x.flatten(0, 1)
    assert torch.equal(fake_activations(x).flatten(0, 1), fake_activations(flat))
    assert torch.equal(fake_activations(flat)[4], fake_activations(flat[4]))
    assert torch.equal(quantise_activations(x)[0].flatten(0, 1), quantise_activations(flat)[0])
    assert fake_activations(x, 0) is x


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_token_that_is_not_finite_stays_so_and_harms_no_other(value):
    x_BC = torch.ones(3, 4)
    x_BC[1, 2] = value
    codes_BC, scale_B1 = quantise_activations(x_BC)
    for out_BC in (fake_activations(x_BC), codes_BC * scale_B1):
        torch.testing.assert_close(out_BC[[0, 2]], x_BC[[0, 2]])
        assert out_BC[1].isnan().all()


@pytest.mark.parametrize("bits", [1, 9, -8])
def test_activation_bits_out_of_range_are_refused(bits):
    with pytest.raises(ConfigError, match="^activation_bits: "):
        fake_activations(torch.ones(2, 2), bits)


# Groups


@quick
@given(matrices(scales=(-9, -7, -5, -3, 0, 3)), group_plans)
def test_groups_round_to_the_nearest_step_of_their_own(W_RC, plan):
    got = round_groups(W_RC, plan)
    columns = W_RC.shape[1]
    size = min(plan.group, columns)
    assert (got.codes_RC.dtype, got.scale_RG.dtype) == (torch.int8, torch.float16)
    assert got.codes_RC.shape == W_RC.shape and got.scale_RG.shape == (len(W_RC), -(-columns // size))
    assert got.codes_RC.abs().max() <= plan.top and (got.group, got.bits) == (plan.group, plan.bits)
    assert got.dense().shape == W_RC.shape and got.dense().dtype == torch.float32
    for g in {0, got.scale_RG.shape[1] - 1}:
        part = slice(g * size, (g + 1) * size)
        scale_R1 = got.scale_RG[:, g : g + 1].double()
        dense = got.codes_RC[:, part].double() * scale_R1
        assert torch.equal(got.dense()[:, part].double(), dense.float().double())
        assert ((W_RC[:, part].double() - dense).abs() <= scale_R1 * 0.50001).all()
        top = W_RC[:, part].abs().amax(1, keepdim=True).double()
        # fp16 keeps 11 bits of the scale where it is normal; below 6e-5 its steps are 6e-8.
        assert ((scale_R1 - top / plan.top).abs() <= top / plan.top * 2**-11 + 6e-8).all()
        alone = round_groups(W_RC[:, part], plan)
        assert torch.equal(alone.codes_RC, got.codes_RC[:, part])


@quick
@given(matrices(scales=(-9, -3, 0, 3)), group_plans, st.floats(0, 1))
def test_fake_groups_are_what_gets_packed_and_the_gradient_passes_through(W_RC, plan, strength):
    dense_RC = round_groups(W_RC, plan).dense()
    assert torch.equal(bits_of(fake_groups(W_RC, plan)), bits_of(dense_RC))
    W_RC.requires_grad_()
    fake_RC = fake_groups(W_RC, plan, strength)
    slope_RC = torch.arange(1.0, W_RC.numel() + 1).view_as(W_RC)
    (fake_RC * slope_RC).sum().backward()
    assert torch.equal(W_RC.grad, slope_RC)
    assert_mixed(fake_RC, W_RC, dense_RC, strength)


@quick
@given(matrices(scales=(4,)), group_plans)
def test_rounding_to_groups_twice_is_rounding_once(W_RC, plan):
    once = round_groups(W_RC, plan)
    again = round_groups(once.dense(), plan)
    assert torch.equal(once.codes_RC, again.codes_RC) and torch.equal(once.scale_RG, again.scale_RG)


def test_the_scale_of_a_group_must_fit_fp16():
    assert round_groups(torch.full((1, 3), 65504.0 * 127), GroupPlan()).scale_RG.item() == 65504
    with pytest.raises(ArtifactError, match=r"^weights: magnitudes up to 1e\+07 need a scale beyond fp16"):
        round_groups(torch.full((1, 3), 1e7), GroupPlan())
    tiny = round_groups(torch.tensor([[1e-6, -2e-7, 0.0]]), GroupPlan())
    assert tiny.codes_RC.tolist() == [[17, -3, 0]] and tiny.scale_RG.item() == pytest.approx(6e-8, rel=0.01)


# Calibration


@quick
@given(matrices(scales=(-3, 0, 3)), plans)
def test_the_weighted_error_is_that_of_the_outputs(W_RC, plan):
    ternary = ternarise(W_RC, plan)
    m_C = torch.arange(float(W_RC.shape[1]))
    x_BC = m_C.sqrt().diag().double()  # uncorrelated inputs with exactly these mean squares
    out, off = x_BC @ W_RC.T.double(), x_BC @ (W_RC.double() - ternary.dense()).T
    expected = (off.square().sum() / out.square().sum()).item() if out.any() else 0.0
    assert weighted_error(W_RC, ternary, m_C) == pytest.approx(expected, rel=1e-5, abs=1e-12)


def test_the_weighted_error_of_nothing_is_zero_and_of_something_from_nothing_infinite():
    W_RC = torch.tensor([[1.0, 0.0]])
    off = Ternary(torch.tensor([[1, 1]], dtype=torch.int8), torch.ones(1, 1))
    assert weighted_error(W_RC, off, torch.zeros(2)) == 0
    assert weighted_error(W_RC, off, torch.tensor([0.0, 1.0])) == float("inf")
    assert weighted_error(W_RC, off, torch.tensor([1.0, 0.25])) == 0.25
    assert weighted_error(W_RC, round_groups(W_RC, GroupPlan()), torch.ones(2)) < 1e-6


@pytest.mark.parametrize(
    ("m_C", "what"),
    [
        (torch.ones(3), r"second_moment: \(3,\) for 2 columns"),
        (torch.ones(2, 1), r"second_moment: \(2, 1\) for 2 columns"),
        (torch.tensor([1.0, -1.0]), "second_moment: negative or not finite"),
        (torch.tensor([1.0, float("nan")]), "second_moment: negative or not finite"),
        (torch.tensor([1.0, float("inf")]), "second_moment: negative or not finite"),
    ],
)
def test_moments_that_do_not_fit_are_refused(m_C, what):
    W_RC = torch.ones(3, 2)
    with pytest.raises(ArtifactError, match=f"^{what}"):
        weighted_error(W_RC, ternarise(W_RC, TernaryPlan()), m_C)
    with pytest.raises(ArtifactError, match=r"^quantised weights: \(2, 2\) for weights of \(3, 2\)"):
        weighted_error(W_RC, ternarise(W_RC[:2], TernaryPlan()), torch.ones(2))


# Plans


@pytest.mark.parametrize(
    ("kind", "values", "field"),
    [
        (TernaryPlan, {"threshold": 0.0}, "threshold"),
        (TernaryPlan, {"threshold": 2.0}, "threshold"),
        (TernaryPlan, {"scale": "max"}, "scale"),
        (TernaryPlan, {"per": "group"}, "per"),
        (TernaryPlan, {"activation_bits": 4}, "activation_bits"),
        (TernaryPlan, {"bits": 2}, "bits"),
        (GroupPlan, {"bits": 3}, "bits"),
        (GroupPlan, {"bits": 9}, "bits"),
        (GroupPlan, {"group": 0}, "group"),
    ],
)
def test_plans_refuse_what_cannot_be(kind, values, field):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        kind.build(values)


def test_the_defaults_of_the_plans():
    expected = {
        "scale": "mean",
        "per": "channel",
        "threshold": 0.5,
        "refit": True,
        "activation_bits": 8,
        "sub_norm": False,
        "spared": (),
        "spared_groups": {"bits": 6, "group": 32},
    }
    assert TernaryPlan().model_dump() == expected
    assert GroupPlan().model_dump() == {"bits": 8, "group": 32} and GroupPlan().top == 127
