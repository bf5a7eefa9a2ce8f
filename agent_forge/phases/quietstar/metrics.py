"""The metrics the sources list for phase 3, under their names."""

from __future__ import annotations

from typing import Any

from agent_forge.phases.quietstar.watching import Watched
from agent_forge.pipeline.handoff import validate_models
from agent_forge.pipeline.phase import PhaseContext
from forgekit.measure.theater import TheaterReport
from forgekit.tracking.loggers import PhaseLogger


def emit_watched(logger: PhaseLogger, number: int, watched: Watched) -> dict[str, Any]:
    """One look at the thoughts; returns what was told.

    Args:
        number: 0 before step 2, then 1 to 4.
    """
    told = watched.summary()
    names = {
        "thoughts_generated": "total",
        "thoughts_valid": "valid",
        "validity_rate": "validity_rate",
        "avg_coherence": "coherence",
        "semantic_similarity": "semantic",
        "logical_consistency": "logical",
        "relevance_score": "relevance",
        "fluency_score": "fluency",
        "processing_time_ms": "milliseconds",
    }
    values = {f"step_{number}/{name}": told[key] for name, key in names.items()}
    values |= {
        "quietstar/thought_coherence_avg": told["coherence"],
        "quietstar/thought_coherence_min": told["coherence_min"],
        "quietstar/thoughts_filtered": 100 * (1 - told["validity_rate"]),
    }
    logger.metrics(values, step=number)
    return told


STEP_PARTS = {
    "thought_length": "quietstar/thought_length_avg",
    "mixing_weight_alpha": "quietstar/mixing_weight_alpha",
    "reasoning_entropy": "quietstar/reasoning_entropy",
    "injection_points": "quietstar/injection_points",
}
"""What the talker tells of each step, and its name in the catalogue."""


def emit_steps(logger: PhaseLogger, history: dict[str, dict[str, Any]]) -> None:
    """What step 2 told while it trained."""
    for step, row in history.items():
        values = {name: row[part] for part, name in STEP_PARTS.items() if part in row}
        if values:
            logger.metrics(values, step=int(step))


def emit_phase(context: PhaseContext, facts: dict[str, Any]) -> dict[str, Any]:
    """The phase's own values, returned as they were written.

    Args:
        context: logger, profile, storage.
        facts: ``theater``, ``watched`` (its summary), ``values`` (ready values by name), ``model``, ``parent``.
    """
    theater: TheaterReport = facts["theater"]
    told, accuracy = facts["watched"], {name: value[0] for name, value in theater.accuracy.items()}
    taken, given = (
        validate_models(context.profile, *ends, context.storage, [one])
        for *ends, one in (("evomerge", "quietstar", facts["parent"]), ("quietstar", "bitnet", facts["model"]))
    )
    values = {
        "phase/total_thoughts_generated": told["total"],
        "phase/total_thoughts_valid": told["valid"],
        "phase/overall_validity_rate": told["validity_rate"],
        "phase/avg_coherence": told["coherence"],
        "phase/avg_semantic_similarity": told["semantic"],
        "phase/avg_logical_consistency": told["logical"],
        "phase/avg_relevance": told["relevance"],
        "phase/avg_fluency": told["fluency"],
        "phase/processing_time_ms_per_thought": told["milliseconds"],
        "phase/accuracy_with_thoughts": accuracy["with"],
        "phase/accuracy_without_thoughts": accuracy["without"],
        "phase/accuracy_improvement": accuracy["with"] - accuracy["without"],
        "phase/accuracy_shuffled_thoughts": accuracy["shuffled"],
        "phase/accuracy_filler": accuracy["filler"],
        "phase/accuracy_trained_without": accuracy["no_thought"],
        "phase/accuracy_parent": accuracy["parent"],
        "phase/predictive_power": theater.power[0],
        "phase/coherence_correlation": theater.correlation[0] if theater.correlation else None,
        "phase/theater_detected": theater.theater_detected,
        "handoff/from_phase2": taken.accepted,
        "handoff/to_phase4": given.accepted,
        **facts["values"],
    }
    context.logger.metrics(values)
    return values
