"""Reports read back from JSON, of one comparison, of several scenarios or of `hf-paged bench`, and how they compare.

What shows reports (page, plots, documents) works on these plain dicts, so that an earlier run is shown like a new one.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_paged.comparison.numbers import median
from hf_paged.comparison.report import SCHEMA_VERSION

Report = Mapping[str, Any]

#: The latencies that tables show, in order, and how their columns are headed.
LATENCIES = (
    ("ttft", "p50"),
    ("ttft", "p99"),
    ("tpot", "p50"),
    ("tpot", "p99"),
    ("itl", "p99"),
    ("e2e", "p50"),
    ("e2e", "p99"),
)
LATENCY_HEAD = ("TTFT p50", "p99", "TPOT p50", "p99", "ITL p99", "E2E p50", "p99")


def bundle(reports: Sequence[Report]) -> dict[str, Any]:
    """What is saved for several scenarios: one file with all."""
    return {"schema_version": SCHEMA_VERSION, "reports": list(reports)}


def load_reports(path: str | Path) -> list[Report]:
    """The reports of a file that `hf-paged compare` or `hf-paged bench` wrote.

    Raises:
        ValueError: it cannot be read, or holds no report.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"cannot read a report from {path}: {error}") from None
    found = reports_in(data)
    if not found:
        raise ValueError(f"{path} holds no report of hf-paged compare or hf-paged bench")
    return found


def reports_in(data: Any) -> list[Report]:
    """The reports in parsed JSON of any of the three forms; none if it is something else."""
    if not isinstance(data, dict):
        return []
    if "arms" in data and "workload" in data:
        return [data]
    if "reports" in data:
        return [r for part in data["reports"] for r in reports_in(part)]
    lines = data.get("lines")
    if not isinstance(lines, list):
        return []
    return [line["report"] for line in lines if isinstance(line, dict) and line.get("report")]


def arm_of(report: Report, name: str) -> Mapping[str, Any] | None:
    """The arm of that name, if it is in the report and ran."""
    return next((a for a in report["arms"] if a["name"] == name and a["runs"]), None)


def rate_of(arm: Mapping[str, Any]) -> float:
    """Median tokens/s of an arm that ran."""
    value = median(r["tokens_per_second"] for r in arm["runs"])
    assert value is not None, "an arm without runs has no rate"
    return value


def ours(report: Report) -> str:
    """The arm whose ratios count: hf_paged, or where only that ran, the loop on the enabled model."""
    return "hf_paged_loop" if arm_of(report, "hf_paged") is None else "hf_paged"


def pairs_of(report: Report, against: str) -> list[float]:
    """Tokens/s of our arm over those of `against`, run by run; empty without a pair."""
    first, second = arm_of(report, ours(report)), arm_of(report, against)
    if first is None or second is None or first is second:
        return []
    rates = {r["repeat"]: r["tokens_per_second"] for r in second["runs"]}
    return [r["tokens_per_second"] / rates[r["repeat"]] for r in first["runs"] if r["repeat"] in rates]


def latency_of(arm: Mapping[str, Any], measure: str, statistic: str) -> float | None:
    """Median over the runs of one latency, seconds."""
    return median(r.get("latency", {}).get(measure, {}).get(statistic) for r in arm["runs"])


def title_of(report: Report) -> str:
    """What a reader calls the work of a report: its scenario, or its lengths."""
    return str((report.get("scenario") or {}).get("name") or report["workload"]["name"])


@dataclass(frozen=True)
class Change:
    """One arm of one scenario, before and now. `versus_loop` are ratios to the loop of the same run: a faster machine
    moves `tokens_per_second`, not these."""

    scenario: str
    model: str
    arm: str
    tokens_per_second: tuple[float, float]
    versus_loop: tuple[float, float] | None

    @property
    def change(self) -> float:
        """Now over before."""
        return self.tokens_per_second[1] / self.tokens_per_second[0]


def changes(baseline: Iterable[Report], now: Iterable[Report]) -> list[Change]:
    """The arms that both have for the same model, dtype and work (name, number of requests, mean lengths)."""
    before = {_key(r): r for r in baseline}
    found = []
    for report in now:
        old = before.get(_key(report))
        if old is None:
            continue
        for arm in report["arms"]:
            was = arm_of(old, arm["name"])
            if was is None or not arm["runs"]:
                continue
            both = (rate_of(was), rate_of(arm))
            loops = (arm_of(old, "loop"), arm_of(report, "loop"))
            relative = None
            if loops[0] is not None and loops[1] is not None and arm["name"] != "loop":
                relative = (both[0] / rate_of(loops[0]), both[1] / rate_of(loops[1]))
            found.append(Change(title_of(report), report["model"]["name"], arm["name"], both, relative))
    return found


def _key(report: Report) -> tuple[Any, ...]:
    work, model = report["workload"], report["model"]
    means = (round(work["prompt_tokens"]["mean"], 3), round(work["max_new_tokens"]["mean"], 3))
    return (model["name"], model["dtype"], model["device"], work["name"], work["num_requests"], *means)
