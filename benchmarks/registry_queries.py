"""How long the model registry takes to answer at 10,000 models.

    python benchmarks/registry_queries.py [--models 10000] [--repeats 50]

Prints the median and the maximum of every query method in milliseconds and exits 1 if a median reaches 10 ms.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.common import publish
from forgekit.store.artifact import Manifest
from forgekit.store.database import ModelRegistry
from forgekit.store.names import PHASES

LIMIT_MS = 10.0
PER_SESSION = 20
LINEAGE = 500  # models in one family: fifty generations of merging


def build(registry: ModelRegistry, models: int) -> list[str]:
    """Fill the registry: sessions of 20 models, each made from its two predecessors; returns the model ids."""
    ids: list[str] = []
    with registry.transaction():
        for number in range(models):
            if number % PER_SESSION == 0:
                session = registry.create_session(
                    {"profile": "nano", "phases": {phase: {"lr": 0.02} for phase in PHASES}}
                )
            phase = PHASES[number % len(PHASES)]
            manifest = Manifest(
                model_id=f"{phase}_model{number}_{20250101 + number // 1000:08d}_{number % 1000:06d}",
                session_id=session,
                phase_name=phase,
                model_name=f"model{number}",
                created_at=f"2025-01-{1 + number // 1000:02d}T00:{number % 1000 // 60:02d}:{number % 60:02d}",
                parents=ids[-2:] if number % LINEAGE > 1 else [],
                parameters=1_000_000,
                size_mb=4.0,
                files={f"file{i}": "0" * 64 for i in range(5)},
                metadata={
                    "specialization": "reasoning",
                    "tags": ["all", f"tag{number % 100}"],
                    "metrics": {f"metric{i}": i * 0.5 for i in range(20)},
                },
            )
            path = registry.db_path.parent.parent / "sessions" / session / f"model{number}"
            ids.append(registry.register_model(manifest, path))
            if number % PER_SESSION:
                registry.record_handoff(ids[-2], ids[-1], validation_status="passed")
    return ids


def queries(registry: ModelRegistry, ids: list[str]) -> dict[str, Callable[[], object]]:
    """Every query method, by the call it stands for."""
    middle = registry.get_model(ids[len(ids) // 2 + LINEAGE // 2])
    assert middle is not None
    session, model = middle["session_id"], middle["model_id"]
    return {
        "get_model(id)": lambda: registry.get_model(model),
        "get_model(session)": lambda: registry.get_model(session_id=session),
        "get_model(session, phase)": lambda: registry.get_model(session_id=session, phase_name="baking"),
        "get_model(unknown)": lambda: registry.get_model("nothing_20250101_000000"),
        "search_models()": lambda: registry.search_models(),
        "search_models(phase)": lambda: registry.search_models(phase="cognate"),
        "search_models(session)": lambda: registry.search_models(session_id=session),
        "search_models(tag of 100)": lambda: registry.search_models(tag="tag7"),
        "search_models(tag of all)": lambda: registry.search_models(tag="all"),
        "search_models(phase, tag, name)": lambda: registry.search_models(phase="baking", tag="all", name="1"),
        "search_models(phase, tag, none)": lambda: registry.search_models(phase="baking", tag="all", name="nothing"),
        "search_models(name)": lambda: registry.search_models(name="model77"),
        "search_models(name, none)": lambda: registry.search_models(name="nothing"),
        "find_ids(prefix)": lambda: registry.find_ids("cognate_model1", limit=4),
        "find_ids()": lambda: registry.find_ids(),
        "ancestors": lambda: registry.ancestors(model),
        "descendants": lambda: registry.descendants(model),
        "get_handoffs": lambda: registry.get_handoffs(session),
        "get_session": lambda: registry.get_session(session),
        "get_all_sessions": lambda: registry.get_all_sessions(),
        "get_current_session": lambda: registry.get_current_session(),
        "get_all_phases": lambda: registry.get_all_phases(session),
    }


def measure(query: Callable[[], object], repeats: int) -> tuple[float, float]:
    """Median and maximum in milliseconds."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        query()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times), max(times)


def main() -> int:
    """Build, measure, print; 1 if any median reaches the limit."""
    parser = argparse.ArgumentParser(description="Time the model registry's queries.")
    parser.add_argument("--models", type=int, default=10_000, help="at least 1000")
    parser.add_argument("--repeats", type=int, default=50)
    options, _ = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        registry = ModelRegistry(Path(folder) / "registry" / "model_registry.db")
        start = time.perf_counter()
        ids = build(registry, options.models)
        registry.checkpoint_wal()
        seconds, size = time.perf_counter() - start, registry.db_path.stat().st_size / 1e6
        rows = [[name, *measure(query, options.repeats)] for name, query in queries(registry, ids).items()]
        opened, _ = measure(lambda: ModelRegistry(registry.db_path).close(), 5)
        registry.close()
    slow = [name for name, median, _ in rows if median >= LIMIT_MS]
    notes = [
        f"{options.models:,} models registered in {seconds:.1f} s, {size:.1f} MB on disk; opening the file "
        f"takes {opened:.1f} ms. Target: every median below {LIMIT_MS:.0f} ms: {'missed' if slow else 'met'}."
    ]
    publish("registry_queries", "Registry queries", ["query", "median ms", "slowest ms"], rows, notes)
    return 1 if slow else 0


if __name__ == "__main__":
    sys.exit(main())
