"""Trainings that do not depend on each other: one after another with all threads, or at once with a part each."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from agent_forge.phases.cognate.data import trunk_mixture
from benchmarks.common import publish, setup
from forgekit.data.batches import Batch, Mixture
from forgekit.models.io import build_model
from forgekit.train.beside import SideBySide, Training
from forgekit.train.config import TrainConfig

ROUNDS, ROWS, LENGTH = 2, 12, 192
SIZES = (("nano", 2, 200), ("micro", 2, 30))
"""Profile, trainings, steps of each."""


class Nobody:
    """Hears nothing."""

    def event(self, kind: str, **data: Any) -> None:
        """Nothing is kept."""


class Drawn:
    """Batches drawn before the clock starts, a few of them over and over."""

    def __init__(self, mixture: Mixture) -> None:
        self.ready: list[Batch] = [mixture.batch(i) for i in range(8)]

    def batch(self, step: int) -> Batch:
        """Batch number ``step``."""
        return self.ready[step % len(self.ready)]


def seconds(shape, data: Drawn, count: int, steps: int, apart: bool) -> float:
    """Wall-clock time of ``count`` trainings, the start of processes included."""
    train = TrainConfig(steps=steps, rows=ROWS, seq_len=LENGTH, checkpoint_every=0, device="cpu")
    with tempfile.TemporaryDirectory() as folder:
        drafts = [Training(build_model(shape), data, train, Path(folder) / str(i)) for i in range(count)]
        clock = time.perf_counter()
        with SideBySide(["cpu"] * count, apart) as crew:
            for number, draft in enumerate(drafts[1:], 1):
                crew.start(str(number), draft, Nobody(), lambda info: None)
            for number, draft in enumerate(drafts):
                crew.wait(str(number))
                draft.trainer(Nobody(), lambda info: crew.listen()).run()
        return time.perf_counter() - clock


def main() -> None:
    """Measure and publish."""
    rows = []
    for profile, count, steps in SIZES:
        chosen, shape, data = setup(profile)
        config = chosen.phase("cognate")
        mixture = trunk_mixture(data, config)
        drawn = Drawn(Mixture(mixture.sources, ROWS, LENGTH, mixture.seed))
        torch.manual_seed(0)
        seconds(shape, drawn, 1, 4, False)
        times = [[seconds(shape, drawn, count, steps, apart) for apart in (False, True)] for _ in range(ROUNDS)]
        gains = sorted(one / other for one, other in times)
        tokens = count * steps * ROWS * LENGTH
        sides = [f"{min(column):.1f} s, {tokens / min(column):,.0f} tokens/s" for column in zip(*times)]
        gain = [f"{statistics.median(gains):.2f}", f"{gains[0]:.2f} to {gains[-1]:.2f}"]
        rows.append([f"{profile}, {shape.parameters():,} parameters", count, *sides, *gain])
    columns = ["model", "trainings", "one after another", "side by side", "gain", "range"]
    notes = [
        f"Whole trainings of {ROWS} x {LENGTH} tokens per step, the start of the processes and the way of the result "
        f"back included; best time of each side, median and range of the gain over {ROUNDS} rounds that took turns.",
        "One after another they have all threads each; side by side every one has its part of them.",
    ]
    publish("side_by_side", "Trainings side by side", columns, rows, notes)


if __name__ == "__main__":
    main()
