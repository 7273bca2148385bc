"""Writes docs/benchmarks.md, its chart and the figures in the README from the JSON files in benchmarks/results.

Nothing is measured and nothing is written by hand there: a test checks that what is committed is what this writes.

    python benchmarks/make_page.py            (or: make benchmarks-page)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_paged.comparison.numbers import duration, median, short, size, times
from hf_paged.comparison.reports import Report, arm_of, latency_of, rate_of, reports_in, title_of
from hf_paged.comparison.style import chart_style, style_of
from hf_paged.comparison.svg import Bar, bar_chart

ROOT = Path(__file__).resolve().parent.parent
RESULTS, PAGE, CHART, README = "benchmarks/results", "docs/benchmarks.md", "docs/benchmarks.svg", "README.md"
BEGIN, END = "<!-- figures: written by benchmarks/make_page.py -->", "<!-- end of figures -->"
_NAMES = {
    "loop": "`generate`, one prompt at a time",
    "padded": "`generate`, best padded batch",
    "padded_budget": "`generate`, padded by vLLM's protocol",
    "generate_batch": "transformers' `generate_batch`, best pool",
    "hf_paged": "hf_paged",
    "hf_paged_loop": "hf_paged, one prompt at a time",
}
_NONE = "–"


def texts(root: Path = ROOT) -> dict[Path, str]:
    """Every file this writes, with its text.

    Raises:
        ValueError: no full suite among the results, or a README without the marks between which figures go.
    """
    files = {
        path: json.loads(path.read_text(encoding="utf-8")) for path in sorted((root / RESULTS).glob("*.json"))
    }
    suites = [(path, data) for path, data in files.items() if is_suite(data) and data["suite"] == "full"]
    if not suites:
        raise ValueError(f"no result of `hf-paged bench --suite full` in {RESULTS}")
    source, suite = suites[-1]  # names end in the date
    readme = (root / README).read_text(encoding="utf-8")
    if BEGIN not in readme or END not in readme:
        raise ValueError(f"{README} needs the lines {BEGIN} and {END}")
    before, after = readme.split(BEGIN)[0], readme.split(END)[1]
    return {
        root / PAGE: page(files),
        root / CHART: chart(suite) + "\n",
        root / README: before + BEGIN + "\n" + figures(source.name, suite) + END + after,
    }


def is_suite(data: Any) -> bool:
    """Whether it is a result of `hf-paged bench`."""
    return isinstance(data, dict) and "suite" in data and "lines" in data


def lines_of(suite: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The lines that ran."""
    return [line for line in suite["lines"] if line.get("report")]


# --- the README -------------------------------------------------------------------------------------------------------


def figures(source: str, suite: Mapping[str, Any]) -> str:
    """The chart and the table of ratios, with the words that say how they were taken."""
    lines = lines_of(suite)
    counts = [line["report"]["workload"]["num_requests"] for line in lines]
    heads = [
        f"{line['title']}, {count} requests" if count > 1 else line["title"]
        for line, count in zip(lines, counts, strict=True)
    ]
    against = dict.fromkeys(j["against"] for line in lines for j in line["judgements"])
    rows = []
    for name in against:
        cells = [next((_ratio(j) for j in line["judgements"] if j["against"] == name), "") for line in lines]
        rows.append([_NAMES.get(name, name), *cells])
    cpu = suite["environment"]["cpu"]
    repeats = sorted({len(j["pairs"]) for line in lines for j in line["judgements"] if "pairs" in j})
    taken = " or ".join(map(str, repeats))
    return (
        f"![Output tokens per second, times those of generate() one prompt at a time]({CHART})\n\n"
        f"Output tokens/s over those of each other way; {cpu['usable_cores']} cores ({cpu['model']}, "
        f"{cpu['torch_capability']}), random weights.\nEvery arm obeys the same limits, and tokens "
        f"are compared. Medians of {taken} paired runs, with the least and the most:\n\n"
        + _table(["hf_paged against", *heads], rows)
        + f"\nAll figures, settings and latencies are in [{PAGE}]({PAGE}), made from the files in\n"
        f"[{RESULTS}]({RESULTS}), this chart from `{source}`.\n"
    )


def chart(suite: Mapping[str, Any]) -> str:
    """Each arm's tokens/s over the loop's, line by line."""
    bars = []
    for line in lines_of(suite):
        report = line["report"]
        if arm_of(report, "loop") is None:
            continue
        bars.append(Bar(line["title"], "heading"))
        for arm in report["arms"]:
            if arm["runs"]:
                ratio = median(_pairs(report, arm["name"], "loop")) or 0.0
                bars.append(Bar(arm["title"], style_of(arm["name"]), ratio))
    return bar_chart(
        bars,
        title="Output tokens per second over those of generate() one by one",
        text=times,
        style=chart_style(),
    )


def _pairs(report: Report, name: str, against: str) -> list[float]:
    first, second = arm_of(report, name), arm_of(report, against)
    if first is None or second is None:
        return []
    rates = {r["repeat"]: r["tokens_per_second"] for r in second["runs"]}
    return [r["tokens_per_second"] / rates[r["repeat"]] for r in first["runs"] if r["repeat"] in rates]


# --- the page ---------------------------------------------------------------------------------------------------------


def page(files: Mapping[Path, Any]) -> str:
    """docs/benchmarks.md."""
    parts = [
        "# Benchmarks\n\n"
        f"Written by `python benchmarks/make_page.py` from the JSON files in [{RESULTS}](../{RESULTS}); change "
        "those, not this page.\nHow each figure is taken, and with which command, is in "
        "[benchmarks/README.md](../benchmarks/README.md).\n\n"
        "![Output tokens per second, times those of generate() one prompt at a time](benchmarks.svg)\n"
    ]
    for path, data in files.items():
        parts.append(f"\n## {path.stem}\n\n{_environment(data)}")
        if is_suite(data):
            parts.append(_suite(data))
        elif isinstance(data, dict) and "table" in data:
            parts.append(
                f"{data['table']['about']}\n\n{_table(data['table']['head'], data['table']['rows'])}"
            )
        elif reports_in(data):
            parts += [_report(report, title_of(report)) for report in reports_in(data)]
        else:
            parts.append(f"Raw figures: [{path.name}](../{RESULTS}/{path.name}).\n")
    return "".join(parts)


def _environment(data: Any) -> str:
    facts = data.get("environment") if isinstance(data, dict) else None
    if facts is None and reports_in(data):
        facts = reports_in(data)[0]["environment"]
    if not facts:
        return ""
    cpu, packages = facts.get("cpu", {}), facts.get("packages", {})
    versions = ", ".join(
        f"{n} {packages[n]}" for n in ("hf-paged", "transformers", "torch") if packages.get(n)
    )
    gpus = ", ".join(str(g.get("name", "GPU")) for g in facts.get("gpus") or [])
    place = (
        gpus or f"{cpu.get('model', 'CPU')}, {cpu.get('usable_cores')} cores, {cpu.get('torch_capability')}"
    )
    return f"{place}; Python {facts.get('python')}, {versions}.\n\n"


def _suite(data: Mapping[str, Any]) -> str:
    rows = []
    for line in data["lines"]:
        if not line.get("report"):
            rows.append([line["title"], line.get("skipped") or "did not run", "", "", ""])
        for judgement in line["judgements"]:
            wanted = f"≥ {judgement['must']:g}" + (f", aim {judgement['aim']:g}" if judgement["aim"] else "")
            rows.append(
                [line["title"], _NAMES[judgement["against"]], _ratio(judgement), wanted, _verdict(judgement)]
            )
    summary = _table(["line", "hf_paged against", "ratio", "must be", ""], rows)
    return summary + "".join(_report(line["report"], line["title"]) for line in lines_of(data))


def _verdict(judgement: Mapping[str, Any]) -> str:
    return "reached" if judgement["ok"] else "**missed**"


def _ratio(judgement: Mapping[str, Any]) -> str:
    if "median" not in judgement:
        return f"none: {judgement.get('error', 'an arm did not run')}"
    return f"{times(judgement['median'])} ({judgement['minimum']:.1f}–{judgement['maximum']:.1f})"


def _report(report: Report, title: str) -> str:
    work = report["workload"]
    words = (
        f"{_requests(work['num_requests'])} ({work['name']}); prompts of {short(work['prompt_tokens']['mean'])} tokens "
        f"in the mean, outputs of {short(work['max_new_tokens']['mean'])}"
    )
    notes = "".join(f"; {note}" for note in work["notes"])
    head = [
        "arm",
        "tokens/s",
        "TTFT p50",
        "p99",
        "TPOT p50",
        "p99",
        "E2E p99",
        "goodput",
        "running",
        "KV waste",
    ]
    head += ["peak memory", "greedy tokens"]
    rows = []
    for arm in report["arms"]:
        if not arm["runs"]:
            rows.append([arm["title"], f"failed: {arm['error']}", *[""] * 10])
            continue
        latencies = (("ttft", "p50"), ("ttft", "p99"), ("tpot", "p50"), ("tpot", "p99"), ("e2e", "p99"))
        cells = [arm["title"], short(rate_of(arm))]
        cells += [_or_none(latency_of(arm, m, s), duration) for m, s in latencies]
        cells.append(
            _or_none(median((r.get("goodput") or {}).get("share") for r in arm["runs"]), "{:.0%}".format)
        )
        cells.append(_or_none(median(r.get("mean_running") for r in arm["runs"]), short))
        cells.append(_or_none(median(r.get("kv_waste") for r in arm["runs"]), "{:.1%}".format))
        cells.append(_or_none(median(r.get("peak_memory_bytes") for r in arm["runs"]), size))
        rows.append([*cells, _equality(report, arm["name"])])
    settings = "".join(f"- {a['title']}: {_words(a['settings'])}{_tried(a)}\n" for a in report["arms"])
    return f"\n### {title}\n\n{words}{notes}.\n\n{_table(head, rows)}\nSettings:\n\n{settings}"


def _requests(count: int) -> str:
    return "1 request" if count == 1 else f"{count} requests"


def _equality(report: Report, name: str) -> str:
    entry = next((e for e in report["equality"] if e["arm"] == name), None)
    if entry is None:
        return "reference" if any(e["reference"] == name for e in report["equality"]) else _NONE
    ties = f", {entry['near_ties']} near ties" if entry["near_ties"] else ""
    return f"{entry['num_equal']} of {entry['num_requests']} equal{ties}"


def _tried(arm: Mapping[str, Any]) -> str:
    return f"; the best of {len(arm['calibration'])} tried" if arm["calibration"] else ""


def _words(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {json.dumps(v) if isinstance(v, dict) else v}" for k, v in settings.items())


def _or_none(value: float | None, write: Any) -> str:
    return _NONE if value is None else str(write(value))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(c).replace("|", "\\|") for c in line) + " |\n" for line in lines)


def main() -> None:
    for path, text in texts().items():
        path.write_text(text, encoding="utf-8")
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
