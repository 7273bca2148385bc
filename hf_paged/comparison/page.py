"""The report as one HTML page: nothing is loaded from elsewhere, every text is escaped, no script runs."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from hf_paged.comparison.numbers import median, short, times
from hf_paged.comparison.page_charts import legend, rate_charts, throughput, time_charts
from hf_paged.comparison.page_tables import (
    arm_table,
    baseline_table,
    environment_table,
    rate_table,
    settings_table,
    summary_table,
)
from hf_paged.comparison.reports import Report, changes, pairs_of, title_of
from hf_paged.comparison.style import page_style

_HOW = (
    "Every arm gets the same requests and limits, decodes greedily and takes turns with the others in one process; "
    "ratios are of neighbouring runs. Tokens/s are asked-for output tokens over the time of the whole run. TTFT: "
    "arrival to first token. TPOT: mean time between the later tokens of a request. ITL: single gaps of all requests. "
    "E2E: arrival to the whole answer. Without arrivals all requests are there at the start, so TTFT and E2E hold the "
    "wait for earlier ones. KV waste: share of the room taken that held no wanted token."
)


def render_page(reports: Sequence[Report], baseline: Sequence[Report] | None = None) -> str:
    """The page of one or several reports, as text.

    Args:
        reports: as `CompareReport.to_dict` gives them.
        baseline: of an earlier run, to compare with.

    Raises:
        ValueError: no report.
    """
    if not reports:
        raise ValueError("no report to show")
    title = "hf_paged compared: " + ", ".join(dict.fromkeys(str(r["model"]["name"]) for r in reports))
    body = [_head(reports), summary_table(reports) if len(reports) > 1 else _headline(reports[0])]
    if baseline is not None:
        body.append(_baseline(reports, baseline))
    body += [_section(report, many=len(reports) > 1) for report in reports]
    body.append(_tail(reports))
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{page_style()}</style></head><body><main>"
        + "".join(body)
        + "</main></body></html>\n"
    )


def _head(reports: Sequence[Report]) -> str:
    models = dict.fromkeys(_model_words(r["model"]) for r in reports)
    cpu = reports[0]["environment"].get("cpu", {})
    gpus = reports[0]["environment"].get("gpus") or []
    place = (
        gpus[0].get("name", "GPU")
        if gpus and reports[0]["model"]["device"] != "cpu"
        else cpu.get("model", "CPU")
    )
    packages = reports[0]["environment"].get("packages", {})
    versions = ", ".join(
        f"{n} {packages[n]}" for n in ("hf-paged", "transformers", "torch") if packages.get(n)
    )
    cores = f", {cpu['usable_cores']} cores" if cpu.get("usable_cores") and not gpus else ""
    return (
        "<h1>The same model, with and without hf_paged</h1>"
        f'<p class="sub">{escape("; ".join(models))}<br>{escape(str(place))}{escape(cores)} · {escape(versions)}</p>'
    )


def _model_words(model: Any) -> str:
    count = f"{model['parameters'] / 1e6:.0f} M parameters, " if model.get("parameters") else ""
    return f"{model['name']}: {model['class']}, {count}{model['dtype']} on {model['device']}"


def _headline(report: Report) -> str:
    """One sentence: the gain over each way that transformers offers, losses included."""
    parts = []
    for arm in report["arms"]:
        ratio = median(pairs_of(report, arm["name"]))
        if ratio is not None and arm["name"] != "hf_paged_loop":
            kind = "loss" if ratio < 1 else "win"
            parts.append(f'<span class="{kind}">{times(ratio)}</span> of {escape(arm["title"])}')
    return f'<p class="headline">Tokens per second with hf_paged: {", ".join(parts)}.</p>' if parts else ""


def _baseline(reports: Sequence[Report], baseline: Sequence[Report]) -> str:
    found = changes(baseline, reports)
    if not found:
        return '<p class="note">The baseline holds no run of the same model and work.</p>'
    return "<h2>Against the baseline</h2>" + baseline_table(found)


def _section(report: Report, *, many: bool) -> str:
    work, scenario = report["workload"], report.get("scenario") or {}
    what = f"{scenario['what']}. " if scenario.get("what") else ""
    described = (
        f"{work['num_requests']} requests; prompts of {short(work['prompt_tokens']['mean'])} tokens in the mean, "
        f"{work['prompt_tokens']['max']} at most; outputs of {short(work['max_new_tokens']['mean'])}, "
        f"{work['max_new_tokens']['max']} at most."
    )
    source = f" Lengths: {scenario['lengths']}." if scenario.get("lengths") else ""
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in work["notes"])
    unfinished = (
        "" if report["complete"] else '<p class="loss">Not complete: an arm failed or the run was ended.</p>'
    )
    charts = throughput(report) + time_charts(report)
    rates = ""
    if report.get("rates"):
        rates = f'<h3>Under Poisson arrivals</h3><div class="grid2">{rate_charts(report)}</div>{rate_table(report)}'
    heading = title_of(report) if many else f"Workload: {title_of(report)}"
    return (
        f'<section><h2>{escape(heading)}</h2><p class="sub">{escape(what + described + source)}</p>{notes}'
        f'{unfinished}{legend(report)}<div class="grid2">{charts}</div>{arm_table(report)}{rates}'
        f"<details><summary>Settings of each arm, and what was tried</summary>{settings_table(report)}</details>"
        "</section>"
    )


def _tail(reports: Sequence[Report]) -> str:
    return (
        f'<h2>How this was measured</h2><p class="sub">{escape(_HOW)}</p>'
        f"<details open><summary>Environment</summary>{environment_table(reports[0]['environment'])}</details>"
    )
