"""Where a comparison is written to: JSON, one HTML page, PNG plots; and what it is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_paged.comparison.reports import Report, bundle, load_reports


@dataclass(frozen=True)
class Outputs:
    """Paths; None for what is not wanted."""

    json: Path | None = None
    html: Path | None = None
    plots: Path | None = None
    baseline: Path | None = None

    def check(self) -> list[Report] | None:
        """The baseline's reports, before minutes of work are done.

        Raises:
            ValueError: the baseline cannot be read, or plots cannot be drawn.
        """
        if self.plots is not None:
            from hf_paged.comparison.plots import require_matplotlib

            require_matplotlib()
        return None if self.baseline is None else load_reports(self.baseline)

    def save_json(self, reports: Sequence[Report]) -> None:
        """One report as it is, several in a bundle; a reader never sees half a file."""
        from hf_paged.comparison.report import write_json

        if self.json is not None:
            data: Any = reports[0] if len(reports) == 1 else bundle(reports)
            write_json(self.json, dict(data))

    def save(self, reports: Sequence[Report], baseline: Sequence[Report] | None) -> list[Path]:
        """Writes all that is wanted and returns what was written."""
        written = []
        if self.json is not None:
            self.save_json(reports)
            written.append(self.json)
        if self.html is not None:
            from hf_paged.comparison.page import render_page

            self.html.write_text(render_page(reports, baseline), encoding="utf-8")
            written.append(self.html)
        if self.plots is not None:
            from hf_paged.comparison.plots import save_plots

            written += save_plots(reports, self.plots)
        return written
