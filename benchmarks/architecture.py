"""``trm_titans`` against the plain ``gpt`` at equal tokens and parameters, and what its parts are worth."""

from __future__ import annotations

import time

import numpy as np
import torch

from agent_forge.phases.cognate.ablation import plain_shape
from agent_forge.phases.cognate.data import trunk_mixture
from agent_forge.phases.cognate.evidence import report_set
from benchmarks.common import mean_and_spread, publish, setup, tell
from forgekit.measure.scores import score_problems, score_text
from forgekit.models.io import build_model
from forgekit.train.loop import Trainer

STEPS, SEEDS, WINDOWS = 160, (1, 2), 256


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
    problems = report_set(config.trunk_mix, 60)
    sides = {
        "trm_titans (nano)": shape,
        "gpt, equal parameters": matched(shape),
        "gpt, full attention, equal parameters": matched(shape).replace(window=0),
        "trm_titans, no recursion": shape.replace(t_max=0),
        "trm_titans, three recursion steps": shape.replace(t_max=3),
        "trm_titans, no memory": shape.replace(memory="none"),
        "trm_titans, decay memory": shape.replace(memory="decay"),
    }
    rows = []
    for name, side in sides.items():
        bits, right, seconds = [], [], []
        for seed in SEEDS:
            torch.manual_seed(seed)
            model = build_model(side)
            clock = time.perf_counter()
            Trainer(model, trunk_mixture(data, config), train).run()
            seconds.append(time.perf_counter() - clock)
            scores = score_text(model, data.tokenizer, data.report_texts, train.seq_len, WINDOWS)
            bits.append(scores.bits_per_byte)
            right.append(score_problems(model, data.tokenizer, problems).accuracy)
        tell(f"{name}: {mean_and_spread(bits)} bits per byte, {mean_and_spread(right)} exact")
        flops = side.flops_per_token(train.seq_len) / 1e6
        rows.append(
            [
                name,
                f"{side.parameters():,}",
                f"{flops:.2f}",
                mean_and_spread(bits),
                mean_and_spread(right),
                f"{np.mean(seconds):.0f}",
            ]
        )
    gap = float(rows[0][3].split()[0]) - float(rows[1][3].split()[0])
    notes = [
        f"trm_titans minus gpt at equal parameters: **{gap:+.3f}** bits per byte (target: not above 0).",
        f"{STEPS} steps of {train.rows} x {train.seq_len} tokens, seeds {SEEDS}, mean ± standard deviation; bits per byte "
        f"on {WINDOWS} windows of held-out prose and code; exact answers on the trunk's skills, report split.",
    ]
    publish(
        "architecture",
        "trm_titans against gpt at equal tokens",
        ["model", "parameters", "MFLOP/token", "bits per byte", "exact answers", "seconds"],
        rows,
        notes,
    )


if __name__ == "__main__":
    main()
