"""From nothing to a talking model by the command line, and every command that looks at the result."""

from __future__ import annotations

import io
import json

import pytest

from forgekit.measure.evidence import Evidence
from forgekit.tracking.loggers import PhaseLogger, PipelineLogger
from tests.conftest import run_cli

SPECIALISTS = ("reasoning", "memory_integration", "adaptive_computation")
# DESIGN, section 3 (3).
EVIDENCE = (
    "claim", "metric", "before", "after", "baseline", "ci95", "n", "seeds", "split", "chance", "compute", "verdict",
)  # fmt: skip


@pytest.fixture
def ask(forge, journey):
    """A command on the finished session; returns its JSON."""

    def call(*words: object):
        done = forge("--storage", journey.home / "storage", *words, "--json")
        assert done.code == 0, done.err
        return json.loads(done.out)

    return call


def test_run_prints_one_json_document_with_every_result(journey):
    fields = ("success", "model", "phase_name", "metrics", "artifacts", "duration_seconds", "config", "error")
    assert set(journey.result) == {*fields, "evidence", "start_time", "end_time"}
    assert journey.result["success"] and journey.result["error"] is None
    assert journey.result["artifacts"]["model_names"] == list(SPECIALISTS)
    assert journey.result["artifacts"]["seeds"] == [42, 1337, 2023]
    assert journey.result["start_time"] < journey.result["end_time"]
    assert set(journey.result["artifacts"]["gate"]) == {"passed", "reasons"}


def test_report_prints_evidence_with_exactly_the_fields_of_the_design(ask, journey):
    records = ask("report", journey.session[:8])
    assert records == journey.evidence
    assert all(tuple(record) == EVIDENCE for record in records)
    assert tuple(Evidence.model_fields) == EVIDENCE
    assert {r["verdict"] for r in records} <= {"improved", "no-difference", "worse", "no-signal"}
    claims = " ".join(r["claim"] for r in records)
    for word in (*SPECIALISTS, "trunk learned", "beyond the attention window", "equal training FLOPs", "halting"):
        assert word in claims, word


def test_a_gate_never_passes_on_claims_without_signal(journey):
    verdicts = {e["claim"]: e["verdict"] for e in journey.result["evidence"]}
    needed = [c for c in verdicts if c.startswith("trunk learned") or c.endswith("beats the trunk on its speciality")]
    gate = journey.result["artifacts"]["gate"]
    assert gate["passed"] == all(verdicts[c] == "improved" for c in needed)
    assert len(gate["reasons"]) == len(needed)


def test_every_metric_of_the_catalogue_was_emitted(journey):
    # Through the public logger: what an earlier process of the session emitted counts as emitted.
    with PipelineLogger(journey.home / "storage" / "sessions" / journey.session, journey.session) as pipeline:
        logger: PhaseLogger = pipeline.phase("cognate")
        merging: PhaseLogger = pipeline.phase("evomerge")
        thinking: PhaseLogger = pipeline.phase("quietstar")
        ternary: PhaseLogger = pipeline.phase("bitnet")
    assert len(logger.catalogue) > 30 and len(merging.catalogue) > 600 and len(thinking.catalogue) > 80
    assert len(ternary.catalogue) > 40
    assert logger.missing() == [] and thinking.missing() == [] and ternary.missing() == []
    made = journey.merged["metrics"]["phase/generations_completed"]
    assert made >= 1
    later = [
        name for number in range(made, 51) for name in merging.catalogue if name.startswith(f"generation_{number}/")
    ]
    assert set(merging.missing()) == set(later), "generations that were not made, and nothing else"


def test_models_lists_all_and_they_descend_from_the_trunk(ask, journey):
    rows = ask("models", "--session", journey.session)
    assert {r["model_name"] for r in rows} == {"trunk", *SPECIALISTS, "champion", "thinker", "ternary", "ternary_dense"}
    trunk = journey.result["artifacts"]["trunk"]
    assert [r["model_id"] for r in ask("models", "--tag", "trunk")] == [trunk]
    for model_id in journey.result["artifacts"]["all_models"]:
        assert ask("model", model_id, "--info")["ancestors"] == [trunk]
    info = ask("model", trunk)
    made = {*journey.result["artifacts"]["all_models"], journey.merged["model"], journey.thinking["model"]}
    made |= {journey.ternary["artifacts"]["packed"], journey.ternary["artifacts"]["dense"]}
    assert info["ancestors"] == [] and set(info["descendants"]) == made
    champion = ask("model", journey.merged["model"])
    assert set(champion["ancestors"]) == {trunk, *journey.result["artifacts"]["all_models"]}
    assert {trunk, journey.thinking["artifacts"]["parent"]} <= set(ask("model", journey.thinking["model"])["ancestors"])
    assert info["parameters"] > 50_000 and info["session_id"] == journey.session and info["data_hash"]


def test_status_phases_logs_and_plan_speak_json(ask, journey):
    (row,) = ask("status")
    assert (row["session_id"], row["status"], row["progress_percent"]) == (journey.session, "completed", 100.0)
    states = {r["phase_name"]: r["status"] for r in ask("status", "--session", "latest")}
    assert states["cognate"] == "completed" and states["compression"] == "pending"
    phases = ask("phases")
    assert [p["number"] for p in phases] == list(range(1, 9)) and phases[0]["built"]
    plan = ask("plan", "--profile", journey.profile)
    assert plan["phases"] == ["cognate", "evomerge", "quietstar", "bitnet"] and plan["disk_bytes"] > 0
    assert [s["stage"] for s in plan["stages"] if s["phase"] == "cognate"] == ["trunk", *SPECIALISTS]
    assert sum(plan["model"]["split"].values()) == plan["model"]["parameters"]


def test_logs_are_json_lines_that_begin_and_end_with_the_session(forge, journey):
    done = forge("--storage", journey.home / "storage", "logs", "--tail", "0", "--json")
    events = [json.loads(line) for line in done.out.splitlines()]
    assert [events[0]["kind"], events[-1]["kind"]] == ["session_started", "session_ended"]
    assert events[-1]["data"]["status"] == "completed"
    assert {"torch", "cpu_capability", "threads"} <= events[0]["data"]["environment"].keys()
    some = forge("--storage", journey.home / "storage", "logs", "--kind", "trained")
    further = journey.thinking["artifacts"]["chosen"] == "step 2"  # then the control without thoughts goes on too
    pieces = 4 + 4 + further + len(journey.ternary["metrics"]["losses"])
    assert len(some.out.splitlines()) == pieces, "trunk and specialists; two steps and their controls; phase 4's"


def test_tables_for_people_name_what_json_names(forge, journey):
    storage = ("--storage", journey.home / "storage")
    assert journey.session[:8] in forge(*storage, "status").out
    assert "cognate" in forge(*storage, "status", "--session", "latest").out
    assert "not yet" in forge(*storage, "phases").out
    assert "trunk learned copy" in forge(*storage, "report").out
    assert "memory_integration" in forge(*storage, "models").out
    assert "the champion beats the best parent" in forge(*storage, "report").out
    assert "specialization" in forge(*storage, "model", "latest").out
    plan = forge(*storage, "plan", "--profile", journey.profile)
    assert "embedding" in plan.out and "MFLOP/token" in plan.err


def test_chat_answers_once_as_json_and_line_by_line_from_a_pipe(journey):
    trunk = journey.result["artifacts"]["trunk"]
    done = run_cli("chat", trunk, "copy 4", "--json", "--max-tokens", "5", cwd=journey.home)
    answer = json.loads(done.out)
    assert done.code == 0 and answer["question"] == "copy 4" and answer["model"].endswith("trunk")
    lines = run_cli("chat", trunk, "--max-tokens", "5", cwd=journey.home, stdin="copy \\\n4\ncopy 4\n/quit\nnever\n")
    assert lines.code == 0, lines.err
    # The first question has two lines, so its answer is its own; the second is the one asked above.
    assert lines.out.endswith(answer["answer"] + "\n")


def test_chat_on_a_terminal_obeys_slash_commands(forge, journey, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    commands = "/params\n/params max_tokens=3\n/params temprature=1\n/params [/x]\n/reset\n/what\n"
    words = commands + "\ncopy \\\n4\n/quit\nnever\n"
    monkeypatch.setattr("sys.stdin", Terminal(words))
    done = forge("--storage", journey.home / "storage", "chat", journey.folder("trunk"), "--max-tokens", "4")
    assert done.code == 0, done.err
    assert "max_tokens=4" in done.err and "max_tokens=3" in done.err and "forgotten" in done.err
    assert "did you mean temperature" in done.err and "[/x]" in done.err
    assert done.err.count("/quit leaves") == 2, "once as a greeting, once for the unknown command"
    assert "...>" in done.out


def test_chat_with_one_word_takes_a_model_or_asks_the_newest(forge, journey, monkeypatch):
    storage = ("--storage", journey.home / "storage")
    asked = json.loads(forge(*storage, "chat", "copy 4", "--json", "--max-tokens", "3").out)
    assert asked["model"].endswith("/ternary"), "of the newest model the packed one talks"
    again = json.loads(forge(*storage, "chat", "latest", "copy 4", "--json", "--max-tokens", "3").out)
    assert again["model"] == asked["model"]
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    for model in (journey.result["model"], journey.folder("trunk")):
        assert forge(*storage, "chat", model).code == 0
    assert forge(*storage, "model", "latest", "--load").code == 0


def test_run_for_people_ends_with_evidence_a_gate_and_a_conversation(forge, copy):
    done = forge("--storage", copy.home / "storage", "run", "--resume", copy.session[:8])
    assert done.code == 0, done.err
    assert "trunk learned copy" in done.out and "a short conversation" in done.out
    assert all(f"gate {phase}" in done.err for phase in ("cognate", "evomerge", "quietstar", "bitnet"))
    assert "next: agent-forge report" in done.err
    assert "already finished" in done.err


def test_run_phase_takes_a_number_or_a_name(forge, copy):
    for phase in ("1", "cognate"):
        done = forge("--storage", copy.home / "storage", "run", "--resume", "latest", "--phase", phase, "--json")
        assert list(json.loads(done.out)["results"]) == ["cognate"]


def test_chat_with_a_model_that_is_not_there_says_which_are(forge, journey):
    done = forge("--storage", journey.home / "storage", "chat", "cognate_trunc_20200101_000000", "hello")
    assert done.code == 4 and "no model 'cognate_trunc_20200101_000000'" in done.error
    assert "did you mean cognate_trunk" in done.error


def test_resuming_a_finished_session_makes_nothing_again(forge, copy):
    before = {p: p.stat().st_mtime_ns for p in copy.home.rglob("*.safetensors")}
    done = forge("--storage", copy.home / "storage", "run", "--resume", "latest", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["results"]["cognate"]["evidence"] == copy.result["evidence"]
    assert {p: p.stat().st_mtime_ns for p in copy.home.rglob("*.safetensors")} == before


def test_validate_is_content_then_names_the_one_changed_file(forge, copy):
    storage = ("--storage", copy.home / "storage")
    good = forge(*storage, "validate", "--json")
    assert good.code == 0 and [r["result"] for r in json.loads(good.out)] == ["ok"] * 8
    weights = copy.folder("reasoning") / "model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(changed)
    bad = forge(*storage, "validate", "--json")
    assert bad.code == 4
    (told,) = [r["result"] for r in json.loads(bad.out) if r["result"] != "ok"]
    assert str(weights) in told and "changed" in told
    assert forge(*storage, "model", copy.folder("reasoning"), "--load").code == 4


def test_clean_and_vacuum_remove_what_is_told_and_nothing_else(forge, copy):
    storage = ("--storage", copy.home / "storage")
    assert json.loads(forge(*storage, "clean", "--json").out)["removed"] == {}
    assert json.loads(forge(*storage, "clean", "--failed", "--json").out)["removed"] == {}
    assert copy.folder("trunk").is_dir()
    removed = json.loads(forge(*storage, "clean", "--age", "0", "--json").out)
    assert list(removed["removed"]) == [copy.session] and removed["bytes_freed"] > 100_000
    assert not (copy.home / "storage" / "sessions" / copy.session).exists()
    assert json.loads(forge(*storage, "models", "--json").out) == []
    assert json.loads(forge(*storage, "vacuum", "--json").out)["main_bytes"] > 0


def test_doctor_knows_the_machine(ask):
    assert {r["check"] for r in ask("doctor")} >= {"python", "torch", "memory free", "disk free"}


def test_data_list_show_and_check(ask, tmp_path):
    sets = {r["name"]: r for r in ask("data", "list")}
    assert sets["python_prose"]["found"] and "hub" in sets["tinystories"]["where"]
    shown = ask("data", "show", "gym:sort", "--rows", "2", "--level", "2")
    assert [sorted(r["prompt"].split()[-1]) == sorted(r["answer"]) for r in shown["rows"]] == [True, True]
    story = "Once upon a time there was a little girl who lived in a small house near the sea with her old cat."
    (tmp_path / "tinystories").mkdir()
    (tmp_path / "tinystories" / "train.jsonl").write_text(json.dumps({"text": story}) + "\n", encoding="utf-8")
    shown = ask("data", "show", "tinystories", "--data", tmp_path)
    assert shown["rows"] == [{"text": story}] and str(tmp_path) in shown["note"]
    (tmp_path / "bench").mkdir()
    leaked = {"id": "1", "question": story, "choices": {"text": ["yes", "no"], "label": ["A", "B"]}, "answerKey": "A"}
    (tmp_path / "bench" / "arc_easy_test.jsonl").write_text(json.dumps(leaked) + "\n", encoding="utf-8")
    (row,) = ask("data", "check", "tinystories", "--data", tmp_path)
    assert (row["name"], row["overlap"]["hits"]) == ("tinystories", 1)
