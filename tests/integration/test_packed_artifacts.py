"""Packed artifacts at the command line: they run like any model, what needs floats refuses them in one line that names
a dense copy, a damaged one is told with its file and the remedy, and opening one costs next to nothing."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from agent_forge.cli.shared import to_talk_to
from agent_forge.export.gguf import GGUFPlan, export_gguf
from agent_forge.pipeline.handoff import ModelHandoffValidator
from agent_forge.prompt_baking import bake_prompt
from agent_forge.serve.app import ServeConfig, running_server
from forgekit.config import canonical_json
from forgekit.data.tokenizer import train_tokenizer
from forgekit.errors import ArtifactError
from forgekit.infer.chat import Chat
from forgekit.infer.engine import Engine
from forgekit.infer.sampling import SamplingConfig
from forgekit.models.base import parameter_count
from forgekit.models.hf import HFCausalLM
from forgekit.models.io import read_model, write_model
from forgekit.models.unpacked import check_plain, rounds_activations, unpacked
from forgekit.quant.config import GroupPlan, TernaryPlan
from forgekit.quant.files import LAYOUT, METADATA, write_packed
from forgekit.quant.model import calibrate, dequantised, fake_quantised, is_packed, logical_parameters, packed
from forgekit.store.packed import SECTION
from forgekit.store.storage import ModelStorage
from tests.conftest import CLI, environment, run_cli
from tests.unit.tiny import gpt_config, made, same, train_config, trainer, trm_config, weights

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENIZER = train_tokenizer(["hello world, this is some text with digits 123 and more of it. "] * 5, 300)
V = TOKENIZER.get_vocab_size()
PLAN, GROUPS, FLOATS = TernaryPlan(), GroupPlan(bits=5, group=8), TernaryPlan(activation_bits=0)
GREEDY = SamplingConfig(max_tokens=64)  # what chat does unless told otherwise
SIZE = {"vocab_size": V, "d_model": 20, "ffn_hidden": 37}
IDS = torch.arange(24)[None]


def hugging_face(kind: str) -> HFCausalLM:
    """A tiny Hugging Face model in the house's clothes."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

    ends = {"bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    torch.manual_seed(0)
    if kind == "gpt2":
        config = GPT2Config(vocab_size=V, n_positions=64, n_embd=20, n_layer=2, n_head=2, n_inner=37, **ends)
    else:
        shape = {"hidden_size": 20, "intermediate_size": 37, "num_hidden_layers": 2, "max_position_embeddings": 64}
        shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "attention_bias": kind == "llama_biased"}
        config = LlamaConfig(vocab_size=V, **shape, **ends, tie_word_embeddings=kind != "llama_untied")
    model = HFCausalLM(AutoModelForCausalLM.from_config(config)).eval()
    with torch.no_grad():
        for p in model.parameters():  # biases start at zero, and would hide that they are lost
            p.add_(0.1 * torch.randn_like(p))
    return model


def model_of(kind: str) -> torch.nn.Module:
    """A tiny model of one of our families, or of Hugging Face's."""
    if kind == "gpt":
        return made(gpt_config(**SIZE, emb_rank=6, max_seq_len=128), stir=0.3).eval()
    if kind == "trm_titans":
        return made(trm_config(**SIZE, max_seq_len=128), stir=0.3).eval()
    return hugging_face(kind)


def tokenizer_of(model: torch.nn.Module) -> Any:
    """The tokenizer to write beside a model."""
    if not hasattr(model, "hf"):
        return TOKENIZER
    from transformers import PreTrainedTokenizerFast

    from forgekit.hub import HFTokenizer

    return HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token="<|end|>", pad_token="<|pad|>"))


KINDS = ("gpt", "trm_titans", "llama_tied", "llama_untied", "llama_biased", "gpt2")


@dataclass(frozen=True)
class House:
    """A storage with a parent, its packed model and the dense copy, and the packed model as a folder of its own."""

    root: Path
    parent: str
    packed: str
    dense: str

    @property
    def storage(self) -> tuple[str, str]:
        """The options that choose it."""
        return "--storage", str(self.root / "storage")

    @property
    def bare(self) -> Path:
        """The folder without a manifest."""
        return self.root / "bare"

    def folder(self, model_id: str) -> Path:
        """Where a model is."""
        return ModelStorage(self.root / "storage").resolve(model_id)


def furnish(root: Path, kind: str = "trm_titans") -> House:
    """Make a house."""
    storage, model = ModelStorage(root / "storage"), model_of(kind)
    tokenizer, small = tokenizer_of(model), packed(model, PLAN, GROUPS)
    session = storage.registry.create_session({})
    parent = storage.save_model(model, session, "quietstar", "thinker", {}, tokenizer=tokenizer)
    below = {"parents": [parent]}
    tagged = {**below, "tags": ["bitnet", "packed"]}
    child = storage.save_model(small, session, "bitnet", "ternary", tagged, tokenizer=tokenizer)
    copied = dequantised(model, PLAN, GROUPS)
    below |= {"packed_model": child}
    dense = storage.save_model(copied, session, "bitnet", "ternary_dense", below, tokenizer=tokenizer)
    (root / "bare").mkdir()
    write_model(small, tokenizer, root / "bare")
    return House(root, parent, child, dense)


@pytest.fixture(scope="module")
def house(tmp_path_factory) -> House:
    return furnish(tmp_path_factory.mktemp("house"))


@pytest.fixture(scope="module")
def plain(house) -> torch.nn.Module:
    return read_model(house.folder(house.parent))[0]


# ---- counting


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", [PLAN, GroupPlan(bits=8, group=8)], ids=["ternary", "int8"])
def test_a_packed_model_has_the_parameters_and_flops_of_its_parent(kind, plan, tmp_path):
    model = model_of(kind)
    for groups in (GROUPS, None):
        small = packed(model, plan, groups)
        write_packed(small, tokenizer_of(model), tmp_path / str(groups is None))
        for one in (small, read_model(tmp_path / str(groups is None))[0]):
            assert logical_parameters(one) == parameter_count(model)
            assert one.flops_per_token(40) == model.flops_per_token(40)


def test_the_manifest_and_the_list_of_models_count_what_the_codes_stand_for(house, plain, forge):
    rows = {row["model_id"]: row for row in json.loads(forge(*house.storage, "models", "--json").out)}
    assert {row["parameters"] for row in rows.values()} == {parameter_count(plain)}
    assert rows[house.packed]["size_mb"] < rows[house.parent]["size_mb"] / 3
    told = json.loads(forge(*house.storage, "model", house.packed, "--info", "--json").out)
    assert told["parameters"] == parameter_count(plain) and told["ancestors"] == [house.parent]
    assert told["packed"] is True and told["dense_copy"] == str(house.folder(house.dense))
    told = json.loads(forge(*house.storage, "model", house.parent, "--json").out)
    assert told["descendants"] == [house.packed, house.dense]
    assert told["packed"] is False and "dense_copy" not in told


# ---- running


def said(folder: Path, text: str, **changes: Any) -> str:
    """What the engine answers."""
    talk = Chat(Engine(*read_model(folder)), GREEDY.replace(**changes))
    return "".join(piece.text for piece in talk.speak(text) if not piece.thought)


def test_chat_answers_from_an_id_a_name_a_folder_and_a_pipe(house, forge, monkeypatch):
    wanted = said(house.bare, "hello")
    for name in (house.packed, "ternary", house.bare):
        assert forge(*house.storage, "chat", name, "hello").out == f"{wanted}\n"
    for words in (("chat", house.packed), ("model", house.packed, "--load")):
        monkeypatch.setattr(sys, "stdin", io.StringIO("hello\n/quit\n"))
        assert forge(*house.storage, *words).out == f"{wanted}\n"


def test_chat_thinks(house, forge):
    words = ("chat", house.packed, "hello", "--think", "on", "--think-budget", "5", "--json")
    told = json.loads(forge(*house.storage, *words).out)
    assert told["thought"] and told["model"] == str(house.folder(house.packed))


@pytest.mark.parametrize("kind", ["llama_tied", "gpt2"])
def test_a_packed_hugging_face_model_talks(kind, tmp_path, forge):
    write_packed(model_of(kind), tokenizer_of(model_of(kind)), tmp_path / "small", PLAN, GROUPS)
    done = forge("chat", tmp_path / "small", "hello", "--max-tokens", "6")
    assert done.code == 0 and done.out == f"{said(tmp_path / 'small', 'hello', max_tokens=6)}\n"


def test_serve_answers_whole_streamed_and_several_at_once(house):
    openai = pytest.importorskip("openai")
    config = ServeConfig(port=0, device="cpu", grace=0.0, max_rows=8)
    folders = {"small": house.folder(house.packed), "bare": house.bare, "dense": house.folder(house.dense)}
    ask = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 12}
    with (
        running_server(folders, config) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=20) as client,
    ):
        whole = client.chat.completions.create(model="small", **ask, temperature=0).choices[0].message.content
        assert whole == said(house.bare, "hello", max_tokens=12)
        pieces = client.chat.completions.create(model="small", **ask, temperature=0, stream=True)
        assert "".join(piece.choices[0].delta.content or "" for piece in pieces) == whole
        answers: dict[tuple[str, int], str] = {}

        def put(name: str, seed: int) -> None:
            answer = client.chat.completions.create(model=name, **ask, temperature=1, seed=seed)
            answers[name, seed] = answer.choices[0].message.content

        asked = [(name, seed) for name in folders for seed in range(4)]
        together = [threading.Thread(target=put, args=one) for one in asked]
        for thread in together:
            thread.start()
        for thread in together:
            thread.join()
    assert set(answers) == set(asked)
    assert all(answers["small", seed] == answers["bare", seed] for seed in range(4))
    assert len({answers["small", seed] for seed in range(4)}) > 1


def test_compare_sets_a_packed_model_beside_its_parent(tmp_path, forge):
    house = furnish(tmp_path, "gpt")  # no halting, which would cost a packed model other steps
    (tmp_path / "own.txt").write_text("hello world, this is some text with digits 123. " * 40)
    words = ("--problems", "2", "--families", "sort", "--levels", "1", "--windows", "2", "--data", "own.txt", "--json")
    done = forge(*house.storage, "compare", "thinker", house.packed, house.bare, *words)
    assert done.code == 0, done.err
    first, second, third = json.loads(done.out)["models"]
    assert first["parameters"] == second["parameters"] == third["parameters"] == parameter_count(model_of("gpt"))
    assert first["flops_per_token"] == second["flops_per_token"] > 0
    assert second["weight_bytes"] == third["weight_bytes"] < first["weight_bytes"] / 3
    bits = json.loads(done.out)["text"]["bits_per_byte"]
    assert bits["ternary"] == bits["bare"] != bits["thinker"]


def test_validate_reads_it(house, forge):
    done = forge(*house.storage, "validate", "--json")
    assert done.code == 0 and {row["result"] for row in json.loads(done.out)} == {"ok"}


# ---- what takes floats refuses it, and names a way

REFUSED = {
    "bake": ("bake", "MODEL", "--prompt-file", "prompt.txt", "--out", "out"),
    "merge": ("merge", "thinker", "MODEL", "--output", "out", "--method", "linear"),
    "merge base": ("merge", "thinker", "ternary_dense", "--base", "MODEL", "--output", "out"),
    "importance": ("merge", "thinker", "MODEL", "-o", "out", "-m", "fisher", "--importance", "auto"),
    "merge plan": ("merge", "MODEL", "thinker", "--output", "out", "--method", "linear", "--plan"),
    "quietstar": ("run", "--profile", "pico", "--phase", "quietstar", "--from", "MODEL"),
    "evomerge": ("run", "--profile", "pico", "--phase", "evomerge", "--from", "thinker", "MODEL", "ternary_dense"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("bare", [False, True], ids=["artifact", "folder"])
def test_what_takes_floats_refuses_it_in_one_line(house, forge, tmp_path, name, bare):
    (tmp_path / "prompt.txt").write_text("Answer in capitals.")
    before = json.loads(forge(*house.storage, "status", "--json").out)
    model = str(house.bare) if bare else house.packed
    done = forge(*house.storage, *(model if word == "MODEL" else word for word in REFUSED[name]))
    assert done.code == 4, done.err
    folder = house.bare if bare else house.folder(house.packed)
    way = f"make a dense copy: agent-forge export {folder} --format hf --output bare-dense"
    way = way if bare else f"use its dense copy {house.folder(house.dense)}"
    assert re.fullmatch(re.escape(str(folder)) + r": its weights are packed: it can be run, not \w+; " + re.escape(way),
                        done.error)  # fmt: skip
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.unfinished"))
    assert json.loads(forge(*house.storage, "status", "--json").out) == before, "no session may be left behind"


def test_loaded_models_are_refused_too(house):
    model, tokenizer = read_model(house.bare)
    with pytest.raises(ArtifactError, match="TRMTitans: its weights are packed: it can be run, not trained; give a"):
        bake_prompt(model, "x", tokenizer=tokenizer)
    with pytest.raises(ArtifactError, match="packed"):
        check_plain(model)
    check_plain(unpacked(model))


def test_a_handoff_refuses_it_except_to_a_release(house):
    model = read_model(house.bare)[0]
    validator = ModelHandoffValidator()
    for one in (model, house.bare, house.folder(house.packed)):
        told = validator.validate_handoff("bitnet", "curriculum", [one], [{}])
        assert not told.accepted and any("its weights are packed" in str(refusal) for refusal in told.refusals)
        told = validator.validate_handoff("compression", "release", [one], [{}])
        assert not any("packed" in str(refusal) for refusal in told.refusals)
    told = validator.validate_handoff("bitnet", "curriculum", [unpacked(model)], [{}])
    assert not any("packed" in str(refusal) for refusal in told.refusals)


def test_gguf_refuses_it_and_takes_the_dense_copy(tmp_path, forge):
    house = furnish(tmp_path, "gpt")
    done = forge(*house.storage, "export", house.packed, "--format", "gguf", "--output", "out.gguf")
    folder = house.folder(house.packed)
    assert done.code == 2 and done.error.startswith(f"{folder}/config.json: the weights are packed")
    assert f"use its dense copy {house.folder(house.dense)}; export that, with --dtype q8_0" in done.error
    assert not (tmp_path / "out.gguf").exists()
    pytest.importorskip("gguf")
    export_gguf(GGUFPlan(source=house.folder(house.dense), output=tmp_path / "out.gguf"))
    assert (tmp_path / "out.gguf").stat().st_size > 1000


# ---- the dense copy


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plan", [PLAN, GroupPlan(bits=8, group=8)], ids=["ternary", "int8"])
def test_unpacked_it_is_the_dequantised_model(kind, plan):
    model = model_of(kind)
    small, dense = packed(model, plan, GROUPS), dequantised(model, plan, GROUPS)
    assert rounds_activations(small) == (plan is PLAN)
    floats = packed(model, FLOATS, GROUPS) if plan is PLAN else small
    wanted = floats(IDS).logits
    assert not rounds_activations(floats) and not rounds_activations(model)
    again = unpacked(small)
    assert again is small and not is_packed(again) and same(weights(again), weights(dense))
    assert [(n, type(m)) for n, m in again.named_modules()] == [(n, type(m)) for n, m in model.named_modules()]
    assert torch.allclose(again(IDS).logits, wanted, atol=1e-4)
    assert parameter_count(again) == parameter_count(model) and not any(t.is_meta for t in again.state_dict().values())
    assert same(weights(packed(again, plan, GROUPS)), weights(packed(model, plan, GROUPS)))


def test_unpacked_it_trains_and_a_plain_model_stays_as_it_is(house):
    model = read_model(house.bare)[0]
    before = weights(model)
    result = trainer(train_config(steps=2), model=unpacked(model).train())
    result.run()
    assert not same(before, weights(model)) and all(p.requires_grad for p in model.parameters())
    other = model_of("gpt").requires_grad_(False)
    assert unpacked(other) is other and not any(p.requires_grad for p in other.parameters())


@pytest.mark.parametrize("kind", ["gpt", "trm_titans", "llama_tied", "llama_untied", "gpt2"])
def test_an_export_is_the_dense_copy(kind, tmp_path, forge):
    from transformers import AutoModelForCausalLM

    model = model_of(kind)
    write_packed(model, tokenizer_of(model), tmp_path / "small", PLAN, GROUPS)
    before = {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}
    done = forge("export", tmp_path / "small", "--output", "dense", "--json")
    assert done.code == 0, done.err
    receipt = json.loads(done.out)
    assert receipt["dtype"] == "float32" and "small is packed" in receipt["notes"][0]
    assert SECTION not in (tmp_path / "dense" / "config.json").read_text()
    again, wanted = read_model(tmp_path / "dense")[0], dequantised(model, PLAN, GROUPS)
    assert not is_packed(again) and same(weights(again), weights(wanted))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    assert torch.allclose(theirs(IDS).logits, wanted(IDS).logits, atol=1e-5)
    assert "small is packed: written are the numbers" in (tmp_path / "dense" / "README.md").read_text()
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "storage") == ["dense", "small"]
    if kind == "gpt":
        assert forge("export", tmp_path / "dense", "-f", "gguf", "-o", "dense.gguf").code == 0


def test_an_export_of_an_artifact_keeps_its_lineage_and_works_everywhere(house, tmp_path, forge):
    done = forge(*house.storage, "export", house.packed, "-o", "dense", "--dtype", "float16", "--json")
    assert done.code == 0 and json.loads(done.out)["model_id"] == house.packed
    assert 0 < json.loads(done.out)["largest_rounding"] < 1e-3, "codes of embeddings have more digits than float16"
    config = json.loads((tmp_path / "dense" / "config.json").read_text())
    assert config["agent_forge"]["model_id"] == house.packed and config["agent_forge"]["unpacked"] is True
    card = (tmp_path / "dense" / "README.md").read_text()
    assert house.parent in card and '- "bitnet"' in card and '- "packed"' not in card
    assert forge(*house.storage, "chat", "dense", "hello").code == 0
    words = ("merge", house.parent, "dense", "--output", "both", "--method", "linear", "--json")
    assert forge(*house.storage, *words).code == 0
    merged = load_file(tmp_path / "both" / "model.safetensors")
    assert merged.keys() == load_file(tmp_path / "dense" / "model.safetensors").keys()


def test_a_model_with_sub_layer_norms_has_no_dense_copy(tmp_path, forge):
    model, plan = model_of("trm_titans"), PLAN.replace(sub_norm=True)
    statistics = calibrate(model, [torch.arange(48).view(2, 24)])
    small = packed(fake_quantised(model, plan, GROUPS, statistics=statistics), plan, GROUPS)
    (tmp_path / "small").mkdir()
    write_model(small, TOKENIZER, tmp_path / "small")
    assert forge("chat", tmp_path / "small", "hello", "--max-tokens", "3").code == 0
    done = forge("export", tmp_path / "small", "--output", "dense")
    assert done.code == 4 and "small: blocks.0.attn.wo: its sub-layer norm has no place in a plain model" in done.error
    assert not (tmp_path / "dense").exists() and not list(tmp_path.rglob("*.unfinished"))


# ---- damaged files


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> None:
    """Other tensors or another header, with all checksums right: a file that somebody made wrongly."""
    path = folder / "model.safetensors"
    with safe_open(str(path), "pt") as file:
        header = json.loads(file.metadata()[METADATA])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    edit(tensors, header)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header["crc32"] = {n: zlib.crc32(t.reshape(-1).view(torch.uint8).numpy()) for n, t in tensors.items()}
    text = canonical_json(header)
    save_file(tensors, str(path), metadata={METADATA: text})
    configure(folder, "header_crc32", zlib.crc32(text.encode()))


def configure(folder: Path, key: str, value: Any) -> None:
    """Another entry in config.json's section."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config[SECTION][key] = value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def cut(keep: float) -> Callable[[Path], None]:
    """The file up to a share of its bytes; a negative number counts bytes from the end."""

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        path.write_bytes(data[: int(keep * len(data)) if keep >= 0 else int(keep)])

    return edit


def flip(what: str) -> Callable[[Path], None]:
    """One bit of the first byte of a tensor, or of the first spelling of a word."""

    def edit(folder: Path) -> None:
        path = folder / "model.safetensors"
        data = bytearray(path.read_bytes())
        if what.endswith((".codes", ".scale")):
            length = int.from_bytes(data[:8], "little")
            place = 8 + length + json.loads(data[8 : 8 + length])[what]["data_offsets"][0]
        else:
            place = data.index(what.encode())
        data[place] ^= 1
        path.write_bytes(data)

    return edit


def flip_section(key: str) -> Callable[[Path], None]:
    """One bit of the last digit of a number in config.json's section."""

    def edit(folder: Path) -> None:
        path = folder / "config.json"
        data = bytearray(path.read_bytes())
        place = re.search(rf'"{key}": \d+'.encode(), data).end() - 1
        data[place] ^= 1
        path.write_bytes(data)

    return edit


def edit_entry(name: str, **values: Any) -> Callable[[Path], None]:
    """Another entry of a map in the header."""
    return lambda folder: change(folder, lambda tensors, header: header["maps"][name].update(values))


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], None]:
    """Another tensor."""
    return lambda folder: change(folder, lambda tensors, header: tensors.update({name: make(tensors[name])}))


def newer_header(folder: Path) -> None:
    change(folder, lambda tensors, header: header.update(layout=LAYOUT + 1))


def remove_section(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != SECTION}))


def nan(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.clone()
    tensor[0] = torch.nan
    return tensor


MAP, TABLE, WEIGHTS, SETTINGS = "blocks.0.ffn.down", "embedding.table", "model.safetensors", "config.json"
NEWER, RESTORE = "is newer than 1, the newest this version reads; upgrade agent-forge", "restore"
DAMAGE: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "empty": (cut(0), WEIGHTS, "cut short or corrupt"),
    "cut in the header": (cut(0.02), WEIGHTS, "cut short or corrupt"),
    "cut in the middle": (cut(0.6), WEIGHTS, "cut short or corrupt"),
    "the last byte gone": (cut(-1), WEIGHTS, "cut short or corrupt"),
    "no weights": (lambda folder: (folder / WEIGHTS).unlink(), WEIGHTS, "no weights here; use a complete"),
    "a bit of the codes": (flip(f"{MAP}.codes"), WEIGHTS, f"tensor {MAP}.codes is not the one that was written"),
    "a bit of a scale": (flip(f"{TABLE}.scale"), WEIGHTS, f"tensor {TABLE}.scale is not the one that was written"),
    "a bit of the header": (flip("base3"), WEIGHTS, "its header is not the one that config.json was written with"),
    "a bit of the table of tensors": (flip("data_offsets"), WEIGHTS, "cut short or corrupt"),
    "a bit of the layout": (flip_section("layout"), SETTINGS, "layout 0 is none"),
    "another code": (lambda folder: configure(folder, "code", "2bit"), SETTINGS, f"{SECTION}.code is not what"),
    "another method": (lambda folder: configure(folder, "method", "grouped"), SETTINGS, f"{SECTION}.method is"),
    "another plan": (lambda folder: configure(folder, "plan", {}), SETTINGS, f"{SECTION}.plan is not what"),
    "a bit of the checksum": (flip_section("header_crc32"), WEIGHTS, "its header is not the one that config.json"),
    "a wrong group": (edit_entry(TABLE, group=16), WEIGHTS, f"tensor {TABLE}.scale is"),
    "a newer layout": (lambda folder: configure(folder, "layout", LAYOUT + 1), SETTINGS, NEWER),
    "a newer layout in the file": (newer_header, WEIGHTS, NEWER),
    "NaN in a scale": (put(f"{MAP}.scale", nan), WEIGHTS, f"tensor {MAP}.scale holds NaN"),
    "codes too wide": (put(f"{MAP}.codes", lambda t: torch.cat([t, t[:, :1]], 1)), WEIGHTS, f"tensor {MAP}.codes"),
    "codes too narrow": (put(f"{TABLE}.codes", lambda t: t[:, 1:]), WEIGHTS, f"tensor {TABLE}.codes"),
    "codes that are none": (put(f"{MAP}.codes", lambda t: t | 255), WEIGHTS, f"tensor {MAP}.codes a byte is above 242"),
    "nothing says packed": (remove_section, WEIGHTS, "its weights are packed, and config.json does not say so"),
    "plain weights": (
        lambda folder: write_plain_weights(folder), WEIGHTS, "has no forge_packed metadata, but config.json says it is"
    ),
    "no object": (lambda folder: (folder / SETTINGS).write_text("[1]"), SETTINGS, "is no JSON object"),
}  # fmt: skip


def write_plain_weights(folder: Path) -> None:
    save_file(weights(model_of("trm_titans")), folder / WEIGHTS)


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_file_is_told_in_one_line_that_names_it(name, house, tmp_path, forge):
    damage, file, told = DAMAGE[name]
    folder = Path(shutil.copytree(house.bare, tmp_path / "bad"))
    damage(folder)
    with pytest.raises(ArtifactError) as caught:
        read_model(folder)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"{folder / file}: ") and told in line
    assert caught.value.remedy and (NEWER in line or "restore" in line or "artifact folder" in line)
    for words in (("chat", folder, "hello"), ("export", folder, "-o", "out"), ("serve", folder, "--port", "0")):
        done = forge(*words)
        if (name, words[0]) == ("nothing says packed", "export"):  # it looks for missing tensors first
            assert done.code == 4 and "blocks.0.attn.wk.codes is 20x4, config.json says missing" in done.error
            continue
        assert done.code == 4 and done.error == line and done.out == "", words
    assert sorted(p.name for p in tmp_path.iterdir() if p.name != "storage") == ["bad"], "nothing half-written"


@pytest.mark.parametrize("name", ["cut in the middle", "a bit of the codes", "a bit of the checksum"])
def test_damage_of_an_artifact_is_noticed_by_every_command(name, tmp_path, forge):
    house = furnish(tmp_path)
    folder = house.folder(house.packed)
    damage, file, told = DAMAGE[name]
    damage(folder)
    changed = SETTINGS if "checksum" in name else WEIGHTS
    for words in (("model", house.packed), ("model", house.packed, "--load"), ("export", house.packed, "-o", "out"),
                  ("compare", "thinker", house.packed)):  # fmt: skip
        done = forge(*house.storage, *words)
        assert done.code == 4 and done.error.startswith(f"{folder / changed}: file is truncated or changed"), words
    done = forge(*house.storage, "chat", house.packed, "hello")
    assert done.code == 4 and done.error.startswith(f"{folder / file}: ") and told in done.error
    done = forge(*house.storage, "validate", "--json")
    bad = [row for row in json.loads(done.out) if row["result"] != "ok"]
    assert done.code == 4 and [row["model"] for row in bad] == [house.packed] and str(folder / changed) in str(bad)
    assert not (tmp_path / "out").exists() and not list(tmp_path.rglob("*.unfinished"))


# ---- the cost of opening one

OPENED = """
import sys
from pathlib import Path
import torch
import forgekit.data.tokenizer, forgekit.models.gpt, forgekit.quant.files
from forgekit.models.io import read_model

def peak():  # getrusage would tell the largest of this process and of the one that started it
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])

torch.set_num_threads(1)
before = peak()
read_model(sys.argv[1])
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_opening_a_model_of_25_million_parameters_does_not_build_it_in_floats(tmp_path):
    model = made(gpt_config(vocab_size=8192, d_model=512, n_layers=7, n_heads=8, ffn_hidden=2048))
    write_packed(model, TOKENIZER, tmp_path, PLAN, GroupPlan())
    # Freed memory goes back at once: what the C library keeps differs from run to run by as much as the model.
    own, command = environment(MALLOC_MMAP_THRESHOLD_="65536"), [sys.executable, "-c", OPENED, str(tmp_path)]
    done = subprocess.run(command, env=own, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 0.5 * 4 * parameter_count(model), "the floats alone would take twice as much"


def test_values_that_transformers_refuses_are_told(tmp_path):
    write_packed(model_of("llama_tied"), tokenizer_of(model_of("llama_tied")), tmp_path, PLAN, GROUPS)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "hidden_size": 21}))
    with pytest.raises(ArtifactError, match="not a multiple of the number of attention heads") as caught:
        read_model(tmp_path)  # an error of huggingface_hub that is no ValueError
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")


@pytest.mark.parametrize("kind", ["gpt", "trm_titans"])
def test_opening_one_imports_no_compiler(kind, tmp_path):
    write_packed(model_of(kind), TOKENIZER, tmp_path, PLAN, GROUPS)
    code = "import sys, forgekit.models.io as io\nio.read_model(sys.argv[1])\nprint('sympy' in sys.modules)"
    command = [sys.executable, "-c", code, str(tmp_path)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


@pytest.mark.parametrize("kind", ["gpt", "trm_titans"])
def test_a_hollow_model_has_shapes_no_memory_and_needs_no_compiler(kind):
    from forgekit.models.io import hollow_model

    model = model_of(kind)
    hollow = hollow_model(model.config)
    assert all(tensor.is_meta for tensor in hollow.state_dict().values())
    shapes = [{name: (t.shape, t.dtype) for name, t in one.state_dict().items()} for one in (hollow, model)]
    assert shapes[0] == shapes[1]
    code = f"""import sys
from forgekit.models.config import MODEL_CONFIGS
from forgekit.models.io import hollow_model
hollow_model(MODEL_CONFIGS.get({kind!r})())
print("sympy" in sys.modules)"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr


# ---- kernels


def test_kernels_compile_in_two_processes_at_once_without_a_home(house, tmp_path):
    home = tmp_path / "home"
    home.mkdir(mode=0o555)
    extra = {name: str(home) for name in ("HOME", "XDG_CACHE_HOME", "TMPDIR")}
    command = [*CLI, "chat", str(house.bare), "hello", "--max-tokens", "12"]
    at_once = [
        subprocess.Popen(
            command, cwd=tmp_path, env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    done = [(process.communicate(timeout=120), process.returncode) for process in at_once]
    assert [code for _, code in done] == [0, 0], done
    assert {out for (out, _), _ in done} == {f"{said(house.bare, 'hello', max_tokens=12)}\n"}
    assert not list(home.iterdir())


def test_plain_torch_says_the_same(house, tmp_path):
    words = ("chat", house.bare, "hello", "--max-tokens", "12")
    done = run_cli(*words, cwd=tmp_path, AGENT_FORGE_KERNELS="torch")
    assert done.code == 0 and done.out == f"{said(house.bare, 'hello', max_tokens=12)}\n", done.err


@pytest.mark.parametrize(
    ("forced", "told"),
    [("llvn", "unknown kernels 'llvn'; did you mean llvm?"), ("triton", "'triton' cannot be used on cpu")],
)
def test_kernels_that_are_not_there_are_told_before_the_first_client(house, forge, monkeypatch, forced, told):
    monkeypatch.setenv("AGENT_FORGE_KERNELS", forced)
    for words in (("serve", house.bare, "--port", "0"), ("chat", house.bare, "hello")):
        done = forge(*words)
        assert done.code == 2 and told in done.error and done.out == ""
    (row,) = [one for one in json.loads(forge("doctor", "--json").out) if one["check"] == "ternary kernels"]
    assert row["result"] == f"AGENT_FORGE_KERNELS={forced}" and told.split(";")[0] in row["advice"]
    assert forge("doctor").code == 5


def kernels_row(forge: Callable[..., Any]) -> dict[str, str]:
    done = forge("doctor", "--json")
    return next(row for row in json.loads(done.out) if row["check"] == "ternary kernels")


def test_doctor_says_which_kernels_there_are_and_how_to_have_better_ones(forge, monkeypatch):
    from forgekit.infer import kernels

    monkeypatch.delenv("AGENT_FORGE_KERNELS", raising=False)
    if kernels.cpu.available():
        row = kernels_row(forge)
        assert row["result"].startswith("llvm (") and not row["advice"]
    monkeypatch.setattr(kernels.cpu, "available", lambda: False)
    kernels._choose.cache_clear()
    try:
        row = kernels_row(forge)
        assert row["result"] == "plain torch" and row["advice"] == "pip install llvmlite for faster ones"
    finally:
        kernels._choose.cache_clear()
    monkeypatch.undo()
    monkeypatch.setenv("AGENT_FORGE_KERNELS", "torch")
    row = kernels_row(forge)
    assert row["result"] == "plain torch, forced" and row["advice"] == "unset AGENT_FORGE_KERNELS for faster ones"


def test_an_llvm_that_does_not_work_is_told_and_done_without(forge, monkeypatch):
    from forgekit.infer import kernels

    def broken() -> None:
        raise RuntimeError("no such target")

    def forget() -> None:
        kernels._choose.cache_clear()
        kernels.cpu.obstacle.cache_clear()

    monkeypatch.delenv("AGENT_FORGE_KERNELS", raising=False)
    monkeypatch.setattr(kernels.cpu.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(kernels.cpu, "ternary", broken)
    forget()
    try:
        row = kernels_row(forge)
        assert row["result"] == "plain torch: LLVM does not work here (no such target)"
        assert row["advice"].startswith("pip install --force-reinstall llvmlite for faster ones")
        assert kernels.backend() == "torch"
        monkeypatch.setenv("AGENT_FORGE_KERNELS", "llvm")
        assert "'llvm' cannot be used on cpu (no such target)" in kernels_row(forge)["advice"]
    finally:
        monkeypatch.undo()
        forget()


def test_the_newest_model_talks_from_its_packed_file(tmp_path):
    storage, model = ModelStorage(tmp_path), model_of("gpt")
    session = storage.registry.create_session({})
    save = (session, "bitnet")
    small = storage.save_model(packed(model, PLAN, GROUPS), *save, "ternary", {}, tokenizer=TOKENIZER)
    dense = storage.save_model(model, *save, "ternary_dense", {"packed_model": small}, tokenizer=TOKENIZER)
    assert storage.resolve("latest") == storage.resolve(dense), "what trains and exports takes the floats"
    assert to_talk_to(storage) == storage.resolve(small)
    assert to_talk_to(storage, dense) == storage.resolve(dense), "who is named is meant"
    shutil.rmtree(storage.resolve(small))
    assert to_talk_to(storage) == storage.resolve(dense)
    stranger = storage.save_model(model, *save, "other", {"packed_model": "of_another_storage"}, tokenizer=TOKENIZER)
    assert to_talk_to(storage) == storage.resolve(stranger)
