import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from forgekit.compute.budget import BatchPlan, adaptive_batch, plan_batch, training_bytes
from forgekit.compute.ladder import is_out_of_memory, next_plan
from forgekit.errors import ConfigError


def test_training_bytes_of_adamw_in_fp32():
    assert training_bytes(1000, 50, 8, optimizer_slots=2) == 4 * 4 * 1000 + 4 * 50 * 8
    assert training_bytes(1000, 50, 8, optimizer_slots=1, dtype_bytes=2) == 2 * 3 * 1000 + 2 * 50 * 8


@pytest.mark.parametrize(
    "free, wanted, expected",
    [(1000, 48, 48), (600, 48, 48), (599, 48, 32), (100, 48, 8), (13, 48, 1), (0, 48, 1), (-50, 48, 1)],
)
def test_adaptive_batch_keeps_a_margin_and_prefers_powers_of_two(free, wanted, expected):
    assert adaptive_batch(free, per_sample_bytes=10, wanted=wanted) == expected


def test_adaptive_batch_without_margin():
    assert adaptive_batch(480, 10, 48, safety=1.0) == 48


@pytest.mark.parametrize("per_sample, wanted, field", [(0, 8, "per_sample_bytes"), (10, 0, "wanted")])
def test_adaptive_batch_refuses_nothing(per_sample, wanted, field):
    with pytest.raises(ConfigError, match=field):
        adaptive_batch(100, per_sample, wanted)


def test_plan_divides_the_batch_exactly():
    assert plan_batch(64, 10_000, 0, 100) == BatchPlan(micro_batch=64)
    assert plan_batch(64, 3_000, 1_000, 100) == BatchPlan(micro_batch=16, accumulate=4)
    assert plan_batch(48, 5_000, 0, 100) == BatchPlan(micro_batch=24, accumulate=2)


def test_plan_recomputes_activations_where_not_one_sequence_fits():
    plan = plan_batch(4, free_bytes=100, fixed_bytes=50, per_sample_bytes=60, device="cuda")
    assert plan == BatchPlan(micro_batch=1, accumulate=4, checkpoint_activations=True, device="cuda")
    assert not plan_batch(4, free_bytes=110, fixed_bytes=50, per_sample_bytes=60).checkpoint_activations


@given(st.integers(1, 300), st.integers(0, 10**6), st.integers(0, 10**5), st.integers(1, 10**5))
def test_a_plan_always_covers_the_wanted_batch(wanted, free, fixed, per_sample):
    plan = plan_batch(wanted, free, fixed, per_sample)
    assert plan.micro_batch * plan.accumulate == wanted
    assert plan.micro_batch == 1 or plan.micro_batch * per_sample <= free - fixed


@given(st.integers(1, 64), st.integers(0, 1000))
def test_sizes_sum_to_the_total_and_stay_within_the_micro_batch(micro, total):
    sizes = BatchPlan(micro_batch=micro).sizes(total)
    assert sum(sizes) == total and all(0 < size <= micro for size in sizes)
    assert not sizes or max(sizes) - min(sizes) <= 1
    assert len(sizes) == -(-total // micro)


def test_sizes_of_a_whole_batch_are_the_plan():
    assert BatchPlan(micro_batch=8, accumulate=3).sizes(24) == [8, 8, 8]
    assert BatchPlan(micro_batch=4).sizes(9) == [3, 3, 3]


@given(st.integers(1, 2000), st.integers(1, 50), st.booleans(), st.sampled_from(["cpu", "cuda"]))
def test_the_ladder_ends_and_never_changes_the_batch(micro, accumulate, checkpoint, device):
    plan = BatchPlan(micro_batch=micro, accumulate=accumulate, checkpoint_activations=checkpoint, device=device)
    steps = []
    while plan is not None:
        steps.append(plan)
        assert plan.micro_batch * plan.accumulate == micro * accumulate
        plan = next_plan(plan)
    assert len(steps) <= micro.bit_length() + 3
    assert steps[-1] == BatchPlan(
        micro_batch=1, accumulate=micro * accumulate, checkpoint_activations=True, device="cpu"
    )


def test_the_order_of_the_ladder():
    plan, seen = BatchPlan(micro_batch=4, device="cuda"), []
    while plan is not None:
        seen.append((plan.micro_batch, plan.accumulate, plan.checkpoint_activations, plan.device))
        plan = next_plan(plan)
    assert seen == [
        (4, 1, False, "cuda"),
        (2, 2, False, "cuda"),
        (1, 4, False, "cuda"),
        (1, 4, True, "cuda"),
        (1, 4, True, "cpu"),
    ]


def test_an_odd_micro_batch_is_divided_by_its_smallest_factor():
    assert next_plan(BatchPlan(micro_batch=15)) == BatchPlan(micro_batch=5, accumulate=3)
    assert next_plan(BatchPlan(micro_batch=7, accumulate=2)) == BatchPlan(micro_batch=1, accumulate=14)


def test_lack_of_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(10**15)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(torch.OutOfMemoryError("x"))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
    assert not is_out_of_memory(ValueError("out of memory"))
