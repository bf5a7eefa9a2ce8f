"""Progress bars, one per stage."""

from __future__ import annotations

from typing import Any

from agent_forge.pipeline.phase import Progress


class Bars:
    """Shows :class:`Progress` as one bar per stage; plain lines where there is no terminal.

    Args:
        enabled: off, nothing is shown.
    """

    def __init__(self, enabled: bool = True) -> None:
        from rich.console import Console

        self.console = Console(stderr=True, highlight=False)
        self.enabled = enabled
        self._tasks: dict[str, Any] = {}
        self._bars: Any = None
        self._told: set[str] = set()

    def __enter__(self) -> Bars:
        if self.enabled and self.console.is_terminal:
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("{task.description:>22}"),
                BarColumn(bar_width=28),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[note]}"),
            )
            self._bars = RichProgress(*columns, console=self.console)
            self._bars.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def show(self, progress: Progress) -> None:
        """Update the stage's bar."""
        if not self.enabled:
            return
        if self._bars is None:
            self._line(progress)
            return
        if progress.stage not in self._tasks:
            self._tasks[progress.stage] = self._bars.add_task(
                progress.stage.replace("_", " "), total=progress.total, note=""
            )
        self._bars.update(
            self._tasks[progress.stage], completed=progress.done, total=progress.total, note=progress.note
        )

    def _line(self, progress: Progress) -> None:
        """Without a terminal: one line at every fifth of a stage."""
        fifth = f"{progress.stage}:{5 * progress.done // max(progress.total, 1)}"
        if fifth not in self._told:
            self._told.add(fifth)
            self.console.print(f"{progress.stage:>22} {progress.done}/{progress.total}  {progress.note}")
