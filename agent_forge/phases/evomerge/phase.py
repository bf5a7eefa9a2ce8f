"""Phase 2, EvoMerge: the specialists merged into one model, by a search that scores every candidate.

Selection happens on the select split; everything claimed is measured on the report split, which chose nothing.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save

from agent_forge.merging.check import check_finite
from agent_forge.merging.recipes import slots
from agent_forge.merging.strategies_config import Space
from agent_forge.phases.evomerge.card import card
from agent_forge.phases.evomerge.config import EvoMergeConfig
from agent_forge.phases.evomerge.evaluate import (
    Candidate,
    Evaluator,
    Task,
    evaluator,
    one_thread,
    put_weights,
    weights_of,
    with_traits,
)
from agent_forge.phases.evomerge.evidence import Finals, gate, measure, strategy_claims, strategy_table
from agent_forge.phases.evomerge.evolution import FILE, Evolution, Rules
from agent_forge.phases.evomerge.evolution import Progress as Search
from agent_forge.phases.evomerge.fitness import Exam, Marks, Reference, parts, sit, told
from agent_forge.phases.evomerge.inputs import Parent, differing_traits, find_base, open_parents
from agent_forge.phases.evomerge.metrics import emit_generation, emit_phase
from agent_forge.phases.evomerge.population import Population
from agent_forge.pipeline.conversation import converse
from agent_forge.pipeline.phase import PhaseController, PhaseResult, Progress
from forgekit.compute.disk import require_free
from forgekit.data.gym import Problem
from forgekit.data.plans import GymMix, TextPlan, minus
from forgekit.data.problems import held_out
from forgekit.data.texts import load_texts
from forgekit.models.io import read_model
from forgekit.store import fsio
from forgekit.store.artifact import ArtifactExtras, amend_evidence
from forgekit.train.distributed import agreed

FIRST, CHAMPION = "generation 0 best", "champion"
MODELS_ON_DISK = 12
"""Three originals, the champion, and one generation of eight."""


@dataclass
class Field:
    """Everything a search needs.

    Attributes:
        parents, base: the models that are merged and their ancestor.
        tokenizer: of all of them.
        states: their weights by name.
        task: what candidates are asked, and how.
        space: what may be combined.
        problems: of the report split, by speciality, in the order of the exam.
    """

    parents: list[Parent]
    base: Parent
    tokenizer: Any
    states: Mapping[str, Mapping[str, Any]]
    task: Task
    space: Space
    problems: Mapping[str, list[Problem]]


class EvoMergePhase(PhaseController):
    """Makes ``champion``, which Quiet-STaR teaches to think."""

    name = "evomerge"
    config: EvoMergeConfig

    def validate_input(self, models: list[str]) -> None:
        """Refuse models that cannot be merged: see :func:`agent_forge.phases.evomerge.inputs.open_parents`."""
        self._open(models)

    def run(self, models: list[str]) -> PhaseResult:
        """Search, save, measure. See :meth:`PhaseController.run`. Under torchrun the first process does it all."""
        return agreed(lambda: self._run(models))

    def _run(self, models: list[str]) -> PhaseResult:
        began = time.perf_counter()
        config, context = self.config, self.context
        parents, base = self._open(models)
        field = self._field(parents, base)
        exams = (exam.print for exam in field.task.exams.values())
        key = self.key("evolution", *(parent.print for parent in (*parents, base)), *exams)
        with evaluator(field.task, config.workers, config.engine) as judges:
            search, evolution = self._search(field, judges, key)
            winner = search.champion
            finals, table = self._finals(field, judges, evolution, search)
            evidence, tables = measure(config, finals)
            gains = {
                split: table[CHAMPION][split]["composite"] - table[finals.best][split]["composite"]
                for split in ("select", "report")
            }
            recipe = winner.recipe.describe()
            facts = {"table": table, "kept": tables["kept"], "key": key, "recipe": recipe}
            facts["lineage"] = dict(evolution.population.lineage)
            weights = evolution.weights(winner)
            fsio.remove_tree(self.context.folder / "population")
            model_id, model = self._save(field, search, weights, facts)
            if config.compare.evaluations:
                tables["strategies"], found = self._compare(field, judges, key)
                tables["strategy_table"] = strategy_table(tables["strategies"])
                evidence += strategy_claims(config, field.task.reference, found)
        amend_evidence(context.storage.resolve(model_id), [e.model_dump(mode="json") for e in evidence])
        decision = gate(context.profile.gate).decide(evidence)
        tables |= {"fitness_history": search.history, "fitness_table": table, "gains": gains}
        mix = [part for parent in parents for part in parent.speciality[:1]]
        seconds = time.perf_counter() - began
        sizes = [sum(p.numel() for p in model.parameters())] * len(parents)  # one shape, checked
        facts |= {"seconds": seconds, "sizes": sizes, "model": model_id, "parents": [one.model_id for one in parents]}
        metrics = emit_phase(self, search, facts)
        return PhaseResult(
            success=True,
            model=model_id,
            phase_name=self.name,
            metrics=metrics | tables,
            artifacts={
                "all_models": [model_id],
                "model_names": [CHAMPION],
                "parents": [parent.model_id for parent in parents],
                "base": base.model_id,
                "fall_back": [parent.model_id for parent in parents if parent.name == finals.best],
                "strategy": config.strategy,
                "stopped": search.stopped,
                "recipe": winner.recipe.model_dump(mode="json"),
                "merge_history": [one["champion_fitness"] for one in search.history],
                "gate": decision.model_dump(),
                "conversation": converse(CHAMPION, model, field.tokenizer, (*mix, *base.speciality[:1]), count=4),
            },
            duration_seconds=seconds,
            config=config.model_dump(mode="json"),
            evidence=evidence,
        )

    # Before

    def _open(self, models: list[str]) -> tuple[list[Parent], Parent]:
        storage = self.context.storage
        base = find_base(models, storage, self.config.base)
        return open_parents(models, base, storage, self.config.skills)

    def _field(self, parents: list[Parent], base: Parent) -> Field:
        """Load everything and decide what candidates are asked."""
        config, context = self.config, self.context
        template, tokenizer = read_model(base.folder)
        states = {base.name: weights_of(template)}
        configs = {base.name: template.config}
        for parent in parents:
            model = read_model(parent.folder)[0]
            states[parent.name], configs[parent.name] = weights_of(model), model.config
        for name, state in states.items():
            for tensor_name, tensor in state.items():
                if tensor.is_floating_point():
                    check_finite(tensor, tensor_name, name)
        size = sum(t.numel() * t.element_size() for t in states[base.name].values())
        require_free(context.folder, (MODELS_ON_DISK - len(parents)) * size, "phase 2")
        context.show(Progress("data", 0, 1, "held-out text and problems"))
        first = context.profile.phases.get("cognate", {}).get("text", {})
        plan = config.text or TextPlan.build(first, "phases.cognate.text")
        texts, _, notes = load_texts(plan, context.data)
        for note in notes:
            context.logger.event("data", note=note)
        mixes = {one.name: one.speciality for one in (*parents, base) if one.speciality}
        exams, problems = {}, {}
        for split, amount in (("select", config.fitness), ("report", config.evaluation)):
            problems[split] = distinct_problems(mixes, amount.problems, split)
            windows = config.fitness.replace(windows=amount.windows)
            exams[split] = Exam.make(tokenizer, problems[split], texts[split], windows)
        with one_thread():
            marks = sit(template, exams["select"])
        changes = differing_traits(configs, base.name)
        task = Task(base.folder, changes, exams, config.fitness, Reference(marks.flops, marks.size))
        space = Space(
            originals=tuple(parent.name for parent in parents),
            base=base.name,
            slots=slots(states[base.name], config.granularity),
            granularity=config.granularity,
            traits=_representatives(changes, [parent.name for parent in parents]),
        )
        context.show(Progress("data", 1, 1, f"{exams['select'].items} items select, {exams['report'].items} report"))
        return Field(parents, base, tokenizer, states, task, space, problems["report"])

    # The search

    def _search(self, field: Field, judges: Evaluator, key: str) -> tuple[Search, Evolution]:
        config, folder = self.config, self.context.folder
        rules = Rules(config.generations, config.patience, config.min_gain, config.min_diversity)
        population = Population(folder / "population", field.states.__getitem__, field.base.name)
        strategy = (config.strategy, config.search, config.seed)
        evolution = Evolution(field.space, strategy, rules, judges, population, (folder / FILE, key))
        tokens = field.task.exams["select"].tokens

        def show(search: Search) -> None:
            last = search.history[-1]
            note = f"champion {last['champion_fitness']:.4f}  diversity {last['diversity_score']:.2f}"
            self.context.show(Progress("evolution", search.generation, config.generations, note))
            emit_generation(self.context.logger, last, tokens)

        search = evolution.run(show)
        self.context.show(Progress("evolution", config.generations, config.generations, search.stopped))
        return search, evolution

    def _compare(
        self, field: Field, judges: Evaluator, key: str
    ) -> tuple[list[dict[str, Any]], dict[str, list[Marks]]]:
        """Every strategy with every seed at equal evaluations, and what their champions reach on the report split."""
        plan, folder = self.config.compare, self.context.folder / "compare"
        rules = Rules(10**6, 10**6, 0.0, self.config.min_diversity, plan.evaluations)
        jobs = [(name, self.config.seed + number) for name in plan.strategies for number in range(plan.seeds)]
        runs, champions = [], []
        for done, (name, seed) in enumerate(jobs):
            self.context.show(Progress("strategies", done, len(jobs) + 1, f"{name}, seed {seed}"))
            home = fsio.make_folder(folder / f"{name}-{seed}")
            population = Population(home, field.states.__getitem__, field.base.name)
            own = f"{key} {plan.evaluations}"
            evolution = Evolution(
                field.space, (name, self.config.search, seed), rules, judges, population, (home / FILE, own)
            )
            search = evolution.run()
            best = search.champion
            champions.append(Candidate(save(evolution.weights(best)), best.recipe.traits, "report"))
            record = {"strategy": name, "seed": seed, "evaluations": search.evaluations, "curve": search.curve}
            runs.append({**record, "select": best.fitness})
            population.keep([], {})
        self.context.show(Progress("strategies", len(jobs), len(jobs) + 1, "their champions on the report split"))
        found: dict[str, list[Marks]] = {}
        for run, marks in zip(runs, judges.score(champions)):  # all at once: every worker has something to do
            found.setdefault(run["strategy"], []).append(marks)
            run["report"] = parts(marks, self.config.fitness, field.task.reference)["composite"]
        self.context.show(Progress("strategies", 1, 1, f"{plan.evaluations} candidates each"))
        fsio.remove_tree(folder)
        return runs, found

    # After

    def _finals(
        self, field: Field, judges: Evaluator, evolution: Evolution, search: Search
    ) -> tuple[Finals, dict[str, Any]]:
        """Everybody on the report split, and on the select split beside it."""
        config, task = self.config, field.task
        everyone = {one.name: Candidate(save(dict(field.states[one.name])), one.name) for one in field.parents}
        everyone[field.base.name] = Candidate(save(dict(field.states[field.base.name])), "")
        for name, one in ((FIRST, search.first_best), (CHAMPION, search.champion)):
            everyone[name] = Candidate(save(evolution.weights(one)), one.recipe.traits)
        self.context.show(Progress("evidence", 0, 1, "scoring the report split"))
        found: dict[str, dict[str, Marks]] = {}
        for split in task.exams:
            asked = [Candidate(one.weights, one.traits, split) for one in everyone.values()]
            found[split] = dict(zip(everyone, judges.score(asked)))
        table = {
            name: {split: told(found[split][name], config.fitness, task.reference) for split in found}
            for name in everyone
        }
        parents = tuple(parent.name for parent in field.parents)
        mixes = {one.name: one.speciality for one in (*field.parents, field.base) if one.speciality}
        finals = Finals(
            marks=found["report"],
            problems=field.problems,
            mixes=mixes,
            parents=parents,
            base=field.base.name,
            best=max(parents, key=lambda name: table[name]["select"]["composite"]),
            reference=task.reference,
            compute={"evaluations": search.evaluations, "tokens": search.evaluations * task.exams["select"].tokens},
        )
        self.context.show(Progress("evidence", 1, 1, f"{task.exams['report'].items} items, {len(everyone)} models"))
        return finals, table

    def _save(self, field: Field, search: Search, weights: Mapping[str, Any], facts: dict[str, Any]):
        """The champion as an artifact, and its model; one that an earlier start saved is taken as it is."""
        context, winner = self.context, search.champion
        model = with_traits(read_model(field.base.folder)[0], field.task.traits.get(winner.recipe.traits, {}))
        put_weights(model, weights)
        rows = context.storage.registry.search_models(phase=self.name, session_id=context.session_id)
        done = next((r for r in rows if r["metadata"].get("config_hash") == facts["key"]), None)
        if done is not None and Path(done["model_path"]).is_dir():
            return done["model_id"], model
        row = facts["table"][CHAMPION]["report"]
        everyone = [*field.parents, field.base]
        practised = minus((part for one in everyone for part in one.speciality), ())
        metadata = {
            "parents": [one.model_id for one in everyone if one.made_here],
            "config_hash": facts["key"],
            "data_hash": field.base.data_hash,
            "seeds": [self.config.seed],
            "seed": self.config.seed,
            "specialization": None,
            "tags": ["evomerge", self.config.strategy],
            "fitness": row["composite"],
            "merge_technique": facts["recipe"],
            "recipe": winner.recipe.model_dump(mode="json"),
            "speciality": [part.model_dump(mode="json") for part in practised],
            "metrics": {name: row[name] for name in ("composite", "accuracy", "bits_per_byte", "flops_per_token")},
        }
        about = {
            "strategy": self.config.strategy,
            "generations": search.generation,
            "evaluations": search.evaluations,
            "stopped": search.stopped,
            "kept_within": self.config.kept_within,
        }
        names = [f"{one.name} ({one.model_id})" for one in everyone]
        readme = card(facts["recipe"], names, facts["table"], facts["kept"], about)
        extras = ArtifactExtras(metrics=metadata["metrics"], readme=readme)
        saved = context.storage.save_model(
            model, context.session_id, self.name, CHAMPION, metadata, tokenizer=field.tokenizer, extras=extras
        )
        return saved, model


def distinct_problems(mixes: Mapping[str, tuple[GymMix, ...]], count: int, split: str) -> dict[str, list[Problem]]:
    """Held-out problems of every speciality. One that several practised counts once, for the first of them."""
    found, seen = {}, set()
    for name, mix in mixes.items():
        fresh = [problem for problem in held_out(mix, count, split) if problem.prompt not in seen]
        seen |= {problem.prompt for problem in fresh}
        if fresh:
            found[name] = fresh
    return found


def _representatives(changes: Mapping[str, Mapping[str, Any]], names: list[str]) -> tuple[str, ...]:
    """One parent for every set of settings that occurs among them."""
    seen: dict[str, str] = {}
    for name in names:
        seen.setdefault(repr(sorted(changes.get(name, {}).items())), name)
    return tuple(seen.values())
