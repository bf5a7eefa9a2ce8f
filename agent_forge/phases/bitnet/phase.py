"""Phase 4, BitNet: linear maps in three values, embedding and head in a few bits, trained until the skills are back.

Rounding alone is measured first. Where it costs too much the model is trained on with the grid in its forward pass
(straight-through, arXiv 2402.17764), from its parent's weights and towards its parent's distribution. Whether that is
done, and which of the two is handed on, is decided on the select split; everything claimed is measured on the report
split, which chose nothing.

Two artifacts come out: ``ternary``, packed, which chat and serve run, and ``ternary_dense``, the same weights as
floats, which is handed on because later phases train (DESIGN 7 (7)).
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from agent_forge.phases.bitnet.card import card
from agent_forge.phases.bitnet.config import BitNetConfig
from agent_forge.phases.bitnet.data import (
    BitNetData,
    Cell,
    calibration_rows,
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
    TERNARY,
    UNTRAINED,
    Finals,
    decide,
    levels,
    mastered,
    measure,
    models,
)
from agent_forge.phases.bitnet.measuring import (
    Asked,
    Reading,
    Speed,
    bytes_float32,
    chosen_threshold,
    decoding_speed,
    grid_distance,
    is_right,
    narrow,
    packed_bytes,
    rounded,
    size_of,
    zero_share,
)
from agent_forge.phases.bitnet.metrics import STEP_PARTS, emit_phase, values
from agent_forge.phases.bitnet.training import Piece, Student, Workshop
from agent_forge.pipeline.phase import PhaseController, PhaseResult, Progress
from forgekit.compute.disk import forecast as disk_forecast
from forgekit.compute.disk import require_free
from forgekit.data.batches import Mixture, asked
from forgekit.data.plans import GymMix, TextPlan
from forgekit.errors import ConfigError
from forgekit.models.base import parameter_count
from forgekit.models.io import read_model
from forgekit.quant.config import TernaryPlan
from forgekit.quant.layers import is_conv1d
from forgekit.quant.model import calibrate, dequantised, fake_quantised, packed, sizes, targets
from forgekit.store.artifact import MANIFEST, Artifact, ArtifactExtras, amend_evidence
from forgekit.store.fsio import sha256_file
from forgekit.train.distributed import agreed

PACKED, DENSE = "ternary", "ternary_dense"
RECOVERY, CONTROL = "ternary", "same bytes"
OPTIMIZER_SLOTS = 3


@dataclass
class Parent:
    """The model that is made small.

    Attributes:
        model_id: its id.
        name: its name.
        model: in float32; its values are never changed.
        tokenizer: its tokenizer.
        speciality: what it practised.
        thinks: whether it may think before it answers.
        print: changes with its content.
    """

    model_id: str
    name: str
    model: nn.Module
    tokenizer: Any
    speciality: tuple[GymMix, ...]
    thinks: bool
    print: str


@dataclass
class Made:
    """What the phase made, and what it decided by.

    Attributes:
        plan: the grid, with the threshold that calibration chose.
        size: bytes of the packed file.
        parent: the parent on the select split.
        thinks: families and levels that it thinks about.
        needed: whether rounding alone costs more answers or more text than the settings allow.
        select: right answers there, by name.
        latent: the trained weights, which round to the ternary ones; None where rounding alone was enough.
        small: a full-precision model of the same bytes; None where there is none.
        records: of the trainings, by name.
        facts: of the calibration, for the metrics.
    """

    plan: TernaryPlan
    size: int
    parent: Reading
    thinks: frozenset[Cell]
    needed: bool
    select: dict[str, float]
    latent: nn.Module | None = None
    small: nn.Module | None = None
    records: dict[str, dict[str, Any]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def chosen(self) -> str:
        """The ternary model with more right answers on the select split; a tie goes to the trained one."""
        trained = self.select.get(TERNARY)
        return UNTRAINED if trained is None or trained < self.select[UNTRAINED] else TERNARY


class BitNetPhase(PhaseController):
    """Makes ``ternary`` and ``ternary_dense``, which the curriculum trains on."""

    name = "bitnet"
    config: BitNetConfig

    def validate_input(self, models: list[str]) -> None:
        """Refuse what cannot be made ternary.

        Raises:
            ConfigError: not exactly one model, or nobody knows what it can do.
            ArtifactError: it has no linear maps, or is packed already.
        """
        if self.config.train.parallel == "fsdp":
            where = "phases.bitnet.train.parallel"
            raise ConfigError("phase 4 rounds whole matrices while it trains", where=where, remedy="use replicate")
        self._open(models)

    def run(self, models: list[str]) -> PhaseResult:
        """Round, train, measure, save. See :meth:`PhaseController.run`."""
        began = time.perf_counter()
        parent = self._open(models)
        data = self._prepare(parent)
        made, mixture = self._round(parent, data)
        inputs = (parent.print, data.data_hash, made.plan.fingerprint(), str(sorted(made.thinks)))
        workshop = Workshop(self.context, self.key("training", *inputs))
        self._train(parent, data, (made, mixture), workshop)
        result = agreed(lambda: self._finish(parent, data, made, began))
        agreed(workshop.clear)
        return result

    # Before

    def _open(self, models: list[str]) -> Parent:
        if len(models) != 1:
            what, remedy = f"{len(models)} models given, it takes one", "give one model: --from MODEL"
            raise ConfigError(what, where="phase bitnet", remedy=remedy)
        folder = self.context.storage.resolve(models[0])
        model, tokenizer = read_model(folder)
        targets(model)
        opened = Artifact.open(folder, verify=False) if (folder / MANIFEST).is_file() else None
        metadata = opened.manifest.metadata if opened else {}
        mix = tuple(GymMix.build(part, f"{models[0]}: speciality") for part in metadata.get("speciality", []))
        if not (mix or self.config.skills):
            remedy = 'name it: --set phases.bitnet.skills=[{family="sort"}]'
            raise ConfigError("nobody knows what the model can do", where="phases.bitnet.skills", remedy=remedy)
        return Parent(
            model_id=opened.manifest.model_id if opened else str(models[0]),
            name=Path(folder).name,
            model=model.float(),
            tokenizer=tokenizer,
            speciality=mix,
            thinks=bool(metadata.get("thinks")),
            print=opened.content_hash if opened else " ".join(map(sha256_file, sorted(folder.glob("*.safetensors")))),
        )

    def _prepare(self, parent: Parent) -> BitNetData:
        config, context = self.config, self.context
        kept = config.train.keep_checkpoints
        require_free(context.folder, disk_forecast(parameter_count(parent.model), 3, kept, OPTIMIZER_SLOTS), "phase 4")
        context.show(Progress("data", 0, 1, "text, questions"))
        first = TextPlan.build(context.profile.phases.get("cognate", {}).get("text", {}), "phases.cognate.text")
        data = prepare(config, parent.tokenizer, parent.speciality, first, context.data)
        for note in data.notes:
            context.logger.event("data", note=note)
        context.show(Progress("data", 1, 1, f"{len(data.report):,} questions to report on"))
        return data

    def _asked(self, parent: Parent, data: BitNetData, split: str) -> Asked:
        problems = data.select if split == "select" else data.report
        return Asked(problems, data.windows[split], parent.thinks, self.config.evaluation.thinking_budget)

    def _round(self, parent: Parent, data: BitNetData) -> tuple[Made, Mixture]:
        """Calibrate, choose the grid, and see what rounding alone does; the training data come with it."""
        config, select = self.config, self._asked(parent, data, "select")
        self.context.show(Progress("rounding", 0, 1, "calibration"))
        before = agreed(lambda: select.of(parent.model, parent.tokenizer))
        thinks = thought_about(data.select, before.thought)
        mixture = practice(config, data, thinks)
        began = time.perf_counter()
        rows = calibration_rows(config, mixture)
        statistics = calibrate(parent.model, rows)
        plan, errors = chosen_threshold(parent.model, config.ternary, statistics, config.calibration.thresholds)
        facts = {
            "samples": sum(len(batch.inputs) for batch in rows),
            "calibration_seconds": time.perf_counter() - began,
            "threshold": plan.threshold,
        }
        unknown = sorted(set(targets(parent.model)) - set(statistics))
        self.context.logger.event("calibrated", errors=errors, **facts, never_reached=unknown)
        model = packed(parent.model, plan, config.groups)
        after = agreed(lambda: select.of(model, parent.tokenizer))
        size = packed_bytes(model)
        lost = f"{100 * before.accuracy:.1f} % right before, {100 * after.accuracy:.1f} % after"
        told = sorted(f"{family}/{level}" for family, level in thinks)
        self.context.logger.event("rounded", note=lost, bytes=size, thinks_about=told, too_long=too_long(mixture))
        self.context.show(Progress("rounding", 1, 1, lost))
        right = {PARENT: before.accuracy, UNTRAINED: after.accuracy}
        forgot = after.accuracy < (1 - config.finetune_above) * before.accuracy
        needed = forgot or after.perplexity > (1 + config.most_perplexity) * before.perplexity
        return Made(plan, size, before, thinks, needed, right, facts=facts), mixture

    # The trainings

    def _train(self, parent: Parent, data: BitNetData, given: tuple[Made, Mixture], workshop: Workshop) -> None:
        """Train on the grid where rounding cost too much, and a model of the same bytes beside it."""
        config, (made, mixture) = self.config, given
        pieces = []
        if made.needed:
            latent = copy.deepcopy(parent.model).requires_grad_(True)
            made.latent = fake_quantised(latent, made.plan, config.groups)
            pieces.append(self._piece(RECOVERY, made.latent, parent, mixture))
        if config.baselines.same_bytes:
            made.small = narrow(parent.model.config, made.size, config.train.seed)
            if made.small is None:
                self.context.logger.event("no_control", note=f"no full-precision shape takes {made.size:,} bytes")
            else:
                pieces.append(self._piece(CONTROL, made.small, parent, mixture))
        if pieces:
            made.records = workshop.train_all(pieces, self.context.profile.side_by_side)
        if made.latent is not None:
            model = packed(made.latent, made.plan, config.groups)
            select = self._asked(parent, data, "select")
            made.select[TERNARY] = agreed(lambda: select.of(model, parent.tokenizer)).accuracy

    def _piece(self, name: str, model: nn.Module, parent: Parent, mixture: Mixture) -> Piece:
        student = Student(model, parent.model, self.config.loss, self.config.train.steps)
        return Piece(name, student, mixture, self.config.train, STEP_PARTS if name == RECOVERY else {})

    # After

    def _finish(self, parent: Parent, data: BitNetData, made: Made, began: float) -> PhaseResult:
        """Measure, save, decide. Models are compared where they are."""
        self.context.show(Progress("evidence", 0, 1, "scoring the report split"))
        source = made.latent if made.chosen == TERNARY else parent.model
        ternary = packed(source, made.plan, self.config.groups)
        made.size = packed_bytes(ternary)
        finals = self._finals(parent, data, made, ternary)
        prompt = parent.tokenizer.encode_batch([asked(parent.tokenizer, data.select[0].prompt)])[0].ids
        speed = decoding_speed({PARENT: parent.model, TERNARY: ternary}, prompt, self.config.speed)
        evidence = measure(self.config, finals)
        found = values(finals, speed, self._facts(parent, made, (source, ternary)))
        saved = self._save(parent, data, made, (source, ternary, finals, found))
        for model_id in saved.values():
            amend_evidence(self.context.storage.resolve(model_id), [e.model_dump(mode="json") for e in evidence])
        self.context.show(Progress("evidence", 1, 1, f"{len(evidence)} claims measured"))
        decision = decide(self.config, self.context.profile.gate, evidence, finals)
        seconds = time.perf_counter() - began
        found |= {"phase/duration_seconds": seconds, "phase/success": True}
        told = emit_phase(self.context, found, (parent.model_id, saved[DENSE]))
        return PhaseResult(
            success=True,
            model=saved[DENSE],
            phase_name=self.name,
            metrics=told | self._tables(made, finals, speed),
            artifacts={
                "all_models": [saved[DENSE]],
                "model_names": [DENSE],
                "parent": parent.model_id,
                "packed": saved[PACKED],
                "dense": saved[DENSE],
                "on_grid": True,
                "chosen": made.chosen,
                "gate": decision.model_dump(),
                "conversation": self._conversation(parent, data, ternary),
            },
            duration_seconds=seconds,
            config=self.config.model_dump(mode="json"),
            evidence=evidence,
        )

    def _finals(self, parent: Parent, data: BitNetData, made: Made, ternary: nn.Module) -> Finals:
        """Every model on the report split, and its bytes."""
        config, plans = self.config, self.config.baselines
        report, readings, size = self._asked(parent, data, "report"), {}, {}

        def read(name: str, model: nn.Module, taken: int) -> None:
            self.context.show(Progress("evidence", len(readings), 6, name))
            readings[name], size[name] = report.of(model, parent.tokenizer), taken

        read(PARENT, parent.model, bytes_float32(parent.model))
        read(TERNARY, ternary, made.size)
        if made.chosen == TERNARY:
            read(UNTRAINED, packed(parent.model, made.plan, config.groups), made.size)
        else:
            readings[UNTRAINED], size[UNTRAINED] = readings[TERNARY], made.size
        for name, plan in ((INT8, plans.int8), (INT4, plans.int4)):
            if plan is not None:
                read(name, *rounded(parent.model, plan, config.groups))
        if made.small is not None:
            read(SAME_BYTES, made.small, size_of(made.small))
        strong = mastered(data.select, made.parent.right, config.strong)
        compute = {f"{name.replace(' ', '_')}_tokens": float(row["tokens"]) for name, row in made.records.items()}
        compute |= {f"{name.replace(',', '').replace(' ', '_')}_bytes": float(taken) for name, taken in size.items()}
        return Finals(data.report, data.mix, readings, size, strong, made.chosen == TERNARY, compute)

    def _conversation(self, parent: Parent, data: BitNetData, ternary: nn.Module) -> list[dict[str, Any]]:
        """A question of each of the first families and what the packed model says to it."""
        first = list({problem.family: problem for problem in data.report}.values())[:5]
        talk = Asked(first, data.windows["report"], parent.thinks, self.config.evaluation.thinking_budget)
        return [
            {
                "model": PACKED,
                "asked": first[i].prompt,
                "thought": one.thought,
                "answered": one.text,
                "expected": first[i].answer,
                "right": is_right(one, first[i]),
            }
            for i, one in sorted(talk.answers(ternary, parent.tokenizer), key=lambda pair: pair[0])
        ]

    def _facts(self, parent: Parent, made: Made, sides: tuple[nn.Module, nn.Module]) -> dict[str, Any]:
        source, ternary = sides
        compressed = len(targets(parent.model))
        maps = sum(isinstance(m, nn.Linear | nn.Embedding) or is_conv1d(m) for m in parent.model.modules())
        return made.facts | {
            "held": {PARENT: sizes(parent.model)["total"], TERNARY: sizes(ternary)["total"]},
            "layers": (compressed, maps - compressed),
            "sparsity": zero_share(ternary),
            "distance": grid_distance(source, made.plan),
        }

    def _tables(self, made: Made, finals: Finals, speed: Speed) -> dict[str, Any]:
        rates = {name: {"tokens_per_second": speed.rate(name), "blocks": row} for name, row in speed.rates.items()}
        return {
            "models": models(finals),
            "levels": levels(finals),
            "speed": rates,
            "select": made.select,
            "losses": {name: row["losses"] for name, row in made.records.items()},
            "recovery": {"skills": finals.recovery, "perplexity": finals.perplexity_recovery},
        }

    def _save(self, parent: Parent, data: BitNetData, made: Made, found: tuple) -> dict[str, str]:
        """Both artifacts, by name; one that an earlier start saved is taken as it is."""
        source, ternary, finals, values = found
        saved: dict[str, str] = {}
        for name in (PACKED, DENSE):
            key = self.key(name, parent.print, data.data_hash)
            done = self._saved(key)
            if done is None:
                model = ternary if name == PACKED else dequantised(source, made.plan, self.config.groups)
                if name == DENSE and self.config.dense == "float16" and not hasattr(model, "hf"):
                    model = model.half()
                metadata = self._metadata(parent, data, made, (name, key, values))
                metadata |= {"packed_model": saved[PACKED]} if name == DENSE else {}
                extras = self._extras(parent, made, (name, finals, values))
                done = self.context.storage.save_model(
                    model, self.context.session_id, self.name, name, metadata, tokenizer=data.tokenizer, extras=extras
                )
            saved[name] = done
        return saved

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
            "tags": ["bitnet", "packed" if name == PACKED else "dense"],
            "speciality": [part.model_dump(mode="json") for part in data.mix],
            "thinks": parent.thinks,
            "on_grid": True,
            "weight_grid": "ternary",
            "packed": name == PACKED,
            "grid": made.plan.model_dump(mode="json"),
            "groups": self.config.groups and self.config.groups.model_dump(mode="json"),
            "compression_ratio": found["compression/compression_ratio"],
            "compressed_size_mb": found["compression/compressed_size_mb"],
            "accuracy_retention": found["quality/accuracy_retention"],
            "accuracy": found["quality/post_accuracy"],
            "metrics": numbers,
        }

    def _extras(self, parent: Parent, made: Made, given: tuple[str, Finals, dict[str, Any]]) -> ArtifactExtras:
        name, finals, found = given
        plan = made.plan
        grid = (
            f"A weight is zero where its magnitude is at most {plan.threshold:g} times the {plan.scale} of its "
            f"{'row' if plan.per == 'channel' else 'matrix'}; "
            f"{'trained on the grid' if made.chosen == TERNARY else 'rounded, not trained'}."
        )
        facts = {
            "packed": name == PACKED,
            "other": f"`{DENSE if name == PACKED else PACKED}`",
            "grid": grid,
            "speedup": found["performance/inference_speedup"],
            "sparsity": found["compression/sparsity_ratio"],
        }
        readme = card(name, f"{parent.name} ({parent.model_id})", models(finals), facts)
        metrics = {n: v for n, v in found.items() if isinstance(v, int | float)}
        return ArtifactExtras(metrics=metrics, readme=readme)
