"""Baking from folder to folder: an artifact of ours or a Hugging Face checkpoint in, the baked one out.

The result appears by one rename, so its folder is complete or absent. When the input is an artifact, so is the result.
"""

from __future__ import annotations

import hashlib
import json
import os
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from agent_forge.prompt_baking.bake import Baked, Show, bake_prompt
from agent_forge.prompt_baking.config import PromptBakingConfig
from agent_forge.prompt_baking.evidence import Findings, baking_evidence, exact_task, gym_tasks
from forgekit.compute.disk import require_free
from forgekit.config import Config, canonical_json
from forgekit.errors import ArtifactError
from forgekit.measure.stats import bootstrap_mean
from forgekit.models.base import parameter_count
from forgekit.models.io import read_model, write_model
from forgekit.store.artifact import EVIDENCE, MANIFEST, Artifact, ArtifactExtras, Manifest, write_artifact
from forgekit.store.fsio import write_folder
from forgekit.store.names import new_model_id, utc_text
from forgekit.store.packed import refuse_packed
from forgekit.train.setup import training_device
from forgekit.version import __version__

CARD, METRICS = "README.md", "metrics.json"


class BakePlan(Config):
    """What to bake, where from and where to."""

    source: Path
    """Folder of the model, ours or Hugging Face's."""
    output: Path
    """Folder of the result; must not exist."""
    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    """What the model should do without being told."""
    contexts: tuple[str, ...] | None = None
    """Questions unrelated to the prompts; by default the gym's and Python's prose."""
    bake: PromptBakingConfig = PromptBakingConfig()
    """How."""
    task: tuple[tuple[str, str], ...] = ()
    """Questions with their right answers that the prompts are for."""
    problems: Annotated[int, Field(ge=0)] = 20
    """Problems of every gym family that tell what was forgotten; 0 leaves that out."""


def bake_folder(plan: BakePlan, show: Show | None = None) -> dict[str, Any]:
    """Bake and measure a model folder, and write the result as a new one.

    Returns:
        The receipt: what is on the card, besides ``output`` and ``seconds``.

    Raises:
        ForgeError: as :func:`agent_forge.prompt_baking.bake_prompt`; also an output that exists, an input that is
            damaged, a disk that is full. Nothing is left behind, whatever is raised.
    """
    if os.path.lexists(plan.output):
        raise ArtifactError("exists already", where=str(plan.output), remedy="choose another output folder")
    refuse_packed(plan.source, "trained")
    artifact = Artifact.open(plan.source) if (plan.source / MANIFEST).is_file() else None
    model, tokenizer = read_model(plan.source)
    model.to(training_device(plan.bake.device))
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    require_free(plan.output, size, "the baked model")
    prompts = list(plan.prompts)
    baked = bake_prompt(
        model,
        prompts[0] if len(prompts) == 1 else prompts,
        plan.bake,
        tokenizer=tokenizer,
        contexts=plan.contexts,
        show=show,
    )
    others = gym_tasks(plan.problems) if plan.problems else []
    own = [exact_task("the prompts' own task", plan.task)] if plan.task else []
    findings = baking_evidence(model, baked, _fitting(baked, own), _fitting(baked, others), show)
    receipt = receipt_of(plan, baked, findings, artifact)
    _write(plan, (baked, tokenizer), receipt, artifact)
    return {**receipt, "output": str(plan.output), "seconds": baked.seconds}


def _fitting(baked: Baked, tasks: list[Any]) -> list[Any]:
    """Tasks whose questions and answers the model has room for."""
    limit = baked.sides.limit
    longest = {task.name: max(len(baked.sides.ids(q)) for q in task.questions) + task.max_tokens for task in tasks}
    return [task for task in tasks if not limit or longest[task.name] <= limit]


def receipt_of(plan: BakePlan, baked: Baked, findings: Findings, artifact: Artifact | None) -> dict[str, Any]:
    """What was baked, how, and what came of it."""
    return {
        "name": plan.output.name,
        "created_at": utc_text(),
        "code_version": __version__,
        "input": {
            "name": plan.source.name,
            "model_id": artifact.manifest.model_id if artifact else None,
            "sha256": artifact.content_hash if artifact else None,
        },
        "prompts": [
            {
                "text": held.prompt,
                "sha256": hashlib.sha256(held.prompt.encode()).hexdigest(),
                "divergence_before": bootstrap_mean(before),
                "divergence_after": bootstrap_mean(after),
            }
            for held, before, after in zip(baked.held, baked.before, baked.after)
        ],
        "config": baked.config.model_dump(mode="json"),
        "stages": [
            {"prompt": s.prompt, "before": s.before, "after": s.after, "strength": s.strength, "scale": s.scale}
            for s in baked.stages
        ],
        "answers": baked.trajectories,
        "contexts": {k: len(getattr(baked.contexts, k)) for k in ("train", "decide", "report")},
        "likelihood_r2": findings.table["r2"],
        "task": next(iter(findings.table["tasks"].values()), None),
        "kept": findings.table["others"],
        "evidence": [e.model_dump(mode="json") for e in findings.evidence],
        "notes": baked.notes,
    }


def _write(plan: BakePlan, made: tuple[Baked, Any], receipt: dict[str, Any], artifact: Artifact | None) -> None:
    baked, tokenizer = made
    metrics = {"losses": baked.losses, "checks": [stage.checks for stage in baked.stages]}
    if artifact is not None:
        extras = ArtifactExtras(metrics, receipt["evidence"], card(receipt))
        manifest = _manifest(plan, baked, receipt, artifact)
        receipt["model_id"] = manifest.model_id
        write_artifact(plan.output, lambda folder: write_model(baked.model, tokenizer, folder), manifest, extras)
        return

    def fill(folder: Path) -> None:
        write_model(baked.model, tokenizer, folder)
        (folder / CARD).write_text(card(receipt), encoding="utf-8")
        for name, value in ((EVIDENCE, receipt["evidence"]), (METRICS, metrics)):
            (folder / name).write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    write_folder(plan.output, fill)


def _manifest(plan: BakePlan, baked: Baked, receipt: dict[str, Any], artifact: Artifact) -> Manifest:
    parent = artifact.manifest
    contexts = [baked.contexts.train, baked.contexts.decide, baked.contexts.report]
    metadata = {
        "model_id": new_model_id("baking", receipt["name"], datetime.fromisoformat(receipt["created_at"])),
        "parents": [parent.model_id],
        "seeds": [baked.config.seed],
        "parameters": parameter_count(baked.model),
        "size_mb": 0.0,
        "config_hash": baked.config.fingerprint(),
        "data_hash": hashlib.sha256(canonical_json([plan.prompts, contexts]).encode()).hexdigest(),
        "created_at": receipt["created_at"],
        "tags": ["prompt-baking", baked.config.mode],
        "baking": {k: v for k, v in receipt.items() if k not in ("created_at", "evidence")},
    }
    return Manifest.describe(parent.session_id, "baking", receipt["name"], metadata)


def card(receipt: dict[str, Any]) -> str:
    """The model card: what was baked into what, how, and what was measured."""
    prompts = "\n".join(
        f"| {_short(one['text'])} | {one['divergence_before'][0]:.4f} | {_interval(one['divergence_after'])} |"
        for one in receipt["prompts"]
    )
    kept = "\n".join(f"| {name} | {m['bare']:.3f} | {m['baked']:.3f} |" for name, m in receipt["kept"].items())
    options = "\n".join(f"- {k}: `{json.dumps(v)}`" for k, v in receipt["config"].items())
    notes = "\n".join(f"- {note}" for note in receipt["notes"])
    source = receipt["input"]
    r2 = receipt["likelihood_r2"]
    return f"""---
library_name: transformers
tags:
- prompt-baking
- agent-forge
---
# {receipt["name"]}

Baked by Agent Forge {receipt["code_version"]} on {receipt["created_at"]} from
{source["model_id"] or source["name"]}{f" (content {source['sha256']})" if source["sha256"] else ""}: without a prompt
it answers as that model did with one.

| prompt | nats per token to the prompted model before | after, 95 % interval |
|---|---|---|
{prompts}

Likelihoods of held-out answers agree with the prompted model's to r2 {r2["baked"]:.3f} (before: {r2["bare"]:.3f}).

## Kept

| gym family, asked without the prompt | before | after |
|---|---|---|
{kept or "| not measured | | |"}

## Notes

{notes or "- none"}

## Settings

{options}

## Receipt

```json
{json.dumps(receipt, indent=2)}
```
"""


def _short(text: str) -> str:
    line = " ".join(text.split()).replace("|", "\\|")
    return line if len(line) <= 120 else f"{line[:117]}..."


def _interval(value: Any) -> str:
    return f"{value[0]:.4f} [{value[1]:.4f}, {value[2]:.4f}]"
