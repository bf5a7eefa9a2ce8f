"""Phase 4, BitNet: linear maps in three values, embedding and head in a few bits, trained until the skills are back.

Linear maps in eight or four bits are the same phase with another grid (``method``, ``agent-forge quantize``).
Rounding alone is measured first. Where it costs too much the model is trained on with the grid in its forward pass
(straight-through, arXiv 2402.17764), from its parent's weights and towards its parent's distribution. Whether that is
done, and which of the two is handed on, is decided on the select split; everything claimed is measured on the report
split, which chose nothing.

Two artifacts come out: ``ternary`` (or ``int8``, ``int4``), packed, which chat and serve run, and ``ternary_dense``,
the same weights as floats, which is handed on because later phases train (DESIGN 7 (7)).
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from agent_forge.phases.bitnet.ahead import Ahead, Found
from agent_forge.phases.bitnet.card import card
from agent_forge.phases.bitnet.config import BitNetConfig
from agent_forge.phases.bitnet.data import (
    BitNetData,
    Cell,
    calibration_rows,
    cut_text,
    practice,
    prepare,
    thought_about,
    too_long,
)
from agent_forge.phases.bitnet.evidence import (
    INT4,
    INT8,
    PARENT,
    SAME_BYTES,
    UNTRAINED,
    Finals,
    decide,
    in_floats,
    levels,
    mastered,
    measure,
    models,
    untrained,
)
from agent_forge.phases.bitnet.measuring import (
    Asked,
    Reading,
    Speed,
    bytes_float32,
    bytes_stored,
    chosen_threshold,
    decoding_speed,
    grid_distance,
    is_right,
    map_bits,
    narrow,
    opens_alike,
    output_error,
    packed_bytes,
    size_of,
    zero_share,
)
from agent_forge.phases.bitnet.metrics import STEP_PARTS, emit_phase, never_told, values
from agent_forge.phases.bitnet.parent import Parent, open_parent
from agent_forge.phases.bitnet.texts import own_texts
from agent_forge.phases.bitnet.training import Piece, Student, Workshop
from agent_forge.pipeline.phase import PhaseController, PhaseResult, Progress
from forgekit.compute.disk import forecast as disk_forecast
from forgekit.compute.disk import require_free
from forgekit.data.batches import Mixture, asked
from forgekit.data.plans import TextPlan
from forgekit.errors import ArtifactError, ConfigError
from forgekit.models.base import parameter_count
from forgekit.quant.config import GroupPlan, MapPlan, TernaryPlan
from forgekit.quant.layers import is_conv1d
from forgekit.quant.model import calibrate, dequantised, fake_quantised, halved, packed, plans_of, sizes, targets
from forgekit.store.artifact import ArtifactExtras, amend_evidence
from forgekit.train.distributed import agreed, world
from forgekit.train.setup import training_device

CONTROL = "same bytes"
OPTIMIZER_SLOTS = 3
FEW = 0.02
"""Share of right answers of the select split that text may cost."""
SPEED_PROMPT = 16
"""Tokens of held-out text that decoding is timed behind, where there is no question to ask."""


@dataclass
class Made:
    """What the phase made, and what it decided by.

    Attributes:
        name: what the result is called.
        plan: the grid, with the threshold that calibration chose.
        size: bytes of the packed file.
        select: every model on the select split, by name.
        thinks: families and levels that the parent thinks about.
        forgot: whether rounding alone costs more answers than the settings allow.
        latent: the trained weights, which round to the low-bit ones; None where nothing was trained.
        small: a full-precision model of the same bytes; None where there is none.
        records: of the trainings, by name.
        facts: of the calibration, for the metrics.
        compared: what it is compared with on the report split, with bytes on disk, by name.
    """

    name: str
    plan: MapPlan
    size: int
    select: dict[str, Reading]
    thinks: frozenset[Cell]
    forgot: bool
    latent: nn.Module | None = None
    small: nn.Module | None = None
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    compared: dict[str, Found] = field(default_factory=dict)

    @property
    def right(self) -> dict[str, float]:
        """Right answers on the select split, by name; empty where nothing was asked."""
        return {name: one.accuracy for name, one in self.select.items() if one.accuracy is not None}

    @property
    def trained(self) -> bool:
        """Whether the trained weights are handed on: they have no fewer right answers than those only rounded. Where
        rounding cost so few that they were trained for their text, they may have a few less, and no more perplexity."""
        after, before = self.select.get(self.name), self.select[untrained(self.name)]
        if after is None or self.latent is None:
            return False
        if self.forgot:
            return after.accuracy >= before.accuracy
        kept = before.accuracy is None or after.accuracy >= before.accuracy - FEW
        return kept and after.perplexity <= before.perplexity

    @property
    def chosen(self) -> str:
        """Name of the model that is handed on."""
        return self.name if self.trained else untrained(self.name)


class BitNetPhase(PhaseController):
    """Makes ``ternary`` and ``ternary_dense``, which the curriculum trains on; or ``int8`` or ``int4`` and its copy."""

    name = "bitnet"
    config: BitNetConfig

    def validate_input(self, models: list[str]) -> None:
        """Refuse what cannot be made small.

        Raises:
            ConfigError: not exactly one model, or rows that are longer than its context.
            ArtifactError: it has no linear maps, or is packed already.
        """
        if self.config.train.parallel == "fsdp":
            where = "phases.bitnet.train.parallel"
            raise ConfigError("phase 4 rounds whole matrices while it trains", where=where, remedy="use replicate")
        self._open(models)

    @staticmethod
    def check_text(config: BitNetConfig, tokenizer: Any) -> None:
        """Refuse text of the user that is not enough, before anything is begun.

        Raises:
            DataError: it cannot be read, or is too little for a row of training or a window of a held-out split.
        """
        if config.own_text is not None:
            cut_text(config, tokenizer, own_texts(config.own_text)[0])

    def run(self, models: list[str]) -> PhaseResult:
        """Round, train, measure, save; see :meth:`PhaseController.run`."""
        began = time.perf_counter()
        parent = self._open(models)
        data = self._prepare(parent)
        made, mixture = self._round(parent, data)
        inputs = (parent.print, data.data_hash, made.plan.fingerprint(), str(sorted(made.thinks)))
        workshop = Workshop(self.context, self.key("training", *inputs))
        with Ahead() as ahead:
            self._compare(parent, data, made, ahead)
            self._train(parent, data, (made, mixture), (workshop, ahead))
            made.compared = agreed(ahead.collect)
        result = agreed(lambda: self._finish(parent, data, made, began))
        agreed(workshop.clear)
        return result

    def _apart(self) -> bool:
        """Whether what can be measured before the training ends is measured beside it."""
        on_cpu = training_device(self.config.train.device).type == "cpu"  # an accelerator is not shared
        return self.context.profile.side_by_side and on_cpu and world()[1] == 1

    # Before

    def _open(self, models: list[str]) -> Parent:
        return open_parent(self.context.storage, models, self.config)

    def _prepare(self, parent: Parent) -> BitNetData:
        config, context = self.config, self.context
        kept = config.train.keep_checkpoints
        require_free(context.folder, disk_forecast(parameter_count(parent.model), 3, kept, OPTIMIZER_SLOTS), "phase 4")
        context.show(Progress("data", 0, 1, "text, questions"))
        first = TextPlan.build(context.profile.phases.get("cognate", {}).get("text", {}), "phases.cognate.text")
        data = prepare(config, parent.tokenizer, parent.speciality, first, context.data)
        for note in data.notes:
            context.logger.event("data", note=note)
        windows = len(data.windows["report"].ids)
        context.show(Progress("data", 1, 1, f"{len(data.report):,} questions, {windows} windows of text to report on"))
        return data

    def _asked(self, parent: Parent, data: BitNetData, split: str) -> Asked:
        problems = data.select if split == "select" else data.report
        return Asked(problems, data.windows[split], parent.thinks, self.config.evaluation.thinking_budget)

    def _round(self, parent: Parent, data: BitNetData) -> tuple[Made, Mixture]:
        """Calibrate, choose the grid, and see what rounding alone does; the training data come with it."""
        config, name, select = self.config, self.config.made, self._asked(parent, data, "select")
        self.context.show(Progress("rounding", 0, 1, "calibration"))
        before = agreed(lambda: select.of(parent.model, parent.tokenizer))
        thinks = thought_about(data.select, before.thought)
        mixture = practice(config, data, thinks)
        began = time.perf_counter()
        rows = calibration_rows(config, mixture)
        statistics = calibrate(parent.model, rows)
        plan, errors = self._grid(parent, statistics)
        facts = {
            "samples": sum(len(batch.inputs) for batch in rows),
            "calibration_seconds": time.perf_counter() - began,
            "threshold": getattr(plan, "threshold", None),
        }
        unknown = sorted(set(targets(parent.model)) - set(statistics))
        inputs = {name: one.told() for name, one in statistics.items()}
        self.context.logger.event("calibrated", errors=errors, **facts, never_reached=unknown, inputs=inputs)
        model = packed(parent.model, plan, config.groups)
        after = agreed(lambda: select.of(model, parent.tokenizer))
        size = packed_bytes(model)
        lost = f"perplexity {before.perplexity:.2f} before, {after.perplexity:.2f} after"
        if before.accuracy is not None:
            lost = f"{100 * before.accuracy:.1f} % right before, {100 * after.accuracy:.1f} % after; {lost}"
        told = sorted(f"{family}/{level}" for family, level in thinks)
        self.context.logger.event("rounded", note=lost, bytes=size, thinks_about=told, too_long=too_long(mixture))
        self.context.show(Progress("rounding", 1, 1, lost))
        seen = {PARENT: before, untrained(name): after}
        forgot = before.accuracy is not None and after.accuracy < (1 - config.finetune_above) * before.accuracy
        return Made(name, plan, size, seen, thinks, forgot, facts=facts), mixture

    def _grid(self, parent: Parent, statistics: dict[str, Any]) -> tuple[MapPlan, dict[str, float]]:
        """The grid, with the threshold that calibration chooses, and the error of the maps' outputs on it."""
        plan, model = self.config.grid, parent.model
        if isinstance(plan, TernaryPlan):
            return chosen_threshold(model, plan, statistics, self.config.calibration.thresholds)
        return plan, {self.config.method: output_error(model, plan, statistics)}

    # The trainings

    def _needed(self, made: Made) -> bool:
        """Whether rounding alone costs more than the settings allow, and they allow training."""
        before, after = made.select[PARENT], made.select[untrained(made.name)]
        blurred = after.perplexity > (1 + self.config.most_perplexity) * before.perplexity
        return self.config.finetune_above < 1 and (made.forgot or blurred)

    def _train(
        self, parent: Parent, data: BitNetData, given: tuple[Made, Mixture], place: tuple[Workshop, Ahead]
    ) -> None:
        """Where rounding cost too much: train on the grid, and a model of the same bytes beside it."""
        config, (made, mixture), (workshop, ahead) = self.config, given, place
        if not self._needed(made):
            return
        latent = copy.deepcopy(parent.model).requires_grad_(True)
        made.latent = fake_quantised(latent, made.plan, config.groups)
        pieces = [self._piece(made.name, made.latent, parent, mixture)]
        if config.baselines.same_bytes:
            made.small = narrow(parent.model.config, made.size, config.train.seed)
            if made.small is None:
                self.context.logger.event("no_control", note=f"no full-precision shape takes {made.size:,} bytes")
            else:
                pieces.append(self._piece(CONTROL, made.small, parent, mixture))
        beside = ahead if self._apart() else None
        made.records = workshop.train_all(pieces, self.context.profile.side_by_side, beside)
        parent.model.to(next(made.latent.parameters()).device)  # what is compared is compared on one device
        model = packed(made.latent, made.plan, config.groups)
        select = self._asked(parent, data, "select")
        made.select[made.name] = agreed(lambda: select.of(model, parent.tokenizer))

    def _piece(self, name: str, model: nn.Module, parent: Parent, mixture: Mixture) -> Piece:
        loss, control = self.config.loss, name == CONTROL
        if control and not self.config.baselines.taught:
            loss = loss.replace(divergence=0.0)
        student = Student(model, parent.model, loss, self.config.train.steps)
        return Piece(name, student, mixture, self.config.train, {} if control else STEP_PARTS)

    # After

    def _finish(self, parent: Parent, data: BitNetData, made: Made, began: float) -> PhaseResult:
        """Measure, save, decide. Models are compared where they are."""
        self.context.show(Progress("evidence", 0, 1, "scoring the report split"))
        source = made.latent if made.trained else parent.model
        small = packed(source, made.plan, self.config.groups)
        made.size = packed_bytes(small)
        plain = dequantised(source, made.plan, self.config.groups)
        kept = self._stored(plain)
        finals = self._finals(parent, data, made, (small, plain, bytes_stored(kept)))
        prompt = self._prompt(parent, data)
        speed = decoding_speed({PARENT: parent.model, made.name: small}, prompt, self.config.speed)
        evidence = measure(self.config, finals)
        found = values(finals, speed, self._facts(parent, made, (source, small)))
        saved = self._save(parent, data, made, (kept, small, finals, found))
        for model_id in saved.values():
            amend_evidence(self.context.storage.resolve(model_id), [e.model_dump(mode="json") for e in evidence])
        self.context.show(Progress("evidence", 1, 1, f"{len(evidence)} claims measured"))
        decision = decide(self.config, self.context.profile.gate, evidence, finals)
        seconds = time.perf_counter() - began
        packed_id, dense_id = saved.values()
        self._check_written(packed_id, small)
        found |= {"phase/duration_seconds": seconds, "phase/success": True}
        found |= never_told(self.config, bool(made.records))
        told = emit_phase(self.context, found, (parent.model_id, dense_id))
        return PhaseResult(
            success=True,
            model=dense_id,
            phase_name=self.name,
            metrics=told | self._tables(made, finals, speed),
            artifacts={
                "all_models": [dense_id],
                "model_names": [_dense(made.name)],
                "parent": parent.model_id,
                "method": self.config.method,
                "made": made.name,
                "packed": packed_id,
                "dense": dense_id,
                "on_grid": True,
                "quantization_bits": map_bits(made.plan),
                "preserved_layers": found["compression/layers_preserved"],
                "calibration_samples": found["bitnet/calibration_samples"],
                "chosen": made.chosen,
                "gate": decision.model_dump(),
                "data": data.provenance,
                "conversation": self._conversation(parent, data, made, small),
            },
            duration_seconds=seconds,
            config=self.config.model_dump(mode="json"),
            evidence=evidence,
        )

    def _compare(self, parent: Parent, data: BitNetData, made: Made, ahead: Ahead) -> None:
        """Have the parent, and all that is only rounded, asked the questions of the report split."""
        report, groups = replace(self._asked(parent, data, "report"), leaving=ahead.leaving), self.config.groups

        def rounded(plan: MapPlan) -> Found:
            other = packed(parent.model, plan, groups)
            taken = packed_bytes(other)
            if isinstance(plan, GroupPlan) and plan != made.plan:  # the same numbers, faster where many rows are read
                other = dequantised(parent.model, plan, groups)
            return report.of(other, parent.tokenizer), taken

        ahead.ask(PARENT, lambda: (report.of(parent.model, parent.tokenizer), bytes_float32(parent.model)))
        ahead.ask(untrained(made.name), partial(rounded, made.plan))
        for name, plan in self._others(made).items():
            ahead.ask(name, partial(rounded, plan))

    def _finals(self, parent: Parent, data: BitNetData, made: Made, sides: tuple[nn.Module, nn.Module, int]) -> Finals:
        """Every model on the report split, and its bytes on disk."""
        small, plain, plain_bytes = sides
        report, found = self._asked(parent, data, "report"), dict(made.compared)
        rounded = untrained(made.name)
        found[made.name] = (report.of(small, parent.tokenizer), made.size) if made.trained else found[rounded]
        found[in_floats(made.name)] = report.of(plain, parent.tokenizer), plain_bytes
        if made.small is not None:
            found[SAME_BYTES] = report.of(made.small, parent.tokenizer), size_of(made.small)
        order = (PARENT, made.name, in_floats(made.name), rounded, *self._others(made), SAME_BYTES)
        readings = {name: found[name][0] for name in order if name in found}
        size = {name: found[name][1] for name in readings}
        strong = mastered(data.select, made.select[PARENT].right, self.config.strong)
        compute = {f"{name.replace(' ', '_')}_tokens": float(row["tokens"]) for name, row in made.records.items()}
        compute |= {f"{name.replace(',', '').replace(' ', '_')}_bytes": float(taken) for name, taken in size.items()}
        ends = (strong, made.trained, compute, made.name, made.forgot)
        return Finals(data.report, data.mix, readings, size, *ends)

    def _others(self, made: Made) -> dict[str, MapPlan]:
        """Grids that the result is compared with, by the name of a model that is only rounded to them."""
        plans, config = self.config.baselines, self.config
        grids = {INT8: plans.int8, INT4: plans.int4, UNTRAINED: config.ternary if plans.ternary else None}
        return {name: plan for name, plan in grids.items() if plan is not None and name != untrained(made.name)}

    def _prompt(self, parent: Parent, data: BitNetData) -> list[int]:
        """What decoding is timed behind: a question, or some text."""
        if data.select:
            return parent.tokenizer.encode_batch([asked(parent.tokenizer, data.select[0].prompt)])[0].ids
        return data.windows["select"].ids[0, :SPEED_PROMPT].tolist()

    def _conversation(self, parent: Parent, data: BitNetData, made: Made, small: nn.Module) -> list[dict[str, Any]]:
        """A question of each of the first families and what the packed model says to it."""
        first = list({problem.family: problem for problem in data.report}.values())[:5]
        talk = Asked(first, data.windows["report"], parent.thinks, self.config.evaluation.thinking_budget)
        return [
            {
                "model": made.name,
                "asked": first[i].prompt,
                "thought": one.thought,
                "answered": one.text,
                "expected": first[i].answer,
                "right": is_right(one, first[i]),
            }
            for i, one in sorted(talk.answers(small, parent.tokenizer), key=lambda pair: pair[0])
        ]

    def _facts(self, parent: Parent, made: Made, sides: tuple[nn.Module, nn.Module]) -> dict[str, Any]:
        source, small = sides
        plans = plans_of(parent.model, made.plan)
        names = [name for name, one in plans.items() if one == made.plan]  # not those that a ternary plan spares
        whole = parent.model.named_modules(remove_duplicate=False)
        maps = sum(isinstance(module, nn.Linear | nn.Embedding) or is_conv1d(module) for _, module in whole)
        return made.facts | {
            "held": {PARENT: sizes(parent.model)["total"], made.name: sizes(small)["total"]},
            "layers": (len(names), maps - len(names)),
            "sparsity": zero_share(small, names),
            "distance": grid_distance(source, made.plan),
        }

    def _tables(self, made: Made, finals: Finals, speed: Speed) -> dict[str, Any]:
        rates = {name: {"tokens_per_second": speed.rate(name), "blocks": row} for name, row in speed.rates.items()}
        return {
            "models": models(finals),
            "levels": levels(finals),
            "speed": rates,
            "select": made.right,
            "select_perplexity": {name: one.perplexity for name, one in made.select.items()},
            "losses": {name: row["losses"] for name, row in made.records.items()},
            "recovery": {"skills": finals.recovery, "perplexity": finals.perplexity_recovery},
        }

    def _save(self, parent: Parent, data: BitNetData, made: Made, found: tuple) -> dict[str, str]:
        """Both artifacts, by name; one that an earlier start saved is taken as it is."""
        kept, small, finals, values = found
        saved: dict[str, str] = {}
        for name in (made.name, _dense(made.name)):
            key = self.key(name, parent.print, data.data_hash)
            done = self._saved(key)
            if done is None:
                is_packed = name == made.name
                model = small if is_packed else kept
                metadata = self._metadata(parent, data, made, (name, key, values))
                metadata |= {} if is_packed else {"packed_model": saved[made.name]}
                extras = self._extras(parent, made, (name, finals, values))
                done = self.context.storage.save_model(
                    model, self.context.session_id, self.name, name, metadata, tokenizer=data.tokenizer, extras=extras
                )
            saved[name] = done
        return saved

    def _stored(self, plain: nn.Module) -> nn.Module:
        """The float copy as it is stored."""
        if self.config.dense == "float32" or hasattr(plain, "hf"):
            return plain
        return halved(copy.deepcopy(plain))

    def _check_written(self, packed_id: str, small: nn.Module) -> None:
        """Read the packed file back: what chat and serve will run is what was measured (ArtifactError)."""
        folder = self.context.storage.resolve(packed_id)
        if not opens_alike(folder, small):
            remedy = f"delete {folder}, then go on with --resume"
            raise ArtifactError("is not the model that was measured", where=str(folder), remedy=remedy)

    def _saved(self, key: str) -> str | None:
        storage = self.context.storage
        rows = storage.registry.search_models(phase=self.name, session_id=self.context.session_id)
        row = next((r for r in rows if r["metadata"].get("config_hash") == key), None)
        return row["model_id"] if row is not None and Path(row["model_path"]).is_dir() else None

    def _metadata(self, parent: Parent, data: BitNetData, made: Made, given: tuple) -> dict[str, Any]:
        name, key, found = given
        numbers = {n.removeprefix("phase/"): v for n, v in found.items() if isinstance(v, int | float)}
        return {
            "parents": [parent.model_id],
            "config_hash": key,
            "data_hash": data.data_hash,
            "seeds": [self.config.practice.seed, self.config.train.seed],
            "seed": self.config.train.seed,
            "parameters": parameter_count(parent.model),  # a packed model's codes are no parameters of torch
            "specialization": None,
            "tags": [self.config.method, "packed" if name == made.name else "dense"],
            "speciality": [part.model_dump(mode="json") for part in data.mix],
            "thinks": parent.thinks,
            "on_grid": True,
            "weight_grid": made.name,
            "packed": name == made.name,
            "grid": made.plan.model_dump(mode="json"),
            "groups": self.config.groups and self.config.groups.model_dump(mode="json"),
            "compression_ratio": found["compression/compression_ratio"],
            "compressed_size_mb": found["compression/compressed_size_mb"],
            "accuracy_retention": found["quality/accuracy_retention"],
            "accuracy": found["quality/post_accuracy" if name == made.name else "quality/dense_accuracy"],
            "metrics": numbers,
        }

    def _extras(self, parent: Parent, made: Made, given: tuple[str, Finals, dict[str, Any]]) -> ArtifactExtras:
        name, finals, found = given
        facts = {
            "made": made.name,
            "packed": name == made.name,
            "other": f"`{_dense(made.name) if name == made.name else made.name}`",
            "grid": f"{_grid_told(made.plan)} {'Trained on the grid.' if made.trained else 'Rounded, not trained.'}",
            "speedup": found["performance/inference_speedup"],
            "sparsity": found["compression/sparsity_ratio"],
        }
        readme = card(name, f"{parent.name} ({parent.model_id})", models(finals), facts)
        metrics = {n: v for n, v in found.items() if isinstance(v, int | float)}
        return ArtifactExtras(metrics=metrics, readme=readme)


def _dense(name: str) -> str:
    """The name of the float copy."""
    return f"{name}_dense"


def _grid_told(plan: MapPlan) -> str:
    """A sentence on how a weight of a linear map is stored."""
    if isinstance(plan, GroupPlan):
        return f"A weight is a whole number from {-plan.top} to {plan.top} times a scale of its {plan.group} columns."
    scope = "row" if plan.per == "channel" else "matrix"
    told = f"A weight is zero where its magnitude is at most {plan.threshold:g} times the {plan.scale} of its {scope}."
    if plan.spared:
        told += f" Maps with {' or '.join(plan.spared)} in their name have {plan.spared_groups.bits} bits a weight."
    return told
