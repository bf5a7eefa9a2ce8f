"""Phase 2 at nano: what the champion reaches, and the strategies at equal evaluations over three seeds.

    python -m benchmarks.evomerge [STORAGE] [--evaluations 96]

Takes phase 1 of a session of the storage folder that this very code made with nano's settings, or makes one first.
Exits 1 if a target is missed.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from agent_forge.pipeline.orchestrator import PipelineOrchestrator
from agent_forge.profile import load_profile, with_values
from benchmarks.common import made_by_this_code, publish, tell
from forgekit.store.storage import ModelStorage

TARGET_GAIN = 0.20
"""Champion over generation 0's best, as a share of the latter (V2 specification, 2.2.6)."""


def search(folder: str, evaluations: int) -> dict[str, Any]:
    """Phase 2 on the specialists of a finished phase 1, with all strategies compared; its ``result.json``."""
    profile, storage = load_profile("nano"), ModelStorage(folder)
    if made_by_this_code(storage, profile) is None:
        tell("no finished session: making one")
        with PipelineOrchestrator(profile, folder) as forge:
            forge.run_single_phase("cognate")
    parents = made_by_this_code(storage, profile)[1]["artifacts"]["all_models"]
    shown: set[str] = set()

    def show(progress) -> None:
        line = f"{progress.stage} {progress.note if progress.stage == 'strategies' else ''}"
        if line not in shown:
            shown.add(line)
            tell(line)

    chosen = with_values(profile, [f"phases.evomerge.compare.evaluations={evaluations}"])
    with PipelineOrchestrator.starting_from(parents, chosen, folder, until="evomerge", show=show) as forge:
        return forge.run_full_pipeline()["evomerge"].record()


def table_of(record: dict[str, Any]) -> list[list[Any]]:
    """The claims, then the strategies, as rows."""
    rows = []
    for e in record["evidence"]:
        interval = f"{e['ci95'][0]:+.4f} to {e['ci95'][1]:+.4f}"
        rows.append(
            [e["claim"], e["metric"], f"{e['before']:.4f}", f"{e['after']:.4f}", interval, e["n"], e["verdict"]]
        )
    return rows


def notes_of(record: dict[str, Any]) -> list[str]:
    """Fitness on both splits, the strategies' ranges, the targets."""
    metrics = record["metrics"]
    notes = ["| model | select | report | answers | bits per byte |\n|---|---|---|---|---|"]
    for name, row in metrics["fitness_table"].items():
        select, report = row["select"], row["report"]
        notes[0] += (
            f"\n| {name} | {select['composite']:.4f} | {report['composite']:.4f} | {report['accuracy']:.3f} "
            f"| {report['bits_per_byte']:.3f} |"
        )
    notes.append("| strategy | seeds | candidates | select | report | report, range |\n|---|---|---|---|---|---|")
    for row in metrics["strategy_table"]:
        notes[1] += (
            f"\n| {row['strategy']} | {row['seeds']} | {row['evaluations']} | {row['select']:.4f} "
            f"| {row['report']:.4f} | {row['report_min']:.4f} to {row['report_max']:.4f} |"
        )
    gains = metrics["gains"]
    notes.append(
        f"Gain over the best parent: {gains['select']:+.4f} on the split that chose, {gains['report']:+.4f} on the one "
        f"that did not. {metrics['phase/generations_completed']} generations, {metrics['phase/evaluations']} "
        f"candidates; {record['artifacts']['stopped']}. {metrics['phase/champion_recipe']}. "
        f"{record['duration_seconds']:.0f} s, comparison included."
    )
    return notes


def targets(record: dict[str, Any]) -> list[str]:
    """One line per target: met, or missed and by how much."""
    claims = {e["claim"]: e for e in record["evidence"]}
    best, first = claims["the champion beats the best parent"], claims["the champion beats generation 0's best"]
    gain = first["after"] / first["before"] - 1
    lines = [
        f"{'met' if best['ci95'][0] >= 0 else 'missed'}: composite at least the best parent's, the interval "
        f"excluding a loss: [{best['ci95'][0]:+.4f}, {best['ci95'][1]:+.4f}]",
        f"{'met' if gain >= TARGET_GAIN else 'missed'}: {TARGET_GAIN:.0%} over generation 0's best: {gain:+.1%}",
    ]
    within = record["config"]["kept_within"]
    for name, row in record["metrics"]["kept"].items():
        lost = row["before"] - row["after"]
        lines.append(
            f"{'met' if row['kept'] else 'missed'}: speciality of {name} within {100 * within:g} points: "
            f"{100 * row['before']:.1f} to {100 * row['after']:.1f} ({-100 * lost:+.1f})"
        )
    return lines


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser()
    parser.add_argument("storage", nargs="?", default="storage")
    parser.add_argument("--evaluations", type=int, default=96)
    given = parser.parse_args([a for a in sys.argv[1:] if a != "evomerge"])
    record = search(given.storage, given.evaluations)
    found = targets(record)
    columns = ["claim", "metric", "before", "after", "95 % of the change", "n", "verdict"]
    publish("evomerge", "Phase 2 at nano", columns, table_of(record), [*notes_of(record), *found])
    if any(line.startswith("missed") for line in found):
        sys.exit("targets missed")


if __name__ == "__main__":
    main()
