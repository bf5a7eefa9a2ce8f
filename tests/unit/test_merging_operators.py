"""Merge methods on the tensors of one name: published definitions, equalities, symmetry, seeds, refusals."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_forge.merging import MERGERS
from agent_forge.merging.operators import (
    BLOCK,
    TensorGroup,
    fusion_shares,
    gram,
    merge_tensor,
    stream,
    weighted_sum,
)
from agent_forge.merging.operators_layers import in_layer, layer_count, layer_of, layout, stacked_config
from forgekit.errors import ArtifactError, ConfigError
from tests.unit.tiny import trm_config

NAME = "blocks.1.ffn.up.weight"
OPTIONS = {"frankenmerge": {"choices": [0, 1]}, "passthrough": {"slices": [{"model": 0, "start": 0, "stop": 2}]}}
COMPUTING = [name for name in MERGERS if not MERGERS.get(name).needs.structure]
WITH_BASE = [name for name in MERGERS if MERGERS.get(name).needs.base]
SYMMETRIC = [name for name in COMPUTING if name != "slerp" and not MERGERS.get(name).needs.random]
RANDOM = [name for name in MERGERS if MERGERS.get(name).needs.random]


def noise(seed: int, *shape: int, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def siblings(count: int = 3, shape=(7, 5), spread: float = 0.1, dtype=torch.float32):
    """A base and models a little away from it."""
    base = noise(0, *shape)
    return base.to(dtype), [(base + spread * noise(i, *shape)).to(dtype) for i in range(1, count + 1)]


def merge(method: str, models, base=None, importances=None, seed=0, name=NAME, **options) -> torch.Tensor:
    merger = MERGERS.get(method)
    if merger.needs.importances == "required" and importances is None:
        importances = [noise(90 + i, *m.shape).square() + 0.1 for i, m in enumerate(models)]
    group = TensorGroup(name, models, base, importances, seed)
    return merge_tensor(merger, group, merger.build({**OPTIONS.get(method, {}), **options}))


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


# The registry


def test_every_method_of_the_house_is_there_and_dare_means_dare_linear():
    assert MERGERS.names() == [
        "linear", "slerp", "karcher", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs",
        "model_stock", "fisher", "dfs", "frankenmerge", "passthrough",
    ]  # fmt: skip
    assert MERGERS.get("dare") is MERGERS.get("dare_linear")
    assert all(MERGERS.get(name).name == name for name in MERGERS)
    with pytest.raises(ConfigError, match="unknown merge_method 'tie'; .*did you mean ties"):
        MERGERS.get("tie")


def test_names_options_and_needs_load_no_torch():
    code = (
        "import sys; from agent_forge.merging import MERGERS; assert 'pydantic' not in sys.modules;"
        "import agent_forge.merging.check; m = MERGERS.get('ties'); m.build({'density': 0.3}); assert m.needs.base;"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules), 'heavy'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Merging a model with itself, nothing learned, ends of the line


@pytest.mark.parametrize("method", MERGERS.names())
def test_a_model_merged_with_itself_is_itself(method):
    _, (model, *_) = siblings()
    exact = method not in ("linear", "karcher", "fisher", "dfs", "slerp")
    merged = merge(method, [model] * 3, base=model, drop_rate=0.5) if method in RANDOM else merge(
        method, [model] * 3, base=model
    )  # fmt: skip
    assert torch.equal(merged, model) if exact else torch.allclose(merged, model, rtol=1e-6, atol=1e-7)
    assert merged.data_ptr() != model.data_ptr()


@pytest.mark.parametrize("method", ["linear", "karcher", "fisher", "dfs", "slerp", "ties", "model_stock"])
def test_copies_of_a_model_away_from_the_base_give_the_model(method):
    base, (model, *_) = siblings()
    options = {"density": 1.0} if method == "ties" else {}
    close(merge(method, [model] * 3, base=base, **options), model, 1e-6)


@pytest.mark.parametrize("method", WITH_BASE)
def test_a_zero_task_vector_gives_the_base_exactly(method):
    base, _ = siblings()
    assert torch.equal(merge(method, [base.clone(), base.clone()], base=base), base)


@pytest.mark.parametrize("method", MERGERS.names())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_shape_and_dtype_are_those_of_the_first_model(method, dtype):
    base, models = siblings(dtype=dtype)
    models[1] = models[1].to(torch.float32)
    merged = merge(method, models, base=base.to(torch.float32))
    assert merged.dtype == dtype and merged.shape == models[0].shape


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (0,), (0, 3), (3, 1, 2)])
@pytest.mark.parametrize("method", MERGERS.names())
def test_shapes_at_the_edge(method, shape):
    base, models = siblings(shape=shape)
    merged = merge(method, models, base=base)
    assert merged.shape == torch.Size(shape) and bool(merged.isfinite().all())


@pytest.mark.parametrize("method", COMPUTING)
def test_eight_bits_are_merged_and_their_nan_is_found(method):
    base, models = siblings(dtype=torch.float8_e4m3fn)
    merged = merge(method, models, base=base)
    assert merged.dtype == torch.float8_e4m3fn and bool(merged.float().isfinite().all())
    models[1].view(torch.uint8)[2, 3] = 0x7F
    with pytest.raises(ArtifactError, match="model 1: tensor .* holds 1 of 35 values"):
        merge(method, models, base=base)


@pytest.mark.parametrize("method", COMPUTING)
def test_inputs_stay_as_they_are(method):
    base, models = siblings()
    before = [t.clone() for t in (base, *models)]
    merge(method, models, base=base)
    assert all(torch.equal(a, b) for a, b in zip(before, (base, *models)))


@pytest.mark.parametrize("method", COMPUTING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_narrow_and_wide_types_are_computed_in_working_precision_and_rounded_once(method, dtype):
    """Buffers and direct writes give what whole tensors of the working precision give."""
    base, models = siblings(shape=(3, 50), dtype=dtype)
    work = torch.promote_types(dtype, torch.float32)
    matters = [noise(30 + i, 3, 50).square() for i in range(3)] if method in ("fisher", "dfs") else None
    wide = merge(method, [m.to(work) for m in models], base=base.to(work), importances=matters)
    assert torch.equal(merge(method, models, base=base, importances=matters), wide.to(dtype))


def test_computing_goes_block_by_block_without_a_seam():
    """A tensor longer than a block equals its parts merged alone, where a method works entry by entry."""
    count = BLOCK + 1000
    base, models = siblings(shape=(count,))
    cut = BLOCK - 7
    for method in ("linear", "task_arithmetic", "ties", "fisher"):
        options = {"density": 1.0} if method == "ties" else {}
        matters = [noise(i, count).square() for i in (4, 5, 6)] if method == "fisher" else None
        options |= {"floor": 0} if method == "fisher" else {}
        whole = merge(method, models, base=base, importances=matters, **options)
        for part in (slice(0, cut), slice(cut, count)):
            some = [f[part] for f in matters] if matters else None
            assert torch.equal(
                whole[part], merge(method, [m[part] for m in models], base=base[part], importances=some, **options)
            )


# Symmetry


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SYMMETRIC), st.permutations(range(3)), st.lists(st.floats(0.1, 5), min_size=3, max_size=3))
def test_order_of_the_models_does_not_matter(method, order, weights):
    base, models = siblings()
    matters = [noise(20 + i, 7, 5).square() for i in range(3)] if method in ("fisher", "dfs") else None
    weighted = "weights" in MERGERS.get(method).options.model_fields
    first = merge(method, models, base=base, importances=matters, **({"weights": weights} if weighted else {}))
    options = {"weights": [weights[i] for i in order]} if weighted else {}
    some = [matters[i] for i in order] if matters else None
    close(merge(method, [models[i] for i in order], base=base, importances=some, **options), first)


def test_slerp_of_two_is_symmetric_in_t():
    _, (a, b, _) = siblings(spread=2.0)
    close(merge("slerp", [a, b], t=0.3), merge("slerp", [b, a], t=0.7))


# Linear, SLERP, Karcher


def test_linear_is_the_weighted_average():
    _, models = siblings()
    want = (models[0] + 3 * models[1] - models[2]) / 3
    close(merge("linear", models, weights=[1, 3, -1]), want)


def test_weights_may_differ_by_layer():
    _, models = siblings()
    rows = {"layer_weights": [[1, 0, 0], [0, 0, 2]], "weights": [0, 1, 0]}
    for name, want in ((NAME, models[2]), ("blocks.0.x", models[0]), ("norm.weight", models[1])):
        assert torch.equal(merge("linear", models, name=name, **rows), want)


@settings(max_examples=25, deadline=None)
@given(st.floats(0, 1), st.integers(0, 1000))
def test_slerp_stays_on_the_sphere_and_divides_the_angle(t, seed):
    a, b = (torch.nn.functional.normalize(noise(seed + i, 40).double(), dim=0) for i in (0, 1))
    merged = merge("slerp", [a, b], t=t)
    angle = math.acos(float(a @ b))
    assert float(merged.norm()) == pytest.approx(1, abs=1e-9)
    assert math.acos(min(1.0, float(merged @ a))) == pytest.approx(t * angle, abs=1e-6)


def test_slerp_at_its_ends_returns_them_exactly():
    _, (a, b, _) = siblings(spread=1.0)
    assert torch.equal(merge("slerp", [a, b], t=0), a) and torch.equal(merge("slerp", [a, b], t=1), b)


def test_slerp_of_nearly_parallel_tensors_is_the_straight_line():
    base, _ = siblings()
    other = base * 1.5 + 1e-4 * noise(9, 7, 5)
    close(merge("slerp", [base, other], t=0.25), torch.lerp(base, other, 0.25), 1e-6)
    close(merge("slerp", [base, -base], t=0.25), base * 0.5)
    close(merge("slerp", [base, torch.zeros_like(base)], t=0.25), base * 0.75)


def test_slerp_folds_pairwise():
    _, models = siblings(spread=2.0)
    inner = merge("slerp", models[:2], t=0.3)
    close(merge("slerp", models, t=[0.3, 0.6]), merge("slerp", [inner, models[2]], t=0.6))


def test_karcher_of_two_equal_lengths_is_slerp_halfway():
    a, b = (torch.nn.functional.normalize(noise(i, 30), dim=0) for i in (1, 2))
    close(merge("karcher", [a, b]), merge("slerp", [a, b], t=0.5), 1e-6)


def test_karcher_mean_is_the_point_where_the_logarithms_cancel():
    models = [noise(i, 30).double() for i in (1, 2, 3)]
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.double)
    merged = merge("karcher", models, weights=weights.tolist())
    assert float(merged.norm()) == pytest.approx(float(sum(w * m.norm() for w, m in zip(weights, models))))
    mean = merged / merged.norm()
    pull = torch.zeros_like(mean)
    for weight, model in zip(weights, models):
        unit = model / model.norm()
        angle = torch.arccos(unit @ mean)
        pull += weight * angle / torch.sin(angle) * (unit - (unit @ mean) * mean)
    assert float(pull.norm()) < 1e-9


def test_karcher_without_a_direction_falls_back():
    a = noise(1, 30)
    close(merge("karcher", [a, -a]), torch.zeros(30))
    assert torch.equal(merge("karcher", [torch.zeros(3), torch.zeros(3)]), torch.zeros(3))
    close(merge("karcher", [a, torch.zeros(30)]), a / 2)


def test_inner_products_are_exact_where_float32_is_not():
    a = torch.full((300_000,), 0.1)
    b = a.clone()
    b[0] += 1e-3
    want = [[x.double() @ y.double() for y in (a, b)] for x in (a, b)]
    np.testing.assert_allclose(gram([a, b]), np.array(want, dtype=float), rtol=1e-12)
    np.testing.assert_allclose(gram([b], a), [[float((b.double() - a.double()).square().sum())]], rtol=1e-12)


# Task vectors


def test_task_arithmetic_is_base_plus_the_sum():
    base, models = siblings()
    want = base + 0.7 * sum(w * (m - base) for w, m in zip((1, -2, 0.5), models))
    close(merge("task_arithmetic", models, base=base, lam=0.7, weights=[1, -2, 0.5]), want)


@settings(max_examples=20, deadline=None)
@given(st.floats(-2, 2), st.lists(st.floats(-2, 2), min_size=3, max_size=3))
def test_dare_that_drops_nothing_is_task_arithmetic(lam, weights):
    base, models = siblings()
    told = {"base": base, "lam": lam, "weights": weights}
    assert torch.equal(merge("dare", models, drop_rate=0, **told), merge("task_arithmetic", models, **told))


def test_dropping_nothing_leaves_the_consensus_of_ties():
    base, models = siblings()
    want = merge("ties", models, base=base, density=1)
    assert torch.equal(merge("dare_ties", models, base=base, drop_rate=0), want)
    assert torch.equal(merge("della", models, base=base, drop_rate=0, epsilon=0), want)


def test_dare_drops_its_share_and_keeps_the_mean():
    base = torch.zeros(400, 500)
    merged = merge("dare", [torch.ones(400, 500)], base=base, drop_rate=0.9, lam=1)
    assert merged.unique().tolist() == pytest.approx([0, 10])
    assert float(merged.mean()) == pytest.approx(1, abs=0.04)


def test_ties_follows_the_paper():
    """Trim, elect by summed mass, mean of those that agree; worked out by hand."""
    base = torch.zeros(5)
    models = [torch.tensor([4.0, -1, 3, 0, 0.1]), torch.tensor([-1.0, -5, 2, 0, 0]), torch.tensor([-1.0, 9, 0.5, 0, 0])]
    merged = merge("ties", models, base=base, density=0.4)  # two of five are kept
    assert merged.tolist() == [4.0, 9.0, 2.5, 0, 0]
    whole = merge("ties", models, base=base, density=1)
    assert whole.tolist() == pytest.approx([4.0, 9.0, 5.5 / 3, 0, 0.1])


def test_ties_that_trims_nothing_and_agrees_everywhere_is_the_mean():
    base = noise(0, 7, 5)
    models = [base + noise(i, 7, 5).abs() for i in (1, 2, 3)]
    merged = merge("ties", models, base=base, density=1, weights=[1, 2, 3])
    close(merged, merge("linear", models, weights=[1, 2, 3]))


def test_masses_that_cancel_elect_no_sign():
    base = torch.ones(2)
    assert merge("ties", [base + 1, base - 1], base=base, density=1).tolist() == [1, 1]
    total = merge("ties", [base + 1, base + 2], base=base, density=1, normalize=False)
    assert total.tolist() == [4, 4]


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 1), st.integers(1, 200))
def test_ties_of_one_model_keeps_the_largest(density, count):
    base, model = torch.zeros(count), noise(count, count)
    merged = merge("ties", [model], base=base, density=density)
    kept = max(1, math.floor(density * count + 1e-9))
    assert int((merged != 0).sum()) == kept
    assert sorted(merged.abs().tolist())[-kept:] == sorted(model.abs().tolist())[-kept:]


def test_breadcrumbs_drops_both_tails():
    model = torch.tensor([-1.0, 2, 3, -4, 5, 6, 7, 8, 9, -100])
    merged = merge("breadcrumbs", [model], base=torch.zeros(10), low=0.3, high=0.2, lam=1)
    assert merged.tolist() == [0, 0, 0, -4, 5, 6, 7, 8, 0, 0]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3000), st.floats(0, 0.6), st.floats(0, 0.39), st.integers(0, 9))
def test_breadcrumbs_keeps_the_middle_of_any_tensor(count, low, high, seed):
    model = noise(seed, count)
    merged = merge("breadcrumbs", [model], base=torch.zeros(count), low=low, high=high, lam=1)
    ranked = sorted(model.abs().tolist())
    kept = ranked[math.floor(low * count + 1e-9) : count - math.floor(high * count + 1e-9)]
    assert sorted(merged[merged != 0].abs().tolist()) == kept


def test_della_drops_small_values_of_a_row_more_often():
    row = torch.arange(1.0, 101)
    merged = merge("della", [row.repeat(2000, 1)], base=torch.zeros(2000, 100), drop_rate=0.5, epsilon=0.4)
    kept = (merged != 0).float().mean(0)
    want = 1 - (0.9 - 0.8 * torch.arange(100) / 99)
    close(kept, want, 0.06)
    close(merged.mean(0) / row, torch.ones(100), 0.3)
    filled = merged[1234][merged[1234] != 0]
    close(filled, (row / want)[merged[1234] != 0])


def test_model_stock_follows_the_angle():
    base = torch.zeros(3)
    models = [torch.tensor([1.0, 0, 0]), torch.tensor([1.0, 1, 0])]
    cosine = 1 / math.sqrt(2)
    t = 2 * cosine / (1 + cosine)
    close(merge("model_stock", models, base=base), t * torch.tensor([1.0, 0.5, 0]))
    assert torch.equal(merge("model_stock", [models[0], -models[0]], base=base), base)


# Importance


def test_fisher_is_the_importance_weighted_average():
    _, models = siblings()
    matters = [noise(i, 7, 5).square() for i in (4, 5, 6)]
    want = sum(f * m for f, m in zip(matters, models)) / sum(matters)
    close(merge("fisher", models, importances=matters, floor=0), want)
    close(merge("fisher", models, importances=[torch.ones(7, 5)] * 3), merge("linear", models))


def test_the_floor_is_a_share_of_the_mean_importance():
    models = [torch.tensor([1.0, 1.0]), torch.tensor([3.0, 3.0])]
    matters = [torch.tensor([4.0, 0.0]), torch.tensor([0.0, 4.0])]  # mean 2, so the floor is 1
    merged = merge("fisher", models, importances=matters, floor=0.5)
    close(merged, torch.tensor([(4 * 1 + 1 * 3) / 5, (1 * 1 + 4 * 3) / 5]))


def test_entries_that_matter_to_nobody_are_averaged():
    _, models = siblings()
    matters = [torch.zeros(7, 5) for _ in models]
    matters[1][0] = 1
    for floor in (0, 1e-6):
        merged = merge("fisher", models, importances=matters, weights=[2, 1, 1], floor=floor)
        close(merged[1:], merge("linear", models, weights=[2, 1, 1])[1:])
        close(merged[0], models[1][0], 1e-4)


def test_fusion_shares_follow_importance():
    base, models = siblings()
    options = MERGERS.get("dfs").options

    def shares(importances=None, base=None, **told):
        return fusion_shares(TensorGroup(NAME, models, base, importances), options(**told))

    matters = [torch.full((7, 5), value) for value in (1.0, 2.0, 5.0)]
    assert shares(matters, rule="normalised") == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    soft = torch.softmax(torch.tensor([1.0, 2, 5]) / (8 / 3) / 0.5, 0).tolist()
    assert shares(matters, temperature=0.5) == pytest.approx(soft)
    assert shares(matters, temperature=1e-3) == pytest.approx([0, 0, 1])
    assert shares(matters, temperature=1e9) == pytest.approx([1 / 3] * 3)
    assert shares(matters, temperature=1e9, weights=[1, 1, 2]) == pytest.approx([1 / 4, 1 / 4, 1 / 2])
    moved = [float((m - base).norm()) for m in models]
    assert shares(base=base, rule="normalised") == pytest.approx([d / sum(moved) for d in moved], rel=1e-5)
    assert shares() == pytest.approx([1 / 3] * 3)


# Randomness


@pytest.mark.parametrize("method", RANDOM)
def test_the_seed_decides_and_nothing_else(method):
    base, models = siblings(shape=(40, 30))
    first = merge(method, models, base=base, seed=3)
    merge(method, models, base=base, seed=3, name="another")  # a visit in between changes nothing
    torch.manual_seed(99)
    assert torch.equal(merge(method, models, base=base, seed=3), first)
    assert not torch.equal(merge(method, models, base=base, seed=4), first)
    assert not torch.equal(merge(method, models, base=base, seed=3, name="another"), first)


@pytest.mark.parametrize("method", MERGERS.names())
def test_bits_do_not_depend_on_the_number_of_threads(method):
    base, models = siblings(shape=(300, 200))
    one = merge(method, models, base=base)
    torch.set_num_threads(2)
    try:
        assert torch.equal(merge(method, models, base=base), one)
    finally:
        torch.set_num_threads(1)


def test_inner_products_do_not_depend_on_the_number_of_threads():
    vectors = [noise(i, 200_000) for i in range(3)]
    one = gram(vectors)
    torch.set_num_threads(2)
    try:
        assert np.array_equal(gram(vectors), one)
    finally:
        torch.set_num_threads(1)


def test_streams_are_independent_and_do_not_move():
    assert stream(1, "a", 0).random() != stream(1, "a", 1).random() != stream(1, "b", 0).random()
    assert stream(7, "norm.weight", 2).random(3).tolist() == stream(7, "norm.weight", 2).random(3).tolist()


# Integers, structure


def test_integers_are_taken_over_where_all_agree():
    mask = torch.tensor([1, 2, 3])
    for method in COMPUTING:
        assert torch.equal(merge(method, [mask, mask.clone()], base=mask.clone(), importances=None), mask)
    flags = torch.tensor([True, False])
    assert torch.equal(merge("linear", [flags, flags]), flags)
    assert torch.equal(merge("frankenmerge", [mask, mask + 1]), mask + 1)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("blocks.3.attn.wq.weight", 3),
        ("model.layers.12.mlp.experts.5.up_proj.weight", 12),
        ("transformer.h.0.ln_1.bias", 0),
        ("0.weight", 0),
        ("norm.weight", None),
        ("ln2.weight", None),
    ],
)
def test_the_layer_is_the_first_number_of_a_name(name, layer):
    assert layer_of(name) == layer


def test_a_tensor_moves_to_another_layer_by_its_first_number():
    assert in_layer("layers.12.mlp.experts.5.up", 3) == "layers.3.mlp.experts.5.up"
    assert in_layer("0.weight", 10) == "10.weight"


def test_frankenmerge_takes_every_layer_from_its_model():
    _, models = siblings()
    told = {"choices": [1, 2], "outside": 1}
    assert torch.equal(merge("frankenmerge", models, name="blocks.0.x", **told), models[1])
    assert torch.equal(merge("frankenmerge", models, name="blocks.1.x", **told), models[2])
    assert torch.equal(merge("frankenmerge", models, name="norm.weight", **told), models[1])


def test_stacked_layers_are_renamed_in_order():
    slices = [{"model": 0, "start": 0, "stop": 2}, {"model": 1, "start": 1, "stop": 2}]
    options = MERGERS.get("passthrough").build({"slices": slices, "outside": 1})
    names = ["emb", "layers.0.a", "layers.0.b", "layers.1.a"]
    entries = layout(options, [names, names])
    assert [(e.name, e.sources[0]) for e in entries] == [
        ("emb", (1, "emb")), ("layers.0.a", (0, "layers.0.a")), ("layers.0.b", (0, "layers.0.b")),
        ("layers.1.a", (0, "layers.1.a")), ("layers.2.a", (1, "layers.1.a")),
    ]  # fmt: skip
    assert layer_count(e.name for e in entries) == 3
    config = {"num_hidden_layers": 2, "layer_types": ["full", "window"], "eos_token_id": [1, 2]}
    other = {**config, "layer_types": ["full", "linear"]}
    want = {"num_hidden_layers": 3, "layer_types": ["full", "linear", "linear"], "eos_token_id": [1, 2]}
    assert stacked_config(options, [{**config, "layer_types": ["full", "linear"]}, other]) == want
    nested = stacked_config(options, [{"text_config": config}, {"text_config": other}])
    assert nested["text_config"]["num_hidden_layers"] == 3
    with pytest.raises(ConfigError, match=r"config.json: tells no depth"):
        stacked_config(options, [{}, {}])
    empty = [["emb"], ["emb"]]
    with pytest.raises(ArtifactError, match="model 0: layer 0 has no tensors"):
        layout(options, empty)


def test_a_stacked_config_of_ours_keeps_its_memories():
    slices = [{"model": 0, "start": 1, "stop": 2}, {"model": 0, "start": 0, "stop": 2}]
    options = MERGERS.get("passthrough").build({"slices": slices})
    forge = trm_config().model_dump(mode="json")
    config = stacked_config(options, [{"num_hidden_layers": 2, "forge": forge}])
    assert config["forge"]["n_layers"] == config["num_hidden_layers"] == 3
    assert config["forge"]["memory_layers"] == [0, 2]


def test_a_factor_of_zero_leaves_its_tensor_out():
    good, bad = torch.ones(3), torch.full((3,), math.nan)
    assert torch.equal(weighted_sum([good, bad], [1, 0], torch.float32), good)


# Refusals


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_named(value):
    base, models = siblings()
    models[1][3, 2] = value
    message = f"model 1: tensor {NAME} holds 1 of 35 values that are NaN or infinite; use a checkpoint from before"
    with pytest.raises(ArtifactError, match=message):
        merge("ties", models, base=base)
    base[0, 0] = value
    with pytest.raises(ArtifactError, match="base: tensor"):
        merge("task_arithmetic", models[:1], base=base)
    with pytest.raises(ArtifactError, match="the passthrough result: tensor"):
        merge("passthrough", [models[1]])


def test_a_result_beyond_its_type_is_named():
    big = torch.full((4,), 60000.0, dtype=torch.float16)
    with pytest.raises(
        ArtifactError, match="the task_arithmetic result: tensor .* holds 4 of 4 .*; lower the weights or lam"
    ):
        merge("task_arithmetic", [big], base=torch.zeros(4), lam=2.0)
    assert torch.equal(merge("linear", [big.repeat(9)] * 2), big.repeat(9)), "a sum too large is no bad value"


def test_integers_that_differ_are_refused():
    a = torch.tensor([1, 2])
    with pytest.raises(ArtifactError, match=r"model 1: .* \(int64\) differs from that of model 0; integers cannot"):
        merge("linear", [a, a + 1])
    with pytest.raises(ArtifactError, match="base: .*differs from that of model 0"):
        merge("linear", [a, a], base=a + 1)
    with pytest.raises(ArtifactError, match="model 1: .* is int64, in model 0 it is not"):
        merge("linear", [a.float(), a])


def test_importances_that_do_not_fit_are_refused():
    _, models = siblings()
    good = torch.ones(7, 5)
    with pytest.raises(ArtifactError, match=r"importances of model 2: .* has shape \(5,\), the model's is \(7, 5\)"):
        merge("fisher", models, importances=[good, good, torch.ones(5)])
    with pytest.raises(ArtifactError, match="importances of model 0: .* holds -1; an importance is zero or more"):
        merge("fisher", models, importances=[-good, good, good])
