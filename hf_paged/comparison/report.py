"""What a comparison found: plain data, as JSON and as a terminal table.

`benchmarks/README.md` documents the JSON.
"""

from __future__ import annotations

import json
import os
import re
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_paged.comparison.arms import ArmRun
from hf_paged.comparison.equality import Equality
from hf_paged.comparison.timing import goodput, summarise

if TYPE_CHECKING:
    from rich.table import Table

SCHEMA_VERSION = 2
_NUMBER_LIST = re.compile(r"\[\n\s+([-+.\deE]+(?:,\n\s+[-+.\deE]+)*)\n\s+\]")


@dataclass
class RunRow:
    """One timed run of an arm. Times in seconds, memory in bytes over the start of the run."""

    repeat: int
    seconds: float
    tokens: int
    tokens_per_second: float
    relative_error: float | None
    requests_run: int
    first_token_seconds: float | None
    first_token_note: str | None
    peak_memory_bytes: int | None
    memory_method: str
    kv_waste: float | None
    mean_running: float | None
    peak_kv_bytes: int | None
    latency: dict[str, dict[str, float]]  # of `hf_paged.comparison.timing.MEASURES`
    latency_note: str | None
    goodput: dict[str, Any] | None
    extra: dict[str, Any]

    @classmethod
    def of(
        cls,
        repeat: int,
        run: ArmRun,
        peak_memory_bytes: int | None,
        memory_method: str,
        limits: dict[str, float],
    ) -> RunRow:
        return cls(
            repeat=repeat,
            seconds=run.seconds,
            tokens=run.num_tokens,
            tokens_per_second=run.tokens_per_second,
            relative_error=run.relative_error,
            requests_run=len(run.outputs),
            first_token_seconds=run.first_token_seconds,
            first_token_note=run.first_token_note,
            peak_memory_bytes=peak_memory_bytes,
            memory_method=memory_method,
            kv_waste=run.kv_waste,
            mean_running=run.mean_running,
            peak_kv_bytes=None if run.timeline is None else run.timeline.peak_kv_bytes,
            latency=summarise(run.timings),
            latency_note=run.timings_note,
            goodput=goodput(run.timings, limits, run.seconds),
            extra=run.extra,
        )


@dataclass
class ArmReport:
    """An arm with its settings and runs. `error` is what ended it, if anything did; `timeline` is of the first run."""

    name: str
    title: str
    settings: dict[str, Any] = field(default_factory=dict)
    runs: list[RunRow] = field(default_factory=list)
    calibration: list[dict[str, Any]] = field(default_factory=list)
    repeats_equal: bool = True
    timeline: dict[str, Any] | None = None
    error: str | None = None

    def median(self, column: str) -> float | None:
        values = [getattr(r, column) for r in self.runs if getattr(r, column) is not None]
        return statistics.median(values) if values else None

    def latency(self, measure: str, statistic: str) -> float | None:
        """Median over the runs of, say, the "p99" of "ttft", in seconds."""
        values = [r.latency[measure][statistic] for r in self.runs if measure in r.latency]
        return statistics.median(values) if values else None


@dataclass
class RateRow:
    """One arm under Poisson arrivals of `rate` requests a second."""

    arm: str
    rate: float
    requests: int
    seconds: float
    tokens_per_second: float
    latency: dict[str, dict[str, float]]
    goodput: dict[str, Any] | None
    mean_running: float | None
    #: A quarter of the requests had no token yet when the last one came: it falls behind, and is not run faster.
    saturated: bool


@dataclass
class Ratio:
    """Tokens/s of `arm` over those of `against`, pair by pair of neighbouring runs."""

    arm: str
    against: str
    pairs: list[float]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {
            "median": statistics.median(self.pairs),
            "minimum": min(self.pairs),
            "maximum": max(self.pairs),
        }


@dataclass
class CompareReport:
    """The whole comparison. `complete` is False while it runs."""

    model: dict[str, Any]
    workload: dict[str, Any]
    options: dict[str, Any]
    environment: dict[str, Any]
    scenario: dict[str, str] | None = None
    arms: list[ArmReport] = field(default_factory=list)
    rates: list[RateRow] = field(default_factory=list)
    equality: list[Equality] = field(default_factory=list)
    complete: bool = False

    def arm(self, name: str) -> ArmReport | None:
        """The arm of that name, or None if it was not part of the comparison."""
        return next((a for a in self.arms if a.name == name), None)

    def ratio(self, against: str, arm: str = "hf_paged") -> Ratio | None:
        """Paired ratio of tokens/s, or None without a pair of runs."""
        first, second = self.arm(arm), self.arm(against)
        if first is None or second is None:
            return None
        rates = {r.repeat: r.tokens_per_second for r in second.runs}
        pairs = [r.tokens_per_second / rates[r.repeat] for r in first.runs if r.repeat in rates]
        return Ratio(arm, against, pairs) if pairs else None

    @property
    def ratios(self) -> list[Ratio]:
        """hf_paged against each other arm."""
        found = [self.ratio(a.name) for a in self.arms if a.name != "hf_paged"]
        return [r for r in found if r is not None]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able; the schema is documented in benchmarks/README.md."""
        return {
            "schema_version": SCHEMA_VERSION,
            "complete": self.complete,
            "model": self.model,
            "scenario": self.scenario,
            "workload": self.workload,
            "options": self.options,
            "environment": self.environment,
            "arms": [asdict(a) for a in self.arms],
            "rates": [asdict(r) for r in self.rates],
            "ratios": [r.to_dict() for r in self.ratios],
            "equality": [e.to_dict() for e in self.equality],
        }

    def save(self, path: str | Path) -> None:
        """Writes the JSON; a reader never sees half a file."""
        write_json(path, self.to_dict())

    def table(self) -> Table:
        """The rich table of the report."""
        from hf_paged.comparison.tables import comparison_table

        return comparison_table(self)

    def __str__(self) -> str:
        from hf_paged.comparison.tables import render

        return render(self)


def write_json(path: str | Path, data: dict[str, Any]) -> None:
    """Writes `data` beside `path` and moves it there. Lists of numbers take one line: a timeline has hundreds."""
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    # Strings hold no raw line breaks in JSON, so the pattern meets lists only.
    text = _NUMBER_LIST.sub(lambda m: "[" + " ".join(m[1].split()) + "]", json.dumps(data, indent=2))
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)
