"""Profiles and the parameter-budget solver: every shipped size is met, by formula and by the real model."""

from __future__ import annotations

import json

import pytest

from agent_forge.profile import ModelPlan, Profile, load_profile, profile_folder, profile_names, with_values
from forgekit.errors import ConfigError
from forgekit.models.budget import solve_budget
from forgekit.models.config import GPTConfig, TRMTitansConfig

BUILT = ("pico", "nano")
"""Small enough to be built here; of the larger ones the formula is checked."""
MINIMAL = {"name": "mine", "model": {"target_parameters": 100_000, "settings": {"vocab_size": 448}}}


def test_the_smallest_profiles_are_shipped_in_order():
    assert profile_names()[:2] == list(BUILT)
    assert profile_folder().is_dir()


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profiles_meet_their_budget(name):
    profile = load_profile(name)
    budget = profile.model.solve()
    assert profile.name == name and profile.about
    assert abs(budget.deviation) <= profile.model.tolerance
    assert budget.parameters == sum(n for _, n, _ in budget.table()) == budget.config.parameters()
    assert sum(share for *_, share in budget.table()) == pytest.approx(1)
    assert budget.split["embedding"] / budget.parameters <= 0.4
    assert profile.model_config_solved().max_seq_len == profile.context


@pytest.mark.parametrize("name", BUILT)
def test_the_formula_counts_the_real_model(name):
    from forgekit.models.io import build_model

    config = load_profile(name).model_config_solved()
    model = build_model(config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == config.parameters()


@pytest.mark.parametrize(
    "changes",
    [
        {"emb_rank": 16},
        {"memory": "decay"},
        {"memory": "none"},
        {"t_max": 0},
        {"qk_norm": False},
        {"memory_layers": (0, 1), "memory_heads": 4},
        {"micro_steps": 3},
    ],
)
def test_the_formula_counts_every_variant(changes):
    from forgekit.models.io import build_model

    config = TRMTitansConfig(
        **{"vocab_size": 300, "d_model": 32, "n_layers": 2, "d_mem": 16, "trm_hidden": 24, "window": 8, **changes}
    )
    model = build_model(config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == config.parameters()


@pytest.mark.parametrize("target", [200_000, 1_000_000, 6_000_000, 25_000_000, 100_000_000])
def test_the_solver_meets_targets_of_all_sizes(target):
    vocabulary = 32768 if target >= 25_000_000 else 2048
    template = TRMTitansConfig(vocab_size=vocabulary, n_layers=4, n_heads=4, memory_heads=2)
    budget = solve_budget(template, target)
    assert abs(budget.deviation) <= 0.1 and budget.target == target
    assert budget.split["embedding"] <= 0.4 * budget.parameters
    assert budget.config.d_model % (2 * budget.config.n_heads) == 0


def test_a_large_vocabulary_is_factorised_and_a_small_one_is_not():
    template = GPTConfig(vocab_size=32768, n_layers=6, n_heads=8)
    assert solve_budget(template, 25_000_000).config.emb_rank > 0
    assert solve_budget(template.replace(vocab_size=256), 25_000_000).config.emb_rank == 0


@pytest.mark.parametrize(
    ("template", "target", "options"),
    [
        (GPTConfig(n_layers=2), 1_000, {}),
        (GPTConfig(n_layers=2, vocab_size=50_000), 100_000, {}),
        (GPTConfig(n_layers=2), 1_000_000, {"width": 100}),
        (GPTConfig(n_layers=2), 1_000_000, {"width": 1024}),
    ],
)
def test_what_cannot_be_solved_is_told(template, target, options):
    with pytest.raises(ConfigError) as caught:
        solve_budget(template, target, **options)
    assert str(caught.value) == (
        f"target_parameters: no shape of 2 layers and a {template.vocab_size} vocabulary has {target} parameters "
        "within 10%; change n_layers, vocab_size, d_model or the target"
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"model": {"family": "gptt"}}, "model.family: unknown model family 'gptt'; did you mean gpt?"),
        ({"model": {"target_parameters": 10}}, "model.target_parameters: no shape of"),
        ({"model": {"settings": {"vocab": 3}}}, "model.settings.vocab: unknown key; did you mean"),
        ({"model": {"settings": {"n_layers": 0}}}, "model.settings.n_layers: value 0 refused: input should be greater"),
        ({"model": {"settings": {"n_heads": "x"}}}, "model.settings.n_heads: value 'x' refused"),
        ({"model": {"settings": {"memory_layers": [9]}}}, "model.settings: memory_layers (9,) must lie in 0..2"),
        ({"gate": "maybe"}, "gate: value 'maybe' refused"),
        ({"context": 0}, "context: value 0 refused: input should be greater than 0"),
        ({"cleanup": {"max_sessions_total": 0}}, "cleanup.max_sessions_total: value 0 refused"),
        ({"phases": {"cognat": {}}}, "phases.cognat: unknown phase 'cognat'; did you mean cognate?"),
        ({"phases": {"cognate": {}}}, "phases.cognate.specialists: missing; add phases.cognate.specialists = ..."),
        ({"phase": {}}, "phase: unknown key; did you mean phases or handoffs?"),
    ],
)
def test_refused_profiles_name_the_field(values, told):
    with pytest.raises(ConfigError) as caught:
        Profile.build({**MINIMAL, **values})
    assert str(caught.value).startswith(told)


def test_a_profile_is_the_same_as_toml_and_as_json(tmp_path):
    shipped = load_profile("pico")
    (tmp_path / "mine.json").write_text(json.dumps(shipped.model_dump(mode="json")))
    assert load_profile(str(tmp_path / "mine.json")) == shipped
    assert load_profile(str(profile_folder() / "pico.toml")) == shipped


def test_a_phase_the_profile_does_not_run_is_told():
    profile = Profile.build(MINIMAL)
    with pytest.raises(
        ConfigError, match="profile 'mine' has no settings for phase 'cognate'; this profile runs: nothing"
    ):
        profile.phase("cognate")
    assert load_profile("pico").phase("cognate").specialists[0].name == "reasoning"


@pytest.mark.parametrize("heads", [{"n_heads": 3}, {"n_heads": 5, "memory_heads": 3}, {"memory_heads": 6}])
def test_heads_need_not_divide_widths_that_are_solved(heads):
    shape = ModelPlan(target_parameters=900_000, settings=heads).solve().config
    assert shape.d_model % (2 * shape.n_heads) == 0 and shape.d_mem % shape.memory_heads == 0


def test_model_plans_refuse_what_they_cannot_solve():
    with pytest.raises(ConfigError, match="model.target_parameters"):
        ModelPlan(target_parameters=10)


def test_values_can_be_set_one_by_one():
    wanted = ["phases.cognate.ablate=true", "gate=stop", "model.settings.window = 8"]
    changed = with_values(load_profile("pico"), wanted)
    assert changed.phase("cognate").ablate and changed.gate == "stop"
    assert changed.model_config_solved().window == 8
    assert with_values(load_profile("pico"), []) == load_profile("pico")


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("gate", "--set: 'gate' is not an assignment; write --set key=value"),
        ("gate=perhaps", "gate: value 'perhaps' refused"),
        ("phases.cognate.trunk.stepps=3", "phases.cognate.trunk.stepps: unknown key; did you mean steps or seed?"),
        ("gate.deep=3", "--set gate.deep: gate has no fields; shorten the key"),
    ],
)
def test_settings_that_are_refused_name_the_field(assignment, told):
    with pytest.raises(ConfigError) as caught:
        with_values(load_profile("pico"), [assignment])
    assert told in str(caught.value)
