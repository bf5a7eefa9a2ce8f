"""The metrics the sources list for phase 4, under their names."""

from __future__ import annotations

from typing import Any

import numpy as np

from agent_forge.phases.bitnet.config import BitNetConfig
from agent_forge.phases.bitnet.evidence import INT4, INT8, PARENT, SAME_BYTES, Finals, in_floats, untrained
from agent_forge.phases.bitnet.measuring import Speed
from agent_forge.pipeline.handoff import validate_models
from agent_forge.pipeline.phase import PhaseContext

MIB = 2**20
STEP_PARTS = {"loss": "train/loss", "divergence": "train/divergence", "strength": "train/strength"}
"""What a step of the training on the grid tells, and its name in the catalogue."""


def values(finals: Finals, speed: Speed, facts: dict[str, Any]) -> dict[str, Any]:
    """Everything measured, by its name in the catalogue; None for what was not.

    Args:
        finals: of the report split.
        speed: of the parent and of what was made of it.
        facts: ``held`` (bytes of weights in memory by model), ``layers`` (maps on the grid, other maps and
            embeddings), ``sparsity``, ``distance``, ``samples``, ``calibration_seconds``, ``threshold``.
    """
    (before, rounded, after), made = finals.three, finals.made
    floats = finals.readings.get(in_floats(made))
    memory, state = facts["held"], speed.state
    speedup = speed.rate(made) / speed.rate(PARENT)
    recovered, text_recovered = finals.recovery, finals.perplexity_recovery
    milliseconds = speed.milliseconds[made]
    found = {
        "compression/original_size_mb": finals.sizes[PARENT] / MIB,
        "compression/compressed_size_mb": finals.sizes[made] / MIB,
        "compression/compression_ratio": finals.ratio,
        "compression/layers_compressed": facts["layers"][0],
        "compression/layers_preserved": facts["layers"][1],
        "compression/sparsity_ratio": facts["sparsity"],
        "compression/threshold": facts["threshold"],
        "quality/pre_compression_perplexity": before.perplexity,
        "quality/post_compression_perplexity": rounded.perplexity,
        "quality/perplexity_degradation_percent": 100 * (rounded.perplexity / before.perplexity - 1),
        "quality/post_finetuning_perplexity": after.perplexity,
        "quality/final_degradation_percent": 100 * finals.perplexity_added,
        "quality/perplexity_recovery_percent": None if text_recovered is None else 100 * text_recovered,
        "quality/accuracy_recovery_percent": None if recovered is None else 100 * recovered,
        "quality/pre_accuracy": before.accuracy,
        "quality/post_accuracy": after.accuracy,
        "quality/accuracy_retention": finals.retention,
        "quality/dense_accuracy": floats and floats.accuracy,
        "quality/dense_perplexity": floats and floats.perplexity,
        "performance/inference_speedup": speedup,
        "performance/memory_reduction": memory[PARENT] / memory[made],
        "performance/calibration_time_seconds": facts["calibration_seconds"],
        "bitnet/compression_ratio": finals.ratio,
        "bitnet/accuracy_retention": finals.retention,
        "bitnet/inference_speedup": speedup,
        "bitnet/memory_reduction": memory[PARENT] / memory[made],
        "bitnet/sparsity_ratio": facts["sparsity"],
        "bitnet/quantization_error": facts["distance"],
        "bitnet/calibration_samples": facts["samples"],
        "bitnet/memory/peak_mb": (memory[made] + state[made]) / MIB,
        "bitnet/memory/allocated_mb": memory[made] / MIB,
        "bitnet/speed/latency_p50_ms": float(np.percentile(milliseconds, 50)),
        "bitnet/speed/latency_p95_ms": float(np.percentile(milliseconds, 95)),
        "bitnet/speed/throughput_fps": speed.rate(made),
        "phase/finetuned": finals.trained,
    }
    baselines = {"untrained": untrained(made), "int8": INT8, "int4": INT4, "same_bytes": SAME_BYTES}
    for short, name in baselines.items():
        reading, size = finals.readings.get(name), finals.sizes.get(name)
        found[f"baseline/{short}_accuracy"] = reading and reading.accuracy
        found[f"baseline/{short}_perplexity"] = reading and reading.perplexity
        found[f"baseline/{short}_size_mb"] = size and size / MIB
    return found


def never_told(config: BitNetConfig, was_trained: bool) -> dict[str, None]:
    """What no step could tell, by its name in the catalogue: nothing was trained, or not towards the parent."""
    if not was_trained:
        return dict.fromkeys(STEP_PARTS.values())
    return {} if config.loss.divergence else {STEP_PARTS["divergence"]: None}


def emit_phase(context: PhaseContext, found: dict[str, Any], ends: tuple[str, str]) -> dict[str, Any]:
    """Write the phase's own values; returns them with what the two handoffs say.

    Args:
        context: logger, profile, storage.
        found: of :func:`values`, with the duration.
        ends: ids of the parent and of the model that is handed on.
    """
    taken, given = (
        validate_models(context.profile, *names, context.storage, [one])
        for names, one in zip((("quietstar", "bitnet"), ("bitnet", "curriculum")), ends)
    )
    known = {**found, "handoff/from_phase3": taken.accepted, "handoff/to_phase5": given.accepted}
    context.logger.metrics(known)
    return known
