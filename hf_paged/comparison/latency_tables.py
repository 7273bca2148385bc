"""The terminal tables besides the first one: latencies, rates, all scenarios, the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from hf_paged.comparison.numbers import duration, median, short, size, times
from hf_paged.comparison.reports import LATENCIES, LATENCY_HEAD, Change, Report, pairs_of, rate_of, title_of

if TYPE_CHECKING:
    from hf_paged.comparison.report import ArmReport, CompareReport


def latency_table(report: CompareReport) -> Table:
    """One row an arm: latency percentiles, goodput, running batch, KV at its peak."""
    limits = report.options.get("limits", {})
    table = Table(
        title="Latency, goodput, running batch",
        caption="All requests are there at the start, so TTFT and E2E hold the wait. Goodput: requests a second with "
        + ", ".join(f"{name.upper()} ≤ {duration(value)}" for name, value in limits.items()),
    )
    table.add_column("arm", no_wrap=True)
    for name in (*LATENCY_HEAD, "goodput", "running", "KV peak"):
        table.add_column(name, justify="right", no_wrap=True)
    for arm in report.arms:
        if arm.runs:
            table.add_row(arm.name, *_cells(arm))
    return table


def rates_table(report: CompareReport) -> Table:
    """One row an arm and rate of arrivals."""
    table = Table(
        title="Under Poisson arrivals", caption="An arm that fell behind is not run at higher rates"
    )
    table.add_column("arm", no_wrap=True)
    for name in ("requests/s", *LATENCY_HEAD, "goodput", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for row in report.rates:
        cells = [_text(row.latency.get(m, {}).get(s), duration) for m, s in LATENCIES]
        good = (
            ""
            if row.goodput is None
            else f"{short(row.goodput['requests_per_second'])} ({row.goodput['share']:.0%})"
        )
        behind = "fell behind" if row.saturated else ""
        table.add_row(row.arm, short(row.rate), *cells, good, behind)
    return table


def scenarios_table(reports: Sequence[Report]) -> Table:
    """One row a scenario: tokens/s of each arm and the gain over the best of the others, lost ones too."""
    names = dict.fromkeys((a["name"], a["title"]) for r in reports for a in r["arms"])
    table = Table(
        title="All scenarios: output tokens per second", caption="Last column: median of the paired ratios"
    )
    table.add_column("scenario")
    for _, title in names:
        table.add_column(title, justify="right")
    table.add_column("over the best other", justify="right")
    for report in reports:
        rates = {a["name"]: rate_of(a) for a in report["arms"] if a["runs"]}
        others = {n: v for n, v in rates.items() if n not in ("hf_paged", "hf_paged_loop")}
        best = max(others, key=others.__getitem__, default=None)
        ratio = None if best is None else median(pairs_of(report, best))
        table.add_row(
            title_of(report), *(_text(rates.get(name), short) for name, _ in names), _text(ratio, times)
        )
    return table


def baseline_table(found: Sequence[Change]) -> Table:
    """Tokens/s then and now."""
    table = Table(
        title="Against the baseline",
        caption="× loop: ratio to the loop of the same run; a faster machine leaves it",
    )
    for name in ("scenario", "arm"):
        table.add_column(name)
    for name in ("tokens/s then", "now", "change", "× loop then", "now"):
        table.add_column(name, justify="right")
    for c in found:
        loop = [times(v) for v in c.versus_loop] if c.versus_loop else ["", ""]
        table.add_row(c.scenario, c.arm, *map(short, c.tokens_per_second), f"{c.change - 1:+.1%}", *loop)
    return table


def _cells(arm: ArmReport) -> list[str]:
    cells = [_text(arm.latency(m, s), duration) for m, s in LATENCIES]
    goods = [r.goodput for r in arm.runs if r.goodput]
    rate, share = median(g["requests_per_second"] for g in goods), median(g["share"] for g in goods)
    cells.append("" if rate is None or share is None else f"{short(rate)} ({share:.0%})")
    return [*cells, _text(arm.median("mean_running"), short), _text(arm.median("peak_kv_bytes"), size)]


def _text(value: float | None, write: Any) -> str:
    return "" if value is None else str(write(value))
