"""Both families: cost formulas, cached equals uncached, reach of window and memory, recursion and halting."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tiny import VOCAB, gpt_config, gradients, made, trm_config

from forgekit.models.base import CausalLM, parameter_count, score_at, supervised_positions
from forgekit.models.constants import IGNORE
from forgekit.models.trm_titans import HALT_BIAS, HALT_SPEED

quick = settings(max_examples=20, deadline=None, derandomize=True)
BOTH = pytest.mark.parametrize("config", [gpt_config(), gpt_config(window=4), trm_config()], ids=["gpt", "swa", "trm"])
SHAPES = {
    "heads": st.sampled_from([1, 2, 4]),
    "d_head": st.sampled_from([2, 4, 6]),
    "n_layers": st.integers(1, 3),
    "ffn_hidden": st.integers(1, 40),
    "vocab_size": st.integers(2, 50),
    "emb_rank": st.integers(0, 1),
    "qk_norm": st.booleans(),
}


def ids(batch: int, T: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(VOCAB, (batch, T), generator=torch.Generator().manual_seed(seed))


@quick
@given(shape=st.fixed_dictionaries(SHAPES), window=st.integers(0, 5))
def test_gpt_has_as_many_parameters_as_its_formula_says(shape, window):
    heads, width = shape.pop("heads"), shape.pop("d_head")
    config = gpt_config(d_model=heads * width, n_heads=heads, window=window, **shape)
    assert parameter_count(made(config)) == config.parameters() == sum(config.split().values())


@quick
@given(
    shape=st.fixed_dictionaries(SHAPES),
    memory=st.sampled_from(["titans", "decay", "none"]),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 20)),
    flags=st.tuples(st.integers(0, 3), st.booleans()),
    layers=st.sets(st.integers(0, 2)),
)
def test_trm_titans_has_as_many_parameters_as_its_formula_says(shape, memory, sizes, flags, layers):
    heads, width = shape.pop("heads"), shape.pop("d_head")
    owners = tuple(i for i in layers if i < shape["n_layers"])
    config = trm_config(
        d_model=heads * width, n_heads=heads, memory=memory, memory_layers=owners, memory_heads=sizes[0],
        d_mem=sizes[0] * sizes[1], gate_hidden=sizes[2], trm_hidden=sizes[3], t_max=flags[0] if sizes[3] else 0,
        conv=flags[1], **shape,
    )  # fmt: skip
    assert parameter_count(made(config)) == config.parameters()


@pytest.mark.parametrize(
    "changes, word",
    [
        ({"n_heads": 3}, "n_heads"),
        ({"emb_rank": 16}, "emb_rank"),
        ({"d_mem": 7}, "d_mem"),
        ({"memory_layers": (2,)}, "memory_layers"),
        ({"window": 0}, "window"),
        ({"t_max": 1, "trm_hidden": 0}, "trm_hidden"),
    ],
)
def test_impossible_shapes_are_refused(changes, word):
    with pytest.raises(ValidationError, match=word):
        trm_config(**changes)


@BOTH
def test_both_families_keep_the_protocol(config):
    model = made(config, stir=0.1)
    assert isinstance(model, CausalLM)
    out = model.eval()(ids(2, 5))
    assert out.logits.shape == (2, 5, VOCAB) and out.logits.dtype == torch.float32 and out.state is None
    assert model.flops_per_token(8) == config.flops_per_token(8)
    assert len(model.attentions()) == config.n_layers


@quick
@given(
    cuts=st.lists(st.integers(1, 12), max_size=4),
    config=st.sampled_from(
        [gpt_config(), gpt_config(window=3), trm_config(), trm_config(conv=False), trm_config(memory="decay", t_max=0)]
    ),
)
def test_cached_equals_uncached(cuts, config):
    model, x = made(config, stir=0.1).eval(), ids(2, 13)
    whole = model(x).logits
    state, parts, edges = model.initial_state(2), [], [0, *sorted(set(cuts)), 13]
    for a, b in zip(edges, edges[1:]):
        out = model(x[:, a:b], state)
        state = out.state
        parts.append(out.logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, rtol=1e-4, atol=1e-4)
    assert state.position_B.tolist() == [13, 13]


@quick
@given(
    lengths=st.tuples(*[st.integers(1, 7)] * 3),
    config=st.sampled_from([gpt_config(), gpt_config(window=3), trm_config(), trm_config(memory="decay")]),
)
def test_padded_rows_answer_and_go_on_as_if_alone(lengths, config):
    model, x, more = made(config, stir=0.1).eval(), ids(3, 7), ids(3, 2, seed=1)
    first = model(x, model.initial_state(3), torch.tensor(lengths))
    order = torch.tensor([2, 0, 1])
    second = model(more[order], first.state.rows(order))
    for place, row in enumerate(order.tolist()):
        n = lengths[row]
        alone = model(torch.cat([x[row, :n], more[row]])[None]).logits[0]
        torch.testing.assert_close(first.logits[row, :n], alone[:n], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(second.logits[place], alone[n:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize("memory", ["none", "titans", "decay"])
def test_beyond_the_window_only_memory_reaches(memory, conv):
    config = trm_config(memory=memory, memory_layers=(0,), t_max=1, conv=conv)
    model, x = made(config, stir=0.2).eval(), ids(1, 20)
    base = model(x).logits[0, -1]

    @torch.no_grad()
    def change(distance: int) -> float:
        other = x.clone()
        other[0, 19 - distance] = (other[0, 19 - distance] + 1) % VOCAB
        return float((model(other).logits[0, -1] - base).abs().max())

    assert config.reach == (12 if conv else 6)
    assert change(config.reach) > 1e-4
    if memory == "none":
        assert all(change(d) == 0 for d in range(config.reach + 1, 20))
    else:
        assert all(change(d) > 1e-6 for d in range(config.reach + 1, 20))


def test_flops_grow_with_context_steps_and_parts():
    config = trm_config(window=32)
    taps = config.flops_per_token(8) - trm_config(window=32, conv=False).flops_per_token(8)
    assert taps == 2 * sum(block.attn.conv_CJ.numel() for block in made(config).blocks)
    at = config.flops_per_token
    assert at(8) < at(16) and at(32) == at(500)
    assert at(8, 1) < at(8, 2) == at(8)
    assert gpt_config(window=4).flops_per_token(8) < gpt_config().flops_per_token(8)
    assert trm_config(memory="none").flops_per_token(8) < trm_config().flops_per_token(8)
    # Two per weight met: the count without attention products is that of the matrices.
    plain = gpt_config(qk_norm=False)
    matrices = sum(p.numel() for p in made(plain).parameters() if p.ndim == 2)
    assert plain.flops_per_token(1) == 2 * matrices + plain.n_layers * 4 * plain.d_model


@pytest.mark.parametrize("config", [gpt_config(), trm_config(t_max=0), trm_config(t_max=1)], ids=["gpt", "0", "1"])
def test_training_costs_three_forward_passes_where_every_token_is_supervised_once(config):
    for context in (8, 64):
        assert config.train_flops_per_token(context, 1.0) == pytest.approx(3 * config.flops_per_token(context))
    unheard = config.train_flops_per_token(8, 0.0)
    recursion = config.step_flops() if getattr(config, "t_max", 0) else 0
    spared = config.head_flops() + recursion
    assert unheard == pytest.approx(3 * (config.flops_per_token(8) - spared)), "without labels neither head nor steps"


def test_training_cost_grows_with_steps_and_labels():
    at = [trm_config(t_max=t).train_flops_per_token(16, 0.5) for t in range(5)]
    assert at == sorted(set(at))
    steps = trm_config().step_flops() + trm_config().head_flops()
    assert [b - a for a, b in zip(at[1:], at[2:])] == pytest.approx([1.5 * steps] * 3), "every step asks the head"
    for config in (gpt_config(), trm_config()):
        few, half, most = (config.train_flops_per_token(16, share) for share in (0.0, 0.5, 1.0))
        assert 0 < few < half < most and half == pytest.approx((few + most) / 2)
    free = [trm_config(t_max=t).train_flops_per_token(16, 0.0) for t in range(3)]
    assert free == pytest.approx([free[0]] * 3), "recursion runs on supervised tokens only"


@pytest.mark.parametrize(
    "config",
    [gpt_config(), gpt_config(window=4), trm_config(t_max=3), trm_config(t_max=0), trm_config(memory="none")],
    ids=["gpt", "swa", "trm", "no recursion", "no memory"],
)
def test_scores_at_some_positions_are_those_of_a_full_pass(config, monkeypatch):
    model, x = made(config, stir=0.2).eval(), ids(3, 9)
    at = torch.tensor([0, 4, 8, 9, 17, 26])
    full = model(x)
    asked: list[int] = []
    head = model.embedding.unembed
    monkeypatch.setattr(model.embedding, "unembed", lambda h: asked.append(h[..., 0].numel()) or head(h))
    part = score_at(model, x, at)
    assert part.logits.shape == (6, VOCAB) and part.logits.dtype == torch.float32
    torch.testing.assert_close(part.logits, full.logits.flatten(0, 1)[at], rtol=1e-5, atol=1e-5)
    assert asked == [6], "only what is asked for pays for the head"
    if getattr(config, "t_max", 0):
        assert part.steps.tolist() == full.steps.flatten()[at].tolist()
    else:
        assert part.steps is None and full.steps is None


# --- recursion and halting ---


def halting_model(threshold: float, bias: float, **changes):
    model = made(trm_config(act_threshold=threshold, t_max=4, **changes), stir=0.2).eval()
    model.recursion.teacher_bias.fill_(bias)
    return model


def test_a_threshold_of_one_takes_all_steps_and_a_low_one_takes_one():
    assert bool((halting_model(1.0, 50.0)(ids(2, 5)).steps == 4).all())
    assert bool((halting_model(0.9, -20.0)(ids(2, 5)).steps == 4).all())
    assert bool((halting_model(1e-4, 20.0)(ids(2, 5)).steps == 1).all())


def test_positions_halt_by_themselves():
    model = halting_model(0.5, 0.0)
    model.recursion.teacher_weight.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(40, 16, generator=torch.Generator().manual_seed(1))
    answers, steps = model.recursion.infer(x)
    assert len(set(steps.tolist())) > 1
    for i in range(40):
        y, n = model.recursion.infer(x[i : i + 1])
        assert n.item() == steps[i]
        torch.testing.assert_close(y[0], answers[i], rtol=1e-5, atol=1e-5)


def test_without_steps_there_is_no_recursion():
    model = made(trm_config(t_max=0), stir=0.1)
    assert model(ids(2, 4)).steps is None
    loss = model.training_loss(ids(2, 4), ids(2, 4, seed=1))
    assert "act/mean_steps" not in loss.parts
    loss.total.backward()
    assert all(p.grad is None for p in model.recursion.parameters()), "carried along, not trained"
    before = model.recursion.teacher_bias.clone()
    with torch.no_grad():
        model.recursion.halt.bias.fill_(5.0)
    model.after_step()
    assert torch.equal(model.recursion.teacher_bias, before)
    assert made(trm_config(t_max=0, trm_hidden=0)).recursion is None


def test_a_child_that_begins_to_recurse_begins_as_its_parent():
    parent, x = made(trm_config(t_max=0)).eval(), ids(2, 9)
    with torch.no_grad():
        for block in parent.blocks:
            block.ffn.down.weight.normal_()
    child = made(trm_config(t_max=3), seed=5).eval()
    child.load_state_dict(parent.state_dict())
    out = child(x)
    assert torch.equal(out.logits, parent(x).logits) and bool((out.steps == 3).all())


def test_training_loss_weighs_its_steps_and_adds_halting_and_gate_entropy():
    config = trm_config(t_max=3, step_decay=0.4, act_weight=0.3, gate_entropy=0.2, detach_steps=False)
    model, x, y = made(config, stir=0.2), ids(2, 6), ids(2, 6, seed=1)
    y[0, :3] = IGNORE
    loss = model.training_loss(x, y)
    pick = supervised_positions(y)
    h, _, entropy = model.features(x, None, None)
    h, target = h.flatten(0, 1)[pick], y.flatten()[pick]
    answer, z, expected, weights = h, model.recursion.z0.expand_as(h), 0.0, [0.16, 0.4, 1.0]
    for weight in weights:
        answer, z = model.recursion.step(h, answer, z)
        logits = model.embedding.unembed(answer)
        right = (logits.argmax(-1) == target).float()
        expected = expected + weight / sum(weights) * F.cross_entropy(logits, target)
        halt = model.recursion.halting(z, teacher=False)
        expected = expected + 0.3 / 3 / HALT_SPEED * F.binary_cross_entropy_with_logits(halt, right)
    expected = expected - 0.2 * entropy.flatten()[pick].mean()
    torch.testing.assert_close(loss.total, expected)
    torch.testing.assert_close(loss.nats, F.cross_entropy(logits, target))
    assert loss.tokens == 9 and float(loss.parts["token_accuracy"]) == pytest.approx(float(right.mean()))
    assert 0 < float(loss.parts["gate/entropy"]) <= 1


def test_the_halting_loss_teaches_the_halting_head_only():
    def grads(weight: float):
        model = made(trm_config(act_weight=weight), stir=0.2)
        return gradients(model, lambda: model.training_loss(ids(2, 6), ids(2, 6, seed=1)).total)

    off, on = grads(0.0), grads(5.0 * HALT_SPEED)
    changed = {name for name in on if not torch.allclose(on[name], off[name], atol=1e-7)}
    assert changed == {"recursion.halt.weight", "recursion.halt.bias"}


def test_detached_steps_pass_no_gradient_back():
    def first_step_gradient(detach: bool) -> torch.Tensor:
        model = made(trm_config(t_max=2, detach_steps=detach, act_weight=0.0, step_decay=1e-9), stir=0.2)
        # With this decay only the last step counts: through z0 it is reached by way of the first step alone.
        return gradients(model, lambda: model.training_loss(ids(2, 6), ids(2, 6, seed=1)).total)["recursion.z0"]

    assert first_step_gradient(True).abs().max() < 1e-8
    assert first_step_gradient(False).abs().max() > 1e-6


def test_the_teacher_starts_reluctant_and_follows_the_student():
    model = made(trm_config(act_ema=0.75))
    start = float(model.recursion.teacher_bias)
    assert start * HALT_SPEED == pytest.approx(HALT_BIAS)
    assert float(model.recursion.halting(torch.ones(1, 16), teacher=True)) == pytest.approx(HALT_BIAS)
    with torch.no_grad():
        model.recursion.halt.bias.fill_(1.0)
        model.recursion.halt.weight.fill_(2.0)
    model.after_step()
    assert float(model.recursion.teacher_bias) == pytest.approx(0.75 * start + 0.25)
    assert model.recursion.teacher_weight.unique().tolist() == pytest.approx([0.5])
    assert "recursion.teacher_bias" in model.state_dict()


@BOTH
def test_recomputed_activations_give_the_same_gradients(config):
    model, x, y = made(config, stir=0.1).train(), ids(2, 8), ids(2, 8, seed=1)
    plain = gradients(model, lambda: model.training_loss(x, y).total)
    model.checkpoint_activations = True
    again = gradients(model, lambda: model.training_loss(x, y).total)
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


@BOTH
def test_a_batch_without_supervised_tokens_has_loss_zero_and_zero_gradients(config):
    model = made(config, stir=0.1)
    loss = model.training_loss(ids(2, 8), torch.full((2, 8), IGNORE))
    assert loss.tokens == 0 and float(loss.total.detach()) == 0 and float(loss.nats) == 0
    loss.total.backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


@BOTH
def test_every_parameter_is_reached(config):
    model = made(config, stir=0.1)
    loss = model.training_loss(ids(2, 8), ids(2, 8, seed=1))
    loss.total.backward()
    unreached = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert unreached == [] and math.isfinite(float(loss.total))


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e4])
def test_extreme_weights_give_no_nan(scale):
    model = made(trm_config(), stir=0.1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale)
    loss = model.training_loss(ids(2, 40), ids(2, 40, seed=1))
    assert not math.isnan(float(loss.total))
    assert not model.eval()(ids(2, 40)).logits.isnan().any()


def test_a_window_of_one_scores_a_first_token():
    out = made(trm_config(window=1), stir=0.1).eval()(ids(1, 1))
    assert out.logits.isfinite().all() and float(out.aux["gate/entropy"]) <= 1
