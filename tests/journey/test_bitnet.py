"""Phase 4 as a user meets it: two artifacts, the packed one talks, killed and resumed, a damaged file."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from agent_forge.phases.bitnet.evidence import KEPT, TEXT_KEPT
from forgekit.models.io import read_model
from forgekit.quant.model import is_packed
from tests.conftest import run_cli
from tests.journey.test_interruption import start
from tests.journey.test_quietstar import begun, timeless

CLOCKED = ("performance/", "bitnet/speed/", "bitnet/inference_speedup")


def told(home: Path) -> list[tuple[str, str]]:
    """What phase 4 told so far: kind and name."""
    (path,) = home.glob("storage/sessions/*/events.jsonl")
    lines = (line for line in path.read_bytes().splitlines() if b'"phase":"bitnet"' in line and line.endswith(b"}"))
    return [(event["kind"], event["data"].get("name", "")) for event in map(json.loads, lines)]


def test_both_artifacts_are_left_and_nothing_else(journey):
    folder, found = journey.folder("ternary"), journey.ternary["artifacts"]
    assert {path.name for path in folder.parent.iterdir()} == {"ternary", "ternary_dense", "result.json"}
    assert journey.ternary["model"] == found["dense"] != found["packed"], "what later phases train is handed on"
    for name in ("ternary", "ternary_dense"):
        manifest = json.loads((journey.folder(name) / "manifest.json").read_text(encoding="utf-8"))
        assert manifest["metadata"]["weight_grid"] == "ternary"
        assert manifest["parents"] == [found["parent"]]
    assert is_packed(read_model(folder)[0]) and not is_packed(read_model(journey.folder("ternary_dense"))[0])


def test_the_bytes_that_are_claimed_are_those_on_disk(journey):
    rows = {row["model"]: row for row in journey.ternary["metrics"]["models"]}
    on_disk = (journey.folder("ternary") / "model.safetensors").stat().st_size
    assert rows["ternary"]["bytes"] == on_disk
    ratio = journey.ternary["metrics"]["compression/compression_ratio"]
    assert ratio == pytest.approx(rows["parent"]["bytes"] / on_disk)
    assert ratio > 6


def test_the_gate_follows_from_the_evidence(journey):
    verdicts = {record["claim"]: record["verdict"] for record in journey.ternary["evidence"]}
    gate = journey.ternary["artifacts"]["gate"]
    assert {KEPT, TEXT_KEPT} <= set(verdicts)
    if not all(verdicts[claim] == "improved" for claim in (KEPT, TEXT_KEPT)):
        assert not gate["passed"]
    assert gate["passed"] == (not any(reason.startswith("no") for reason in gate["reasons"]))
    assert {record["split"] for record in journey.ternary["evidence"]} == {"report"}


def test_the_packed_model_talks(journey):
    done = run_cli("chat", journey.folder("ternary"), "copy 4", "--json", "--max-tokens", "5", cwd=journey.home)
    assert done.code == 0, done.err
    plain = run_cli("chat", journey.folder("ternary"), "copy 4", "--json", "--max-tokens", "5", cwd=journey.home,
                    AGENT_FORGE_KERNELS="torch")  # fmt: skip
    assert json.loads(done.out)["answer"] == json.loads(plain.out)["answer"], "the same words without the compiler"


def test_a_flipped_bit_in_the_packed_file_is_found(copy):
    path = copy.folder("ternary") / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    done = run_cli("chat", copy.folder("ternary"), "copy 4", cwd=copy.home)
    assert done.code == 4 and "model.safetensors" in done.error


def test_the_report_shows_size_speed_and_skill(copy):
    done = run_cli("report", "--markdown", "mine.md", cwd=copy.home)
    assert done.code == 0, done.err
    page = (copy.home / "storage" / "sessions" / copy.session / "report.html").read_text(encoding="utf-8")
    rows = {row["model"]: row for row in copy.ternary["metrics"]["models"]}
    for text in (page, (copy.home / "mine.md").read_text(encoding="utf-8")):
        assert all(name in text for name in rows)
        assert f"{rows['parent']['bytes'] / rows['ternary']['bytes']:.1f} times smaller" in text


def clockless(metrics: dict) -> dict:
    """What does not depend on how fast the machine was."""
    return {k: v for k, v in timeless(metrics).items() if k != "speed" and not k.startswith(CLOCKED)}


def test_killed_while_it_trains_and_resumed_it_ends_with_the_same_bits(copy):
    (folder,) = copy.home.glob("storage/sessions/*/phase4_bitnet")
    names = ("ternary", "ternary_dense")
    undisturbed = {name: (copy.folder(name) / "model.safetensors").read_bytes() for name in names}
    shutil.rmtree(folder)
    before = len(told(copy.home))
    process = start(copy.home, "run", "--resume", "latest", "--json")
    deadline = time.monotonic() + 100
    while not begun(told(copy.home)[before:], ("rounded", "")) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert not (folder / "result.json").exists()
    done = run_cli("run", "--resume", "latest", "--json", cwd=copy.home)
    assert done.code == 0, done.err
    for name, data in undisturbed.items():
        assert (copy.folder(name) / "model.safetensors").read_bytes() == data, name
    again = json.loads(done.out)["results"]["bitnet"]
    assert timeless(again["evidence"]) == timeless(copy.ternary["evidence"])
    assert clockless(again["metrics"]) == clockless(copy.ternary["metrics"])
