"""The plan of a run: what it would cost, told without paying it."""

from __future__ import annotations

import pytest
import torch

import forgekit.models.io
from agent_forge.pipeline import plan as pipeline_plan
from agent_forge.pipeline.plan import LARGE, SAMPLE_LAYERS, forecast_run
from agent_forge.profile import ModelPlan, Profile, load_profile
from forgekit.errors import ConfigError


@pytest.fixture(autouse=True)
def threads():
    """A forecast sets the number of threads of its profile."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def built(monkeypatch) -> list:
    """Shapes of the models that were asked for; a small one is really built in their place."""
    shapes = []
    build = forgekit.models.io.build_model

    def small(shape):
        shapes.append(shape)
        narrow = (
            {"d_mem": 8, "gate_hidden": 8, "trm_hidden": 8 if shape.trm_hidden else 0}
            if shape.family == "trm_titans"
            else {}
        )
        return build(shape.replace(d_model=64, emb_rank=2, ffn_hidden=8, **narrow))

    monkeypatch.setattr(forgekit.models.io, "build_model", small)
    monkeypatch.setattr(pipeline_plan, "SAMPLE_TOKENS", 128)
    return shapes


def one_thread(name: str) -> Profile:
    return load_profile(name).replace(threads=1)


def test_a_forecast_counts_every_training_and_takes_time():
    profile = one_thread("pico")
    state = torch.get_rng_state()
    plan = forecast_run(profile)
    assert torch.equal(torch.get_rng_state(), state), "measuring speed must not move the seeds of a run"
    cognate = profile.phase("cognate")
    trains = [cognate.trunk, *(cognate.training_of(s) for s in cognate.specialists)]
    stages = [s for s in plan["stages"] if s["phase"] == "cognate"]
    assert [s["stage"] for s in stages] == ["trunk", *(s.name for s in cognate.specialists)]
    for stage, train in zip(stages, trains):
        assert (stage["steps"], stage["tokens"]) == (train.steps, train.steps * train.rows * train.seq_len)
        assert stage["seconds"] > 0
    assert plan["seconds"] == pytest.approx(sum(s["seconds"] for s in plan["stages"]), abs=0.1)
    assert plan["disk_bytes"] > 4 * 4 * plan["model"]["parameters"], "four models at least"


def test_a_large_model_is_forecast_from_a_few_of_its_layers(built):
    profile = one_thread("large")
    whole = profile.model_config_solved()
    plan = forecast_run(profile)
    assert plan["model"]["parameters"] == whole.parameters() > 1_000_000_000
    assert all(s["seconds"] > 0 for s in plan["stages"])
    assert built and len(built) == len({t["seq_len"] for t in trainings(profile)}), "measured once for every length"
    for shape in built:
        assert shape.parameters() < whole.parameters() / 5 and shape.n_layers == SAMPLE_LAYERS and shape.memories
        same = ("d_model", "ffn_hidden", "vocab_size", "window", "n_heads", "d_mem", "trm_hidden", "t_max")
        assert all(getattr(shape, name) == getattr(whole, name) for name in same)


def trainings(profile: Profile) -> list[dict]:
    cognate = profile.phase("cognate")
    return [t.model_dump() for t in (cognate.trunk, *map(cognate.training_of, cognate.specialists))]


def test_a_large_model_of_the_plain_family_is_forecast_too(built):
    settings = {"vocab_size": 4096, "n_layers": 12, "n_heads": 8}
    plan = ModelPlan(family="gpt", target_parameters=100_000_000, settings=settings)
    profile = one_thread("pico").replace(model=plan)
    assert profile.model_config_solved().parameters() > LARGE
    assert forecast_run(profile)["seconds"] > 0
    assert {shape.n_layers for shape in built} == {SAMPLE_LAYERS}


def test_a_small_model_is_measured_as_it_is(built):
    profile = one_thread("pico")
    forecast_run(profile, "cognate")
    assert built == [profile.model_config_solved()]


def test_a_forecast_of_a_phase_that_does_not_exist_is_refused_before_it_measures(built):
    for until in ("experts", "cognat"):
        with pytest.raises(ConfigError):
            forecast_run(load_profile("pico"), until)
    assert built == []
