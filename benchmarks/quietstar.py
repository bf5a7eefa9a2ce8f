"""Phase 3 at nano over several seeds, and Quiet-STaR's two mixers: do thoughts carry the answers?

    python -m benchmarks.quietstar STORAGE [--model champion] [--seeds 2] [--reuse] [--mixers]

Runs phase 3 on a finished phase 2 of the storage folder, once per seed of step 1 and step 2; `--mixers` once more with
the attention mixer; `--reuse` takes a finished run of nano's own settings as the first. Exits 1 if a target is missed
by the mean over the seeds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from typing import Any

import torch

from agent_forge.pipeline.orchestrator import PipelineOrchestrator, session_results
from agent_forge.profile import load_profile, with_values
from benchmarks.common import publish, tell
from forgekit.store.storage import ModelStorage

TARGETS = (
    ("thoughts help where the parent could not", 0.20, "points over the parent where it is below 50 %"),
    ("thoughts help", 0.02, "points over thinking switched off (V2 specification, 2.3.6)"),
    ("thoughts beat equal compute", 0.0, "points over a model trained without thoughts at equal compute"),
)


def think(folder: str, model: str, changes: list[str]) -> dict[str, Any]:
    """One run of phase 3; its ``result.json``."""
    profile = with_values(load_profile("nano"), changes)
    shown: set[str] = set()

    def show(progress) -> None:
        if progress.stage not in shown:
            shown.add(progress.stage)
            tell(f"{' '.join(changes)}: {progress.stage}")

    with PipelineOrchestrator.starting_from([model], profile, folder, until="quietstar", show=show) as forge:
        return forge.run_full_pipeline()["quietstar"].record()


def finished(folder: str) -> dict[str, Any] | None:
    """The newest finished run of phase 3 in a storage folder with exactly nano's settings."""
    storage, wanted = ModelStorage(folder), load_profile("nano").phase("quietstar").model_dump(mode="json")
    for row in sorted(storage.registry.get_all_sessions(), key=lambda r: r["start_time"], reverse=True):
        record = session_results(storage, row["session_id"]).get("quietstar")
        if record is not None and record["config"] == wanted:
            return record
    return None


def claims(record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Evidence by claim."""
    return {e["claim"]: e for e in record["evidence"]}


def row_of(name: str, record: dict[str, Any]) -> list[Any]:
    """One run: accuracies under every condition, the thoughts, step 2."""
    rights = {row["condition"]: row for row in record["metrics"]["controls"]}
    told, two = record["metrics"]["thoughts"], record["metrics"]["steps"]["two"]
    nats = two["nats"]
    return [
        name,
        *(f"{100 * row['accuracy']:.1f}" for row in rights.values()),
        *("-" if rights[c]["lost"] is None else f"{100 * rights[c]['lost']:.0f}" for c in ("shuffled thoughts",)),
        f"{100 * told['validity_rate']:.1f}",
        f"{told['coherence']:.3f}",
        f"{100 * record['metrics']['phase/skills_before']:.1f} to {100 * record['metrics']['phase/skills_after']:.1f}",
        f"{nats['before']:.3f} / {nats['after']:.3f} / {nats['continued']:.3f}",
        two["chosen"],
        "yes" if record["metrics"]["theater"]["detected"] else "no",
        f"{record['duration_seconds']:.0f}",
    ]


COLUMNS = [
    "run", "with thoughts, %", "without", "shuffled", "filler", "trained without", "parent", "gain lost, shuffled, %",
    "valid, %", "coherence", "other skills, %", "nats: step 1 / step 2 / equal compute", "kept", "theater", "seconds",
]  # fmt: skip


def notes_of(records: dict[str, dict[str, Any]]) -> list[str]:
    """The claims of the first run with their intervals, and thoughts to read."""
    first = next(iter(records.values()))
    lines = ["| claim | before | after | 95 % of the change | n | verdict |\n|---|---|---|---|---|---|"]
    for e in first["evidence"]:
        interval = "-" if e["ci95"] is None else f"{e['ci95'][0]:+.3f} to {e['ci95'][1]:+.3f}"
        before, after = ("-" if e[side] is None else f"{e[side]:.3f}" for side in ("before", "after"))
        lines[0] += f"\n| {e['claim']} | {before} | {after} | {interval} | {e['n']} | {e['verdict']} |"
    lines.append("| asked | thought | answered | right |\n|---|---|---|---|")
    for e in first["artifacts"]["examples"]:
        thought = e["thought"].replace("|", "\\|")
        right = "yes" if e["right"] else f"no, {e['expected']}"
        lines[1] += f"\n| {e['asked']} | `{thought}` | {e['answered']} | {right} |"
    return lines


def targets(records: list[dict[str, Any]]) -> list[str]:
    """One line per target, by the mean over the seeds."""
    lines = []
    for claim, least, about in TARGETS:
        found = [claims(record)[claim] for record in records]
        gain = statistics.fmean(e["after"] - e["before"] for e in found)
        met = gain >= least and all(e["ci95"][0] > 0 for e in found)
        low = min(e["ci95"][0] for e in found)
        lines.append(f"{'met' if met else 'missed'}: {100 * gain:+.1f} {about}; lowest end of an interval {low:+.3f}")
    for control in ("shuffled thoughts", "filler tokens"):
        rows = [row for r in records for row in r["metrics"]["controls"] if row["condition"] == control]
        lost = [row["lost_low"] for row in rows]
        met = all(value is not None and value >= 0.5 for value in lost)
        lines.append(
            f"{'met' if met else 'missed'}: {control} lose half of the gain or more; lowest end {min(lost):.2f}"
        )
    valid = statistics.fmean(r["metrics"]["thoughts"]["validity_rate"] for r in records)
    lines.append(f"{'met' if valid >= 0.75 else 'missed'}: valid thoughts at least 75 %: {100 * valid:.1f} %")
    held = statistics.fmean(r["metrics"]["phase/held_out_valid"] for r in records)
    lines.append(f"{'met' if held >= 0.85 else 'missed'}: held-out thoughts that hold, 85 %: {100 * held:.1f} %")
    drop = statistics.fmean(r["metrics"]["phase/skills_before"] - r["metrics"]["phase/skills_after"] for r in records)
    lines.append(f"{'met' if drop <= 0.03 else 'missed'}: other skills drop at most 3 points: {-100 * drop:+.1f}")
    return lines


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("storage", nargs="?", default="storage")
    parser.add_argument("--model", default="champion")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--reuse", action="store_true")
    parser.add_argument("--mixers", action="store_true")
    given = parser.parse_args([a for a in sys.argv[1:] if a != "quietstar"])
    profile = load_profile("nano")
    torch.set_num_threads(profile.threads or torch.get_num_threads())  # as the runs set it; the table's head tells
    words = ["STORAGE" if a == given.storage else a for a in sys.argv[1:] if a != "quietstar"]
    records = {}
    for number in range(given.seeds):
        seeds = [f"phases.quietstar.{step}.train.seed={31 + 10 * number}" for step in ("teach", "quiet")]
        known = finished(given.storage) if given.reuse and not number else None
        records[f"seed {number + 1}"] = known or think(given.storage, given.model, seeds)
    found = targets(list(records.values()))
    if given.mixers:
        fused = think(given.storage, given.model, ['phases.quietstar.quiet.talk.mixer.kind="attention"'])
        records["seed 1, attention mixer"] = fused
    rows = [row_of(name, record) for name, record in records.items()]
    publish("quietstar", "Phase 3 at nano", COLUMNS, rows, [*notes_of(records), *found], " ".join(words))
    if any(line.startswith("missed") for line in found):
        sys.exit("targets missed")


if __name__ == "__main__":
    main()
