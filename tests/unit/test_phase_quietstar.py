"""Phase 3 in parts: settings, data, trainings that resume, looking at thoughts, evidence, the phase at its smallest."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripted import Scripted
from tiny import Echo, Events, gpt_config, made, same, train_config, weights

from agent_forge.phases.quietstar import evidence as ev
from agent_forge.phases.quietstar.config import LEAST_TRACES, QuietStarConfig
from agent_forge.phases.quietstar.data import prepare, talking, teaching, validation_batch
from agent_forge.phases.quietstar.evidence import Finals
from agent_forge.phases.quietstar.talk import QuietTalker
from agent_forge.phases.quietstar.talk_config import Marks, PointPlan, TalkConfig
from agent_forge.phases.quietstar.training import History, Piece, Workshop
from agent_forge.phases.quietstar.watching import (
    Watched,
    answers,
    by_kind,
    examples,
    slips_noticed,
    valid_share,
    watch,
)
from agent_forge.pipeline import plan as pipeline_plan
from agent_forge.pipeline.handoff import CONTRACTS, ModelHandoffValidator
from agent_forge.pipeline.orchestrator import PipelineOrchestrator
from agent_forge.pipeline.phase import PHASES, PhaseContext
from agent_forge.pipeline.plan import forecast_run
from agent_forge.profile import ModelPlan, Profile, load_profile
from forgekit.data.gym import Problem, split_of
from forgekit.data.plans import GymMix, TextPlan, minus
from forgekit.data.thoughts import CLOSE, OPEN, STRATEGIES, check, write_traces
from forgekit.data.thoughts.form import DOUBT, STEP
from forgekit.data.tokenizer import END, SYSTEM, THINKING, train_tokenizer
from forgekit.errors import ConfigError, DataError
from forgekit.measure.coherence import Coherence
from forgekit.measure.scores import TextScores
from forgekit.measure.theater import TheaterConfig, Thought, anti_theater
from forgekit.models.io import read_model
from forgekit.store.storage import ModelStorage

torch.set_num_threads(1)
WORDS = "the quick brown fox jumps over the lazy dog, while 0123456789 add track counts + - = . " * 40
ADD = {"family": "add", "levels": [2]}
TRACES = {"mix": [{"family": "state", "levels": [2]}, ADD], "per_level": 900}
SKILLS = [{"family": "copy", "levels": [1]}, {"family": "state", "levels": [1, 2]}]
TEXT = {"names": ["python_prose"], "bytes_each": 60_000}
OPTIMIZER = {"lr": 0.01, "fallback_lr": 0.01}
TRAIN = {"steps": 2, "rows": 4, "seq_len": 48, "log_every": 1, "checkpoint_every": 1, "optimizer": OPTIMIZER}
POINTS = {"most": 1, "min_length": 2, "max_length": 4}
SMALL = {
    "traces": TRACES,
    "teach": {"train": TRAIN, "pool": 20},
    "quiet": {
        "train": {**TRAIN, "steps": 4, "rows": 2, "optimizer": {**OPTIMIZER, "kl_coefficient": 0.1}},
        "talk": {"thoughts": 2, "ahead": 2, "points": POINTS},
        "validations": 4,
        "watched": 2,
        "rows": 4,
    },
    "text": TEXT,
    "theater": {"thinking_budget": 6},
    "evaluation": {"problems": 10, "skills": 10, "select": 4, "windows": 4, "length": 32},
}


def config(**changes) -> QuietStarConfig:
    return QuietStarConfig.build({**SMALL, **changes}, path="phases.quietstar")


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([WORDS], 320)


@pytest.fixture(scope="module")
def data(tokenizer):
    practised = [GymMix.build(part, "speciality") for part in SKILLS]
    return prepare(config(), tokenizer, practised, TextPlan(), None)


# Settings


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"traces": {"strategies": {"mece": 1, "guess": 1}}}, "unknown thinking strategy 'guess'"),
        ({"traces": {"strategies": {"mece": 0}}}, "phases.quietstar.traces.strategies.mece: value 0 refused"),
        ({"teach": {"direct": 0.4, "skills": 0.4, "text": 0.2}}, "direct, skills and text take 1 of the rows"),
        ({"quiet": {"train": {"steps": 3}}}, "4 validations need as many steps, train.steps is 3"),
        ({"quiet": {"validations": 5}}, "phases.quietstar.quiet.validations: value 5 refused"),
        ({"traces": {"mix": [ADD, ADD]}}, "add level 2 is there twice"),
        ({"grace": 1.5}, "phases.quietstar.grace: value 1.5 refused"),
        ({"tracess": {}}, "tracess: unknown key; did you mean traces"),
    ],
)
def test_settings_are_refused_by_name(changes, told):
    with pytest.raises(ConfigError) as caught:
        QuietStarConfig.build(changes, path="phases.quietstar")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_few_steps_are_enough_where_step_two_is_switched_off():
    assert not QuietStarConfig.build({"quiet": {"run": False, "train": {"steps": 1}}}, "phases.quietstar").quiet.run


def test_the_plan_of_a_run_counts_every_training(monkeypatch):
    monkeypatch.setattr(pipeline_plan, "training_speed", lambda profile, seq_len: 1e9)  # measured in test_plan.py
    plan = forecast_run(load_profile("pico").replace(threads=1))
    rows = {row["stage"]: row for row in plan["stages"] if row["phase"] == "quietstar"}
    assert list(rows) == [
        "thinking, step 1",
        "control without thoughts",
        "thinking, step 2",
        "control at equal compute",
    ]
    assert rows["thinking, step 1"]["steps"] == 60 and rows["thinking, step 1"]["tokens"] == 3 * 60 * 16 * 64
    assert rows["thinking, step 2"]["tokens"] == rows["control at equal compute"]["tokens"] > 8 * 4 * 48
    assert all(row["seconds"] > 0 for row in rows.values())
    only = config(quiet={"run": False}).forecast()
    assert [row["stage"] for row in only] == ["thinking, step 1", "control without thoughts"]


# Data


def test_too_few_traces_are_refused(tokenizer):
    few = config(traces={**TRACES, "per_level": 100})
    with pytest.raises(DataError) as caught:
        prepare(few, tokenizer, [GymMix(family="copy")], TextPlan(), None)
    told = str(caught.value)
    assert (
        told.startswith("phases.quietstar.traces: ") and f"distinct verified traces, {LEAST_TRACES} are needed" in told
    )
    assert told.endswith("raise per_level or add families and levels") and "\n" not in told


def test_nobody_knows_what_the_parent_can_do(tokenizer):
    """All it practised is what it learns to think about: nothing is left that could be kept."""
    with pytest.raises(DataError, match="phases.quietstar.skills: nobody knows what the parent can do; name it: --set"):
        prepare(config(), tokenizer, [GymMix(family="add", levels=(2,))], TextPlan(), None)


def test_settings_name_the_skills_before_the_manifest_does(tokenizer):
    named = config(skills=[{"family": "sort", "levels": [1]}])
    found = prepare(named, tokenizer, [GymMix(family="copy")], TextPlan(), None)
    assert {p.family for p in found.skills} == {"sort"}


def test_traces_are_enough_and_the_splits_share_no_question(data):
    assert len(data.book.traces) >= LEAST_TRACES
    prompts = {
        "train": {trace.problem.prompt for trace in data.book.traces},
        "select": {p.prompt for p in data.select},
        "report": {p.prompt for p in data.report},
    }
    for split, asked in prompts.items():
        assert asked and {split_of(prompt) for prompt in asked} == {split}
    assert {split_of(p.prompt) for p in data.skills} == {"report"}
    cells = {(p.family, p.level) for p in data.skills}
    assert cells == {("copy", 1), ("state", 1)}, "state 2 is what it learns to think about"
    assert any(f"{len(data.book.traces):,} distinct and verified" in note for note in data.notes)


def test_another_split_of_the_mix_changes_the_fingerprint(tokenizer, data):
    other = config(traces={**TRACES, "seed": 32})
    assert prepare(other, tokenizer, data.skill_mix, TextPlan(), None).data_hash != data.data_hash
    assert prepare(config(), tokenizer, data.skill_mix, TextPlan(), None).data_hash == data.data_hash


def thinking_ids(tokenizer) -> set[int]:
    return {tokenizer.token_to_id(name) for name in THINKING}


def test_what_learns_without_thoughts_sees_none(tokenizer, data):
    marks, plan = thinking_ids(tokenizer), config()
    plain, quiet = teaching(plan, data, False), talking(plan, data)
    for step in range(6):
        for batch in (plain.batch(step), quiet.batch(step)):
            assert not marks & set(batch.inputs.ravel().tolist()) and not marks & set(batch.labels.ravel().tolist())
    thoughts = [teaching(plan, data, True).batch(step) for step in range(6)]
    opens = sum(int((b.labels == tokenizer.token_to_id(OPEN)).sum()) for b in thoughts)
    closes = sum(int((b.labels == tokenizer.token_to_id(CLOSE)).sum()) for b in thoughts)
    assert opens > 6 and closes > 6, "both markers are learned where there are thoughts"


def test_rehearsed_skills_hear_the_messages_that_ask_for_a_strategy(data):
    plan = config()
    known = next(source for source, share in teaching(plan, data, True).sources if share == plan.teach.skills)
    texts = data.tokenizer.decode(known.tokens.tolist(), skip_special_tokens=False).split(END)
    messages = [text.removeprefix(SYSTEM) for text in texts if text.startswith(SYSTEM)]
    assert set(messages) == set(STRATEGIES.names())
    assert len(messages) / len(known.size) == pytest.approx(plan.traces.told, abs=0.15)
    assert not thinking_ids(data.tokenizer) & set(known.tokens.tolist()), "and are answered at once"
    assert any(text.startswith("<|user|>") for text in texts)


def test_the_validation_rows_are_of_their_split_and_always_the_same(tokenizer, data):
    batch = validation_batch(config(), data, "report")
    again = validation_batch(config(), data, "report")
    assert len(batch.inputs) == 4 and np.array_equal(batch.inputs, again.inputs)
    text = tokenizer.decode([int(i) for i in batch.inputs.ravel()], skip_special_tokens=False)
    asked = [part.split(END)[0] for part in text.split("<|user|>")[1:]]
    whole = [p for p in asked[:-1] if p.startswith(("add ", "track "))]
    assert whole and {split_of(prompt) for prompt in whole} == {"report"}


def test_a_mix_without_another():
    mix = [GymMix(family="add", levels=(1, 2)), GymMix(family="copy", levels=(1,)), GymMix(family="add", levels=(2, 3))]
    left = minus(mix, [GymMix(family="add", levels=(1,))])
    assert [(part.family, part.levels) for part in left] == [("add", (2,)), ("copy", (1,)), ("add", (3,))]
    assert minus(mix, mix) == ()


# Trainings that are found again and go on


class Interrupted:
    """A place to train in whose observer is interrupted at some sign of life."""

    def __init__(self, folder: Path, stop_at: int | None = None) -> None:
        self.stop_at, self.seen, self.logger = stop_at, [], Events()
        self.context = SimpleNamespace(folder=folder, logger=self.logger, show=self.show)

    def show(self, progress) -> None:
        self.seen.append((progress.done, progress.note))
        if progress.done == self.stop_at:
            raise KeyboardInterrupt

    def workshop(self, key: str = "k" * 12) -> Workshop:
        return Workshop(self.context, key)


PLAN = PointPlan(most=1, interval=3, min_length=2, max_length=4)
MARKS = Marks(start=1, stop=2, forbidden=(0,))


def ordinary() -> torch.nn.Module:
    return made(gpt_config(), stir=0.1)


def talker() -> QuietTalker:
    model = ordinary()
    return QuietTalker(model, MARKS, TalkConfig(thoughts=2, ahead=2, points=PLAN), made(gpt_config(), stir=0.1), 0.1)


KINDS = pytest.mark.parametrize("make", [ordinary, talker])
PIECE = train_config(steps=7, checkpoint_every=3, log_every=2, keep_checkpoints=2)
LOOKS = frozenset({4, 7})


def work(place: Interrupted, make=ordinary, key: str = "k" * 12, look=None, train=PIECE):
    torch.manual_seed(5)
    model = make()
    torch.manual_seed(6)
    looking = look or (lambda step: {"watched": {"step": step}})
    record = place.workshop(key).train(Piece("step 2", model, Echo(length=12), train), (LOOKS, looking))
    return model, record


def piece(folder: Path) -> Path:
    (path,) = folder.glob("pieces/*.safetensors")
    return path


@KINDS
def test_a_finished_piece_is_taken_over_bit_for_bit(tmp_path, make):
    model, record = work(Interrupted(tmp_path), make)
    again = Interrupted(tmp_path)
    other, found = work(again, make, look=lambda step: pytest.fail("nothing is looked at again"))
    assert same(weights(model), weights(other)) and found == record and not other.training
    assert again.logger.seen == [] and again.seen == [(7, "already made")]
    assert list(record["history"]) == ["2", "4", "6", "7"]
    assert record["history"]["7"]["watched"] == {"step": 7} and len(record["losses"]) == 7
    assert not list(tmp_path.glob("checkpoints/*"))


@KINDS
@pytest.mark.parametrize("stop_at", [1, 3, 4, 5, 7])
def test_an_interrupted_training_goes_on_as_if_nothing_had_been(tmp_path, make, stop_at):
    whole, record = work(Interrupted(tmp_path / "whole"), make)
    with pytest.raises(KeyboardInterrupt):
        work(Interrupted(tmp_path / "parts", stop_at), make)
    model, found = work(Interrupted(tmp_path / "parts"), make)
    assert same(weights(model), weights(whole)) and found == record


@pytest.mark.parametrize("stop_at", [4, 7])
def test_what_was_interrupted_while_it_was_looked_at_is_looked_at_again(tmp_path, stop_at):
    whole, record = work(Interrupted(tmp_path / "whole"))

    def interrupted(step: int):
        if step == stop_at:
            raise KeyboardInterrupt
        return {"watched": {"step": step}}

    with pytest.raises(KeyboardInterrupt):
        work(Interrupted(tmp_path / "parts"), look=interrupted)
    model, found = work(Interrupted(tmp_path / "parts"))
    assert same(weights(model), weights(whole)) and found == record


def damage_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damage_nothing_left(path: Path) -> None:
    path.write_bytes(b"")


def damage_other(path: Path) -> None:
    from safetensors.torch import save

    path.write_bytes(save({"a": torch.ones(1)}))


def damage_record(path: Path) -> None:
    from safetensors.torch import save

    path.write_bytes(save({"a": torch.ones(1)}, {"record": "{half"}))


@pytest.mark.parametrize("damage", [damage_half, damage_nothing_left, damage_other, damage_record])
def test_a_damaged_piece_is_made_again(tmp_path, damage):
    model, record = work(Interrupted(tmp_path))
    good = piece(tmp_path).read_bytes()
    damage(piece(tmp_path))
    again, found = work(Interrupted(tmp_path))
    assert same(weights(model), weights(again)) and found == record and piece(tmp_path).read_bytes() == good


def test_a_half_written_piece_is_no_piece(tmp_path):
    work(Interrupted(tmp_path))
    path = piece(tmp_path)
    path.rename(path.with_name(f"{path.name}.1.unfinished"))
    place = Interrupted(tmp_path)
    work(place)
    assert place.seen[-1][1] != "already made" and path.is_file()


def test_other_settings_or_data_do_not_go_on_from_it(tmp_path):
    work(Interrupted(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        work(Interrupted(tmp_path, 5), key="p" * 12)
    place = Interrupted(tmp_path)
    model, record = work(place, key="q" * 12)
    assert [done for done, _ in place.seen] == [1, 2, 3, 4, 5, 6, 7], "from the first step"
    assert not any("resumed" in kind for kind, _ in place.logger.seen)


def test_a_damaged_history_is_made_again(tmp_path):
    whole, record = work(Interrupted(tmp_path / "whole"))
    with pytest.raises(KeyboardInterrupt):
        work(Interrupted(tmp_path / "parts", 5))
    (path,) = (tmp_path / "parts").glob("checkpoints/*/history.json")
    damage_half(path)
    model, found = work(Interrupted(tmp_path / "parts"))
    assert same(weights(model), weights(whole)) and found == record


def test_clearing_leaves_neither_pieces_nor_checkpoints(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        work(Interrupted(tmp_path, 5), key="p" * 12)
    place = Interrupted(tmp_path)
    work(place)
    place.workshop().clear()
    assert list(tmp_path.iterdir()) == []
    place.workshop().clear()


def test_a_history_forgets_what_comes_again(tmp_path):
    history = History(tmp_path / "history.json")
    for step in (2, 4, 6, 10):
        history.add(step, {"loss": float(step)})
    again = History(tmp_path / "history.json")
    assert again.rows == history.rows
    again.add(4, {"loss": 0.5})
    assert History(tmp_path / "history.json").rows == {"2": {"loss": 2.0}, "4": {"loss": 0.5}}


# Looking at thoughts


def problem(family: str, prompt: str, answer: str, level: int = 2) -> Problem:
    return Problem(prompt=prompt, answer=answer, family=family, level=level)


ASKED = [
    problem("add", "add 38 25", "63"),
    problem("add", "add 12 30", "42"),
    problem("add", "add 41 17", "58"),
    problem("state", "track 1 +3 -3", "1"),
]
THOUGHT = [
    "<expert>clerk<step>8+5+0=13<step>3+2+1=6",
    "<expert>clerk<step>2+0+0=3<step>1+3+0=4",
    "no marker at all",
    "<step>1+3=4<step>4-3=1",
]


def looked_at() -> Watched:
    right = [True, False, False, True]
    thoughts = [
        Thought([1, 2], text, answered, p.answer if answered else "9")
        for p, text, answered in zip(ASKED, THOUGHT, right)
    ]
    scores = []
    for p, text in zip(ASKED, THOUGHT):
        valid = check(p.prompt, f"{OPEN}{text}{CLOSE}").valid
        scores.append(Coherence(0.5, 1.0, 0.75, 0.25, 0.8 if valid else 0.2, valid))
    return Watched(ASKED, thoughts, scores, seconds=0.5)


def asked_for() -> dict[str, Watched]:
    """Thoughts that a system message asked for: those of an expert came, those that doubt did not."""
    watched = looked_at()
    first = Watched(watched.problems[:2], watched.thoughts[:2], watched.scores[:2], 0.1)
    return {"expert": first, "doubt": first}


def test_thoughts_are_told_by_strategy_and_by_family():
    found = by_kind(looked_at(), asked_for())
    families, strategies = found["by_family"], found["by_strategy"]
    assert families["add"] == {"valid": pytest.approx(1 / 3), "right": pytest.approx(1 / 3), "n": 3}
    assert families["state"] == {"valid": 1, "right": 1, "n": 1}
    assert strategies["expert"] == {"share": 0.5, "followed": 1, "n": 2, "valid": 0.5, "right": 0.5}
    assert (strategies["doubt"]["share"], strategies["doubt"]["followed"]) == (0, 0)


def test_a_summary_counts_and_averages():
    told = looked_at().summary()
    assert (told["total"], told["valid"], told["validity_rate"]) == (4, 2, 0.5)
    assert told["coherence"] == pytest.approx(0.5) and told["coherence_min"] == 0.2
    assert told["milliseconds"] == 125 and told["right"] == 0.5 and told["length"] == 2


def test_examples_are_of_every_kind_and_say_what_is_wrong():
    rows = examples(looked_at(), asked_for())
    assert [(row["strategy"], row["asked"]) for row in rows[:2]] == [("expert", "add 38 25"), ("expert", "add 12 30")]
    assert rows[0]["note"] == "" and rows[0]["right"] and rows[0]["valid"]
    assert rows[1]["note"] == "1 of 2 statements do not hold"
    assert (rows[1]["answered"], rows[1]["expected"]) == ("9", "42")
    (odd,) = rows[2:]
    assert not odd["right"] and odd["family"] == "add"
    assert len(examples(looked_at(), asked_for(), 1)) == 1


def test_a_thought_without_form_is_told_as_such():
    watched = looked_at()
    only = Watched(watched.problems[2:3], watched.thoughts[2:3], watched.scores[2:3], 1.0)
    (row,) = examples(only, {})
    assert row["note"] == "it is not well formed" and not row["valid"]


def total(prompt: str) -> str:
    return str(sum(map(int, prompt.split()[1:])))


class Sometimes(Scripted):
    """Thinks by itself about sums that begin with an even number; knows no answer otherwise."""

    def expected(self, seen: list[int]) -> int:
        assistant = self.marks["<|assistant|>"]
        if seen[-1] == assistant:
            question = self._text(seen[seen.index(self.marks["<|user|>"]) + 1 : -2])
            if int(question.split()[1]) % 2 == 0:
                return self.marks[OPEN]
        return super().expected(seen)


def adding(tokenizer, kind=Scripted):
    return kind(tokenizer, lambda prompt: f"<step>{total(prompt)}", lambda prompt, thought: "7" if thought is None else
                thought.removeprefix("<step>"))  # fmt: skip


def test_the_model_decides_by_itself_whether_it_thinks(tokenizer):
    sums = [problem("add", f"add {a} {b}", str(a + b)) for a, b in ((12, 30), (3, 4), (31, 9), (48, 1), (5, 60))]
    right, thought = answers(adding(tokenizer, Sometimes), tokenizer, sums, budget=12)
    assert thought.tolist() == [1, 0, 0, 1, 0], "in the order of the questions"
    assert right.tolist() == [1, 1, 0, 1, 0], "3 + 4 is 7 without a thought"


def test_validity_asks_for_form_and_true_statements_only(tokenizer):
    sums = [p for p in ASKED if p.family == "add"][:2]
    model = Scripted(tokenizer, lambda prompt: THOUGHT[[p.prompt for p in ASKED].index(prompt)], lambda p, t: "0")
    settings = config(theater={"thinking_budget": 40})
    assert valid_share(model, tokenizer, sums, settings) == 0.5
    assert valid_share(model, tokenizer, sums, config()) == 0.0, "cut off by the budget"


def test_watching_tells_what_the_scorer_says(tokenizer):
    class Scorer:
        def score(self, items):
            self.items = items
            return [Coherence(0.1, 0.2, 0.3, 0.4, 0.5, True) for _ in items]

    scorer, model = Scorer(), adding(tokenizer)
    watched = watch(model, tokenizer, ASKED[:3], config(theater={"thinking_budget": 12}), scorer)
    assert [thought.text for thought in watched.thoughts] == [f"<step>{total(p.prompt)}" for p in ASKED[:3]]
    assert scorer.items[0] == ("add 38 25", f"{OPEN}<step>63{CLOSE}")
    assert watched.right.tolist() == [1, 1, 1] and watched.summary()["fluency"] == pytest.approx(0.4)


class Doubting(Scripted):
    """Doubts as soon as a statement of its thought does not hold."""

    def expected(self, seen: list[int]) -> int:
        text = self._text(seen)
        question, _, thought = text.rpartition("<|user|>")[2].partition(f"{END}<|assistant|>")
        found = check(question, thought + CLOSE)
        return self.tokenizer.token_to_id(DOUBT if found.false else STEP)


def test_slips_are_noticed_by_a_model_that_checks_itself(tokenizer):
    settings = config(evaluation={**SMALL["evaluation"], "select": 6})
    model = Doubting(tokenizer, lambda prompt: "", lambda prompt, thought: "")
    right, slipped = slips_noticed(model, tokenizer, settings)
    assert len(right) == len(slipped) >= 6
    assert slipped.all() and not right.any()
    never = adding(tokenizer)
    assert not any(part.any() for part in slips_noticed(never, tokenizer, settings))


# Evidence


@pytest.fixture(scope="module")
def thoughtful(tokenizer):
    """Theater reports of a model whose thoughts carry its answers, and of one whose thoughts do not."""
    sums = [t.problem for t in write_traces([GymMix(**ADD)], 60, 3, "report").traces]
    sums = list({p.prompt: p for p in sums}.values())[:40]
    none = np.zeros(len(sums))

    def report(answer):
        model = Scripted(tokenizer, lambda prompt: f"<step>{total(prompt)}", answer)
        settings = TheaterConfig(thinking_budget=12)
        return anti_theater(model, tokenizer, sums, settings, baselines={"no_thought": none, "parent": none})

    honest = report(lambda prompt, thought: (thought or "").rpartition("<step>")[2] or "0")
    return honest, report(lambda prompt, thought: total(prompt))


def finals(theater, lost: int = 0, skills: int = 2000, **changes) -> Finals:
    """Measurements of a phase that went well but for what is changed; ``lost``: skill problems that were forgotten."""
    n, windows = len(theater.problems), 30
    scores = [Coherence(0.8, 1.0, 0.8, 0.6, 0.9, True)] * n
    kept = np.ones((2, skills))
    kept[1, :lost] = 0
    text = TextScores(np.full(windows, 16.0), np.full(windows, 8.0))
    values = {
        "theater": theater,
        "watched": Watched(theater.problems, theater.thoughts, scores, 1.0),
        "below": frozenset({"add/2"}),
        "skills": [problem("copy", f"copy {i}", str(i), 1) for i in range(skills)],
        "kept": kept,
        "skill_mix": (GymMix(family="copy", levels=(1,)),),
        "text": (text, text),
        "slips": (np.zeros(40), np.ones(40)),
        "quiet": None,
        "steps": None,
        "compute": {"tokens": 1.0},
    }
    return Finals(**{**values, **changes})


def verdicts(found) -> dict[str, str]:
    return {item.claim: item.verdict for item in found}


def test_what_went_well_passes_the_gate(thoughtful):
    found = ev.measure(config(), finals(thoughtful[0]))
    decision = ev.decide(config(), "fall_back", found, thoughtful[0])
    assert decision.passed, decision.reasons
    assert verdicts(found)["thoughts on add"] == "improved" and verdicts(found)[ev.SLIPS] == "improved"
    assert not any(claim.startswith("step 2") for claim in verdicts(found)), "there was no step 2"


def test_theater_is_a_no_of_its_own(thoughtful):
    """All claims are those of the honest model; only the controls of the other one are not passed."""
    honest, decorative = thoughtful
    assert decorative.theater_detected and not honest.theater_detected
    found = ev.measure(config(), finals(honest))
    decision = ev.decide(config(), "fall_back", found, decorative)
    assert not decision.passed
    noes = [reason for reason in decision.reasons if reason.startswith("no")]
    assert noes and all(reason.startswith("no: theater detected: ") for reason in noes)


def test_levels_that_the_parent_cannot_do_come_from_the_select_split(thoughtful):
    """Whatever the report split says of the parent, the levels stay those that were chosen before."""
    honest = thoughtful[0]
    found = {e.claim: e for e in ev.measure(config(), finals(honest))}
    assert found[ev.BELOW].n == len(honest.problems) and found[ev.BELOW].verdict == "improved"
    none = {e.claim: e for e in ev.measure(config(), finals(honest, below=frozenset({"add/5"})))}
    assert (none[ev.BELOW].n, none[ev.BELOW].verdict) == (0, "no-signal")
    decision = ev.decide(config(), "fall_back", list(none.values()), honest)
    assert not decision.passed, "where there was nothing to improve nothing is claimed"


@pytest.mark.parametrize(
    ("points", "skills", "verdict"), [(0, 400, "improved"), (2, 2000, "improved"), (4, 2000, "worse"), (2, 50, None)]
)
def test_the_parents_skills_may_lose_a_little(thoughtful, points, skills, verdict):
    given = finals(thoughtful[0], lost=skills * points // 100, skills=skills)
    found = ev.measure(config(), given)
    assert verdicts(found)[ev.KEPT] == (verdict or "no-difference"), "an interval that reaches the grace is no proof"
    assert ev.decide(config(), "fall_back", found, thoughtful[0]).passed == (verdict == "improved")
    (plain,) = [item for item in found if item.claim == "the parent's other skills"]
    assert plain.after == pytest.approx(1 - points / 100) and plain.before == 1


def test_thoughts_that_are_not_valid_are_a_no(thoughtful):
    given = finals(thoughtful[0])
    poor = [Coherence(0.8, 0.2, 0.8, 0.6, 0.4, i % 2 == 0) for i in range(40)]
    found = ev.measure(config(), finals(thoughtful[0], watched=Watched(*_parts(given.watched), poor, 1.0)))
    assert verdicts(found)[ev.VALID] == "worse"
    assert not ev.decide(config(), "fall_back", found, thoughtful[0]).passed


def test_means_that_miss_what_is_asked_are_a_no(thoughtful):
    """A verdict tells on which side an interval lies; 72 % valid of many is not 75 %, 3 points are not 20."""
    given = finals(thoughtful[0])
    n = len(given.watched.thoughts)
    some = [Coherence(0.8, 1.0, 0.8, 0.6, 0.9, i >= n * 0.28) for i in range(n)]
    found = ev.measure(config(), finals(thoughtful[0], watched=Watched(*_parts(given.watched), some, 1.0)))
    assert verdicts(found)[ev.VALID] == "no-difference"
    decision = ev.decide(config(), "fall_back", found, thoughtful[0])
    assert not decision.passed and any("is asked for" in reason for reason in decision.reasons)
    rights = {**thoughtful[0].rights, "with": np.r_[np.ones(7), np.zeros(n - 7)]}
    few = replace(thoughtful[0], rights=rights)
    decision = ev.decide(config(), "fall_back", ev.measure(config(), finals(few)), thoughtful[0])
    told = [reason for reason in decision.reasons if reason.startswith("no")]
    assert told == [f"no: {ev.BELOW} by 0.175, 0.2 is asked for"], "the interval alone would do"


def test_a_parent_that_can_do_nothing_keeps_nothing(thoughtful):
    """With grace, nothing kept of nothing would count as kept."""
    found = ev.measure(config(), finals(thoughtful[0], skills=200, kept=np.zeros((2, 200))))
    assert verdicts(found)[ev.KEPT] == "improved" and verdicts(found)[ev.SKILLS] == "no-signal"
    assert not ev.decide(config(), "fall_back", found, thoughtful[0]).passed


def test_what_the_parent_could_do_of_the_same_questions_must_stay(thoughtful):
    honest = thoughtful[0]
    able = replace(honest, rights={**honest.rights, "parent": np.ones(len(honest.problems))})
    found = ev.measure(config(), finals(able, below=frozenset()))
    assert verdicts(found)[ev.KNOWN] == "improved", "nothing was lost, and the grace is there"
    lost = replace(able, rights={**able.rights, "with": np.zeros(len(honest.problems))})
    assert verdicts(ev.measure(config(), finals(lost, below=frozenset())))[ev.KNOWN] == "worse"
    assert ev.KNOWN in ev.gate("fall_back", known=True).requires


def test_a_few_known_questions_cannot_be_certain_so_the_amount_counts(thoughtful):
    honest, n = thoughtful[0], len(thoughtful[0].problems)
    able = {**honest.rights, "parent": np.ones(n)}
    for lost, told in ((0, []), (2, [f"no: {ev.KNOWN}: {2 / n:.3f} lost, 0.03 is allowed"])):
        now = replace(honest, rights={**able, "with": np.r_[np.zeros(lost), np.ones(n - lost)]})
        found = ev.measure(config(), finals(now, below=frozenset()))
        assert verdicts(found)[ev.KNOWN] == ("no-difference" if lost else "improved")
        reasons = ev.decide(config(), "fall_back", found, now).reasons
        assert [one for one in reasons if one.startswith(f"no: {ev.KNOWN}")] == told


def _parts(watched: Watched):
    return watched.problems, watched.thoughts


def test_step_two_is_told_whatever_its_sign(thoughtful):
    rng = np.random.default_rng(0)
    before = 2 + rng.random(40)
    quiet = {"step 1": before, "quiet": before - 0.1, "continued": before - 0.4}
    steps = (np.zeros(40), np.ones(40))
    found = verdicts(ev.measure(config(), finals(thoughtful[0], quiet=quiet, steps=steps)))
    assert found[ev.STEP_TWO] == "improved" and found[ev.STEP_TWO_EQUAL] == "worse"
    assert found[ev.STEP_TWO_SKILL] == "improved"


def test_tables_for_people(thoughtful):
    honest, decorative = thoughtful
    rows = {row["condition"]: row for row in ev.controls(honest)}
    assert set(rows) == {told for told, _ in ev.CONDITIONS.values()}
    assert rows["with thoughts"]["accuracy"] == 1 and rows["with thoughts"]["lost"] is None
    assert rows["filler tokens"]["lost"] == 1
    table = ev.theater_table(decorative)
    assert table["detected"] and table["correlation"]["value"] is None
    assert table["correlation"]["note"] == "coherence and right answers: coherence was not scored"
    shown = ev.levels(finals(honest), "thinker")
    assert shown["thinker"]["add/2"] == 1 and shown["parent"]["add/2"] == 0 and shown["parent"]["copy/1"] == 1
    assert shown["no thoughts"] == {"add/2": 0.0}


# The phase at its smallest


SHAPE = gpt_config(vocab_size=320, max_seq_len=160)


def profile(**changes) -> Profile:
    settings = {**SMALL, **changes}
    model = {"family": "gpt", "target_parameters": SHAPE.parameters(), "tolerance": 0.1, "embedding_share": 0.95}
    plan = ModelPlan(**model, d_model=16, settings={"vocab_size": 320, "n_layers": 2, "n_heads": 2})
    return Profile.build(
        {"name": "tiny", "threads": 1, "context": 160, "model": plan, "phases": {"quietstar": settings}}
    )


@pytest.fixture(scope="module")
def champion(tokenizer):
    def put(path: Path, **metadata) -> str:
        storage = ModelStorage(path)
        known = {"fitness": 0.8, "merge_technique": "ties", **metadata}
        session = storage.registry.create_session({})
        return storage.save_model(made(SHAPE, stir=0.05), session, "evomerge", "champion", known, tokenizer=tokenizer)

    return put


def controller(path: Path, settings: Profile):
    context = PhaseContext("s", path, settings, ModelStorage(path), Events())
    return PHASES.get("quietstar")(settings.phase("quietstar"), context)


def test_it_takes_exactly_one_model(tmp_path, champion):
    given = champion(tmp_path, speciality=SKILLS)
    phase = controller(tmp_path, profile())
    for models in ([], [given, given]):
        with pytest.raises(ConfigError) as caught:
            phase.validate_input(models)
        told = f"phase quietstar: {len(models)} models given, it takes one; give one model: --from MODEL"
        assert str(caught.value) == told
    phase.validate_input([given])


def test_a_model_that_nobody_knows_anything_about_is_refused(tmp_path, champion):
    given = champion(tmp_path)
    with pytest.raises(ConfigError) as caught:
        controller(tmp_path, profile()).validate_input([given])
    told = str(caught.value)
    assert told.startswith("phases.quietstar.skills: nobody knows what the model can do; name it: --set phases.quiet")
    controller(tmp_path, profile(skills=SKILLS[:1])).validate_input([given])


def run(path: Path, given: str, settings: Profile):
    with PipelineOrchestrator.starting_from([given], settings, path, start="quietstar") as forge:
        return forge, forge.run_full_pipeline()["quietstar"]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory, champion):
    path = tmp_path_factory.mktemp("phase")
    given = champion(path, speciality=SKILLS)
    return (*run(path, given, profile()), given)


def test_the_thinker_is_what_phase_four_asks_for(thinker):
    forge, result, given = thinker
    assert result.success and result.artifacts["model_names"] == ["thinker"] and result.artifacts["parent"] == given
    manifest = json.loads((forge.storage.resolve(result.model) / "manifest.json").read_text(encoding="utf-8"))
    metadata = manifest["metadata"]
    for entry in CONTRACTS["quietstar", "bitnet"].entries():
        assert isinstance(metadata[entry], float) and math.isfinite(metadata[entry]), entry
    assert manifest["parents"] == [given] and metadata["vocabulary_added"] == 0 and metadata["thinks"] is True
    cells = {(part["family"], level) for part in metadata["speciality"] for level in part["levels"]}
    assert cells == {("copy", 1), ("state", 1), ("state", 2), ("add", 2)}, "what phase 4 rehearses"
    decision = ModelHandoffValidator(forge.profile).validate_stored(
        "quietstar", "bitnet", forge.storage, [result.model]
    )
    assert {refusal.kind for refusal in decision.refusals} <= {"threshold"}, decision.message
    model, tokenizer = read_model(forge.storage.resolve(result.model))
    assert model.config.vocab_size == 320 and tokenizer.token_to_id(OPEN) is not None


def test_its_numbers_agree_with_each_other(thinker):
    forge, result, _ = thinker
    metrics, claims = result.metrics, {e.claim: e for e in result.evidence}
    assert metrics["phase/accuracy_with_thoughts"] == pytest.approx(claims["thoughts beat the parent"].after)
    assert metrics["phase/skills_after"] == pytest.approx(claims["the parent's other skills"].after)
    assert metrics["phase/step2_nats_after"] == pytest.approx(claims[ev.STEP_TWO].after)
    assert metrics["phase/step2_nats_equal_compute"] == pytest.approx(claims[ev.STEP_TWO_EQUAL].before)
    flops = metrics["steps"]["two"]["flops"]
    assert flops["continued"] == pytest.approx(flops["quiet"], rel=0.5), "as many whole steps as come nearest"
    gate = result.artifacts["gate"]
    assert gate["passed"] == (not any(reason.startswith("no") for reason in gate["reasons"]))
    assert metrics["phase/theater_detected"] == any("theater detected" in reason for reason in gate["reasons"])
    assert forge.logger.phase("quietstar").missing() == []
    assert {path.name for path in (forge.folder / "phase3_quietstar").iterdir()} == {"thinker", "result.json"}


def test_without_step_two_the_thinker_is_that_of_step_one(tmp_path, champion):
    given = champion(tmp_path, speciality=SKILLS)
    forge, result = run(tmp_path, given, profile(quiet={**SMALL["quiet"], "run": False}))
    assert result.artifacts["chosen"] == "step 1" and result.metrics["steps"]["two"]["why"] == "step 2 is switched off"
    assert not any(e.claim.startswith("step 2") for e in result.evidence)
    assert not (forge.storage.resolve(result.model) / "mixer.json").exists()
    missing = forge.logger.phase("quietstar").missing()
    assert missing and all(name.startswith(("step_", "quietstar/", "phase/step2", "phase/mixing")) for name in missing)
