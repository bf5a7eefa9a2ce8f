"""`agent-forge quantize`: one model made small, of ours and of Hugging Face's; what people get wrong; what they see."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from agent_forge.cli.commands_quantize import _settings, task_of
from agent_forge.pipeline.phase import PHASES
from agent_forge.profile import load_profile
from forgekit.data.batches import Mixture, TextSource, encode_texts
from forgekit.data.tokenizer import train_tokenizer
from forgekit.errors import ConfigError
from forgekit.models.config import GPTConfig
from forgekit.models.io import build_model, read_model
from forgekit.quant.layers import GroupedLinear, PackedLinear
from forgekit.quant.model import quantised_modules, targets
from forgekit.store.artifact import Artifact
from forgekit.store.storage import ModelStorage
from forgekit.train.config import TrainConfig
from forgekit.train.loop import Trainer

pytestmark = pytest.mark.usefixtures("one_thread")
SOURCE = Path(argparse.__file__).read_text(encoding="utf-8")[:60_000]
SKILLS = [{"family": "copy", "levels": [1]}, {"family": "sort", "levels": [1]}]
OPTIMIZER = {"lr": 0.01, "fallback_lr": 0.01, "grokfast_lambda": 0.0}
TRAIN = {"steps": 3, "rows": 4, "seq_len": 48, "log_every": 1, "precision": "fp32", "optimizer": OPTIMIZER}
SMALL = {
    "train": TRAIN,
    "practice": {"pool": 20, "traces": 20},
    "calibration": {"samples": 8},
    "speed": {"tokens": 3, "rounds": 2},
    "evaluation": {"problems": 12, "select": 6, "windows": 24, "length": 32, "thinking_budget": 6},
}
PROFILE = {"name": "mine", "threads": 1, "context": 160, "side_by_side": False, "phases": {"bitnet": SMALL}}
TOKENIZER = train_tokenizer([SOURCE[:8000]], 400)


@pytest.fixture(autouse=True)
def registered():
    """The phase enters by an entry point of the distribution, which an older installation does not have."""
    if "bitnet" not in PHASES:
        PHASES.lazy("bitnet", "agent_forge.phases.bitnet.phase:BitNetPhase")


@pytest.fixture
def here(tmp_path):
    """A folder with a profile of small settings and a text."""
    (tmp_path / "mine.json").write_text(json.dumps(PROFILE), encoding="utf-8")
    (tmp_path / "text.txt").write_text(SOURCE, encoding="utf-8")
    return tmp_path


def ours(path: Path, phase: str = "quietstar", width: int = 32, **metadata) -> str:
    """A model of ours in the storage of that folder; its id."""
    torch.manual_seed(0)
    shape = GPTConfig(vocab_size=400, d_model=width, n_layers=2, n_heads=1, ffn_hidden=2 * width + 1, max_seq_len=160)
    model, storage = build_model(shape), ModelStorage(path / "storage")
    with torch.no_grad():
        for p in model.parameters():  # what starts at zero speaks too
            p.add_(0.02 * torch.randn_like(p))
    session = storage.registry.create_session({})
    return storage.save_model(model, session, phase, "thinker", metadata, tokenizer=TOKENIZER)


def theirs(path: Path, kind: str = "llama", **changes) -> Path:
    """A Hugging Face folder of a tiny random model."""
    from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

    ends = {"eos_token_id": 1, "pad_token_id": 0, "bos_token_id": None}
    if kind == "gpt2":
        values = {"n_embd": 20, "n_layer": 2, "n_head": 2, "n_positions": 64, "n_inner": 37}
        shape = GPT2Config(vocab_size=400, **{**values, **changes}, **ends)
    else:
        values = {"hidden_size": 20, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 2}
        values |= {"num_key_value_heads": 1, "max_position_embeddings": 64, "tie_word_embeddings": True}
        shape = LlamaConfig(vocab_size=400, **{**values, **changes}, **ends)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape).save_pretrained(path)
    fast = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token="<|end|>", pad_token="<|pad|>")
    fast.save_pretrained(path)
    return path


USUAL = ("--profile", "mine.json", "--text", "text.txt", "--quiet")


def test_a_model_of_ours_in_eight_bits(forge, here):
    model = ours(here, speciality=SKILLS)
    done = forge("quantize", model, "--method", "int8", "--out", "small", *USUAL, "--json")
    assert done.code == 0, done.err
    told = json.loads(done.out)
    result = told["results"]["bitnet"]
    assert told["packed_path"] == "small" and told["session_id"]
    storage = ModelStorage(here / "storage")
    made, copied = storage.resolve(told["packed"]), Path("small")
    assert {p.name: p.read_bytes() for p in made.iterdir()} == {p.name: p.read_bytes() for p in copied.iterdir()}
    small, _ = read_model(copied)
    plain, _ = read_model(storage.resolve(model))
    maps = {name: small.get_submodule(name) for name in targets(plain)}
    assert {type(one) for one in maps.values()} == {GroupedLinear} and {one.bits for one in maps.values()} == {8}
    dense, _ = read_model(Path(told["dense_path"]))
    assert all(torch.equal(dense.get_submodule(name).weight, one.weight) for name, one in maps.items()), "in float32"
    for manifest in (Artifact.open(copied).manifest, Artifact.open(told["dense_path"]).manifest):
        known = manifest.metadata
        assert known["weight_grid"] == "int8" and known["grid"] == {"bits": 8, "group": 32}
        assert manifest.parents == [model] and "int8" in known["tags"] and "accuracy_retention" in known
    rows = {row["model"]: row for row in result["metrics"]["models"]}
    assert list(rows) == [
        "parent",
        "int8",
        "int8, in floats",
        "int8, not trained",
        "int4, not trained",
        "ternary, not trained",
    ]
    assert rows["int8"]["bytes"] == (copied / "model.safetensors").stat().st_size
    assert rows["parent"]["bytes"] > rows["int8"]["bytes"] > rows["int4, not trained"]["bytes"]
    assert rows["int8"]["perplexity"] == pytest.approx(rows["parent"]["perplexity"], rel=0.01)
    assert rows["int8"]["n"] == 24 and result["metrics"]["phase/finetuned"] is False
    claims = {item["claim"] for item in result["evidence"]}
    assert {"skills", "text", "int8 against int4", "int8 against ternary, not trained"} <= claims
    assert not [claim for claim in claims if claim.startswith(("ternary", "training"))]
    assert result["metrics"]["compression/threshold"] is None
    assert 0 < result["metrics"]["compression/sparsity_ratio"] < 0.2
    card = (copied / "README.md").read_text(encoding="utf-8")
    assert "(int8 weights)" in card and "from -127 to 127 times a scale of its 32 columns. Rounded, not" in card
    report = forge("report", told["session_id"][:8])
    assert report.code == 0 and "int8" in report.out
    assert forge("chat", "small", "copy 41", "--max-tokens", "3").code == 0


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A Hugging Face folder of a model that has learned something of the text, so that rounding can cost it."""
    folder = theirs(tmp_path_factory.mktemp("learned") / "llama")
    model, tokenizer = read_model(folder)
    data = Mixture(((TextSource(encode_texts(tokenizer, [SOURCE])), 1.0),), 8, 48, 0)
    config = TrainConfig.build({**TRAIN, "steps": 60, "rows": 8})
    Trainer(model, data, config).run()
    model.hf.save_pretrained(folder)
    return folder


def test_a_hugging_face_folder_made_ternary_is_judged_by_text_alone(forge, here, learned):
    done = forge("quantize", learned, *USUAL, "--set", "phases.bitnet.most_perplexity=0.0", "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)["results"]["bitnet"]
    metrics, claims = result["metrics"], {item["claim"]: item for item in result["evidence"]}
    assert {item["metric"] for item in claims.values()} == {"bits_per_token_with_grace", "bits_per_byte"}
    assert metrics["quality/perplexity_degradation_percent"] > 1
    trained = {
        "training brings back what rounding lost",
        "ternary beats full precision in the same bytes, from nothing, on text",
    }
    assert metrics["phase/finetuned"] is True and trained <= claims.keys()
    assert {name: len(found) for name, found in metrics["losses"].items()} == {"ternary": 3, "same bytes": 3}
    rows = metrics["models"]
    assert all(row["accuracy"] is row["low"] is row["high"] is None and row["n"] == 0 for row in rows)
    assert all(row["perplexity"] > 1 for row in rows) and rows[0]["model"] == "parent"
    names = ("quality/pre_accuracy", "quality/post_accuracy", "quality/accuracy_retention", "bitnet/accuracy_retention")
    assert [metrics[name] for name in names] == [None] * 4, "nothing is invented"
    assert metrics["levels"] == {} and metrics["select"] == {} and metrics["select_perplexity"].keys() >= {"parent"}
    assert result["artifacts"]["conversation"] == [] and metrics["quality/pre_compression_perplexity"] > 1
    gate = result["artifacts"]["gate"]
    assert not any("skills" in reason for reason in gate["reasons"])
    assert any("times smaller than float32, 8 is asked for" in reason for reason in gate["reasons"])
    small, _ = read_model(Path(json.loads(done.out)["packed_path"]))
    assert any(isinstance(one, PackedLinear) for one in small.modules())
    dense, _ = read_model(Path(json.loads(done.out)["dense_path"]))
    assert {p.dtype for p in dense.parameters()} == {torch.float32}


def test_a_named_skill_is_asked_of_a_hugging_face_model(forge, here):
    theirs(here / "gpt2", "gpt2", n_positions=160)
    done = forge("quantize", "gpt2", "--method", "int4", "--no-train", "--task", "sort:1", *USUAL, "--json")
    assert done.code == 0, done.err
    result = json.loads(done.out)["results"]["bitnet"]
    claims = {item["claim"]: item for item in result["evidence"]}
    assert claims["skills"]["n"] == 12 and set(result["metrics"]["levels"]["parent"]) == {"sort/1"}
    assert result["metrics"]["losses"] == {} and result["metrics"]["phase/finetuned"] is False
    assert any("too few questions to tell: 12, it takes 20" in one for one in result["artifacts"]["gate"]["reasons"])
    small, _ = read_model(Path(json.loads(done.out)["packed_path"]))
    assert {one.bits for one in quantised_modules(small).values() if type(one) is GroupedLinear} == {4}


def test_people_see_what_was_made_and_how_to_talk_to_it(forge, here):
    theirs(here / "llama")
    done = forge("quantize", "llama", "-m", "int4", "--no-train", "--out", "four", *USUAL)
    assert done.code == 0, done.err
    for word in ("parent", "int4, not trained", "int8, not trained", "ternary, not trained", "perplexity", "text"):
        assert word in done.out, word
    assert "gate bitnet:" in done.err and "packed: four; talk to it: agent-forge chat four" in done.err
    assert "text: held-out parts of text.txt" in done.err
    assert "accuracy" not in done.out and "nan" not in done.out.lower() and "None" not in done.out
    assert forge("chat", "four", "x", "--max-tokens", "2").code == 0
    card = (here / "four" / "README.md").read_text(encoding="utf-8")
    assert "exact answers" not in card and "None" not in card and "| int4 |" in card


def test_no_train_never_trains(forge, here, learned):
    done = forge("quantize", learned, "--no-train", *USUAL, "--set", "phases.bitnet.most_perplexity=0", "--json")
    result = json.loads(done.out)["results"]["bitnet"]
    assert result["metrics"]["losses"] == {} and result["metrics"]["phase/finetuned"] is False
    assert result["config"]["finetune_above"] == 1.0
    assert not any("full precision" in row["model"] for row in result["metrics"]["models"])


@pytest.mark.parametrize("method", ["bitnet", "int4"])
def test_rows_of_zeros_and_odd_widths_are_no_trouble(forge, here, method):
    model = ours(here, width=22)
    folder = ModelStorage(here / "storage").resolve(model)
    plain, tokenizer = read_model(folder)
    with torch.no_grad():
        plain.blocks[0].ffn.up.weight[::3] = 0
        plain.blocks[1].attn.wo.weight.zero_()
    storage = ModelStorage(here / "storage")
    given = storage.save_model(plain, Artifact.open(folder).manifest.session_id, "cognate", "holes", {})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            (storage.resolve(given) / name).write_bytes((folder / name).read_bytes())
    done = forge("quantize", given, "--method", method, "--no-train", "--out", "out", *USUAL, "--json")
    assert done.code == 0, done.err
    small, _ = read_model(here / "out")
    assert not small.blocks[1].attn.wo.weight.any() and not small.blocks[0].ffn.up.weight[0].any()
    assert small.blocks[0].ffn.down.weight.shape == (22, 45)
    assert all(row["perplexity"] > 1 for row in json.loads(done.out)["results"]["bitnet"]["metrics"]["models"])


def test_models_of_every_phase_are_taken_whatever_their_past(forge, here):
    for phase in ("cognate", "evomerge", "curriculum"):
        done = forge("quantize", ours(here, phase), "-m", "int8", "--no-train", *USUAL, "--json")
        assert done.code == 0, done.err
    dense = json.loads(done.out)["dense"]
    again = forge("quantize", dense, "-m", "int4", "--no-train", *USUAL, "--json")
    assert again.code == 0, again.err


def test_a_finished_session_is_not_done_again(forge, here):
    theirs(here / "llama")
    first = json.loads(forge("quantize", "llama", "-m", "int8", *USUAL, "--json").out)
    again = forge("run", "--resume", first["session_id"][:8], "--quiet", "--json")
    assert again.code == 0, again.err
    assert json.loads(again.out)["results"]["bitnet"]["artifacts"]["packed"] == first["packed"]


# ---- what people get wrong: one line, an exit code, no session


def nothing_begun(forge) -> bool:
    return json.loads(forge("status", "--json").out) == []


def with_nan(path: Path) -> None:
    model, tokenizer = read_model(theirs(path))
    with torch.no_grad():
        model.hf.model.layers[1].mlp.up_proj.weight[3, 2] = torch.nan
    model.hf.save_pretrained(path)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--method", "int3"), 2, "method: unknown method 'int3'; did you mean int"),
        (("--method", "ternary"), 2, "method: unknown method 'ternary'; "),
        (("--out", "llama"), 4, "llama: exists already; choose another name: --out"),
        (("--text", "nothing.txt"), 3, "nothing.txt: is empty; give a file with at least one row"),
        (("--text", "spaces.txt"), 3, "spaces.txt: "),
        (("--text", "short.txt"), 3, "characters are too few to train on some and measure on others; give more text"),
        (("--text", "line.txt"), 3, "tokens are not enough for a context of 48; give more text, or lower"),
        (("--text", "missing.txt"), 3, "missing.txt: no such file; check the path"),
        (("--text", "empty_folder"), 3, "empty_folder: holds no text files; give a folder with .txt or .jsonl files"),
        (("--text", "bytes.txt"), 3, "bytes.txt: not UTF-8 at byte 1"),
        (("--text", "rows.jsonl"), 3, "rows.jsonl: a row has title; give rows with text, or with prompt and answer"),
        (("--task", "srt:1"), 2, "unknown gym family 'srt'; did you mean sort"),
        (("--task", "sort:x"), 2, "--task: 'sort:x' is no skill; write FAMILY:LEVELS, as sort:1-3 or sort:1,4"),
        (("--task", "sort:0"), 2, "--task: levels.0: value 0 refused"),
        (
            ("--task", "sort:1", "--task", "sort:1-2"),
            2,
            "sort level 1 is there twice; name each level of a family once",
        ),
        (("--set", "phases.bitnet.train.step=3"), 2, "phases.bitnet.train.step: unknown key; did you mean steps"),
        (("--set", "phases.bitnet.ternary.sub_norm=true"), 2, "ternary.sub_norm has no place in the dequantised model"),
        (("--profile", "nanoo"), 2, "profile: unknown profile 'nanoo'; did you mean nano?"),
        (("--data", "nowhere"), 2, "nowhere; give a folder with data sets"),
    ],
)
def test_a_mistake_begins_nothing(forge, here, words, code, told):
    theirs(here / "llama")
    for name, content in (("nothing", b""), ("spaces", b" \n \n"), ("short", b"hello"), ("bytes", b"a\xe9" * 500)):
        (here / f"{name}.txt").write_bytes(content)
    (here / "line.txt").write_text(SOURCE[5000:5180], encoding="utf-8")
    (here / "rows.jsonl").write_text('{"title": "x"}\n', encoding="utf-8")
    (here / "empty_folder").mkdir()
    usual = {"--text": "text.txt", "--profile": "mine.json"}
    given = [word for option, value in usual.items() if option not in words for word in (option, value)]
    done = forge("quantize", "llama", *given, *words)
    assert done.code == code and told in done.error, done.err
    assert done.out == "" and nothing_begun(forge)


@pytest.mark.parametrize(
    ("make", "code", "told"),
    [
        (lambda path: None, 4, "m"),
        (
            lambda path: theirs(path, num_hidden_layers=0),
            4,
            "no linear layers that could be made small; give",
        ),
        (with_nan, 4, "NaN"),
        (lambda path: (theirs(path) / "config.json").write_text("{}"), 4, "no causal language model"),
        (lambda path: (theirs(path) / "tokenizer.json").unlink(), 4, "no tokenizer here"),
    ],
    ids=["nowhere", "no linear layers", "nan", "no config", "no tokenizer"],
)
def test_a_model_that_will_not_do_begins_nothing(forge, here, make, code, told):
    make(here / "m")
    done = forge("quantize", "m", *USUAL)
    assert done.code == code and told in done.error, done.err
    assert nothing_begun(forge)


def test_a_packed_model_is_not_quantised_again(forge, here):
    theirs(here / "llama")
    assert forge("quantize", "llama", "-m", "int8", "--no-train", "--out", "small", *USUAL).code == 0
    for given in ("small", str(here / "small")):
        done = forge("quantize", given, "-m", "int4", *USUAL)
        assert (
            done.code == 4
            and "its weights are packed: it can be run, not quantised again; " in done.error
            and not (here / "storage2").exists()
        )


# ---- settings


def settings(here: Path, model: str, **changes):
    given = {"model": model, "method": "bitnet", "output": None, "text": [], "task": [], "train": True}
    given |= {"profile": None, "data": None, "changes": [], **changes}
    return _settings(str(here / "storage"), given)


def test_other_houses_start_from_the_phases_own_settings(here):
    found = settings(here, str(theirs(here / "llama"))).phase("bitnet")
    own = type(found)()
    assert found.train.optimizer == own.train.optimizer and found.train.steps == own.train.steps
    assert found.train.seq_len == found.evaluation.length == 64, "its context"
    assert found.text == own.text and found.skills is None
    given = settings(here, str(here / "llama"), profile=str(here / "mine.json"), text=[str(here / "text.txt")])
    assert given.phase("bitnet").train.steps == 3, "where they were asked for"
    assert list(given.phases) == ["bitnet"] and given.handoffs.keys() == {"external->bitnet"}


def test_our_models_take_the_settings_of_the_run_that_made_them(here):
    storage = ModelStorage(here / "storage")
    cognate = load_profile("pico").phases["cognate"]
    cognate["text"] = {"names": ["python_prose"], "bytes_each": 50_000}
    phases = {"cognate": cognate, "bitnet": {**SMALL, "least_ratio": 6.0}}
    session = storage.registry.create_session({"profile": {**PROFILE, "phases": phases}})
    torch.manual_seed(0)
    model = build_model(GPTConfig(vocab_size=400, d_model=16, n_layers=1, n_heads=1))
    given = storage.save_model(model, session, "evomerge", "champion", {}, tokenizer=TOKENIZER)
    found = settings(here, given)
    config = found.phase("bitnet")
    assert found.name == "mine" and config.train.steps == 3 and config.text.bytes_each == 50_000
    assert config.least_ratio == 6.0 and config.ratio_asked == 6.0 and config.dense == "float16"
    eight = settings(here, given, method="int8", changes=["phases.bitnet.train.steps=9"]).phase("bitnet")
    assert eight.ratio_asked == 3.5 and eight.dense == "float32" and eight.grid.bits == 8
    assert eight.train == config.train.replace(steps=9), "--set changes one and leaves the others"


def test_a_session_from_before_the_phase_takes_its_profiles_settings(here):
    storage = ModelStorage(here / "storage")
    shipped = load_profile("pico")
    plan = shipped.replace(phases={"cognate": shipped.phases["cognate"]}).model_dump(mode="json")
    session = storage.registry.create_session({"profile": plan})
    model = build_model(GPTConfig(vocab_size=400, d_model=16, n_layers=1, n_heads=1))
    given = storage.save_model(model, session, "cognate", "trunk", {}, tokenizer=TOKENIZER)
    found = settings(here, given).phase("bitnet")
    expected = shipped.phase("bitnet") if "bitnet" in shipped.phases else type(found)()
    assert found.train == expected.train


@pytest.mark.parametrize(
    ("text", "levels"),
    [("sort", (1, 2, 3)), ("sort:2", (2,)), ("sort:1-3", (1, 2, 3)), ("sort:1,4-6", (1, 4, 5, 6))],
)
def test_skills_are_named_in_short(text, levels):
    assert tuple(task_of(text)["levels"]) == levels and task_of(text)["family"] == "sort"


@pytest.mark.parametrize("text", ["sort:", "sort:3-1", "sort:1-2-3-x", ":1", "sort:1;2"])
def test_what_is_no_skill_is_refused(text):
    with pytest.raises(ConfigError, match="--task"):
        task_of(text)
