"""Runs that start from models, and runs that are paused, through the command line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from pydantic import ConfigDict

from agent_forge.profile import PHASE_CONFIGS
from forgekit.config import Config
from tests.conftest import small_profile
from tests.journey.test_interruption import marks, start

TRIO = ("reasoning", "memory_integration", "adaptive_computation")
HAVING = ("--set", "phases.evomerge.generations=1")


class Anything(Config):
    """Settings of a phase that these tests never reach."""

    model_config = ConfigDict(extra="allow")


@pytest.fixture
def ask(forge, copy, monkeypatch):
    """``run`` on a copy of the finished session; checks that nothing was begun."""
    monkeypatch.setitem(PHASE_CONFIGS._items, "evomerge", Anything)
    monkeypatch.chdir(copy.home)
    sessions = sorted((copy.home / "storage" / "sessions").iterdir())

    def call(*words: object):
        done = forge("run", "--quiet", *words)
        assert sorted((copy.home / "storage" / "sessions").iterdir()) == sessions, "a refusal leaves no session"
        assert len(json.loads(forge("status", "--json").out)) == len(sessions)
        return done

    return call


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--from", *TRIO[:2], *HAVING), 7, "num_models is 2, evomerge takes 3; hand over 3, or --set handoffs.evomer"),
        (("--from", TRIO[0], "--from", TRIO[1], TRIO[1], *HAVING), 7, "is given 2 times; give every model once"),
        (("--from", *TRIO, *HAVING, "--set", "handoffs.evomerge.param_range=[1, 2]"), 7, "outside 1 to 2"),
        (
            ("--from", *TRIO, *HAVING, "--set", "handoffs.evomerge.maximum.final_loss=0.1"),
            7,
            "is above the maximum 0.1",
        ),
        (("--from", *TRIO, *HAVING, "--set", "handoffs.evomerge.num_model=2"), 2, "did you mean num_models?"),
        (("--from", *TRIO, *HAVING, "--phase", "cognate"), 7, "cognate starts from nothing; leave the models out"),
        (("--from", *TRIO, *HAVING, "--until", "cognate"), 2, "cognate comes before evomerge, where the run starts"),
        (("--from", *TRIO, "--phase", "experts"), 2, "has no settings for phase 'experts'"),
        (("--from", "reasonin", *HAVING), 4, "no model 'reasonin'"),
        (("--from", "hf", *HAVING), 2, "--from: models of elsewhere do not say where the run is to start"),
        (("--from", "hf", "--phase", "evomerge", *HAVING), 7, "num_models is 1, evomerge takes 3"),
        (("--from", "none", *HAVING), 4, "no model here"),
        (("--resume", "latest", "--from", "reasoning"), 2, "--from: a resumed session keeps its models"),
        (("--phase", "evomerge", *HAVING), 2, "evomerge needs models to start from; give them with --from MODEL"),
        (("nano",), 2, "run: unexpected 'nano'; models to start from follow --from"),
    ],
)
def test_models_that_a_run_cannot_start_from(ask, copy, words, code, told):
    folder = copy.home / "hf"
    folder.mkdir()
    (copy.home / "none").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((copy.folder("trunk") / name).read_bytes())
    done = ask("--profile", copy.profile, *words) if "--resume" not in words else ask(*words)
    assert done.code == code and told in done.error, done.err


def test_a_damaged_model_is_named(ask, copy):
    weights = copy.folder("memory_integration") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    done = ask("--profile", copy.profile, "--from", *TRIO, *HAVING)
    assert done.code == 4 and "handoff cognate->evomerge: cognate_memory_integration_" in done.error
    assert "model.safetensors" in done.error and "truncated" in done.error


def test_a_running_session_is_paused_and_one_that_is_not_is_refused(forge, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    storage: tuple[str, Path] = ("--storage", home / "storage")
    process = start(home, "run", "--profile", small_profile(home / "small.toml"), "--json")
    try:
        while marks(home) < 1:
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        done = forge(*storage, "pause", "--json")
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    told = json.loads(done.out)
    assert done.code == 0 and (told["stopped"], told["status"], told["pid"]) == (True, "paused", process.pid)
    assert process.returncode == 130 and f"go on with: agent-forge run --resume {told['session_id'][:8]}" in err
    again = forge(*storage, "pause")
    assert again.code == 4 and f"session {told['session_id']}: is not running; go on with" in again.error
    assert list(home.rglob("state.json")), "with a checkpoint to go on from"


def test_there_is_nothing_to_pause(forge):
    done = forge("pause")
    assert done.code == 4 and "no session 'latest'; see `agent-forge status`" in done.error
