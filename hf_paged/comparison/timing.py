"""When each request's tokens came: latency percentiles, and how many requests met a limit.

All times are seconds from the start of a run. Names as elsewhere in the field: TTFT is arrival to first token, TPOT the
mean time between the later tokens of one request, ITL the single gaps of all requests, E2E arrival to the whole answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

#: Limits of goodput, seconds: an answer that starts within 2 s and then comes faster than people read (300 words a
#: minute are 6 to 7 tokens a second).
DEFAULT_LIMITS: dict[str, float] = {"ttft": 2.0, "tpot": 0.15}
MEASURES = ("ttft", "tpot", "itl", "e2e")
_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class RequestTiming:
    """One request. `token_times` may be empty where single tokens were not seen; `first_token` None likewise."""

    index: int
    arrival: float
    first_token: float | None
    end: float
    num_tokens: int
    token_times: tuple[float, ...] = ()

    @property
    def ttft(self) -> float | None:
        return None if self.first_token is None else self.first_token - self.arrival

    @property
    def tpot(self) -> float | None:
        """None for an answer of one token: it has no gap."""
        if self.num_tokens < 2 or self.first_token is None:
            return None
        last = self.token_times[-1] if self.token_times else self.end
        return (last - self.first_token) / (self.num_tokens - 1)

    @property
    def e2e(self) -> float:
        return self.end - self.arrival

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.token_times, self.token_times[1:], strict=False)]

    def meets(self, limits: Mapping[str, float]) -> bool:
        """Whether every limit holds; what the request has no value for (TPOT of one token) counts as met."""
        values = {name: getattr(self, name) for name in limits}
        return all(v is None or v <= limits[name] for name, v in values.items())


def summarise(timings: Sequence[RequestTiming]) -> dict[str, dict[str, float]]:
    """Mean and percentiles of each of `MEASURES` for which there are values."""
    columns: dict[str, list[float]] = {
        "ttft": _present(t.ttft for t in timings),
        "tpot": _present(t.tpot for t in timings),
        "itl": [gap for t in timings for gap in t.gaps],
        "e2e": [t.e2e for t in timings],
    }
    return {name: _statistics(values) for name, values in columns.items() if values}


def goodput(
    timings: Sequence[RequestTiming], limits: Mapping[str, float], seconds: float
) -> dict[str, Any] | None:
    """Requests a second that met all `limits`, and their share. None where a limit's time was not measured.

    Args:
        timings: of the requests that were run.
        limits: seconds, by "ttft", "tpot" and "e2e".
        seconds: what the run took.
    """
    if not timings or ("ttft" in limits and any(t.ttft is None for t in timings)):
        return None
    met = sum(t.meets(limits) for t in timings)
    return {"requests_per_second": met / seconds, "share": met / len(timings), "limits": dict(limits)}


def check_limits(limits: Mapping[str, float]) -> dict[str, float]:
    """`limits` as they are.

    Raises:
        ValueError: no limit, an unknown name, or one that is not positive.
    """
    known = ("ttft", "tpot", "e2e")
    for name, value in limits.items():
        if name not in known:
            raise ValueError(f"limit {name!r}: must be one of {', '.join(known)}")
        if not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"limit {name}={value!r}: must be seconds above 0")
    if not limits:
        raise ValueError(f"limits must not be empty: give some of {', '.join(known)}")
    return dict(limits)


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks, as numpy does it. `values` need not be sorted, but not empty."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def _statistics(values: Sequence[float]) -> dict[str, float]:
    found = {f"p{p}": percentile(values, p) for p in _PERCENTILES}
    return {"mean": sum(values) / len(values), **found}


def _present(values: Iterable[float | None]) -> list[float]:
    return [v for v in values if v is not None]
