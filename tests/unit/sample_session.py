"""A small session in a store, as sample input for the report: written by hand in the shapes that the phases leave.

The registry, the artifacts and the event log are the real ones; only the numbers are made up, and nothing trains.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from forgekit.store.artifact import Manifest, write_artifact
from forgekit.store.storage import ModelStorage
from forgekit.tracking.loggers import PipelineLogger

SESSION = "sample-session"
SPECIALISTS = ("reasoning", "memory_integration", "adaptive_computation")
NASTY = "<script>alert('x')</script> & | `77`"
ENVIRONMENT = {"torch": "2.13.0", "cpu_capability": "AVX2", "threads": 2, "device": "cpu", "device_name": "cpu"}


def claim(text: str, verdict: str, **changes: Any) -> dict[str, Any]:
    """One record of evidence."""
    values = {"claim": text, "metric": "exact_match", "before": 0.4, "after": 0.5, "baseline": None, "n": 400}
    values |= {"ci95": [0.06, 0.14], "seeds": [42], "split": "report", "chance": 0.125, "compute": {}}
    return {**values, "verdict": verdict, **changes}


def folder(storage: ModelStorage, phase: int = 1) -> Path:
    """The folder of phase 1 or 2."""
    return storage.session_path(SESSION) / ("phase1_cognate", "phase2_evomerge")[phase - 1]


def model(storage: ModelStorage, name: str, phase: str, second: int, parents: list[str]) -> str:
    """A finished artifact with a thousand bytes of weights; returns its id."""
    facts = {"model_id": f"{phase}_{name}_20261121_1300{second:02d}", "parameters": 250, "size_mb": 0.0}
    facts |= {"created_at": f"2026-11-21T13:00:{second:02d}+00:00", "parents": parents, "seeds": [40 + second]}
    manifest = Manifest.describe(SESSION, phase, name, {**facts, "config_hash": "c" * 64, "data_hash": "d" * 64})
    place = storage.model_path(SESSION, phase, name)
    write_artifact(place, lambda work: (work / "model.safetensors").write_bytes(bytes(1000)), manifest)
    return storage.registry.register_model(manifest, place)


def events(storage: ModelStorage) -> None:
    """The log of a session with one phase: losses, a step that a resumed run logged again, data, memory."""
    with PipelineLogger(storage.session_path(SESSION), SESSION) as pipeline:
        pipeline.event("session_started", profile="nano", environment=ENVIRONMENT)
        pipeline.event("resources", process_rss_gb=1.5)
        phase = pipeline.phase("cognate")
        phase.event("phase_started", inputs=[])
        phase.event("data", note="tiny & <small>: 3 of 4 rows")
        for step, loss in ((10, 5.0), (20, 4.0), (20, 3.5), (30, 2.0)):
            phase.event("trunk_metrics", step=step, **{"train/loss": loss})
        for place in (1, 2, 3):
            for step, loss in ((10, 1.0 + place), (20, 0.5 * place)):
                phase.metrics({f"model_{place}/train/loss": loss, f"model_{place}/train/grad_norm": 9.0}, step=step)
        phase.event("trained", name="trunk", tokens=12_000, losses=[])
        phase.event("phase_finished", seconds=61.0, success=True)


def talk(names: tuple[str, ...]) -> list[dict[str, Any]]:
    """A right and a wrong answer per model, the wrong one full of markup."""
    long = "k7 v3 " * 80 + "what is k7?"
    rows = [("copy 1 2", "1 2", "1 2", True), (f"<b>bold</b> {long}", NASTY, "v3", False)]
    keys = ("asked", "answered", "expected", "right")
    return [{"model": name, **dict(zip(keys, row))} for name in names for row in rows]


def phase_1(trunk: str, made: list[str], passed: bool = True) -> dict[str, Any]:
    """``result.json`` of phase 1."""
    evidence = [
        claim("trunk learned copy", "improved"),
        claim("reasoning on memory_integration", "no-signal", before=0.1, after=0.11, ci95=[-0.02, 0.04]),
        claim("trunk models held-out text", "improved", metric="bits_per_byte", chance=None, before=4.0, after=2.5,
              ci95=[-1.6, -1.4]),
        claim("reasoning on copy", "worse", before=0.9, after=0.8, ci95=[-0.15, -0.05]),
        claim("adaptive_computation keeps its accuracy when it halts", "no-difference", after=0.4, ci95=[-0.01, 0.01]),
    ]  # fmt: skip
    levels = {"trunk": {"copy/1": 1.0, "copy/10": 0.25, "copy/2": 0.5}, "reasoning": {"copy/1": 0.875, "add/3": 0.0}}
    artifacts = {
        "trunk": trunk,
        "all_models": made,
        "model_names": list(SPECIALISTS),
        "conversation": talk(SPECIALISTS),
    }
    artifacts["gate"] = {"passed": passed, "reasons": ["yes: trunk learned copy needs improved; trunk learned copy: …"]}
    histogram = {"adaptive_computation, text": {"1": 0.25, "2": 0.75}}
    return {
        "key": {"config": "f" * 64, "inputs": [], "data": ""}, "success": True, "model": trunk, "phase_name": "cognate",
        "metrics": {"levels": levels, "act_histogram": histogram}, "artifacts": artifacts, "duration_seconds": 61.0,
        "config": {}, "error": None, "start_time": "", "end_time": "", "evidence": evidence,
    }  # fmt: skip


def phase_2(champion: str, parents: list[str], trunk: str) -> dict[str, Any]:
    """``result.json`` of phase 2, whose gate said no."""
    worse = claim("champion keeps reasoning", "worse", before=0.6, after=0.5, ci95=[-0.15, -0.05])
    said = "champion keeps reasoning: worse (exact_match 0.6 to 0.5, 95 % interval of the change [-0.15, -0.05], n=400)"
    reasons = [f"no: champion keeps reasoning needs not-worse; {said}"]
    reasons.append("no: champion answers needs improved, there is no evidence for it")
    history = [
        {"generation": g, "best_fitness": 0.5 + g / 50, "avg_fitness": 0.4 + g / 60, "champion_fitness": 0.5 + g / 50,
         "diversity_score": 0.5 / (1 + g), "evaluations": 8, "elite_combo_usage": {"000": 2}}
        for g in range(4)
    ]  # fmt: skip
    parts = {"perplexity": 4.25, "bits_per_byte": 2.125, "accuracy": 0.625, "flops_per_token": 1.5e6, "bytes": 1000}
    table = {
        "reasoning": {"select": {"composite": 0.5, **parts}, "report": {"composite": 0.49, **parts}},
        "champion": {"select": {"composite": 0.56, **parts}, "report": {"composite": 0.53, **parts}},
    }
    runs = [
        {"strategy": name, "seed": seed, "evaluations": 3, "curve": [0.5, 0.51 + seed / 100, 0.52 + seed / 100],
         "select": 0.52 + seed / 100, "report": 0.51}
        for name in ("default", "random_search") for seed in (1, 2, 3)
    ]  # fmt: skip
    metrics = {"levels": {"champion": {"copy/1": 1.0}}, "fitness_history": history, "fitness_table": table}
    metrics["kept"] = {"reasoning": {"before": 0.6, "after": 0.5, "kept": False}, "text": {"after": 1.0}}
    metrics |= {"gains": {"select": 0.06, "report": 0.04}, "strategies": runs, "phase/champion_recipe": "ties <0.5>"}
    artifacts = {"all_models": [champion], "model_names": ["champion"], "parents": parents, "base": trunk}
    artifacts |= {"gate": {"passed": False, "reasons": reasons}, "strategy": "default", "conversation": []}
    artifacts["stopped"] = "no better champion in 5 generations"
    return {
        "key": {"config": "e" * 64, "inputs": parents, "data": ""}, "success": True, "model": champion,
        "phase_name": "evomerge", "metrics": metrics, "artifacts": artifacts, "duration_seconds": 100.0,
        "config": {"kept_within": 0.03, "search": {"min_diversity": 0.125}}, "error": None, "start_time": "",
        "end_time": "",
        "evidence": [worse],
    }  # fmt: skip


def write_result(storage: ModelStorage, phase: int, result: dict[str, Any]) -> Path:
    """Put ``result.json`` in its place."""
    path = folder(storage, phase) / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def sample_session(root: Path, phases: int = 2, status: str = "completed") -> ModelStorage:
    """A store with one session: both phases, the first one, or (0) a session that has only begun."""
    storage = ModelStorage(root)
    profile = {"name": "nano", "gate": "fall_back", "phases": {"cognate": {}, "evomerge": {}}}
    storage.registry.create_session({"profile": profile, "data": None, "until": None}, SESSION)
    if phases:
        events(storage)
        trunk = model(storage, "trunk", "cognate", 1, [])
        made = [model(storage, name, "cognate", 2 + i, [trunk]) for i, name in enumerate(SPECIALISTS)]
        write_result(storage, 1, phase_1(trunk, made))
    if phases == 2:
        champion = model(storage, "champion", "evomerge", 9, [*made, trunk])
        write_result(storage, 2, phase_2(champion, made, trunk))
    storage.registry.update_session(SESSION, status=status)
    return storage
