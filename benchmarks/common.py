"""What every benchmark shares: the machine, alternating timing, tables in docs/results/."""

from __future__ import annotations

import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agent_forge.phases.cognate.data import CognateData, prepare, trunk_mixture
from agent_forge.pipeline.orchestrator import session_results
from agent_forge.profile import Profile, load_profile
from forgekit.compute.device import environment
from forgekit.store.storage import ModelStorage
from forgekit.tracking.events import read_events

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results"


def setup(profile: str = "nano") -> tuple[Profile, Any, CognateData]:
    """Profile, solved model configuration and phase-1 data; threads as the profile says."""
    chosen = load_profile(profile)
    torch.set_num_threads(chosen.threads or torch.get_num_threads())
    shape = chosen.model_config_solved()
    return chosen, shape, prepare(chosen.phase("cognate"), shape.vocab_size, None)


def made_by_this_code(storage: ModelStorage, profile: Profile) -> tuple[str, dict] | None:
    """(session, phase-1 record) of the newest session of exactly this profile that began after the last change of any
    source file and was never interrupted; None without one."""
    root = RESULTS.parent.parent
    sources = [p for folder in ("forgekit", "agent_forge") for p in (root / folder).rglob("*.py")]
    changed = datetime.fromtimestamp(max(p.stat().st_mtime for p in sources), UTC)
    wanted = profile.model_dump(mode="json")
    for row in sorted(storage.registry.get_all_sessions(), key=lambda r: r["start_time"], reverse=True):
        session, began = row["session_id"], datetime.fromisoformat(row["start_time"])
        if began.replace(tzinfo=began.tzinfo or UTC) < changed:
            return None
        record = session_results(storage, session).get("cognate")
        plan = storage.registry.get_session(session)["config"].get("profile")
        starts = read_events(storage.session_path(session) / "events.jsonl", kind="session_started")
        if record is not None and plan == wanted and len(list(starts)) == 1:
            return session, record
    return None


def batches(data: CognateData, config, count: int) -> list:
    """The trunk's first batches, drawn ahead of timing."""
    mixture = trunk_mixture(data, config)
    return [mixture.batch(i) for i in range(count)]


def alternate(sides: dict[str, Callable[[int], None]], rounds: int, each: int) -> dict[str, list[float]]:
    """Seconds per call of every side, in blocks that take turns: what disturbs the machine disturbs all."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for round_ in range(rounds):
        for name, call in sides.items():
            clock = time.perf_counter()
            for i in range(each):
                call(round_ * each + i)
            times[name].append((time.perf_counter() - clock) / each)
    return times


def ratio(times: dict[str, list[float]], ours: str, theirs: str) -> tuple[float, float, float]:
    """Median over rounds of ours/theirs, with the smallest and largest."""
    ratios = [a / b for a, b in zip(times[ours], times[theirs])]
    return statistics.median(ratios), min(ratios), max(ratios)


def machine() -> str:
    """One line on where the numbers come from."""
    env = environment()
    name = platform.processor() or platform.machine()
    cpu = Path("/proc/cpuinfo")
    if cpu.is_file():
        lines = [x.split(":", 1)[1].strip() for x in cpu.read_text().splitlines() if x.startswith("model name")]
        name = f"{lines[0]} x {len(lines)}" if lines else name
    return f"{name}, {env['cpu_capability']}, torch {env['torch']}, {torch.get_num_threads()} threads, no GPU"


def publish(
    name: str, title: str, columns: list[str], rows: list[list[Any]], notes: list[str], arguments: str = ""
) -> Path:
    """Print a table and write it to ``docs/results/NAME.md`` with date, machine and command, its arguments included."""
    lines = [f"# {title}", ""]
    lines += [f"- date: {datetime.now(UTC):%Y-%m-%d}", f"- machine: {machine()}"]
    lines += [f"- command: `python -m benchmarks.{name}{arguments and ' '}{arguments}`", ""]
    lines += ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(c) for c in row) + " |" for row in rows]
    lines += ["", *(f"{note}\n" for note in notes)]
    text = "\n".join(lines).rstrip() + "\n"
    print(text)
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.md"
    path.write_text(text, encoding="utf-8")
    return path


def _cell(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def tell(text: str) -> None:
    """A sign of life on stderr."""
    print(f"{datetime.now(UTC):%H:%M:%S} {text}", file=sys.stderr, flush=True)


def eval_loss(model, held_out: list) -> float:
    """Mean nats per supervised token over fixed held-out batches."""
    total, count = 0.0, 0
    model.eval()
    with torch.inference_mode():
        for batch in held_out:
            loss = model.training_loss(torch.from_numpy(batch.inputs), torch.from_numpy(batch.labels))
            total, count = total + float(loss.nats) * loss.tokens, count + loss.tokens
    model.train()
    return total / count


def held_out_batches(data: CognateData, config, count: int = 6) -> list:
    """Batches in the trunk's mixture made of held-out documents and problems of the *select* split: what chooses
    between variants must not be what phase 1 reports on."""
    from forgekit.data.batches import Mixture, ProblemSource, TextSource, encode_texts
    from forgekit.data.problems import held_out

    text = TextSource(encode_texts(data.tokenizer, data.select_texts))
    gym = ProblemSource(data.tokenizer, held_out(config.trunk_mix, 300, split="select"))
    share = config.text.share
    mixture = Mixture(((text, share), (gym, 1 - share)), config.trunk.rows, config.trunk.seq_len, 99)
    return [mixture.batch(i) for i in range(count)]


def mean_and_spread(values: list[float]) -> str:
    """``mean ± standard deviation`` over seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{np.mean(values):.3f} ± {spread:.3f}"
