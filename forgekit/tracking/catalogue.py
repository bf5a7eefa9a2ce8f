"""The metric catalogue as data: what every phase measures, in which unit, how often, and what it means.

A phase's table is found by name through the registry :data:`CATALOGUES`; a phase from another distribution
brings its own by an entry point of the group ``forgekit.metrics``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

from forgekit.errors import ConfigError
from forgekit.registry import Registry, unknown

Cadence = Literal["once", "step", "epoch", "phase"]
Row = tuple[str, str, Cadence, str]
"""(name, unit, cadence, meaning); ``{1,2,3}`` in the name stands for one metric each."""


@dataclass(frozen=True)
class Metric:
    """One measured quantity of one phase."""

    name: str
    phase: str
    unit: str
    cadence: Cadence
    """``once`` at the start, every ``step``, every ``epoch``, or at the end of the ``phase``."""
    meaning: str


# Phase 1 of the sources; the last four rows per model are ours.
COGNATE: tuple[Row, ...] = (
    ("config/num_models", "models", "once", "models to create"),
    ("config/hidden_size", "dimensions", "once", "width of the residual stream"),
    ("config/num_layers", "layers", "once", "layers per model"),
    ("config/parameters_target", "parameters", "once", "parameters each model should have"),
    ("model_{1,2,3}/train/loss", "nats/token", "step", "training loss of this step"),
    ("model_{1,2,3}/train/loss_avg_100", "nats/token", "step", "mean training loss of the last 100 steps"),
    ("model_{1,2,3}/train/learning_rate", "1", "step", "learning rate of this step"),
    ("model_{1,2,3}/epoch/loss", "nats/token", "epoch", "mean training loss of the epoch"),
    ("model_{1,2,3}/size_mb", "MB", "phase", "bytes on disk / 2**20"),
    ("model_{1,2,3}/parameters", "parameters", "phase", "parameters the model really has"),
    ("model_{1,2,3}/train/tokens_per_second", "tokens/s", "step", "training throughput"),
    ("model_{1,2,3}/train/grad_norm", "1", "step", "gradient norm before clipping"),
    ("model_{1,2,3}/act/mean_steps", "steps/token", "step", "thinking steps taken before halting, on average"),
    ("model_{1,2,3}/gate/entropy", "bits", "step", "entropy of the memory gate: 0 when it always decides alike"),
    ("phase/num_models_created", "models", "phase", "models that were finished"),
    ("phase/total_parameters", "parameters", "phase", "parameters of all models together"),
    ("phase/avg_final_loss", "nats/token", "phase", "mean of the models' final losses"),
    ("phase/min_final_loss", "nats/token", "phase", "lowest of the models' final losses"),
    ("phase/max_final_loss", "nats/token", "phase", "highest of the models' final losses"),
    ("phase/total_size_mb", "MB", "phase", "bytes on disk of all models / 2**20"),
    ("phase/duration_seconds", "s", "phase", "wall-clock time of the phase"),
    ("phase/success", "bool", "phase", "whether the phase finished and its outputs are valid"),
)

_GENERATION = "generation_{" + ",".join(map(str, range(51))) + "}"
# Phase 2 of the sources: generation 0 and fifty more. A search that converges earlier emits those it made.
EVOMERGE: tuple[Row, ...] = (
    (f"{_GENERATION}/best_fitness", "1", "epoch", "composite fitness of the generation's best child, select split"),
    (f"{_GENERATION}/avg_fitness", "1", "epoch", "mean over the generation"),
    (f"{_GENERATION}/min_fitness", "1", "epoch", "lowest of the generation"),
    (f"{_GENERATION}/max_fitness", "1", "epoch", "highest of the generation"),
    (f"{_GENERATION}/diversity_score", "1", "epoch", "mean relative distance of the children's task vectors"),
    (f"{_GENERATION}/fitness_std", "1", "epoch", "standard deviation over the generation"),
    (f"{_GENERATION}/best_perplexity", "1/byte", "epoch", "the best child's perplexity per byte of text"),
    (f"{_GENERATION}/best_accuracy", "share", "epoch", "the best child's exact answers, mean over specialities"),
    (f"{_GENERATION}/best_speed_tps", "tokens/s", "epoch", "tokens it read per second when it was scored, one thread"),
    (f"{_GENERATION}/best_memory_mb", "MB", "epoch", "bytes of its weights / 2**20"),
    (f"{_GENERATION}/elite_combo_usage", "elites", "epoch", "elites asked for by the combination they go back to"),
    (f"{_GENERATION}/loser_combo_chosen", "combination", "epoch", "combinations asked for to merge the losers"),
    ("phase/initial_fitness", "1", "phase", "generation 0's best, select split"),
    ("phase/final_fitness", "1", "phase", "the champion's, select split"),
    ("phase/fitness_improvement", "1", "phase", "final less initial fitness"),
    ("phase/fitness_improvement_percent", "%", "phase", "the same as a share of the initial fitness"),
    ("phase/generations_completed", "generations", "phase", "generations that were scored"),
    ("phase/evaluations", "candidates", "phase", "candidates asked for; equal weights are scored once"),
    ("phase/champion_combo_id", "combination", "phase", "combination it goes back to; -1: made otherwise"),
    ("phase/champion_combo_binary", "text", "phase", "the same in three bits"),
    ("phase/champion_recipe", "text", "phase", "how the champion was made"),
    ("phase/compression_ratio", "1", "phase", "parents over champions: models of one shape become one"),
    ("phase/parameters_before", "parameters", "phase", "of all parents together"),
    ("phase/parameters_after", "parameters", "phase", "of the champion"),
    ("phase/final_accuracy", "share", "phase", "the champion's exact answers, report split"),
    ("phase/final_perplexity", "1/byte", "phase", "the champion's perplexity per byte, report split"),
    ("phase/duration_seconds", "s", "phase", "wall-clock time of the phase"),
    ("handoff/from_phase1", "bool", "phase", "whether phase 1's models satisfied the contract"),
    ("handoff/to_phase3", "bool", "phase", "whether the champion satisfies phase 3's contract"),
    ("handoff/champion_fitness", "1", "phase", "the champion's composite, report split"),
)

_STEP = "step_{0,1,2,3,4}"
# Phase 3 of the sources: thoughts looked at before step 2 and four times while it trains, then the whole phase. The
# rows under quietstar/ are those of the sources' first version.
QUIETSTAR: tuple[Row, ...] = (
    (f"{_STEP}/thoughts_generated", "thoughts", "epoch", "thoughts about held-out questions, select split"),
    (f"{_STEP}/thoughts_valid", "thoughts", "epoch", "of these, the valid ones"),
    (f"{_STEP}/validity_rate", "share", "epoch", "valid over generated"),
    (f"{_STEP}/avg_coherence", "1", "epoch", "mean coherence"),
    (f"{_STEP}/semantic_similarity", "1", "epoch", "mean similarity of thought and question"),
    (f"{_STEP}/logical_consistency", "1", "epoch", "mean share of statements that hold"),
    (f"{_STEP}/relevance_score", "1", "epoch", "mean relevance: likelier after its own question than after others"),
    (f"{_STEP}/fluency_score", "1", "epoch", "mean fluency: how likely the model finds its own thought"),
    (f"{_STEP}/processing_time_ms", "ms", "epoch", "wall-clock time per thought and answer, in a batch"),
    ("quietstar/thought_coherence_avg", "1", "epoch", "mean coherence of the thoughts looked at"),
    ("quietstar/thought_coherence_min", "1", "epoch", "lowest coherence among them"),
    ("quietstar/thought_length_avg", "tokens", "step", "length of the thoughts sampled in step 2"),
    ("quietstar/mixing_weight_alpha", "1", "step", "how much of a prediction comes from the thought"),
    ("quietstar/reasoning_entropy", "nats", "step", "entropy of the predictions after thoughts"),
    ("quietstar/injection_points", "points/row", "step", "positions per row at which step 2 thought"),
    ("quietstar/thoughts_filtered", "%", "epoch", "thoughts looked at that are not valid"),
    ("phase/traces", "traces", "phase", "distinct verified traces written for step 1"),
    ("phase/held_out_valid", "share", "phase", "held-out thoughts after step 1 that are true and lead to the answer"),
    ("phase/converged", "bool", "phase", "whether that reaches the share that is asked for"),
    ("phase/total_thoughts_generated", "thoughts", "phase", "thoughts about the report split's questions"),
    ("phase/total_thoughts_valid", "thoughts", "phase", "of these, the valid ones"),
    ("phase/overall_validity_rate", "share", "phase", "valid over generated"),
    ("phase/avg_coherence", "1", "phase", "mean coherence, report split"),
    ("phase/avg_semantic_similarity", "1", "phase", "its first part"),
    ("phase/avg_logical_consistency", "1", "phase", "its second part"),
    ("phase/avg_relevance", "1", "phase", "its third part"),
    ("phase/avg_fluency", "1", "phase", "its fourth part"),
    ("phase/processing_time_ms_per_thought", "ms", "phase", "wall-clock time per thought and answer, in a batch"),
    ("phase/accuracy_with_thoughts", "share", "phase", "right answers after thoughts, report split"),
    ("phase/accuracy_without_thoughts", "share", "phase", "right answers with thinking switched off"),
    ("phase/accuracy_improvement", "share", "phase", "the first less the second"),
    ("phase/accuracy_shuffled_thoughts", "share", "phase", "right answers after thoughts of other questions"),
    ("phase/accuracy_filler", "share", "phase", "right answers after as many filler tokens"),
    ("phase/accuracy_trained_without", "share", "phase", "right answers of the model that learned without thoughts"),
    ("phase/accuracy_parent", "share", "phase", "right answers of the parent"),
    ("phase/accuracy_by_itself", "share", "phase", "right answers where the model decides whether to think"),
    ("phase/predictive_power", "share", "phase", "right answers likelier after their own thought than after another's"),
    ("phase/coherence_correlation", "1", "phase", "coherence and right answers; null where it cannot be computed"),
    ("phase/theater_detected", "bool", "phase", "whether the controls were not passed"),
    ("phase/skills_before", "share", "phase", "the parent on its other skills, report split"),
    ("phase/skills_after", "share", "phase", "the thinker on them"),
    ("phase/final_accuracy", "share", "phase", "the thinker by itself on all these questions"),
    ("phase/mixing_weight_alpha", "1", "phase", "how much of a prediction came from the thought in the end of step 2"),
    ("phase/step2_nats_before", "nats/token", "phase", "validation loss after step 1, report split"),
    ("phase/step2_nats_after", "nats/token", "phase", "after step 2, with thoughts"),
    ("phase/step2_nats_equal_compute", "nats/token", "phase", "after ordinary training at the same compute"),
    ("phase/duration_seconds", "s", "phase", "wall-clock time of the phase"),
    ("handoff/from_phase2", "bool", "phase", "whether phase 2's champion satisfied the contract"),
    ("handoff/to_phase4", "bool", "phase", "whether the thinker satisfies phase 4's contract"),
)

# Phase 4 of the sources (V2 specification, 2.4.7); the rows under bitnet/ are those of the sources' first version, the
# last ones are ours.
BITNET: tuple[Row, ...] = (
    ("compression/original_size_mb", "MB", "phase", "the parent's weights in float32 / 2**20"),
    ("compression/compressed_size_mb", "MB", "phase", "the packed file's weights on disk / 2**20, header included"),
    ("compression/compression_ratio", "1", "phase", "the first over the second"),
    ("compression/layers_compressed", "maps", "phase", "linear maps on the method's grid (ternary)"),
    ("compression/layers_preserved", "maps", "phase", "embeddings and other maps: 4 to 8 bits, or float16"),
    ("compression/sparsity_ratio", "share", "phase", "weights on that grid that are zero"),
    ("compression/threshold", "1", "phase", "scales above which a weight is not zero"),
    ("quality/pre_compression_perplexity", "1/token", "phase", "the parent's perplexity, report split"),
    ("quality/post_compression_perplexity", "1/token", "phase", "after rounding, without training"),
    ("quality/perplexity_degradation_percent", "%", "phase", "what rounding without training added"),
    ("quality/post_finetuning_perplexity", "1/token", "phase", "of the ternary model that is handed on"),
    ("quality/final_degradation_percent", "%", "phase", "what it has more than the parent"),
    ("quality/perplexity_recovery_percent", "%", "phase", "what training took away of it; null: nothing added"),
    ("quality/accuracy_recovery_percent", "%", "phase", "lost answers that training brought back; null: none lost"),
    ("quality/pre_accuracy", "share", "phase", "the parent's right answers, report split"),
    ("quality/post_accuracy", "share", "phase", "those of the ternary model that is handed on"),
    ("quality/accuracy_retention", "1", "phase", "skill after over skill before, both corrected for chance"),
    ("performance/inference_speedup", "1", "phase", "tokens per second packed over float32, one row, same run"),
    ("performance/memory_reduction", "1", "phase", "bytes of weights held in memory, float32 over packed"),
    ("quality/dense_accuracy", "share", "phase", "right answers of the float copy that later phases train"),
    ("quality/dense_perplexity", "1/token", "phase", "its perplexity"),
    ("performance/calibration_time_seconds", "s", "phase", "reading the calibration rows and choosing the threshold"),
    ("phase/duration_seconds", "s", "phase", "wall-clock time of the phase"),
    ("phase/success", "bool", "phase", "whether the phase finished and its outputs are valid"),
    ("phase/finetuned", "bool", "phase", "whether the model handed on was trained after rounding"),
    ("bitnet/compression_ratio", "1", "phase", "as compression/compression_ratio"),
    ("bitnet/accuracy_retention", "1", "phase", "as quality/accuracy_retention"),
    ("bitnet/inference_speedup", "1", "phase", "as performance/inference_speedup"),
    ("bitnet/memory_reduction", "1", "phase", "as performance/memory_reduction"),
    ("bitnet/sparsity_ratio", "share", "phase", "as compression/sparsity_ratio"),
    ("bitnet/quantization_error", "1", "phase", "mean distance of a weight from its place on the grid"),
    ("bitnet/calibration_samples", "rows", "phase", "rows of training data that were calibrated on"),
    ("bitnet/memory/peak_mb", "MB", "phase", "packed weights and the state of one decoded row / 2**20, counted"),
    ("bitnet/memory/allocated_mb", "MB", "phase", "packed weights in memory / 2**20"),
    ("bitnet/speed/latency_p50_ms", "ms", "phase", "median time of a decoded token, packed, one row"),
    ("bitnet/speed/latency_p95_ms", "ms", "phase", "95th percentile of the same"),
    ("bitnet/speed/throughput_fps", "tokens/s", "phase", "tokens decoded per second, packed, one row"),
    ("train/loss", "nats/token", "step", "cross-entropy of this step, on the grid"),
    ("train/divergence", "nats/token", "step", "KL from the parent's distribution, on the grid"),
    ("train/strength", "1", "step", "how far the weights are on the grid: 1 is fully"),
    ("baseline/{untrained,int8,int4,same_bytes}_accuracy", "share", "phase", "right answers of the comparison"),
    ("baseline/{untrained,int8,int4,same_bytes}_perplexity", "1/token", "phase", "its perplexity"),
    ("baseline/{untrained,int8,int4,same_bytes}_size_mb", "MB", "phase", "bytes of its weights / 2**20"),
    ("handoff/from_phase3", "bool", "phase", "whether the parent satisfied phase 4's contract"),
    ("handoff/to_phase5", "bool", "phase", "whether the dequantised model satisfies phase 5's contract"),
)

CATALOGUES = Registry("metrics")
CATALOGUES.lazy("cognate", f"{__name__}:COGNATE")
CATALOGUES.lazy("evomerge", f"{__name__}:EVOMERGE")
CATALOGUES.lazy("quietstar", f"{__name__}:QUIETSTAR")
CATALOGUES.lazy("bitnet", f"{__name__}:BITNET")


def catalogue(phase: str) -> dict[str, Metric]:
    """All metrics of a phase by name, in the table's order.

    Raises:
        ConfigError: the phase has no table, or its table names a metric twice or with an unknown cadence.
    """
    metrics: dict[str, Metric] = {}
    for pattern, unit, cadence, meaning in CATALOGUES.get(phase):
        if cadence not in get_args(Cadence):
            raise unknown("cadence", cadence, list(get_args(Cadence)))
        for name in expand(pattern):
            if name in metrics:
                raise ConfigError(f"{name!r} is listed twice", where=f"metrics of {phase}", remedy="remove one")
            metrics[name] = Metric(name, phase, unit, cadence, meaning)
    return metrics


def expand(pattern: str) -> list[str]:
    """``model_{1,2}/loss`` spelled out: one name per choice; several braces multiply."""
    brace = re.search(r"\{([^{}]*)\}", pattern)
    if brace is None:
        return [pattern]
    head, tail = pattern[: brace.start()], pattern[brace.end() :]
    return [name for choice in brace[1].split(",") for name in expand(head + choice + tail)]
