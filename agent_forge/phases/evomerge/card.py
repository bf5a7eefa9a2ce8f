"""The model card of a champion."""

from __future__ import annotations

from typing import Any

from agent_forge.pipeline.card import USE


def card(recipe: str, parents: list[str], table: dict[str, Any], kept: dict[str, Any], search: dict[str, Any]) -> str:
    """Markdown for ``README.md`` in the artifact folder; every number is of this run."""
    rows = "\n".join(
        f"| {name} | {row['report']['composite']:.4f} | {row['select']['composite']:.4f} "
        f"| {row['report']['accuracy']:.3f} | {row['report']['bits_per_byte']:.3f} |"
        for name, row in table.items()
    )
    kept_rows = "\n".join(
        f"| {name} | {100 * row['before']:.1f} | {100 * row['after']:.1f} | {'yes' if row['kept'] else 'no'} |"
        for name, row in kept.items()
    )
    made_of = "\n".join(f"- {parent}" for parent in parents)
    return f"""# champion

Made by Agent Forge, phase 2 (EvoMerge): {recipe}.

Merged from:

{made_of}

Found by the strategy {search["strategy"]} in {search["generations"]} generations, {search["evaluations"]} candidates
scored; {search["stopped"]}.

| model | composite, report split | composite, select split | exact answers | bits per byte |
|---|---|---|---|---|
{rows}

The select split chose the champion, the report split did not: the difference is the winner's curse.

| speciality of | specialist, % | champion, % | kept within {100 * search["kept_within"]:g} points |
|---|---|---|---|
{kept_rows}

{USE}

Evidence with intervals is in `evidence.json` and in the session's report (`agent-forge report`).
"""
