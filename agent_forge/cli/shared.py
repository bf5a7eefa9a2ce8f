"""What several commands share: the storage, JSON output, tables."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from forgekit.store.storage import ModelStorage


def storage_of(context: typer.Context) -> ModelStorage:
    """The storage chosen by ``--storage``."""
    from forgekit.store.storage import ModelStorage

    return ModelStorage(context.obj["storage"])


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    json.dump(value, sys.stdout, indent=2, default=str, ensure_ascii=False)
    sys.stdout.write("\n")


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """A table for people. Columns whose name ends in ``>`` are aligned right."""
    from rich.console import Console
    from rich.table import Table

    grid = Table(title=title or None, title_justify="left", header_style="bold")
    for column in columns:
        grid.add_column(column.rstrip(">"), justify="right" if column.endswith(">") else "left", overflow="fold")
    for row in rows:
        grid.add_row(*(str(cell) for cell in row))
    Console().print(grid)


def say(text: str, style: str = "") -> None:
    """A line for people, on stderr, so that stdout stays data."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, style=style or None)
