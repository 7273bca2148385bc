"""The progress bar of a comparison, on standard error."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)

from hf_paged.comparison.runner import OnProgress


@contextlib.contextmanager
def terminal_progress(console: Console | None = None) -> Iterator[OnProgress]:
    """A bar for the arm that runs now; nothing where standard error is no terminal."""
    console = console or Console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description:<28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    # A slow refresh: the bar's own thread must not show in what is measured.
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, refresh_per_second=2
    ) as bar:
        task = bar.add_task("preparing", total=None)
        shown = ""

        def on_progress(label: str, done: int, total: int) -> None:
            nonlocal shown
            if label != shown:
                bar.reset(task, description=label, total=total)
                shown = label
            bar.update(task, completed=done)

        yield on_progress
