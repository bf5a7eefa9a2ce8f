"""MuonGrokfast: each path against its reference, each switch against its absence, and exact resumption."""

import copy

import pytest
import torch
from tiny import Echo, made, same, trm_config, weights

from forgekit.errors import ConfigError
from forgekit.train.muon_grokfast import MuonGrokfast, is_hidden_matrix, newton_schulz, ternary
from forgekit.train.optim_config import MuGrokConfig

PLAIN = {
    "normuon_beta": 0.0, "cautious_decay": False, "grokfast_lambda": 0.0, "qk_clip": 0.0,
    "lr": 0.01, "fallback_lr": 0.01,
}  # fmt: skip


def parameters(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    return [torch.nn.Parameter(torch.randn(shape, generator=g)) for shape in shapes]


def push(params: list[torch.Tensor], step: int) -> None:
    """A gradient that depends on the step alone."""
    g = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g)


def run(config: MuGrokConfig, steps: int = 4, shapes=((6, 4), (6, 4), (5,))) -> list[torch.Tensor]:
    params = parameters(*shapes)
    optimizer = MuonGrokfast(params, config)
    for step in range(steps):
        push(params, step)
        optimizer.step()
    return [p.detach() for p in params]


@pytest.mark.parametrize("coefficients, low, high", [("quintic", 0.6, 1.3), ("polar_express", 0.85, 1.1)])
@pytest.mark.parametrize("shape", [(8, 32), (32, 8), (16, 16)])
def test_newton_schulz_makes_singular_values_near_one_and_keeps_the_spaces(coefficients, low, high, shape):
    G = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    if shape == (16, 16):
        G = G + 4 * torch.eye(16)  # a square random matrix has singular values near zero, which stay small
    X = newton_schulz(G, 5 if coefficients == "quintic" else 8, coefficients)
    values = torch.linalg.svdvals(X)
    assert float(values.min()) > low and float(values.max()) < high
    U, _, V = torch.linalg.svd(G, full_matrices=False)
    assert float((X * (U @ V)).sum() / (X.norm() * (U @ V).norm())) > 0.98


def test_newton_schulz_of_nothing_is_nothing():
    assert newton_schulz(torch.zeros(1, 3, 4), 5).abs().max() == 0


def test_every_parameter_is_routed_once_and_only_hidden_matrices_to_muon():
    model = made(trm_config(emb_rank=4))
    optimizer = MuonGrokfast(model.named_parameters(), MuGrokConfig())
    names = {id(p): name for name, p in model.named_parameters()}
    routed = {g["kind"]: [names[id(p)] for p in g["params"]] for g in optimizer.param_groups}
    assert sorted(routed["muon"] + routed["adamw"]) == sorted(names.values())
    for part in ("embedding", "norm", "gain_H", "halt", "gates", "conv", "bias", "z0"):
        assert not any(part in name for name in routed["muon"])
    for part in ("wq", "wk", "wv", "wo", "ffn", "wqkv", "recursion.g", "recursion.h.", "gate_in"):
        assert any(part in name for name in routed["muon"])


def test_names_of_hugging_face_embeddings_and_heads_go_to_adamw():
    square = torch.ones(4, 4)
    hidden = ["transformer.h.0.attn.c_attn.weight", "model.layers.0.mlp.up_proj.weight"]
    other = ["model.embed_tokens.weight", "lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"]
    assert all(is_hidden_matrix(name, square) for name in hidden)
    assert not any(is_hidden_matrix(name, square) for name in other)
    assert not is_hidden_matrix("x", torch.ones(1, 4)) and not is_hidden_matrix("x", torch.ones(4))


def test_muon_can_be_switched_off():
    optimizer = MuonGrokfast(parameters((4, 4), (3,)), MuGrokConfig(use_muon=False))
    assert [g["kind"] for g in optimizer.param_groups] == ["adamw"]


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_the_adamw_path_is_adamw(decay):
    config = MuGrokConfig(**{**PLAIN, "use_muon": False, "fallback_weight_decay": decay})
    ours = run(config, steps=7)
    params = parameters((6, 4), (6, 4), (5,))
    theirs = torch.optim.AdamW(params, lr=0.01, betas=config.betas, eps=config.eps, weight_decay=decay)
    for step in range(7):
        push(params, step)
        theirs.step()
    for a, b in zip(ours, params):
        torch.testing.assert_close(a, b.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(6, 4), (4, 6), (5, 5)])
@pytest.mark.parametrize("scale", ["original", "match_rms_adamw"])
def test_the_bare_muon_path_is_torch_optim_muon(shape, scale):
    config = MuGrokConfig(**{**PLAIN, "weight_decay": 0.1, "scale": scale})
    ours = run(config, steps=5, shapes=(shape, shape))
    params, start = parameters(shape, shape), parameters(shape, shape)
    theirs = torch.optim.Muon(params, lr=0.01, weight_decay=0.1, momentum=0.95, nesterov=True, adjust_lr_fn=scale)
    for step in range(5):
        push(params, step)
        theirs.step()
    for a, b, before in zip(ours, params, start):
        moved = b.detach() - before.detach()
        assert float((a - b.detach()).norm() / moved.norm()) < 0.02


def test_grokfast_adds_the_slow_gradient_times_lambda():
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = MuonGrokfast([p], MuGrokConfig(grokfast_alpha=0.9, grokfast_lambda=2.0))
    slow = torch.zeros(3)
    for step in range(3):
        push([p], step)
        raw = p.grad.clone()
        slow = 0.9 * slow + 0.1 * raw
        optimizer._filter([p])
        torch.testing.assert_close(p.grad, raw + 2.0 * slow)


def test_grokfast_with_lambda_zero_keeps_no_average():
    params = parameters((4, 4))
    optimizer = MuonGrokfast(params, MuGrokConfig(**PLAIN))
    push(params, 0)
    optimizer.step()
    assert "slow" not in optimizer.state[params[0]]


SWITCHES = [
    {"lr": 0.02}, {"fallback_lr": 0.02}, {"weight_decay": 0.5}, {"fallback_weight_decay": 0.5}, {"use_muon": False},
    {"ns_steps": 2}, {"ns_coefficients": "polar_express"}, {"momentum": 0.5}, {"scale": "match_rms_adamw"},
    {"normuon_beta": 0.9}, {"cautious_decay": True}, {"grokfast_lambda": 1.0}, {"betas": (0.5, 0.95)},
    {"betas": (0.9, 0.5)}, {"eps": 0.1}, {"ste": True},
]  # fmt: skip


@pytest.mark.parametrize("switch", SWITCHES, ids=str)
def test_every_switch_changes_the_result(switch):
    base, other = run(MuGrokConfig(**PLAIN)), run(MuGrokConfig(**{**PLAIN, **switch}))
    assert any(not torch.equal(a, b) for a, b in zip(base, other))


def test_grokfast_alpha_changes_the_result_when_lambda_is_on():
    results = [run(MuGrokConfig(**{**PLAIN, "grokfast_lambda": 1.0, "grokfast_alpha": a})) for a in (0.5, 0.98)]
    assert not torch.equal(results[0][0], results[1][0])


def test_normuon_evens_rows_out_and_keeps_the_size_of_the_update():
    params = parameters((8, 4))
    optimizer = MuonGrokfast(params, MuGrokConfig(**{**PLAIN, "normuon_beta": 0.5}))
    update = torch.randn(1, 8, 4) * torch.arange(1, 9)[:, None]
    even = optimizer._equalise_rows(params, update)
    rows = even[0].square().mean(-1).sqrt()
    assert float(rows.max() / rows.min()) == pytest.approx(1, rel=1e-3)
    torch.testing.assert_close(even.norm(), update.norm())


def test_cautious_decay_pulls_only_where_the_step_does():
    optimizer = MuonGrokfast(parameters((2, 2)), MuGrokConfig())
    weight, update = torch.tensor([[1.0, -1.0], [2.0, -2.0]]), torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    optimizer._decay([weight], [update], 0.5)
    assert weight.tolist() == [[0.5, -1.0], [2.0, -1.0]]


@pytest.mark.parametrize("qk_norm", [True, False])
@pytest.mark.parametrize("ste", [True, False])
def test_qk_clip_keeps_attention_logits_under_the_threshold(qk_norm, ste):
    model = made(trm_config(qk_norm=qk_norm)).train()
    config = MuGrokConfig(**{**PLAIN, "lr": 1e-6, "fallback_lr": 1e-6, "qk_clip": 0.5, "ste": ste})
    optimizer = MuonGrokfast(model.named_parameters(), config, model)
    x = torch.from_numpy(Echo().batch(0).inputs)
    seen = []
    for _ in range(12):
        model.training_loss(x, x).total.backward()
        seen.append(max(float(a.logit_bound_H.max()) for a in model.attentions()))
        optimizer.step()
        optimizer.zero_grad()
    # On the ternary grid a clipped head moves in jumps: it ends near the threshold, not exactly under it.
    assert seen[0] > 1 and seen[-1] < (0.75 if ste and not qk_norm else 0.501)


def test_ternary_weights_stay_on_their_grid_while_the_hidden_copy_learns():
    params = parameters((6, 4), (5,))
    start = params[0].detach().clone()
    optimizer = MuonGrokfast(params, MuGrokConfig(**{**PLAIN, "ste": True}))
    for step in range(5):
        grid = params[0].detach().unique()
        assert len(grid) <= 3 and float(grid.max()) == pytest.approx(-float(grid.min()))
        push(params, step)
        optimizer.step()
    latent = optimizer.trained(params[0])
    assert torch.equal(params[0].detach(), ternary(latent)) and len(latent.unique()) > 20
    free = run(MuGrokConfig(**PLAIN), steps=5, shapes=((6, 4), (5,)))
    assert optimizer.trained(params[1]) is params[1] and not torch.equal(latent, start)
    torch.testing.assert_close(latent, free[0])


def test_assigned_values_are_put_on_the_grid():
    params = parameters((6, 4), (5,))
    optimizer = MuonGrokfast(params, MuGrokConfig(ste=True))
    values = {p: torch.randn_like(p) for p in params}
    optimizer.assign(values)
    assert torch.equal(optimizer.trained(params[0]), values[params[0]])
    assert torch.equal(params[0].detach(), ternary(values[params[0]]))
    assert torch.equal(params[1].detach(), values[params[1]])


def test_ternary_of_zeros_is_zeros():
    assert torch.equal(ternary(torch.zeros(2, 2)), torch.zeros(2, 2))


@pytest.mark.parametrize("ste", [False, True])
def test_a_restored_optimizer_continues_identically(ste):
    model = made(trm_config())
    config = MuGrokConfig(**{**PLAIN, "normuon_beta": 0.9, "grokfast_lambda": 0.5, "ste": ste})
    optimizer = MuonGrokfast(model.named_parameters(), config, model)

    def go(model, optimizer, steps):
        for step in steps:
            push(list(model.parameters()), step)
            optimizer.step()

    go(model, optimizer, range(3))
    twin = made(trm_config(), seed=9)
    other = MuonGrokfast(twin.named_parameters(), config, twin)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    go(model, optimizer, range(3, 6))
    go(twin, other, range(3, 6))
    assert same(weights(model), weights(twin))


def test_parameters_without_a_gradient_are_left_alone():
    params = parameters((4, 4), (4, 4), (3,), (3,))
    before = [p.detach().clone() for p in params]
    optimizer = MuonGrokfast(params, MuGrokConfig(weight_decay=0.5, fallback_weight_decay=0.5, cautious_decay=False))
    push(params[::2], 0)
    optimizer.step()
    assert [torch.equal(p.detach(), b) for p, b in zip(params, before)] == [False, True, False, True]
    frozen = torch.nn.Parameter(torch.ones(2, 2), requires_grad=False)
    assert sum(len(g["params"]) for g in MuonGrokfast([*params, frozen], MuGrokConfig()).param_groups) == 4


def test_a_closure_is_called_with_gradients_on_and_its_loss_returned():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = MuonGrokfast([p], MuGrokConfig(**PLAIN))

    def closure():
        loss = p.square().sum()
        loss.backward()
        return loss

    assert float(optimizer.step(closure).detach()) == 3.0 and float(p.detach()[0]) < 1


def test_rates_are_scaled_from_their_base():
    optimizer = MuonGrokfast(parameters((4, 4), (3,)), MuGrokConfig(lr=0.1, fallback_lr=0.01))
    optimizer.set_lr_factor(0.5)
    optimizer.set_lr_factor(0.5)
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.005]


def test_presets_carry_the_values_of_the_sources():
    presets = {phase: MuGrokConfig.from_phase(phase) for phase in range(1, 9)}
    assert [presets[i].grokfast_lambda for i in range(1, 9)] == [0.3, 0.2, 0.1, 2.0, 2.0, 0.2, 0.2, 0.2]
    assert [presets[i].lr for i in range(1, 9)] == [1e-3, 1e-4, 5e-4, 1e-3, 1e-3, 1e-4, 1e-4, 1e-4]
    assert [presets[i].qk_clip for i in range(1, 9)] == [30, 30, 25, 30, 30, 25, 30, 30]
    assert [i for i in range(1, 9) if presets[i].ste] == [4, 5, 8]
    assert {p.grokfast_alpha for p in presets.values()} == {0.98}
    assert (presets[1].ns_steps, presets[1].momentum, presets[3].kl_coefficient) == (3, 0.9, 0.1)


@pytest.mark.parametrize("phase", [0, 9])
def test_there_is_no_preset_beside_the_eight(phase):
    with pytest.raises(ConfigError, match=f"phase: no preset for phase {phase}; choose 1 to 8"):
        MuGrokConfig.from_phase(phase)
