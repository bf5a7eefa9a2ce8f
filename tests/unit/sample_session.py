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
    """The folder of phase 1, 2, 3 or 4."""
    names = ("phase1_cognate", "phase2_evomerge", "phase3_quietstar", "phase4_bitnet")
    return storage.session_path(SESSION) / names[phase - 1]


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


def controls() -> list[dict[str, Any]]:
    """The conditions of phase 3 in their order."""
    rows = [
        ("with thoughts", (0.83, 0.80, 0.86), None, "the model thinks, then answers"),
        ("without thoughts", (0.13, 0.10, 0.16), None, "thinking switched off"),
        ("shuffled thoughts", (0.18, 0.15, 0.21), (0.93, 0.88, 0.97), "the thought of another question <of its kind>"),
        ("filler tokens", (0.125, 0.10, 0.15), (1.01, 0.97, 1.05), "as many neutral tokens"),
        ("trained without thoughts", (0.25, 0.22, 0.28), None, "equal compute, answers only"),
        ("parent", (0.12, 0.10, 0.14), None, "before this phase"),
    ]
    found = []
    for name, (accuracy, low, high), lost, meaning in rows:
        ends = dict(zip(("lost", "lost_low", "lost_high"), lost or (None, None, None)))
        found.append({"condition": name, "accuracy": accuracy, "low": low, "high": high, "n": 600, **ends})
        found[-1]["meaning"] = meaning
    return found


def theater(detected: bool = False) -> dict[str, Any]:
    """The judgement of phase 3, with a requirement of every state."""
    return {
        "detected": detected,
        "reasons": [
            "yes: thoughts add +70.0 [+66.0, +74.0] points to thinking off; needs more than 0",
            "no: filler thoughts lose 12 % [3, 21] of the gain; needs at least 50%" if detected
            else "yes: filler thoughts lose 101 % [97, 105] of the gain; needs at least 50%",
            "not used: coherence and right answers: coherence was not scored",
        ],
        "predictive_power": {"value": 0.99, "low": 0.98, "high": 1.0},
        "correlation": {"value": 0.41, "low": 0.33, "high": 0.49, "note": "over 600 questions"},
    }  # fmt: skip


def examples() -> list[dict[str, Any]]:
    """A right thought, a wrong one, and one full of markup that is no thought."""
    keys = ("asked", "thought", "answered", "expected", "right", "valid", "strategy", "note")
    rows = [
        ("add 38 25", "<think><expert>clerk<step>8+5+0=13<step>3+2+1=6</think>", "63", "63", True, True, "expert", ""),
        ("add 57 66", "<step>7+6+0=13<step>5+6+1=13", "133", "123", False, False, "mece", "wrong: step 2 is false"),
        (
            "copy x",
            f"{NASTY}<step></step><reason>[b]c",
            "",
            "x",
            False,
            False,
            "multi_domain",
            "[red]as it is[/]",
        ),
    ]
    return [dict(zip(keys, row)) for row in rows]


def phase_3(thinker: str, champion: str) -> dict[str, Any]:
    """``result.json`` of phase 3."""
    evidence = [
        claim("thoughts help where the parent is below half", "improved", before=0.12, after=0.83, ci95=[0.67, 0.75]),
        claim("thinker keeps its skills", "no-difference", metric="skills_with_grace", before=0.5,
              after=0.505, ci95=[-0.01, 0.02]),
        claim("step 2 at equal compute", "worse", metric="nats_per_token", chance=None, before=1.87, after=1.88,
              ci95=[0.004, 0.016]),
        claim("thoughts are valid", "improved", metric="valid_thoughts", chance=None, before=0.75, after=0.9,
              ci95=[0.12, 0.17]),
    ]  # fmt: skip
    levels = {"parent": {"add/2": 0.0, "add/3": 0.0}, "thinker": {"add/2": 1.0, "add/3": 0.875}}
    levels["no thoughts"] = {"add/2": 0.25}
    thoughts = {"total": 600, "valid": 540, "validity_rate": 0.9, "coherence": 0.78, "semantic": 0.71, "logical": 0.93}
    thoughts |= {"relevance": 0.66, "fluency": 0.81, "length": 31.2, "milliseconds": 2.1}
    thoughts["by_strategy"] = {
        "mece": {"share": 0.13, "followed": 0.98, "valid": 0.91, "right": 0.9},
        "multi_domain": {"share": 0.2},
    }
    thoughts["by_family"] = {"add": {"valid": 0.95, "right": 0.9, "n": 300}, "walk": {"valid": 0.8, "n": 300}}
    one = {"traces": 22424, "duplicates": 76, "refused": 0, "held_out_valid": 0.88, "converged": True}
    one["losses"] = [[100, 2.0], [200, 0.9], [300, 0.5]]
    two = {
        "chosen": "step 1",
        "why": "step 2 answers no better on the select split",
        "rewards": [[10, 0.01], [20, 0.02]],
    }
    two |= {"nats": {"before": 1.9, "after": 1.88, "continued": 1.87}, "select": {"step 1": 0.82, "step 2": 0.81}}
    two["listening"] = [[10, 0.1], [20, 0.15]]
    metrics = {"levels": levels, "controls": controls(), "theater": theater(), "thoughts": thoughts}
    metrics["steps"] = {"one": one, "two": two}
    said = talk(("thinker",))
    said[0]["thought"] = "<expert>clerk<step>1 2"
    artifacts = {"all_models": [thinker], "model_names": ["thinker"], "conversation": said, "examples": examples()}
    artifacts["gate"] = {"passed": True, "reasons": ["yes: thoughts help needs improved"]}
    return {
        "key": {"config": "9" * 64, "inputs": [champion], "data": ""}, "success": True, "model": thinker,
        "phase_name": "quietstar", "metrics": metrics, "artifacts": artifacts, "duration_seconds": 170.0,
        "config": {}, "error": None, "start_time": "", "end_time": "", "evidence": evidence,
    }  # fmt: skip


def sizes() -> list[dict[str, Any]]:
    """The models of phase 4 in their order."""
    rows = [
        ("parent", 3_540_000, (0.94, 0.915, 0.958), 46.6),
        ("ternary", 345_000, (0.915, 0.887, 0.937), 47.7),
        ("ternary, in floats", 3_540_000, (0.917, 0.889, 0.938), 47.6),
        ("ternary, not trained", 345_000, (0.13, 0.105, 0.16), 90.9),
        ("int8, not trained", 956_000, (0.94, 0.915, 0.958), 46.6),
        ("int4, not trained", 587_000, (0.93, 0.904, 0.95), 47.1),
        ("full precision, same bytes", 338_000, (0.22, 0.189, 0.255), 120.5),
    ]
    keys = ("accuracy", "low", "high")
    return [
        {"model": name, "bytes": taken, "ratio": rows[0][1] / taken, **dict(zip(keys, shares)), "n": 600,
         "perplexity": perplexity, "bits_per_byte": 2.25}
        for name, taken, shares, perplexity in rows
    ]  # fmt: skip


def phase_4(packed: str, dense: str, thinker: str) -> dict[str, Any]:
    """``result.json`` of phase 4, whose gate said no."""
    evidence = [
        claim("skills, with grace", "no-difference", metric="skills_with_grace", before=0.92, after=0.915, n=600,
              ci95=[-0.017, 0.007]),
        claim("text, with grace", "improved", metric="bits_per_token_with_grace", chance=None, before=5.68, after=5.58,
              ci95=[-0.13, -0.08], n=64),
        claim("training brings back what rounding lost", "improved", before=0.13, after=0.915, ci95=[0.75, 0.82],
              n=600),
    ]  # fmt: skip
    levels = {row["model"]: {"sort/1": 1.0, "sort/2": 0.95, "sort/10": 0.9, "add/3": 0.9} for row in sizes()}
    levels["ternary"] |= {"sort/10": 0.6, "add/3": 0.95, "sort/2": 0.9}
    levels["ternary, not trained"] |= {"sort/1": 0.2, "sort/10": 0.0}
    metrics: dict[str, Any] = {"models": sizes(), "levels": levels, "recovery": {"skills": 0.969, "perplexity": 0.975}}
    metrics["speed"] = {
        "parent": {"tokens_per_second": 600.0, "blocks": [590.0, 600.0, 620.0]},
        "ternary": {"tokens_per_second": 840.0, "blocks": [800.0, 840.0, 850.0]},
    }
    metrics["select"] = {"parent": 0.945, "ternary, not trained": 0.14, "ternary": 0.92}
    metrics["losses"] = {
        "ternary": [2.0, 1.8, 1.6, 1.5] * 50,
        "same bytes": [7.0 - step / 50 for step in range(200)],
    }
    metrics |= {"quality/accuracy_retention": 0.966, "performance/inference_speedup": 1.4, "phase/finetuned": True}
    metrics |= {"performance/memory_reduction": 8.66, "compression/sparsity_ratio": 0.33, "phase/success": True}
    said = "skills, with grace: no-difference (skills_with_grace 0.92 to 0.915, 95 % interval of the change "
    reasons = [f"no: skills, with grace needs improved; {said}[-0.017, +0.007], n=600)"]
    reasons += ["yes: text, with grace needs improved; text, with grace: improved (bits_per_token_with_grace …)"]
    reasons += ["no: perplexity grew by 12.3 %, 10 % is allowed"]
    artifacts = {"all_models": [dense], "model_names": ["ternary_dense"], "packed": packed, "dense": dense}
    artifacts |= {"chosen": "ternary", "on_grid": True, "parent": thinker}
    artifacts |= {"gate": {"passed": False, "reasons": reasons}}
    artifacts["conversation"] = [
        {"model": "ternary", "asked": "sort 312", "thought": "", "answered": "123", "expected": "123", "right": True}
    ]
    return {
        "key": {"config": "8" * 64, "inputs": [thinker], "data": ""}, "success": True, "model": dense,
        "phase_name": "bitnet", "metrics": metrics, "artifacts": artifacts, "duration_seconds": 130.0,
        "config": {}, "error": None, "start_time": "", "end_time": "", "evidence": evidence,
    }  # fmt: skip


def write_result(storage: ModelStorage, phase: int, result: dict[str, Any]) -> Path:
    """Put ``result.json`` in its place."""
    path = folder(storage, phase) / "result.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result), encoding="utf-8")
    return path


def sample_session(root: Path, phases: int = 2, status: str = "completed") -> ModelStorage:
    """A store with one session: four phases, three, two, the first one, or (0) a session that has only begun."""
    storage = ModelStorage(root)
    planned = ("cognate", "evomerge", "quietstar", "bitnet")[: max(2, phases)]
    profile = {"name": "nano", "gate": "fall_back", "phases": {name: {} for name in planned}}
    storage.registry.create_session({"profile": profile, "data": None, "until": None}, SESSION)
    if phases:
        events(storage)
        trunk = model(storage, "trunk", "cognate", 1, [])
        made = [model(storage, name, "cognate", 2 + i, [trunk]) for i, name in enumerate(SPECIALISTS)]
        write_result(storage, 1, phase_1(trunk, made))
    if phases >= 2:
        champion = model(storage, "champion", "evomerge", 9, [*made, trunk])
        write_result(storage, 2, phase_2(champion, made, trunk))
    if phases >= 3:
        thinker = model(storage, "thinker", "quietstar", 12, [champion])
        write_result(storage, 3, phase_3(thinker, champion))
    if phases >= 4:
        both = [
            model(storage, name, "bitnet", 14 + i, [thinker]) for i, name in enumerate(("ternary", "ternary_dense"))
        ]
        write_result(storage, 4, phase_4(*both, thinker))
    storage.registry.update_session(SESSION, status=status)
    return storage
