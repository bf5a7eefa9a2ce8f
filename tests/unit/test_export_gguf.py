"""GGUF exports: the file says the same as the model, in llama.cpp and in llama.cpp's formulas written out here."""

from __future__ import annotations

import builtins
import json
import math
import os
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from agent_forge.export.gguf import GGUFPlan, export_gguf, pre_tokenizer, stored_type
from agent_forge.export.gguf_layout import (
    Entry,
    check_settings,
    interleaved,
    neighbours,
    padded_rows,
    query_norm,
    shares,
    steady,
)
from forgekit.data.tokenizer import CHAT_TEMPLATE, END, PAD, RESERVED, question, train_tokenizer
from forgekit.errors import ArtifactError, ConfigError, ResourceError
from forgekit.models.io import read_config, read_model, write_model
from forgekit.models.layers import rope
from tests.unit.tiny import gpt_config, made, trm_config

gguf = pytest.importorskip("gguf", reason="pip install gguf")

TEXTS = [
    "hello world, some text with digits 123 and äöü.\n\n  x = 7 * 60\t# it's 42, isn't it?  ",
    "日本 12½ ٣ ok\r\n",
] * 5
TOKENIZER = train_tokenizer(TEXTS, 330)
V = TOKENIZER.get_vocab_size()
IDS = TOKENIZER.encode("hello 123 some text, it's äöü and 42").ids
GAINS = {"none": None, "one": (-6.0, -6.0, -6.0, -6.0), "opposite": (5.0, -5.0, 5.0, 5.0)}
GAINS |= {"all different": (8.0, -3.0, 0.0, 5.5)}


def model_of(gains="all different", **changes):
    """A small ``gpt`` whose every weight speaks, with the temperatures asked for in its second block."""
    values = {"vocab_size": V, "d_model": 64, "n_heads": 4, "ffn_hidden": 96, "qk_norm": GAINS[gains] is not None}
    model = made(gpt_config(**{**values, **changes}), seed=3, stir=0.05)
    if GAINS[gains]:
        with torch.no_grad():
            model.blocks[0].attn.gain_H.fill_(7.0)
            model.blocks[1].attn.gain_H.copy_(torch.tensor(GAINS[gains]))
    return model.eval()


def folder_of(model, path, tokenizer=TOKENIZER):
    path.mkdir()
    write_model(model, tokenizer, path)
    return path


def exported(model, path, **options):
    """The file's path and what the export says about it."""
    target = path / "out" / "m.gguf"
    receipt = export_gguf(
        GGUFPlan(source=folder_of(model, path / "source"), output=target, **{"dtype": "float32", **options})
    )
    return target, receipt


class Reference:
    """What llama.cpp computes from a file, after its graphs of ``arcee``, ``apertus`` and ``llama``."""

    def __init__(self, path):
        reader = gguf.GGUFReader(path)
        self.fields = {name: part.contents() for name, part in reader.fields.items()}
        self.arch = self.fields["general.architecture"]
        self.types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
        self.tensors = {
            t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type).copy()).double() for t in reader.tensors
        }

    def number(self, name):
        return self.fields[f"{self.arch}.{name}"]

    def norm(self, x, name):
        mean = x.square().mean(-1, keepdim=True)
        return x / (mean + self.number("attention.layer_norm_rms_epsilon")).sqrt() * self.tensors[f"{name}.weight"]

    def rotated(self, x_THK):
        """Neighbouring pairs for llama and arcee (NORM), halves for apertus (NEOX)."""
        T, _, K = x_THK.shape
        assert K == self.number("rope.dimension_count") and self.number("rope.scaling.type") == "none"
        angle = torch.arange(T).double()[:, None] * self.number("rope.freq_base") ** (-torch.arange(0, K, 2) / K)
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        near = self.arch != "apertus"
        a, b = (x_THK[..., ::2], x_THK[..., 1::2]) if near else x_THK.chunk(2, -1)
        pair = (a * cos - b * sin, a * sin + b * cos)
        return torch.stack(pair, -1).flatten(-2) if near else torch.cat(pair, -1)

    def xielu(self, x):
        """``ggml_xielu`` with its softplus, which is the identity above 20."""

        def softplus(v):
            return v if v > 20 else math.log(1 + math.exp(v))

        beta = self.fields["xielu.beta"]
        negative, positive = beta + softplus(self.fields["xielu.alpha_n"]), softplus(self.fields["xielu.alpha_p"])
        below = (torch.expm1(x.clamp(max=self.fields["xielu.eps"])) - x) * negative + beta * x
        return torch.where(x > 0, positive * x * x + beta * x, below)

    def forward(self, x, name):
        up = x @ self.tensors[f"{name}.ffn_up.weight"].T
        if self.arch == "llama":
            up = F.silu(x @ self.tensors[f"{name}.ffn_gate.weight"].T) * up
        else:
            up = up.relu().square() if self.arch == "arcee" else self.xielu(up)
        return up @ self.tensors[f"{name}.ffn_down.weight"].T

    def attention(self, x, name):
        T, heads, K = len(x), self.number("attention.head_count"), self.number("attention.key_length")
        assert K == self.number("attention.value_length")
        q, k, v = (x @ self.tensors[f"{name}.attn_{part}.weight"].T for part in "qkv")
        q, k, v = (part.view(T, -1, K) for part in (q, k, v))
        if f"{name}.attn_q_norm.weight" in self.tensors:
            q, k = self.norm(q, f"{name}.attn_q_norm"), self.norm(k, f"{name}.attn_k_norm")
        k, v = (part.repeat_interleave(heads // part.shape[1], 1) for part in (self.rotated(k), v))
        scores = torch.einsum("qhk,phk->hqp", self.rotated(q), k) / math.sqrt(K)
        seen = torch.ones(T, T).tril().bool()
        out = torch.einsum("hqp,phk->qhk", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)
        return out.reshape(T, -1) @ self.tensors[f"{name}.attn_output.weight"].T

    def logits(self, ids):
        x = self.tensors["token_embd.weight"][torch.tensor(ids)]
        for i in range(self.number("block_count")):
            x = x + self.attention(self.norm(x, f"blk.{i}.attn_norm"), f"blk.{i}")
            x = x + self.forward(self.norm(x, f"blk.{i}.ffn_norm"), f"blk.{i}")
        head = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return self.norm(x, "output_norm") @ head.T


def ours(model, ids):
    """The model's own logits, in double precision."""
    with torch.no_grad():
        return model.double()(torch.tensor([ids])).logits[0].double()


@pytest.mark.parametrize("gains", GAINS)
@pytest.mark.parametrize(
    "changes", [{}, {"emb_rank": 8, "window": 64, "rope_base": 500.0}], ids=["plain", "factorised"]
)
def test_the_target_architecture_computes_what_the_model_computes(gains, changes, tmp_path):
    model = model_of(gains, **changes)
    path, receipt = exported(model, tmp_path)
    reference = Reference(path)
    assert reference.arch == ("arcee" if gains == "none" else "apertus") == receipt["architecture"]
    assert reference.number("attention.key_length") == (32 if gains == "all different" else 16)
    assert bool(receipt["notes"]) == (gains == "all different")
    expected = ours(model, IDS)
    assert (reference.logits(IDS) - expected).abs().max() < 2e-5 * expected.abs().max()
    assert set(reference.types.values()) == {"F32"} and receipt["largest_rounding"] == 0
    assert "output.weight" in reference.tensors or (gains == "none" and not changes)


def test_a_window_is_refused_unless_it_covers_the_context(tmp_path):
    model = model_of(window=63)
    with pytest.raises(ConfigError, match="window 63 is below max_seq_len 64"):
        exported(model, tmp_path)


def llama(path, **changes):
    """A tiny Llama-type checkpoint of transformers with our tokenizer's files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    values = {"vocab_size": V + 6, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    values |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "head_dim": 16}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    path.mkdir()
    model.save_pretrained(path)
    write_tokenizer(path)
    return path


def write_tokenizer(path):
    from forgekit.data.tokenizer import save_tokenizer

    save_tokenizer(TOKENIZER, path)


@pytest.mark.parametrize("tied", [True, False])
def test_hugging_face_llama_keeps_its_function(tied, tmp_path):
    source = llama(tmp_path / "llama", tie_word_embeddings=tied)
    if tied:  # as older files say it
        config = json.loads((source / "config.json").read_text())
        theta = config.pop("rope_parameters")["rope_theta"]
        (source / "config.json").write_text(json.dumps({**config, "rope_theta": theta / 4, "rope_scaling": None}))
    receipt = export_gguf(GGUFPlan(source=source, output=tmp_path / "m.gguf"))
    reference = Reference(tmp_path / "m.gguf")
    assert reference.arch == "llama" == receipt["architecture"] and ("output.weight" in reference.tensors) != tied
    expected = ours(read_model(source)[0], IDS)
    assert (reference.logits(IDS) - expected).abs().max() < 2e-5 * expected.abs().max()
    assert reference.fields["tokenizer.ggml.tokens"][-1] == f"[PAD{V + 5}]"
    assert reference.fields["tokenizer.ggml.token_type"][-6:] == [5] * 6
    assert reference.fields["tokenizer.chat_template"] == CHAT_TEMPLATE


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}}, 'rope_type "llama3"'),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_type "linear"'),
        ({"attention_bias": True}, "attention_bias true"),
        ({"mlp_bias": True}, "mlp_bias true"),
        ({"hidden_act": "gelu"}, 'hidden_act "gelu"'),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"model_type": "qwen3"}, "model type 'qwen3'"),
        ({"model_type": "trm_titans"}, "model type 'trm_titans'"),
        ({"forge_quantization": {"layout": 1}}, "packed"),
    ],
)
def test_settings_without_an_exact_place_are_refused_by_name(changes, told, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(told)) as caught:
        check_settings({"model_type": "llama", **changes}, tmp_path)
    assert "\n" not in str(caught.value) and "config.json" in str(caught.value)


def test_other_families_are_refused_and_nothing_is_written(tmp_path):
    source = folder_of(made(trm_config(vocab_size=V)), tmp_path / "source")
    with pytest.raises(ConfigError, match="'trm_titans' has no exact place"):
        export_gguf(GGUFPlan(source=source, output=tmp_path / "out" / "m.gguf"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_weights_that_do_not_fit_the_configuration_are_refused(name, tmp_path):
    from safetensors.torch import load_file, save_file

    source = llama(tmp_path / "llama")
    tensors = load_file(source / "model.safetensors")
    tensors.pop(name)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=f"tensor {re.escape(name)} is missing"):
        export_gguf(GGUFPlan(source=source, output=tmp_path / "m.gguf"))


# Rearrangements -------------------------------------------------------------------------------------------------------

HEADS = st.integers(1, 4)
HALF = st.integers(1, 6)
GAIN = st.one_of(st.just(0.0), st.floats(-20, 20, allow_subnormal=False))


@settings(deadline=None, max_examples=60)
@given(st.data(), HEADS, HALF, st.integers(0, 99))
def test_heads_of_twice_the_width_give_the_same_products(data, heads, half, seed):
    """Every temperature, also negative ones and zero: our products of rotated unit vectors, and theirs after RMS."""
    torch.manual_seed(seed)
    K, C, T = 2 * half, 8, 5
    gain_H = torch.tensor(data.draw(st.lists(GAIN, min_size=heads, max_size=heads)))
    x, wq, wk = torch.randn(T, C), torch.randn(heads * K, C), torch.randn(heads * K, C)
    pos = torch.arange(T)[None]

    def turned(v):
        return rope(v.view(T, heads, -1).transpose(0, 1)[None].double(), pos, 100.0)[0]

    q, k = (F.normalize((x @ w.T).view(T, heads, K), dim=-1) for w in (wq, wk))
    expected = turned(q * gain_H[:, None]) @ turned(k).mT
    own_H, copy_H = shares(gain_H)
    weights = (query_norm(gain_H, 2 * K), torch.ones(2 * K))
    wide = (interleaved(wq, own_H, copy_H), interleaved(wk, torch.ones(heads), torch.zeros(heads)))
    q, k = (F.rms_norm((x @ w.T).view(T, heads, 2 * K), (2 * K,), g, eps=0) for w, g in zip(wide, weights))
    found = turned(q) @ turned(k).mT / math.sqrt(2 * K)
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(gain_H.abs().max()))


@settings(deadline=None, max_examples=40)
@given(HEADS, HALF, st.integers(0, 99))
def test_neighbouring_pairs_turn_as_halves_do(heads, half, seed):
    torch.manual_seed(seed)
    T, C = 4, 3
    x, w = torch.randn(T, C).double(), torch.randn(2 * half * heads, C).double()
    expected = rope((x @ w.T).view(T, heads, -1).transpose(0, 1)[None], torch.arange(T)[None], 50.0)[0]
    near = (x @ neighbours(w, heads).T).view(T, heads, -1).transpose(0, 1)
    angle = torch.arange(T)[:, None] * 50.0 ** (-torch.arange(half) / half)
    a, b = near[..., ::2], near[..., 1::2]
    turned = torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], -1)
    assert torch.allclose(turned, expected, atol=1e-5)


def test_queries_are_brought_to_a_length_that_no_epsilon_reaches():
    weight, gain = torch.randn(8, 16) * 1e-4, torch.rand(16)
    scaled = steady(weight, gain)
    ratio = scaled / weight
    assert bool((ratio == ratio[0, 0]).all()) and math.log2(float(ratio[0, 0])).is_integer()
    assert 45 < float((scaled * gain).square().sum(1).mean().sqrt()) < 91
    assert torch.equal(steady(torch.zeros(2, 3), torch.ones(3)), torch.zeros(2, 3))


def test_padding_keeps_heads_apart():
    padded = padded_rows(torch.arange(1.0, 9.0).view(4, 2), 2, 3)
    assert padded[:, 0].tolist() == [1, 3, 0, 5, 7, 0]


# Types ----------------------------------------------------------------------------------------------------------------


def ternary_(model):
    """Put every linear map of the blocks onto {-s, 0, s} per row, the scale a number of 16 bits."""
    with torch.no_grad():
        for block in model.blocks:
            for part in (block.attn.wq, block.attn.wk, block.attn.wv, block.attn.wo, block.ffn.up, block.ffn.down):
                scale = part.weight.abs().mean(1, keepdim=True).half().float()
                part.weight.copy_((part.weight / scale).round().clamp(-1, 1) * scale)
    return model


@pytest.mark.parametrize(
    ("dtype", "kinds", "worst"),
    [("float16", {"F32", "F16"}, 2e-3), ("q8_0", {"F32", "Q8_0"}, 3e-2), ("tq2_0", {"F32", "F16", "TQ2_0"}, 2e-3)],
)
def test_smaller_types_stay_near_and_say_what_they_round(dtype, kinds, worst, tmp_path):
    sizes = {"d_model": 256, "ffn_hidden": 256, "n_heads": 4, "n_layers": 1}
    model = ternary_(made(gpt_config(vocab_size=V, **sizes), seed=1, stir=0.02)).eval()
    path, receipt = exported(model, tmp_path, dtype=dtype)
    reference = Reference(path)
    assert set(reference.types.values()) == kinds == set(receipt["types"])
    assert all(reference.types[name] == "F32" for name in reference.types if "norm" in name)
    expected = ours(model, IDS)
    assert (reference.logits(IDS) - expected).abs().max() < worst * expected.abs().max()
    assert 0 < receipt["largest_rounding"] < 0.05 and receipt["bytes"] == path.stat().st_size


def test_ternary_weights_pack_without_loss(tmp_path):
    sizes = {"d_model": 256, "ffn_hidden": 512, "n_heads": 4, "n_layers": 1, "qk_norm": False}
    model = ternary_(made(gpt_config(vocab_size=V, **sizes), seed=1, stir=0.02)).eval()
    path, receipt = exported(model, tmp_path, dtype="tq2_0")
    reference = Reference(path)
    assert receipt["types"] == {"F16": 1, "F32": 3, "TQ2_0": 6}
    assert torch.equal(reference.tensors["blk.0.ffn_up.weight"], model.blocks[0].ffn.up.weight)
    assert torch.equal(reference.tensors["blk.0.attn_output.weight"], model.blocks[0].attn.wo.weight)


def test_weights_that_are_not_ternary_are_not_made_so(tmp_path):
    model = made(gpt_config(vocab_size=V, d_model=256, ffn_hidden=256, n_layers=1), stir=0.1).eval()
    with pytest.raises(ConfigError, match="blk.0.attn_q.weight is not ternary"):
        exported(model, tmp_path, dtype="tq2_0")
    assert list((tmp_path / "out").iterdir()) == []


def test_rows_that_do_not_divide_keep_16_bits_or_are_refused():
    entry = Entry("blk.0.ffn_up.weight", (4, 48), lambda: torch.zeros(4, 48))
    assert stored_type(entry, "q8_0") == "F16"
    with pytest.raises(ConfigError, match="have 48 values, tq2_0 packs 256"):
        stored_type(entry, "tq2_0")


@pytest.mark.parametrize(("value", "kind"), [(math.nan, ArtifactError), (1e6, ConfigError)])
def test_values_that_cannot_be_stored_are_refused(value, kind, tmp_path):
    model = model_of()
    with torch.no_grad():
        model.blocks[1].ffn.down.weight[0, 0] = value
    with pytest.raises(kind, match="blk.1.ffn_down.weight"):
        exported(model, tmp_path, dtype="float16")
    assert list((tmp_path / "out").iterdir()) == []


def test_stored_halves_stay_halves(tmp_path):
    path, receipt = exported(model_of("none").half(), tmp_path, dtype=None)
    assert receipt["dtype"] == "float16" and receipt["largest_rounding"] == 0
    assert Reference(path).fields["general.file_type"] == 1


# Tokenizer ------------------------------------------------------------------------------------------------------------


def test_the_file_carries_the_tokenizer(tmp_path):
    path, _ = exported(model_of(vocab_size=V + 3), tmp_path)
    fields = Reference(path).fields
    tokens = fields["tokenizer.ggml.tokens"]
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "smollm")
    assert [TOKENIZER.token_to_id(token) for token in tokens[:V]] == list(range(V))
    assert tokens[V:] == [f"[PAD{V + i}]" for i in range(3)]
    types = fields["tokenizer.ggml.token_type"]
    assert [types[TOKENIZER.token_to_id(token)] for token in RESERVED] == [3] * len(RESERVED)
    assert types.count(1) == V - len(RESERVED) and types[V:] == [5] * 3
    merges = json.loads(TOKENIZER.to_str())["model"]["merges"]
    assert fields["tokenizer.ggml.merges"] == [" ".join(pair) for pair in merges]
    ids = {name: fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")}
    end, pad = TOKENIZER.token_to_id(END), TOKENIZER.token_to_id(PAD)
    assert ids == {"bos": end, "eos": end, "padding": pad}
    assert not fields["tokenizer.ggml.add_bos_token"] and not fields["tokenizer.ggml.add_eos_token"]
    assert fields["tokenizer.chat_template"] == CHAT_TEMPLATE


def framed(path, first):
    """A checkpoint whose tokenizer puts ``first`` before every text."""
    source = llama(path)
    spec = json.loads(TOKENIZER.to_str())
    pieces = [{"SpecialToken": {"id": first, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    tokens = {first: {"id": first, "ids": [TOKENIZER.token_to_id(first)], "tokens": [first]}}
    spec["post_processor"] = {"type": "TemplateProcessing", "single": pieces, "pair": pieces, "special_tokens": tokens}
    (source / "tokenizer.json").write_text(json.dumps(spec))
    config = json.loads((source / "tokenizer_config.json").read_text())
    (source / "tokenizer_config.json").write_text(json.dumps({**config, "bos_token": "<|spare_1|>"}))
    return source


def test_a_first_token_that_the_tokenizer_adds_is_passed_on(tmp_path):
    export_gguf(GGUFPlan(source=framed(tmp_path / "llama", "<|spare_1|>"), output=tmp_path / "m.gguf"))
    fields = Reference(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"] and not fields["tokenizer.ggml.add_eos_token"]
    assert fields["tokenizer.ggml.bos_token_id"] == TOKENIZER.token_to_id("<|spare_1|>")


def test_a_first_token_that_is_not_the_vocabularys_is_refused(tmp_path):
    source = framed(tmp_path / "llama", "<|spare_2|>")
    with pytest.raises(ConfigError, match="post_processor adds tokens"):
        export_gguf(GGUFPlan(source=source, output=tmp_path / "m.gguf"))


@pytest.mark.parametrize(
    ("path", "value", "told"),
    [
        (("normalizer",), {"type": "NFC"}, "normalizer NFC"),
        (("model", "type"), "Unigram", "the tokenizer is Unigram"),
        (("model", "byte_fallback"), True, "byte_fallback"),
        (("pre_tokenizer",), {"type": "Whitespace"}, 'pre_tokenizer {"type": "Whitespace"} is not known'),
        (("pre_tokenizer", "pretokenizers", 0, "individual_digits"), False, "is not known"),
        (("added_tokens", 2, "lstrip"), True, "'<|system|>' takes the spaces"),
    ],
)
def test_tokenizers_that_would_cut_otherwise_are_refused(path, value, told):
    spec = json.loads(TOKENIZER.to_str())
    assert pre_tokenizer(spec, "here") == "smollm"
    place = spec
    for part in path[:-1]:
        place = place[part]
    place[path[-1]] = value
    with pytest.raises(ConfigError, match=re.escape(told)):
        pre_tokenizer(spec, "here")


# The file -------------------------------------------------------------------------------------------------------------


def test_what_stands_there_is_kept_and_a_broken_export_leaves_nothing(tmp_path, monkeypatch):
    source, target = folder_of(model_of(), tmp_path / "source"), tmp_path / "out" / "m.gguf"
    plan = GGUFPlan(source=source, output=target)

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export_gguf(plan, stop)
    assert list(target.parent.iterdir()) == []
    export_gguf(plan)
    before = target.read_bytes()
    with pytest.raises(ArtifactError, match="exists already"):
        export_gguf(plan)
    assert target.read_bytes() == before
    again = export_gguf(plan.replace(output=tmp_path / "again.gguf"))
    assert (tmp_path / "again.gguf").read_bytes() == before, "the same model, the same bytes"
    assert again["files"] == {"again.gguf": len(before)}


def test_the_name_of_the_file_is_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="must end in .gguf"):
        GGUFPlan.build({"source": tmp_path, "output": tmp_path / "out"}, "export")


def test_a_missing_package_is_told_with_its_command(tmp_path, monkeypatch):
    source, real = folder_of(model_of(), tmp_path / "source"), builtins.__import__

    def absent(name, *rest, **more):
        if name == "gguf":
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match="run `pip install gguf`"):
        export_gguf(GGUFPlan(source=source, output=tmp_path / "m.gguf"))


def test_a_full_disk_is_told(tmp_path, monkeypatch):
    source = folder_of(model_of(), tmp_path / "source")

    def short(self, data):
        raise OSError("9 requested and 3 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", short)
    with pytest.raises(ResourceError, match="the disk is full"):
        export_gguf(GGUFPlan(source=source, output=tmp_path / "out" / "m.gguf"))
    assert list((tmp_path / "out").iterdir()) == []


def test_the_command_writes_it(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from agent_forge.cli.main import app

    monkeypatch.chdir(tmp_path)
    source = folder_of(model_of(), tmp_path / "source")
    words = ["export", str(source), "-o", "m.gguf", "--format", "gguf", "--dtype", "q8_0", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    receipt = json.loads(done.stdout)
    assert receipt["dtype"] == "q8_0" and receipt["bytes"] == os.path.getsize("m.gguf")
    assert read_config(source)["forge"]["d_model"] == Reference("m.gguf").number("embedding_length")


# llama.cpp itself -----------------------------------------------------------------------------------------------------

ODD = [
    question("what is 12 + 30?"),
    "it's  a\ttab,\n\n new   lines \r\n and trailing   ",
    "1234567 3.14 ½ ² Ⅷ ٣٤ x1y2",
    "日本語 and äöü ß é e\u0301 😀👍🏽 \u200b\u00a0\u3000x",
    '<think>no</think><|tool_call|>{"a": [1, 2]}<|end|><|spare_3|> <|not a token|>',
    "'s 'S 've're don't DON'T  ''ll",
    "\x00\x01\x7f \ufeff",
]


def llama_cpp_of(path, **options):
    """llama.cpp with the file; keys and values in 32 bits, so that only weights are rounded."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python")
    values = {"n_ctx": 128, "n_threads": 1, "logits_all": True, "verbose": False, "type_k": 0, "type_v": 0}
    return llama_cpp.Llama(str(path), **{**values, **options})


def their_logits(engine, ids):
    engine.reset()
    engine.eval(ids)
    return torch.from_numpy(np.array(engine.scores[: len(ids)])).double()


@pytest.mark.parametrize("gains", GAINS)
@pytest.mark.parametrize(("dtype", "worst"), [("float32", 2e-5), ("float16", 5e-3), ("q8_0", 5e-2)])
def test_llama_cpp_answers_as_the_model(gains, dtype, worst, tmp_path):
    """Logits within the type's rounding and, in float32, the same greedy continuation."""
    model = model_of(gains, max_seq_len=128, emb_rank=16)
    path, _ = exported(model, tmp_path, dtype=dtype)
    engine = llama_cpp_of(path)
    expected = ours(model, IDS)
    found = their_logits(engine, IDS)
    print(f"{gains} {dtype}: {float((found - expected).abs().max()):.2e} of {float(expected.abs().max()):.2f}")
    assert (found - expected).abs().max() < worst * expected.abs().max()
    if dtype == "float32":
        assert greedy(lambda ids: their_logits(engine, ids), 24) == greedy(lambda ids: ours(model, ids), 24)


def greedy(logits, count):
    ids = list(IDS)
    for _ in range(count):
        ids.append(int(logits(ids)[-1].argmax()))
    return ids


def test_llama_cpp_runs_llama_and_ternary_files(tmp_path):
    source = llama(tmp_path / "llama")
    export_gguf(GGUFPlan(source=source, output=tmp_path / "l.gguf"))
    expected = ours(read_model(source)[0], IDS)
    assert (their_logits(llama_cpp_of(tmp_path / "l.gguf"), IDS) - expected).abs().max() < 2e-5 * expected.abs().max()
    sizes = {"d_model": 256, "ffn_hidden": 256, "n_heads": 4, "n_layers": 2}
    model = ternary_(made(gpt_config(vocab_size=V, **sizes), seed=1, stir=0.02)).eval()
    path, _ = exported(model, tmp_path, dtype="tq2_0")
    expected = ours(model, IDS)
    # llama.cpp rounds activations to 8 bits before it multiplies packed weights.
    assert (their_logits(llama_cpp_of(path), IDS) - expected).abs().max() < 0.1 * expected.abs().max()


def test_llama_cpp_cuts_text_into_the_same_tokens(tmp_path):
    path, _ = exported(model_of(), tmp_path)
    engine = llama_cpp_of(path, vocab_only=True)
    for text in ODD:
        found = engine.tokenize(text.encode(), add_bos=True, special=True)
        assert found == TOKENIZER.encode(text).ids, text
        assert engine.detokenize(found, special=True).decode() == text
    assert (engine.token_eos(), engine.metadata["tokenizer.chat_template"]) == (
        TOKENIZER.token_to_id(END),
        CHAT_TEMPLATE,
    )
