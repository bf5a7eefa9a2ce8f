"""Exports: transformers loads them with agent-forge and without, they say what they are, and nothing is half done."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch

from agent_forge.cli.commands_handon import size_of
from agent_forge.export import EXPORTERS
from agent_forge.export import hf as export_module
from agent_forge.export.card import claims
from agent_forge.export.hf import ExportPlan, check_vocabulary, export_hf
from agent_forge.export.remote_code import bundle
from forgekit.data.tokenizer import question, train_tokenizer
from forgekit.errors import ArtifactError, ConfigError, ForgeError, ResourceError
from forgekit.measure.evidence import Evidence
from forgekit.models.config import FAMILIES
from forgekit.models.io import build_model, read_model, write_model
from forgekit.store.artifact import Artifact, ArtifactExtras, Manifest, write_artifact
from tests.unit.tiny import gpt_config, made, trm_config

TOKENIZER = train_tokenizer(["hello world, some text with digits 123 and äöü. "] * 5, 310)
V = TOKENIZER.get_vocab_size()
CONFIGS = {
    "gpt": gpt_config(vocab_size=V, emb_rank=8, window=6),
    "trm_titans": trm_config(vocab_size=V, act_threshold=0.4),
}
PROMPTS = ["hello 123", "some"]
EVIDENCE = [
    Evidence.compare(
        claim=claim,
        metric="exact_match",
        before=[0.0] * 40,
        after=[float(right)] * 40,
        chance=0.25,
        split="report",
        seeds=(1,),
        compute={},
        parent_must_beat_chance=False,
    ).model_dump(mode="json")
    for claim, right in (("tiny learned copy", 1), ("tiny learned sort", 0), ("other learned | copy", 1))
]
# Runs in a process where neither agent-forge nor what only it needs can be imported.
ALONE = """
import importlib.abc, json, sys
class Nobody(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("forgekit", "agent_forge", "pydantic"):
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, Nobody())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
"""
ASKED = """
tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=TRUST)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=TRUST)
batch = tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
with torch.inference_mode():
    logits = model(**batch).logits.float()
    words = model.generate(**batch, max_new_tokens=6)[:, batch["input_ids"].shape[1]:]
chat = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, add_generation_prompt=True)
print(json.dumps({"class": type(model).__module__, "dtype": str(model.dtype), "chat": chat, "words": words.tolist(),
                  "logits": [row[mask.bool()].tolist() for row, mask in zip(logits, batch["attention_mask"])]}))
"""


def artifact(folder, config, name="tiny", **changes):
    """A finished artifact with evidence and a card."""
    model = made(config, stir=0.3)
    fields = {
        "model_id": f"cognate_{name}_20260102_030405",
        "session_id": "run-1",
        "phase_name": "cognate",
        "model_name": name,
        "parameters": config.parameters(),
        "parents": ["cognate_trunk_20260102_030000"],
        "seeds": [42],
        "metadata": {"specialization": "reasoning", "tags": ["cognate"]},
    }
    extras = ArtifactExtras(evidence=EVIDENCE, readme="# tiny\n\n## Data\n\n- 7 of 9 rows\n\n## Use\n\nno\n")
    return write_artifact(
        folder, lambda work: write_model(model, TOKENIZER, work), Manifest(**{**fields, **changes}), extras
    )


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """One artifact of every family."""
    root = tmp_path_factory.mktemp("artifacts")
    return {family: artifact(root / family, config).path for family, config in CONFIGS.items()}


def export(source, output, **changes):
    return export_hf(ExportPlan(source=source, output=output, **changes))


def asked(folder, tmp_path, alone=True):
    """What transformers makes of a folder, in a process of its own."""
    start = ALONE if alone else "import forgekit\n" + ALONE.replace("sys.meta_path.insert(0, Nobody())", "")
    code = f"{start}\nFOLDER, PROMPTS, TRUST = {str(folder)!r}, {PROMPTS!r}, {alone}\n{ASKED}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def own_logits(folder):
    model, tokenizer = read_model(folder)
    with torch.inference_mode():
        return [model(torch.tensor([tokenizer.encode(prompt).ids])).logits[0] for prompt in PROMPTS]


def same_logits(found, want, tolerance=1e-4):
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(torch.tensor(a), b, rtol=tolerance, atol=tolerance)


# ---- the model


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_an_export_speaks_without_agent_forge_as_with_it(artifacts, tmp_path, family):
    export(artifacts[family], tmp_path / "out")
    alone = asked(tmp_path / "out", tmp_path)
    assert alone["class"].startswith("transformers_modules.") and alone["dtype"] == "torch.float32"
    same_logits(alone["logits"], own_logits(artifacts[family]))
    together = asked(tmp_path / "out", tmp_path, alone=False)
    assert together["class"] == "forgekit.models.hf"
    same_logits(together["logits"], own_logits(artifacts[family]))
    assert alone["words"] == together["words"] and alone["chat"] == together["chat"] == question("x")


def test_the_weights_are_the_artifacts_and_the_house_reads_them(artifacts, tmp_path):
    for family, source in artifacts.items():
        receipt = export(source, tmp_path / family)
        want, found = read_model(source)[0], read_model(tmp_path / family)[0]
        assert found.config == want.config
        assert all(torch.equal(t, found.state_dict()[n]) for n, t in want.state_dict().items())
        assert receipt["bytes"] == sum(p.stat().st_size for p in (tmp_path / family).iterdir())
        assert receipt["model_id"] == "cognate_tiny_20260102_030405" and receipt["largest_rounding"] == 0


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_another_type_and_several_files(artifacts, tmp_path, dtype):
    from transformers import AutoModelForCausalLM

    receipt = export(artifacts["trm_titans"], tmp_path / "out", dtype=dtype, max_shard_bytes=8000)
    files = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and (tmp_path / "out" / "model.safetensors.index.json").is_file()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    want = read_model(artifacts["trm_titans"])[0].state_dict()
    assert found.dtype == getattr(torch, dtype) and receipt["dtype"] == dtype
    state, largest = found.state_dict(), 0.0
    for name, tensor in want.items():
        assert torch.equal(state[name], tensor.to(found.dtype)), name
        largest = max(largest, float((tensor - tensor.to(found.dtype)).abs().max()))
    assert receipt["largest_rounding"] == pytest.approx(largest) and largest > 0
    rows = [torch.tensor([TOKENIZER.encode(prompt).ids]) for prompt in PROMPTS]
    with torch.inference_mode():
        for ids, full in zip(rows, own_logits(artifacts["trm_titans"])):
            logits = found(ids).logits[0]
            assert (logits - full).abs().max() < 0.05 * full.abs().max()
            assert found.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"moved no weight by more than {largest:.3g}" in card and f"not with the {dtype} here" in card


def test_an_export_can_be_exported_again(artifacts, tmp_path):
    export(artifacts["gpt"], tmp_path / "one", dtype="bfloat16")
    export(tmp_path / "one", tmp_path / "two", dtype="float32")
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["agent_forge"]["model_id"] == "cognate_tiny_20260102_030405" and config["dtype"] == "float32"
    assert "a copy of the model `cognate_tiny_20260102_030405`" in (tmp_path / "two" / "README.md").read_text()
    one, two = (read_model(tmp_path / name)[0].state_dict() for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


# ---- the code that travels


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_travelling_code_needs_torch_and_transformers_alone(family):
    files = bundle(family)
    needed = set(re.findall(r"(?m)^\s*(?:from|import) ([a-z]\w*)", "\n".join(files.values())))
    assert needed <= {*sys.stdlib_module_names, "torch", "transformers"}
    relative = set(re.findall(r"(?m)^\s*from \.(\w+) import", "\n".join(files.values())))
    assert {f"{name}.py" for name in relative} < set(files)
    for name, source in files.items():
        compile(source, name, "exec")
        assert "SPDX-License-Identifier" in source.splitlines()[0] and "from forgekit" not in source


def test_a_family_that_imports_what_cannot_travel_is_refused(monkeypatch):
    from agent_forge.export import remote_code

    honest = remote_code._source
    monkeypatch.setattr(remote_code, "_source", lambda module: f"from forgekit.data.batches import x\n{honest(module)}")
    with pytest.raises(ConfigError, match="imports forgekit.data.batches, which cannot travel"):
        bundle("gpt")
    with pytest.raises(ConfigError, match="unknown model_config 'gtp'"):
        bundle("gtp")


# ---- the card


def test_the_card_says_what_manifest_and_evidence_say(artifacts, tmp_path):
    export(artifacts["trm_titans"], tmp_path / "out", ancestors=("cognate_trunk_20260102_030000", "older"))
    card = (tmp_path / "out" / "README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "library_name: transformers" in head and "pipeline_tag: text-generation" in head
    assert '- "cognate_trunk_20260102_030000"' in head and "base_model_relation: finetune" in head
    assert "\nlicense:" not in head and "names no licence" in head
    manifest = Artifact.open(artifacts["trm_titans"]).manifest
    assert f"| parameters | {manifest.parameters:,} |" in body and "specialised in reasoning" in body
    assert "further ancestors: `older`" in body and "- 7 of 9 rows" in body
    size = sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))
    assert f"{size:,} bytes" in body
    low, high = EVIDENCE[0]["ci95"]
    row = f"| tiny learned copy | exact_match | 0 | 1 | {low:+.3g} to {high:+.3g} | 40 | report | 0.25 | improved |"
    assert row in body.partition("Measured beside it")[0]
    assert "| other learned / copy |" in body.partition("Measured beside it")[2]
    assert "- tiny learned sort: no-signal." in body and "- other learned" not in body
    assert Artifact.open(artifacts["trm_titans"]).content_hash in body


def test_a_model_without_evidence_claims_nothing(tmp_path):
    source = tmp_path / "in"
    fields = {"model_id": "cognate_a_20260102_030405", "session_id": "s", "phase_name": "cognate", "model_name": "a"}
    manifest = Manifest(**fields, parameters=CONFIGS["gpt"].parameters())
    write_artifact(source, lambda work: write_model(made(CONFIGS["gpt"]), TOKENIZER, work), manifest)
    export(source, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Nothing was measured on this model" in card and "Not recorded in the manifest." in card
    assert "base_model" not in card and "trained from nothing" in card and "| claim |" not in card


def test_only_evidence_becomes_a_row():
    assert [c.claim for c in claims({"evidence": EVIDENCE, "tables": {}})] == [e["claim"] for e in EVIDENCE]
    assert claims([{"claim": "x"}, *EVIDENCE[:1], "noise"])[0].claim == "tiny learned copy"
    assert claims(None) == claims({"a": 1}) == []


# ---- somebody else's model


def llama(folder, **changes):
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=V, max_position_embeddings=24, **sizes, **changes))
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token="<|end|>").save_pretrained(folder)
    return model.eval()


def test_a_checkpoint_of_somebody_elses_keeps_its_words(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    before = llama(tmp_path / "in")
    (tmp_path / "in" / "README.md").write_text("---\nlicense: mit\n---\n# theirs\n")
    (tmp_path / "in" / "LICENSE").write_text("MIT")
    export(tmp_path / "in", tmp_path / "same")
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "same")
    ids = torch.tensor([[5, 6, 7]])
    with torch.inference_mode():
        assert torch.equal(same(ids).logits, before(ids).logits)
    receipt = export(tmp_path / "in", tmp_path / "half", dtype="bfloat16", max_shard_bytes=20_000)
    half = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    assert half.dtype == torch.bfloat16 and len(list((tmp_path / "half").glob("model-*.safetensors"))) > 1
    assert all(torch.equal(t.bfloat16(), half.state_dict()[n]) for n, t in before.state_dict().items())
    assert AutoTokenizer.from_pretrained(tmp_path / "half").encode("hello") == TOKENIZER.encode("hello").ids
    card = (tmp_path / "half" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n# theirs\n") and "## This copy" in card
    assert f"moved no weight by more than {receipt['largest_rounding']:.3g}" in card
    assert (tmp_path / "half" / "LICENSE").read_text() == "MIT" and not list((tmp_path / "half").glob("*.py"))


@pytest.mark.parametrize(
    ("change", "options", "told"),
    [
        ({"model_type": "t5"}, {}, "type 't5' as LlamaForCausalLM is no causal language model"),
        ({"architectures": ["LlamaForTokenClassification"]}, {}, "as LlamaForTokenClassification is no causal"),
        ({"quantization_config": {"bits": 4}}, {"dtype": "float16"}, "the weights are quantised"),
        ({"vocab_size": 10}, {}, f"the tokenizer has {V} tokens, the weights 10 rows"),
    ],
)
def test_checkpoints_that_cannot_be_exported_are_refused(tmp_path, change, options, told):
    llama(tmp_path / "in")
    config = json.loads((tmp_path / "in" / "config.json").read_text())
    (tmp_path / "in" / "config.json").write_text(json.dumps({**config, **change}))
    with pytest.raises(ForgeError, match=told):
        export(tmp_path / "in", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


# ---- bad input


def spoil(folder, name, value):
    """Write another value into a tensor, with no manifest to notice."""
    from safetensors.torch import load_file, save_file

    (folder / "manifest.json").unlink()
    tensors = load_file(folder / "model.safetensors")
    if value is None:
        tensors.pop(name)
    else:
        tensors[name].view(-1)[0] = value
    save_file(tensors, folder / "model.safetensors")


def test_an_existing_target_is_left_alone(artifacts, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(ArtifactError, match="exists already; choose another folder"):
        export(artifacts["gpt"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_damaged_artifact_is_refused(artifacts, tmp_path):
    shutil.copytree(artifacts["gpt"], tmp_path / "in")
    with open(tmp_path / "in" / "model.safetensors", "r+b") as file:
        file.seek(-4, 2)
        file.write(b"\1\2\3\4")
    with pytest.raises(ArtifactError, match="truncated or changed"):
        export(tmp_path / "in", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize(
    ("value", "options", "told"),
    [
        (math.nan, {}, "norm.weight holds values that are not finite"),
        (1e6, {"dtype": "float16"}, "float16 cannot hold 1e\\+06 of tensor norm.weight; use bfloat16"),
        (None, {}, "tensor norm.weight is missing, config.json says 16"),
    ],
)
def test_weights_that_cannot_be_handed_on_are_refused(artifacts, tmp_path, value, options, told):
    shutil.copytree(artifacts["gpt"], tmp_path / "in")
    spoil(tmp_path / "in", "norm.weight", value)
    with pytest.raises(ForgeError, match=told):
        export(tmp_path / "in", tmp_path / "out", **options)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in"], "nothing is left behind"


def test_a_model_without_its_tokenizer_is_refused(artifacts, tmp_path):
    shutil.copytree(artifacts["gpt"], tmp_path / "in")
    (tmp_path / "in" / "manifest.json").unlink()
    (tmp_path / "in" / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match="no tokenizer here"):
        export(tmp_path / "in", tmp_path / "out")
    with pytest.raises(ArtifactError, match=f"has {V} tokens, the weights {V - 1} rows"):
        check_vocabulary(TOKENIZER, V - 1, tmp_path)


def test_a_full_disk_is_told_before_anything_is_written(artifacts, tmp_path, monkeypatch):
    from forgekit.compute import disk

    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    with pytest.raises(ResourceError, match="the export needs"):
        export(artifacts["gpt"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_export_that_is_broken_off_leaves_nothing(artifacts, tmp_path, monkeypatch):
    monkeypatch.setattr(export_module, "model_card", lambda facts: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        export(artifacts["gpt"], tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_formats_are_found_by_name():
    assert EXPORTERS.get("hf") is export_hf and EXPORTERS.names() == ["hf", "gguf"]
    with pytest.raises(ConfigError, match="unknown export_format 'onnx'; choose one of hf"):
        EXPORTERS.get("onnx")


@pytest.mark.parametrize(("text", "size"), [("5GB", 5e9), ("500mb", 5e8), ("1.5k", 1500), (" 12 ", 12)])
def test_sizes_are_read(text, size):
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "0", "-1MB", "5 apples", "0.1", "GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="is not a size"):
        size_of(text)


def test_random_weights_are_really_different():
    """The equality tests above would pass on silent models."""
    a, b = (made(CONFIGS["gpt"], seed, stir=0.3) for seed in (0, 1))
    ids = torch.tensor([[40, 41, 42]])
    assert (a(ids).logits - b(ids).logits).abs().max() > 0.1
    assert build_model(CONFIGS["gpt"]).config == a.config
