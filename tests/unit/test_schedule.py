"""Learning-rate shapes, and the decisions taken before the first step."""

import pytest
import torch
from tiny import gpt_config, made, train_config, trm_config

from forgekit.models.config import TRMTitansConfig
from forgekit.train.config import TrainConfig, lr_factor
from forgekit.train.setup import activations_per_token, autocast_dtype, choose_plan, training_device


def shape(**changes) -> list[float]:
    config = TrainConfig(**{"steps": 100, "warmup": 0.1, "cooldown": 0.4, **changes})
    return [lr_factor(config, step) for step in range(config.steps)]


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_every_schedule_warms_up_in_a_line(schedule):
    factors = shape(schedule=schedule)
    assert factors[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert all(0 < f <= 1 for f in factors)


def test_wsd_is_flat_and_then_falls_in_a_line():
    factors = shape(schedule="wsd")
    assert factors[10:61] == [1.0] * 51
    assert factors[60:] == pytest.approx([(100 - i) / 40 for i in range(60, 100)])


def test_cosine_falls_from_one_towards_zero():
    factors = shape(schedule="cosine")
    assert factors[10] == 1.0 and factors[55] == pytest.approx(0.5) and factors[-1] < 0.001
    assert all(a > b for a, b in zip(factors[10:], factors[11:]))


def test_constant_stays():
    assert shape(schedule="constant")[9:] == [1.0] * 91


def test_without_warmup_and_cooldown_the_rate_is_full_from_first_to_last():
    assert shape(warmup=0, cooldown=0) == [1.0] * 100
    assert shape(steps=1, warmup=0.0, cooldown=1.0) == [1.0]


def test_precision_is_as_asked_and_auto_is_never_emulated():
    cpu = torch.device("cpu")
    assert autocast_dtype("fp32", cpu) is None and autocast_dtype("bf16", cpu) is torch.bfloat16
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    assert autocast_dtype("auto", cpu) is (torch.bfloat16 if native else None)
    assert autocast_dtype("auto", torch.device("mps")) is torch.bfloat16


def test_a_configured_micro_batch_is_kept_and_an_own_one_divides_the_rows():
    model, cpu = made(trm_config()), training_device("cpu")
    plan = choose_plan(model, train_config(rows=10, micro_batch=4), cpu)
    assert (plan.micro_batch, plan.accumulate) == (4, 3)
    assert choose_plan(model, train_config(rows=4, micro_batch=9), cpu).micro_batch == 4
    assert choose_plan(model, train_config(rows=9, micro_batch=9), cpu, share=2).micro_batch == 4
    free = choose_plan(model, train_config(rows=12, micro_batch=0), cpu)
    assert free.micro_batch * free.accumulate == 12 and free.device == "cpu"


@pytest.mark.parametrize(
    "config",
    [
        trm_config(t_max=3),
        trm_config(vocab_size=600),
        gpt_config(vocab_size=600),
        TRMTitansConfig(memory_chunk=64, memory_heads=4, memory_layers=(0, 1, 2)),
        TRMTitansConfig(memory="none", t_max=4, micro_steps=2),
    ],
)
def test_the_estimate_of_kept_activations_is_on_the_safe_side(config):
    model, kept = made(config), {}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.zeros(2, 64, dtype=torch.long)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model.training_loss(x, x)
    used = sum(size for pointer, size in kept.items() if pointer not in own)
    assert float(loss.total.detach()) > 0 and used <= 4 * activations_per_token(config) * x.numel()
