"""The specialists trained side by side, each in a process of its own, and killed with all of them."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

from tests.conftest import run_cli, small_profile
from tests.journey.test_interruption import start

NAMES = ("trunk", "reasoning", "memory_integration", "adaptive_computation")
WORDS = ("--set", "side_by_side=true", "--set", "threads=2", "--until", "cognate", "--json")


def events(home: Path) -> list[dict]:
    lines = (line for path in home.glob("storage/sessions/*/events.jsonl") for line in path.read_bytes().splitlines())
    return [json.loads(line) for line in lines if line.endswith(b"}")]


def bits(home: Path) -> list[bytes]:
    return [next(home.glob(f"storage/sessions/*/*/{name}/model.safetensors")).read_bytes() for name in NAMES]


def test_killed_beside_each_other_and_resumed_they_end_with_the_same_bits(tmp_path, monkeypatch):
    # Two threads that spin while they wait for each other stand still on a machine where other tests compute.
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    homes = tmp_path / "whole", tmp_path / "killed"
    for home in homes:
        home.mkdir()
    profile = small_profile(tmp_path / "small.toml")
    done = run_cli("run", "--profile", profile, *WORDS, cwd=homes[0])
    assert done.code == 0, done.err
    assert len([e for e in events(homes[0]) if e["kind"] == "trained_beside"]) == 2
    process = start(homes[1], "run", "--profile", profile, *WORDS)
    deadline = time.monotonic() + 100
    others = [f"memory_integration-{'?' * 12}", f"adaptive_computation-{'?' * 12}"]
    while process.poll() is None and time.monotonic() < deadline:
        if any(list(homes[1].glob(f"storage/sessions/*/*/checkpoints/{name}/step-*/state.json")) for name in others):
            break
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    done = run_cli("run", "--resume", "latest", "--json", cwd=homes[1])
    assert done.code == 0, done.err
    assert any(e["kind"] == "train_resumed" for e in events(homes[1]))
    assert bits(homes[0]) == bits(homes[1]) and not list(homes[1].rglob("*.unfinished"))
