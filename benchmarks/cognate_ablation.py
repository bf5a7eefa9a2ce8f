"""What memory, recursion and specialisation are worth at nano, when each side is trained for itself.

    python -m benchmarks.cognate_ablation [STORAGE]

Takes a session of the storage folder that this very code made with nano's settings, or makes one first.
"""

from __future__ import annotations

import sys
import time

import torch

from agent_forge.phases.cognate.ablation import Bench, ablations
from agent_forge.phases.cognate.data import prepare
from agent_forge.phases.cognate.evidence import Subject
from agent_forge.pipeline.orchestrator import PipelineOrchestrator
from agent_forge.profile import load_profile
from benchmarks.common import made_by_this_code, publish, tell
from forgekit.models.io import read_model
from forgekit.store.storage import ModelStorage


def main() -> None:
    """Measure and publish."""
    folder = next((a for a in sys.argv[1:] if a != "cognate_ablation"), "storage")
    profile = load_profile("nano")
    storage, config = ModelStorage(folder), profile.phase("cognate")
    if made_by_this_code(storage, profile) is None:
        tell("no finished session: making one")
        with PipelineOrchestrator(profile, folder) as forge:
            forge.run_single_phase("cognate")
    made = made_by_this_code(storage, profile)[1]["artifacts"]
    torch.set_num_threads(profile.threads or torch.get_num_threads())
    trunk, _ = read_model(storage.resolve(made["trunk"]))
    subjects = [
        Subject(plan, read_model(storage.resolve(i))[0], i) for plan, i in zip(config.specialists, made["all_models"])
    ]
    data = prepare(config, trunk.config.vocab_size, None)
    shown: set[str] = set()

    def show(progress) -> None:
        if progress.stage not in shown:
            shown.add(progress.stage)
            tell(progress.stage)

    clock = time.perf_counter()
    found = ablations(Bench(config, data, trunk, subjects, show))
    rows = []
    for e in found:
        interval = f"{e.ci95[0]:+.3f} to {e.ci95[1]:+.3f}"
        chance = "-" if e.chance is None else f"{e.chance:.2f}"
        rows.append([e.claim, e.metric, e.before, e.after, interval, chance, e.n, e.verdict])
    notes = [
        f"`{key}`: " + ", ".join(f"{k} {v:,.0f}" for k, v in e.compute.items())
        for key, e in ((e.claim, e) for e in found)
    ]
    notes.append(f"Report split, one seed, {time.perf_counter() - clock:.0f} s of training and scoring after phase 1.")
    columns = ["claim", "metric", "other side", "ours", "95 % of difference", "chance", "n", "verdict"]
    publish("cognate_ablation", "Phase 1 at nano against its ablations", columns, rows, notes)


if __name__ == "__main__":
    main()
