"""Stopped by Ctrl-C and killed at random moments, a session goes on and ends with the bits of an undisturbed one."""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from tests.conftest import CLI, Done, environment, made_once, run_cli, small_profile

MODELS = ("trunk", "reasoning", "memory_integration", "adaptive_computation", "champion", "thinker")
MARKS = ("train_checkpoint", "trained")


def marks(home: Path) -> int:
    """Checkpoints and models that the session has written so far."""
    return sum(
        any(f'"kind":"{mark}"'.encode() in line for mark in MARKS)
        for path in home.glob("storage/sessions/*/events.jsonl")
        for line in path.read_bytes().splitlines()
    )


def start(home: Path, *words: object) -> subprocess.Popen:
    # A shell's background jobs ignore Ctrl-C and hand that on; the process under test must hear it.
    return subprocess.Popen(
        [*CLI, *map(str, words)],
        cwd=home,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def stop(process: subprocess.Popen, home: Path, after: int, sign: signal.Signals, wait: float = 0.0) -> Done:
    """Signal the process once ``after`` marks are there and ``wait`` seconds have passed."""
    deadline = time.monotonic() + 200
    while marks(home) < after and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(wait)
    process.send_signal(sign)
    out, err = process.communicate(timeout=60)
    return Done(process.returncode, out, err)


def status(forge, home: Path) -> dict:
    (row,) = json.loads(forge("--storage", home / "storage", "status", "--json").out)
    return row


@pytest.fixture(scope="session")
def paused(tmp_path_factory) -> Path:
    """A folder with a session that Ctrl-C stopped in the middle of the trunk."""
    return made_once(tmp_path_factory, "paused", pause)


def pause(home: Path) -> None:
    # Without ablations: they come after the models and must not change them, so the journey's bits are the measure.
    profile = small_profile(home / "small.toml")
    done = stop(start(home, "run", "--profile", profile, "--json"), home, 1, signal.SIGINT)
    assert done.code == 130, done.err
    assert "Traceback" not in done.err and "paused; go on with: agent-forge run --resume" in done.err
    assert done.out == ""


@pytest.fixture
def home(paused, tmp_path) -> Path:
    """A copy of the stopped session, to go on with."""
    return Path(shutil.copytree(paused, tmp_path / "home"))


def test_ctrl_c_pauses_with_a_checkpoint_of_the_step_it_stopped_at(forge, home):
    assert status(forge, home)["status"] == "paused"
    steps = list(home.glob("storage/sessions/*/phase1_cognate/checkpoints/trunk-*/step-*/state.json"))
    assert steps and not list(home.rglob("*.unfinished"))


def test_killed_at_random_moments_the_session_ends_with_the_same_bits(forge, home, journey):
    rng = random.Random(20231)
    storage = ("--storage", home / "storage")
    for target in sorted(rng.sample(range(4, 14), 2)):
        process = start(home, "run", "--resume", "latest", "--json")
        try:
            while status(forge, home)["status"] != "running":
                assert process.poll() is None, process.communicate()
                time.sleep(0.05)
            refused = forge(*storage, "run", "--resume", "latest")
            assert refused.code == 4 and f"is running in process {process.pid}; wait, or stop it first" in refused.error
        finally:
            killed = stop(process, home, target, signal.SIGKILL, rng.uniform(0, 0.2))
        assert killed.code == -signal.SIGKILL, "it ended before it was killed: lower the target"
        assert status(forge, home)["status"] == "interrupted"
    done = run_cli("run", "--resume", "latest", "--json", cwd=home)
    assert done.code == 0, done.err
    assert status(forge, home)["status"] == "completed"
    ours = replace(journey, home=home, run=json.loads(done.out))
    for model in MODELS:
        both = [(one.folder(model) / "model.safetensors").read_bytes() for one in (ours, journey)]
        assert both[0] == both[1], model
    assert not list(home.rglob("*.unfinished"))
    assert forge(*storage, "validate").code == 0


def spoil(path: Path) -> None:
    (path / "state.safetensors").write_bytes(b"short")


def checkpoints(home: Path) -> list[Path]:
    return sorted(
        p.parent for p in home.glob("storage/sessions/*/phase1_cognate/checkpoints/trunk-*/step-*/state.json")
    )


def test_when_no_checkpoint_can_be_read_the_resume_says_so_and_keeps_them(forge, home):
    before = checkpoints(home)
    for path in before:
        spoil(path)
    done = forge("--storage", home / "storage", "run", "--resume", "latest", "--quiet")
    assert done.code == 4 and "no readable checkpoint" in done.error and "checkpoints/trunk-" in done.error
    assert checkpoints(home) == before != []


def test_a_checkpoint_of_a_newer_version_is_refused(forge, home):
    for path in checkpoints(home):
        record = json.loads((path / "state.json").read_text())
        (path / "state.json").write_text(json.dumps({**record, "schema": 99}))
    done = forge("--storage", home / "storage", "run", "--resume", "latest", "--quiet")
    assert done.code == 4 and "written by a newer version" in done.error
