"""Phase 1, Cognate: one trunk from nothing, then three specialists from the trunk.

Merging needs siblings (DESIGN 7 (1)): the trunk is trained once and branched, so that phase 2 can merge what the
specialists learned, with the trunk as the common ancestor.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from agent_forge.phases.cognate.ablation import Bench, ablations
from agent_forge.phases.cognate.card import card
from agent_forge.phases.cognate.config import CognateConfig, SpecialistPlan
from agent_forge.phases.cognate.data import CognateData, prepare, specialist_mixture, trunk_mixture
from agent_forge.phases.cognate.evidence import Subject, gate, measure
from agent_forge.pipeline.conversation import converse
from agent_forge.pipeline.phase import PhaseController, PhaseResult, Progress
from forgekit.compute.disk import forecast as disk_forecast
from forgekit.compute.disk import require_free
from forgekit.data.texts import SHARES, SPLIT_SEED
from forgekit.measure.evidence import Evidence
from forgekit.models.io import build_model, load_weights
from forgekit.store import fsio
from forgekit.store.artifact import SPECIALIZATIONS, ArtifactExtras, amend_evidence
from forgekit.train.beside import SideBySide, Training
from forgekit.train.config import TrainConfig
from forgekit.train.distributed import agreed, gathered, world
from forgekit.train.loop import StepInfo
from forgekit.train.setup import check_rows, training_device

OPTIMIZER_SLOTS = 3
"""Values per parameter that MuonGrokfast keeps at most."""


@dataclass
class Made:
    """A trained model of this run."""

    model_id: str
    model: torch.nn.Module
    losses: list[float]


@dataclass
class Draft:
    """A model to be trained.

    Attributes:
        name: of the model; number: of the specialist from 1, 0 for the trunk.
        training: its weights to begin with, its data, how.
        parents: ids of what it was branched from.
        key: under which it is found when it is finished.
    """

    name: str
    number: int
    training: Training
    parents: list[str]
    key: str


class CognatePhase(PhaseController):
    """Makes ``trunk`` and the specialists; its models hand over to EvoMerge."""

    name = "cognate"
    config: CognateConfig

    def validate_input(self, models: list[str]) -> None:
        """Phase 1 starts from nothing: any input is fine because none is used."""

    def run(self, models: list[str]) -> PhaseResult:
        """Train, measure, save. See :meth:`PhaseController.run`."""
        began = time.perf_counter()
        context, config = self.context, self.config
        shape = context.profile.model_config_solved()
        trainings = [config.trunk, *map(config.training_of, config.specialists)]
        for train in trainings:  # now, not after hours of the first one
            check_rows(train.rows, train.parallel == "fsdp", world()[1])
        data = self._prepare(shape)
        trunk = self._trunk(shape, data)
        made = self._specialists(trunk, data)
        context.show(Progress("evidence", 0, 1, "scoring the report split"))
        subjects = [Subject(plan, one.model, one.model_id) for plan, one in zip(config.specialists, made)]
        torch.manual_seed(config.trunk.seed)
        blank = build_model(shape).to(next(trunk.model.parameters()).device)
        evidence, tables = agreed(lambda: measure(config, blank, trunk.model, subjects, data))
        if config.ablate:
            evidence += self._ablations(trunk, subjects, data)
        context.show(Progress("evidence", 1, 1, f"{len(evidence)} claims measured"))
        agreed(lambda: self._keep_evidence(evidence, [trunk, *made]))
        decision = gate(config, context.profile.gate).decide(evidence)
        seconds = time.perf_counter() - began  # of this start; an interrupted one's time is in the events
        return PhaseResult(
            success=True,
            model=trunk.model_id,
            phase_name=self.name,
            metrics=self._metrics(made, seconds) | tables,
            artifacts={
                "trunk": trunk.model_id,
                "all_models": [m.model_id for m in made],
                "model_names": [p.name for p in config.specialists],
                "seeds": [p.seed for p in config.specialists],
                "data": data.provenance,
                "gate": decision.model_dump(),
                "conversation": agreed(lambda: self._conversation(made, data)),
            },
            duration_seconds=seconds,
            config=config.model_dump(mode="json"),
            evidence=evidence,
        )

    def _ablations(self, trunk: Made, subjects: list[Subject], data: CognateData) -> list[Evidence]:
        """The comparisons that need trainings of their own, each with its checkpoints."""
        key = self.key("ablations", data.data_hash, trunk.model_id)
        folder = self._checkpoints("ablations", key)
        found = ablations(Bench(self.config, data, trunk.model, subjects, self.context.show, folder))
        agreed(lambda: folder.is_dir() and fsio.remove_tree(folder))
        return found

    def _conversation(self, made: list[Made], data: CognateData) -> list[dict[str, Any]]:
        """Each specialist on its speciality, and on one of the trunk's skills."""
        skill = self.config.trunk_mix[-1]
        return [
            line
            for plan, one in zip(self.config.specialists, made)
            for line in converse(plan.name, one.model, data.tokenizer, (*plan.mix[:2], skill))
        ]

    def _keep_evidence(self, evidence: list[Evidence], made: list[Made]) -> None:
        """Put into every artifact the claims of the phase that made it."""
        records = [e.model_dump(mode="json") for e in evidence]
        for one in made:
            amend_evidence(self.context.storage.resolve(one.model_id), records)

    def _prepare(self, shape) -> CognateData:
        """Disk first, then text, problems and tokenizer."""
        context, config = self.context, self.config
        models = len(config.specialists) + 1
        kept = max(t.keep_checkpoints for t in (config.trunk, *map(config.training_of, config.specialists)))
        at_once = len(config.specialists) if context.profile.side_by_side else 1
        needed = disk_forecast(shape.parameters(), models, (kept + 1) * at_once - 1, OPTIMIZER_SLOTS)
        require_free(context.folder, needed, "phase 1")
        context.logger.metrics(
            {
                "config/num_models": len(config.specialists),
                "config/hidden_size": shape.d_model,
                "config/num_layers": shape.n_layers,
                "config/parameters_target": context.profile.model.target_parameters,
            }
        )
        context.show(Progress("data", 0, 1, "text, problems, tokenizer"))
        data = prepare(config, shape.vocab_size, context.data)
        for note in data.notes:
            context.logger.event("data", note=note)
        counts = f"{len(data.train_texts):,} documents, {len(data.trunk_problems):,} problems"
        context.show(Progress("data", 1, 1, counts))
        return data

    def _trunk(self, shape, data: CognateData) -> Made:
        torch.manual_seed(self.config.trunk.seed)
        model = build_model(shape)
        train = self.config.trunk
        return self._make(self._draft("trunk", 0, (model, trunk_mixture(data, self.config), train), data, []), data)

    def _specialists(self, trunk: Made, data: CognateData) -> list[Made]:
        """All branches of the trunk; they do not depend on each other."""
        config = self.config
        drafts = [self._branch(plan, number, trunk, data) for number, plan in enumerate(config.specialists, 1)]
        devices = [draft.training.config.device for draft in drafts]
        with SideBySide(devices, self.context.profile.side_by_side) as crew:
            for draft in drafts:
                draft.training = crew.ready(draft.training)
            for draft in drafts[1:]:
                if agreed(partial(self._finished, draft.key)) is None:
                    crew.start(draft.name, draft.training, self.context.logger, self._observer(draft))
            return [self._make(draft, data, crew) for draft in drafts]

    def _branch(self, plan: SpecialistPlan, number: int, trunk: Made, data: CognateData) -> Draft:
        """Branch the trunk: same weights, the specialist's own traits, then its own data."""
        traits = {k: v for k, v in plan.traits().items() if k in type(trunk.model.config).model_fields}
        torch.manual_seed(plan.seed)
        model = build_model(trunk.model.config.replace(**traits))
        model.load_state_dict(trunk.model.state_dict())
        train = self.config.training_of(plan)
        mixture = specialist_mixture(data, self.config, plan, train)
        return self._draft(plan.name, number, (model, mixture, train), data, [trunk.model_id])

    def _draft(self, name: str, number: int, what: tuple, data: CognateData, parents: list[str]) -> Draft:
        key = self.key(name, data.data_hash, *parents)
        return Draft(name, number, Training(*what, self._checkpoints(name, key)), parents, key)

    def _make(self, draft: Draft, data: CognateData, crew: SideBySide | None = None) -> Made:
        """Train one model and save it; a finished one of this session is taken as it is."""
        context, name, training = self.context, draft.name, draft.training
        model, train = training.model, training.config
        row = agreed(lambda: self._finished(draft.key))
        if row is not None:
            load_weights(model, context.storage.resolve(row["model_id"]) / "model.safetensors")
            context.show(Progress(name, train.steps, train.steps, "already made"))
            model = model.to(training_device(train.device)).eval()
            return Made(row["model_id"], model, row["metadata"]["losses"])
        if crew is not None and (code := crew.wait(name)):
            context.logger.event("train_beside_ended", name=name, exit_code=code)
        trainer = training.trainer(context.logger, self._observer(draft, crew))
        report = trainer.run()
        trained_here = report.resumed_from < train.steps
        share = report.data_seconds / max(report.seconds, 1e-9) if trained_here else None
        context.logger.event("trained", name=name, tokens=report.tokens, data_share=share, losses=report.losses)
        if draft.number:
            context.logger.epoch(1, {f"model_{draft.number}/epoch/loss": statistics.fmean(report.losses)})
        lineage = {"parents": draft.parents, "config_hash": draft.key, "data_hash": data.data_hash}
        model = gathered(model, lambda: build_model(model.config))

        def keep() -> str:
            model_id = self._save(name, model, train, report.losses, lineage, data)
            trainer.checkpoints.clear()
            return model_id

        return Made(agreed(keep), model, report.losses)

    def _finished(self, key: str) -> dict[str, Any] | None:
        """The row of a model that an earlier start of this session finished."""
        rows = self.context.storage.registry.search_models(phase=self.name, session_id=self.context.session_id)
        return next((r for r in rows if r["metadata"].get("config_hash") == key), None)

    def _checkpoints(self, name: str, key: str) -> Path:
        """Named after everything that decides the result: other data or settings never resume from these."""
        return self.context.folder / "checkpoints" / f"{name}-{key[:12]}"

    def _save(self, name: str, model, train: TrainConfig, losses: list[float], lineage: dict, data: CognateData) -> str:
        final = statistics.fmean(losses[-20:])
        own = next((plan.mix for plan in self.config.specialists if plan.name == name), self.config.trunk_mix)
        metadata = {
            **lineage,
            "seeds": [train.seed],
            "seed": train.seed,
            "specialization": name if name in SPECIALIZATIONS else None,
            "tags": ["cognate", name],
            "text_split": {"seed": SPLIT_SEED, "shares": SHARES},
            "speciality": [part.model_dump(mode="json") for part in own],
            "final_loss": final,
            "losses": losses,
            "metrics": {"final_loss": final, "tokens": train.steps * train.rows * train.seq_len},
        }
        extras = ArtifactExtras(metrics=metadata["metrics"], readme=card(name, model.config, train, metadata, data))
        return self.context.storage.save_model(
            model, self.context.session_id, self.name, name, metadata, tokenizer=data.tokenizer, extras=extras
        )

    def _observer(self, draft: Draft, crew: SideBySide | None = None):
        """Progress for people at every step, metrics for the log every few."""
        name, number, train = draft.name, draft.number, draft.training.config

        def observe(info: StepInfo) -> None:
            note = (
                f"loss {info.loss_avg_100:.3f}  {info.tokens_per_second:,.0f} tokens/s  {info.seconds_left:.0f} s left"
            )
            self.context.show(Progress(name, info.step, info.steps, note))
            if crew is not None:
                crew.listen()
            if info.step % train.log_every and info.step != info.steps:
                return
            values: dict[str, Any] = {
                "train/loss": info.loss,
                "train/loss_avg_100": info.loss_avg_100,
                "train/learning_rate": info.learning_rate,
                "train/tokens_per_second": info.tokens_per_second,
                "train/grad_norm": info.grad_norm,
            }
            values["act/mean_steps"] = info.parts.get("act/mean_steps", 0.0)  # a model that does not recurse takes none
            values |= {k: v for k, v in info.parts.items() if k == "gate/entropy"}
            if number:
                self.context.logger.metrics({f"model_{number}/{k}": v for k, v in values.items()}, step=info.step)
            else:
                self.context.logger.event("trunk_metrics", step=info.step, **values)

        return observe

    def _metrics(self, made: list[Made], seconds: float) -> dict[str, Any]:
        """The metrics the sources list for phase 1, emitted under their names."""
        finals = [statistics.fmean(m.losses[-20:]) for m in made]
        folders = [self.context.storage.resolve(m.model_id) for m in made]
        sizes = [(folder / "model.safetensors").stat().st_size / 2**20 for folder in folders]
        counts = [sum(p.numel() for p in m.model.parameters()) for m in made]
        for number, (size, count) in enumerate(zip(sizes, counts), 1):
            self.context.logger.metrics({f"model_{number}/size_mb": size, f"model_{number}/parameters": count})
        values = {
            "phase/num_models_created": len(made),
            "phase/total_parameters": sum(counts),
            "phase/avg_final_loss": statistics.fmean(finals),
            "phase/min_final_loss": min(finals),
            "phase/max_final_loss": max(finals),
            "phase/total_size_mb": sum(sizes),
            "phase/duration_seconds": seconds,
            "phase/success": True,
        }
        self.context.logger.metrics(values)
        return values
