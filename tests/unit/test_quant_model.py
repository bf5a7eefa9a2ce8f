"""Whole models on the low-bit grids: the training form, the packed form and the plain form compute the same."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import Echo, gpt_config, made, same, train_config, trainer, trm_config, weights
from torch import nn

from forgekit.data.tokenizer import train_tokenizer
from forgekit.errors import ArtifactError, ConfigError, DataError
from forgekit.infer.engine import Engine
from forgekit.infer.sampling import SamplingConfig
from forgekit.models.base import parameter_count
from forgekit.models.hf import HFCausalLM
from forgekit.models.io import write_model
from forgekit.quant.config import GroupPlan, TernaryPlan
from forgekit.quant.grid import ternarise
from forgekit.quant.layers import (
    FakeGroupedEmbedding,
    GroupedEmbedding,
    GroupedLinear,
    PackedLinear,
    TernaryLinear,
    TiedHead,
    sub_norm,
    ternary_of,
)
from forgekit.quant.model import (
    KEPT,
    calibrate,
    dequantised,
    fake_quantised,
    grouped_targets,
    is_fake,
    is_packed,
    kind_of,
    logical_parameters,
    packed,
    quantised_modules,
    rest,
    restored,
    round_rest,
    set_strength,
    sizes,
    targets,
)

pytestmark = pytest.mark.usefixtures("one_thread")
PLAN, FLOATS = TernaryPlan(), TernaryPlan(activation_bits=0)
GROUPS = GroupPlan(bits=8, group=7)
TOKENIZER = train_tokenizer(["hello world, this is some text with digits 123 and more of it. "] * 5, 300)
V = TOKENIZER.get_vocab_size()
TRAIN = train_config(steps=30)
ODD = {"vocab_size": V, "d_model": 20, "ffn_hidden": 37}
OURS = {
    "gpt": gpt_config(**ODD),
    "gpt_factorised": gpt_config(**ODD, emb_rank=7, window=5),
    "trm_titans": trm_config(**ODD, d_mem=10, trm_hidden=13, gate_hidden=5),
    "trm_decay": trm_config(**ODD, memory="decay", d_mem=9, memory_heads=1, emb_rank=6, t_max=0),
}


def theirs(kind: str) -> nn.Module:
    """A tiny Hugging Face model in the house's clothes."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, Qwen2Config

    shape = {"vocab_size": V, "hidden_size": 20, "intermediate_size": 37, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    config = {
        "llama": lambda: LlamaConfig(**shape, **ends, tie_word_embeddings=False),
        "llama_tied": lambda: LlamaConfig(**shape, **ends, tie_word_embeddings=True),
        "qwen2": lambda: Qwen2Config(**shape, **ends, tie_word_embeddings=True),
        "gpt2": lambda: GPT2Config(vocab_size=V, n_positions=64, n_embd=20, n_layer=2, n_head=2, n_inner=37, **ends),
    }[kind]()
    return HFCausalLM(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


THEIRS = ("gpt2", "llama", "llama_tied", "qwen2")
EVERY = [*OURS, *THEIRS]


def model_of(kind: str, seed: int = 0, exact: bool = True, groups: GroupPlan | None = GROUPS) -> nn.Module:
    """A model whose every tensor speaks; with ``exact``, what stays in float16 has values of float16 already."""
    torch.manual_seed(seed)
    model = made(OURS[kind], seed) if kind in OURS else theirs(kind)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    if exact:
        low = (*targets(model), *(grouped_targets(model) if groups else ()))
        maps = [model.get_submodule(name).weight for name in low]
        round_rest(model, map(id, maps))
    return model.eval()


def ids_of(rows: int = 3, length: int = 9) -> torch.Tensor:
    return torch.randint(0, V, (rows, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def scores(model: nn.Module, ids: torch.Tensor | None = None) -> torch.Tensor:
    return model.eval()(ids_of() if ids is None else ids).logits


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal to float tolerance, but for tokens whose activations lie on a boundary: there the last digit of a float
    decides between two of the 255 codes, and what follows sees it."""
    apart = (a - b).abs().amax(-1).flatten()
    return bool(apart.median() < 1e-5 and apart.max() < 0.03 * b.abs().max())


# ---- which parts


def test_every_linear_map_of_our_families_is_accounted_for():
    names = targets(made(trm_config()))
    assert [n for n in names if n.startswith("blocks.1")] == [
        *(f"blocks.1.attn.{w}" for w in ("wq", "wk", "wv", "wo")),
        *("blocks.1.ffn.up", "blocks.1.ffn.down", "blocks.1.gated.memory.wqkv", "blocks.1.gated.memory.wo"),
    ]
    assert [n for n in names if "recursion" in n] == [f"recursion.{net}.{w}" for net in "gh" for w in ("up", "down")]
    model = made(trm_config(emb_rank=5))
    assert grouped_targets(model) == ["embedding.table", "embedding.lift", "embedding.lower"]
    maps = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)}
    left = maps - set(targets(model)) - set(grouped_targets(model))
    parts = ("memory.gates", "gate_in", "gate_out")
    assert left == {"recursion.halt", *(f"blocks.1.gated.{part}" for part in parts)}
    assert all(kind_of(name) in ("half", "float32") for name in left)


def test_kept_parts_are_whole_components_of_a_name_and_have_reasons():
    assert kind_of("hf.model.layers.0.mlp.gate_proj") is None and kind_of("hf.model.layers.0.mlp.gate") == "half"
    assert kind_of("recursion.halt.weight") == kind_of("recursion.teacher_bias") == "float32"
    assert all(kept.why for kept in KEPT) and len({kept.part for kept in KEPT}) == len(KEPT)


def test_parts_of_hugging_face_models():
    llama, gpt2 = theirs("llama"), theirs("gpt2")
    assert grouped_targets(llama) == ["hf.model.embed_tokens", "hf.lm_head"]
    assert len(targets(llama)) == 2 * 7 and not any("lm_head" in name for name in targets(llama))
    assert grouped_targets(gpt2) == ["hf.transformer.wte", "hf.lm_head"]
    assert len(targets(gpt2)) == 2 * 4, "Conv1D"


def test_a_model_without_linear_layers_is_refused():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.norm = nn.Embedding(4, 4), nn.LayerNorm(4)

    for act in (targets, sizes, lambda m: packed(m, PLAN, None), lambda m: fake_quantised(m, PLAN, None)):
        with pytest.raises(ArtifactError, match="^Bare: no linear layers that could be made small; give a model"):
            act(Bare())
    with pytest.raises(ArtifactError, match="it is packed already"):
        packed(packed(model_of("gpt"), PLAN, None), PLAN, None)


# ---- equality


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("groups", [GROUPS, None], ids=["grouped", "half"])
def test_packed_computes_what_the_training_form_computes(kind, groups):
    model = model_of(kind, groups=groups)
    for plan in (PLAN, FLOATS, TernaryPlan(scale="median", per="tensor", refit=False, threshold=0.7)):
        small = packed(model, plan, groups)
        trained = fake_quantised(copy.deepcopy(model), plan, groups)
        assert not close(scores(trained), scores(model), 1e-2), "quantising changes something"
        equal = agree if plan.activation_bits else close
        assert equal(scores(small), scores(trained))
        assert same(weights(small), weights(packed(trained, plan, groups))), "packing looks at the latent weights"


@pytest.mark.parametrize("kind", EVERY)
def test_cached_generation_of_the_packed_model_is_that_of_the_training_form(kind):
    model = model_of(kind)
    small = packed(model, PLAN, GROUPS)
    trained = fake_quantised(model, PLAN, GROUPS)
    ids = ids_of(2, 8)
    for one in (small, trained):
        with torch.no_grad():
            state, parts = one.initial_state(2), []
            for piece in ids.split([3, 1, 4], dim=1):
                out = one(piece, state)
                state, parts = out.state, [*parts, out.logits]
        assert agree(torch.cat(parts, 1), scores(one, ids))
    config = SamplingConfig(max_tokens=10)
    said = [Engine(one, TOKENIZER).generate(["hello", "this is some text", "1"], config) for one in (small, trained)]
    assert [s.tokens for s in said[0]] == [s.tokens for s in said[1]] and all(s.tokens for s in said[0])


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 2**16),
    width=st.integers(1, 9).map(lambda n: 4 * n),
    hidden=st.integers(1, 70),
    group=st.integers(1, 40),
    bits=st.integers(4, 8),
)
def test_packed_equals_the_training_form_at_any_size(seed, width, hidden, group, bits):
    model = made(gpt_config(d_model=width, ffn_hidden=hidden, n_layers=1), seed, stir=0.1).eval()
    ids = torch.randint(0, 24, (2, 5), generator=torch.Generator().manual_seed(seed))
    groups = GroupPlan(bits=bits, group=group)
    round_rest(model, [id(model.get_submodule(n).weight) for n in (*targets(model), "embedding.table")])
    small = packed(model, FLOATS, groups)
    assert close(scores(small, ids), scores(fake_quantised(model, FLOATS, groups), ids))


def test_what_is_not_packed_moves_by_a_rounding_to_float16_at_most():
    model = model_of("trm_titans", exact=False)
    small = dict(rest(packed(model, PLAN, GROUPS)))
    for name, tensor in rest(model):
        if name in small:
            assert (small[name] - tensor).abs().max() <= 2**-11 * tensor.abs().max(), name
    assert torch.equal(small["recursion.halt.weight"], model.recursion.halt.weight)
    assert torch.equal(small["recursion.teacher_weight"], model.recursion.teacher_weight)


@pytest.mark.parametrize("kind", EVERY)
def test_the_dequantised_model_is_the_packed_one_and_packs_to_the_same_codes(kind):
    model = model_of(kind, exact=False)
    small, plain = packed(model, FLOATS, GROUPS), dequantised(model, FLOATS, GROUPS)
    assert close(scores(plain), scores(small))
    assert {type(m) for m in plain.modules()} == {type(m) for m in model.modules()}
    assert all(p.requires_grad for p in plain.parameters())
    again = weights(packed(plain, FLOATS, GROUPS))
    first = weights(small)
    assert all(torch.equal(again[name], first[name]) for name in first if name.endswith(".codes"))
    assert same(again, first), "and, the scales being refit, to the same scales"
    halves = copy.deepcopy(plain).half().float()
    names = targets(model)
    assert all(torch.equal(halves.get_submodule(n).weight, plain.get_submodule(n).weight) for n in names)


@pytest.mark.parametrize("plan", [TernaryPlan(refit=False), TernaryPlan(scale="median"), TernaryPlan(threshold=0.3)])
def test_codes_survive_dequantising_under_every_plan(plan):
    model = model_of("gpt")
    first, again = (weights(packed(m, plan, GROUPS)) for m in (model, dequantised(model, plan, GROUPS)))
    assert all(torch.equal(again[name], first[name]) for name in first if name.endswith(".codes"))


@pytest.mark.parametrize("kind", EVERY)
def test_strength_zero_is_the_original_bit_for_bit(kind):
    model = model_of(kind, exact=False)
    before, latent = scores(model), weights(model)
    trained = fake_quantised(model, PLAN, GROUPS, strength=0.0)
    assert trained is model and torch.equal(scores(trained), before)
    assert same(weights(trained), latent), "the same tensors under the same names"
    half = [set_strength(trained, s) or scores(trained) for s in (0.5, 1.0)]
    assert not torch.equal(half[0], half[1]) and not torch.equal(half[0], before)
    kinds = [type(m) for m in model_of(kind).modules()]
    assert [type(m) for m in restored(trained).modules()] == kinds and torch.equal(scores(trained), before)


def test_strengths_outside_the_unit_interval_and_second_wrappings_are_refused():
    with pytest.raises(ConfigError, match="strength: 1.5 refused"):
        fake_quantised(model_of("gpt"), PLAN, GROUPS, 1.5)
    model = fake_quantised(model_of("gpt"), PLAN, GROUPS)
    with pytest.raises(ConfigError, match="strength"):
        set_strength(model, -0.1)
    with pytest.raises(ArtifactError, match="trains for a grid already"):
        fake_quantised(model, PLAN, GROUPS)


# ---- training


@pytest.mark.parametrize("kind", EVERY)
@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_a_step_reaches_every_latent_weight(kind, strength):
    model = fake_quantised(model_of(kind), PLAN, GROUPS, strength).train()
    before, ids = weights(model), ids_of()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.training_loss(ids[:, :-1], ids[:, 1:]).total.backward()
    optimizer.step()
    asleep = kind == "trm_decay"  # t_max 0: no recursion
    for name in (*targets(model), *grouped_targets(model)):
        if asleep and "recursion" in name:
            continue
        assert not torch.equal(model.state_dict()[f"{name}.weight"], before[f"{name}.weight"]), name


def test_training_for_the_grid_helps_the_packed_model():
    model = fake_quantised(made(gpt_config()), PLAN, GROUPS)
    run = trainer(TRAIN, model=model)
    ids = torch.as_tensor(Echo().batch(99).inputs)
    before = packed(model, PLAN, GROUPS).training_loss(ids[:, :-1], ids[:, 1:]).nats
    run.run()
    after = packed(run.model, PLAN, GROUPS).training_loss(ids[:, :-1], ids[:, 1:]).nats
    assert after < before - 0.2


def test_weights_that_are_not_finite_become_a_loss_that_is_not_and_are_refused_when_packed():
    model = model_of("gpt")
    with torch.no_grad():
        model.blocks[1].ffn.up.weight[3, 2] = torch.nan
    with pytest.raises(ArtifactError, match=r"^blocks.1.ffn.up.weight: NaN or infinite values; use a checkpoint"):
        packed(model, PLAN, GROUPS)
    assert scores(fake_quantised(model, PLAN, GROUPS)).isnan().any()
    model = model_of("gpt")
    with torch.no_grad():
        model.blocks[0].attn.wq.weight.mul_(1e7)
    with pytest.raises(ArtifactError, match="^blocks.0.attn.wq.weight: a scale exceeds float16; scale"):
        packed(model, PLAN, None)
    with pytest.raises(ArtifactError, match="^blocks.0.norm2.weight: NaN or infinite"):
        dequantised(with_infinite_norm(), PLAN, None)


def with_infinite_norm() -> nn.Module:
    model = model_of("gpt")
    with torch.no_grad():
        model.blocks[0].norm2.weight[0] = torch.inf
    return model


def test_rows_of_zeros_stay_zeros():
    model = model_of("gpt")
    with torch.no_grad():
        model.blocks[0].attn.wo.weight.zero_()
        model.embedding.table.weight[2].zero_()
    small = packed(model, PLAN, GROUPS)
    assert not small.blocks[0].attn.wo.weight.any() and not small.embedding.table.weight[2].any()
    assert scores(small).isfinite().all()


# ---- modules


def test_packed_modules_know_their_dense_weights():
    model = model_of("gpt2")
    small = packed(model, PLAN, GROUPS)
    for name in targets(model):
        conv = model.get_submodule(name).weight
        assert torch.equal(small.get_submodule(name).weight, ternary_of(conv.T, PLAN).dense().T), name
    head = small.hf.lm_head
    assert isinstance(head, TiedHead) and head.table is small.hf.transformer.wte
    assert torch.equal(head.weight, small.hf.transformer.wte.weight)
    moved = copy.deepcopy(small)
    assert moved.hf.lm_head.table is moved.hf.transformer.wte is not small.hf.transformer.wte
    untied = packed(model_of("llama"), PLAN, GROUPS)
    assert isinstance(untied.hf.lm_head, GroupedLinear) and isinstance(untied.hf.model.embed_tokens, GroupedEmbedding)


def test_scales_are_numbers_of_float16_and_codes_those_of_the_grid():
    weight = model_of("gpt").blocks[0].ffn.up.weight
    exact, stored = ternarise(weight, PLAN), ternary_of(weight, PLAN)
    assert torch.equal(stored.codes_RC, exact.codes_RC)
    assert torch.equal(stored.scale_R1, exact.scale_R1.half().float())
    trained = TernaryLinear(nn.Linear(37, 20, bias=False), FLOATS)
    trained.weight = nn.Parameter(weight.detach()[:, : weight.shape[1]].clone())
    eye = torch.eye(weight.shape[1])
    assert torch.equal(trained(eye).T, stored.dense()), "the training form sees the same numbers"


def test_packed_linear_takes_any_leading_shape_and_keeps_the_dtype():
    packed_map = PackedLinear.from_ternary(ternarise(torch.randn(5, 70), PLAN), torch.ones(5), PLAN)
    x = torch.randn(2, 3, 70)
    assert (
        packed_map(x).shape == (2, 3, 5) and packed_map(x[0, 0]).shape == (5,) and packed_map(x[:0]).shape == (0, 3, 5)
    )
    assert packed_map(x.bfloat16()).dtype == torch.bfloat16
    assert close(packed_map(x)[1, 2], packed_map(x[1, 2]))


def test_an_embedding_in_training_rounds_only_what_is_asked_for():
    source = nn.Embedding(50, 9)
    trained = FakeGroupedEmbedding(source, GroupPlan(bits=4, group=4))
    assert trained.latent is source.weight and list(trained.state_dict()) == ["weight"]
    few, many = torch.tensor([[3, 7]]), torch.arange(50).repeat(2, 1)
    assert torch.equal(trained(few), trained.weight[few]) and torch.equal(trained(many), trained.weight[many])
    assert not torch.equal(trained.weight, source.weight)


# ---- statistics and sizes


@pytest.mark.parametrize("kind", ["trm_titans", "gpt2"])
def test_calibration_sees_the_inputs_of_every_map(kind):
    model = model_of(kind).train()
    batches = [ids_of(2, 7), ids_of(3, 5).numpy(), Echo().batch(0)]
    found = calibrate(model, batches)
    assert set(found) == set(targets(model)) and model.training
    name = targets(model)[0]
    seen = []
    hook = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        for batch in batches:
            model.eval()(torch.as_tensor(getattr(batch, "inputs", batch)))
    hook.remove()
    x = torch.cat(seen)
    one = found[name]
    assert one.tokens == len(x) == 14 + 15 + 32
    assert torch.allclose(one.second_moment_C, x.square().mean(0)) and one.absmax == x.abs().max().item()
    assert one.mean_rms == pytest.approx(x.square().mean(1).sqrt().mean().item())
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert set(calibrate(fake_quantised(model, PLAN, GROUPS), batches)) == set(found)


def test_calibration_without_tokens_is_refused_and_silent_maps_are_absent():
    for batches in ([], [torch.zeros(0, 4, dtype=torch.long)]):
        with pytest.raises(DataError, match="calibration: no tokens; give at least one batch"):
            calibrate(model_of("gpt"), batches)
    found = calibrate(model_of("trm_decay"), [ids_of()])
    assert not any("recursion" in name for name in found), "t_max is 0"
    with pytest.raises(ArtifactError, match="not finite"):
        calibrate(with_infinite_norm(), [ids_of()])


@pytest.mark.parametrize("kind", EVERY)
def test_sizes_count_every_stored_byte_once(kind):
    model = model_of(kind)
    small = packed(model, PLAN, GROUPS)
    for one in (model, small):
        stored = {id(t): t.nbytes for t in one.state_dict(keep_vars=True).values()}
        found = sizes(one)
        assert found["total"] == sum(stored.values()) == sum(found[part] for part in found if part != "total")
    assert logical_parameters(small) == logical_parameters(model) == parameter_count(model)
    assert sizes(small)["ternary"] == sum(
        m.codes.nbytes + m.scale.nbytes for m in quantised_modules(small).values() if isinstance(m, PackedLinear)
    )
    assert sizes(fake_quantised(copy.deepcopy(model), PLAN, GROUPS)) == sizes(model)


def test_a_model_in_training_for_the_grid_is_not_written(tmp_path):
    model = fake_quantised(model_of("gpt"), PLAN, GROUPS)
    assert is_fake(model) and not is_packed(model)
    with pytest.raises(ArtifactError, match="fake-quantised model: its weights are not those it computes with; write"):
        write_model(model, None, tmp_path)
    assert not list(tmp_path.iterdir())
    write_model(restored(model), None, tmp_path)
    assert (tmp_path / "model.safetensors").is_file()


# ---- sub-layer norms


class Normed(TernaryPlan):
    """The plan with sub-layer norms."""

    sub_norm: bool = True


@pytest.mark.parametrize("kind", ["gpt", "trm_titans", "gpt2", "llama"])
def test_sub_layer_norms_start_near_the_identity_and_are_packed(kind):
    model = model_of(kind, exact=False)
    found = calibrate(model, [ids_of()])
    model.requires_grad_(True)
    before = scores(model)
    trained = fake_quantised(model, Normed(), GROUPS, 0.0, found)
    assert torch.equal(scores(trained), before)
    set_strength(trained, 1.0)
    gains = {name: module.gain for name, module in trained.named_modules() if getattr(module, "gain", None) is not None}
    ends = {"gpt": 2 * 2, "trm_titans": 2 * 2 + 2, "gpt2": 2 * 2, "llama": 2 * 2}
    assert len(gains) == ends[kind] and all(gain.requires_grad for gain in gains.values())
    for name, gain in gains.items():
        assert torch.equal(gain, torch.full_like(gain, found[name].mean_rms))
        x = torch.randn(3, len(gain)).sign() * found[name].mean_rms
        assert close(sub_norm(x, gain), x, 1e-3), "inputs of average size pass as they are"
    with torch.no_grad():
        for gain in gains.values():
            gain.add_(0.1 * torch.randn_like(gain)).copy_(gain.half())
    low = {f"{name}.weight" for name in (*targets(trained), *grouped_targets(trained))}
    round_rest(trained, [id(p) for name, p in trained.named_parameters() if name in low])
    small = packed(trained, Normed(), GROUPS)
    assert agree(scores(small), scores(trained))
    trained.train().training_loss(ids_of()[:, :-1], ids_of()[:, 1:]).total.backward()
    assert all(gain.grad.any() for gain in gains.values())


def test_sub_layer_norms_need_calibration_and_have_no_plain_form():
    with pytest.raises(DataError, match="statistics: sub-layer norms start from calibration; give statistics="):
        fake_quantised(model_of("gpt"), Normed(), GROUPS)
    assert not is_fake(model_of("gpt"))
    model = model_of("gpt")
    with pytest.raises(ArtifactError, match="attn.wo has no sub-layer norm, the plan wants one; pack with the plan"):
        packed(model, Normed(), GROUPS)
    trained = fake_quantised(model, Normed(), GROUPS, statistics={})
    assert trained.blocks[0].ffn.down.gain.eq(1).all(), "no token reached it"
    with pytest.raises(ArtifactError, match="has a sub-layer norm, the plan wants none"):
        packed(trained, PLAN, GROUPS)
    for act in (restored, lambda one: dequantised(one, Normed(), GROUPS)):
        with pytest.raises(ArtifactError, match=r"^blocks.0.attn.wo: its sub-layer norm has no place in a plain model"):
            act(trained)
