"""What several commands share: the storage, JSON output, tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.text import Text

    from forgekit.store.storage import ModelStorage


def storage_of(context: typer.Context) -> ModelStorage:
    """The storage chosen by ``--storage``."""
    from forgekit.store.storage import ModelStorage

    return ModelStorage(context.obj["storage"])


def to_talk_to(storage: ModelStorage, name: str = "latest") -> Path:
    """Folder of a model to talk to; of the newest, if it is there packed too, the packed one.

    Raises:
        ArtifactError: there is no such model.
    """
    from forgekit.errors import ArtifactError
    from forgekit.store.artifact import Artifact

    folder = storage.resolve(name)
    if name != "latest":
        return folder
    packed = Artifact.open(folder).manifest.metadata.get("packed_model")
    try:
        small = storage.resolve(packed) if packed else folder
    except ArtifactError:
        return folder
    return small if small.is_dir() else folder  # it may have been deleted since


def print_json(value: Any) -> None:
    """One JSON document on stdout."""
    json.dump(value, sys.stdout, indent=2, default=str, ensure_ascii=False)
    sys.stdout.write("\n")


def table(title: str, columns: list[str], rows: list[list[Any]]) -> None:
    """A table for people. A column name ending in ``>`` aligns right, in ``!`` never wraps."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    grid = Table(
        title=title or None,
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for column in columns:
        right = "right" if column.endswith(">") else "left"
        grid.add_column(column.rstrip(">!"), justify=right, overflow="fold", no_wrap=column.endswith("!"))
    for row in rows:
        grid.add_row(*(_cell(cell) for cell in row))
    Console().print(grid)


def _cell(value: Any) -> Text:
    """Text as it is: code and models' answers are full of brackets. Only cells that open with a style are styled."""
    from rich.text import Text

    text = str(value)
    return Text.from_markup(text) if text.startswith(("[green]", "[yellow]", "[red]", "[dim]")) else Text(text)


def say(text: str, style: str = "") -> None:
    """A line for people, on stderr, so that stdout stays data."""
    from rich.console import Console

    Console(stderr=True, highlight=False).print(text, style=style or None)
