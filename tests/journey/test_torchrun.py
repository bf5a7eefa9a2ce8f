"""The command line under ``torchrun``: two processes make one session, the one that a single process makes."""

from __future__ import annotations

import json
import re
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.conftest import Done, environment, made_once, small_profile

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


def torchrun(*words: object, cwd: Path) -> Done:
    """``agent-forge`` in two processes of one group."""
    command = [*TORCHRUN, "-m", "agent_forge.cli.main", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=240)
    return Done(done.returncode, done.stdout, done.stderr)


def sharded_profile(path: Path) -> Path:
    """The small profile with every training sharded over the processes by FSDP2."""
    text = small_profile(path).read_text(encoding="utf-8")
    for table in ("trunk", "specialist"):
        text, count = re.subn(rf"\[phases\.cognate\.{table}\]\n", r'\g<0>parallel = "fsdp"\n', text)
        assert count == 1
    path.write_text(text, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> Path:
    """The working folder of a run by two processes."""

    def make(folder: Path) -> None:
        done = torchrun("run", "--profile", sharded_profile(folder / "sharded.toml"), "--json", cwd=folder)
        assert done.code == 0, done.err[-3000:]
        (folder / "run.json").write_text(done.out, encoding="utf-8")

    return made_once(tmp_path_factory, "torchrun", make)


def test_two_processes_make_one_session_and_say_it_once(pair):
    run = json.loads((pair / "run.json").read_text(encoding="utf-8"))
    with closing(sqlite3.connect(pair / "storage" / "registry" / "model_registry.db")) as connection:
        rows = connection.execute("SELECT session_id, status, progress_percent FROM sessions").fetchall()
        models = connection.execute("SELECT count(*) FROM models").fetchone()[0]
    assert rows == [(run["session_id"], "completed", 100.0)] and models == 8
    folder = pair / "storage" / "sessions" / run["session_id"]
    starts = [e for e in map(json.loads, (folder / "events.jsonl").open()) if e["kind"] == "session_started"]
    assert len(starts) == 1
    assert not list(folder.rglob("checkpoints/*/*")), "finished models need no checkpoints"


def test_two_processes_learn_what_one_learns(pair, journey):
    run = json.loads((pair / "run.json").read_text(encoding="utf-8"))
    ours = losses(pair / "storage" / "sessions" / run["session_id"])
    theirs = losses(journey.home / "storage" / "sessions" / journey.session)
    for found in (ours, theirs):
        found.pop("no thoughts, further", None)  # only where step 2 is handed on
    assert ours.keys() == theirs.keys() and len(ours) == 4 + 4 + 2
    # Phase 3 starts from what phase 2's search ended with, and that may be another recipe: its steps are compared.
    later = {"step 1": 6, "no thoughts": 6, "step 2": 6, "ternary": 6, "same bytes": 6}
    assert {name: len(ours.pop(name)) for name in later} == later == {name: len(theirs.pop(name)) for name in later}
    assert len(ours.pop("continued")) == pytest.approx(len(theirs.pop("continued")), rel=0.2), "as much compute"
    assert ours["trunk"][0] == pytest.approx(theirs["trunk"][0], abs=1e-5)
    assert ours["trunk"][:2] == pytest.approx(theirs["trunk"][:2], abs=1e-3)
    for name, values in ours.items():  # orthogonalised steps at a high rate magnify rounding
        assert values == pytest.approx(theirs[name], rel=0.05), name
    claims = {e["claim"]: e["n"] for e in run["results"]["cognate"]["evidence"]}
    assert claims.items() <= {e["claim"]: e["n"] for e in journey.result["evidence"]}.items()


def losses(session: Path) -> dict[str, list[float]]:
    """The loss of every training step, by model."""
    events = map(json.loads, (session / "events.jsonl").read_text(encoding="utf-8").splitlines())
    return {e["data"]["name"]: e["data"]["losses"] for e in events if e["kind"] == "trained"}


ALONE = """
import sys
import torch.distributed as dist
from agent_forge.cli import processes
from forgekit.errors import ForgeError, ResourceError
processes.GRACE = 0.5
try:
    with processes.together() as leads:
        if leads:
            dist.barrier()
        raise ResourceError("memory is too small", where="train", remedy="buy some")
except ForgeError as error:
    print(f"error: {error}", file=sys.stderr)
    sys.exit(error.exit_code)
"""


def test_an_error_that_only_a_later_process_meets_is_told_by_it(tmp_path):
    (tmp_path / "alone.py").write_text(ALONE, encoding="utf-8")
    command = [*TORCHRUN, "alone.py"]
    paths = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(command, cwd=tmp_path, env=environment(**paths), capture_output=True, text=True, timeout=120)
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode != 0 and told == ["error: process 1: train: memory is too small; buy some"], done.stderr


def test_an_error_is_told_by_one_process(pair, tmp_path):
    done = torchrun("run", "--profile", pair / "sharded.toml", "--until", "evomerg", cwd=tmp_path)
    told = [line for line in done.err.splitlines() if line.startswith("error: ")]
    assert done.code != 0 and len(told) == 1 and "evomerge" in told[0]
    assert not (tmp_path / "storage" / "sessions").exists()
