"""The tables of the report page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from hf_paged.comparison.numbers import duration, median, short, size, times
from hf_paged.comparison.reports import (
    LATENCIES,
    LATENCY_HEAD,
    Change,
    Report,
    latency_of,
    ours,
    pairs_of,
    rate_of,
    title_of,
)

_NONE = "–"


def summary_table(reports: Sequence[Report]) -> str:
    """One row a scenario: tokens/s of each arm, and our gain over the best of the others, lost ones too."""
    names = dict.fromkeys((a["name"], a["title"]) for r in reports for a in r["arms"])
    head = ["scenario", "requests", *(title for _, title in names), "over the best other"]
    rows = []
    for report in reports:
        cells = [escape(title_of(report)), str(report["workload"]["num_requests"])]
        rates = {a["name"]: rate_of(a) for a in report["arms"] if a["runs"]}
        cells += [_rate_and_gain(report, rates, name) for name, _ in names]
        others = {n: v for n, v in rates.items() if n not in ("hf_paged", "hf_paged_loop")}
        best = max(others, key=others.__getitem__, default=None)
        cells.append(_NONE if best is None else _gain(pairs_of(report, best)))
        rows.append(_row(cells))
    caption = (
        '<p class="note">Output tokens per second, medians; behind it how many times that hf_paged makes. '
        "Scenarios in which little or nothing is gained stand in the same table.</p>"
    )
    return f"{caption}{_table(head, rows)}"


def _rate_and_gain(report: Report, rates: Mapping[str, float], name: str) -> str:
    if name not in rates:
        return _NONE
    ratio = median(pairs_of(report, name))
    return short(rates[name]) + ("" if ratio is None else f" <small>{times(ratio)}</small>")


def arm_table(report: Report) -> str:
    """One row an arm: speed, latencies, batch, memory, equality."""
    head = ["arm", "tokens/s", "hf_paged ×", *LATENCY_HEAD]
    head += ["goodput /s", "running", "KV waste", "KV peak", "peak memory", "greedy tokens"]
    rows = []
    for arm in report["arms"]:
        if not arm["runs"]:
            message = f'<span class="loss">{escape(arm["error"] or "did not run")}</span>'
            rows.append(
                f'<tr><td>{escape(arm["title"])}</td><td class="text" colspan="15">{message}</td></tr>'
            )
            continue
        failed = f' <span class="loss">{escape(arm["error"])}</span>' if arm["error"] else ""
        cells = [escape(arm["title"]) + failed, short(rate_of(arm)), _ratio_cell(report, arm["name"])]
        for measure, statistic in LATENCIES:
            cells.append(_or_none(latency_of(arm, measure, statistic), duration))
        cells.append(_goodput(arm))
        for column, text in _COLUMNS:
            cells.append(_or_none(median(r.get(column) for r in arm["runs"]), text))
        cells.append(_equality(report, arm["name"]))
        rows.append(_row(cells, "ours" if arm["name"] == ours(report) else ""))
    return _table(head, rows, dense=True) + "".join(
        f'<p class="note">{escape(line)}</p>' for line in _notes(report)
    )


_COLUMNS = (
    ("mean_running", short),
    ("kv_waste", lambda v: f"{v:.1%}"),
    ("peak_kv_bytes", size),
    ("peak_memory_bytes", size),
)


def rate_table(report: Report) -> str:
    """One row an arm and rate."""
    head = ["arm", "requests/s", *LATENCY_HEAD, "tokens/s"]
    head += ["goodput /s", "within limits", ""]
    titles = {a["name"]: a["title"] for a in report["arms"]}
    rows = []
    for row in report["rates"]:
        cells = [escape(titles.get(row["arm"], row["arm"])), short(row["rate"])]
        cells += [_or_none(row["latency"].get(m, {}).get(s), duration) for m, s in LATENCIES]
        good = row["goodput"]
        cells += [short(row["tokens_per_second"])]
        cells += [short(good["requests_per_second"]), f"{good['share']:.0%}"] if good else [_NONE, _NONE]
        cells.append('<span class="loss">fell behind</span>' if row["saturated"] else "")
        rows.append(_row(cells, "ours" if row["arm"] == ours(report) else ""))
    return _table(head, rows)


def settings_table(report: Report) -> str:
    """What each arm was run with, and every setting that was tried for it."""
    rows = []
    for arm in report["arms"]:
        tried = "; ".join(
            f"{_words(_differing(c['settings'], arm['calibration']))}: {short(c['tokens_per_second'])} tokens/s"
            for c in arm["calibration"]
        )
        rows.append(
            f'<tr><td>{escape(arm["title"])}</td><td class="text">{escape(_words(arm["settings"]))}</td>'
            f'<td class="text">{escape(tried) or _NONE}</td></tr>'
        )
    table = _table(["arm", "settings", "tried, on a part of the work"], rows, text_from=1)
    options = {k: v for k, v in report["options"].items() if v not in (None, (), [])}
    return f'{table}<p class="note">Options: <code>{escape(_words(options))}</code></p>'


def environment_table(environment: Mapping[str, Any]) -> str:
    """The environment block, one row a part."""
    rows = []
    for key, value in environment.items():
        text = _words(value) if isinstance(value, dict) else _word(value)
        rows.append(f'<tr><td>{escape(key)}</td><td class="text">{escape(text)}</td></tr>')
    return _table(["", "environment"], rows, text_from=1)


def baseline_table(found: Sequence[Change]) -> str:
    """Tokens/s then and now, and the ratio to the loop of the same run, which a faster machine does not move."""
    head = ["scenario", "arm", "tokens/s then", "now", "change", "× loop then", "now"]
    rows = []
    for c in found:
        kind = "loss" if c.change < 0.97 else "win" if c.change > 1.03 else ""
        loop = [times(v) for v in c.versus_loop] if c.versus_loop else [_NONE, _NONE]
        rows.append(
            _row(
                [escape(c.scenario), escape(c.arm), *map(short, c.tokens_per_second)]
                + [f'<span class="{kind}">{c.change - 1:+.1%}</span>', *loop],
                "ours" if c.arm == "hf_paged" else "",
            )
        )
    return _table(head, rows)


def _ratio_cell(report: Report, name: str) -> str:
    return "" if name == ours(report) else _gain(pairs_of(report, name), spread=True)


def _gain(pairs: Sequence[float], *, spread: bool = False) -> str:
    ratio = median(pairs)
    if ratio is None:
        return _NONE
    kind = "loss" if ratio < 1 else "win"
    around = f" ({min(pairs):.2f}–{max(pairs):.2f})" if spread and len(pairs) > 1 else ""
    return f'<span class="{kind}">{times(ratio)}</span>{around}'


def _goodput(arm: Mapping[str, Any]) -> str:
    found = [r["goodput"] for r in arm["runs"] if r.get("goodput")]
    rate, share = median(g["requests_per_second"] for g in found), median(g["share"] for g in found)
    return _NONE if rate is None or share is None else f"{short(rate)} ({share:.0%})"


def _equality(report: Report, name: str) -> str:
    entries = [e for e in report["equality"] if e["arm"] == name]
    if not entries:
        return "reference" if any(e["reference"] == name for e in report["equality"]) else _NONE
    entry = entries[0]
    if entry["num_equal"] == entry["num_requests"]:
        return f"equal ({entry['num_requests']})"
    ties = f", {entry['near_ties']} near ties" if entry["near_ties"] else ""
    kind = "" if entry["equal"] else "loss"
    return f'<span class="{kind}">{entry["num_equal"]} of {entry["num_requests"]}{ties}</span>'


def _notes(report: Report) -> list[str]:
    lines = []
    for arm in report["arms"]:
        notes = [r.get("latency_note") for r in arm["runs"][:1]]
        error = median(r.get("relative_error") for r in arm["runs"])
        if error:
            notes.append(
                f"run on {arm['runs'][0]['requests_run']} of {report['workload']['num_requests']} requests, "
                f"standard error of its rate {error:.1%}"
            )
        if not arm["repeats_equal"]:
            notes.append("its own repeats gave different tokens")
        if text := "; ".join(n for n in notes if n):
            lines.append(f"{arm['title']}: {text}.")
    return lines


def _differing(settings: Mapping[str, Any], trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What tells a trial from the others."""
    return {k: v for k, v in settings.items() if any(t["settings"].get(k) != v for t in trials)} or dict(
        settings
    )


def _words(mapping: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_word(value)}" for key, value in mapping.items())


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _or_none(value: float | None, text: Any) -> str:
    return _NONE if value is None else str(text(value))


def _row(cells: Sequence[str], kind: str = "") -> str:
    opened = f'<tr class="{kind}">' if kind else "<tr>"
    return opened + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _table(
    head: Sequence[str], rows: Sequence[str], text_from: int | None = None, *, dense: bool = False
) -> str:
    kind = ' class="dense"' if dense else ""
    titles = "".join(
        f'<th class="text">{escape(h)}</th>'
        if text_from is not None and k >= text_from
        else f"<th>{escape(h)}</th>"
        for k, h in enumerate(head)
    )
    inside = f"<thead><tr>{titles}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll"><table{kind}>{inside}</table></div>'
