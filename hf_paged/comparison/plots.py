"""The charts of a report as PNG files, by matplotlib, which the extra `plots` brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hf_paged.comparison.reports import Report, rate_of, title_of
from hf_paged.comparison.style import ARM_COLOURS, OTHER_COLOUR

_MIB = 1 << 20


def save_plots(reports: Sequence[Report], folder: str | Path) -> list[Path]:
    """Draws throughput, running batch, KV use and latency against rate, one file each a report and chart.

    Args:
        reports: as `CompareReport.to_dict` gives them.
        folder: is made where it does not exist.

    Returns:
        The files. A chart without data is left out.

    Raises:
        ValueError: matplotlib is not installed.
    """
    figure = _figure_class()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for number, report in enumerate(reports):
        name = f"{number + 1}-{title_of(report)}" if len(reports) > 1 else title_of(report)
        name = "".join(c if c.isalnum() or c in "-_" else "_" for c in name)
        for kind, draw in (
            ("throughput", _throughput),
            ("running", _running),
            ("kv", _kv),
            ("ttft-against-rate", _latency_by_rate),
        ):
            sheet = figure(figsize=(7.2, 4.2), layout="constrained")
            if draw(sheet.add_subplot(), report):
                path = folder / f"{name}-{kind}.png"
                sheet.savefig(path, dpi=150)
                files.append(path)
    return files


def require_matplotlib() -> None:
    """Nothing, where plots can be drawn.

    Raises:
        ValueError: matplotlib is not installed.
    """
    _figure_class()


def _figure_class() -> Any:
    try:
        # The object interface: no window system and no state of pyplot is touched.
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("plots need matplotlib: pip install 'hf-paged[plots]'") from None
    return Figure


def _throughput(axes: Any, report: Report) -> bool:
    arms = [a for a in report["arms"] if a["runs"]][::-1]
    if not arms:
        return False
    bars = axes.barh([a["title"] for a in arms], [rate_of(a) for a in arms], color=[_colour(a) for a in arms])
    axes.bar_label(bars, fmt="%.1f", padding=4)
    axes.margins(x=0.12)
    axes.set(xlabel="output tokens per second", title=_title(report))
    _plain(axes)
    return True


def _running(axes: Any, report: Report) -> bool:
    return _over_time(axes, report, "running", 1, "sequences running at once")


def _kv(axes: Any, report: Report) -> bool:
    return _over_time(axes, report, "kv_bytes", _MIB, "KV memory in use, MiB")


def _over_time(axes: Any, report: Report, column: str, unit: float, label: str) -> bool:
    arms = [a for a in report["arms"] if a.get("timeline")]
    for arm in arms:
        values = [v / unit for v in arm["timeline"][column]]
        axes.step(arm["timeline"]["seconds"], values, where="post", color=_colour(arm), label=arm["title"])
    axes.set_title(_title(report))
    return _finished(axes, bool(arms), "seconds", label)


def _latency_by_rate(axes: Any, report: Report) -> bool:
    drawn = False
    for arm in report["arms"]:
        rows = [r for r in report.get("rates", ()) if r["arm"] == arm["name"] and "ttft" in r["latency"]]
        if rows:
            rates = [r["rate"] for r in rows]
            axes.plot(
                rates,
                [r["latency"]["ttft"]["p50"] for r in rows],
                "o-",
                color=_colour(arm),
                label=arm["title"],
            )
            axes.plot(rates, [r["latency"]["ttft"]["p99"] for r in rows], "o:", color=_colour(arm))
            drawn = True
    if drawn:
        axes.set_yscale("log")
    axes.set_title(_title(report))
    label = "time to first token, s (dotted: 99th percentile)"
    return _finished(axes, drawn, "requests per second offered", label)


def _finished(axes: Any, drawn: bool, x_label: str, y_label: str) -> bool:
    if drawn:
        axes.set(xlabel=x_label, ylabel=y_label, xlim=(0, None))
        if axes.get_yscale() == "linear":
            axes.set_ylim(0, None)
        axes.legend(frameon=False, fontsize="small")
        _plain(axes)
    return drawn


def _title(report: Report) -> str:
    return f"{report['model']['name']}, {title_of(report)}"


def _plain(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y" if axes.get_ylabel() else "x", alpha=0.25)


def _colour(arm: Mapping[str, Any]) -> str:
    return ARM_COLOURS.get(arm["name"], OTHER_COLOUR)[0]
