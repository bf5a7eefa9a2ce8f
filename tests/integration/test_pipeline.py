"""The orchestrator as a library: sessions, gates and handoffs, phases by name, number and alias."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from agent_forge import PhaseResult, PipelineOrchestrator, load_profile
from agent_forge.pipeline.orchestrator import find_session, phase_name, session_results
from agent_forge.pipeline.phase import PHASES, PhaseController, Progress
from agent_forge.pipeline.plan import forecast_run
from agent_forge.profile import PHASE_CONFIGS, ModelPlan, Profile
from forgekit.config import Config
from forgekit.data.tokenizer import train_tokenizer
from forgekit.errors import ArtifactError, ConfigError, GateError
from forgekit.models.config import GPTConfig
from forgekit.models.io import build_model
from forgekit.store.storage import ModelStorage
from forgekit.tracking.catalogue import CATALOGUES
from forgekit.tracking.events import read_events
from tests.conftest import small_profile


@dataclass(frozen=True)
class Stopped:
    """A session whose gate said no, where the profile asks to stop."""

    storage: Path
    session: str
    error: GateError
    seen: list[Progress]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Stopped:
    home = tmp_path_factory.mktemp("pipeline")
    profile = load_profile(str(small_profile(home / "small.toml", gate='"stop"')))
    seen: list[Progress] = []
    forge = PipelineOrchestrator(profile, home / "storage", show=seen.append)
    with pytest.raises(GateError) as caught, forge:
        forge.run_full_pipeline()
    return Stopped(home / "storage", forge.session_id, caught.value, seen)


def test_a_gate_that_says_no_stops_where_the_profile_asks_for_it(stopped):
    assert stopped.error.exit_code == 7
    assert "phase cognate: the gate said no: trunk learned" in str(stopped.error)
    storage = ModelStorage(stopped.storage)
    assert storage.registry.get_session(stopped.session)["status"] == "failed"
    assert len(storage.registry.search_models(session_id=stopped.session)) == 4, "its models are kept for study"
    assert session_results(storage, stopped.session)["cognate"]["evidence"]


@pytest.mark.parametrize("gate", ["accept", "fall_back"])
def test_the_same_session_goes_on_under_another_policy(stopped, gate):
    storage = ModelStorage(stopped.storage)
    profile = storage.registry.get_session(stopped.session)["config"]["profile"]
    settings = load_profile("pico").build({**profile, "gate": gate})
    with PipelineOrchestrator(settings, stopped.storage, session_id=stopped.session) as forge:
        results = forge.run_full_pipeline(until="cognate")
    assert isinstance(results["cognate"], PhaseResult) and results["cognate"].evidence[0].claim
    assert storage.registry.get_session(stopped.session)["status"] == "completed"


def test_a_single_phase_by_number_and_by_name_gives_the_finished_result(stopped):
    with PipelineOrchestrator.resume(stopped.session[:8], stopped.storage) as forge:
        by_number, by_name = forge.run_single_phase(1), forge.run_single_phase("cognate")
    assert by_number == by_name and by_number.phase_name == "cognate" and by_number.success


def test_progress_is_shown_for_every_stage_and_reaches_its_end(stopped):
    ends = {p.stage: p for p in stopped.seen}
    assert list(ends) == ["data", "trunk", "reasoning", "memory_integration", "adaptive_computation", "evidence"]
    assert all(p.done == p.total for p in ends.values())


def test_events_tell_the_session_from_start_to_end(stopped):
    events = list(read_events(stopped.storage / "sessions" / stopped.session / "events.jsonl"))
    kinds = [e["kind"] for e in events]
    assert kinds[0] == "session_started" and kinds.index("phase_started") < kinds.index("phase_finished")
    trained = [e["data"]["name"] for e in events if e["kind"] == "trained"]
    assert trained == ["trunk", "reasoning", "memory_integration", "adaptive_computation"]


def test_phases_have_names_numbers_and_aliases():
    assert [phase_name(n) for n in (1, "1", "cognate", 8)] == ["cognate", "cognate", "cognate", "compression"]
    assert [phase_name(a) for a in ("forge", "edge", "final_compression")] == ["curriculum", "experts", "compression"]
    for wrong in (0, 9, "cognatt", "Cognate!"):
        with pytest.raises(ConfigError):
            phase_name(wrong)


def test_sessions_are_found_by_their_beginning(tmp_path):
    registry = ModelStorage(tmp_path).registry
    registry.create_session({}, "abc-1")
    registry.create_session({}, "abd-2")
    assert find_session(registry, "abc") == "abc-1" and find_session(registry, "latest") == "abd-2"
    with pytest.raises(ArtifactError, match="2 sessions begin with 'ab'; see `agent-forge status`"):
        find_session(registry, "ab")
    with pytest.raises(ArtifactError, match="no session 'x'"):
        find_session(registry, "x")


def test_a_session_restored_from_its_models_cannot_be_resumed_and_says_so(tmp_path):
    storage = ModelStorage(tmp_path)
    session = storage.registry.create_session({"profile": {}}, "lost-1")
    torch.manual_seed(0)
    storage.save_model(
        build_model(GPTConfig(d_model=16, ffn_hidden=16, vocab_size=16)), session, "cognate", "trunk", {}
    )
    storage.registry.close()
    shutil.rmtree(tmp_path / "registry")
    with pytest.raises(ArtifactError) as caught:
        PipelineOrchestrator.resume("latest", tmp_path)
    told = "was restored from its models and has no plan; its models can be used; start a new run to make others"
    assert str(caught.value) == f"session lost-1: {told}"
    row = ModelStorage(tmp_path).registry.get_session("lost-1")
    assert row["status"] == "paused", "who is refused does not become the owner"


def trained_until(forge: PipelineOrchestrator, step: int) -> list[int]:
    """The trunk's steps that were trained before Ctrl-C was pressed at ``step`` or later."""
    steps: list[int] = []

    def show(progress: Progress) -> None:
        if progress.stage == "trunk":
            steps.append(progress.done)
            if progress.done >= step:
                raise KeyboardInterrupt

    forge.show = show
    with pytest.raises(KeyboardInterrupt), forge:
        forge.run_full_pipeline()
    return steps


@pytest.mark.parametrize("changed", [False, True])
def test_a_resumed_session_trains_on_from_its_checkpoint_only_on_the_same_data(tmp_path, changed):
    stories = tmp_path / "data" / "tinystories" / "train.jsonl"
    stories.parent.mkdir(parents=True)
    rows = [" ".join(f"word{i * 7 % 97}x{k}" for i in range(40)) + "." for k in range(40)]
    stories.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    profile = load_profile(str(small_profile(tmp_path / "small.toml")))
    forge = PipelineOrchestrator(profile, tmp_path / "storage", data=tmp_path / "data")
    assert trained_until(forge, 3) == [1, 2, 3]
    folder = forge.folder / "phase1_cognate" / "checkpoints"
    (before,) = folder.iterdir()
    assert before.name.startswith("trunk-") and list(before.glob("step-*"))
    if changed:
        stories.write_text(stories.read_text().replace("word7x", "other7x"))
    resumed = trained_until(PipelineOrchestrator.resume(forge.session_id, tmp_path / "storage"), 4)
    assert resumed == ([1, 2, 3, 4] if changed else [4])
    assert len(list(folder.iterdir())) == 1 + changed


def test_a_folder_that_is_not_there_makes_no_session(tmp_path):
    with pytest.raises(ConfigError, match="--data: no folder"):
        PipelineOrchestrator("pico", tmp_path / "storage", data=tmp_path / "none")
    assert not (tmp_path / "storage").exists()


# Handoffs, with phases that really save models but train nothing. Their names are those of the pipeline.

VOCAB = 300
SHAPE = GPTConfig(vocab_size=VOCAB, d_model=16, n_layers=1, n_heads=2, ffn_hidden=16, max_seq_len=32)


class QuickConfig(Config):
    """What a quick phase makes and says."""

    makes: tuple[str, ...] = ("champion",)
    metadata: dict = {}
    gate: bool | None = None
    first_parent: bool = False
    told: list | dict = {}

    def forecast(self) -> list | dict:
        return self.told


class Quick(PhaseController):
    """Saves models with the metadata it was told, and remembers what went in."""

    seen: list[tuple[str, list[str]]] = []
    act = staticmethod(lambda: None)

    def validate_input(self, models: list[str]) -> None:
        """Whatever the contract lets through."""

    def run(self, models: list[str]) -> PhaseResult:
        self.seen.append((self.name, models))
        Quick.act()
        made = [self.save(name, models) for name in self.config.makes]
        artifacts: dict = {"all_models": made}
        if self.config.gate is not None:
            artifacts["gate"] = {"passed": self.config.gate, "reasons": ["no: it learned nothing"]}
        if self.config.first_parent:
            artifacts["fall_back"] = models[:1]
        return PhaseResult(True, made[0], self.name, {}, artifacts, 0.0, self.config.model_dump())

    def save(self, name: str, parents: list[str]) -> str:
        context, special = self.context, {"specialization": name} if self.name == "cognate" else {}
        metadata = {"parents": parents, **special, **self.config.metadata}
        torch.manual_seed(0)
        return context.storage.save_model(build_model(SHAPE), context.session_id, self.name, name, metadata)


TRIO = {"makes": ("reasoning", "memory_integration", "adaptive_computation"), "metadata": {"final_loss": 1, "seed": 2}}
FIT = {"metadata": {"fitness": 0.9, "merge_technique": "ties"}}
CLEVER = {"metadata": {"accuracy": 0.9, "coherence_score": 0.8, "validity_rate": 0.8}}


@pytest.fixture
def quick(monkeypatch):
    """A profile of quick phases: ``quick("stop", cognate={...}, evomerge={...})``."""
    for name in ("cognate", "evomerge", "quietstar", "bitnet"):
        monkeypatch.setitem(PHASES._items, name, type(f"Quick_{name}", (Quick,), {"name": name}))
        monkeypatch.setitem(PHASE_CONFIGS._items, name, QuickConfig)
        monkeypatch.setitem(CATALOGUES._items, name, ())
    monkeypatch.setattr(Quick, "seen", [])
    monkeypatch.setattr(Quick, "act", staticmethod(lambda: None))
    settings = {"vocab_size": VOCAB, "n_layers": 1, "n_heads": 2}
    size = {"family": "gpt", "target_parameters": SHAPE.parameters(), "tolerance": 0.1, "embedding_share": 0.95}
    plan = ModelPlan(**size, d_model=16, settings=settings)

    def make(gate: str = "fall_back", handoffs: dict | None = None, **phases) -> Profile:
        values = {"name": "quick", "threads": 1, "context": 32, "gate": gate, "model": plan}
        return Profile.build({**values, "phases": phases, "handoffs": handoffs or {}})

    return make


def run(profile: Profile, storage: Path, **options) -> PipelineOrchestrator:
    with PipelineOrchestrator(profile, storage) as forge:
        forge.run_full_pipeline(**options)
    return forge


def ran() -> list[str]:
    return [name for name, _ in Quick.seen]


def handed(forge: PipelineOrchestrator) -> list[tuple[str, str, str, str]]:
    """The registry's handoffs: model, receiving phase, outcome, what was made of it."""
    rows = forge.storage.registry.get_handoffs(forge.session_id)
    names = {r["model_id"]: r["model_name"] for r in forge.storage.registry.search_models()}
    keys = ("source_model_id", "target_phase", "validation_status", "target_model_id")
    return [tuple(names.get(row[key], row[key]) for key in keys) for row in rows]


def events(forge: PipelineOrchestrator, kind: str) -> list[dict]:
    return [e["data"] for e in read_events(forge.folder / "events.jsonl", kind=kind)]


def test_phases_hand_over_and_the_registry_knows(quick, tmp_path):
    forge = run(quick(cognate=TRIO, evomerge=FIT, quietstar=CLEVER), tmp_path)
    assert [(name, len(models)) for name, models in Quick.seen] == [("cognate", 0), ("evomerge", 3), ("quietstar", 1)]
    rows = [*((name, "evomerge", "passed", "champion") for name in TRIO["makes"])]
    assert handed(forge) == [*rows, ("champion", "quietstar", "passed", "champion")]
    ends = {row["target_phase"]: row for row in forge.storage.registry.get_handoffs(forge.session_id)}
    assert ends["evomerge"]["target_model_id"].startswith("evomerge_")
    assert ends["quietstar"]["target_model_id"].startswith("quietstar_"), "what was made of it, not the model itself"
    told = [(t["source"], t["target"], t["accepted"]) for t in events(forge, "handoff")]
    assert told == [("cognate", "evomerge", True), ("evomerge", "quietstar", True)]
    (outlook,) = events(forge, "handoff_outlook")
    assert (outlook["source"], outlook["target"], outlook["accepted"]) == ("quietstar", "bitnet", True)
    with PipelineOrchestrator.resume(forge.session_id, tmp_path) as again:
        again.run_full_pipeline()
    assert len(ran()) == 3 and len(events(forge, "handoff")) == 2, "what is finished is not handed over again"
    assert len(handed(forge)) == 4


def test_until_stops_and_the_outlook_says_what_the_next_phase_would_say(quick, tmp_path):
    weak = {"metadata": {"fitness": 0.2, "merge_technique": "ties"}}
    forge = run(quick(cognate=TRIO, evomerge=weak, quietstar=CLEVER), tmp_path, until="evomerge")
    (outlook,) = events(forge, "handoff_outlook")
    assert outlook["target"] == "quietstar" and not outlook["accepted"] and ran() == ["cognate", "evomerge"]
    assert "fitness 0.2 is below the minimum 0.7" in outlook["message"]
    assert forge.storage.registry.get_session(forge.session_id)["status"] == "completed", "an outlook stops nothing"
    assert all(row[1] == "evomerge" for row in handed(forge)), "nor is it a handoff"


def test_a_refused_handoff_is_one_line_and_recorded(quick, tmp_path):
    profile = quick("stop", cognate={**TRIO, "metadata": {"seed": 1}}, evomerge=FIT)
    with pytest.raises(GateError) as caught:
        run(profile, tmp_path)
    line = str(caught.value)
    assert line.startswith("handoff cognate->evomerge: cognate_reasoning_") and "metadata final_loss is missing" in line
    assert "and 2 more problems" in line and "\n" not in line
    registry = ModelStorage(tmp_path).registry
    (session,) = registry.get_all_sessions()
    rows = registry.get_handoffs(session["session_id"])
    assert session["status"] == "failed" and [row["validation_status"] for row in rows] == ["failed"] * 3
    assert all("final_loss is missing" in row["validation_metrics"]["rule"] for row in rows)
    assert all(row["target_model_id"] == row["source_model_id"] for row in rows), "nothing was made of them"
    assert ran() == ["cognate"]


@pytest.mark.parametrize("gate", ["fall_back", "accept", "stop"])
def test_after_a_refusal_the_profiles_policy_decides(quick, tmp_path, gate):
    weak = {"metadata": {**CLEVER["metadata"], "accuracy": 0.5}}
    profile = quick(gate, cognate=TRIO, evomerge=FIT, quietstar=weak, bitnet={})
    if gate == "stop":
        with pytest.raises(GateError, match="accuracy 0.5 is below the minimum 0.8"):
            run(profile, tmp_path)
        return
    forge = run(profile, tmp_path)
    falls_back = gate == "fall_back"
    assert Quick.seen[3][1][0].startswith("evomerge_" if falls_back else "quietstar_")
    rows = [row[2] for row in handed(forge) if row[1] == "bitnet"]
    assert rows == (["failed", "passed"] if falls_back else ["failed"])
    if falls_back:
        told = events(forge, "handoff")[-1]
        assert told["stand_in"] and any(line.endswith("coherence_score") for line in told["unknown"])
        with PipelineOrchestrator.resume(forge.session_id, tmp_path) as again:
            again.run_full_pipeline()
        assert len(ran()) == 4, "a resumed session takes the same way"


def test_accepting_gates_does_not_accept_what_cannot_work(quick, tmp_path):
    alone = {"makes": ("reasoning",), "metadata": TRIO["metadata"]}
    with pytest.raises(GateError, match="num_models is 1, evomerge takes 3"):
        run(quick("accept", cognate=alone, evomerge=FIT), tmp_path)


@pytest.mark.parametrize("named", [True, False])
def test_after_a_gate_that_said_no_the_parents_go_on(quick, tmp_path, named):
    merge = {**FIT, "gate": False, "first_parent": named}
    profile = quick(cognate=TRIO, evomerge=merge, quietstar=CLEVER)
    if named:
        run(profile, tmp_path)
        assert Quick.seen[2][1] == Quick.seen[1][1][:1], "the one that the phase named"
        return
    with pytest.raises(GateError, match="num_models is 3, quietstar takes 1"):
        run(profile, tmp_path)


def test_a_profile_can_leave_out_a_phase_only_by_saying_so(quick, tmp_path):
    phases = {"cognate": {**TRIO, "makes": ("reasoning",)}, "quietstar": CLEVER}
    with pytest.raises(ConfigError, match="cognate does not hand over to quietstar, evomerge does"):
        run(quick(**phases), tmp_path)
    assert ran() == [], "told before anything is made"
    run(quick(handoffs={"cognate->quietstar": {"num_models": 1}}, **phases), tmp_path)
    assert ran() == ["cognate", "quietstar"]


def test_a_single_phase_of_a_resumed_session_takes_what_it_made_before(quick, tmp_path):
    forge = run(quick(cognate=TRIO, evomerge=FIT, quietstar=CLEVER), tmp_path, until="cognate")
    with PipelineOrchestrator.resume(forge.session_id, tmp_path) as again:
        again.run_single_phase("evomerge")
        again.run_single_phase(2)
        again.run_full_pipeline(until="quietstar", start="quietstar")
    assert ran() == ["cognate", "evomerge", "quietstar"]
    assert len(Quick.seen[1][1]) == 3 and Quick.seen[2][1][0].startswith("evomerge_champion")
    assert [t["target"] for t in events(forge, "handoff_outlook")] == ["evomerge", "quietstar", "quietstar", "bitnet"]


def test_a_phase_that_needs_models_and_has_none_says_so(quick, tmp_path):
    told = "phase evomerge: needs models and this session has made none; give them with --from MODEL"
    with pytest.raises(ConfigError, match=told), PipelineOrchestrator(quick(evomerge=FIT), tmp_path) as forge:
        forge.run_single_phase("evomerge")


def test_a_phase_runs_on_models_given_by_id(quick, tmp_path):
    profile = quick(cognate=TRIO, evomerge=FIT)
    made = run(profile, tmp_path, until="cognate").storage.registry.find_ids("cognate_")
    with PipelineOrchestrator(profile, tmp_path) as forge:
        forge.run_single_phase("evomerge", made)
        assert Quick.seen[1][1] == made
        with pytest.raises(GateError, match="num_models is 2, evomerge takes 3"):
            forge.run_single_phase("evomerge", made[:2])


def test_a_run_starts_from_models_of_another_session(quick, tmp_path):
    profile = quick(cognate=TRIO, evomerge=FIT, quietstar=CLEVER)
    first = run(profile, tmp_path, until="cognate")
    forge = PipelineOrchestrator.starting_from(TRIO["makes"], profile, tmp_path, until="evomerge")
    with forge:
        forge.run_full_pipeline()
    assert ran() == ["cognate", "evomerge"] and forge.session_id != first.session_id
    (champion,) = forge.storage.registry.search_models(session_id=forge.session_id)
    assert [one.split("_2")[0] for one in champion["metadata"]["parents"]] == [f"cognate_{n}" for n in TRIO["makes"]]
    assert [row[2:] for row in handed(forge)] == [("passed", "champion")] * 3
    with PipelineOrchestrator.resume(forge.session_id, tmp_path) as again:
        again.run_full_pipeline()
        assert len(ran()) == 2, "the plan keeps the inputs, the first phase and the last"
        again.run_full_pipeline(until="quietstar")
    assert ran() == ["cognate", "evomerge", "quietstar"]


def test_models_that_do_not_fit_leave_no_session(quick, tmp_path):
    profile = quick(cognate=TRIO, evomerge=FIT, quietstar=CLEVER)
    first = run(profile, tmp_path, until="cognate")
    names = TRIO["makes"]
    for models, options, told in (
        (names[:2], {}, "handoff cognate->evomerge: cognate_reasoning_.*: num_models is 2, evomerge takes 3"),
        (names[:1], {"start": "quietstar"}, "cognate does not hand over to quietstar, evomerge does"),
        (names, {"start": "bitnet"}, "phases.bitnet: profile 'quick' has no settings for phase 'bitnet'"),
        (names, {"until": "cognate"}, "--until: cognate comes before evomerge, where the run starts"),
        (["nobody"], {}, "no model 'nobody'"),
    ):
        with pytest.raises((GateError, ConfigError, ArtifactError), match=told):
            PipelineOrchestrator.starting_from(models, profile, tmp_path, **options)
    with pytest.raises(ConfigError, match="--data: no folder"):
        PipelineOrchestrator.starting_from(names, profile, tmp_path, data=tmp_path / "none")
    assert [row["session_id"] for row in first.storage.registry.get_all_sessions()] == [first.session_id]


def llama(folder: Path, tokenizer) -> Path:
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(LlamaConfig(vocab_size=VOCAB, **sizes)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder)
    return folder


def interrupt() -> None:
    raise KeyboardInterrupt


def test_a_run_starts_from_hugging_face_folders_and_keeps_copies(quick, tmp_path, monkeypatch):
    tokenizer = train_tokenizer(["some words to learn from, and some more of them"] * 5, VOCAB)
    folders = [llama(tmp_path / f"hf-{i}", tokenizer) for i in range(2)]
    profile = quick(evomerge=FIT, handoffs={"evomerge": {"num_models": 2, "param_range": "any"}})
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match="--from: models of elsewhere do not say .*; name the phase: --phase"):
        PipelineOrchestrator.starting_from(["hf-0", "hf-1"], profile, tmp_path / "s")
    forge = PipelineOrchestrator.starting_from(["hf-0", "hf-1"], profile, tmp_path / "s", start=2)
    Quick.act = staticmethod(interrupt)
    with pytest.raises(KeyboardInterrupt), forge:
        forge.run_full_pipeline()
    for folder in folders:
        shutil.rmtree(folder)
    Quick.act = staticmethod(lambda: None)
    with PipelineOrchestrator.resume(forge.session_id, tmp_path / "s") as again:
        again.run_full_pipeline()
    assert Quick.seen[0] == Quick.seen[1] and len(Quick.seen) == 2
    rows = {row["model_id"]: row for row in forge.storage.registry.search_models(phase="external")}
    assert [rows[one]["model_name"] for one in Quick.seen[1][1]] == ["hf-0", "hf-1"] and len(rows) == 2
    assert [rows[one]["metadata"]["origin"] for one in Quick.seen[1][1]] == [str(folder) for folder in folders]
    plan = forge.storage.registry.get_session(forge.session_id)["config"]
    assert [one["model_id"] for one in plan["inputs"]] == Quick.seen[1][1] and plan["source"] == "external"
    told = events(forge, "handoff")[0]
    assert told["accepted"] and sum(line.endswith(": final_loss") for line in told["unknown"]) == 2


def test_a_run_killed_while_it_took_its_models_in_takes_in_the_rest(quick, tmp_path):
    tokenizer = train_tokenizer(["some words to learn from, and some more of them"] * 5, VOCAB)
    folders = [str(llama(tmp_path / f"hf-{i}", tokenizer)) for i in range(2)]
    profile = quick(evomerge=FIT, handoffs={"evomerge": {"num_models": 2, "param_range": "any"}})
    forge = PipelineOrchestrator.starting_from(folders, profile, tmp_path / "s", start=2)
    shutil.move(folders[1], tmp_path / "away")
    with pytest.raises(ArtifactError, match="hf-1"), forge:
        forge.run_full_pipeline()
    shutil.move(tmp_path / "away", folders[1])
    shutil.rmtree(folders[0])
    with PipelineOrchestrator.resume(forge.session_id, tmp_path / "s") as again:
        again.run_full_pipeline()
    assert len(Quick.seen[0][1]) == 2
    assert len(forge.storage.registry.search_models(phase="external")) == 2


def test_a_pause_stops_before_the_next_phase(quick, tmp_path):
    forge = PipelineOrchestrator(quick(cognate=TRIO, evomerge=FIT), tmp_path)
    Quick.act = staticmethod(forge.pause)
    with forge:
        results = forge.run_full_pipeline()
    row = forge.storage.registry.get_session(forge.session_id)
    assert list(results) == ["cognate"] == ran() and row["status"] == "paused" and row["end_time"] is None
    assert events(forge, "paused") == [{"before": "evomerge"}] and events(forge, "handoff_outlook") == []
    Quick.act = staticmethod(lambda: None)
    with PipelineOrchestrator.resume(forge.session_id, tmp_path) as again:
        again.run_full_pipeline()
    assert ran() == ["cognate", "evomerge"]
    assert forge.storage.registry.get_session(forge.session_id)["status"] == "completed"


def test_a_pause_asked_for_in_the_last_phase_changes_nothing(quick, tmp_path):
    forge = PipelineOrchestrator(quick(cognate=TRIO), tmp_path)
    Quick.act = staticmethod(forge.pause)
    with forge:
        forge.run_full_pipeline()
    assert forge.storage.registry.get_session(forge.session_id)["status"] == "completed"


@pytest.mark.parametrize(
    ("told", "stages", "counts"),
    [
        ({}, [], {}),
        ({"generations": 5}, [], {"evomerge": {"generations": 5}}),
        ([{"stage": "search", "steps": 5, "tokens": 90, "seconds": 2.0, "models": 12}], [("search", 5, 90, 2.0)], {}),
        ([{"stage": "search"}], [("search", 0, 0, 0.0)], {}),
    ],
)
def test_a_plan_says_of_later_phases_what_they_say_themselves(quick, told, stages, counts):
    bare = forecast_run(quick(evomerge=FIT))
    plan = forecast_run(quick(evomerge={**FIT, "told": told}))
    assert plan["phases"] == ["evomerge"] and plan["counts"] == counts
    assert [(s["phase"], s["stage"], s["steps"], s["tokens"], s["seconds"]) for s in plan["stages"]] == [
        ("evomerge", *stage) for stage in stages
    ]
    assert (plan["disk_bytes"] > bare["disk_bytes"]) is ("models" in str(told)), "models that lie there meanwhile"


def test_a_plan_estimates_seconds_from_tokens(quick):
    plan = forecast_run(quick(evomerge={**FIT, "told": [{"stage": "search", "tokens": 10**9}]}))
    assert plan["stages"][0]["seconds"] == plan["seconds"] > 0


def test_a_phase_that_nobody_has_built_is_told_before_anything_is_made(quick, tmp_path, monkeypatch):
    monkeypatch.setitem(PHASE_CONFIGS._items, "experts", QuickConfig)
    with pytest.raises(ConfigError, match="phase: unknown phase 'experts'"):
        run(quick(cognate=TRIO, experts={}), tmp_path)
    assert ran() == []
