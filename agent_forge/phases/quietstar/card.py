"""The model card of a thinker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from agent_forge.pipeline.card import USE
from forgekit.data.thoughts import STRATEGIES


def card(parent: str, chosen: str, controls: Sequence[dict[str, Any]], facts: dict[str, Any]) -> str:
    """Markdown for ``README.md`` in the artifact folder; every number is of this run.

    Args:
        parent: name and id of the model it comes from.
        chosen: which step it is of, and why.
        controls: one row per condition.
        facts: ``traces``, ``told`` (the summary of its thoughts), ``skills`` (before, after), ``theater`` (verdict).
    """
    rows = "\n".join(
        f"| {row['condition']} | {100 * row['accuracy']:.1f} | {100 * row['low']:.1f} to {100 * row['high']:.1f} "
        f"| {'' if row['lost'] is None else format(100 * row['lost'], '.0f')} | {row['meaning']} |"
        for row in controls
    )
    told, (before, after) = facts["told"], facts["skills"]
    strategies = "\n".join(f"- `{name}`: {STRATEGIES.get(name).meaning}" for name in STRATEGIES)
    return f"""# thinker

Made by Agent Forge, phase 3 (thinking), from {parent}: {chosen}.

It learned to think on {facts["traces"]:,} written and verified traces. Asked a question, it may write a thought between
`<think>` and `</think>` first; clients get it apart from the answer.

| {controls[0]["n"]} held-out questions | exact answers, % | 95 % interval | gain lost, % | |
|---|---|---|---|---|
{rows}

Theater {"was detected" if facts["theater"] else "was not detected"}. Thoughts that are valid:
{100 * told["validity_rate"]:.1f} %; coherence {told["coherence"]:.2f}; {told["length"]:.0f} tokens on average.
The parent's other skills: {100 * before:.1f} % before, {100 * after:.1f} % after.

A system message that is the name of a strategy asks for it:

{strategies}

{USE}

`agent-forge chat --think off` answers at once, `--think-budget 32` thinks for at most 32 tokens.
Evidence with intervals is in `evidence.json` and in the session's report (`agent-forge report`).
"""
