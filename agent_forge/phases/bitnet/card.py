"""The model cards of a low-bit model: of the packed file, and of its dequantised copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent_forge.phases.bitnet.evidence import SAME_BYTES
from agent_forge.pipeline.card import USE

PACKED_USE = """## Use

```bash
agent-forge chat PATH_TO_THIS_FOLDER
```

```python
from forgekit.models.io import read_model
model, tokenizer = read_model("PATH_TO_THIS_FOLDER")
```

The file's layout is described in `forgekit/quant/files.py`; transformers alone does not know it."""


def card(name: str, parent: str, rows: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Markdown for ``README.md`` in an artifact folder; every number is of this run.

    Args:
        name: of the artifact.
        parent: name and id of the model it comes from.
        rows: of :func:`agent_forge.phases.bitnet.evidence.models`.
        facts: ``made`` (what the weights are called), ``packed`` (whether the file is), ``other`` (the other artifact),
            ``grid`` (how a weight is stored, and whether it was trained), ``speedup``, ``sparsity``.
    """
    what = (
        f"The weights of its linear maps are packed. Its float copy is {facts['other']}."
        if facts["packed"]
        else f"The weights lie on the grid of the packed model {facts['other']}; this copy is for training on."
    )
    halves = "; of full precision in the same bytes those of float16" if rows[-1]["model"] == SAME_BYTES else ""
    return f"""# {name}

Made by Agent Forge, phase 4 ({facts["made"]} weights), from {parent}. {what}

{facts["grid"]}

{_table(rows)}

Bytes of the parent are those of float32, of the others those of their packed file{halves}.
{100 * facts["sparsity"]:.0f} % of the {facts["made"]} weights are zero. Packed, a single row is decoded
{facts["speedup"]:.2f} times as fast as in float32 on the machine that made it.

{PACKED_USE if facts["packed"] else USE}

Evidence with intervals is in `evidence.json` and in the session's report (`agent-forge report`).
"""


def _table(rows: Sequence[dict[str, Any]]) -> str:
    """A row per model; what was not asked is no column."""
    asked = rows[0]["accuracy"] is not None
    first = f"{rows[0]['n']} held-out questions" if asked else "model"
    skills = ["exact answers, %", "95 % interval"] if asked else []
    lines = [[first, "bytes of weights", "times smaller", *skills, "perplexity"]]
    lines.append(["---"] * len(lines[0]))
    for row in rows:
        told = [f"{100 * row['accuracy']:.1f}", f"{100 * row['low']:.1f} to {100 * row['high']:.1f}"] if asked else []
        lines.append([row["model"], f"{row['bytes']:,}", f"{row['ratio']:.1f}", *told, f"{row['perplexity']:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
