"""What a merged model says about itself: the receipt, the manifest and the model card."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from importlib import import_module
from typing import TYPE_CHECKING, Any

from agent_forge.merging.operators_config import PassthroughOptions
from forgekit.store.artifact import Manifest
from forgekit.store.names import new_model_id, utc_text
from forgekit.version import __version__

if TYPE_CHECKING:
    from agent_forge.merging.folders import Job


def parents_in(job: Job) -> list[str]:
    """Ids of all inputs when every one is an artifact, else nothing."""
    found = [folder.artifact.manifest.model_id for folder in job.inputs if folder.artifact]
    return list(dict.fromkeys(found)) if len(found) == len(job.inputs) else []


def manifest_of(job: Job, receipt: dict[str, Any], config: dict[str, Any]) -> Manifest:
    """The manifest of a result whose inputs are all artifacts; its id and time are the receipt's instant."""
    plan, first = job.plan, job.models[0].artifact.manifest
    parameters = first.parameters
    if isinstance(job.options, PassthroughOptions):
        parameters = sum(job.source(entry).count for entry in job.entries)
        if "forge" in config:
            from forgekit.models.config import MODEL_CONFIGS

            parameters = MODEL_CONFIGS.get(config["model_type"]).build(config["forge"]).parameters()
    metadata = {
        "model_id": new_model_id("evomerge", receipt["name"], datetime.fromisoformat(receipt["created_at"])),
        "parents": parents_in(job),
        "seeds": [plan.seed] if job.merger.needs.random else [],
        "parameters": parameters,
        "size_mb": 0.0,
        "config_hash": job.options.fingerprint(),
        "created_at": receipt["created_at"],
        "tags": ["merge", job.merger.name],
        "merge": {k: v for k, v in receipt.items() if k != "created_at"},
    }
    session = plan.session_id or first.session_id
    return Manifest.describe(session, "evomerge", receipt["name"], metadata)


def receipt_of(job: Job) -> dict[str, Any]:
    """What was merged and how; hashes every input unless the plan says not to."""
    plan = job.plan
    folders = (*job.inputs, *job.importances)
    if plan.verify:
        with ThreadPoolExecutor(job.threads) as files, ThreadPoolExecutor(len(folders)) as pool:
            found = [pool.submit(folder.content_hash, files.map) for folder in folders]
            import_module("agent_forge.merging.operators")  # torch takes as long to load as a gigabyte to hash
            hashes = [one.result() for one in found]
    else:
        hashes = [f.artifact.content_hash if f.artifact else None for f in folders]
    roles = ["model"] * len(job.models) + ["base"] * bool(job.base) + ["importances"] * len(job.importances)
    inputs = [
        {
            "role": role,
            "name": folder.name,
            "model_id": folder.artifact.manifest.model_id if folder.artifact else None,
            "sha256": digest,
        }
        for role, folder, digest in zip(roles, folders, hashes)
    ]
    copied = sum(job.copied(entry) for entry in job.entries)
    return {
        "name": plan.model_name or plan.output.name,
        "method": job.merger.name,
        "options": job.options.model_dump(mode="json"),
        "seed": plan.seed if job.merger.needs.random else None,
        "created_at": plan.created_at or utc_text(),
        "code_version": __version__,
        "inputs": inputs,
        "configuration_of": job.donor.name,
        "tensors": {"merged": len(job.entries) - copied, "copied": copied},
        "values": sum(job.source(entry).count for entry in job.entries),
        "bytes": job.bytes,
        "files": [shard.name for shard in job.shards],
        "differences": job.findings.traits,
        "notes": job.findings.notes,
    }


def told(values: dict[str, Any]) -> str:
    """One value per model in a line."""
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in values.items())


def card(receipt: dict[str, Any]) -> str:
    """The model card: what was merged, how, and the receipt that lets anyone do it again."""
    rows = "\n".join(
        f"| {one['role']} | {one['model_id'] or one['name']} | {one['sha256'] or 'not hashed'} |"
        for one in receipt["inputs"]
    )
    options = "\n".join(f"- {name}: `{json.dumps(value)}`" for name, value in receipt["options"].items())
    seed = "" if receipt["seed"] is None else f"\n- seed: `{receipt['seed']}`"
    donor = receipt["configuration_of"]
    differences = "\n".join(
        f"- {name}: {told(values)}; the merged model takes {donor}'s" for name, values in receipt["differences"].items()
    )
    notes = "\n".join(f"- {note}" for note in receipt["notes"])
    counts = receipt["tensors"]
    return f"""---
library_name: transformers
tags:
- merge
- agent-forge
---
# {receipt["name"]}

Merged by Agent Forge {receipt["code_version"]} with `{receipt["method"]}` on {receipt["created_at"]}.

{counts["merged"]} tensors merged, {counts["copied"]} copied; {receipt["values"]:,} values,
{receipt["bytes"]:,} bytes in {len(receipt["files"])} file{"s" * (len(receipt["files"]) > 1)}.

| role | input | SHA-256 of its content |
|---|---|---|
{rows}

## Options

{options or "- none"}{seed}

## Differences between the inputs

{differences or "- none"}

## Notes

{notes or "- none"}

## Receipt

```json
{json.dumps(receipt, indent=2)}
```
"""
