"""The terminal tables of a comparison."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.table import Table

from hf_paged.comparison.latency_tables import latency_table, rates_table
from hf_paged.config import PagedConfig

if TYPE_CHECKING:
    from hf_paged.comparison.equality import Equality
    from hf_paged.comparison.report import ArmReport, CompareReport

_MIB = 1 << 20


def comparison_table(report: CompareReport) -> Table:
    """One row an arm: speed, ratio to hf_paged, first token, memory, equality."""
    work = report.workload
    table = Table(
        title=f"{report.model['name']}, {report.model['dtype']}: "
        f"{work['num_requests']} requests ({work['name']}), prompt mean {work['prompt_tokens']['mean']:.0f}, "
        f"output limit mean {work['max_new_tokens']['mean']:.0f}",
        caption="Medians of the runs. hf_paged ×: paired ratio of tokens/s, median (minimum–maximum). "
        "TTFT: mean time to the first token of a request, all being there at the start. "
        "Peak: memory over that at the start",
    )
    table.add_column("arm", no_wrap=True)
    for name in ("tokens/s", "hf_paged ×", "TTFT, s", "peak, MiB", "KV waste", "greedy tokens"):
        table.add_column(name, justify="right")
    for arm in report.arms:
        table.add_row(*_row(report, arm))
    return table


def notes(report: CompareReport) -> list[str]:
    """What a reader must know besides the table: settings, samples, differences, errors."""
    lines = [f"workload: {note}" for note in report.workload["notes"]]
    for arm in report.arms:
        if arm.settings:
            lines.append(f"{arm.name}: {_settings(arm.settings)}")
        if arm.runs and arm.runs[0].first_token_note:
            lines.append(f"{arm.name}: first token {arm.runs[0].first_token_note}")
        if arm.runs and arm.runs[0].latency_note:
            lines.append(f"{arm.name}: latencies: {arm.runs[0].latency_note}")
        error = arm.median("relative_error")
        if error:
            lines.append(
                f"{arm.name}: run on {arm.runs[0].requests_run} of {report.workload['num_requests']} "
                f"requests, standard error of its rate {error:.1%}"
            )
        elif arm.runs and arm.runs[0].relative_error is None:
            lines.append(f"{arm.name}: one unit of work was run; its rate has no known error")
        if not arm.repeats_equal:
            lines.append(f"{arm.name}: its own repeats gave different tokens")
        if arm.error:
            lines.append(f"{arm.name} FAILED: {arm.error}")
    for entry in report.equality:
        lines.extend(_difference_lines(entry))
    return lines


def render(report: CompareReport, width: int = 120) -> str:
    """Table and notes as plain text."""
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, no_color=True)
    tables = [comparison_table(report), latency_table(report)]
    if report.rates:
        tables.append(rates_table(report))
    console.print(Group(*tables, *notes(report)))
    return buffer.getvalue()


def _row(report: CompareReport, arm: ArmReport) -> list[str]:
    if arm.error and not arm.runs:
        return [arm.title, "failed", "", "", "", "", ""]
    ratio = report.ratio(arm.name) if arm.name != "hf_paged" else None
    ratio_text = ""
    if ratio is not None:
        values = ratio.to_dict()
        ratio_text = f"{values['median']:.2f} ({values['minimum']:.2f}–{values['maximum']:.2f})"
    rate, memory, waste = (
        arm.median("tokens_per_second"),
        arm.median("peak_memory_bytes"),
        arm.median("kv_waste"),
    )
    return [
        arm.title,
        "" if rate is None else f"{rate:.1f}",
        ratio_text,
        _first_token(arm),
        "" if memory is None else f"{memory / _MIB:.0f}",
        "" if waste is None else f"{waste:.1%}",
        _equality(report, arm.name),
    ]


def _first_token(arm: ArmReport) -> str:
    value = arm.median("first_token_seconds")
    if value is None:
        return ""
    return ("~" if arm.runs[0].first_token_note else "") + f"{value:.2f}"


def _equality(report: CompareReport, name: str) -> str:
    entries = [e for e in report.equality if e.arm == name]
    if not entries:
        return "reference" if any(e.reference == name for e in report.equality) else ""
    entry = entries[0]
    ties = "" if not entry.near_ties else f", {entry.near_ties} near tie{'s' if entry.near_ties > 1 else ''}"
    if entry.num_equal == entry.num_requests:
        return f"equal ({entry.num_requests})"
    return f"{entry.num_equal} of {entry.num_requests} equal{ties}"


def _difference_lines(entry: Equality) -> list[str]:
    if not entry.differences:
        return []
    first = entry.differences[0]
    what = "ended at another length" if first.gap is None else f"logits {first.gap:.2g} apart"
    return [
        f"{entry.arm} against {entry.reference}: "
        f"{entry.num_requests - entry.num_equal} of {entry.num_requests} requests differ, "
        f"{entry.near_ties} from a near tie on; "
        f"first: request {first.request}, token {first.position}, {what}"
    ]


def _settings(settings: dict[str, Any]) -> str:
    """Settings in one line; of a config only what is not its default."""
    parts = []
    for key, value in settings.items():
        if isinstance(value, dict):
            value = {k: v for k, v in value.items() if v != getattr(PagedConfig, k, None)} or "defaults"
        parts.append(f"{key} {value}")
    return ", ".join(parts)
