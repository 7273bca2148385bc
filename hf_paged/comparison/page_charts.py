"""The charts of the report page, each as a card."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from hf_paged.comparison.numbers import byte_unit, duration
from hf_paged.comparison.reports import Report, rate_of
from hf_paged.comparison.style import style_of
from hf_paged.comparison.svg import Bar, Line, bar_chart, line_chart


def legend(report: Report) -> str:
    """Which line is which arm."""
    spans = []
    for arm in report["arms"]:
        style = style_of(arm["name"])
        mark = f'<svg viewBox="0 0 26 10" aria-hidden="true"><path class="line {style}" d="M0 5H26"/></svg>'
        spans.append(f"<span>{mark}{escape(arm['title'])}</span>")
    return f'<div class="legend">{"".join(spans)}</div>'


def throughput_bars(report: Report) -> list[Bar]:
    """Median tokens/s of each arm that ran, with the lowest and highest run."""
    bars = []
    for arm in report["arms"]:
        if arm["runs"]:
            rates = [r["tokens_per_second"] for r in arm["runs"]]
            spread = (min(rates), max(rates)) if len(rates) > 1 else None
            bars.append(Bar(arm["title"], style_of(arm["name"]), rate_of(arm), spread=spread))
    return bars


def throughput(report: Report) -> str:
    """Output tokens a second of each arm."""
    bars = throughput_bars(report)
    if not bars:
        return ""
    chart = bar_chart(bars, title="Output tokens per second of each arm")
    note = "Medians; the thin line goes from the slowest run to the fastest."
    return _card("Output tokens per second", chart, note, wide=True)


def time_charts(report: Report) -> str:
    """Running batch and KV memory over the time of the first run."""
    arms = [a for a in report["arms"] if a.get("timeline")]
    if not arms:
        return ""
    note = "First run of each arm."
    if any(r.get("relative_error") != 0 for a in arms for r in a["runs"][:1]):
        note += " An arm that ran a sample ends early."
    running = _over_time(arms, "running", "sequences")
    unit, name = byte_unit(max(max(a["timeline"]["kv_bytes"]) for a in arms))
    held = _over_time(arms, "kv_bytes", f"KV memory, {name}", unit)
    return _card("Sequences running at once", running, note) + _card("KV memory in use over time", held, note)


def _over_time(arms: Sequence[Mapping[str, Any]], column: str, label: str, unit: int = 1) -> str:
    lines = []
    for arm in arms:
        values = [value / unit for value in arm["timeline"][column]]
        points = list(zip(arm["timeline"]["seconds"], values, strict=True))
        lines.append(Line(arm["title"], style_of(arm["name"]), points, step=True))
    return line_chart(lines, title=f"{label} over time", x_label="seconds", y_label=label)


def rate_charts(report: Report) -> str:
    """Latency and goodput against the rate of arrivals."""
    rows = report["rates"]
    cards = []
    for measure, name in (("ttft", "Time to first token"), ("e2e", "Time to the whole answer")):
        for statistic, words in (("p50", "median"), ("p99", "99th percentile")):
            found = _against_rate(report, rows, _latency(measure, statistic))
            if found:
                chart = line_chart(
                    found,
                    title=f"{name}, {words}, against requests per second",
                    x_label="requests per second offered",
                    y_label=words,
                    y_text=duration,
                    log_y=True,
                )
                cards.append(
                    _card(f"{name}, {words}", chart, "A line ends where its arm fell behind the arrivals.")
                )
    goods = _against_rate(report, rows, lambda r: r["goodput"] and r["goodput"]["requests_per_second"])
    if goods:
        limits = next(r["goodput"]["limits"] for r in rows if r["goodput"])
        chart = line_chart(
            goods, title="Goodput", x_label="requests per second offered", y_label="good requests per second"
        )
        words = " and ".join(f"{name.upper()} ≤ {duration(value)}" for name, value in limits.items())
        cards.append(_card("Goodput", chart, f"Requests a second with {words}."))
    return "".join(cards)


def _latency(measure: str, statistic: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda row: row["latency"].get(measure, {}).get(statistic)


def _against_rate(
    report: Report, rows: Sequence[Mapping[str, Any]], value: Callable[[Mapping[str, Any]], float | None]
) -> list[Line]:
    lines = []
    for arm in report["arms"]:
        points = [(r["rate"], v) for r in rows if r["arm"] == arm["name"] and (v := value(r)) is not None]
        if points:
            lines.append(Line(arm["title"], style_of(arm["name"]), points, marks=True))
    return lines


def _card(title: str, chart: str, note: str, *, wide: bool = False) -> str:
    kind = "card wide" if wide else "card"
    return f'<div class="{kind}"><h3>{escape(title)}</h3>{chart}<p class="note">{escape(note)}</p></div>'
