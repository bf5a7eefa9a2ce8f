"""Mixers: real probabilities, hardly listening at first, and formulas as published."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_forge.phases.quietstar.branches import NEVER
from agent_forge.phases.quietstar.mixing import MIXERS, Mixed, Mixer, make_mixer
from agent_forge.phases.quietstar.talk_config import MixerConfig
from forgekit.errors import ConfigError

D, V = 8, 11
KINDS = {
    "log": MixerConfig(),
    "linear": MixerConfig(space="linear"),
    "narrow": MixerConfig(hidden=3, initial_weight=0.2),
    "attention": MixerConfig(kind="attention", heads=2),
}
EVERY = pytest.mark.parametrize("config", KINDS.values(), ids=KINDS)


def parts(M: int = 6, n: int = 3, seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    table = torch.randn(V, D, generator=g)

    def head(h):
        return torch.nn.functional.linear(h, table).index_fill(-1, torch.tensor([2, 5]), NEVER)

    return torch.randn(M, D, generator=g), torch.randn(M, n, D, generator=g), head


def stirred(config: MixerConfig) -> Mixer:
    torch.manual_seed(1)
    mixer = make_mixer(config, D)
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(torch.randn_like(p) * 0.5)
    return mixer


@EVERY
@settings(max_examples=15, deadline=None, derandomize=True)
@given(M=st.integers(1, 5), n=st.integers(1, 4), seed=st.integers(0, 999))
def test_mixtures_are_probabilities_and_never_say_what_is_ruled_out(config, M, n, seed):
    mixer, (base, thought, head) = stirred(config), parts(M, n, seed)
    each, joint = mixer(base, thought, head), mixer.together(base, thought, head)
    assert each.log_p.shape == (M, n, V) and each.weight.shape == (M, n)
    assert joint.log_p.shape == (M, V) and joint.weight.shape == (M,)
    for mixed in (each, joint):
        torch.testing.assert_close(mixed.log_p.exp().sum(-1), torch.ones_like(mixed.weight))
        assert mixed.log_p[..., [2, 5]].exp().max() == 0
        assert ((mixed.weight >= 0) & (mixed.weight <= 1)).all()


@EVERY
def test_a_fresh_mixer_hardly_listens(config):
    mixer, (base, thought, head) = make_mixer(config, D), parts()
    mixed = mixer(base, thought, head)
    torch.testing.assert_close(mixed.weight, torch.full((6, 3), config.initial_weight))
    silent = make_mixer(config.replace(initial_weight=1e-7), D)(base, thought, head)
    alone = head(base).log_softmax(-1)[:, None].expand(-1, 3, -1)
    torch.testing.assert_close(silent.log_p.exp(), alone.exp(), rtol=1e-4, atol=1e-5)


def test_log_space_is_the_published_formula_normalised():
    mixer, (base, thought, head) = stirred(MixerConfig()), parts()
    mixed = mixer(base, thought, head)
    w = mixed.weight[..., None]
    raw = (1 - w) * head(base).log_softmax(-1)[:, None] + w * head(thought).log_softmax(-1)
    assert (raw.exp().sum(-1) < 1).all(), "as published, it is no distribution"
    torch.testing.assert_close(mixed.log_p, raw - raw.exp().sum(-1, keepdim=True).log(), rtol=1e-4, atol=1e-4)


def test_linear_space_averages_probabilities():
    mixer, (base, thought, head) = stirred(MixerConfig(space="linear")), parts()
    mixed = mixer(base, thought, head)
    w = mixed.weight[..., None]
    expected = (1 - w) * head(base).softmax(-1)[:, None] + w * head(thought).softmax(-1)
    torch.testing.assert_close(mixed.log_p.exp(), expected)


def test_thoughts_heard_together_by_the_mlp_are_the_mean_of_what_each_leads_to():
    mixer, (base, thought, head) = stirred(MixerConfig()), parts()
    each, joint = mixer(base, thought, head), mixer.together(base, thought, head)
    torch.testing.assert_close(joint.log_p.exp(), each.log_p.exp().mean(1))
    torch.testing.assert_close(joint.weight, each.weight.mean(1))


def test_attention_listens_to_the_thought_that_fits():
    mixer = stirred(KINDS["attention"])
    base, thought, head = parts()
    joint = mixer.together(base, thought, head)
    shuffled = mixer.together(base, thought.flip(1), head)
    torch.testing.assert_close(joint.log_p, shuffled.log_p, rtol=1e-4, atol=1e-4)  # the order does not matter
    alone = mixer(base, thought, head)
    one = mixer.together(base, thought[:, :1], head)
    torch.testing.assert_close(one.log_p, alone.log_p[:, 0])
    assert not torch.allclose(joint.log_p, alone.log_p.exp().mean(1).log(), atol=1e-3)


def test_a_closed_gate_leaves_the_model_as_it_is_and_an_open_one_passes_the_thought():
    mixer, (base, thought, head) = make_mixer(KINDS["attention"], D), parts(n=1)
    for bias, expected in ((-50.0, base), (50.0, torch.nn.functional.rms_norm(thought[:, 0], (D,)))):
        mixer.gate.bias.data.fill_(bias)
        found = mixer.together(base, thought, head).log_p
        torch.testing.assert_close(found, head(expected).log_softmax(-1), rtol=1e-4, atol=1e-4)


@EVERY
def test_every_part_learns(config):
    mixer, (base, thought, head) = stirred(config), parts()
    loss = -mixer(base, thought, head).log_p[..., 3].mean() - mixer.together(base, thought, head).log_p[..., 3].mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
    assert all(p.grad.abs().max() > 0 for p in mixer.parameters())


def test_a_fresh_mixers_last_layer_learns_at_once():
    mixer, (base, thought, head) = make_mixer(MixerConfig(), D), parts()
    (-mixer(base, thought, head).log_p[..., 3].mean()).backward()
    assert mixer.layers[-1].weight.grad.abs().max() > 0 and mixer.layers[-1].bias.grad.abs() > 0


def test_mixers_are_found_by_name_and_others_may_enter():
    with pytest.raises(ConfigError, match="unknown quietstar_mixer 'mpl'; did you mean mlp"):
        make_mixer(MixerConfig(kind="mpl"), D)
    with pytest.raises(ConfigError, match="mixer.heads: 3 does not divide the model's width 8"):
        make_mixer(MixerConfig(kind="attention", heads=3), D)

    class Deaf(Mixer):
        def __init__(self, config, width):
            super().__init__()
            self.config, self.width = config, width

        def forward(self, base_MD, thought_MnD, head):
            log_p = head(base_MD).log_softmax(-1)[:, None].expand(-1, thought_MnD.shape[1], -1)
            return Mixed(log_p, torch.zeros(thought_MnD.shape[:2]))

    MIXERS.register("deaf")(Deaf)
    try:
        base, thought, head = parts()
        mixed = make_mixer(MixerConfig(kind="deaf"), D).together(base, thought, head)
        torch.testing.assert_close(mixed.log_p, head(base).log_softmax(-1))
    finally:
        del MIXERS._items["deaf"]


def test_initial_weight_is_a_share():
    assert math.isclose(make_mixer(MixerConfig(initial_weight=0.5), D).layers[-1].bias.item(), 0, abs_tol=1e-7)
    with pytest.raises(ValueError, match="initial_weight"):
        MixerConfig(initial_weight=1.0)
