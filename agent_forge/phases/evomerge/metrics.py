"""The metrics the sources list for phase 2, under their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from agent_forge.merging.strategies_config import Recipe
from agent_forge.pipeline.handoff import validate_models
from forgekit.tracking.loggers import PhaseLogger

if TYPE_CHECKING:
    from agent_forge.phases.evomerge.evolution import Progress
    from agent_forge.phases.evomerge.phase import EvoMergePhase

LISTED = 50
"""The last generation the sources' list has names for, counted from 0; later ones are in the events only."""


def emit_generation(logger: PhaseLogger, row: dict[str, Any], tokens: int) -> None:
    """One generation's row of the history.

    Args:
        logger: of the phase.
        row: as :class:`agent_forge.phases.evomerge.evolution.Evolution` writes it.
        tokens: read when one candidate is scored.
    """
    logger.event("generation", **{key: value for key, value in row.items() if key != "best"})
    number, best = row["generation"], row["best"]
    if number > LISTED:
        return
    names = ("best_fitness", "avg_fitness", "min_fitness", "max_fitness", "diversity_score", "fitness_std")
    values = {name: row[name] for name in names}
    values |= {
        "best_perplexity": best["perplexity"],
        "best_accuracy": best["accuracy"],
        "best_speed_tps": tokens / best["seconds"],
        "best_memory_mb": best["bytes"] / 2**20,
        "elite_combo_usage": row["elite_combo_usage"],
        "loser_combo_chosen": row["loser_combo_chosen"],
    }
    logger.metrics({f"generation_{number}/{name}": value for name, value in values.items()}, step=number)


def emit_phase(phase: EvoMergePhase, search: Progress, facts: dict[str, Any]) -> dict[str, Any]:
    """The phase's own values, returned as they were written."""
    first, last = search.first_best.fitness, search.champion.fitness
    combo = ancestral_combo(search.champion.recipe, facts["lineage"])
    row = facts["table"]["champion"]["report"]
    before, after = sum(facts["sizes"]), facts["sizes"][0]
    context = phase.context
    taken, given = (
        validate_models(context.profile, *ends, context.storage, ids)
        for *ends, ids in (("cognate", "evomerge", facts["parents"]), ("evomerge", "quietstar", [facts["model"]]))
    )
    values = {
        "phase/initial_fitness": first,
        "phase/final_fitness": last,
        "phase/fitness_improvement": last - first,
        "phase/fitness_improvement_percent": 100 * (last - first) / first if first else 0.0,
        "phase/generations_completed": search.generation,
        "phase/evaluations": search.evaluations,
        "phase/champion_combo_id": combo,
        "phase/champion_combo_binary": "none" if combo < 0 else f"{combo:03b}",
        "phase/champion_recipe": facts["recipe"],
        "phase/compression_ratio": before / after,
        "phase/parameters_before": before,
        "phase/parameters_after": after,
        "phase/final_accuracy": row["accuracy"],
        "phase/final_perplexity": row["perplexity"],
        "phase/duration_seconds": facts["seconds"],
        "handoff/from_phase1": taken.accepted,
        "handoff/to_phase3": given.accepted,
        "handoff/champion_fitness": row["composite"],
    }
    context.logger.metrics(values)
    return values


def ancestral_combo(champion: Recipe, lineage: Mapping[str, Recipe]) -> int:
    """The combination the champion goes back to through mutations; -1 where it was made otherwise."""
    recipe = champion
    while recipe.kind == "mutation" and recipe.parents[0] in lineage:
        recipe = lineage[recipe.parents[0]]
    return -1 if recipe.combo is None else recipe.combo
