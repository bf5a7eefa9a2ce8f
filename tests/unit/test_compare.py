"""Comparisons: the same items for every model, numbers that can be recomputed, and no claim beyond them."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from agent_forge import compare_items
from agent_forge.cli.commands_handon import levels_of, show_comparison
from agent_forge.compare import (
    TEXT_SPLIT,
    Scores,
    compare,
    family_rows,
    holm,
    score_pieces,
    seen_notes,
    subjects_of,
    text_row,
    text_splits,
)
from agent_forge.compare_items import CompareConfig, cut, draw_problems, text_windows
from forgekit.data.gym import Problem
from forgekit.data.plans import GymMix, TextPlan
from forgekit.data.texts import SHARES, SPLIT_SEED
from forgekit.data.tokenizer import END, question, train_tokenizer
from forgekit.errors import ArtifactError, ConfigError, DataError
from forgekit.measure.scores import score_problems
from forgekit.measure.stats import mcnemar, paired_difference, proportion
from forgekit.models.io import read_model, write_model
from forgekit.store.artifact import Manifest, write_artifact
from tests.unit.tiny import gpt_config, made, trm_config

WORDS = "hello world, some text with digits 123, copy sort reverse add and äöü. "
TOKENIZER = train_tokenizer([WORDS] * 5, 310)
SMALLER = train_tokenizer([WORDS] * 5, 300)
SMALL = CompareConfig(problems=8, families=("copy", "sort", "compare"), levels=(1, 2), windows=6, window_bytes=48)


def artifact(folder, name, config, seed=0, tokenizer=TOKENIZER, **metadata):
    manifest = Manifest(
        model_id=f"cognate_{name}_20260102_030405",
        session_id="s",
        phase_name="cognate",
        model_name=name,
        parameters=config.parameters(),
        metadata=metadata,
    )
    model = made(config, seed, stir=0.3)
    return write_artifact(folder, lambda work: write_model(model, tokenizer, work), manifest).path


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two of our families with different tokenizers, and a Llama with its own template and a short context."""
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("models")
    artifact(root / "plain", "plain", gpt_config(vocab_size=TOKENIZER.get_vocab_size()))
    artifact(root / "trm", "trm", trm_config(vocab_size=300, act_threshold=0.05), 1, SMALLER)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=310, max_position_embeddings=45, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(root / "llama")
    fast = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER, eos_token="<|end|>")
    fast.chat_template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    fast.save_pretrained(root / "llama")
    return root


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "held.txt"
    path.write_text("\n<|endoftext|>\n".join(f"{WORDS} {i} äöü {WORDS}" for i in range(12)))
    return path


# ---- what is asked


def test_problems_are_distinct_and_of_the_split():
    from forgekit.data.gym.core import split_of

    problems, notes = draw_problems(SMALL)
    prompts = [(p.family, p.prompt) for p in problems]
    assert len(set(prompts)) == len(prompts) and {p.family for p in problems} == {"copy", "sort", "compare"}
    assert {split_of(p.prompt) for p in problems} == {"report"} and notes == []
    for family, level in {(p.family, p.level) for p in problems}:
        assert 0 < sum((p.family, p.level) == (family, level) for p in problems) <= 8
    assert draw_problems(SMALL)[0] == problems
    assert {split_of(p.prompt) for p in draw_problems(SMALL.replace(split="select"))[0]} == {"select"}


def test_a_level_without_prompts_is_told(monkeypatch):
    honest = compare_items.held_out

    def some(mix, count, split):
        if mix == (GymMix(family="sort", levels=(1,)),):
            raise DataError("no report prompts at level 1")
        return honest(mix, count, split)

    monkeypatch.setattr(compare_items, "held_out", some)
    problems, notes = draw_problems(SMALL)
    assert notes == ["no report problems exist at sort 1"] and ("sort", 1) not in {
        (p.family, p.level) for p in problems
    }
    with pytest.raises(DataError, match="no report problems of sort at these levels"):
        draw_problems(SMALL.replace(families=("sort",), levels=(1,)))


def test_a_prompt_of_two_levels_counts_once(monkeypatch):
    same = Problem("sort", 1, "sort 21", "12")
    monkeypatch.setattr(compare_items, "held_out", lambda mix, count, split: [same])
    assert draw_problems(SMALL.replace(families=("sort",)))[0] == [same]


def test_windows_hold_whole_characters_and_their_bytes(data):
    text = "aé" * 40
    pieces = list(cut(text, 31))
    assert all(len(piece.encode()) <= 31 for piece in pieces) and len(pieces) == 4
    assert all(piece in text for piece in pieces)
    assert list(cut("short", 31)) == [] and list(cut("x" * 16, 31)) == ["x" * 16]
    windows, notes = text_windows(SMALL.replace(data=data))
    assert len(windows) == 6 and "all 12 documents of held.txt" in notes[0]
    assert f"{sum(len(w.encode()) for w in windows)} bytes" in notes[1]
    with pytest.raises(DataError, match="no report document is as long as half a window"):
        text_windows(SMALL.replace(data=data, window_bytes=10_000))


def test_rows_without_text_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"body": "x"}\n')
    with pytest.raises(DataError, match="holds rows without text"):
        text_windows(SMALL.replace(data=path))


def test_built_in_text_is_what_phase_1_holds_out(monkeypatch):
    asked = []

    def loaded(plan, folder):
        asked.append((plan, folder))
        parts = {"train": ["t" * 50], "select": ["s" * 50], "report": ["r" * 50, "R" * 50]}
        return parts, [{"name": "python_prose"}], ["note"]

    monkeypatch.setattr(compare_items, "load_texts", loaded)
    windows, notes = text_windows(SMALL)
    assert windows == ["r" * 48, "R" * 48] and notes[0].startswith("text: 2 report documents of python_prose, which")
    windows, notes = text_windows(SMALL.replace(split="train"))
    assert windows == ["t" * 48] and notes[0].startswith("text: 1 training documents")
    assert asked[0][1] is None and asked[0][0].names == ("python_prose", "python_code")


def test_nothing_that_any_profile_trains_on_counts_as_held_out():
    from agent_forge.profile import load_profile

    used = {*TextPlan().names, *compare_items.local_texts()}
    for name in ("pico", "nano", "micro", "small", "base", "large"):
        plan = load_profile(name).phase("cognate").text
        assert plan.bytes_each <= compare_items.EVERYTHING and {*plan.names, *plan.local} <= used


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"families": ("srot",)}, "unknown gym family 'srot'; did you mean sort"),
        ({"levels": (1, 11)}, "level 11 is not in 1..10"),
        ({"split": "test"}, "unknown split 'test'"),
        ({"problems": 0}, "problems"),
    ],
)
def test_settings_are_checked(values, told):
    with pytest.raises(ConfigError, match=told):
        CompareConfig.build(values, "compare")


# ---- scores


def test_scores_are_those_of_the_models_alone(models, data):
    config = SMALL.replace(data=data)
    result = compare([models / "plain", models / "trm"], config)
    problems, windows = draw_problems(config)[0], text_windows(config)[0]
    rights = {}
    for name in ("plain", "trm"):
        model, tokenizer = read_model(models / name)
        rights[name] = score_problems(model, tokenizer, problems).right
        bits = []
        for window in windows:
            ids = torch.tensor([tokenizer.token_to_id(END), *tokenizer.encode(window).ids])
            with torch.inference_mode():
                nats = F.cross_entropy(model(ids[None, :-1]).logits[0], ids[1:], reduction="sum")
            bits.append(float(nats) / math.log(2) / len(window.encode()))
        assert result["text"]["bits_per_byte"][name]["mean"] == pytest.approx(np.mean(bits), rel=1e-5)
    for row in result["families"]:
        pick = np.array([row["family"] in ("all", p.family) for p in problems])
        before, after = (rights[name][pick] for name in ("plain", "trm"))
        mean, low, high = proportion(after)
        assert row["accuracy"]["trm"] == {"mean": mean, "ci95": [low, high]} and row["n"] == pick.sum()
        (test,) = row["differences"]
        difference = paired_difference(before, after)
        assert test["difference"] == pytest.approx(difference[0]) and test["ci95"] == list(difference[1:])
        assert test["mcnemar_p"] == mcnemar(before, after)
    assert [row["family"] for row in result["families"]] == ["copy", "sort", "compare", "all"]
    assert json.loads(json.dumps(result))["against"] == "plain"


def test_sizes_and_costs_are_counted(models, data):
    result = compare([models / "plain", models / "trm"], SMALL.replace(data=data))
    plain, trm = result["models"]
    assert plain["weight_bytes"] == (models / "plain" / "model.safetensors").stat().st_size
    model, _ = read_model(models / "trm")
    steps = trm["steps_per_token"]
    assert 1 <= steps <= 2 and plain["steps_per_token"] is None
    assert trm["flops_per_token"] == model.config.flops_per_token(round(trm["context_tokens"]), steps)
    assert trm["model_id"] == "cognate_trm_20260102_030405"


def test_a_stranger_is_asked_in_its_own_format_and_what_it_cannot_read_is_left_out_for_all(models, data, monkeypatch):
    from agent_forge import compare as module

    asked = []
    honest = module.Speaker._ids
    monkeypatch.setattr(
        module.Speaker, "_ids", lambda self, text: asked.append((text, honest(self, text))) or asked[-1][1]
    )
    config = SMALL.replace(data=data, levels=(1,), families=("sort", "far_recall"), window_bytes=64)
    result = compare([models / "plain", models / "llama"], config)
    problems = draw_problems(config)[0]
    short = [p for p in problems if len(TOKENIZER.encode(f"[{p.prompt}]{p.answer}").ids) + 1 <= 45]
    assert 0 < len(short) < len(problems)
    (row,) = result["families"]
    assert row["n"] == len(short)
    assert any(f"{len(problems) - len(short)} problems are longer" in note for note in result["notes"])
    ids = dict(asked)
    assert ids[question(short[0].prompt)] == TOKENIZER.encode(f"[{short[0].prompt}]").ids
    assert ids[short[0].answer + END] == [*TOKENIZER.encode(short[0].answer).ids, 1]
    assert result["models"][1]["format"] != result["models"][0]["format"]
    assert result["models"][1]["model_id"] is None


@pytest.mark.parametrize("at_once", [16_384, 60])
def test_windows_do_not_hear_each_other_nor_their_padding(models, data, monkeypatch, at_once):
    from agent_forge import compare as module

    monkeypatch.setattr(module, "_BATCH_TOKENS", at_once)
    model, tokenizer = read_model(models / "trm")
    windows = text_windows(SMALL.replace(data=data))[0] + ["ab"]
    bits, tokens, steps = score_pieces(model, tokenizer, windows, math.inf)
    alone = [score_pieces(model, tokenizer, [w], math.inf) for w in windows]
    np.testing.assert_allclose(bits, [a[0][0] for a in alone], rtol=1e-4)
    assert tokens.tolist() == [a[1][0] for a in alone]
    assert steps == pytest.approx(sum(a[2] * a[1][0] for a in alone) / tokens.sum())
    cut_off, _, _ = score_pieces(model, tokenizer, windows, tokens.max() - 1)
    assert np.isnan(cut_off).sum() == (tokens == tokens.max()).sum()


# ---- the models against each other


def fake_scores(right, bits=(8.0,)):
    return Scores(np.array(right, dtype=float), np.array(bits, dtype=float), np.array([4.0] * len(bits)), {})


def test_verdicts_follow_the_evidence_and_p_values_their_number():
    problems = [Problem(f, 1, f"{f} {i}", str(i)) for f in ("copy", "sort") for i in range(40)]
    a, b = [0.0] * 80, [1.0] * 40 + [0.0] * 40
    rows, notes = family_rows(problems, {"a": fake_scores(a), "b": fake_scores(b)}, "report")
    copy, sort, both = rows
    assert copy["differences"][0]["verdict"] == "improved" and sort["differences"][0]["verdict"] == "no-signal"
    p = copy["differences"][0]["mcnemar_p"]
    assert copy["differences"][0]["holm_p"] == 2 * p and sort["differences"][0]["holm_p"] == 1.0
    assert both["differences"][0]["holm_p"] is None and both["n"] == 80 and notes == []
    assert copy["chance"] == pytest.approx(1 / 40)
    with pytest.raises(DataError, match="no problem fits every model's context"):
        family_rows(problems[:1], {"a": fake_scores([np.nan]), "b": fake_scores([1.0])}, "report")


def test_holm_is_holms():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0] and holm([]) == []


def test_less_bits_are_better():
    windows = ["abcdefgh"] * 30
    rng = np.random.default_rng(0)
    high, low = (8 * (level + 0.1 * rng.random(30)) for level in (3, 2))
    scores = {"a": fake_scores([1], high), "b": fake_scores([1], low)}
    row, notes = text_row(windows, scores, "report")
    assert row["differences"][0]["verdict"] == "improved" and -1.1 < row["differences"][0]["difference"] < -0.9
    assert row["bytes"] == 240 and notes == []
    high[0] = np.nan
    row, notes = text_row(windows, {**scores, "a": fake_scores([1], high)}, "report")
    assert row["windows"] == 29 and "1 windows are longer" in notes[0]
    with pytest.raises(DataError, match="no window fits"):
        text_row(windows, {"a": fake_scores([1], [np.nan] * 30), "b": scores["b"]}, "report")


# ---- what the numbers do not say


def test_who_may_have_seen_the_text_is_told(models):
    rule = {"seed": SPLIT_SEED, "shares": SHARES}
    known = {"root": {TEXT_SPLIT: rule}, "other": {TEXT_SPLIT: {"seed": 9}}, "silent": {}, "far": {"parents": ["root"]}}
    assert text_splits({"parents": ["root", "far"]}, known.get) == [rule]
    assert len(text_splits({"parents": ["root", "other"]}, known.get)) == 2
    for parents in (["root", "silent"], ["root", "nobody"], []):
        assert text_splits({"parents": parents}, known.get) == []
    assert text_splits({"parents": ["a"]}, {"a": {"parents": ["a"]}}.get) == [], "no endless walk"
    subjects = subjects_of([models / "plain", models / "llama"])
    (note,) = seen_notes(subjects, SMALL, known.get)
    assert note.startswith("plain, llama: nothing tells which documents were trained on")
    assert "no measure" in seen_notes(subjects, SMALL.replace(split="train"), known.get)[0]


def test_a_manifest_that_names_the_division_is_believed(models, tmp_path):
    rule = {"seed": SPLIT_SEED, "shares": SHARES}
    config = gpt_config(vocab_size=TOKENIZER.get_vocab_size())
    folders = [artifact(tmp_path / "a", "a", config, **{TEXT_SPLIT: rule})]
    folders.append(artifact(tmp_path / "b", "b", config, **{TEXT_SPLIT: {**rule, "seed": 2}}))
    notes = seen_notes(subjects_of(folders), SMALL, lambda model_id: None)
    assert notes[0].startswith("a: trained with these documents held out") and notes[1].startswith("b: trained with an")


# ---- bad input


def test_models_that_cannot_be_compared_are_refused(models, tmp_path):
    with pytest.raises(ConfigError, match="one model cannot be compared"):
        compare([models / "plain"], SMALL)
    with pytest.raises(ArtifactError, match="the same model twice .cognate_plain"):
        shutil.copytree(models / "plain", tmp_path / "copy")
        compare([models / "plain", tmp_path / "copy"], SMALL)
    with pytest.raises(ArtifactError, match="the same model twice"):
        compare([models / "llama", models / "trm", models / "llama"], SMALL)
    with open(tmp_path / "copy" / "model.safetensors", "r+b") as file:
        file.truncate(100)
    with pytest.raises(ArtifactError, match="truncated or changed"):
        compare([models / "trm", tmp_path / "copy"], SMALL)


def test_a_model_whose_tokenizer_is_missing_or_does_not_fit_is_refused(models, tmp_path, data):
    for name in ("none", "larger"):
        shutil.copytree(models / "trm", tmp_path / name)
        (tmp_path / name / "manifest.json").unlink()
    (tmp_path / "none" / "tokenizer.json").unlink()
    shutil.copy(models / "plain" / "tokenizer.json", tmp_path / "larger" / "tokenizer.json")
    with pytest.raises(ArtifactError, match="no tokenizer here"):
        compare([tmp_path / "none", models / "plain"], SMALL.replace(data=data))
    with pytest.raises(ArtifactError, match="the tokenizer has 310 tokens, the weights 300 rows"):
        compare([tmp_path / "larger", models / "plain"], SMALL.replace(data=data))


def test_models_of_one_name_are_told_apart(models, tmp_path):
    for folder in ("x/model", "y/model"):
        shutil.copytree(models / "llama", tmp_path / folder)
    names = [s.name for s in subjects_of([tmp_path / "x" / "model", tmp_path / "y" / "model", models / "plain"])]
    assert names == [str(tmp_path / "x" / "model"), str(tmp_path / "y" / "model"), "plain"]


# ---- for people


def test_the_tables_show_what_was_measured(models, data, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    seen = []
    result = compare([models / "plain", models / "trm"], SMALL.replace(data=data), seen.append)
    show_comparison(result)
    out, err = capsys.readouterr()
    value = result["families"][0]["accuracy"]["trm"]
    assert f"{value['mean']:.3f} [{value['ci95'][0]:.3f}, {value['ci95'][1]:.3f}]" in out
    assert "differences to plain" in out and "McNemar p" in out and "Holm's adjustment" in err
    assert f"{result['text']['differences'][0]['difference']:+.3f}" in out
    assert {p.stage for p in seen} == {"items", "plain", "trm"} and all(p.done <= p.total for p in seen)
    assert [p.done for p in seen if p.stage == "trm"][-1] == next(p.total for p in seen if p.stage == "trm")


@pytest.mark.parametrize(("text", "levels"), [("1-3", (1, 2, 3)), ("2", (2,)), ("1,3-4", (1, 3, 4))])
def test_levels_are_read(text, levels):
    assert levels_of(text) == levels


@pytest.mark.parametrize("text", ["", "a", "1-", "1..3", "-1"])
def test_what_are_no_levels_is_refused(text):
    with pytest.raises(ConfigError, match="are no levels"):
        levels_of(text)
