"""`hf-paged report`: a comparison that was saved, as a table, a page and plots."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from hf_paged.cli.common import terminal_width, usage_errors, writable


def report(
    source: Annotated[Path, typer.Argument(help="JSON that hf-paged compare or hf-paged bench wrote")],
    html: Annotated[Path | None, typer.Option(help="Write it as one HTML page")] = None,
    plots: Annotated[Path | None, typer.Option(help="Folder for PNG plots; needs matplotlib")] = None,
    baseline: Annotated[Path | None, typer.Option(help="JSON of an earlier run to compare with")] = None,
) -> None:
    """Show a comparison that was saved: a table, a page, plots; nothing is run."""
    with usage_errors():
        from hf_paged.comparison.outputs import Outputs
        from hf_paged.comparison.reports import changes, load_reports

        writable(html)
        reports = load_reports(source)
        outputs = Outputs(None, html, plots, baseline)
        before = outputs.check()
        show_all(reports, None if before is None else changes(before, reports), always=True)
        for path in outputs.save(reports, before):
            typer.echo(f"written: {path}")


def show_all(reports: Sequence[Any], found: Sequence[Any] | None, *, always: bool = False) -> None:
    """Prints a row a scenario, and the changes since a baseline, if there is one."""
    from rich.console import Console

    from hf_paged.comparison.latency_tables import baseline_table, scenarios_table

    console = Console(width=terminal_width(), no_color=True)
    if always or len(reports) > 1:
        console.print(scenarios_table(reports))
    if found:
        console.print(baseline_table(found))
    elif found is not None:
        console.print("The baseline holds no run of the same model and work.")
