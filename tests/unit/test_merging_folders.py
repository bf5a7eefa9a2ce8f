"""Merging folders: equal to merging in memory, however the files are cut; complete or absent; refusals in one line."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from agent_forge.merging import MERGERS, folders
from agent_forge.merging.folders import MergePlan, merge_folders, plan_text, prepare
from agent_forge.merging.folders_weights import WeightFolder, read_header
from agent_forge.merging.genome import merge_states
from forgekit.data.tokenizer import train_tokenizer
from forgekit.errors import ArtifactError, ConfigError, ForgeError, ResourceError
from forgekit.hub import HFTokenizer
from forgekit.models.io import read_model, write_model
from forgekit.store.artifact import Artifact, Manifest, write_artifact
from forgekit.store.fsio import sha256_file
from tests.unit.tiny import gpt_config, made, same, trm_config, weights

TEXT = ["hello world, this is some text with digits 123 and more of the same. "] * 5
TOKENIZER, OTHER = train_tokenizer(TEXT, 300), train_tokenizer(["quite different zebra text zebra quite"] * 9, 300)
WHEN = "2026-01-02T03:04:05"
TINY = {"vocab_size": 300}


def artifact(folder: Path, name: str, config=None, *, parents=(), near: Path | None = None, seed: int = 0) -> str:
    """A tiny model of ours as an artifact; near another one, a little away from it. Returns its id."""
    model = made(config or trm_config(**TINY), seed=seed, stir=0.05)
    if near:
        values = load_file(near / "model.safetensors")
        with torch.no_grad():
            for key, tensor in model.state_dict().items():
                tensor.mul_(0.1).add_(values[key])
    count = sum(p.numel() for p in model.parameters())
    manifest = Manifest(
        model_id=f"cognate_{name}_20260102_030405", session_id="run-1", phase_name="cognate", model_name=name,
        parameters=count, parents=list(parents),
    )  # fmt: skip
    write_artifact(folder, lambda work: write_model(model, TOKENIZER, work), manifest)
    return manifest.model_id


@pytest.fixture(scope="module")
def family(tmp_path_factory) -> dict[str, Path]:
    """A trunk, three siblings branched from it (two with traits of their own) and a stranger, as a session has them."""
    root = tmp_path_factory.mktemp("sessions") / "run-1" / "phase1_cognate"
    paths = {name: root / name for name in ("trunk", "a", "b", "c", "stranger")}
    trunk = artifact(paths["trunk"], "trunk")
    traits = {"a": {}, "b": {"act_threshold": 0.5, "t_max": 3}, "c": {"memory_capacity": 99}}
    for number, (name, changed) in enumerate(traits.items(), 1):
        config = trm_config(**TINY, **changed)
        artifact(paths[name], name, config, parents=[trunk], near=paths["trunk"], seed=number)
    artifact(paths["stranger"], "stranger", seed=9)
    return paths


@pytest.fixture(scope="module")
def llamas(tmp_path_factory) -> dict[str, Path]:
    """Tiny random Llamas in Hugging Face's layout: a base and two siblings, tied embeddings, bfloat16."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("hf")
    config = LlamaConfig(
        vocab_size=300, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, tie_word_embeddings=True, dtype="bfloat16",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    fast = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token="<|end|>")
    for name in ("base", "a", "b"):
        model.save_pretrained(root / name)
        HFTokenizer(fast).save_pretrained(root / name)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.05 * torch.randn_like(p))
    return {name: root / name for name in ("base", "a", "b")}


def states(*paths: Path) -> list[dict[str, torch.Tensor]]:
    return [load_file(path / "model.safetensors") for path in paths]


def plan(output: Path, *models: Path, method: str = "linear", **changes) -> MergePlan:
    return MergePlan(method=method, models=models, output=output, **{"created_at": WHEN, **changes})


def sharded(source: Path, target: Path, pieces: int = 3) -> Path:
    """The same folder with its weights cut into pieces."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("model.safetensors", "manifest.json"))
    tensors = load_file(source / "model.safetensors")
    placed = {name: f"model-{i % pieces + 1:05d}-of-{pieces:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(placed.values()):
        save_file({n: t for n, t in tensors.items() if placed[n] == file}, target / file)
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))
    return target


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    opened = WeightFolder.open(folder, "x")
    return {name: opened.read(name).clone() for name in opened.tensors}


# Equal to merging in memory

CASES = {
    "slerp": {"options": {"t": [0.3, 0.6]}},
    "ties": {"options": {"density": 0.4}},
    "dare": {"options": {"drop_rate": 0.5}, "seed": 7},
    "della": {"seed": 7},
    "dfs": {},
    "frankenmerge": {"options": {"choices": [2, 1]}},
    "passthrough": {"options": {"slices": [{"model": 0, "start": 0, "stop": 2}, {"model": 1, "start": 1, "stop": 2}]}},
}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("method", CASES)
def test_folders_merge_as_states_do(family, tmp_path, method, threads):
    case = CASES[method]
    models = [family[name] for name in "abc"]
    merge_folders(plan(tmp_path / "out", *models, method=method, base=family["trunk"], threads=threads, **case))
    base = None if MERGERS.get(method).needs.structure else states(family["trunk"])[0]
    want = merge_states(method, states(*models), case.get("options"), base=base, seed=case.get("seed", 0))
    assert same(states(tmp_path / "out")[0], want)
    model, _ = read_model(tmp_path / "out")
    assert model(torch.zeros(1, 3, dtype=torch.long)).logits.isfinite().all()
    assert torch.get_num_threads() == 1


def test_importances_come_from_files_and_folders(family, tmp_path):
    models = [family[name] for name in "ab"]
    matters = [{n: t.square() for n, t in one.items() if "norm" in n} for one in states(*models)]
    save_file(matters[0], tmp_path / "one.safetensors")
    (tmp_path / "two").mkdir()
    save_file(matters[1], tmp_path / "two" / "model.safetensors")
    told = plan(
        tmp_path / "out", *models, method="fisher", importances=[tmp_path / "one.safetensors", tmp_path / "two"]
    )
    receipt = merge_folders(told)
    assert same(states(tmp_path / "out")[0], merge_states("fisher", states(*models), importances=matters))
    assert [one["role"] for one in receipt["inputs"]] == ["model", "model", "importances", "importances"]
    assert any("have no importance" in note for note in receipt["notes"])


def test_however_the_input_is_cut_the_output_is_the_same(llamas, tmp_path):
    options = {"method": "dare_ties", "base": llamas["base"], "seed": 3}
    whole = plan(tmp_path / "whole", llamas["a"], llamas["b"], **options)
    pieces = [sharded(llamas[name], tmp_path / f"cut-{name}") for name in "ab"]
    merge_folders(whole)
    merge_folders(plan(tmp_path / "cut", *pieces, **options))
    assert same(read_all(tmp_path / "whole"), read_all(tmp_path / "cut"))


def test_sharded_output_holds_the_same_and_follows_the_layout(llamas, tmp_path):
    from transformers import AutoModelForCausalLM

    inputs = llamas["a"], llamas["b"]
    merge_folders(plan(tmp_path / "one", *inputs))
    receipt = merge_folders(plan(tmp_path / "many", *inputs, max_shard_bytes=3000, threads=2))
    assert (
        len(receipt["files"]) > 2 and receipt["files"][0] == f"model-00001-of-{len(receipt['files']):05d}.safetensors"
    )
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert (
        index["metadata"]["total_size"]
        == receipt["bytes"]
        == sum(t.nbytes for t in read_all(tmp_path / "one").values())
    )
    assert set(index["weight_map"].values()) == set(receipt["files"])
    for file in receipt["files"]:
        assert sorted(load_file(tmp_path / "many" / file)) == sorted(
            n for n, f in index["weight_map"].items() if f == file
        )
        assert (
            sum(t.nbytes for t in load_file(tmp_path / "many" / file).values()) <= 3000
            or len(load_file(tmp_path / "many" / file)) == 1
        )
    assert same(read_all(tmp_path / "one"), read_all(tmp_path / "many"))
    one, many = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("one", "many"))
    assert same(weights(one), weights(many))


def test_a_llama_merges_and_speaks(llamas, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    receipt = merge_folders(plan(tmp_path / "out", llamas["a"], llamas["b"], method="ties", base=llamas["base"]))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and model.dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("hello", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3, do_sample=False, pad_token_id=0).shape[1] > ids.shape[1]
    assert "model_id" not in receipt and not (tmp_path / "out" / "manifest.json").exists()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "README.md",
    }  # fmt: skip


def test_a_stacked_llama_is_deeper(llamas, tmp_path):
    from transformers import AutoModelForCausalLM

    slices = [{"model": 0, "start": 0, "stop": 2}, {"model": 1, "start": 0, "stop": 2}]
    merge_folders(plan(tmp_path / "out", llamas["a"], llamas["b"], method="passthrough", options={"slices": slices}))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()) and len(model.model.layers) == model.config.num_hidden_layers == 4


def test_types_are_the_first_models(llamas, tmp_path):
    wide = tmp_path / "wide"
    shutil.copytree(llamas["b"], wide)
    save_file({n: t.float() for n, t in states(llamas["b"])[0].items()}, wide / "model.safetensors")
    receipt = merge_folders(plan(tmp_path / "out", wide, llamas["a"], base=llamas["base"]))
    assert {t.dtype for t in states(tmp_path / "out")[0].values()} == {torch.float32}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float32"
    assert "models are stored in bfloat16, float32; every tensor keeps the first model's type" in receipt["notes"]


# What is written


def test_the_result_of_artifacts_is_an_artifact(family, tmp_path):
    told = plan(tmp_path / "child", family["a"], family["b"], method="dare", base=family["trunk"], seed=5)
    receipt = merge_folders(told)
    child, parents = Artifact.open(tmp_path / "child"), [Artifact.open(family[n]) for n in ("a", "b", "trunk")]
    manifest = child.manifest
    assert manifest.parents == [p.manifest.model_id for p in parents]
    assert manifest.model_id == receipt["model_id"] == "evomerge_child_20260102_030405"
    assert (manifest.phase_name, manifest.session_id, manifest.seeds) == ("evomerge", "run-1", [5])
    assert manifest.parameters == parents[0].manifest.parameters
    assert [one["sha256"] for one in receipt["inputs"]] == [p.content_hash for p in parents]
    assert manifest.metadata["merge"]["method"] == "dare_linear"
    card = (child.path / "README.md").read_text()
    for told_there in (manifest.parents[0], parents[0].content_hash, "drop_rate: `0.9`", "seed: `5`", "act_threshold"):
        assert told_there in card
    assert str(tmp_path) not in card
    merge_folders(told.replace(output=tmp_path / "more" / "child"))
    assert Artifact.open(tmp_path / "more" / "child").content_hash == child.content_hash


def test_traits_are_the_bases_and_the_receipt_says_which_differed(family, tmp_path):
    receipt = merge_folders(plan(tmp_path / "child", family["b"], family["c"], method="ties", base=family["trunk"]))
    assert receipt["differences"]["act_threshold"] == {"b": 0.5, "c": 0.9, "trunk": 0.9}
    assert set(receipt["differences"]) == {"act_threshold", "t_max", "memory_capacity"}
    assert read_model(tmp_path / "child")[0].config == trm_config(**TINY)
    first = plan(tmp_path / "other", family["b"], family["c"], base=family["trunk"], files_from="first")
    merge_folders(first)
    assert read_model(tmp_path / "other")[0].config == trm_config(**TINY, act_threshold=0.5, t_max=3)
    merge_folders(plan(tmp_path / "third", family["c"], family["b"]))
    assert read_model(tmp_path / "third")[0].config == trm_config(**TINY, memory_capacity=99)


def test_a_stacked_artifact_counts_its_parameters(family, tmp_path):
    case = CASES["passthrough"]
    merge_folders(plan(tmp_path / "child", family["a"], family["b"], method="passthrough", **case))
    model, _ = read_model(tmp_path / "child")
    assert model.config.n_layers == 3 and model.config.memory_layers == (1, 2)
    assert Artifact.open(tmp_path / "child").manifest.parameters == sum(p.numel() for p in model.parameters())


def test_one_foreign_input_makes_a_plain_folder(family, tmp_path):
    foreign = tmp_path / "foreign"
    shutil.copytree(family["b"], foreign, ignore=shutil.ignore_patterns("manifest.json"))
    receipt = merge_folders(plan(tmp_path / "out", family["a"], foreign))
    assert "model_id" not in receipt and not (tmp_path / "out" / "manifest.json").exists()
    assert "lineage unknown (not an artifact of ours): foreign" in receipt["notes"]


def test_what_is_written_is_what_safetensors_writes(family, tmp_path):
    merge_folders(plan(tmp_path / "out", family["a"], family["a"]))
    path = tmp_path / "out" / "model.safetensors"
    save_file(load_file(path), tmp_path / "again.safetensors", metadata={"format": "pt"})
    assert sha256_file(path) == sha256_file(tmp_path / "again.safetensors")


def test_tensors_of_several_types_stay_aligned(llamas, tmp_path):
    mixed = {
        "a": torch.ones(3, dtype=torch.uint8),
        "b": torch.ones(5).half(),
        "c": torch.ones(2),
        "d": torch.ones(1).double(),
    }
    shutil.copytree(llamas["a"], tmp_path / "mixed")
    save_file(mixed, tmp_path / "mixed" / "model.safetensors", metadata={"format": "pt"})
    merge_folders(plan(tmp_path / "out", tmp_path / "mixed", tmp_path / "mixed"))
    paths = [tmp_path / name / "model.safetensors" for name in ("mixed", "out")]
    assert sha256_file(paths[0]) == sha256_file(paths[1])


def test_threads_of_torch_are_given_back(llamas, tmp_path):
    torch.set_num_threads(2)
    try:
        merge_folders(plan(tmp_path / "out", llamas["a"], llamas["b"]))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)


# The plan


def test_the_plan_says_what_would_be_done_and_reads_no_weights(family, tmp_path, monkeypatch):
    monkeypatch.setattr(WeightFolder, "read", lambda *_: pytest.fail("read weights"))
    told = plan(tmp_path / "out", family["b"], family["c"], method="dare", base=family["trunk"], threads=1, seed=3)
    text = plan_text(told)
    tensors = len(states(family["b"])[0])
    size = os.path.getsize(family["b"] / "model.safetensors")
    for part in (
        "dare_linear: drop at random", "drop_rate = 0.9", "seed = 3", "model  b: trm_titans", "base  trunk",
        f"{tensors} merged, 0 copied", "an artifact", "in 1 file; configuration of trunk", "with 1 threads",
        "differs  act_threshold: b 0.5, c 0.9, trunk 0.9",
    ):  # fmt: skip
        assert part in text, text
    assert 0.9 * size < prepare(told).bytes < size and not (tmp_path / "out").exists()
    franken = plan_text(
        plan(tmp_path / "out", family["b"], family["c"], method="frankenmerge", options={"choices": [0, 1]})
    )
    assert f"0 merged, {tensors} copied" in franken


def test_the_peak_is_one_group_of_tensors_not_the_models(llamas, tmp_path):
    job = prepare(plan(tmp_path / "out", llamas["a"], llamas["b"], threads=1))
    largest = 300 * 16
    assert job.peak() - folders.SPARE_BYTES == largest * (2 * 2 + 2 + 4)
    assert prepare(plan(tmp_path / "out", llamas["a"], llamas["b"], threads=2)).peak() > job.peak()


@pytest.mark.skipif(not os.path.exists("/proc/self/maps"), reason="needs /proc")
def test_no_tensor_stays_mapped_after_its_turn(family, tmp_path):
    kept = []

    def look(*_):
        kept.extend(
            line for line in Path("/proc/self/maps").read_text().splitlines() if str(family["a"].parent) in line
        )

    merge_folders(plan(tmp_path / "out", family["a"], family["b"], threads=1), show=look)
    assert kept == []


def test_progress_counts_every_tensor(family, tmp_path):
    seen = []
    merge_folders(plan(tmp_path / "out", family["a"], family["b"], threads=1), show=lambda *step: seen.append(step))
    total = len(states(family["a"])[0])
    assert seen == [(i, total) for i in range(1, total + 1)]


# Nothing is left behind


class Stop(BaseException):
    """Stands for Ctrl-C: nothing may catch it."""


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["artifact", "plain"])
def test_interrupted_writing_leaves_nothing(family, llamas, tmp_path, kind, threads):
    models = [family["a"], family["b"]] if kind == "artifact" else [llamas["a"], llamas["b"]]

    def stop(done, total):
        if done == 3:
            raise Stop

    with pytest.raises(Stop):
        merge_folders(plan(tmp_path / "out", *models, threads=threads), show=stop)
    assert list(tmp_path.iterdir()) == [] and torch.get_num_threads() == 1
    merge_folders(plan(tmp_path / "out", *models, threads=threads))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_leaves_no_output_folder(llamas, tmp_path):
    child = os.fork()
    if child == 0:
        merge_folders(
            plan(tmp_path / "out", llamas["a"], llamas["b"], threads=1),
            show=lambda done, _: os._exit(9) if done == 4 else None,
        )
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / "out").exists()
    assert all(p.name.endswith(".unfinished") for p in tmp_path.iterdir()), "what sweep_unfinished removes"


def test_a_full_disk_is_told_and_leaves_nothing(llamas, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(folders.ShardWriter, "put", full)
    with pytest.raises(ResourceError, match="the disk is full"):
        merge_folders(plan(tmp_path / "out", llamas["a"], llamas["b"]))
    assert list(tmp_path.iterdir()) == []


def test_a_disk_too_small_is_refused_before_the_work(llamas, tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(ResourceError, match="the merged model needs"):
        merge_folders(plan(tmp_path / "out", llamas["a"], llamas["b"]))


def test_an_existing_folder_is_left_alone(family, tmp_path):
    with pytest.raises(ArtifactError, match=f"{family['a']}: exists already; choose another output folder"):
        merge_folders(plan(family["a"], family["b"], family["c"]))


# Refusals


def refusal(kind: type[ForgeError], message: str, told: MergePlan) -> None:
    with pytest.raises(kind, match=message) as refused:
        merge_folders(told)
    assert "\n" not in str(refused.value) and not told.output.exists()


def edited(source: Path, target: Path, **changes) -> Path:
    """A copy without manifest whose ``config.json`` differs."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("manifest.json"))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, **changes}))
    return target


def test_other_families_vocabularies_and_shapes_are_refused(family, llamas, tmp_path):
    out, a = tmp_path / "out", family["a"]
    refusal(ArtifactError, "b: model_type 'llama' is not that of .*a, 'trm_titans'; merge models of one family",
            plan(out, a, llamas["b"]))  # fmt: skip
    artifact(tmp_path / "gpt", "gpt", gpt_config(**TINY))
    refusal(ArtifactError, "gpt: model_type 'gpt' is not that of a, 'trm_titans'", plan(out, a, tmp_path / "gpt"))
    artifact(tmp_path / "vocab", "vocab", trm_config(vocab_size=301))
    refusal(ArtifactError, "vocab: vocab_size 301 is not that of a, 300; merge models of one vocabulary",
            plan(out, a, tmp_path / "vocab"))  # fmt: skip
    artifact(tmp_path / "wide", "wide", trm_config(**TINY, ffn_hidden=48))
    refusal(ArtifactError, "wide: blocks.0.ffn.down.weight has shape 16 x 48, in a it is 16 x 32; merge models of one",
            plan(out, a, tmp_path / "wide"))  # fmt: skip
    artifact(tmp_path / "deep", "deep", trm_config(**TINY, n_layers=3))
    refusal(
        ArtifactError, r"deep: has a tensor blocks.2.* \(shape .*\) that a has not", plan(out, a, tmp_path / "deep")
    )
    refusal(ArtifactError, r"a: has no tensor blocks.2.* \(shape .* in deep\)", plan(out, tmp_path / "deep", a))
    refusal(ArtifactError, "gpt: model_type", plan(out, a, family["b"], method="ties", base=tmp_path / "gpt"))


def test_equal_shapes_that_compute_differently_are_refused(family, llamas, tmp_path):
    artifact(tmp_path / "rope", "rope", trm_config(**TINY, rope_base=500.0))
    refusal(ArtifactError, r"rope: rope_base \(rotary base\) 500.0 is not that of a, 10000.0; merge models",
            plan(tmp_path / "out", family["a"], tmp_path / "rope"))  # fmt: skip
    heads = edited(llamas["b"], tmp_path / "heads", num_attention_heads=4)
    refusal(ArtifactError, r"heads: num_attention_heads \(heads\) 4 is not that of a, 2",
            plan(tmp_path / "out", llamas["a"], heads))  # fmt: skip
    unsaid = edited(llamas["b"], tmp_path / "unsaid", head_dim=None)
    merge_folders(plan(tmp_path / "out", llamas["a"], unsaid))


def test_other_tokenizers_are_refused_unless_told_otherwise(llamas, tmp_path):
    other = edited(llamas["b"], tmp_path / "other")
    OTHER.save(str(other / "tokenizer.json"))
    refusal(ArtifactError, "other: tokenizer .{12}… is not that of a, .{12}…; merge models of one tokenizer, or say",
            plan(tmp_path / "out", llamas["a"], other))  # fmt: skip
    receipt = merge_folders(plan(tmp_path / "out", llamas["a"], other, tokenizer="any"))
    assert any("accepted because tokenizer = any" in note for note in receipt["notes"])
    (other / "tokenizer.json").unlink()
    assert "no tokenizer to compare in other" in plan_text(plan(tmp_path / "new", llamas["a"], other))
    (other / "tokenizer.json").write_text("{")
    refusal(ArtifactError, "tokenizer.json: corrupt", plan(tmp_path / "new", llamas["a"], other))


def test_lineage_is_judged_where_it_is_known(family, tmp_path):
    out = tmp_path / "out"
    told = plan(out, family["a"], family["b"], method="ties", base=family["stranger"])
    ids = "cognate_a_20260102_030405, cognate_trunk_20260102_030405"
    refusal(
        ArtifactError, f"base: cognate_stranger_20260102_030405 is no ancestor of a, whose lineage is {ids}; give", told
    )
    refusal(
        ArtifactError, "stranger: no common ancestor with a; merge siblings", plan(out, family["a"], family["stranger"])
    )
    shutil.copytree(family["a"], tmp_path / "x" / "y" / "alone")
    shutil.copytree(family["b"], tmp_path / "x" / "y" / "too")
    apart = plan(out, tmp_path / "x" / "y" / "alone", tmp_path / "x" / "y" / "too", method="ties", base=family["c"])
    text = plan_text(apart.replace(base=family["trunk"]))
    assert "note" not in text
    alone = tmp_path / "elsewhere" / "p" / "stranger"
    shutil.copytree(family["stranger"], alone)
    text = plan_text(apart.replace(base=alone))
    assert "lineage of alone is known in part: whether stranger is an ancestor is taken on trust" in text
    with pytest.raises(ArtifactError, match="is no ancestor of alone"):
        plan_text(apart.replace(base=alone), parents_of=lambda model_id: [])


def test_methods_that_lack_something_are_refused(family, tmp_path):
    out, two = tmp_path / "out", (family["a"], family["b"])
    refusal(ConfigError, "ties: needs the common ancestor, none given; give it as base", plan(out, *two, method="ties"))
    refusal(ConfigError, "linear: needs 2 models or more, 1 given", plan(out, family["a"]))
    refusal(ConfigError, "fisher: needs importances", plan(out, *two, method="fisher"))
    refusal(ConfigError, "linear: weights .* sum to zero", plan(out, *two, options={"weights": [1, -1]}))
    refusal(ConfigError, "unknown merge_method 'tiess'", plan(out, *two, method="tiess"))
    three = (*two, family["c"])
    refusal(
        ConfigError, "slerp.fold: fold is off and 3 models", plan(out, *three, method="slerp", options={"fold": False})
    )
    with pytest.raises(ConfigError, match="created_at: value 'noon' refused: invalid isoformat string"):
        MergePlan.build({"method": "linear", "models": ["a"], "output": "b", "created_at": "noon"})
    for wrong in ({"models": []}, {"seed": -1}, {"max_shard_bytes": 0}, {"threads": -1}, {"tokenizer": "none"}):
        with pytest.raises(ConfigError):
            MergePlan.build({"method": "linear", "models": ["a"], "output": "b", **wrong})


def test_sick_values_are_named_by_model_and_tensor(llamas, tmp_path):
    sick = tmp_path / "sick"
    shutil.copytree(llamas["b"], sick)
    tensors = states(sick)[0]
    tensors["model.norm.weight"][2] = math.nan
    save_file(tensors, sick / "model.safetensors", metadata={"format": "pt"})
    for threads in (1, 2):
        refusal(ArtifactError, "sick: tensor model.norm.weight holds 1 of 16 values that are NaN or infinite",
                plan(tmp_path / "out", llamas["a"], sick, threads=threads))  # fmt: skip


def test_integers_that_differ_are_named(llamas, tmp_path):
    for name, value in (("a", 1), ("b", 2)):
        shutil.copytree(llamas[name], tmp_path / name)
        save_file({**states(llamas[name])[0], "steps": torch.tensor([value])}, tmp_path / name / "model.safetensors")
    refusal(ArtifactError, r"b: steps \(int64\) differs from that of a; integers cannot be averaged",
            plan(tmp_path / "out", tmp_path / "a", tmp_path / "b"))  # fmt: skip
    assert "1 copied" in plan_text(plan(tmp_path / "out", tmp_path / "a", tmp_path / "b"))


def test_damaged_inputs_are_refused(family, llamas, tmp_path):
    out = tmp_path / "out"
    hurt = tmp_path / "hurt"
    shutil.copytree(family["b"], hurt)
    data = bytearray((hurt / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (hurt / "model.safetensors").write_bytes(data)
    refusal(ArtifactError, "hurt: model.safetensors is truncated or changed", plan(out, family["a"], hurt))
    (hurt / "model.safetensors").write_bytes(data[:-4])
    refusal(
        ArtifactError, "model.safetensors: tensor .* is truncated; copy the file again", plan(out, family["a"], hurt)
    )
    (hurt / "model.safetensors").write_bytes(b"x" * 20)
    refusal(ArtifactError, "model.safetensors: not a safetensors file, or truncated", plan(out, family["a"], hurt))
    (hurt / "model.safetensors").write_bytes((4).to_bytes(8, "little") + b"[1]]")
    refusal(ArtifactError, "model.safetensors: unreadable header", plan(out, family["a"], hurt))
    (hurt / "model.safetensors").unlink()
    (hurt / "pytorch_model.bin").touch()
    refusal(ArtifactError, "hurt: no safetensors weights here, only pytorch_model.bin", plan(out, family["a"], hurt))
    refusal(ArtifactError, "nowhere: no such folder", plan(out, family["a"], tmp_path / "nowhere"))
    cut = sharded(llamas["b"], tmp_path / "cut")
    (cut / "model-00002-of-00003.safetensors").unlink()
    refusal(ArtifactError, "model-00002-of-00003.safetensors: file is missing", plan(out, llamas["a"], cut))
    (cut / "model.safetensors.index.json").write_text('{"weight_map": {"x": "model-00001-of-00003.safetensors"}}')
    refusal(ArtifactError, "model-00001-of-00003.safetensors: tensor x is missing", plan(out, llamas["a"], cut))
    (cut / "model.safetensors.index.json").write_text("{}")
    refusal(ArtifactError, "unreadable index", plan(out, llamas["a"], cut))
    save_file({"c": torch.zeros(1, dtype=torch.complex64)}, tmp_path / "odd.safetensors")
    with pytest.raises(ArtifactError, match="holds the type C64, which cannot be merged"):
        read_header(tmp_path / "odd.safetensors")


def test_importances_of_another_model_are_refused(family, tmp_path):
    save_file({"other": torch.ones(2)}, tmp_path / "other.safetensors")
    save_file({"norm.weight": torch.ones(3)}, tmp_path / "small.safetensors")
    save_file({"norm.weight": torch.ones(16)}, tmp_path / "good.safetensors")
    for name, message in (
        ("other", "importances of b: none of its 1 tensors is one of the model's; measure"),
        ("small", "importances of b: norm.weight has shape 3, in b it is 16"),
    ):
        files = [tmp_path / "good.safetensors", tmp_path / f"{name}.safetensors"]
        refusal(
            ArtifactError, message, plan(tmp_path / "out", family["a"], family["b"], method="fisher", importances=files)
        )


def test_further_notes_are_on_the_card(llamas, tmp_path):
    receipt = merge_folders(plan(tmp_path / "out", llamas["a"], llamas["b"], notes=["measured on problems"]))
    assert "measured on problems" in receipt["notes"]
    assert "- measured on problems" in (tmp_path / "out" / "README.md").read_text()


def test_unverified_inputs_are_told_as_such(llamas, tmp_path):
    receipt = merge_folders(plan(tmp_path / "out", llamas["a"], llamas["b"], verify=False))
    assert [one["sha256"] for one in receipt["inputs"]] == [None, None]
    assert "not hashed" in (tmp_path / "out" / "README.md").read_text()


def test_notes_about_templates_and_unused_bases(llamas, tmp_path):
    talks = edited(llamas["a"], tmp_path / "talks")
    (talks / "chat_template.jinja").write_text("{{ messages }}")
    told = plan(tmp_path / "out", talks, llamas["b"], base=llamas["base"])
    notes = prepare(told).findings.notes
    assert any("base has no chat template" in note for note in notes)
    assert any("linear does not compute with the base" in note for note in notes)
    merge_folders(told.replace(files_from="first"))
    assert (tmp_path / "out" / "chat_template.jinja").is_file()


def test_folders_of_one_name_are_told_apart(llamas, tmp_path):
    shutil.copytree(llamas["b"], tmp_path / "other" / "a")
    names = [m.name for m in prepare(plan(tmp_path / "out", llamas["a"], tmp_path / "other" / "a")).models]
    assert len(set(names)) == 2 and all(name.endswith("/a") for name in names)
    assert [m.name for m in prepare(plan(tmp_path / "x", *[llamas["a"]] * 2)).models] == ["a (input 0)", "a (input 1)"]
