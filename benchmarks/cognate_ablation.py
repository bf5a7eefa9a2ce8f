"""Phase 1 at nano with its ablations trained, and the numbers it has to reach."""

from __future__ import annotations

import tempfile

from agent_forge.pipeline.orchestrator import PipelineOrchestrator
from agent_forge.profile import load_profile
from benchmarks.common import publish, tell


def main() -> None:
    """Measure and publish every claim of the phase."""
    profile = load_profile("nano")
    phases = {"cognate": {**profile.phases["cognate"], "ablate": True}}
    shown = set()

    def show(progress) -> None:
        if progress.stage not in shown:
            shown.add(progress.stage)
            tell(progress.stage)

    with (
        tempfile.TemporaryDirectory() as folder,
        PipelineOrchestrator(profile.replace(phases=phases), folder, show=show) as forge,
    ):
        result = forge.run_single_phase("cognate")
    levels = result.metrics["levels"]
    skills = ("copy", "sort", "reverse", "recall")
    weakest = min((levels["trunk"][f"{skill}/{level}"], f"{skill}/{level}") for skill in skills for level in (1, 2, 3))
    far = next(e for e in result.evidence if e.claim.endswith("with its memory"))
    rows = [
        [
            e.claim,
            e.metric,
            e.before,
            e.after,
            f"{e.ci95[0]:+.3f} to {e.ci95[1]:+.3f}",
            "-" if e.chance is None else f"{e.chance:.2f}",
            e.n,
            e.verdict,
        ]
        for e in result.evidence
    ]
    notes = [
        f"histogram of recursion steps on held-out text: `{result.metrics['act_histogram']}`",
        f"trunk on copy, sort, reverse and recall, levels 1-3: weakest {weakest[1]} at {weakest[0]:.3f} (target 0.95)",
        f"recall beyond the window: {far.after:.3f} with the memory (target 0.90), {far.before:.3f} without, "
        f"guessing {far.chance:.3f}",
        f"whole phase with ablations: {result.duration_seconds:.0f} s",
    ]
    publish(
        "cognate_ablation",
        "Phase 1 at nano, with ablations",
        ["claim", "metric", "before", "after", "95 % of change", "chance", "n", "verdict"],
        rows,
        notes,
    )


if __name__ == "__main__":
    main()
