"""Latency against rate: the arms of a comparison as servers under Poisson arrivals.

Each arm serves the first requests of the workload with the settings it has in the comparison, from a warm start: `loop`
and the padded arms take what waits whenever they are free; generate_batch and hf_paged get each request as it comes.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from hf_paged.comparison.arms import Arm, ArmContext, ArmRun, Progress
from hf_paged.comparison.options import Options
from hf_paged.comparison.report import CompareReport, RateRow
from hf_paged.comparison.scenarios import poisson_arrivals
from hf_paged.comparison.timing import RequestTiming, goodput, summarise

_BEHIND = 0.25
_FEWEST_BEHIND = 4  # in a small sample a burst before the last arrival is no sign


class _Server(Protocol):
    def serve(self, arrivals: list[float], progress: Progress) -> ArmRun: ...


@dataclass
class ServedRates:
    """The part of a comparison that runs every arm at every rate, slowest rate first."""

    context: ArmContext
    options: Options
    report: CompareReport
    make_progress: Callable[[str, Arm], Progress]
    updated: Callable[[], None]

    def run(self, arms: Mapping[str, Arm]) -> None:
        """Appends to the report's rates. An arm that fell behind, or failed, is not run at higher rates."""
        behind: set[str] = set()
        count = min(self.options.rate_requests, len(self.context.requests))
        for rate in self._rates():
            arrivals = poisson_arrivals(count, rate, self.options.seed)
            for name, arm in arms.items():
                entry = self.report.arm(name)
                # A sample of requests is no traffic: of loop and padded arms the settings are taken, not the sample.
                if name in behind or entry is None or entry.error or not hasattr(arm, "serve"):
                    continue
                try:
                    row = self._serve(name, arm, rate, arrivals)
                except Exception as error:
                    entry.error = f"{type(error).__name__}: {error}"
                    continue
                self.report.rates.append(row)
                self.updated()
                if row.saturated:
                    behind.add(name)

    def _rates(self) -> list[float]:
        if self.options.rates:
            return sorted(self.options.rates)
        paged = self.report.arm("hf_paged")
        if not self.options.rate_fractions or paged is None or not paged.runs:
            return []
        most = statistics.median(r.requests_run / r.seconds for r in paged.runs)
        return [fraction * most for fraction in sorted(self.options.rate_fractions)]

    def _serve(self, name: str, arm: Any, rate: float, arrivals: list[float]) -> RateRow:
        server: _Server = arm
        run = server.serve(arrivals, self.make_progress(f"{name} at {rate:.3g}/s", arm))
        return RateRow(
            arm=name,
            rate=rate,
            requests=len(arrivals),
            seconds=run.seconds,
            tokens_per_second=run.tokens_per_second,
            latency=summarise(run.timings),
            goodput=goodput(run.timings, self.options.limits, run.seconds),
            mean_running=run.mean_running,
            saturated=fell_behind(run.timings),
        )


def fell_behind(timings: list[RequestTiming]) -> bool:
    """Whether a quarter of the requests had no token yet when the last one arrived."""
    last = max(t.arrival for t in timings)
    waiting = sum((t.end if t.first_token is None else t.first_token) > last for t in timings)
    # The last one itself never has one.
    return waiting - 1 >= max(_BEHIND * len(timings), _FEWEST_BEHIND)
