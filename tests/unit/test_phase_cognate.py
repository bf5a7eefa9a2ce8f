"""Phase 1 in parts: settings, data, evidence functions, the card. Whole runs are in tests/journey."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from agent_forge.phases.cognate import evidence as ev
from agent_forge.phases.cognate.ablation import Bench, ablations, plain_shape, recursion_switched
from agent_forge.phases.cognate.card import card
from agent_forge.phases.cognate.config import CognateConfig
from agent_forge.phases.cognate.data import prepare, specialist_mixture, supervised_share, trunk_mixture
from agent_forge.profile import load_profile
from forgekit.data import texts as held_texts
from forgekit.data.gym import Problem, split_of
from forgekit.data.plans import GymMix
from forgekit.data.problems import draw, held_out
from forgekit.data.texts import load_texts
from forgekit.errors import ConfigError, DataError
from forgekit.measure.evidence import Evidence
from forgekit.measure.problems import by_level, chance_of
from forgekit.models.config import TRMTitansConfig
from forgekit.models.constants import IGNORE
from forgekit.models.io import build_model
from forgekit.models.trm_titans import HALT_SPEED

torch.set_num_threads(1)
SPECIALIST = {"name": "reasoning", "seed": 1, "mix": [{"family": "state", "levels": [1]}]}
FAR = {"name": "memory_integration", "seed": 2, "mix": [{"family": "far_recall", "levels": [1]}]}
SMALL = {
    "pool": 20,
    "trunk_mix": [{"family": "copy", "levels": [1]}, {"family": "compare", "levels": [1]}],
    "text": {"names": ["python_prose"], "bytes_each": 60_000, "local": ["tinystories"]},
    "trunk": {"steps": 4, "rows": 6, "seq_len": 32, "seed": 42},
    "specialist": {"steps": 2, "rows": 6, "seq_len": 32},
    "specialists": [SPECIALIST, FAR],
    "evaluation": {"problems": 20, "windows": 4},
}


def config(**changes) -> CognateConfig:
    return CognateConfig.build({**SMALL, **changes}, path="phases.cognate")


@pytest.fixture(scope="module")
def data():
    return prepare(config(), 320, None)


@pytest.fixture(scope="module")
def model():
    """A stirred model: what training starts silent (gates, memories) speaks."""
    torch.manual_seed(1)
    shape = TRMTitansConfig(
        vocab_size=320, d_model=32, n_layers=2, n_heads=2, ffn_hidden=32, window=4, d_mem=16, memory_chunk=8,
        gate_hidden=8, trm_hidden=16, max_seq_len=64, t_max=3,
    )  # fmt: skip
    model = build_model(shape)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    model.recursion.teacher_weight.copy_(torch.randn_like(model.recursion.teacher_weight) / HALT_SPEED)
    return model.eval()


# Settings


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"specialists": []}, "phases.cognate.specialists: value [] refused"),
        ({"specialists": [SPECIALIST, SPECIALIST]}, "two specialists share a name: ['reasoning', 'reasoning']"),
        ({"specialists": [{**SPECIALIST, "train": {"steps": 0}}]}, "steps: value 0 refused"),
        ({"specialists": [{**SPECIALIST, "train": {"stepz": 3}}]}, "stepz: unknown key; did you mean steps"),
        (
            {"specialists": [{**SPECIALIST, "act_threshold": 2}]},
            "phases.cognate.specialists.0.act_threshold: value 2",
        ),
        ({"trunk_mix": []}, "phases.cognate.trunk_mix: value [] refused"),
        ({"trunk_mix": [{"family": "copi"}]}, "unknown gym family 'copi'; did you mean copy"),
        ({"trunk_mix": [{"family": "copy", "levels": [0]}]}, "trunk_mix.0.levels.0: value 0 refused"),
        ({"trunk_mix": [{"family": "copy", "options": {"gap": 3}}]}, "copy has no option ['gap']; it has []"),
        ({"text": {"share": 1.5}}, "phases.cognate.text.share: value 1.5 refused"),
        ({"pool": 0}, "phases.cognate.pool: value 0 refused"),
    ],
)
def test_settings_are_refused_by_name(changes, told):
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_a_specialist_trains_as_the_others_but_for_what_it_changes():
    plan = {**SPECIALIST, "train": {"steps": 9}}
    settings = config(specialists=[plan])
    train = settings.training_of(settings.specialists[0])
    assert (train.steps, train.rows, train.seed) == (9, 6, 1)
    assert set(settings.specialists[0].traits()) <= set(TRMTitansConfig.model_fields)


# Data


def test_the_texts_of_the_splits_are_disjoint(data):
    train, select, report = (
        {" ".join(t.casefold().split()) for t in texts}
        for texts in (data.train_texts, data.select_texts, data.report_texts)
    )
    assert train and select and report and not train & report and not train & select and not select & report


def runs(texts) -> set[str]:
    """Every thirteen words in a row."""
    split = [text.split() for text in texts]
    return {" ".join(words[i : i + 13]) for words in split for i in range(len(words) - 12)}


def test_no_thirteen_words_of_a_held_out_document_stand_in_the_training_texts(tmp_path, monkeypatch):
    """Docstrings of the one source are quoted in the other, so that the split alone would leak them."""
    own, _, _ = load_texts(config().text, None)
    long = [text.split() for part in own.values() for text in part if len(text.split()) > 20]
    texts = stories(tmp_path, 120)
    shutil.rmtree(tmp_path / "bench")
    planted = [f"{story[:-1]} {' '.join(words[2:18])} end." for story, words in zip(texts[60:], long * 9)]
    write_stories(tmp_path, texts[:60] + planted)
    parts, _, notes = load_texts(config().text, tmp_path)
    trained = runs(parts["train"])
    assert len(trained) > 1000 and set(planted) & set(parts["train"])
    for name in ("select", "report"):
        assert parts[name] and not runs(parts[name]) & trained, name
        (kept, total) = next((n.split()[1], n.split()[3]) for n in notes if n.startswith(f"{name}: "))
        assert len(parts[name]) == int(kept) < int(total), "the planted ones are gone"
    monkeypatch.setattr(held_texts, "_grams", lambda text: set())
    leaked, _, _ = load_texts(config().text, tmp_path)
    assert runs(leaked["report"]) & runs(leaked["train"]), "without the check they leak, or this test says nothing"


def test_report_problems_are_distinct_and_of_no_other_split():
    mix = (GymMix(family="copy", levels=(1,)), GymMix(family="compare", levels=(1, 2)))
    trained = {p.prompt for seed in (1, 2, 42) for p in draw(mix, 2000, seed)}
    sets = {split: held_out(mix, 200, split) for split in ("report", "select")}
    for split, problems in sets.items():
        prompts = [p.prompt for p in problems]
        assert len(prompts) == len(set(prompts)) and not trained & set(prompts), split
        assert {split_of(prompt) for prompt in prompts} == {split}
        assert sum(p.family == "copy" for p in problems) < 200 == sum(p.level == 2 for p in problems), "a small family"
    assert not {p.prompt for p in sets["report"]} & {p.prompt for p in sets["select"]}
    assert held_out(mix, 200) == sets["report"]
    assert [(p.family, p.level) for p in held_out(mix, 1)] == [("copy", 1), ("compare", 1), ("compare", 2)]


def test_the_tokenizer_fills_the_vocabulary_and_provenance_names_everything(data):
    assert data.tokenizer.get_vocab_size() == 320
    names = [record["name"] for record in data.provenance]
    assert names == ["python_prose", "gym"]
    assert data.provenance[0]["sha256"] and data.provenance[0]["rows_used"] > 0
    assert any(note.startswith("python_prose: ") for note in data.notes)


def test_equal_data_have_equal_hashes_and_other_data_others(data):
    assert prepare(config(), 320, None).data_hash == data.data_hash
    for change in ({"pool": 21}, {"text": {**SMALL["text"], "bytes_each": 20_000}}, {"trunk": {"seed": 1}}):
        assert prepare(config(**change), 320, None).data_hash != data.data_hash, change


def stories(folder: Path, count: int = 60) -> list[str]:
    """A data folder with ``count`` stories in which no thirteen words repeat, and a benchmark that quotes one."""
    rng = np.random.default_rng(0)
    words = [f"word{chr(97 + i % 26)}{chr(97 + i // 26)}" for i in range(600)]
    texts = [" ".join(rng.choice(words, 60)) + "." for _ in range(count)]
    write_stories(folder, texts)
    (folder / "bench").mkdir()
    item = {"question": texts[7], "choices": {"text": ["a", "b"], "label": ["A", "B"]}, "answerKey": "A"}
    (folder / "bench" / "arc_easy_test.jsonl").write_text(json.dumps(item) + "\n", encoding="utf-8")
    return texts


def write_stories(folder: Path, texts: list[str]) -> None:
    (folder / "tinystories").mkdir(parents=True, exist_ok=True)
    rows = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (folder / "tinystories" / "train.jsonl").write_text(rows, encoding="utf-8")


def test_the_hash_follows_the_contents_of_the_data_folder(tmp_path):
    texts = stories(tmp_path)
    before = prepare(config(), 320, tmp_path)
    assert prepare(config(), 320, tmp_path).data_hash == before.data_hash
    changed = before.train_texts.index(next(t for t in before.train_texts if t in texts))
    words = before.train_texts[changed].split()
    write_stories(tmp_path, [" ".join([words[1], words[0], *words[2:]]) if t.split() == words else t for t in texts])
    assert prepare(config(), 320, tmp_path).data_hash != before.data_hash


def test_documents_that_hold_benchmark_items_are_dropped(tmp_path):
    texts = stories(tmp_path)
    parts, provenance, notes = load_texts(config().text, tmp_path)
    used = {text for part in parts.values() for text in part}
    assert texts[7] not in used and len(used & set(texts)) >= 50
    assert [p["name"] for p in provenance] == ["python_prose", "tinystories"]
    assert any(note.startswith("contamination: 1 of ") for note in notes)


def test_a_data_folder_need_not_hold_benchmarks(tmp_path):
    texts = stories(tmp_path)
    shutil.rmtree(tmp_path / "bench")
    parts, _, notes = load_texts(config().text, tmp_path)
    assert list(parts) == ["train", "select", "report"]
    assert texts[7] in {text for part in parts.values() for text in part}
    assert not any(note.startswith("contamination") for note in notes)


def test_too_little_text_is_told():
    with pytest.raises(DataError, match="too little text is left after cleaning; raise text.bytes_each"):
        load_texts(config(text={"names": ["python_prose"], "bytes_each": 300}).text, None)


def test_batches_are_a_pure_function_of_settings_and_step(data):
    settings = config()
    plan = settings.specialists[0]
    train = settings.training_of(plan)
    for make in (lambda: trunk_mixture(data, settings), lambda: specialist_mixture(data, settings, plan, train)):
        one, other = make().batch(3), make().batch(3)
        assert np.array_equal(one.inputs, other.inputs) and np.array_equal(one.labels, other.labels)
        assert one.inputs.shape == (6, 32) and not np.array_equal(one.inputs, make().batch(4).inputs)


def test_draw_takes_as_many_of_every_family_and_level():
    problems = draw((GymMix(family="copy", levels=(1, 2)), GymMix(family="sort", levels=(3,))), 5, seed=1)
    assert [(p.family, p.level) for p in problems] == [("copy", 1)] * 5 + [("copy", 2)] * 5 + [("sort", 3)] * 5


def test_weights_count_when_training_and_not_when_measuring():
    mix = (GymMix(family="copy", weight=2.5), GymMix(family="sort", levels=(3,), weight=0.5))
    for split, expected in (("train", (75, 5)), ("report", (30, 10)), ("select", (30, 10))):
        found = [p.family for p in draw(mix, 10, seed=1, split=split)]
        assert (found.count("copy"), found.count("sort")) == expected, split
    with pytest.raises(ConfigError, match="trunk_mix.0.weight: value 0 refused"):
        config(trunk_mix=[{"family": "copy", "weight": 0}])


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_the_rehearsed_text_is_supervised_and_the_trunks_whole(data, share):
    settings = config(specialists=[{**SPECIALIST, "rehearse": 1.0, "text_labels": share}])
    settings = settings.replace(text=settings.text.replace(share=1.0))
    plan = settings.specialists[0]
    train = settings.training_of(plan).replace(rows=40)
    assert supervised_share(specialist_mixture(data, settings, plan, train)) == pytest.approx(share, abs=0.02)
    assert (trunk_mixture(data, settings).batch(0).labels != IGNORE).all()


# Evidence


def test_silencing_removes_the_memory_and_nothing_else(model):
    """Beyond the attention's reach only the memory remembers: without it the past makes no difference."""
    ids = torch.randint(0, 320, (1, 24), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, 0] = (ids[0, 0] + 7) % 320
    far = model.config.reach + 1
    mute = ev.silence_memory(model)
    with torch.inference_mode():
        heard = (model(changed).logits - model(ids).logits)[0].abs().amax(-1)
        unheard = (mute(changed).logits - mute(ids).logits)[0].abs().amax(-1)
    assert heard[far:].max() > 1e-4, "the memory of the model itself must carry something, or this test says nothing"
    assert unheard[far:].max() == 0 and unheard[0] > 0
    changed_names = {n for (n, a), b in zip(model.state_dict().items(), mute.state_dict().values()) if not a.equal(b)}
    assert changed_names == {"blocks.1.gated.out_norm.weight"}, "and the model measured stays as it was"


def test_a_threshold_of_one_takes_every_step(model):
    ids = torch.randint(0, 320, (4, 16), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        never, at_once = (ev.with_threshold(model, t)(ids).steps for t in (1.0, 1e-12))
    assert (never == 3).all() and (at_once == 1).all()
    assert ev.with_threshold(model, 0.3).config.act_threshold == 0.3 and model.config.act_threshold != 0.3


def test_chance_is_the_larger_of_the_declared_and_the_majority():
    compare = [Problem("compare", 1, f"compare {i}", "<") for i in range(3)] + [Problem("compare", 1, "compare x", ">")]
    mix = (GymMix(family="compare"), GymMix(family="copy"))
    assert chance_of(mix, compare) == pytest.approx(0.75)
    even = [Problem("compare", 1, f"compare {i}", str(i)) for i in range(4)]
    assert chance_of(mix, even) == pytest.approx(0.5), "the declared one"
    spread = [Problem("copy", 1, f"copy {i}", str(i)) for i in range(96)]
    assert chance_of(mix, spread) == pytest.approx(1 / 96)
    assert chance_of(mix, compare + spread) == pytest.approx((4 * 0.75 + 96 / 96) / 100), "problems count alike"


@pytest.mark.parametrize("pairs", [2, 4])
def test_chance_knows_the_options_of_its_mix_and_nobody_beats_it_without_the_key(pairs):
    mix = (GymMix(family="far_recall", levels=(1, 2), options={"pairs": pairs}),)
    problems = held_out(mix, 1000)
    chance = chance_of(mix, problems)
    assert chance == pytest.approx({2: 0.55, 4: 0.3825}[pairs], abs=0.004)
    shown = [Counter(c for c in p.prompt if c.isdigit()).most_common(1)[0][0] for p in problems]
    blind = np.mean([digit == p.answer for digit, p in zip(shown, problems)])
    assert blind <= chance + 4 * (chance * (1 - chance) / len(problems)) ** 0.5


def test_accuracy_by_level():
    problems = [Problem("copy", 1, "a", "a"), Problem("copy", 1, "b", "b"), Problem("sort", 2, "c", "c")]
    scores = SimpleNamespace(right=np.array([1.0, 0.0, 1.0]))
    assert by_level(problems, scores.right) == {"copy/1": 0.5, "sort/2": 1.0}


def test_the_far_test_lies_beyond_all_that_attention_reaches(model):
    part = ev.far_mix(config(), model)
    assert part.family == "far_recall" and part.options["gap"] >= model.config.reach
    assert ev.far_mix(config(evaluation={"far_gap": 77}), model).options["gap"] == 77


def evidence_of(claim: str, verdict: str) -> Evidence:
    values = {
        "claim": claim,
        "metric": "exact_match",
        "before": 0.1,
        "after": 0.5,
        "baseline": None,
        "ci95": (0.1, 0.7),
    }
    return Evidence.build(
        {**values, "n": 40, "seeds": (1,), "split": "report", "chance": 0, "compute": {}, "verdict": verdict}
    )


def test_the_gate_needs_every_claim_and_every_one_improved():
    settings = config()
    claims = [ev.trunk_claim("copy"), ev.trunk_claim("compare")]
    claims += [ev.own_claim(plan.name) for plan in settings.specialists]
    gate = ev.gate(settings, "stop")
    improved = [evidence_of(claim, "improved") for claim in claims]
    assert gate.policy == "stop" and gate.decide(improved).passed
    for i, claim in enumerate(claims):
        missing = gate.decide(improved[:i] + improved[i + 1 :])
        assert not missing.passed and f"no: {claim} needs improved, there is no evidence for it" in missing.reasons
        for verdict in ("no-difference", "worse", "no-signal"):
            assert not gate.decide([*improved[:i], evidence_of(claim, verdict), *improved[i + 1 :]]).passed


def test_measure_claims_what_the_phase_promises(data, model):
    settings = config()
    subjects = [ev.Subject(plan, model, plan.name) for plan in settings.specialists]
    found, tables = ev.measure(settings, model, model, subjects, data)
    claims = [e.claim for e in found]
    assert len(claims) == len(set(claims))
    for part in ("trunk learned copy", "trunk models held-out text", "reasoning on memory_integration"):
        assert part in claims
    assert any("beyond the attention window" in c for c in claims) and any("halting" in c for c in claims)
    # Everything was measured on one and the same model: nothing may have improved or become worse but by halting.
    same = [e for e in found if "halt" not in e.claim and "attention window" not in e.claim]
    assert {e.verdict for e in same} <= {"no-difference", "no-signal"}
    assert all(e.split == "report" for e in found)
    assert set(tables["levels"]) == {"trunk", "reasoning", "memory_integration"}
    trunk = ["trunk, its skills", "trunk, text"]
    others = [f"{name}, {what}" for name in ("reasoning", "memory_integration") for what in ("its speciality", "text")]
    assert list(tables["act_histogram"]) == trunk + others
    for shares in tables["act_histogram"].values():
        assert list(shares) == ["1", "2", "3"] and sum(shares.values()) == pytest.approx(1, abs=1e-3)


def test_the_plain_family_of_the_ablation_has_the_same_shape():
    shape = load_profile("nano").model_config_solved()
    plain = plain_shape(shape)
    assert plain.family == "gpt"
    for field in ("d_model", "n_layers", "n_heads", "vocab_size", "window", "max_seq_len"):
        assert getattr(plain, field) == getattr(shape, field), field
    assert plain.parameters() == pytest.approx(shape.parameters(), abs=shape.d_model * shape.n_layers)


def test_the_ablations_compare_at_equal_flops_and_each_side_is_trained(data, model, tmp_path):
    far = {**FAR, "train": {"seq_len": 96}}
    trunk = {"steps": 12, "rows": 6, "seq_len": 32, "seed": 42}
    settings = config(trunk=trunk, specialists=[SPECIALIST, far])
    subjects = [ev.Subject(plan, model, plan.name) for plan in settings.specialists]
    shown = []
    found = ablations(Bench(settings, data, model, subjects, shown.append, tmp_path))
    sides = ("the plain family", "the same family without recursion")
    equal = [
        f"the trunk beats {side} at equal training FLOPs ({what})" for side in sides for what in ("skills", "text")
    ]
    both = [plan.name for plan in settings.specialists]
    halts = [f"{name} is better with recursion than without, at equal training FLOPs" for name in both]
    memory = "trained with a memory, recall beyond the window is better than trained without"
    longer = "reasoning beats a trunk trained on for as long on its speciality"
    assert [e.claim for e in found] == [*equal, *halts, memory, longer] and all(e.split == "report" for e in found)
    share = supervised_share(trunk_mixture(data, settings))
    shapes = (plain_shape(model.config), model.config.replace(t_max=0))
    for shape, (skill, text) in zip(shapes, (found[:2], found[2:4])):
        step = 6 * 32 * shape.train_flops_per_token(32, share)
        spent = 12 * 6 * 32 * model.config.train_flops_per_token(32, share)
        assert skill.compute == text.compute and skill.compute["train_flops"] == pytest.approx(spent)
        assert skill.compute["other_steps"] > 12 and abs(skill.compute["other_steps"] * step - spent) <= step / 2
    ends = {p.stage: p.done for p in shown}
    more = [e.compute["other_steps"] for e in (found[0], found[2])]
    names = ("plain family", "same family without recursion", "memory none", "memory titans", "trunk trained on")
    halting = {f"{e.claim.split()[0]} without recursion": e.compute["other_steps"] for e in found[4:6]}
    assert ends == {**dict(zip(names, (*more, 8, 8, 2))), **halting} and list(halting) == [
        f"{n} without recursion" for n in both
    ]
    assert found[6].compute["gap_words"] > model.config.reach


def test_interrupted_ablations_go_on_from_their_checkpoints(data, model, tmp_path):
    settings = config(trunk={"steps": 12, "rows": 6, "seq_len": 32, "seed": 42, "checkpoint_every": 4})
    shape, mixture, shown = model.config, trunk_mixture(data, settings), []

    def stop(progress):
        shown.append(progress.done)
        if len(shown) == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Bench(settings, data, model, [], stop, tmp_path).train(shape, settings.trunk, mixture, "one side")
    again = Bench(settings, data, model, [], stop, tmp_path).train(shape, settings.trunk, mixture, "one side")
    assert shown == list(range(1, 13))
    whole = Bench(settings, data, model, [], lambda p: None).train(shape, settings.trunk, mixture, "one side")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), whole.state_dict().values()))


def test_a_trunk_without_recursion_is_compared_with_one_that_has_it(model):
    still, plan = model.config.replace(t_max=0), config().specialists[0]
    assert recursion_switched(still, [ev.Subject(plan, model, "x")]) == {"the same family with recursion": model.config}
    assert recursion_switched(still, []) == {}


# The card


def test_the_card_tells_the_models_own_numbers(data, model):
    shape, train = model.config, config().trunk
    text = card("reasoning", shape, train, {"final_loss": 1.23456}, data)
    assert text.startswith("# reasoning\n") and "the reasoning specialist" in text
    assert f"**{shape.parameters():,}**" in text and "1.235 nats" in text and "seed 42" in text
    for part, count in shape.split().items():
        assert f"| {part} | {count:,} |" in text
    for note in data.notes:
        assert f"- {note}" in text
    assert "common ancestor" in card("trunk", shape, train, {"final_loss": 1.0}, data)
