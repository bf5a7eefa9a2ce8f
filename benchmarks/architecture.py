"""``trm_titans`` against the plain ``gpt`` at equal tokens and parameters, and what its parts are worth.

Whatever a part costs in parameters the feed-forward of the others gets, so that all sides are of one size.
"""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import torch

from agent_forge.phases.cognate.ablation import plain_shape, widened
from agent_forge.phases.cognate.data import trunk_mixture
from benchmarks.common import mean_and_spread, publish, setup, tell
from forgekit.data.problems import held_out
from forgekit.measure.scores import score_problems, score_text
from forgekit.measure.stats import paired_bootstrap
from forgekit.models.io import build_model
from forgekit.train.loop import Trainer

SEEDS, WINDOWS = (1, 2, 3), 256


def main() -> None:
    """Measure and publish."""
    profile, shape, data = setup()
    config = profile.phase("cognate")
    train, size = config.trunk.replace(checkpoint_every=0), shape.parameters()
    problems = held_out(config.trunk_mix, 60, split="select")
    sides = {
        "gpt": plain_shape(shape),
        "trm_titans (nano)": shape,
        "with recursion (2 steps)": shape.replace(t_max=2),
        "without memory": widened(shape.replace(memory="none"), size),
        "without short convolutions": widened(shape.replace(conv=False), size),
        "with decay memory": widened(shape.replace(memory="decay"), size),
    }
    rows, windows_by_side = [], {}
    for name, side in sides.items():
        bits, right, seconds = [], [], []
        for seed in SEEDS:
            torch.manual_seed(seed)
            model = build_model(side)
            clock = time.perf_counter()
            mixture = dataclasses.replace(trunk_mixture(data, config), seed=seed)
            Trainer(model, mixture, train).run()
            seconds.append(time.perf_counter() - clock)
            bits.append(score_text(model, data.tokenizer, data.select_texts, train.seq_len, WINDOWS))
            right.append(score_problems(model, data.tokenizer, problems).accuracy)
        windows_by_side[name] = np.concatenate([b.per_window for b in bits])
        means = mean_and_spread([b.bits_per_byte for b in bits])
        tell(f"{name}: {means} bits per byte, {mean_and_spread(right)} exact")
        flops = f"{side.flops_per_token(train.seq_len) / 1e6:.2f}"
        cells = [name, f"{side.parameters():,}", flops, means, mean_and_spread(right), f"{np.mean(seconds):.0f}"]
        gap, low, high = paired_bootstrap(windows_by_side["gpt"], windows_by_side[name])
        rows.append([*cells, f"{gap:+.3f} [{low:+.3f}, {high:+.3f}]"])
    notes = [
        f"nano's whole trunk training, {train.steps} steps of {train.rows} x {train.seq_len} tokens, seeds {SEEDS} "
        f"(initialisation and data), mean ± standard deviation; bits per byte on {WINDOWS} windows of held-out text a "
        "seed, with the paired bootstrap "
        "interval over windows of the difference to the plain family; exact answers on the trunk's skills, "
        "select split.",
        "Target: trm_titans not above gpt at equal parameters, or the default says otherwise.",
    ]
    columns = ["model", "parameters", "MFLOP/token", "bits per byte", "exact answers", "seconds", "minus gpt, 95 %"]
    publish("architecture", "trm_titans against gpt at equal tokens", columns, rows, notes)


if __name__ == "__main__":
    main()
