"""Phase 3 as a user meets it: what a run leaves, a model that thinks aloud, killed in its steps, a baked prompt."""

from __future__ import annotations

import json
import shutil
import signal
import time
from pathlib import Path

from agent_forge.phases.quietstar.evidence import BELOW, KNOWN, gate
from forgekit.data.plans import GymMix
from forgekit.data.problems import held_out
from forgekit.measure.evidence import Evidence
from forgekit.measure.problems import by_level
from forgekit.measure.scores import score_problems
from forgekit.models.io import read_model
from tests.conftest import run_cli
from tests.journey.test_interruption import start


def claims(result: dict) -> dict[str, dict]:
    return {record["claim"]: record for record in result["evidence"]}


def test_the_gate_follows_from_the_evidence_and_the_controls(journey):
    found = [Evidence.build(record, "result") for record in journey.thinking["evidence"]]
    theater, told = journey.thinking["metrics"]["theater"], journey.thinking["artifacts"]["gate"]
    assert told["passed"] == (not any(reason.startswith("no") for reason in told["reasons"]))
    decision = gate("fall_back", KNOWN in {item.claim for item in found}).decide(found)
    assert set(decision.reasons) <= set(told["reasons"]), "every claim that is asked for, as it was measured"
    assert theater["detected"] == any(reason.startswith("no: theater") for reason in told["reasons"])
    assert theater["detected"] == any(reason.startswith("no: ") for reason in theater["reasons"])


def test_every_condition_was_measured_on_the_same_questions(journey):
    metrics, found = journey.thinking["metrics"], claims(journey.thinking)
    rows = {row["condition"]: row for row in metrics["controls"]}
    assert len(rows) == 6 and len({row["n"] for row in rows.values()}) == 1
    assert all(row["low"] <= row["accuracy"] <= row["high"] for row in rows.values())
    by_name = {"with": "with thoughts", "without": "without thoughts", "parent": "parent"}
    for name, condition in by_name.items():
        key = f"{name}_thoughts" if name != "parent" else name
        assert metrics[f"phase/accuracy_{key}"] == rows[condition]["accuracy"]
    beaten = found["thoughts beat the parent"]
    assert (beaten["before"], beaten["after"]) == (rows["parent"]["accuracy"], rows["with thoughts"]["accuracy"])
    assert beaten["n"] == rows["parent"]["n"] and {record["split"] for record in found.values()} == {"report"}


def test_levels_that_the_parent_cannot_do_are_those_of_the_select_split(journey):
    """Asked again here: what the claim is measured on was decided without the report split."""
    config = journey.thinking["config"]
    mix = [GymMix.build(part, "mix") for part in config["traces"]["mix"]]
    manifests = (path / "manifest.json" for path in (journey.home / "storage" / "sessions").glob("*/*/*"))
    wanted = journey.thinking["artifacts"]["parent"]
    (parent,) = [m.parent for m in manifests if m.is_file() and json.loads(m.read_text())["model_id"] == wanted]
    model, tokenizer = read_model(parent)
    select = held_out(mix, config["evaluation"]["select"], "select")
    known = by_level(select, score_problems(model, tokenizer, select).right)
    below = {cell for cell, right in known.items() if right < config["below"]}
    report = held_out(mix, config["evaluation"]["problems"], "report")
    assert claims(journey.thinking)[BELOW]["n"] == sum(f"{p.family}/{p.level}" in below for p in report) > 0


def test_it_leaves_the_thinker_and_none_of_its_pieces(journey):
    folder = journey.folder("thinker")
    assert {path.name for path in folder.parent.iterdir()} == {"thinker", "result.json"}
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    metadata, metrics = manifest["metadata"], journey.thinking["metrics"]
    assert manifest["model_id"] == journey.thinking["model"] and metadata["thinks"]
    assert metadata["validity_rate"] == metrics["phase/overall_validity_rate"]
    assert metadata["accuracy"] == metrics["phase/final_accuracy"]
    chosen = journey.thinking["artifacts"]["chosen"]
    assert chosen in metadata["tags"] and (folder / "mixer.json").exists() == (chosen == "step 2")
    card = (folder / "README.md").read_text(encoding="utf-8")
    verdict = "was detected" if metrics["phase/theater_detected"] else "was not detected"
    assert f"Theater {verdict}" in card and "| shuffled thoughts |" in card
    assert f"{metrics['phase/traces']:,} written and verified traces" in card


def test_thought_and_answer_come_apart_and_thinking_can_be_switched_off(journey):
    """Also where the gate said no: the thinker is there for study."""
    words = ("chat", "thinker", "add 12 30", "--json", "--max-tokens", "24")
    said = {}
    for think in ("on", "off"):
        done = run_cli(*words, "--think", think, cwd=journey.home)
        assert done.code == 0, done.err
        said[think] = json.loads(done.out)
    assert said["on"]["thought"] and said["off"]["thought"] == ""
    assert all("<think>" not in one["answer"] and "</think>" not in one["answer"] for one in said.values())
    assert said["on"]["model"].endswith("thinker")


def test_the_report_shows_the_controls(copy):
    done = run_cli("report", "--markdown", "mine.md", cwd=copy.home)
    assert done.code == 0, done.err
    page = (copy.home / "storage" / "sessions" / copy.session / "report.html").read_text(encoding="utf-8")
    for text in (page, (copy.home / "mine.md").read_text(encoding="utf-8")):
        for row in copy.thinking["metrics"]["controls"]:
            assert row["condition"] in text, row["condition"]
        assert BELOW in text and "Do the thoughts carry the answers?" in text
    assert "thoughts beat the parent" in done.out


QUICK_BAKE = ("num_epochs=1", "trajectories=8", "held_out=4", "max_tokens=4", "rows=4", "rank=2")


def test_a_prompt_is_baked_into_the_thinker(copy):
    (copy.home / "prompt.txt").write_text("Answer like a pirate.\n", encoding="utf-8")
    settings = [word for one in QUICK_BAKE for word in ("--set", one)]
    words = ("bake", "thinker", "--prompt-file", "prompt.txt", *settings, "--problems", "2", "-o", "baked", "--json")
    done = run_cli(*words, cwd=copy.home)
    assert done.code == 0, done.err
    receipt = json.loads(done.out)
    assert receipt["prompts"][0]["text"] == "Answer like a pirate."
    answer = run_cli("chat", "baked", "add 12 30", "--json", "--max-tokens", "8", cwd=copy.home)
    assert answer.code == 0 and set(json.loads(answer.out)) >= {"thought", "answer"}, answer.err
    weights = [folder / "model.safetensors" for folder in (copy.home / "baked", copy.folder("thinker"))]
    assert weights[0].read_bytes() != weights[1].read_bytes()
    again = run_cli(*words, cwd=copy.home)
    assert again.code == 4 and "exists already" in again.error


def happened(home: Path) -> list[tuple[str, str]]:
    """What phase 3 told so far: kind and name."""
    (path,) = home.glob("storage/sessions/*/events.jsonl")
    lines = (line for line in path.read_bytes().splitlines() if b'"phase":"quietstar"' in line and line.endswith(b"}"))
    events = map(json.loads, lines)
    return [(event["kind"], event["data"].get("name", "")) for event in events]


def begun(events: list[tuple[str, str]], after: tuple[str, str]) -> bool:
    """Whether a checkpoint was written once ``after`` had happened."""
    return after in events and "train_checkpoint" in [kind for kind, _ in events[events.index(after) :]]


def timeless(value):
    """What does not depend on the clock or on the second in which a model was saved."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in CLOCKS}
    return [timeless(one) for one in value] if isinstance(value, list) else value


CLOCKS = {"all_models", "milliseconds", "phase/duration_seconds", "phase/processing_time_ms_per_thought"}


IN_STEP_ONE, IN_STEP_TWO = ("phase_started", ""), ("trained", "no thoughts")


def test_killed_in_both_steps_and_resumed_it_ends_with_the_same_bits(copy):
    """From a session whose phases 1 and 2 are done and whose phase 3 has left nothing but its plan."""
    (folder,) = copy.home.glob("storage/sessions/*/phase3_quietstar")
    undisturbed = (copy.folder("thinker") / "model.safetensors").read_bytes()
    shutil.rmtree(folder)
    told = len(happened(copy.home))
    for after in (IN_STEP_ONE, IN_STEP_TWO):
        process = start(copy.home, "run", "--resume", "latest", "--json")
        deadline = time.monotonic() + 100
        while not begun(happened(copy.home)[told:], after) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, "it ended before it was killed"
        left = [*folder.rglob("checkpoints/*/step-*"), *folder.rglob("pieces/*.safetensors")]
        assert left and not (folder / "result.json").exists()
    done = run_cli("run", "--resume", "latest", "--json", cwd=copy.home)
    assert done.code == 0, done.err
    assert (copy.folder("thinker") / "model.safetensors").read_bytes() == undisturbed
    again = json.loads(done.out)["results"]["quietstar"]
    for name in ("evidence", "artifacts", "metrics"):
        assert timeless(again[name]) == timeless(copy.thinking[name]), name
