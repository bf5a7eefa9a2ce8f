"""Handoff contracts: every boundary has one, every rule refuses by name, what cannot be told is told."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from agent_forge import ModelHandoffValidator, load_profile
from agent_forge.pipeline.handoff import CONTRACTS, Case, HandoffContract, boundary, contracts, validate_models
from agent_forge.pipeline.handoff_rules import GROWN, judge
from agent_forge.pipeline.handoff_subject import Subject, shape_of
from agent_forge.pipeline.inputs import find_input, following, next_phase, source_of, take_in
from agent_forge.profile import ModelPlan, Profile
from forgekit.errors import ArtifactError, ConfigError, GateError
from forgekit.store.names import PHASES
from forgekit.store.storage import ModelStorage
from tests.unit.tiny import gpt_config, made, trm_config

SPECIAL = ("reasoning", "memory_integration", "adaptive_computation")
CHAMPION = {"fitness": 0.8, "merge_technique": "ties"}
EXACT = {"final_loss": 1.0, "seed": 42}


def profile(**handoffs) -> Profile:
    """The smallest profile, its parameter target that of the tiny models."""
    size = sum(p.numel() for p in made(gpt_config()).parameters())
    model = {"family": "gpt", "target_parameters": size, "tolerance": 0.1, "embedding_share": 0.9}
    model["settings"] = {"vocab_size": 24, "n_layers": 2, "n_heads": 2}
    return Profile(name="tiny", model=ModelPlan(**model), handoffs=handoffs)


@pytest.fixture(scope="module")
def solved() -> Profile:
    return profile()


class Shelf:
    """A storage with one session, and a short way to put tiny models into it."""

    def __init__(self, path: Path) -> None:
        self.storage = ModelStorage(path)
        self.session = self.storage.registry.create_session({})

    def put(self, name: str, phase: str = "cognate", config=None, **metadata) -> str:
        model = made(config or gpt_config(), seed=len(name))
        return self.storage.save_model(model, self.session, phase, name, metadata)

    def trio(self, **changes) -> list[str]:
        return [self.put(name, specialization=name, **{**EXACT, **changes}) for name in SPECIAL]

    def folder(self, model: str) -> Path:
        return self.storage.resolve(model)


@pytest.fixture
def shelf(tmp_path) -> Shelf:
    return Shelf(tmp_path / "storage")


# Contracts


def test_every_boundary_of_the_pipeline_has_a_contract():
    chain = ["start", *PHASES, "release"]
    assert list(CONTRACTS) == list(zip(chain, chain[1:]))
    assert [following(name) for name in PHASES] == chain[2:]
    assert [next_phase(name) for name in PHASES[:-1]] == list(PHASES[1:])


def test_the_numbers_are_those_of_the_specification():
    rules = {target: contract for (_, target), contract in CONTRACTS.items()}
    assert rules["evomerge"].num_models == 3 and rules["quietstar"].num_models == 1
    assert rules["evomerge"].required_metadata == ("specialization", "final_loss", "seed")
    assert rules["quietstar"].minimum == {"fitness": 0.70} and rules["bitnet"].minimum == {"accuracy": 0.80}
    assert rules["curriculum"].minimum == {"compression_ratio": 7.0}
    assert rules["curriculum"].maximum_per_million["compressed_size_mb"] * 25 == 20.0
    assert all(contract.max_total_mb == 1000.0 for contract in rules.values())


def test_a_boundary_is_named_by_its_target_its_alias_or_both_ends():
    assert boundary("quietstar") == boundary("evomerge -> quietstar") == ("evomerge", "quietstar")
    assert boundary("forge") == ("bitnet", "curriculum") and boundary("edge->final_compression")[1] == "compression"
    assert boundary("cognate->quietstar") == ("cognate", "quietstar") and boundary("release")[0] == "compression"


def test_a_profile_changes_limits_one_by_one_and_other_fields_as_a_whole():
    changed = contracts({"baking": {"minimum": {"final_accuracy": 0.5}, "required_metadata": ["final_loss"]}})
    rules = changed["curriculum", "baking"]
    assert rules.minimum == {"final_accuracy": 0.5, "tool_use_success_rate": 0.85, "self_modeling_accuracy": 0.80}
    assert rules.required_metadata == ("final_loss",)
    assert CONTRACTS["curriculum", "baking"].minimum["final_accuracy"] == 0.85, "the data stays as it is"
    added = contracts({"cognate->quietstar": {"num_models": 1}})["cognate", "quietstar"]
    assert added.required_metadata == () and added.minimum == {} and added.name == "cognate->quietstar"


@pytest.mark.parametrize(
    ("handoffs", "told"),
    [
        ({"evomerg": {}}, "handoffs.evomerg: unknown boundary 'evomerg'; did you mean evomerge"),
        ({"cognat->evomerge": {}}, "handoffs.cognat->evomerge: unknown boundary 'cognat'; did you mean cognate"),
        ({"evomerge": {}, "cognate->evomerge": {}}, "is the boundary of 'evomerge'; keep one of the two"),
        ({"evomerge": {"num_model": 2}}, "handoffs.evomerge.num_model: unknown key; did you mean num_models"),
        ({"evomerge": {"num_models": -1}}, "handoffs.evomerge.num_models: value -1 refused"),
        ({"evomerge": {"source": "baking"}}, "handoffs.evomerge.source: cannot be changed"),
        ({"evomerge": {"param_range": [5, 2]}}, 'handoffs.evomerge.param_range: value [5, 2] refused: give "any"'),
        ({"evomerge": {"param_range": "some"}}, "handoffs.evomerge.param_range"),
        ({"quietstar": {"minimum": {"fitness": "high"}}}, "handoffs.quietstar.minimum.fitness: value 'high' refused"),
        ({"quietstar": {"minimum": {"fitness": math.nan}}}, "handoffs.quietstar.minimum.fitness"),
        ({"quietstar": {"minimum": 3}}, "handoffs.quietstar.minimum: value 3 refused"),
        ({"quietstar": {"maximum": {"fitness": 0.1}}}, "minimum.fitness 0.7 is above maximum.fitness 0.1"),
        ({"quietstar": {"waive": ["fitnes"]}}, "waive: there is no rule on 'fitnes'; rules: fitness, merge_technique"),
        ({"quietstar": {"max_total_mb": 0}}, "handoffs.quietstar.max_total_mb: value 0 refused"),
    ],
)
def test_a_profile_with_a_wrong_contract_is_refused_by_field(handoffs, told):
    values = load_profile("pico").model_dump(mode="json")
    with pytest.raises(ConfigError) as caught:
        Profile.build({**values, "handoffs": handoffs}, "mine.toml")
    assert told in str(caught.value) and str(caught.value).startswith("mine.toml: handoffs")
    assert "\n" not in str(caught.value)


# Rules, on stored models


def test_what_keeps_the_contract_is_accepted(shelf, solved):
    decision = validate_models(solved, "cognate", "evomerge", shelf.storage, shelf.trio())
    valid, message = decision
    assert valid and decision and decision.accepted and decision.unknown == ()
    assert message.startswith("cognate->evomerge: cognate_reasoning_") and message.endswith(" accepted")
    assert json.dumps(decision.record()) and decision.record()["accepted"] is True


def refusal(decision):
    assert not decision and len(decision.refusals) == 1, decision.refusals
    return decision.refusals[0]


def test_the_number_of_models(shelf, solved):
    models = shelf.trio()
    broken = refusal(validate_models(solved, "cognate", "evomerge", shelf.storage, models[:2]))
    assert broken.model == f"{models[0]}, {models[1]}" and broken.kind == "structure"
    assert broken.what == "num_models is 2, evomerge takes 3" and "handoffs.evomerge.num_models=2" in broken.remedy
    assert "no models" in validate_models(solved, "cognate", "evomerge", shelf.storage, []).message
    assert validate_models(profile(evomerge={"num_models": 2}), "cognate", "evomerge", shelf.storage, models[:2])
    twice = validate_models(solved, "cognate", "evomerge", shelf.storage, [models[0], models[1], models[1]])
    assert f"{models[1]}: is given 2 times; give every model once" in [str(one) for one in twice.refusals]


def test_the_parameters(shelf, solved):
    models = [*shelf.trio()[:2], shelf.put("big", config=gpt_config(ffn_hidden=96), specialization=SPECIAL[2], **EXACT)]
    broken = refusal(validate_models(solved, "cognate", "evomerge", shelf.storage, models))
    assert broken.model == models[2]
    assert broken.what == "parameters 8,660 outside 4,108 to 5,020 (the profile's 4,564 within 10%)"
    assert "--set handoffs.evomerge.param_range=any" in broken.remedy
    for span in ("any", [1000, 9000]):
        changed = profile(evomerge={"param_range": span})
        assert validate_models(changed, "cognate", "evomerge", shelf.storage, models)
    assert not validate_models(profile(evomerge={"param_range": [1, 9]}), "cognate", "evomerge", shelf.storage, models)


def test_the_combined_size(shelf):
    changed = profile(evomerge={"max_total_mb": 0.03})
    broken = refusal(validate_models(changed, "cognate", "evomerge", shelf.storage, shelf.trio()))
    assert broken.what.startswith("combined size 0.") and broken.what.endswith("MB, at most 0.03 MB")


@pytest.mark.parametrize(
    ("config", "part"),
    [
        (gpt_config(d_model=20), "width 20 is not that of cognate_reasoning_"),
        (gpt_config(n_layers=3), "layers 3 is not that of"),
        (gpt_config(vocab_size=32), "vocabulary 32 is not that of"),
        (trm_config(), "family trm_titans is not that of"),
    ],
)
def test_the_architecture(shelf, config, part):
    models = [*shelf.trio()[:2], shelf.put("odd", config=config, specialization=SPECIAL[2], **EXACT)]
    any_size = profile(evomerge={"param_range": "any"})
    broken = refusal(validate_models(any_size, "cognate", "evomerge", shelf.storage, models))
    assert broken.model == models[2] and broken.what.startswith(part)
    loose = profile(evomerge={"param_range": "any", "same_architecture": False})
    assert validate_models(loose, "cognate", "evomerge", shelf.storage, models)


def test_the_architecture_of_the_parents(shelf, solved):
    trio = shelf.trio()
    champion = shelf.put("champion", "evomerge", parents=trio, **CHAMPION)
    assert validate_models(solved, "evomerge", "quietstar", shelf.storage, [champion]).unknown == ()
    deeper = shelf.put("deeper", "evomerge", gpt_config(n_layers=4), parents=trio, **CHAMPION)
    broken = validate_models(solved, "evomerge", "quietstar", shelf.storage, [deeper]).refusals
    assert [one.what for one in broken] == [f"layers 4 is not that of its parent {parent}, 2" for parent in trio]
    orphan = shelf.put("orphan", "evomerge", parents=["cognate_gone_20260101_000000"], **CHAMPION)
    decision = validate_models(solved, "evomerge", "quietstar", shelf.storage, [orphan])
    assert decision.accepted and "its parent cognate_gone_20260101_000000, which is not there" in decision.unknown[0]
    assert "; not known: " in decision.message


@pytest.mark.parametrize(
    ("rows", "said", "expected"),
    [(32, 8, None), (24, 0, None), (24, None, None), (32, None, 24), (32, 4, 28), (32, "8", 24), (24, 8, 32)],
)
def test_a_vocabulary_may_grow_by_what_its_maker_says(shelf, solved, rows, said, expected):
    """A model of elsewhere gets the thinking tokens; nothing else may make its table larger."""
    parent = shelf.put("champion", "evomerge", **CHAMPION)
    told = {"accuracy": 0.9, "coherence_score": 0.8, "validity_rate": 0.8, "parents": [parent]}
    told |= {} if said is None else {GROWN: said}
    thinker = shelf.put("thinker", "quietstar", gpt_config(vocab_size=rows), **told)
    decision = validate_models(solved, "quietstar", "bitnet", shelf.storage, [thinker])
    if expected is None:
        assert decision.accepted, decision.message
    else:
        assert refusal(decision).what == f"vocabulary {rows} is not that of its parent {parent}, {expected}"


@pytest.mark.parametrize("key", ["final_loss", "seed"])
def test_required_metadata(shelf, solved, key):
    models = shelf.trio()
    lacking = {k: v for k, v in EXACT.items() if k != key}
    models[1] = shelf.put("poor", specialization="memory_integration", **lacking)
    broken = refusal(validate_models(solved, "cognate", "evomerge", shelf.storage, models))
    assert (broken.model, broken.what, broken.kind) == (models[1], f"metadata {key} is missing", "metadata")
    assert f"""--set 'handoffs.evomerge.waive=["{key}"]'""" in broken.remedy
    decision = validate_models(profile(evomerge={"waive": [key]}), "cognate", "evomerge", shelf.storage, models)
    assert decision.accepted and f"{models[1]}: {key} (waived)" in decision.unknown


def test_a_required_number_must_be_finite(shelf, solved):
    broken = validate_models(solved, "cognate", "evomerge", shelf.storage, shelf.trio(final_loss=math.nan)).refusals
    assert [one.what for one in broken] == ["metadata final_loss is null: unknown, or not finite"] * 3
    folder = shelf.folder(shelf.put("champion", "evomerge", **CHAMPION))
    facts = [{"fitness": 0.9, "merge_technique": math.inf}]
    decision = ModelHandoffValidator(solved).validate_handoff("evomerge", "quietstar", [folder], facts)
    assert refusal(decision).what == "metadata merge_technique is inf"


def test_specialisations_differ_and_none_is_no_specialisation(shelf, solved):
    models = [*shelf.trio()[:2], shelf.put("again", specialization="reasoning", **EXACT)]
    broken = refusal(validate_models(solved, "cognate", "evomerge", shelf.storage, models))
    assert broken.what == f"specialization 'reasoning' is that of {models[0]} too" and broken.model == models[2]
    plain = [shelf.put(name, specialization=None, **EXACT) for name in ("a", "b", "c")]
    assert validate_models(solved, "cognate", "evomerge", shelf.storage, plain)


@pytest.mark.parametrize(
    ("metadata", "told", "kind"),
    [
        ({"fitness": 0.61}, "fitness 0.61 is below the minimum 0.7", "threshold"),
        ({"fitness": "good"}, "fitness is 'good', not a number", "metadata"),
        ({"fitness": True}, "fitness is True, not a number", "metadata"),
        ({}, "metadata fitness is missing", "metadata"),
    ],
)
def test_thresholds(shelf, solved, metadata, told, kind):
    model = shelf.put("champion", "evomerge", merge_technique="ties", **metadata)
    decision = validate_models(solved, "evomerge", "quietstar", shelf.storage, [model])
    broken = refusal(decision)
    assert (broken.model, broken.what, broken.kind) == (model, told, kind)
    assert decision.thresholds_only is (kind == "threshold")
    assert isinstance(decision.error(), GateError) and decision.error().exit_code == 7
    assert str(decision.error()).startswith(f"handoff evomerge->quietstar: {model}: {told}; ")


def test_a_value_among_the_metrics_counts(shelf, solved):
    model = shelf.put("champion", "evomerge", merge_technique="ties", metrics={"fitness": 0.9})
    assert validate_models(solved, "evomerge", "quietstar", shelf.storage, [model])


def test_a_limit_per_million_parameters_follows_the_profiles_target(shelf, solved):
    facts = {"compression_ratio": 8.0, "accuracy_retention": 0.9, "weight_grid": "free"}
    limit = 0.8 * solved.model.target_parameters / 1e6
    small, large = (shelf.put(n, "bitnet", compressed_size_mb=s, **facts) for n, s in (("s", limit), ("l", 2 * limit)))
    assert validate_models(solved, "bitnet", "forge", shelf.storage, [small])
    broken = refusal(validate_models(solved, "bitnet", "forge", shelf.storage, [large]))
    assert "is above the maximum" in broken.what and "handoffs.curriculum.maximum_per_million" in broken.remedy


# Weights


def spoil(folder: Path, value: float) -> str:
    """A copy of the model with one bad value, its manifest renewed; the tensor's name."""
    from safetensors.torch import load_file

    from forgekit.store.artifact import MANIFEST
    from forgekit.store.fsio import sha256_file

    tensors = load_file(folder / "model.safetensors")
    name = sorted(tensors)[-1]
    tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["model.safetensors"] = sha256_file(folder / "model.safetensors")
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return name


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite(shelf, solved, value):
    model = shelf.put("champion", "evomerge", **CHAMPION)
    name = spoil(shelf.folder(model), value)
    decision = validate_models(solved, "evomerge", "quietstar", shelf.storage, [model])
    broken = refusal(decision)
    assert broken.model == model and broken.what.startswith(f"tensor {name} holds 1 of ") and broken.kind == "weights"
    assert isinstance(decision.error(), ArtifactError) and decision.error().exit_code == 4


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (lambda folder: os.truncate(folder / "model.safetensors", 100), "model.safetensors: "),
        (lambda folder: (folder / "model.safetensors").unlink(), "no safetensors weights here"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json: unreadable"),
        (lambda folder: (folder / "tokenizer_config.json").unlink(), "tokenizer_config.json: file is missing"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_weights_that_cannot_be_read(shelf, solved, damage, told):
    model = shelf.put("champion", "evomerge", **CHAMPION)
    folder = shelf.folder(model)
    if "tokenizer_config" in told:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["files"]["tokenizer_config.json"] = "0" * 64
        (folder / "manifest.json").write_text(json.dumps(manifest))
        (folder / "tokenizer_config.json").touch()
    damage(folder)
    decision = validate_models(solved, "evomerge", "quietstar", shelf.storage, [model])
    broken = refusal(decision)
    assert broken.model == model and told in broken.what and broken.kind == "weights", broken
    assert decision.error().exit_code == 4 and "\n" not in str(decision.error())


def test_a_model_that_is_not_there_is_named(shelf, solved):
    decision = validate_models(solved, "evomerge", "quietstar", shelf.storage, ["evomerge_none"])
    assert "no model 'evomerge_none'" in refusal(decision).what


# What is not known


def elsewhere(folder: Path, **config) -> Path:
    """A folder in Hugging Face's layout with another family's spelling."""
    folder.mkdir()
    values = {"model_type": "gpt2", "n_embd": 4, "n_layer": 1, "vocab_size": 8, **config}
    (folder / "config.json").write_text(json.dumps(values))
    save_file({"wte": torch.ones(8, 4), "ids": torch.arange(3)}, folder / "model.safetensors")
    return folder


def test_a_model_of_elsewhere_has_no_metadata_and_is_told_so(tmp_path, shelf):
    folder = elsewhere(tmp_path / "hf")
    any_size = profile(quietstar={"param_range": "any"})
    decision = validate_models(any_size, "external", "quietstar", shelf.storage, [str(folder)])
    assert decision.accepted
    assert decision.unknown == tuple(f"{folder}: {key}" for key in ("fitness", "merge_technique"))
    three = [str(elsewhere(tmp_path / name)) for name in "abc"]
    broken = validate_models(profile(), "external", "evomerge", shelf.storage, three).refusals
    assert {one.what.split()[0] for one in broken} == {"parameters"} and len(broken) == 3, "what can be seen binds"


def test_spellings_of_the_architecture(tmp_path, shelf):
    assert shape_of({"text_config": {"hidden_size": 8}, "model_type": "x"}) == {"family": "x", "width": 8}
    a, b = (str(elsewhere(tmp_path / name, n_layer=layers)) for name, layers in (("a", 1), ("b", 2)))
    two = profile(evomerge={"param_range": "any", "num_models": 2})
    broken = refusal(validate_models(two, "external", "evomerge", shelf.storage, [a, b]))
    assert broken.what == f"layers 2 is not that of {a}, 1"
    silent = tmp_path / "silent"
    elsewhere(silent)
    (silent / "config.json").write_text('{"model_type": "gpt2", "n_embd": 4, "vocab_size": 8}')
    decision = validate_models(two, "external", "evomerge", shelf.storage, [a, str(silent)])
    assert decision.accepted and f"{silent}: layers, which its config.json does not state" in decision.unknown


def test_a_parent_in_its_childs_place_need_not_have_what_only_the_child_could_have(shelf, solved):
    champion = shelf.put("champion", "evomerge", **CHAMPION)
    validator = ModelHandoffValidator(solved)
    assert not validator.validate_stored("quietstar", "bitnet", shelf.storage, [champion])
    decision = validator.validate_stored("quietstar", "bitnet", shelf.storage, [champion], stand_in=True)
    assert decision.accepted and f"{champion}: coherence_score" in decision.unknown
    bad = shelf.put("weak", "evomerge", accuracy=0.1, **CHAMPION)
    assert not validator.validate_stored("quietstar", "bitnet", shelf.storage, [bad], stand_in=True), (
        "what is known binds"
    )


def test_phases_that_are_no_neighbours(shelf, solved):
    trio = shelf.trio()
    broken = refusal(validate_models(solved, "cognate", "quietstar", shelf.storage, trio[:1]))
    assert broken.what == "cognate does not hand over to quietstar, evomerge does"
    allowed = profile(**{"cognate->quietstar": {"num_models": 1}})
    assert validate_models(allowed, "cognate", "quietstar", shelf.storage, trio[:1])
    broken = refusal(validate_models(solved, "external", "cognate", shelf.storage, trio[:1]))
    assert "cognate takes 0; it starts from nothing" in str(broken)


# Loaded models, as the specification calls it


def test_loaded_models_with_their_metadata():
    validator = ModelHandoffValidator(profile())
    models = [made(gpt_config(), seed) for seed in range(3)]
    metadata = [{"specialization": name, **EXACT, "model_id": name} for name in SPECIAL]
    valid, message = validator.validate_handoff("cognate", "evomerge", models, metadata)
    assert valid, message
    valid, message = ModelHandoffValidator().validate_handoff("cognate", "evomerge", models, metadata)
    assert not valid and "outside 22,500,000 to 27,500,000" in message, "without a profile: the specification's 25M"
    with torch.no_grad():
        models[1].embedding.table.weight[0, 0] = math.nan
    valid, message = validator.validate_handoff("cognate", "evomerge", models, metadata)
    assert not valid and message.startswith("memory_integration: tensor embedding.table.weight holds 1 of")
    valid, message = validator.validate_handoff("cognate", "evomerge", models[:1] * 3, [{}] * 3)
    assert not valid and "model 0" in message
    with pytest.raises(ConfigError, match="metadata: 1 for 3 models"):
        validator.validate_handoff("cognate", "evomerge", models, metadata[:1])


# Properties


def subject(name: str = "m", parameters: int = 1000, **metadata) -> Subject:
    return Subject(name, name, metadata, parameters, 1.0, {}, lambda: iter(()))


finite = st.floats(-1e6, 1e6)


@given(value=finite, low=finite, high=finite)
def test_a_threshold_accepts_exactly_what_lies_between(value, low, high):
    low, high = sorted((low, high))
    contract = HandoffContract(source="evomerge", target="quietstar", minimum={"x": low}, maximum={"x": high})
    case = Case(contract, [subject(x=value)], 1000, 0.1)
    judge(case)
    assert (not case.found) is (low <= value <= high)
    assert all(one.kind == "threshold" and one.model == "m" for one in case.found)


@given(target=st.integers(10, 10**10), share=st.floats(0.01, 0.5), parameters=st.integers(1, 2 * 10**10))
def test_the_profiles_range_is_its_target_within_its_tolerance(target, share, parameters):
    contract = HandoffContract(source="evomerge", target="quietstar", param_range="profile")
    case = Case(contract, [subject(parameters=parameters)], target, share)
    judge(case)
    assert (not case.found) is (round(target * (1 - share)) <= parameters <= round(target * (1 + share)))


@given(st.lists(st.sampled_from("abcd"), max_size=6), st.integers(0, 6))
def test_the_number_rule_counts_and_sees_repeats(names, wanted):
    case = Case(HandoffContract(source="evomerge", target="quietstar", num_models=wanted), [], 1, 0.1)
    case = Case(case.contract, [subject(name) for name in names], 1, 0.1)
    judge(case)
    assert (not case.found) is (len(names) == wanted and len(set(names)) == len(names))


# Models that a run starts from


def test_inputs_are_found_by_id_name_and_folder(shelf, tmp_path):
    trio = shelf.trio()
    by_id, by_name = find_input(shelf.storage, trio[0]), find_input(shelf.storage, "reasoning")
    by_folder = find_input(shelf.storage, str(shelf.folder(trio[0])))
    assert by_id == by_name == by_folder and by_id.model_id == trio[0] and by_id.phase == "cognate"
    outside = find_input(shelf.storage, str(elsewhere(tmp_path / "hf")))
    assert (outside.phase, outside.model_id) == ("external", "") and outside.ref == str(tmp_path / "hf")
    assert source_of([by_id, outside]) == "cognate" and source_of([outside]) == "external"
    champion = find_input(shelf.storage, shelf.put("champion", "evomerge"))
    with pytest.raises(ConfigError, match=r"made by different phases: reasoning \(cognate\), champion \(evomerge\)"):
        source_of([by_id, champion])
    with pytest.raises(ConfigError, match="--from: models of elsewhere do not say .*; name the phase: --phase"):
        next_phase("external")
    with pytest.raises(ConfigError, match="compression is the last phase"):
        next_phase("compression")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"config.json: no model here"):
        find_input(shelf.storage, str(tmp_path / "empty"))


def test_an_artifact_of_another_storage_is_taken_in_once_with_its_origin(shelf, tmp_path):
    from forgekit.data.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["some words to learn from, and some more of them"] * 5, 300)
    other = Shelf(tmp_path / "other")
    model = made(gpt_config(vocab_size=tokenizer.get_vocab_size()))
    facts = {"specialization": "reasoning", "parents": ["cognate_trunk_20260101_000000"], **EXACT}
    model_id = other.storage.save_model(model, other.session, "cognate", "reasoning", facts, tokenizer=tokenizer)
    found = find_input(shelf.storage, str(other.folder(model_id)))
    assert (found.phase, found.model_id) == ("cognate", "")
    taken = take_in(shelf.storage, shelf.session, found)
    assert taken == take_in(shelf.storage, shelf.session, found), "a resumed session finds the copy"
    row = shelf.storage.registry.get_model(taken.model_id)
    assert row["phase_name"] == "external" and row["metadata"]["origin_phase"] == "cognate"
    assert row["metadata"]["origin_id"] == model_id and row["metadata"]["final_loss"] == 1.0
    assert shelf.storage.registry.ancestors(taken.model_id) == ["cognate_trunk_20260101_000000"]
    assert find_input(shelf.storage, taken.model_id).phase == "cognate"
    weights = [shelf.folder(taken.model_id), other.folder(model_id)]
    assert len({(folder / "model.safetensors").read_bytes() for folder in weights}) == 1
    missing = profile(evomerge={"num_models": 1, "waive": ["seed"]})
    assert (
        validate_models(missing, "cognate", "evomerge", shelf.storage, [taken.model_id]).refusals[0].kind != "metadata"
    )


# The registry's part


def test_a_handoff_with_an_id_of_its_own_is_entered_once(shelf):
    registry, trio = shelf.storage.registry, shelf.trio()
    for status in ("failed", "passed"):
        values = {"target_phase": "evomerge", "validation_status": status, "handoff_id": "h-1"}
        assert registry.record_handoff(trio[0], trio[0], **values) == "h-1"
    champion = shelf.put("champion", "evomerge")
    registry.complete_handoff("h-1", champion)
    registry.complete_handoff("unknown", champion)
    (row,) = registry.get_handoffs(shelf.session)
    assert (row["source_model_id"], row["target_model_id"]) == (trio[0], champion)
    assert (row["validation_status"], row["target_phase"]) == ("passed", "evomerge")
    with pytest.raises(ArtifactError, match="no model"):
        registry.complete_handoff("h-1", "evomerge_nobody")


def test_a_session_that_does_not_run_cannot_be_interrupted(shelf):
    registry = shelf.storage.registry
    registry.update_session(shelf.session, status="paused")
    with pytest.raises(ArtifactError, match="is not running; go on with: agent-forge run --resume"):
        registry.interrupt_session(shelf.session)
    with pytest.raises(ArtifactError, match="no session"):
        registry.interrupt_session("nothing")
    registry.update_session(shelf.session, status="running")
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    try:
        with pytest.raises(KeyboardInterrupt):  # this process owns the session
            registry.interrupt_session(shelf.session)
            for _ in range(1000):
                pass
    finally:
        signal.signal(signal.SIGINT, heard)


def test_contracts_need_no_torch():
    code = "import sys; import agent_forge.profile; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
