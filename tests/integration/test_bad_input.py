"""What people get wrong before a run starts, and disks that refuse: one line, an exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import CLI, Done, environment, run_cli, small_profile


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--profile", "nanoo"), "profile: unknown profile 'nanoo'; did you mean nano?"),
        (("--profile", "mine.toml"), "mine.toml: no such file; check the path"),
        (("--profile", "pico", "--phase", "cognat"), "phase: unknown phase 'cognat'; did you mean cognate?"),
        (("--profile", "pico", "--phase", "9"), "phase: there is no phase 9; choose 1 to 8"),
        (("--profile", "pico", "--until", "evomerg"), "phase: unknown phase 'evomerg'; did you mean evomerge"),
        (("--profile", "pico", "--until", "experts"), "phases.experts: profile 'pico' has no settings for phase"),
        (("--profile", "pico", "--data", "nowhere"), "nowhere; give a folder with data sets"),
    ],
)
def test_a_mistaken_run_starts_nothing(forge, tmp_path, words, told):
    done = forge("run", *words)
    assert done.code == 2 and told in done.error and done.out == ""
    assert json.loads(forge("status", "--json").out) == [], "no session may be left behind"


def test_an_unknown_key_in_a_profile_starts_nothing(forge, tmp_path):
    text = small_profile(tmp_path / "mine.toml").read_text()
    (tmp_path / "mine.toml").write_text(text.replace("pool =", "pol ="))
    done = forge("run", "--profile", "mine.toml")
    assert done.code == 2
    assert done.error == "mine.toml: phases.cognate.pol: unknown key; did you mean pool?"
    assert not (tmp_path / "storage").exists()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "is empty"),
        (b"Once upon a time\0\1\2" * 50, "binary"),
        ("Il était une fois".encode("latin-1") * 50, "not UTF-8 at byte"),
    ],
)
def test_a_text_that_cannot_be_read_is_named(forge, tmp_path, content, told):
    corpus = tmp_path / "data" / "corpus"
    corpus.mkdir(parents=True)
    file = corpus / "tinystories_sample.txt"
    file.write_bytes(content)
    done = forge("run", "--profile", small_profile(tmp_path / "small.toml"), "--data", tmp_path / "data", "--quiet")
    assert done.code == 3 and str(file) in done.error and told in done.error
    (row,) = json.loads(forge("status", "--json").out)
    assert row["status"] == "failed"
    assert json.loads(forge("models", "--json").out) == [] and not list(tmp_path.rglob("*.unfinished"))


def test_a_data_set_that_is_nowhere_is_named_with_what_to_do(forge, tmp_path):
    done = forge("data", "show", "piqa", "--split", "bench", "--data", tmp_path)
    assert done.code == 3 and "piqa/bench: missing data set offline" in done.error
    assert "put bench/piqa_valid.jsonl into the folder given by --data" in done.error


@pytest.fixture
def disk(tmp_path):
    """Mounts a small file system of its own, ``disk(megabytes)``."""
    mounted: list[Path] = []

    def mount(megabytes: int) -> Path:
        path = tmp_path / "disk"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
        mounted.append(path)
        return path

    yield mount
    for path in mounted:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_storage_without_write_permission_is_refused(forge, disk):
    path = disk(1)
    subprocess.run(["mount", "-o", "remount,ro", str(path)], check=True)
    done = forge("--storage", path / "storage", "run", "--profile", "pico")
    assert done.code == 5 and f"{path}/storage" in done.error and "no permission" in done.error
    assert "change its permissions or choose another folder" in done.error


def test_a_disk_too_small_is_refused_before_training(forge, disk, tmp_path):
    path = disk(3)
    done = forge("--storage", path / "storage", "run", "--profile", small_profile(tmp_path / "s.toml"), "--quiet")
    assert done.code == 5 and "MB" in done.error and "free" in done.error, done.err
    assert not list(path.rglob("model.safetensors")) and not list(path.rglob("*.unfinished"))


def test_a_disk_that_fills_up_while_training_ends_the_run_in_one_line_and_resumes(forge, disk, tmp_path):
    path = disk(64)
    words = ("--storage", path / "storage", "run", "--profile", small_profile(tmp_path / "small.toml"), "--quiet")
    process = subprocess.Popen(
        [*CLI, *map(str, words)],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 200
    while not list(path.glob("storage/sessions/*/phase1_cognate/checkpoints/trunk-*/step-*")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.005)
    filler = path / "filler"
    with open(filler, "wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 65536) and process.poll() is None:
                pass
        except OSError:
            pass
    out, err = process.communicate(timeout=200)
    done = Done(process.returncode, out, err)
    assert done.code == 5 and ("disk is full" in done.error or "cannot be written" in done.error), err
    assert str(path) in done.error
    filler.unlink()
    resumed = run_cli("--storage", path / "storage", "run", "--resume", "latest", "--json", cwd=tmp_path)
    assert resumed.code == 0, resumed.err
    assert forge("--storage", path / "storage", "validate").code == 0
    assert not list(path.rglob("*.unfinished"))


def test_a_reader_that_goes_away_is_no_error(tmp_path):
    process = subprocess.Popen(
        [*CLI, "data", "list", "--json"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    os.close(process.stdout.fileno())
    process.stdout = None
    err = process.communicate(timeout=60)[1]
    assert b"Traceback" not in err and b"error:" not in err
