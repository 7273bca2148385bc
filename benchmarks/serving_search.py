"""Which rate to try next, from the windows there are: the highest that a server holds, to within an eighth."""

from __future__ import annotations

import math
from typing import Any

#: Rates held and missed this near together end the search.
CLOSE = 1.125
_STEP = 1.25


def next_rate(windows: list[dict[str, Any]], start: float) -> float | None:
    """The next rate to try; None once the highest is known: between one held and one missed that are close.

    A rate that was missed though the queue did not grow is tried once more: a machine may stall for some seconds.

    Args:
        windows: of one server so far, with their "rate", "held" and "queue_grows".
        start: the first rate. From there steps grow until a rate is held and one is not, which then close in.
    """
    if not windows:
        return start
    doubtful = [
        rate for rate in _rates(windows) if not _is_held(windows, rate) and not _is_missed(windows, rate)
    ]
    held, missed = bounds(windows)
    if doubtful and held < doubtful[-1] < missed:
        return doubtful[-1]
    if held and missed < math.inf:
        return None if missed / held <= CLOSE else math.sqrt(held * missed)
    step = _STEP ** len(_rates(windows))
    return held * step if held else missed / step


def highest(windows: list[dict[str, Any]]) -> float | None:
    """The highest rate that was held; None if there is none."""
    return bounds(windows)[0] or None


def bounds(windows: list[dict[str, Any]]) -> tuple[float, float]:
    """The highest rate held below all that were missed (0: none), and the lowest missed (infinity: none)."""
    rates = _rates(windows)
    missed = min((rate for rate in rates if _is_missed(windows, rate)), default=math.inf)
    return max((rate for rate in rates if _is_held(windows, rate) and rate < missed), default=0.0), missed


def _rates(windows: list[dict[str, Any]]) -> list[float]:
    return list(dict.fromkeys(w["rate"] for w in windows))


def _is_held(windows: list[dict[str, Any]], rate: float) -> bool:
    return any(w["held"] for w in windows if w["rate"] == rate)


def _is_missed(windows: list[dict[str, Any]], rate: float) -> bool:
    tried = [w for w in windows if w["rate"] == rate]
    return not _is_held(windows, rate) and (len(tried) > 1 or tried[0]["queue_grows"])
