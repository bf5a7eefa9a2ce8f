"""What is refused before any work (options, methods that lack something, lineages), and how weights are stored."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from agent_forge.merging import MERGERS
from agent_forge.merging.check import Candidate, Supply, check_lineage, check_models, check_supply
from agent_forge.merging.folders_weights import WeightFolder, make_shards, vocabulary_fingerprint
from forgekit.data.tokenizer import train_tokenizer
from forgekit.errors import ArtifactError, ConfigError
from forgekit.store.artifact import Manifest

STACK = {"slices": [{"model": 0, "start": 0, "stop": 2}]}


@pytest.mark.parametrize(
    ("method", "options", "supply", "message"),
    [
        ("linear", {}, Supply(1), "linear: needs 2 models or more, 1 given; give more models"),
        ("ties", {}, Supply(2), "ties: needs the common ancestor, none given; give it as base"),
        ("fisher", {}, Supply(2, base=True), "fisher: needs importances, none given"),
        ("dfs", {}, Supply(2), "dfs: needs a base or importances, neither given"),
        ("linear", {}, Supply(2, importances=2), "linear: uses no importances; leave them out"),
        ("fisher", {}, Supply(3, importances=2), "fisher: 2 sets of importances for 3 models"),
        ("slerp", {"fold": False}, Supply(3), "slerp.fold: fold is off and 3 models are given; .*give two models"),
        ("slerp", {"t": [0.1, 0.2, 0.3]}, Supply(3), r"slerp.t: 3 values .* for 2 folds of 3 models"),
        ("linear", {"weights": [1, 2, 3]}, Supply(2), r"linear.weights: 3 weights \[1.0, 2.0, 3.0\] for 2 models"),
        ("linear", {"layer_weights": [[1, 2]]}, Supply(2, 3), "linear.layer_weights: 1 rows for 3 layers"),
        ("linear", {"layer_weights": [[1]]}, Supply(2, 1), "linear.layer_weights: 1 weights .* for 2 models"),
        ("frankenmerge", {"choices": [0]}, Supply(2, 2), "frankenmerge.choices: 1 choices for 2 layers"),
        ("frankenmerge", {"choices": [0, 2]}, Supply(2, 2), "choices: model 2 is chosen, there are models 0 to 1"),
        ("frankenmerge", {"choices": [0], "outside": 5}, Supply(2, 1), "outside: model 5 is chosen"),
        ("frankenmerge", {"choices": [0]}, Supply(2, 0), "choices: the models have no numbered layers"),
        ("passthrough", STACK, Supply(1, 1), "slices: layers 0..2 are asked for, the models have 1"),
    ],
)
def test_what_is_lacking_is_refused_in_one_line(method, options, supply, message):
    merger = MERGERS.get(method)
    with pytest.raises(ConfigError, match=message) as refused:
        check_supply(merger, merger.build(options), supply)
    assert "\n" not in str(refused.value)


def test_a_limit_on_models_is_a_refusal_too():
    slerp = MERGERS.get("slerp")
    two = replace(slerp, needs=replace(slerp.needs, models_max=2))
    with pytest.raises(ConfigError, match="slerp: takes 2 models at most, 3 given"):
        check_supply(two, two.build({}), Supply(3))


def test_models_without_a_stated_family_compare_by_shape():
    bare = [Candidate(name, {}, {"w": (2,)}) for name in ("a", "b")]
    assert check_models(bare).notes == ["no tokenizer to compare in a, b"]


def test_grandparents_are_ancestors():
    def one(name, *parents):
        manifest = Manifest(model_id=f"p_{name}_20260101_000000", session_id="s", phase_name="p", model_name=name,
                            parameters=1, parents=[f"p_{p}_20260101_000000" for p in parents])  # fmt: skip
        return Candidate(name, {}, {}, None, manifest)

    root, middle = one("root"), one("middle", "root")
    known = {c.manifest.model_id: c.manifest.parents for c in (root, middle)}
    assert check_lineage([one("x", "middle"), one("y", "root")], root, known.get) == []
    assert check_lineage([one("x", "middle"), root], root, known.get) == []
    assert check_lineage([one("x", "middle"), one("y", "root")], None, known.get) == []
    loop = {"p_x_20260101_000000": ["p_y_20260101_000000"], "p_y_20260101_000000": ["p_x_20260101_000000"]}
    with pytest.raises(ArtifactError, match="base: p_root_20260101_000000 is no ancestor of x"):
        check_lineage([one("x", "y")], root, loop.get)


def test_the_fingerprint_sees_ids_and_not_spelling(tmp_path):
    tokenizer = train_tokenizer(["some text to learn from, and more of it"] * 5, 290)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    first = vocabulary_fingerprint(tmp_path)
    values = json.loads((tmp_path / "tokenizer.json").read_text())
    values["padding"] = {"strategy": "BatchLongest"}
    values["model"]["merges"] = [" ".join(pair) for pair in values["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(values, indent=7))
    assert vocabulary_fingerprint(tmp_path) == first
    values["added_tokens"][3]["content"] = "<|other|>"
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    assert vocabulary_fingerprint(tmp_path) != first
    (tmp_path / "tokenizer.json").unlink()
    assert vocabulary_fingerprint(tmp_path) is None
    (tmp_path / "vocab.json").write_text("{}")
    assert vocabulary_fingerprint(tmp_path)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("linear", {"weights": [1, -1]}, r"linear: weights \[1.0, -1.0\] sum to zero; give at least"),
        ("linear", {"weights": [0, 0]}, "sum to zero"),
        ("linear", {"weights": [1, math.nan]}, r"linear.weights.1: value nan refused"),
        ("ties", {"weights": [1, -0.5]}, r"weights \[1.0, -0.5\] has a negative weight; use weights of zero or more"),
        ("ties", {"layer_weights": [[0, 0]]}, r"layer_weights\[0\] \[0.0, 0.0\] sum to zero"),
        ("ties", {"density": 0}, "ties.density: value 0 refused"),
        ("ties", {"density": 1.1}, "density: value 1.1 refused"),
        ("ties", {"dense": 1}, "ties.dense: unknown key; did you mean density"),
        ("dare", {"drop_rate": 1}, "dare_linear.drop_rate: value 1 refused"),
        ("della", {"drop_rate": 0.05}, r"drop_rate 0.05 -\+ epsilon 0.1 must stay in 0 .. 1"),
        ("della", {"drop_rate": 0.9, "epsilon": 0.1}, "must stay in 0 .. 1"),
        ("breadcrumbs", {"low": 0.6, "high": 0.4}, r"low 0.6 \+ high 0.4 drop everything"),
        ("slerp", {"t": 1.5}, "slerp.t.0: value 1.5 refused"),
        ("slerp", {"t": []}, "slerp.t: value .* refused"),
        ("dfs", {"temperature": 0}, "temperature: value 0 refused"),
        ("frankenmerge", {}, "frankenmerge.choices: missing; add frankenmerge.choices"),
        ("passthrough", {"slices": [{"model": 0, "start": 2, "stop": 2}]}, r"layers 2..2 are none"),
    ],
)
def test_bad_options_are_refused_in_one_line(method, options, message):
    with pytest.raises(ConfigError, match=message) as refused:
        MERGERS.get(method).build(options)
    assert "\n" not in str(refused.value)


def test_every_type_survives_the_way_through_the_disk(tmp_path):
    kinds = [torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int64, torch.uint8, torch.bool]
    tensors = {str(kind): torch.tensor([[0, 1, 1]]).to(kind) for kind in kinds} | {"none": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    opened = WeightFolder.open(tmp_path, "x")
    found = {name: opened.read(name) for name in opened.tensors}
    assert all(torch.equal(found[n].float(), t.float()) and found[n].dtype == t.dtype for n, t in tensors.items())


def test_shards_are_cut_at_the_limit():
    tensors = {name: ("F32", (size,)) for name, size in (("a", 10), ("b", 10), ("c", 100), ("d", 10))}
    assert [sorted(s.tensors) for s in make_shards(tensors, 80)] == [["a", "b"], ["c"], ["d"]]
    assert [s.name for s in make_shards(tensors, 10**6)] == ["model.safetensors"]
