"""Phase 3, thinking: written thoughts are learned first, then the model keeps those of its own that help.

Step 1 is supervised training on verified traces. Step 2 is Quiet-STaR (arXiv 2403.09629). Which of the two is handed on
is decided on the select split; everything claimed is measured on the report split, which chose nothing, against
shuffled thoughts, filler tokens and a model that learned the same questions without thoughts at equal compute.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from agent_forge.phases.quietstar.card import card
from agent_forge.phases.quietstar.config import QuietStarConfig
from agent_forge.phases.quietstar.data import QuietData, prepare, talking, teaching, validation_batch
from agent_forge.phases.quietstar.evidence import Finals, controls, decide, levels, measure, theater_table
from agent_forge.phases.quietstar.metrics import emit_phase, emit_steps, emit_watched
from agent_forge.phases.quietstar.talk import QuietTalker, mixer_files, ordinary_flops, quiet_nats
from agent_forge.phases.quietstar.talk_config import Marks, marks_of
from agent_forge.phases.quietstar.training import Piece, Workshop
from agent_forge.phases.quietstar.watching import (
    Watched,
    answers,
    by_kind,
    examples,
    scorer_of,
    slips_noticed,
    valid_share,
    watch,
    watch_told,
)
from agent_forge.pipeline.phase import PhaseController, PhaseResult, Progress
from forgekit.compute.disk import forecast as disk_forecast
from forgekit.compute.disk import require_free
from forgekit.data.batches import Mixture, asked
from forgekit.data.plans import GymMix, TextPlan
from forgekit.data.problems import held_out
from forgekit.data.thoughts import OPEN
from forgekit.errors import ArtifactError, ConfigError
from forgekit.measure.problems import by_level
from forgekit.measure.scores import score_problems, score_windows
from forgekit.measure.theater import anti_theater
from forgekit.models.io import build_model, read_model
from forgekit.models.thinking_tokens import has_chat_format, prepare_thinking
from forgekit.store.artifact import MANIFEST, Artifact, ArtifactExtras, amend_evidence
from forgekit.store.fsio import sha256_file
from forgekit.train.config import TrainConfig
from forgekit.train.distributed import agreed, world
from forgekit.train.setup import choose_plan, training_device

THINKER = "thinker"
STEP_ONE, STEP_TWO = "step 1", "step 2"
OPTIMIZER_SLOTS = 3
ASKED_OF = 10
"""Every tenth question of the report is also asked in every strategy by name."""


@dataclass
class Parent:
    """The model that learns to think.

    Attributes:
        model_id: its id.
        name: its name.
        model: as it was handed over, never changed.
        fresh: a copy whose thinking tokens are ready to be learned.
        tokenizer: with the thinking tokens.
        speciality: what it practised.
        print: changes with its content.
        notes: sentences for people.
    """

    model_id: str
    name: str
    model: torch.nn.Module
    fresh: torch.nn.Module
    tokenizer: Any
    speciality: tuple[GymMix, ...]
    print: str
    notes: tuple[str, ...]


@dataclass
class Steps:
    """What was trained.

    Attributes:
        one: after step 1; ``plain``: the same questions without thoughts.
        talker: after step 2; ``continued``: step 1 trained on at the same compute; None without step 2.
        records: of every training.
        equal: compute of step 2 and of what was continued, in FLOPs.
        valid: share of held-out thoughts after step 1 that are sound.
        choice: which step is handed on, and why.
    """

    one: torch.nn.Module
    plain: torch.nn.Module
    talker: QuietTalker | None
    continued: torch.nn.Module | None
    records: dict[str, dict[str, Any]]
    equal: tuple[float, float]
    valid: float
    choice: dict[str, Any]


class QuietStarPhase(PhaseController):
    """Makes ``thinker``, which BitNet makes small."""

    name = "quietstar"
    config: QuietStarConfig

    def validate_input(self, models: list[str]) -> None:
        """Refuse what cannot learn to think.

        Raises:
            ConfigError: not exactly one model, or nobody knows what it can do.
            ArtifactError: its thinking tokens mean something else.
        """
        for name in ("teach", "quiet"):
            if getattr(self.config, name).train.parallel == "fsdp":
                where = f"phases.quietstar.{name}.train.parallel"
                raise ConfigError("phase 3 looks at whole models while it trains", where=where, remedy="use replicate")
        self._open(models)

    def run(self, models: list[str]) -> PhaseResult:
        """Train, choose, measure, save. See :meth:`PhaseController.run`."""
        began = time.perf_counter()
        parent = self._open(models)
        data = self._prepare(parent)
        workshop = Workshop(self.context, self.key("training", parent.print, data.data_hash))
        steps = self._train(parent, data, workshop)
        result = agreed(lambda: self._finish(parent, data, steps, began))
        agreed(workshop.clear)
        return result

    # Before

    def _open(self, models: list[str]) -> Parent:
        if len(models) != 1:
            what, remedy = f"{len(models)} models given, it takes one", "give one model: --from MODEL"
            raise ConfigError(what, where="phase quietstar", remedy=remedy)
        folder = self.context.storage.resolve(models[0])
        model, tokenizer = read_model(folder)
        fresh = with_window(model, self.config.window)
        tokens = prepare_thinking(fresh, tokenizer, self.config.seed)
        if asked(tokenizer, "?").rstrip().endswith(OPEN):
            remedy = "give a chat template that leaves it to the model"
            raise ArtifactError(f"its chat template opens {OPEN} itself", where="tokenizer", remedy=remedy)
        notes = list(tokens.notes)
        if not has_chat_format(tokenizer):
            notes.append("the model has no chat format: questions are plain text")
        opened = Artifact.open(folder, verify=False) if (folder / MANIFEST).is_file() else None
        practised = opened.manifest.metadata.get("speciality", []) if opened else []
        mix = tuple(GymMix.build(part, f"{models[0]}: speciality") for part in practised)
        if not (mix or self.config.skills):
            remedy = 'name it: --set phases.quietstar.skills=[{family="sort"}]'
            raise ConfigError("nobody knows what the model can do", where="phases.quietstar.skills", remedy=remedy)
        return Parent(
            model_id=opened.manifest.model_id if opened else str(models[0]),
            name=Path(folder).name,
            model=model,
            fresh=fresh,
            tokenizer=tokenizer,
            speciality=mix,
            print=opened.content_hash if opened else " ".join(map(sha256_file, sorted(folder.glob("*.safetensors")))),
            notes=tuple(notes),
        )

    def _prepare(self, parent: Parent) -> QuietData:
        config, context = self.config, self.context
        parameters = sum(p.numel() for p in parent.model.parameters())
        kept = max(train.keep_checkpoints for train in (config.teach.train, config.quiet.train))
        checkpoints = (kept + 1) * (2 if context.profile.side_by_side else 1) - 1  # of trainings at the same time
        require_free(context.folder, disk_forecast(parameters, 5, checkpoints, OPTIMIZER_SLOTS), "phase 3")
        context.show(Progress("data", 0, 1, "text, traces, questions"))
        first = TextPlan.build(context.profile.phases.get("cognate", {}).get("text", {}), "phases.cognate.text")
        data = prepare(config, parent.tokenizer, parent.speciality, first, context.data)
        for note in (*parent.notes, *data.notes):
            context.logger.event("data", note=note)
        counts = f"{len(data.book.traces):,} traces, {len(data.report):,} questions to report on"
        context.show(Progress("data", 1, 1, counts))
        return data

    # The trainings

    def _train(self, parent: Parent, data: QuietData, workshop: Workshop) -> Steps:
        config, train = self.config, self.config.teach.train
        one, plain = parent.fresh, copy.deepcopy(parent.fresh)
        pieces = [
            Piece(name, model, teaching(config, data, thinks), train)
            for name, model, thinks in ((STEP_ONE, one, True), ("no thoughts", plain, False))
        ]
        records = workshop.train_all(pieces, self.context.profile.side_by_side)
        valid = agreed(lambda: valid_share(one, data.tokenizer, data.select, config))
        self.context.logger.event("step_1", held_out_valid=valid, converged=valid >= config.teach.converged)
        if not config.quiet.run:
            why = {"chosen": STEP_ONE, "why": "step 2 is switched off"}
            return Steps(one, plain, None, None, records, (0.0, 0.0), valid, why)
        talker, spent = self._quiet(one, data, workshop, records)
        choice = agreed(lambda: self._choose(data, one, talker))
        further = plain if choice["chosen"] == STEP_TWO else None
        continued, equal = self._equalled(one, further, spent, data, (workshop, records))
        return Steps(one, plain, talker, continued, records, equal, valid, choice)

    def _quiet(self, one, data: QuietData, workshop: Workshop, records: dict[str, dict[str, Any]]):
        """Step 2, and the FLOPs it took."""
        config, train = self.config, self.config.quiet.train
        marks: Marks = marks_of(data.tokenizer)
        torch.manual_seed(train.seed)
        talker = QuietTalker(
            copy.deepcopy(one), marks, config.quiet.talk, copy.deepcopy(one), train.optimizer.kl_coefficient
        )
        if not train.micro_batch:  # a row holds its branches as well, which the training loop does not know
            longest = train.replace(seq_len=config.quiet.talk.tokens_per_row(train.seq_len))
            plan = choose_plan(talker.model, longest, training_device(train.device), share=world()[1])
            train = train.replace(micro_batch=plan.micro_batch)
        questions = held_out(config.traces.mix, config.quiet.watched, "select")
        agreed(lambda: self._look(0, one, data, questions))
        at = {round(train.steps * number / config.quiet.validations): number for number in
              range(1, config.quiet.validations + 1)}  # fmt: skip

        def look(step: int) -> dict[str, Any]:
            return {"watched": self._look(at[step], talker.model, data, questions)}

        step_two = Piece(STEP_TWO, talker, talking(config, data), train)
        records[STEP_TWO] = workshop.train(step_two, (frozenset(at), look))
        agreed(lambda: emit_steps(self.context.logger, records[STEP_TWO]["history"]))
        # Every process counts its own rows; the first one's count, taken for all, survives a restart.
        return talker, agreed(lambda: talker.spent_flops) * world()[1]

    def _equalled(self, one, plain, spent: float, data: QuietData, work: tuple[Workshop, dict[str, dict[str, Any]]]):
        """Step 1 trained on in the ordinary way with the compute of step 2; where step 2 is handed on, so is its
        control without thoughts: what is handed on has had more compute."""
        config, (workshop, records) = self.config, work
        mixture, continued = talking(config, data), copy.deepcopy(one)
        each = step_flops(one, config.quiet.train, mixture)
        longer: TrainConfig = config.quiet.train.replace(steps=max(1, round(spent / each)))
        pieces = [Piece("continued", continued, mixture, longer)]
        if plain is not None:
            train, direct = config.teach.train, teaching(config, data, False)
            further = train.replace(steps=max(1, round(spent / step_flops(one, train, direct))))
            pieces.append(Piece("no thoughts, further", plain, direct, further))
        records.update(workshop.train_all(pieces, self.context.profile.side_by_side))
        return continued, (spent, longer.steps * each)

    def _look(self, number: int, model, data: QuietData, questions) -> dict[str, Any]:
        """Look at the model's thoughts and emit what is seen; nothing random, and the model stays as it was."""
        scorer = scorer_of(model, data.tokenizer, self.config, data.book.traces)
        return emit_watched(self.context.logger, number, watch(model, data.tokenizer, questions, self.config, scorer))

    # After

    def _finish(self, parent: Parent, data: QuietData, steps: Steps, began: float) -> PhaseResult:
        """Measure, save, decide. Models are compared where they are."""
        self.context.show(Progress("evidence", 0, 1, "scoring the report split"))
        choice = steps.choice
        chosen = choice["chosen"]
        model = steps.talker.model if chosen == STEP_TWO else steps.one
        finals, told = self._finals(parent, data, steps, model)
        evidence = measure(self.config, finals)
        tables = {
            "levels": levels(finals, THINKER),
            "controls": controls(finals.theater),
            "theater": theater_table(finals.theater),
            "thoughts": finals.watched.summary() | by_kind(finals.watched, told["asked"]),
            "steps": {"one": self._step_one(data, steps), "two": choice | self._step_two(steps, finals)},
        }
        values = self._values(data, steps, finals, told)
        model_id = self._save(parent, data, steps, (chosen, model), (tables, values))
        amend_evidence(self.context.storage.resolve(model_id), [e.model_dump(mode="json") for e in evidence])
        self.context.show(Progress("evidence", 1, 1, f"{len(evidence)} claims measured"))
        decision = decide(self.config, self.context.profile.gate, evidence, finals.theater)
        seconds = time.perf_counter() - began
        facts = {"theater": finals.theater, "watched": finals.watched.summary(), "model": model_id}
        facts |= {"parent": parent.model_id, "values": values | {"phase/duration_seconds": seconds}}
        shown = examples(finals.watched, told["asked"])
        return PhaseResult(
            success=True,
            model=model_id,
            phase_name=self.name,
            metrics=emit_phase(self.context, facts) | tables,
            artifacts={
                "all_models": [model_id],
                "model_names": [THINKER],
                "parent": parent.model_id,
                "chosen": chosen,
                "gate": decision.model_dump(),
                "examples": shown,
                "conversation": [{**row, "model": THINKER} for row in shown[:5]],
            },
            duration_seconds=seconds,
            config=self.config.model_dump(mode="json"),
            evidence=evidence,
        )

    def _choose(self, data: QuietData, one, talker: QuietTalker) -> dict[str, Any]:
        """The step with more right answers after thoughts on the select split; a tie goes to step 2."""
        found = {STEP_ONE: self._select(one, data), STEP_TWO: self._select(talker.model, data)}
        chosen = STEP_TWO if found[STEP_TWO] >= found[STEP_ONE] else STEP_ONE
        why = f"{100 * found[STEP_ONE]:.1f} % right after step 1, {100 * found[STEP_TWO]:.1f} % after step 2"
        return {"chosen": chosen, "why": f"{why} (select split, {len(data.select)} questions)", "select": found}

    def _select(self, model, data: QuietData) -> float:
        return float(answers(model, data.tokenizer, data.select, self.config.theater.thinking_budget)[0].mean())

    def _finals(self, parent: Parent, data: QuietData, steps: Steps, model) -> tuple[Finals, dict[str, Any]]:
        config, tokenizer, old = self.config, data.tokenizer, parent.model.to(next(model.parameters()).device)
        scorer = scorer_of(model, tokenizer, config, data.book.traces)
        baselines = {
            "no_thought": score_problems(steps.plain, tokenizer, data.report).right,
            "parent": score_problems(old, tokenizer, data.report).right,
        }
        theater = anti_theater(model, tokenizer, data.report, config.theater, baselines=baselines, scorer=scorer)
        asked = watch_told(model, tokenizer, data.report[::ASKED_OF], config, scorer)
        each = sum(w.seconds for w in asked.values()) / sum(len(w.thoughts) for w in asked.values())
        watched = Watched(data.report, theater.thoughts, theater.scored, each * len(data.report))
        budget = config.theater.thinking_budget
        by_itself, _ = answers(model, tokenizer, [*data.report, *data.skills], budget)
        known = by_level(data.select, score_problems(old, tokenizer, data.select).right)
        kept = np.stack([score_problems(old, tokenizer, data.skills).right, by_itself[len(data.report) :]])
        compute = {f"{name} tokens": float(record["tokens"]) for name, record in steps.records.items()}
        compute |= {"step 2 flops": steps.equal[0], "continued flops": steps.equal[1]}  # its thoughts are tokens too
        finals = Finals(
            theater=theater,
            watched=watched,
            below=frozenset(cell for cell, right in known.items() if right < config.below),
            skills=data.skills,
            kept=kept,
            skill_mix=data.skill_mix,
            text=(score_windows(old, data.windows), score_windows(model, data.windows)),
            slips=slips_noticed(model, tokenizer, config),
            quiet=self._nats(data, steps),
            steps=self._both(data, steps, model, by_itself[: len(data.report)]),
            compute={name.replace(", ", "_").replace(" ", "_"): value for name, value in compute.items()},
        )
        return finals, {"by_itself": by_itself, "asked": asked}

    def _nats(self, data: QuietData, steps: Steps) -> dict[str, np.ndarray] | None:
        """Validation nats per label, row by row, of the same held-out rows: with thoughts where step 2 thinks."""
        if steps.talker is None:
            return None
        batch = validation_batch(self.config, data, "report")
        device = next(steps.one.parameters()).device
        inputs, labels = (torch.from_numpy(part).to(device) for part in (batch.inputs, batch.labels))
        found = {}
        for name, talker in (("quiet", steps.talker), (STEP_ONE, self._plain(steps.one, steps)),
                             ("continued", self._plain(steps.continued, steps))):  # fmt: skip
            told = quiet_nats(talker, inputs, labels)
            rows = told.row_with_B if name == "quiet" else told.row_without_B
            found[name] = (rows / told.labels_B.clamp(min=1)).double().cpu().numpy()
        return found

    def _plain(self, model, steps: Steps) -> QuietTalker:
        """A model whose loss without thoughts is wanted, counted in the same way."""
        talker = QuietTalker(model, steps.talker.marks, self.config.quiet.talk)
        return talker.to(next(model.parameters()).device)

    def _both(self, data: QuietData, steps: Steps, model, known: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
        """Right answers after step 1 and after step 2; ``known`` are those of ``model``, one of the two."""
        if steps.talker is None:
            return None
        two, budget = steps.talker.model, self.config.theater.thinking_budget
        other = answers(steps.one if model is two else two, data.tokenizer, data.report, budget)[0]
        return (other, known) if model is two else (known, other)

    def _step_one(self, data: QuietData, steps: Steps) -> dict[str, Any]:
        return {
            "traces": len(data.book.traces),
            "duplicates": data.book.duplicates,
            "refused": sum(data.book.refused.values()),
            "written": data.book.table(),
            "held_out_valid": steps.valid,
            "converged": steps.valid >= self.config.teach.converged,
            "losses": _curve(steps.records[STEP_ONE], "loss"),
        }

    def _step_two(self, steps: Steps, finals: Finals) -> dict[str, Any]:
        if steps.talker is None or finals.quiet is None:
            return {}
        record, means = steps.records[STEP_TWO], {name: float(row.mean()) for name, row in finals.quiet.items()}
        return {
            "nats": {"before": means[STEP_ONE], "after": means["quiet"], "continued": means["continued"]},
            "flops": {"quiet": steps.equal[0], "continued": steps.equal[1]},
            "rewards": _curve(record, "reward_mean"),
            "listening": _curve(record, "mixing_weight_alpha"),
            "watched": [row["watched"] for row in record["history"].values() if "watched" in row],
        }

    def _values(self, data: QuietData, steps: Steps, finals: Finals, told: Mapping[str, Any]) -> dict[str, Any]:
        """Metrics of the whole phase that need more than the theater report."""
        values: dict[str, Any] = {
            "phase/traces": len(data.book.traces),
            "phase/held_out_valid": steps.valid,
            "phase/converged": steps.valid >= self.config.teach.converged,
            "phase/accuracy_by_itself": float(told["by_itself"][: len(data.report)].mean()),
            "phase/final_accuracy": float(told["by_itself"].mean()),
            "phase/skills_before": float(finals.kept[0].mean()),
            "phase/skills_after": float(finals.kept[1].mean()),
        }
        if finals.quiet is not None:
            names = {"before": STEP_ONE, "after": "quiet", "equal_compute": "continued"}
            values |= {f"phase/step2_nats_{key}": float(finals.quiet[name].mean()) for key, name in names.items()}
            listened = _curve(steps.records[STEP_TWO], "mixing_weight_alpha")
            values |= {"phase/mixing_weight_alpha": listened[-1][1]} if listened else {}
        return values

    def _save(
        self,
        parent: Parent,
        data: QuietData,
        steps: Steps,
        made: tuple[str, torch.nn.Module],
        found: tuple[dict[str, Any], dict[str, Any]],
    ) -> str:
        """The thinker as an artifact; one that an earlier start saved is taken as it is."""
        context, (chosen, model), (tables, values) = self.context, made, found
        key = self.key(THINKER, parent.print, data.data_hash)
        rows = context.storage.registry.search_models(phase=self.name, session_id=context.session_id)
        done = next((r for r in rows if r["metadata"].get("config_hash") == key), None)
        if done is not None and Path(done["model_path"]).is_dir():
            return done["model_id"]
        told = tables["thoughts"]
        mix = (*self.config.traces.mix, *data.skill_mix)
        metadata = {
            "parents": [parent.model_id],
            "config_hash": key,
            "data_hash": data.data_hash,
            "seeds": [self.config.seed, self.config.teach.train.seed, self.config.quiet.train.seed],
            "seed": self.config.seed,
            "specialization": None,
            "tags": ["quietstar", chosen],
            "speciality": [part.model_dump(mode="json") for part in mix],
            "thinks": True,
            "training_threads": steps.records[STEP_ONE]["threads"],
            "vocabulary_added": model.config.vocab_size - parent.model.config.vocab_size,
            "coherence_score": told["coherence"],
            "validity_rate": told["validity_rate"],
            "accuracy": values["phase/final_accuracy"],
            "metrics": {
                name.removeprefix("phase/"): value for name, value in values.items() if isinstance(value, int | float)
            },
        }
        facts = {
            "traces": len(data.book.traces),
            "told": told,
            "skills": (values["phase/skills_before"], values["phase/skills_after"]),
            "theater": tables["theater"]["detected"],
        }
        why = tables["steps"]["two"]["why"]
        readme = card(f"{parent.name} ({parent.model_id})", f"{chosen}, {why}", tables["controls"], facts)
        files = mixer_files(steps.talker) if chosen == STEP_TWO else {}
        extras = ArtifactExtras(metrics=metadata["metrics"], readme=readme, files=files)
        return context.storage.save_model(
            model, context.session_id, self.name, THINKER, metadata, tokenizer=data.tokenizer, extras=extras
        )


def with_window(model: torch.nn.Module, window: int | None) -> torch.nn.Module:
    """A copy of a model, with another attention window where one is given.

    Raises:
        ConfigError: the model has none that could be set.
    """
    if window is None:
        return copy.deepcopy(model)
    if hasattr(model, "hf") or "window" not in type(model.config).model_fields:
        remedy = "leave it out: a Hugging Face model's window is its own"
        raise ConfigError("the model has no window to set", where="phases.quietstar.window", remedy=remedy)
    try:
        config = model.config.replace(window=window)
    except ConfigError as error:
        remedy = "give a window in tokens; not every family sees everything"
        raise ConfigError(error.what, where="phases.quietstar.window", remedy=remedy) from None
    wider = build_model(config)
    wider.load_state_dict(model.state_dict())
    return wider.to(next(model.parameters()).device).eval()


def step_flops(model: torch.nn.Module, train: TrainConfig, mixture: Mixture) -> float:
    """FLOPs of an ordinary training step on a mixture, by the share of its tokens that carry a label."""
    drawn = [mixture.batch(i) for i in range(8)]
    share = sum(b.supervised for b in drawn) / sum(b.inputs.size for b in drawn)
    return ordinary_flops(model, train.seq_len, share) * train.rows * train.seq_len


def _curve(record: Mapping[str, Any], name: str) -> list[list[float]]:
    """[step, value] pairs of what was observed while training."""
    return [[int(step), row[name]] for step, row in record["history"].items() if name in row]
