"""The model cards of a ternary model: of the packed file, and of its dequantised copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent_forge.pipeline.card import USE

PACKED_USE = """## Use

```bash
agent-forge chat PATH_TO_THIS_FOLDER "sort 40213"
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
        facts: ``packed`` (whether the file is), ``other`` (the other artifact), ``grid`` (a sentence on how it was
            rounded), ``speedup``, ``sparsity``.
    """
    table = "\n".join(
        f"| {row['model']} | {row['bytes']:,} | {row['ratio']:.1f} | {100 * row['accuracy']:.1f} "
        f"| {100 * row['low']:.1f} to {100 * row['high']:.1f} | {row['perplexity']:.2f} |"
        for row in rows
    )
    what = (
        f"The weights of its linear maps are -1, 0 or 1 times a scale, packed. Its float copy is {facts['other']}."
        if facts["packed"]
        else f"The weights lie on the grid of the packed model {facts['other']}; this copy is for training on."
    )
    return f"""# {name}

Made by Agent Forge, phase 4 (ternary weights), from {parent}. {what}

{facts["grid"]}

| {rows[0]["n"]} held-out questions | bytes of weights | times smaller | exact answers, % | 95 % interval | perplexity |
|---|---|---|---|---|---|
{table}

Bytes of the parent are those of float32, of the ternary model those of its packed file. {100 * facts["sparsity"]:.0f} %
of the ternary weights are zero. Packed, a single row is decoded {facts["speedup"]:.2f} times as fast as in float32 on
the machine that made it.

{PACKED_USE if facts["packed"] else USE}

Evidence with intervals is in `evidence.json` and in the session's report (`agent-forge report`).
"""
