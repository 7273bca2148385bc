"""Charts as SVG text, coloured by the classes of `style.py`: bars, and lines over a numeric axis.

Nothing here loads anything; every text is escaped; each mark has a `<title>`, which browsers show on hovering.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

from hf_paged.comparison.numbers import nice_step, plain, short

_WIDTH = 560
_ROW = 30
_LINE_HEIGHT = 270
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 14, 44
_LABEL_WIDTH = 190


@dataclass(frozen=True)
class Bar:
    """One bar. `style` is the class that colours it, `note` comes after the value, `spread` is a whisker.

    With style "heading" it is no bar but a line of text over those that follow.
    """

    label: str
    style: str
    value: float = 0.0
    note: str = ""
    spread: tuple[float, float] | None = None


@dataclass(frozen=True)
class Line:
    """One line through `points`; a step line keeps each value until the next point."""

    label: str
    style: str
    points: Sequence[tuple[float, float]]
    step: bool = False
    marks: bool = False


def bar_chart(
    bars: Sequence[Bar], *, title: str, text: Callable[[float], str] = short, style: str = ""
) -> str:
    """Horizontal bars from zero, in the given order, each with its value.

    Args:
        bars: from top to bottom.
        title: what is shown, for those who cannot see it.
        text: how a value is written.
        style: the text of a `<style>` to put inside, for an SVG that stands alone.
    """
    most = max((max(b.value, b.spread[1] if b.spread else 0) for b in bars), default=0) or 1
    room = _WIDTH - _LABEL_WIDTH - 150
    parts = []
    for row, bar in enumerate(bars):
        y = row * _ROW + 4
        if bar.style == "heading":
            parts.append(f'<text class="heading" x="0" y="{y + 18}">{escape(bar.label)}</text>')
            continue
        width = max(bar.value / most * room, 1)
        middle = y + (_ROW - 8) / 2
        end = width
        parts.append(
            f'<text class="label" x="{_LABEL_WIDTH - 10}" y="{middle + 4:.1f}" text-anchor="end">'
            f"{escape(bar.label)}</text>"
            f'<rect class="{escape(bar.style)}" x="{_LABEL_WIDTH}" y="{y}" width="{width:.1f}" '
            f'height="{_ROW - 8}" rx="2"><title>{escape(bar.label)}: {escape(text(bar.value))}</title></rect>'
        )
        if bar.spread is not None:
            low, high = (value / most * room for value in bar.spread)
            end = max(width, high)
            parts.append(
                f'<path class="whisker" d="M{_LABEL_WIDTH + low:.1f} {middle:.1f}H{_LABEL_WIDTH + high:.1f}"/>'
            )
        note = f' <tspan class="muted">{escape(bar.note)}</tspan>' if bar.note else ""
        parts.append(
            f'<text class="value" x="{_LABEL_WIDTH + end + 7:.1f}" y="{middle + 4:.1f}">'
            f"{escape(text(bar.value))}{note}</text>"
        )
    return _svg(_WIDTH, len(bars) * _ROW + 4, title, "".join(parts), style)


def line_chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str,
    y_label: str,
    x_text: Callable[[float], str] = plain,
    y_text: Callable[[float], str] = plain,
    log_y: bool = False,
    top: float | None = None,
) -> str:
    """Lines over a linear x axis from 0; y from 0, or logarithmic over whole powers of ten.

    Args:
        lines: with at least one point among them; on a logarithmic axis all values must be above 0.
        title: what is shown, for those who cannot see it.
        x_label, y_label: what stands at the axes.
        x_text, y_text: how values are written.
        log_y: whether y is logarithmic.
        top: the least that the y axis reaches up to.
    """
    points = [p for line in lines for p in line.points]
    right = max(x for x, _ in points) or 1
    values = [y for _, y in points]
    if log_y:
        low = math.floor(math.log10(min(values)) + 1e-9)
        high = max(math.ceil(math.log10(max(values)) - 1e-9), low + 1)
        ticks = [10.0**k for k in range(low, high + 1)]
    else:
        most = max(*values, top or 0, 1e-12)
        step = nice_step(most, 4)
        ticks = [step * k for k in range(math.ceil(most / step - 1e-9) + 1)]
    plot_width, plot_height = _WIDTH - _LEFT - _RIGHT, _LINE_HEIGHT - _TOP - _BOTTOM

    def x_of(x: float) -> float:
        return _LEFT + x / right * plot_width

    def y_of(y: float) -> float:
        share = (math.log10(y) - low) / (high - low) if log_y else y / ticks[-1]
        return _TOP + (1 - share) * plot_height

    parts = []
    for tick in ticks:
        y = y_of(tick)
        parts.append(
            f'<path class="grid" d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}"/>'
            f'<text class="tick" x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{escape(y_text(tick))}</text>'
        )
    x_step = nice_step(right, 5)
    for k in range(math.floor(right / x_step + 1e-9) + 1):
        parts.append(
            f'<text class="tick" x="{x_of(k * x_step):.1f}" y="{_LINE_HEIGHT - _BOTTOM + 17}" '
            f'text-anchor="middle">{escape(x_text(k * x_step))}</text>'
        )
    parts.append(
        f'<text class="axis" x="{_LEFT + plot_width / 2}" y="{_LINE_HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_label)}</text>"
        f'<text class="axis" transform="translate(13 {_TOP + plot_height / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}</text>'
    )
    for line in lines:
        parts.append(_drawn(line, x_of, y_of, x_text, y_text))
    return _svg(_WIDTH, _LINE_HEIGHT, title, "".join(parts))


def _drawn(
    line: Line,
    x_of: Callable[[float], float],
    y_of: Callable[[float], float],
    x_text: Callable[[float], str],
    y_text: Callable[[float], str],
) -> str:
    path = ""
    for x, y in line.points:
        spot = f"{x_of(x):.1f} {y_of(y):.1f}"
        if not path:
            path = f"M{spot}"
        elif line.step:
            path += f"H{x_of(x):.1f}V{y_of(y):.1f}"
        else:
            path += f"L{spot}"
    name, style = escape(line.label), escape(line.style)
    drawn = f'<path class="line {style}" d="{path}"><title>{name}</title></path>'
    if line.marks:
        drawn += "".join(
            f'<circle class="dot {style}" cx="{x_of(x):.1f}" cy="{y_of(y):.1f}" r="4">'
            f"<title>{name}: {escape(y_text(float(short(y))))} at {escape(x_text(float(short(x))))}</title></circle>"
            for x, y in line.points
        )
    return drawn


def _svg(width: int, height: int, title: str, body: str, style: str = "") -> str:
    inside = f"<style>{style}</style>" if style else ""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(title)}">{inside}{body}</svg>'
    )
