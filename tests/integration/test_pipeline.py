"""The orchestrator as a library: one small session, its gate, its phases by name, number and alias."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from agent_forge import PhaseResult, PipelineOrchestrator, load_profile
from agent_forge.pipeline.orchestrator import find_session, phase_name, session_results
from agent_forge.pipeline.phase import Progress
from forgekit.errors import ArtifactError, ConfigError, GateError
from forgekit.models.config import GPTConfig
from forgekit.models.io import build_model
from forgekit.store.storage import ModelStorage
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
