"""Run every benchmark, one after the other; each writes its table to docs/results/."""

from __future__ import annotations

import runpy
import sys

ALL = (
    "cli_startup",
    "registry_queries",
    "training_throughput",
    "cpu_kernels",
    "optimizer_quality",
    "architecture",
    "cognate_ablation",
    "cognate_targets",
    "evomerge",
    "quietstar",
    "baking",
    "side_by_side",
    "merging",
    "serving",
    "ternary_kernels",
    "ternary_decoding",
)


def main() -> None:
    """Run all, or those named on the command line."""
    failed: list[str] = []
    names, sys.argv = sys.argv[1:] or ALL, sys.argv[:1]  # a benchmark reads its own arguments: it has none here
    for name in names:
        print(f"== {name}", file=sys.stderr)
        try:
            runpy.run_module(f"benchmarks.{name}", run_name="__main__")
        except SystemExit as error:  # a missed target must not keep the others from running
            failed += [name] if error.code else []
    if failed:
        sys.exit(f"targets missed in: {', '.join(failed)}")


if __name__ == "__main__":
    main()
