"""Model cards of exported models. Every number comes from the manifest, the evidence or the files written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from forgekit.compute.disk import readable
from forgekit.errors import ConfigError
from forgekit.measure.evidence import Evidence
from forgekit.models.config import MODEL_CONFIGS
from forgekit.store.artifact import Manifest
from forgekit.version import __version__


@dataclass(frozen=True)
class CardFacts:
    """What a card may say.

    Attributes:
        name: the model's name for people.
        manifest: of the artifact; None for a folder without one.
        evidence: contents of its ``evidence.json``.
        config: its ``config.json``.
        readme: the artifact's own card, for its data section.
        ancestors: ids of the models it comes from beyond its parents, nearest first.
        origin: what ``config.json`` of the export says about its source.
        dtype, stored: type of the exported weights, and the floating types of the source.
        rounded: largest change of a weight by the change of type.
        values: numbers in all tensors, buffers included.
        weights: weight files with their bytes.
        packed: what was done to a source whose weights were packed; empty where they were not.
    """

    name: str
    manifest: Manifest | None
    evidence: dict[str, Any] | list[Any] | None
    config: dict[str, Any]
    readme: str
    ancestors: tuple[str, ...]
    origin: dict[str, Any]
    dtype: str
    stored: set[str]
    rounded: float
    values: int
    weights: dict[str, int]
    packed: str = ""


def model_card(facts: CardFacts) -> str:
    """The card of a model of the house."""
    parts = [
        _front_matter(facts),
        f"# {facts.name}",
        _summary(facts),
        *([f"{facts.packed}."] if facts.packed else []),
        "## Size",
        _size(facts),
        "## Lineage",
        _lineage(facts),
        "## Data",
        _section(facts.readme, "Data") or _data(facts),
        "## Evidence",
        _evidence(facts),
        "## Limits",
        _limits(facts),
        "## Use",
        _use(facts),
    ]
    return "\n\n".join(parts) + "\n"


def hf_card(facts: CardFacts, before: str) -> str:
    """The card of a converted checkpoint: what it said before, and how this copy was made."""
    head = before.rstrip() or f"---\nlibrary_name: transformers\npipeline_tag: text-generation\n---\n\n# {facts.name}"
    made = f"## This copy\n\nWritten by `agent-forge export` {__version__}."
    told = [f"{facts.packed}."] if facts.packed else []
    return "\n\n".join([head, made, *told, _size(facts), *_rounding(facts)]) + "\n"


def claims(evidence: dict[str, Any] | list[Any] | None) -> list[Evidence]:
    """The measured claims in an ``evidence.json``: a list of them, or a mapping with that list under ``evidence``."""
    found = evidence.get("evidence") if isinstance(evidence, dict) else evidence
    kept = []
    for item in found if isinstance(found, list) else ():
        try:
            kept.append(Evidence.build(item, "evidence.json"))
        except ConfigError:  # another kind of record, which has no place in a table of intervals
            continue
    return kept


def _front_matter(facts: CardFacts) -> str:
    """YAML that the Hub reads; strings are quoted as JSON, which is YAML too."""
    manifest = facts.manifest
    tags = ["agent-forge", facts.config["model_type"]]
    tags += [*manifest.metadata.get("tags", []), manifest.phase_name] if manifest else []
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags) if not (facts.packed and tag == "packed")]
    if manifest and manifest.parents:
        lines.append("# Names within the session that made them: give their repositories when you publish them too.")
        lines += ["base_model:", *(f"- {json.dumps(parent)}" for parent in manifest.parents)]
        lines.append(f"base_model_relation: {'merge' if 'merge' in tags or len(manifest.parents) > 1 else 'finetune'}")
    lines.append("# The manifest names no licence. Add `license:` before you publish; the data may oblige you.")
    return "\n".join([*lines, "---"])


def _summary(facts: CardFacts) -> str:
    manifest = facts.manifest
    family = facts.config["model_type"]
    if manifest is None:
        source = facts.origin.get("model_id")
        known = f"of the model `{source}`" if source else "of a model without a manifest"
        return (
            f"A causal language model of the family `{family}`, exported by agent-forge {__version__}: a copy {known}."
        )
    special = manifest.metadata.get("specialization")
    role = f", specialised in {special.replace('_', ' ')}" if special else ""
    return (
        f"A causal language model of the family `{family}`{role}, made by agent-forge {manifest.code_version} in phase "
        f"`{manifest.phase_name}` on {manifest.created_at[:10]}, exported by agent-forge {__version__}."
    )


def _size(facts: CardFacts) -> str:
    total = sum(facts.weights.values())
    rows = [
        ("parameters", f"{facts.manifest.parameters:,}" if facts.manifest else ""),
        ("values stored, buffers included", f"{facts.values:,}"),
        ("type", facts.dtype),
        (
            "weights",
            f"{total:,} bytes ({readable(total)}) in {len(facts.weights)} file{'s' * (len(facts.weights) > 1)}",
        ),
    ]
    if facts.config.get("model_type") in MODEL_CONFIGS:
        config = MODEL_CONFIGS.get(facts.config["model_type"]).build(facts.config["forge"])
        rows += [
            ("width, layers, heads", f"{config.d_model}, {config.n_layers}, {config.n_heads}"),
            ("vocabulary", f"{config.vocab_size:,}"),
            ("longest training sequence", f"{config.max_seq_len} tokens"),
            (
                f"forward cost at {config.max_seq_len} tokens",
                f"{config.flops_per_token(config.max_seq_len) / 1e6:.2f} MFLOPs per token (by formula)",
            ),
        ]
    return "\n".join(["| what | value |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows if value)])


def _lineage(facts: CardFacts) -> str:
    manifest = facts.manifest
    if manifest is None:
        return f"- made from: {_code(facts.origin.get('model_id'), 'not known')}"
    lines = [
        f"- id: `{manifest.model_id}`, session `{manifest.session_id}`",
        f"- parents: {', '.join(f'`{p}`' for p in manifest.parents) or 'none, it was trained from nothing'}",
    ]
    older = [name for name in facts.ancestors if name not in manifest.parents]
    if older:
        lines.append(f"- further ancestors: {', '.join(f'`{name}`' for name in older)}")
    lines += [
        f"- configuration {_code(manifest.config_hash, 'not recorded')}",
        f"- seeds: {', '.join(map(str, manifest.seeds)) or 'not recorded'}",
        f"- SHA-256 of the artifact's content: {_code(facts.origin.get('content_hash'), 'not recorded')}",
    ]
    return "\n".join(lines)


def _code(text: str | None, otherwise: str) -> str:
    return f"`{text}`" if text else otherwise


def _data(facts: CardFacts) -> str:
    if facts.manifest and facts.manifest.data_hash:
        return (
            f"SHA-256 of the training data: `{facts.manifest.data_hash}`. Its sources are not on the artifact's card."
        )
    return "Not recorded in the manifest" + (": see the parents." if facts.manifest and facts.manifest.parents else ".")


def _section(readme: str, title: str) -> str:
    """The text under a second-level heading of another card; empty if it has none."""
    _, found, rest = readme.partition(f"\n## {title}\n")
    return rest.partition("\n## ")[0].strip() if found else ""


def _evidence(facts: CardFacts) -> str:
    """One row per claim: about this model first, then what was measured beside it."""
    found = claims(facts.evidence)
    if not found:
        return "Nothing was measured on this model: it has no evidence.json."
    own = [item for item in found if _about(item, facts.name)]
    rest = [item for item in found if item not in own]
    parts = ["Each row compares the same items before and after; the interval is that of the change, at 95 %."]
    parts += [_table(own)] if own else []
    if rest:
        parts += ["Measured beside it, about its parents or the other models of its phase:"] if own else []
        parts.append(_table(rest))
    if facts.packed:
        parts.append("Measured on the packed source, not on this copy.")
    elif facts.stored != {facts.dtype}:
        parts.append(f"Measured with weights in {' and '.join(sorted(facts.stored))}, not with the {facts.dtype} here.")
    return "\n\n".join(parts)


def _about(item: Evidence, name: str) -> bool:
    return item.claim == name or item.claim.startswith(f"{name} ")


def _table(items: list[Evidence]) -> str:
    lines = [
        "| claim | metric | before | after | change, 95 % | items | split | chance | verdict |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for item in items:
        change = f"{item.ci95[0]:+.3g} to {item.ci95[1]:+.3g}" if item.ci95 else "not measured"
        cells = [item.claim, item.metric, _number(item.before), _number(item.after), change]
        cells += [f"{item.n:,}", item.split, _number(item.chance, "none"), item.verdict]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    return "\n".join(lines)


def _number(value: float | None, otherwise: str = "not measured") -> str:
    return otherwise if value is None else f"{value:.4g}"


def _limits(facts: CardFacts) -> str:
    config = MODEL_CONFIGS.get(facts.config["model_type"]).build(facts.config["forge"])
    lines = ["- Only what the table lists has been measured: nothing about safety, bias or truth."]
    lines.append(f"- It was made for sequences of up to {config.max_seq_len} tokens; longer ones are not refused.")
    if config.reach:
        memory = "only its memory knows" if getattr(config, "memories", ()) else "it knows nothing of"
        lines.append(f"- Attention reaches {config.reach} tokens back through all layers; {memory} what lies before.")
    failed = [item for item in claims(facts.evidence) if _about(item, facts.name) and item.verdict != "improved"]
    lines += [f"- {item.claim}: {item.verdict}." for item in failed]
    return "\n".join([*lines, *_rounding(facts)])


def _rounding(facts: CardFacts) -> list[str]:
    """What the change of type did; nothing where the type stayed."""
    if facts.stored == {facts.dtype}:
        return []
    before = " and ".join(sorted(facts.stored))
    return [
        f"- Stored in {before} before; the change to {facts.dtype} moved no weight by more than {facts.rounded:.3g}."
    ]


def _use(facts: CardFacts) -> str:
    return f"""With agent-forge {__version__} or later installed, nothing of this folder's code is run:

```python
import forgekit  # makes the family known to transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER")
tokenizer = AutoTokenizer.from_pretrained("THIS_FOLDER")
text = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "copy 12"}}], tokenize=False, add_generation_prompt=True
)
inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
answer = model.generate(**inputs, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
```

Without it, leave the first line out and give both calls `trust_remote_code=True`: transformers (5 or later) then runs
the Python files of this folder, a copy of agent-forge's own."""
