"""Maps that a ternary plan spares: rounded group-wise in training, packed, on disk and as floats."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from test_quant_model import TOKENIZER
from tiny import gpt_config, made, trm_config

from forgekit.errors import ArtifactError, ConfigError
from forgekit.models.io import read_model
from forgekit.quant.config import GroupPlan, TernaryPlan
from forgekit.quant.files import write_packed
from forgekit.quant.groupwise import round_groups
from forgekit.quant.layers import FakeGroupedLinear, GroupedLinear, PackedLinear, TernaryLinear
from forgekit.quant.model import (
    calibrate,
    dequantised,
    fake_quantised,
    halved,
    packed,
    plan_of,
    plans_of,
    restored,
    round_rest,
    targets,
)

SPARED = TernaryPlan(spared=("wo",), spared_groups=GroupPlan(bits=5, group=16))
IDS = torch.arange(12)[None] % 7


@pytest.fixture
def model():
    return made(gpt_config()).eval()


def test_a_map_is_spared_by_a_whole_part_of_its_name():
    assert plan_of("blocks.0.attn.wo", SPARED) == SPARED.spared_groups
    assert plan_of("blocks.0.attn.wo_x", SPARED) is SPARED
    assert plan_of("blocks.0.attn.wo", TernaryPlan()) == TernaryPlan()
    assert plan_of("blocks.0.attn.wo", GroupPlan()) == GroupPlan()


def test_only_the_spared_ones_are_group_wise(model):
    names = targets(model)
    spared = [name for name in names if name.endswith(".wo")]
    low = packed(model, SPARED, GroupPlan())
    assert spared and {n for n in names if isinstance(low.get_submodule(n), GroupedLinear)} == set(spared)
    assert all(isinstance(low.get_submodule(n), PackedLinear) for n in names if n not in spared)
    training = fake_quantised(copy.deepcopy(model), SPARED, GroupPlan())
    assert {n for n in names if isinstance(training.get_submodule(n), FakeGroupedLinear)} == set(spared)
    assert isinstance(training.get_submodule(names[0]), TernaryLinear)
    for name in spared:
        expected = round_groups(model.get_submodule(name).weight, SPARED.spared_groups).dense()
        assert torch.equal(low.get_submodule(name).weight, expected)
        assert torch.equal(dequantised(model, SPARED, None).get_submodule(name).weight, expected)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), bits=st.integers(4, 8), group=st.sampled_from([3, 16, 32]))
def test_packed_equals_what_trains(seed, bits, group):
    model = made(trm_config(), seed, stir=0.05).eval()
    round_rest(model, [id(model.get_submodule(n).weight) for n in (*targets(model), "embedding.table")])
    spared = TernaryPlan(spared=("wo", "memory"), spared_groups=GroupPlan(bits=bits, group=group), activation_bits=0)
    low = packed(model, spared, GroupPlan())
    training = fake_quantised(copy.deepcopy(model), spared, GroupPlan()).eval()
    with torch.inference_mode():
        ours, theirs = low(IDS).logits, training(IDS).logits
        plain = dequantised(model, spared, GroupPlan())(IDS).logits
    assert torch.allclose(ours, theirs, atol=1e-4) and torch.allclose(ours, plain, atol=1e-4)


def test_it_comes_back_from_disk_exactly(model, tmp_path):
    low = packed(model, SPARED, GroupPlan())
    parts = write_packed(low, TOKENIZER, tmp_path)
    assert parts["total"] == (tmp_path / "model.safetensors").stat().st_size
    again, _ = read_model(tmp_path)
    for (name, one), (other_name, other) in zip(low.state_dict().items(), again.state_dict().items(), strict=True):
        assert name == other_name and torch.equal(one, other), name
    with torch.inference_mode():
        assert torch.equal(low(IDS).logits, again(IDS).logits)
    module = next(m for m in again.modules() if isinstance(m, PackedLinear))
    assert module.plan == SPARED, "the file says what was spared"


def test_it_takes_more_bytes_than_ternary_and_training_can_be_undone(model, tmp_path):
    size = {n: write_packed(packed(model, p, GroupPlan()), None, tmp_path / n)["total"]
            for n, p in (("all", TernaryPlan()), ("spared", SPARED))}  # fmt: skip
    assert size["spared"] > size["all"]
    before = {name: one.clone() for name, one in model.state_dict().items()}
    after = restored(fake_quantised(model, SPARED, GroupPlan())).state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)


def test_what_cannot_be_spared_is_refused_by_name(model):
    with pytest.raises(ConfigError, match="no map has 'w0' or 'memory' in its name"):
        plans_of(model, TernaryPlan(spared=("w0", "memory")))
    assert plans_of(model, TernaryPlan(spared=("wo", "memory"))), "one profile for models with a memory and without"
    with pytest.raises(ConfigError, match="spares every map"):
        packed(model, TernaryPlan(spared=("blocks",)), None)


def test_packing_must_spare_what_training_spared(model):
    """A gain that its map no longer uses would be lost without a word."""
    plan = TernaryPlan(sub_norm=True)
    seen = calibrate(model, [IDS])
    training = fake_quantised(model, plan, None, statistics=seen)
    assert packed(training, plan, None)
    with pytest.raises(ArtifactError, match="attn.wo has a sub-layer norm, the plan wants none"):
        packed(training, plan.replace(spared=("wo",)), None)


def test_spared_maps_get_no_sub_layer_norm(model):
    plan = TernaryPlan(sub_norm=True, spared=("wo", "down"))
    training = fake_quantised(model, plan, None, statistics=calibrate(model, [IDS]))
    low = packed(training, plan, None)
    assert not any(getattr(m, "gain", None) is not None for m in low.modules())


@pytest.mark.parametrize("spared", [("wq",), ("wk", "wv"), ("up",), ("wq", "wk", "wv", "wo")])
def test_maps_that_share_an_input_may_be_of_two_kinds(spared):
    model = made(gpt_config(), stir=0.05).eval()
    plan = TernaryPlan(spared=spared, activation_bits=0)
    low, plain = packed(model, plan, GroupPlan()), dequantised(model, plan, GroupPlan())
    with torch.inference_mode():
        whole = plain(IDS).logits
        assert torch.allclose(low(IDS).logits, whole, atol=1e-4)
        state, parts = low.initial_state(1), []
        for at in range(IDS.shape[1]):
            out = low(IDS[:, at : at + 1], state)
            parts.append(out.logits)
            state = out.state
    assert torch.allclose(torch.cat(parts, 1), whole, atol=1e-4), "token by token"


def test_only_what_is_exact_is_kept_in_float16(model):
    plain = dequantised(model, TernaryPlan(), GroupPlan())
    before = {name: one.clone() for name, one in plain.state_dict().items()}
    after = halved(plain).state_dict()
    assert all(torch.equal(after[name].float(), one) for name, one in before.items())
    assert after["blocks.0.ffn.up.weight"].dtype == torch.float16
    assert after["embedding.table.weight"].dtype == torch.float32, "codes of 8 bits times a scale of 11"


@pytest.mark.parametrize(("dtype", "told"), [(torch.bfloat16, "torch.bfloat16"), (torch.int16, "torch.int16")])
def test_a_type_that_no_checksum_covers_is_refused(model, tmp_path, dtype, told):
    write_packed(packed(model, SPARED, GroupPlan()), TOKENIZER, tmp_path)
    path = tmp_path / "model.safetensors"
    with safe_open(path, "pt") as file:
        kept, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}
    tensors["blocks.0.norm1.weight"] = tensors["blocks.0.norm1.weight"].view(dtype)
    save_file(tensors, path, metadata=kept)
    with pytest.raises(ArtifactError, match=f"tensor blocks.0.norm1.weight is stored as {told}"):
        read_model(tmp_path)
