"""Seconds from the shell to the help text."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

from benchmarks.common import publish

RUNS, TARGET = 15, 0.3


def main() -> None:
    """Measure and publish."""
    rows = []
    for name, command in {
        "agent-forge --help": ["-m", "agent_forge.cli.main", "--help"],
        "agent-forge run --help": ["-m", "agent_forge.cli.main", "run", "--help"],
        "python -c pass (floor)": ["-c", "pass"],
    }.items():
        times = []
        for _ in range(RUNS):
            clock = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - clock)
        rows.append([name, statistics.median(times), max(times), f"< {TARGET}" if "forge" in name else ""])
    publish("cli_startup", "Start-up of the command line", ["command", "median s", "slowest s", "target"], rows, [])


if __name__ == "__main__":
    main()
