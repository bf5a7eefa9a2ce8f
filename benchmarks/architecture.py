"""``trm_titans`` against the plain ``gpt`` at equal tokens and parameters, and what its parts are worth."""

from __future__ import annotations

import dataclasses
import time

import numpy as np
import torch

from agent_forge.phases.cognate.ablation import plain_shape
from agent_forge.phases.cognate.data import trunk_mixture
from agent_forge.phases.cognate.evidence import report_set
from benchmarks.common import mean_and_spread, publish, setup, tell
from forgekit.measure.scores import score_problems, score_text
from forgekit.measure.stats import paired_bootstrap
from forgekit.models.io import build_model
from forgekit.train.loop import Trainer

STEPS, SEEDS, WINDOWS = 140, (1, 2), 256


def matched(shape):
    """The plain family with its feed-forward widened until it has as many parameters."""
    plain = plain_shape(shape)
    per_unit = 2 * plain.d_model * plain.n_layers
    return plain.replace(ffn_hidden=plain.ffn_hidden + round((shape.parameters() - plain.parameters()) / per_unit))


def main() -> None:
    """Measure and publish."""
    profile, shape, data = setup()
    config = profile.phase("cognate")
    train = config.trunk.replace(steps=STEPS, checkpoint_every=0)
    problems = report_set(config.trunk_mix, 60, split="select")
    sides = {
        "gpt, equal parameters": matched(shape),
        "trm_titans (nano)": shape,
        "trm_titans, no recursion": shape.replace(t_max=0),
        "trm_titans, no memory": shape.replace(memory="none"),
        "trm_titans, decay memory": shape.replace(memory="decay"),
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
        gap, low, high = paired_bootstrap(windows_by_side["gpt, equal parameters"], windows_by_side[name])
        rows.append([*cells, f"{gap:+.3f} [{low:+.3f}, {high:+.3f}]"])
    notes = [
        f"{STEPS} steps of {train.rows} x {train.seq_len} tokens, seeds {SEEDS} (initialisation and data), mean ± "
        f"standard deviation; bits per byte on {WINDOWS} windows of held-out text a seed, with the paired bootstrap "
        "interval over windows of the difference to the plain family; exact answers on the trunk's skills, "
        "select split.",
        "Target: trm_titans not above gpt at equal parameters, or the default says otherwise.",
    ]
    columns = ["model", "parameters", "MFLOP/token", "bits per byte", "exact answers", "seconds", "minus gpt, 95 %"]
    publish("architecture", "trm_titans against gpt at equal tokens", columns, rows, notes)


if __name__ == "__main__":
    main()
