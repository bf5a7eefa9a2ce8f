"""Packed artifacts: what was written is what is read, and whatever is wrong with a file is told in one line."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from test_quant_model import GROUPS, PLAN, THEIRS, TOKENIZER, Normed, ids_of, model_of, scores
from tiny import same, weights
from torch import nn

from forgekit.config import canonical_json
from forgekit.errors import ArtifactError
from forgekit.hub import HFTokenizer
from forgekit.infer.engine import Engine
from forgekit.infer.sampling import SamplingConfig
from forgekit.models.config import GPTConfig
from forgekit.models.io import build_model, read_model, write_model
from forgekit.quant.config import GroupPlan, TernaryPlan
from forgekit.quant.files import LAYOUT, read_packed, write_packed
from forgekit.quant.model import calibrate, fake_quantised, packed

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ("gpt_factorised", "trm_titans", "trm_decay", *THEIRS)


def tokenizer_of(model: nn.Module) -> Any:
    if not hasattr(model, "hf"):
        return TOKENIZER
    from transformers import PreTrainedTokenizerFast

    return HFTokenizer(PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token="<|end|>", pad_token="<|pad|>"))


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor], dict[str, Any]], Any]) -> Path:
    """The same artifact with other tensors or another header, all its checksums right."""
    path = folder / "model.safetensors"
    with safe_open(str(path), "pt") as file:
        header = json.loads(file.metadata()["forge_packed"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    edit(tensors, header)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    raw = {name: tensor.reshape(-1).view(torch.uint8).numpy() for name, tensor in tensors.items()}
    header["crc32"] = {name: zlib.crc32(data) for name, data in raw.items()}
    text = canonical_json(header)
    save_file(tensors, str(path), metadata={"forge_packed": text})
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config["forge_quantization"]["header_crc32"] = zlib.crc32(text.encode())
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def configure(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """The same artifact with another config.json."""
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    edit(values)
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    return folder


def refusal(folder: Path) -> str:
    """What reading says: one line that names a file."""
    with pytest.raises(ArtifactError) as caught:
        read_model(folder)
    line = str(caught.value)
    assert "\n" not in line and (".safetensors" in line or ".json" in line)
    assert caught.value.remedy
    return line.removeprefix(str(folder) + "/")


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    write_packed(model_of("trm_titans"), TOKENIZER, folder, PLAN, GROUPS)
    return folder


@pytest.fixture()
def artifact(written, tmp_path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "copy"))


# ---- what was written is what is read


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("code", ["base3", "2bit"])
@pytest.mark.parametrize("groups", [GroupPlan(bits=5, group=8), None], ids=["grouped", "half"])
def test_tensors_and_tokens_come_back_the_same(kind, code, groups, tmp_path):
    model = model_of(kind, exact=False)
    plan = TernaryPlan(per="tensor" if code == "2bit" else "channel")
    small = packed(model, plan, groups)
    tokenizer = tokenizer_of(model)
    found = write_packed(model, tokenizer, tmp_path, plan, groups, code)
    again, their_tokenizer = read_model(tmp_path)
    assert same(weights(again), weights(small)) and not again.training
    dtypes = [{name: t.dtype for name, t in one.state_dict().items()} for one in (again, small)]
    assert dtypes[0] == dtypes[1]
    assert [(n, type(m)) for n, m in again.named_modules()] == [(n, type(m)) for n, m in small.named_modules()]
    assert torch.equal(scores(again), scores(small))
    assert not any(t.is_meta for t in (*again.parameters(), *again.buffers()))
    said = [
        Engine(*pair).generate(["hello", "some text"], SamplingConfig(max_tokens=8))
        for pair in ((small, tokenizer), (again, their_tokenizer))
    ]
    assert [s.tokens for s in said[0]] == [s.tokens for s in said[1]]
    size = (tmp_path / "model.safetensors").stat().st_size
    assert found["total"] == size == sum(found[part] for part in ("ternary", "grouped", "rest", "header"))
    assert bool(found["grouped"]) == bool(groups)


def test_every_form_of_the_model_writes_the_same_bytes(tmp_path):
    model = model_of("trm_titans", exact=False)
    small = packed(model, PLAN, GROUPS)
    folders = [tmp_path / name for name in ("plain", "packed", "written", "read", "training")]
    write_packed(model, TOKENIZER, folders[0], PLAN, GROUPS)
    write_packed(small, TOKENIZER, folders[1])
    folders[2].mkdir()
    write_model(small, TOKENIZER, folders[2])
    write_packed(*read_packed(folders[0]), folders[3])
    write_packed(fake_quantised(model, PLAN, GROUPS), TOKENIZER, folders[4], PLAN, GROUPS)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert len({(folder / name).read_bytes() for folder in folders}) == 1, name
    assert not [p for folder in folders for p in folder.iterdir() if "unfinished" in p.name]


def test_base_3_is_smaller_than_2_bits_and_both_mean_the_same(tmp_path):
    model = build_model(GPTConfig(vocab_size=24, d_model=64, n_layers=2, ffn_hidden=160))
    found = {code: write_packed(model, None, tmp_path / code, PLAN, GROUPS, code) for code in ("base3", "2bit")}
    assert found["base3"]["ternary"] < 0.85 * found["2bit"]["ternary"]
    for code in found:
        shutil.copy(_tokenizer_file(tmp_path), tmp_path / code / "tokenizer.json")
    assert same(*(weights(read_packed(tmp_path / code)[0]) for code in found))


def _tokenizer_file(folder: Path) -> Path:
    path = folder / "tokenizer.json"
    TOKENIZER.save(str(path))
    return path


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_transformers_does_not_open_a_packed_folder_with_random_weights(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    model = model_of(kind)
    write_packed(model, tokenizer_of(model), tmp_path, PLAN, GROUPS)
    with pytest.raises((OSError, ValueError), match="packed by agent-forge: open with `agent-forge chat`"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    again, _ = read_model(tmp_path)
    assert not hasattr(again.hf.config, "forge_quantization") and not hasattr(again.hf.config, "transformers_weights")
    assert again.end_ids == model.end_ids


def test_a_tensor_without_the_range_of_float16_stays_float32(tmp_path):
    model = model_of("gpt", exact=False)
    with torch.no_grad():
        model.blocks[0].norm1.weight.fill_(1e5)
        model.blocks[0].norm2.weight.fill_(1e-7)
    small = packed(model, PLAN, GROUPS)
    write_packed(small, TOKENIZER, tmp_path)
    again = read_packed(tmp_path)[0]
    for norm in ("norm1", "norm2"):
        assert torch.equal(getattr(again.blocks[0], norm).weight, getattr(model.blocks[0], norm).weight)


def test_sub_layer_norms_come_back(tmp_path):
    model = model_of("trm_titans", exact=False)
    trained = fake_quantised(model, Normed(), GROUPS, statistics=calibrate(model, [ids_of()]))
    small = packed(trained, Normed(), GROUPS)
    write_packed(small, TOKENIZER, tmp_path)
    again = read_packed(tmp_path)[0]
    assert sum(name.endswith(".gain") for name in weights(again)) == 6
    assert same(weights(again), weights(small)) and torch.equal(scores(again), scores(small))


# ---- what is wrong


@pytest.mark.parametrize("keep", [0, 4, 100, -4000, -1])
def test_a_file_cut_short_is_refused(artifact, keep):
    path = artifact / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    line = refusal(artifact)
    assert line.startswith("model.safetensors: cut short or corrupt (") and line.endswith("; restore the artifact")


@settings(max_examples=60, deadline=None)
@given(place=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_refused(written, tmp_path_factory, place, bit):
    folder = Path(shutil.copytree(written, tmp_path_factory.mktemp("flip") / "copy"))
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1 << bit
    path.write_bytes(data)
    assert refusal(folder).startswith("model.safetensors: ")


def test_a_flipped_bit_in_a_tensor_names_the_tensor(artifact):
    path = artifact / "model.safetensors"
    data = bytearray(path.read_bytes())
    with safe_open(str(path), "pt") as file:
        codes = file.get_tensor("blocks.1.attn.wv.codes").numpy().tobytes()
    data[data.index(codes) + 7] ^= 4
    path.write_bytes(data)
    what = "model.safetensors: tensor blocks.1.attn.wv.codes is not the one that was written (its CRC-32"
    assert refusal(artifact).startswith(what)


def test_a_wrong_group_size_is_refused(artifact):
    change(artifact, lambda _, header: header["maps"]["embedding.table"].update(group=3))
    what = "tensor embedding.table.scale is 300x3, but 300 rows of 20 columns in groups of 3 need 300x7 in float16"
    assert refusal(artifact).startswith(f"model.safetensors: {what}; restore")


def test_a_newer_layout_is_refused_wherever_it_is_told(artifact):
    newer = f"packed layout {LAYOUT + 1} is newer than {LAYOUT}, the newest this version reads; upgrade agent-forge"

    def in_header(_, header):
        header |= {"layout": LAYOUT + 1, "something": "unheard of"}

    change(artifact, in_header)
    assert refusal(artifact) == f"model.safetensors: {newer}"
    configure(artifact, lambda values: values["forge_quantization"].update(layout=LAYOUT + 1))
    assert refusal(artifact) == f"config.json: {newer}"
    configure(artifact, lambda values: values["forge_quantization"].update(layout="x"))
    assert refusal(artifact).startswith("config.json: layout 'x' is none")
    configure(artifact, lambda values: values.update(forge_quantization=3))
    assert refusal(artifact).startswith("config.json: holds no packed model")


def test_widths_that_do_not_fit_are_refused(artifact):
    configure(artifact, lambda values: values["forge"].update(ffn_hidden=41))
    what = "model.safetensors: tensor blocks.0.ffn.down is 20x37, but config.json makes it 20x41; restore"
    assert refusal(artifact).startswith(what)
    configure(artifact, lambda values: values["forge"].update(ffn_hidden=37, n_layers=3))
    assert "tensor blocks.2." in refusal(artifact)


EDITS: dict[str, tuple[Callable[[dict[str, torch.Tensor], dict[str, Any]], Any], str]] = {
    "too narrow codes": (
        lambda t, _: t.update({"blocks.0.ffn.up.codes": t["blocks.0.ffn.up.codes"][:, :-1]}),
        "tensor blocks.0.ffn.up.codes 3 bytes a row do not hold 20 columns",
    ),
    "missing rows": (
        lambda t, _: t.update({"blocks.0.ffn.up.codes": t["blocks.0.ffn.up.codes"][:-1]}),
        "tensor blocks.0.ffn.up.codes is 36x4, the scales have 37 rows",
    ),
    "a byte no base-3 number has": (
        lambda t, _: t["blocks.0.ffn.up.codes"][3].fill_(243),
        "tensor blocks.0.ffn.up.codes a byte is above 242",
    ),
    "NaN scale": (
        lambda t, _: t["blocks.0.ffn.up.scale"][3].fill_(torch.nan),
        "tensor blocks.0.ffn.up.scale holds NaN, infinite or negative scales",
    ),
    "infinite group scale": (
        lambda t, _: t["embedding.table.scale"][3].fill_(torch.inf),
        "tensor embedding.table.scale holds NaN, infinite or negative scales",
    ),
    "negative scale": (
        lambda t, _: t["blocks.0.ffn.up.scale"].neg_(),
        "tensor blocks.0.ffn.up.scale holds NaN, infinite or negative scales",
    ),
    "scale of another type": (
        lambda t, _: t.update({"blocks.0.ffn.up.scale": t["blocks.0.ffn.up.scale"].float()}),
        "tensor blocks.0.ffn.up.scale is 37, but 37 rows of 20 columns need 37 in float16",
    ),
    "too few scales": (
        lambda t, _: t.update({"blocks.0.ffn.up.scale": t["blocks.0.ffn.up.scale"][:1]}),
        "tensor blocks.0.ffn.up.scale is 1, but 37 rows",
    ),
    "NaN norm": (lambda t, _: t["norm.weight"].fill_(torch.nan), "tensor norm.weight holds NaN or infinite values"),
    "misshapen norm": (
        lambda t, _: t.update({"norm.weight": torch.ones(3)}),
        "tensor norm.weight is 3, but config.json makes it 20",
    ),
    "missing codes": (lambda t, _: t.pop("blocks.0.ffn.up.codes"), "tensor blocks.0.ffn.up.codes is missing"),
    "missing norm": (lambda t, _: t.pop("norm.weight"), "tensor norm.weight is missing"),
    "surplus tensor": (lambda t, _: t.update(more=torch.ones(1)), "tensor more has no place in the model"),
    "surplus map": (
        lambda _, h: h["maps"].update({"blocks.9.ffn.up": h["maps"]["blocks.0.ffn.up"]}),
        "tensor blocks.9.ffn.up is a ternary map here, but config.json has none of that name",
    ),
    "map forgotten": (
        lambda _, h: h["maps"].pop("blocks.0.ffn.up"),
        "tensor blocks.0.ffn.up.codes has no place in the model",
    ),
    "norm as map": (
        lambda _, h: h["maps"].update(norm=h["maps"]["blocks.0.ffn.up"]),
        "tensor norm is a ternary map here, but config.json has none of that name",
    ),
    "tied to nothing": (
        lambda _, h: h["maps"].update({"recursion.halt": {"kind": "tied", "shape": [1, 20], "to": "norm"}}),
        "tensor recursion.halt is tied to 'norm', which is no packed embedding",
    ),
    "unheard-of key": (lambda _, h: h.update(extra=1), "extra: unknown key"),
    "no group": (lambda _, h: h["maps"]["embedding.table"].pop("group"), "kind embedding needs bits and group"),
}


@pytest.mark.parametrize("edit", EDITS)
def test_each_misfit_is_named(artifact, edit):
    act, what = EDITS[edit]
    change(artifact, act)
    assert what in refusal(artifact)


def test_parts_that_do_not_belong_together_are_refused(artifact, tmp_path):
    other = tmp_path / "other"
    write_packed(model_of("trm_titans", seed=1), TOKENIZER, other, PLAN, GROUPS)
    shutil.copy(other / "model.safetensors", artifact / "model.safetensors")
    assert "its header is not the one that config.json was written with" in refusal(artifact)
    plain = tmp_path / "plain"
    plain.mkdir()
    write_model(model_of("trm_titans"), TOKENIZER, plain)
    shutil.copy(plain / "model.safetensors", artifact / "model.safetensors")
    assert "has no forge_packed metadata, but config.json says it is packed" in refusal(artifact)
    (artifact / "model.safetensors").unlink()
    assert "no weights here" in refusal(artifact)
    with pytest.raises(ArtifactError, match="holds no packed model; open it with read_model"):
        read_packed(plain)


def test_an_architecture_that_transformers_does_not_know_is_refused(tmp_path):
    model = model_of("llama")
    write_packed(model, tokenizer_of(model), tmp_path, PLAN, GROUPS)
    configure(tmp_path, lambda values: values.update(model_type="no_such_thing"))
    assert "no causal language model that transformers can build" in refusal(tmp_path)


def test_the_plain_model_still_scores_after_being_written(tmp_path):
    model = model_of("gpt")
    before = scores(model, ids_of())
    write_packed(model, TOKENIZER, tmp_path, PLAN, GROUPS)
    assert torch.equal(scores(model, ids_of()), before)
