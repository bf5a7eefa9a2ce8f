"""Linear maps in eight and four bits, as in three values: training form, packed form, plain form and file agree."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_quant_files import change, refusal, tokenizer_of
from test_quant_model import EVERY, GROUPS, TOKENIZER, close, ids_of, model_of, scores
from tiny import gpt_config, made, same, weights

from forgekit.errors import ArtifactError
from forgekit.infer.engine import Engine
from forgekit.infer.sampling import SamplingConfig
from forgekit.models.base import parameter_count
from forgekit.models.io import read_model, write_model
from forgekit.quant.config import GroupPlan, TernaryPlan
from forgekit.quant.files import read_packed, write_packed
from forgekit.quant.groupwise import round_groups
from forgekit.quant.layers import FakeGroupedLinear, GroupedLinear, PackedLinear, is_conv1d
from forgekit.quant.model import (
    dequantised,
    fake_quantised,
    image,
    is_fake,
    is_packed,
    logical_parameters,
    packed,
    quantised_modules,
    restored,
    round_rest,
    set_strength,
    sizes,
    targets,
)

pytestmark = pytest.mark.usefixtures("one_thread")
INT8, INT4 = GroupPlan(bits=8, group=32), GroupPlan(bits=4, group=6)
PLANS = {"int8": INT8, "int4": INT4}


def rows_first(module: torch.nn.Module) -> torch.Tensor:
    return module.weight.T if is_conv1d(module) else module.weight


@pytest.mark.parametrize("method", PLANS)
@pytest.mark.parametrize("kind", EVERY)
def test_packed_computes_what_the_training_form_and_the_plain_form_compute(kind, method):
    plan, model = PLANS[method], model_of(kind)
    small = packed(model, plan, GROUPS)
    trained = fake_quantised(copy.deepcopy(model), plan, GROUPS)
    assert close(scores(small), scores(trained)) and close(scores(small), scores(dequantised(model, plan, GROUPS)))
    assert not torch.equal(scores(trained), scores(model)), "rounding changes something"
    assert same(weights(small), weights(packed(trained, plan, GROUPS))), "packing looks at the latent weights"
    for name in targets(model):
        module = small.get_submodule(name)
        assert type(module) is GroupedLinear and module.bits == plan.bits
        expected = round_groups(rows_first(model.get_submodule(name)), plan).dense()
        stored = expected.T if module.transposed else expected
        assert torch.equal(module.weight, stored) and torch.equal(trained.get_submodule(name).weight, stored), name


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    width=st.integers(1, 17).map(lambda n: 2 * n),
    hidden=st.integers(1, 70),
    group=st.integers(1, 80),
    bits=st.integers(4, 8),
)
def test_at_any_size_packed_equals_training_and_the_file_equals_packed(
    tmp_path_factory, seed, width, hidden, group, bits
):
    model = made(gpt_config(d_model=width, n_heads=1, ffn_hidden=hidden, n_layers=1), seed, stir=0.1).eval()
    ids = torch.randint(0, 24, (2, 5), generator=torch.Generator().manual_seed(seed))
    plan = GroupPlan(bits=bits, group=group)
    round_rest(model, [id(model.get_submodule(n).weight) for n in (*targets(model), "embedding.table")])
    small, folder = packed(model, plan, GROUPS), tmp_path_factory.mktemp("any")
    assert close(scores(small, ids), scores(fake_quantised(copy.deepcopy(model), plan, GROUPS), ids))
    write_packed(small, TOKENIZER, folder)
    assert same(weights(read_packed(folder)[0]), weights(small))
    again = dequantised(dequantised(model, plan, GROUPS), plan, GROUPS)
    assert same(weights(again), weights(dequantised(model, plan, GROUPS))), "on the grid already"


@pytest.mark.parametrize("method", PLANS)
@pytest.mark.parametrize("kind", EVERY)
def test_strength_leads_from_the_original_bits_to_the_grid_and_back(kind, method):
    model = model_of(kind, exact=False)
    before, kinds = scores(model), [type(m) for m in model.modules()]
    names = targets(model)
    trained = fake_quantised(model, PLANS[method], GROUPS, strength=0.0)
    assert torch.equal(scores(trained), before) and is_fake(trained) and targets(trained) == names
    assert all(type(trained.get_submodule(name)) is FakeGroupedLinear for name in names)
    set_strength(trained, 1.0)
    assert not torch.equal(scores(trained), before)
    assert [type(m) for m in restored(trained).modules()] == kinds and torch.equal(scores(trained), before)


@pytest.mark.parametrize("kind", ["trm_titans", "gpt2"])
def test_a_step_reaches_every_latent_weight(kind):
    model = fake_quantised(model_of(kind), INT4, GROUPS).train()
    ids = ids_of()
    model.training_loss(ids[:, :-1], ids[:, 1:]).total.backward()
    for name in targets(model):
        assert model.get_submodule(name).latent.grad.abs().sum() > 0, name


@pytest.mark.parametrize("method", PLANS)
@pytest.mark.parametrize("groups", [GROUPS, None], ids=["grouped", "half"])
@pytest.mark.parametrize("kind", EVERY)
def test_tensors_and_tokens_come_back_the_same(kind, groups, method, tmp_path):
    model = model_of(kind, exact=False)
    small, tokenizer = packed(model, PLANS[method], groups), tokenizer_of(model)
    found = write_packed(model, tokenizer, tmp_path, PLANS[method], groups)
    again, their_tokenizer = read_model(tmp_path)
    assert same(weights(again), weights(small)) and is_packed(again)
    assert [(n, type(m)) for n, m in again.named_modules()] == [(n, type(m)) for n, m in small.named_modules()]
    conv = [n for n, m in quantised_modules(small).items() if getattr(m, "transposed", False)]
    assert conv == [n for n, m in quantised_modules(again).items() if getattr(m, "transposed", False)]
    assert bool(conv) == (kind == "gpt2") and torch.equal(scores(again), scores(small))
    said = [
        Engine(*pair).generate(["hello", "some text"], SamplingConfig(max_tokens=6))
        for pair in ((small, tokenizer), (again, their_tokenizer))
    ]
    assert [s.tokens for s in said[0]] == [s.tokens for s in said[1]]
    assert found["total"] == (tmp_path / "model.safetensors").stat().st_size and not found["ternary"]
    section = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))["forge_quantization"]
    assert section["method"] == "grouped" and section["plan"] is None and section["code"] is None


def test_every_form_of_the_model_writes_the_same_bytes(tmp_path):
    model = model_of("trm_titans", exact=False)
    folders = [tmp_path / name for name in ("plain", "packed", "read", "training")]
    write_packed(model, TOKENIZER, folders[0], INT4, GROUPS)
    folders[1].mkdir()
    write_model(packed(model, INT4, GROUPS), TOKENIZER, folders[1])
    write_packed(*read_packed(folders[0]), folders[2])
    write_packed(fake_quantised(model, INT4, GROUPS), TOKENIZER, folders[3], INT4, GROUPS)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name


def test_bits_on_disk_are_those_asked_for(tmp_path):
    model = made(gpt_config(d_model=64, n_layers=2, ffn_hidden=128))
    maps = sum(model.get_submodule(name).weight.numel() for name in targets(model))
    for bits in (4, 8):
        found = write_packed(model, None, tmp_path / str(bits), GroupPlan(bits=bits), None)
        assert found["grouped"] == maps * bits // 8 + 2 * maps // 32
    assert isinstance(packed(model, TernaryPlan(), None).blocks[0].ffn.up, PackedLinear)


def test_sizes_and_parameters_of_the_packed_model():
    model = model_of("gpt2")
    small = packed(model, INT8, GROUPS)
    assert logical_parameters(small) == parameter_count(model)
    found = sizes(small)
    assert found["ternary"] == 0 and found["grouped"] > found["half"] > 0
    assert found["total"] == sum(one.nbytes for one in unique(small))
    trained = sizes(fake_quantised(model, INT8, GROUPS))
    assert trained["ternary"] == 0 and trained["total"] == 4 * parameter_count(model)


def unique(model):
    return {id(t): t for t in model.state_dict(keep_vars=True).values()}.values()


def test_rows_of_zeros_stay_zeros_and_what_is_not_finite_is_named():
    model = model_of("gpt")
    with torch.no_grad():
        model.blocks[0].ffn.up.weight[3].zero_()
        model.blocks[0].attn.wo.weight.zero_()
    for plan in PLANS.values():
        small = packed(model, plan, GROUPS)
        assert not small.blocks[0].ffn.up.weight[3].any() and not small.blocks[0].attn.wo.weight.any()
        assert scores(small).isfinite().all()
        assert close(scores(small), scores(fake_quantised(copy.deepcopy(model), plan, GROUPS)), 1e-3)
    with torch.no_grad():
        model.blocks[1].ffn.up.weight[3, 2] = torch.nan
    for act in (packed, dequantised):
        with pytest.raises(ArtifactError, match=r"^blocks.1.ffn.up.weight: NaN or infinite values; use a checkpoint"):
            act(model, INT8, GROUPS)


def test_a_packed_model_is_not_packed_again():
    small = packed(model_of("gpt"), INT4, None)
    for act in (lambda: packed(small, INT8, None), lambda: packed(small, TernaryPlan(), None), lambda: targets(small)):
        with pytest.raises(ArtifactError, match="it is packed already"):
            act()


def test_no_weight_moves_by_more_than_half_a_step():
    W_RC = torch.randn(7, 50, generator=torch.Generator().manual_seed(0))
    for plan in PLANS.values():
        found = image(W_RC, plan)
        step_RC = found.scale_RG.float().repeat_interleave(plan.group, 1)[:, :50]
        assert ((W_RC - found.dense()).abs() <= 0.5 * step_RC + 1e-6).all()


@pytest.fixture()
def artifact(tmp_path):
    folder = tmp_path / "int4"
    write_packed(model_of("trm_titans"), TOKENIZER, folder, INT4, GROUPS)
    return folder


MISFITS = {
    "another width of bits": (lambda t, h: h["maps"]["blocks.0.ffn.up"].update(bits=5), "bytes a row do not hold"),
    "another group": (lambda t, h: h["maps"]["blocks.0.ffn.up"].update(group=3), "in groups of 3 need 37x7"),
    "bits that are none": (lambda t, h: h["maps"]["blocks.0.ffn.up"].update(bits=3), "value 3 refused"),
    "too few scales": (
        lambda t, h: t.update({"blocks.0.ffn.up.scale": t["blocks.0.ffn.up.scale"][:, 1:]}),
        "tensor blocks.0.ffn.up.scale is 37x3",
    ),
    "a code that is none": (lambda t, h: t["blocks.0.ffn.up.codes"][0].fill_(0x88), "a code is -8"),
    "said to be ternary": (
        lambda t, h: h["maps"]["blocks.0.ffn.up"].update(kind="ternary"),
        "ternary maps need code and plan",
    ),
    "a map forgotten": (lambda t, h: h["maps"].pop("blocks.0.ffn.up"), "has no place in the model"),
}


@pytest.mark.parametrize("edit", MISFITS)
def test_each_misfit_is_named(artifact, edit):
    act, what = MISFITS[edit]
    change(artifact, act)
    assert what in refusal(artifact)


def test_a_flipped_bit_or_a_cut_is_refused(artifact):
    path = artifact / "model.safetensors"
    data = path.read_bytes()
    for damaged in (data[:-1], data[:-3] + bytes([data[-3] ^ 4]) + data[-2:]):
        path.write_bytes(damaged)
        assert refusal(artifact).startswith("model.safetensors: ")
