"""Numbers as people read them: three digits that mean something, with a unit that fits."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable

_BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def short(value: float) -> str:
    """Three significant digits, whole above 100: 0.0123, 4.57, 12.3, 1234."""
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else str(value)
    digits = max(2 - math.floor(math.log10(abs(value))), 0)
    return f"{value:.{digits}f}"


def duration(seconds: float) -> str:
    """Milliseconds below one second."""
    return f"{short(seconds * 1000)} ms" if abs(seconds) < 1 else f"{short(seconds)} s"


def size(num_bytes: float) -> str:
    """In the largest unit of 1024 that leaves at least 1."""
    for unit in _BYTE_UNITS:
        if abs(num_bytes) < 1024 or unit == _BYTE_UNITS[-1]:
            break
        num_bytes /= 1024
    return f"{short(num_bytes)} {unit}"


def plain(value: float) -> str:
    """A tick of an axis: no more digits than it needs."""
    return f"{value:.10g}"


def byte_unit(most: float) -> tuple[int, str]:
    """The unit for an axis that reaches up to `most` bytes: its size and its name."""
    power = 0
    while most >= 1024 ** (power + 1) and power < len(_BYTE_UNITS) - 1:
        power += 1
    return 1024**power, _BYTE_UNITS[power]


def times(ratio: float) -> str:
    """A ratio with two decimals below ten, one from there on: 1.84×, 12.9×."""
    return f"{ratio:.2f}×" if ratio < 10 else f"{ratio:.1f}×"


def median(values: Iterable[float | None]) -> float | None:
    """Of the values that are there; None without any."""
    present = [v for v in values if v is not None]
    return statistics.median(present) if present else None


def nice_step(span: float, parts: int) -> float:
    """1, 2 or 5 times a power of ten: the smallest of which `parts` cover `span`."""
    raw = span / parts
    power = 10.0 ** math.floor(math.log10(raw))
    return next(power * k for k in (1, 2, 5, 10) if power * k >= raw * (1 - 1e-9))
