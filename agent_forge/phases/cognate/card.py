"""The model card of a phase-1 artifact: what it is, what made it, how to use it."""

from __future__ import annotations

from typing import Any

from agent_forge.pipeline.card import USE
from forgekit.train.config import TrainConfig


def card(name: str, shape, train: TrainConfig, metadata: dict[str, Any], data) -> str:
    """Markdown for ``README.md`` in the artifact folder; every number is of this run."""
    parts = "\n".join(f"| {part} | {count:,} |" for part, count in shape.split().items())
    sources = "\n".join(f"- {note}" for note in data.notes)
    role = "the common ancestor of the specialists" if name == "trunk" else f"the {name} specialist"
    return f"""# {name}

Made by Agent Forge, phase 1 (Cognate): {role}.

| part | parameters |
|---|---|
{parts}
| **total** | **{shape.parameters():,}** |

- family `{shape.family}`, width {shape.d_model}, {shape.n_layers} layers, attention window {shape.window} tokens
- {shape.flops_per_token(train.seq_len) / 1e6:.2f} MFLOPs per token forward at {train.seq_len} tokens
- trained {train.steps} steps of {train.rows} x {train.seq_len} tokens, seed {train.seed}
- final loss {metadata["final_loss"]:.3f} nats per supervised token

## Data

{sources}

{USE}

Evidence is in the session's report (`agent-forge report`), not on this card.
"""
