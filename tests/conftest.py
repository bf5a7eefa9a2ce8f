"""What several test files share: the command line in this process and in one of its own, and a small profile."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CLI = (sys.executable, "-m", "agent_forge.cli.main")

# The pico profile with everything that costs time cut down: the same parts and the same shape, seconds of work.
_SMALLER = {
    r"threads = \d+": "threads = 1",
    r"pool = \d+": "pool = 60",
    r"bytes_each = [\d_]+": "bytes_each = 40_000",
    r"problems = \d+": "problems = 20",
    r"windows = \d+": "windows = 4",
    r"rows = \d+": "rows = 8",
    r"checkpoint_every = \d+": "checkpoint_every = 2",
    r"(?m)^steps = \d+": "steps = 6",
    r"train = \{ steps = \d+ \}": "train = { steps = 8 }",
}


@dataclass(frozen=True)
class Done:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one error line; fails the test when there is none, more than one, or a traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.err, self.err
        assert self.err.rstrip().splitlines()[-1] == lines[0], self.err
        return lines[0].removeprefix("error: ")


def small_profile(path: Path, ablate: bool = False, gate: str = '"fall_back"') -> Path:
    """Write the small profile, with its ablations or without, and what a gate that says no leads to."""
    text = (ROOT / "profiles" / "pico.toml").read_text(encoding="utf-8")
    for pattern, value in _SMALLER.items():
        text, count = re.subn(pattern, value, text)
        assert count, f"pico.toml has no {pattern}"
    text = re.sub(r"ablate = \w+", f"ablate = {str(ablate).lower()}", text)
    path.write_text(f"gate = {gate}\n{text}", encoding="utf-8")
    return path


def environment(**extra: str) -> dict[str, str]:
    """The environment of a command: one thread, no terminal, nothing of the developer's own settings."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("AGENT_FORGE_") and k not in ("VISUAL", "EDITOR")}
    return {**kept, "OMP_NUM_THREADS": "1", "COLUMNS": "200", "HF_HUB_OFFLINE": "1", **extra}


def run_cli(*words: object, cwd: Path, stdin: str = "", **extra: str) -> Done:
    """``agent-forge`` in a process of its own."""
    command = [*CLI, *map(str, words)]
    done = subprocess.run(
        command, cwd=cwd, input=stdin, env=environment(**extra), capture_output=True, text=True, timeout=240
    )
    return Done(done.returncode, done.stdout, done.stderr)


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that ``make`` filled, shared by all test processes of this run: the first one makes it, others wait."""
    own = factory.getbasetemp()
    folder = (own.parent if os.environ.get("PYTEST_XDIST_WORKER") else own) / name
    with open(folder.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "made").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            (folder / "made").touch()
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Compute on one thread in a module: its tensors are so small that two are slower."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def forge(capfd, monkeypatch, tmp_path) -> Callable[..., Done]:
    """``agent-forge`` in this process, in a folder of its own: the same entry point, without the start-up time."""
    from agent_forge.cli.main import main

    for name in ("AGENT_FORGE_STORAGE", "AGENT_FORGE_DATA", "VISUAL", "EDITOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["agent-forge", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return Done(stopped.value.code, *capfd.readouterr())

    return call
