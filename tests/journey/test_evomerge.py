"""Phase 2 as a user meets it: what a run leaves, killed in the middle of its search, and models it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.conftest import run_cli
from tests.journey.test_interruption import start

GENERATION = b'"kind":"generation"'


def phase_folder(home: Path) -> Path:
    (folder,) = home.glob("storage/sessions/*/phase2_evomerge")
    return folder


def generations(home: Path) -> int:
    """Generations that were told in the events."""
    return sum(path.read_bytes().count(GENERATION) for path in home.glob("storage/sessions/*/events.jsonl"))


def test_a_run_ends_with_a_champion_and_what_can_be_said_of_it(journey):
    merged = journey.merged
    claims = {record["claim"]: record for record in merged["evidence"]}
    best = claims["the champion beats the best parent"]
    assert best["metric"] == "composite_fitness" and best["split"] == "report" and best["n"] > 100
    assert merged["artifacts"]["gate"]["passed"] == (best["verdict"] == "improved")
    table = merged["metrics"]["fitness_table"]
    assert set(table) == {"trunk", *journey.result["artifacts"]["model_names"], "generation 0 best", "champion"}
    assert best["after"] == pytest.approx(table["champion"]["report"]["composite"], abs=1e-6)
    parents = [table[name]["select"]["composite"] for name in journey.result["artifacts"]["model_names"]]
    gain = merged["metrics"]["gains"]["select"]
    assert gain == pytest.approx(table["champion"]["select"]["composite"] - max(parents))
    history = merged["metrics"]["fitness_history"]
    assert history[-1]["champion_fitness"] == pytest.approx(table["champion"]["select"]["composite"], abs=1e-6)
    assert {run["strategy"] for run in merged["metrics"]["strategies"]} == {"elite", "tournament", "cma_es", "random"}
    assert len({run["evaluations"] for run in merged["metrics"]["strategies"]}) == 1, "equal evaluations"
    conversation = merged["artifacts"]["conversation"]
    assert conversation and all(line["right"] == (line["answered"] == line["expected"]) for line in conversation)


def test_it_leaves_the_champion_and_none_of_the_search(journey):
    folder = journey.folder("champion")
    left = {path.name for path in folder.parent.iterdir()}
    assert left == {"champion", "evolution.json", "result.json"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["metadata"]["fitness"] == journey.merged["metrics"]["handoff/champion_fitness"]
    assert len(manifest["parents"]) == 4 and manifest["metadata"]["merge_technique"]
    card = (folder / "README.md").read_text()
    assert f"{manifest['metadata']['fitness']:.4f}" in card and "winner's curse" in card


def test_killed_in_its_search_and_resumed_it_ends_with_the_same_bits(copy):
    """From a session whose phase 1 is done and whose phase 2 has left nothing but its plan."""
    folder, before = phase_folder(copy.home), generations(copy.home)
    undisturbed = (copy.folder("champion") / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    for more in (1, 2):
        process = start(copy.home, "run", "--resume", "latest", "--json")
        deadline = time.monotonic() + 100
        while generations(copy.home) < before + more and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        # Its workers hold the same pipes: were they to stay behind, this would never come.
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert not (folder / "result.json").exists() and (folder / "evolution.json").is_file()
    done = run_cli("run", "--resume", "latest", "--json", cwd=copy.home)
    assert done.code == 0, done.err
    assert (copy.folder("champion") / "model.safetensors").read_bytes() == undisturbed
    again = json.loads(done.out)["results"]["evomerge"]
    for name in ("evidence", "artifacts"):
        assert without_ids(again[name]) == without_ids(copy.merged[name]), name
    assert again["metrics"]["phase/final_fitness"] == copy.merged["metrics"]["phase/final_fitness"]


def without_ids(value):
    """What does not depend on the second in which a model was saved."""
    if isinstance(value, dict):
        return {k: without_ids(v) for k, v in value.items() if k not in ("all_models", "compute")}
    return value
