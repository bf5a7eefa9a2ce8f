"""Prompt baking: equalities first, then that it does what it says, then what it refuses."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

from agent_forge.cli.commands_bake import pair_of
from agent_forge.prompt_baking import BakingTask, PromptBakingConfig, bake_prompt, baking_evidence
from agent_forge.prompt_baking.adapters import Adapters, linear_maps
from agent_forge.prompt_baking.contexts import default_contexts, divided
from agent_forge.prompt_baking.divergence import chunk_size, divergence, likelihoods
from agent_forge.prompt_baking.evidence import agreement, exact_task, gym_tasks, scores_of
from agent_forge.prompt_baking.folders import BakePlan, bake_folder
from agent_forge.prompt_baking.sides import sides_of
from agent_forge.prompt_baking.trajectories import Lessons, Trajectory, answers_read
from forgekit.data.tokenizer import chat_text, question, train_tokenizer
from forgekit.errors import ArtifactError, ConfigError, DataError, ResourceError
from forgekit.infer.engine import Engine
from forgekit.models.constants import IGNORE
from forgekit.models.io import read_model, write_model
from forgekit.store.artifact import Artifact, Manifest, write_artifact
from tests.unit.tiny import gpt_config, made, same, trm_config, weights

TOKENIZER = train_tokenizer(["hello world, this is some text with digits 123 and äöü. "] * 5, 310)
V = TOKENIZER.get_vocab_size()
PROMPT = "digits text 123 digits text 123"
CONTEXTS = tuple(f"{word} {number}" for word in ("hello", "text", "digits") for number in range(8))
QUICK = {
    "max_tokens": 6,
    "trajectories": 32,
    "held_out": 12,
    "rows": 8,
    "num_epochs": 6,
    "learning_rate": 0.01,
    "rank": 4,
    "alpha": 4,
    "device": "cpu",
    "micro_batch": 8,
}


def tiny(family: str = "gpt", seed: int = 0) -> torch.nn.Module:
    """A model whose answers depend on what stands before the question."""
    values = {"vocab_size": V, "max_seq_len": 64, "emb_rank": 8, "window": 32}
    config = {"gpt": gpt_config, "trm_titans": trm_config}[family](**values)
    return made(config, seed=seed, stir=0.2).eval()


def baked(model, prompt=PROMPT, contexts=CONTEXTS, **changes):
    config = PromptBakingConfig.build({**QUICK, **changes})
    return bake_prompt(model, prompt, config, tokenizer=TOKENIZER, contexts=contexts)


@pytest.fixture(scope="module")
def gpt():
    return tiny()


@pytest.fixture(scope="module")
def full(gpt):
    return baked(gpt)


# ---- equalities


def test_baking_the_empty_change_returns_the_model_bit_for_bit(gpt):
    result = baked(gpt, num_epochs=0)
    assert same(weights(result.model), weights(gpt)) and result.model is not gpt
    assert result.divergence_before == result.divergence_after and result.losses == []


@pytest.mark.parametrize("family", ["gpt", "trm_titans"])
def test_adapters_start_silent_and_merged_equal_unmerged(family):
    model = tiny(family)
    ids = torch.randint(40, V, (3, 9), generator=torch.Generator().manual_seed(0))
    before, plain, flags = weights(model), model(ids).logits, [p.requires_grad for p in model.parameters()]
    adapters = Adapters(model, PromptBakingConfig.build(QUICK))
    assert torch.equal(model(ids).logits, plain)
    trained = {id(p) for p in adapters.parameters.values()}
    assert trained == {id(p) for p in model.parameters() if p.requires_grad} and trained
    with torch.no_grad():
        for p in adapters.parameters.values():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
    moved = model(ids).logits
    assert not torch.allclose(moved, plain, atol=1e-2)
    adapters.scale(0.0)
    torch.testing.assert_close(model(ids).logits, plain)
    adapters.scale(1.0)
    adapters.merge()
    torch.testing.assert_close(model(ids).logits, moved, rtol=1e-4, atol=1e-4)
    assert weights(model).keys() == before.keys() and not hasattr(model, "peft_config")
    assert [p.requires_grad for p in model.parameters()] == flags


def test_adapters_taken_out_leave_nothing(gpt):
    model = copy.deepcopy(gpt)
    kinds = [type(m) for m in model.modules()]
    adapters = Adapters(model, PromptBakingConfig.build(QUICK))
    with torch.no_grad():
        for p in adapters.parameters.values():
            p.add_(1.0)
    adapters.remove()
    assert same(weights(model), weights(gpt)) and [type(m) for m in model.modules()] == kinds


@pytest.mark.parametrize("family", ["gpt", "trm_titans"])
def test_adapters_are_on_what_is_called_and_hear_the_loss(family):
    model = tiny(family)
    names = linear_maps(model)
    assert "blocks.0.attn.wq" in names and not [n for n in names if "embedding" in n or "halt" in n]
    assert linear_maps(model, ("ffn.up",)) == ["blocks.0.ffn.up", "blocks.1.ffn.up"]
    adapters = Adapters(model, PromptBakingConfig.build(QUICK))
    with torch.no_grad():  # B starts at zero: A would get no gradient
        for p in adapters.parameters.values():
            p.add_(0.1)
    ids = torch.randint(40, V, (3, 9), generator=torch.Generator().manual_seed(0))
    model.read_out(model.features(ids, None, None)[0]).square().sum().backward()
    assert [n for n, p in adapters.parameters.items() if p.grad is None or not p.grad.any()] == []


def parts(rows=37, width=5, vocabulary=11):
    """Teacher and student features with heads of their own."""
    torch.manual_seed(0)
    heads = [torch.nn.Linear(width, vocabulary) for _ in range(2)]
    return torch.randn(rows, width), torch.randn(rows, width, requires_grad=True), tuple(heads)


def test_chunked_divergence_equals_the_definition_in_value_and_gradient():
    teacher, student, heads = parts()
    want = torch.nn.functional.kl_div(
        heads[1](student).log_softmax(-1), heads[0](teacher).log_softmax(-1).detach(), reduction="none", log_target=True
    ).sum(-1)
    slope = torch.randn(len(want))
    want.backward(slope)
    wanted = [student.grad.clone(), heads[1].weight.grad.clone()]
    for chunk in (1, 8, 37, 100):
        student.grad, heads[1].weight.grad = None, None
        got = divergence(teacher, student, heads, chunk)
        torch.testing.assert_close(got, want)
        got.backward(slope)
        torch.testing.assert_close([student.grad, heads[1].weight.grad], wanted)
        assert heads[0].weight.grad is None, "nothing reaches the teacher"
    assert torch.equal(divergence(teacher, teacher, (heads[0], heads[0]), 8), torch.zeros(37))


def test_only_one_chunk_of_distributions_is_alive():
    """Counted where they are made: the widest tensor any head gives has the rows of a chunk."""
    teacher, student, heads = parts()
    seen = []

    def watched(h):
        seen.append(len(h))
        return heads[1](h)

    divergence(teacher, student, (heads[0], watched), 8).sum().backward()
    assert max(seen) == 8 and sum(seen) == 2 * 37, "every chunk once forward and once again backward"
    assert chunk_size(32768) * 32768 * 4 <= 64 * 2**20 and chunk_size(32768, 5) == 5


def test_likelihoods_are_those_of_the_tokens():
    teacher, _, heads = parts()
    ids = torch.arange(37) % 11
    want = heads[0](teacher).log_softmax(-1)[torch.arange(37), ids]
    torch.testing.assert_close(likelihoods(teacher, heads[0], ids, 8), want)


# ---- sides, answers, lessons


def test_the_sides_differ_by_the_prompt_alone(gpt):
    sides = sides_of(gpt, TOKENIZER)
    assert TOKENIZER.decode(sides.ids("hello"), skip_special_tokens=False) == question("hello")
    told = chat_text([{"role": "system", "content": PROMPT}, {"role": "user", "content": "hello"}], generate=True)
    assert TOKENIZER.decode(sides.ids("hello", PROMPT), skip_special_tokens=False) == told
    assert sides.notes == () and sides.limit == 64


def test_features_are_those_that_predict_the_answer(gpt):
    one = Trajectory(0, (40, 41, 42), (50, 51, 40, 41, 42), (60, 61, 1))
    short = Trajectory(1, (40,), (50, 40), (1,))
    for prompted, ids in ((False, [40, 41, 42, 60, 61]), (True, [50, 51, 40, 41, 42, 60, 61])):
        (found, last) = answers_read(gpt, [one, short], prompted)
        want = gpt(torch.tensor([ids])).logits[0, -3:]
        torch.testing.assert_close(gpt.read_out(found), want)
        assert last.shape == (1, 16)


def test_lessons_pass_over_every_answer_once_and_label_it_with_the_teachers_rows():
    found = [Trajectory(i, (9, 9, i), (7, 9, 9, i), tuple(range(20, 20 + n))) for i, n in enumerate((3, 1, 4, 2, 5))]
    lessons = Lessons(found, rows=2, seed=3)
    passes = [[lessons.batch(step) for step in range(3 * p, 3 * p + 3)] for p in range(2)]
    for batches in passes:
        rows = np.concatenate([b.labels[b.labels != IGNORE] for b in batches])
        assert sorted(rows.tolist()) == list(range(15))
    assert any(not np.array_equal(a.inputs, b.inputs) for a, b in zip(*passes)), "every pass has its own order"
    batch = lessons.batch(0)
    for ids, labels in zip(batch.inputs, batch.labels):
        at = np.flatnonzero(labels != IGNORE)
        number = int(ids[2])
        start = sum(len(one.answer) for one in found[:number])
        assert labels[at].tolist() == list(range(start, start + len(at)))
        assert ids[at].tolist() == [number, *found[number].answer[:-1]] and at[0] == 2
    assert np.array_equal(lessons.batch(1).inputs, Lessons(found, 2, 3).batch(1).inputs)


def test_contexts_to_train_decide_and_report_are_disjoint():
    for contexts in (default_contexts(80, 24, 0), divided(CONTEXTS, 0)):
        sets = [set(part) for part in (contexts.train, contexts.decide, contexts.report)]
        assert all(sets) and sum(map(len, sets)) == len(set.union(*sets))
    found = default_contexts(80, 24, 0)
    assert (len(found.train), len(found.decide), len(found.report)) == (80, 24, 24)
    assert found == default_contexts(80, 24, 0) != default_contexts(80, 24, 1)
    assert len({text.split()[0] for text in found.train}) > 12, "several families and prose"


# ---- what it does


@pytest.mark.parametrize("family", ["gpt", "trm_titans"])
def test_unprompted_comes_close_to_prompted_on_contexts_not_trained_on(family):
    model = tiny(family)
    before = weights(model)
    result = baked(model)
    assert result.divergence_before > 0.05 and result.divergence_after < 0.8 * result.divergence_before
    assert same(weights(model), before), "the given model is untouched"
    assert weights(result.model).keys() == before.keys() and not result.model.training
    frozen = {"embedding.table.weight", "embedding.lift.weight", "embedding.lower.weight", "norm.weight"}
    assert all(torch.equal(weights(result.model)[n], before[n]) for n in frozen)
    assert len(result.losses) == 24 and result.trajectories == {"train": 32, "decide": 12, "report": 12}


@pytest.mark.parametrize("family", ["gpt", "trm_titans"])
def test_the_divergence_told_is_that_of_the_two_models(family):
    """By full forward passes, answer by answer; where a recursion belongs to the head, the teacher keeps its own."""
    before = tiny(family)
    result = baked(before, num_epochs=2)
    for one, told in zip(result.held[0].trajectories[:4], result.after[0]):
        size = len(one.answer)
        teacher, student = (
            model(torch.tensor([ids])).logits[0, -size:].log_softmax(-1)
            for model, ids in ((before, one.ids(True)), (result.model, one.ids(False)))
        )
        assert (teacher.exp() * (teacher - student)).sum(-1).mean().item() == pytest.approx(told, abs=1e-5)


def test_same_seed_same_bits_and_another_seed_others(gpt, full):
    torch.manual_seed(17)  # what was drawn elsewhere must not matter
    assert same(weights(baked(gpt).model), weights(full.model))
    assert not same(weights(baked(gpt, seed=1).model), weights(full.model))


def test_strength_is_met_and_monotone(gpt, full):
    whole = full.stages[0]
    left = []
    for strength in (0.2, 0.4):
        stage = baked(gpt, strength=strength).stages[0]
        assert stage.after == pytest.approx((1 - strength) * stage.before, rel=0.01)
        assert stage.after <= (1 - strength) * stage.before and 0 < stage.scale <= 1
        left.append(stage.after)
    assert whole.before > left[0] > left[1] > whole.after
    early = baked(gpt, strength=0.05).stages[0]
    assert len(early.losses) < len(whole.losses), "it stops when the strength is reached"
    assert PromptBakingConfig(mode="half").share == 0.5 == PromptBakingConfig(strength=0.5).share


def test_a_strength_out_of_reach_is_told(gpt):
    result = baked(gpt, strength=0.99, num_epochs=1, learning_rate=1e-4)
    assert "strength 0.99 was not reached" in result.notes[-1] and result.stages[0].strength < 0.99


def test_the_best_look_is_what_is_kept(gpt):
    """A rate that only does harm leaves the model as it was."""
    result = baked(gpt, learning_rate=3.0, num_epochs=1)
    stage = result.stages[0]
    assert min(value for _, value in stage.checks) > stage.before == stage.after
    assert same(weights(result.model), weights(gpt))


def test_sequential_bakes_one_after_another(gpt):
    result = baked(gpt, ["be brief", "in digits"], mode="sequential")
    assert [stage.prompt for stage in result.stages] == ["be brief", "in digits"] == list(result.prompts)
    assert all(after.mean() < before.mean() for before, after in zip(result.before, result.after))
    first = baked(gpt, "be brief", mode="sequential")
    assert first.stages[0].losses == result.stages[0].losses


def test_pursuit_follows_its_own_prompted_self(gpt):
    result = baked(gpt, mode="pursuit", rounds=2)
    assert len(result.stages) == 2 and len(result.losses) == 48
    once = baked(gpt)
    assert result.stages[0].losses == once.losses
    assert result.stages[1].before != once.stages[0].after, "the second teacher is the prompted student"


def test_a_prompt_without_effect_is_told(gpt):
    model = copy.deepcopy(gpt)
    with torch.no_grad():
        for block in model.blocks:  # nothing moves between positions any more
            block.attn.wo.weight.zero_()
    result = baked(model, num_epochs=1)
    assert "changes nothing" in result.notes[0]


# ---- evidence


def test_evidence_reads_every_side(gpt, full):
    questions = tuple(f"hello {i} text" for i in range(24))
    seen = []

    def score(number, text):
        seen.append((number, text))
        return sum(map(ord, text)) % 97 / 97

    task = BakingTask("length", questions, score, chance=0.5, max_tokens=4)
    findings = baking_evidence(gpt, full, [task], [task])
    assert list(findings.table["tasks"]["length"]) == ["bare", "prompted", "baked", "re-prompted"]
    assert [n for n, _ in seen] == list(range(24)) * 6
    claims = {e.claim: e for e in findings.evidence}
    closer = claims["the unprompted answers are closer to the prompted model's"]
    assert closer.before == pytest.approx(full.divergence_before) and closer.after < closer.before
    r2 = findings.table["r2"]
    assert r2["bare"] < r2["baked"] <= 1 and len(claims) == 6
    for side, model, prompt in (
        ("prompted", gpt, PROMPT),
        ("baked", full.model, ""),
        ("re-prompted", full.model, PROMPT),
    ):
        want = scores_of(Engine(model, TOKENIZER), full, task, prompt).mean()
        assert findings.table["tasks"]["length"][side] == want
    assert len(set(findings.table["tasks"]["length"].values())) == 4


def test_agreement_is_about_the_identity():
    wanted = np.array([-1.0, -2.0, -4.0])
    assert agreement(wanted, wanted) == 1
    assert agreement(wanted, wanted - 5) < 0, "moving together is not agreeing"


def test_gym_tasks_score_answers_after_thoughts_or_without():
    tasks = {task.name: task for task in gym_tasks(3, levels=(1,))}
    task = tasks["sort"]
    answer = "".join(sorted(task.questions[0].split()[1]))
    assert task.score(0, answer) == task.score(0, f"<think>4<5</think>{answer}") == 1.0
    assert task.score(0, f"<think>{answer}") == 0.0 and len(task.questions) == 3


# ---- refusals


@pytest.mark.parametrize("strength", [0, -0.5, 1.5, float("nan")])
def test_strength_outside_its_range_is_refused_by_name(strength):
    with pytest.raises(ConfigError, match="strength"):
        PromptBakingConfig.build({"strength": strength})


def test_contradictions_are_refused(gpt):
    with pytest.raises(ConfigError, match="strength 1 is not half"):
        PromptBakingConfig.build({"mode": "half", "strength": 1})
    with pytest.raises(ConfigError, match="did you mean num_epochs"):
        PromptBakingConfig.build({"num_epoch": 1})
    with pytest.raises(ConfigError, match="2 prompts in mode full"):
        baked(gpt, ["a", "b"])
    with pytest.raises(ConfigError, match="give the text"):
        baked(gpt, [])
    with pytest.raises(ConfigError, match="'nothing' fits no linear map"):
        baked(gpt, targets=("nothing",))
    assert PromptBakingConfig.build({"lora_r": 7}).rank == 7


def test_an_empty_prompt_is_refused(gpt):
    for prompt in ("", " \n"):
        with pytest.raises(ConfigError, match="prompt: is empty"):
            baked(gpt, prompt)


def test_what_is_longer_than_the_models_context_is_refused(gpt):
    with pytest.raises(DataError, match="more than the model's 64"):
        baked(gpt, "digits " * 40)
    with pytest.raises(DataError, match="with the context 'hello hello"):
        baked(gpt, contexts=["hello " * 30, "a", "b", "c"])
    with pytest.raises(DataError, match="more than the model's 64"):
        baked(gpt, contexts=None, max_tokens=60)


def test_without_peft_it_says_so_before_it_begins(gpt, monkeypatch):
    monkeypatch.setattr("agent_forge.prompt_baking.adapters.find_spec", lambda name: None)
    seen = []
    with pytest.raises(ResourceError, match="needs the package peft; pip install peft"):
        config = PromptBakingConfig.build(QUICK)
        bake_prompt(gpt, PROMPT, config, tokenizer=TOKENIZER, contexts=CONTEXTS, show=seen.append)
    assert seen == []


def test_too_few_contexts_are_refused(gpt):
    with pytest.raises(DataError, match="2 different contexts"):
        baked(gpt, contexts=["a", "b", "a", " "])


def test_a_failure_leaves_the_given_model_alone(gpt):
    before = weights(gpt)

    def stop(progress):
        if progress.stage == "baking" and progress.done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        config = PromptBakingConfig.build(QUICK)
        bake_prompt(gpt, PROMPT, config, tokenizer=TOKENIZER, contexts=CONTEXTS, show=stop)
    assert same(weights(gpt), before) and all(p.requires_grad for p in gpt.parameters())


# ---- folders


@pytest.fixture
def artifact(tmp_path, gpt):
    folder = tmp_path / "parent"
    values = {"parameters": 5, "size_mb": 0.0, "seeds": [1]}
    manifest = Manifest.describe("session-1", "cognate", "parent", values)
    return write_artifact(folder, lambda work: write_model(gpt, TOKENIZER, work), manifest)


def plan_for(folder, tmp_path, **changes):
    values = {"source": folder, "output": tmp_path / "out", "prompts": (PROMPT,), "contexts": CONTEXTS, "problems": 0}
    return BakePlan.build({**values, "bake": QUICK, **changes})


def test_an_artifact_becomes_an_artifact_with_its_lineage(artifact, tmp_path, full):
    receipt = bake_folder(plan_for(artifact.path, tmp_path))
    made_ = Artifact.open(tmp_path / "out")
    assert made_.manifest.parents == [artifact.manifest.model_id] and made_.manifest.phase_name == "baking"
    assert made_.manifest.model_id == receipt["model_id"] and made_.manifest.session_id == "session-1"
    model, _ = read_model(made_.path)
    assert same(weights(model), weights(full.model))
    assert [e["claim"] for e in made_.evidence] == [e["claim"] for e in receipt["evidence"]]
    text = (made_.path / "README.md").read_text(encoding="utf-8")
    assert PROMPT in text and json.dumps(receipt["prompts"][0]["sha256"]) in text
    assert receipt["prompts"][0]["divergence_after"][0] == pytest.approx(full.divergence_after)
    with pytest.raises(ArtifactError, match="exists already"):
        bake_folder(plan_for(artifact.path, tmp_path))


def test_gym_families_that_do_not_fit_are_left_out(artifact, tmp_path):
    receipt = bake_folder(plan_for(artifact.path, tmp_path, problems=3, bake={**QUICK, "num_epochs": 0}))
    assert receipt["kept"] == {}, "96 tokens of answer have no room in a context of 64"


def test_a_task_file_has_a_question_and_its_answer_on_every_line():
    assert pair_of("add 1 2\t3 ") == ("add 1 2", "3")
    for wrong in ("add 1 2 3", "\t3", "add 1 2\t "):
        with pytest.raises(DataError, match="question TAB answer"):
            pair_of(wrong)
    task = exact_task("sums", [("add 1 2", "3"), ("add 2 2", "4")])
    assert [task.score(0, "<think><step>1+2+0=3</think>3"), task.score(0, "4"), task.score(1, " 4")] == [1, 0, 1]
