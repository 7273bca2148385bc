"""PNG charts of a load run: time to first token against the rate, and requests in flight over a window."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from serving_windows import MOST_SECONDS

from hf_paged.comparison.style import ARM_COLOURS

_SERVERS = {
    "transformers": ("transformers serve --continuous-batching", ARM_COLOURS["generate_batch"][0]),
    "hf_paged": ("hf-paged serve", ARM_COLOURS["hf_paged"][0]),
}
_LEGEND: dict[str, Any] = {
    "fontsize": 8,
    "loc": "upper center",
    "bbox_to_anchor": (0.5, -0.16),
}  # below the axes
_BEYOND = 20.0  # where a first token that never came is drawn, seconds


def save_plots(data: dict[str, Any], folder: Path) -> list[Path]:
    """Writes serving-MODEL.png for each model that has whole windows; the files."""
    from matplotlib.figure import Figure

    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for model in dict.fromkeys(w["model"] for w in data["windows"]):
        whole = [w for w in data["windows"] if w["model"] == model and w["part"] != "tuning"]
        if not whole:
            continue
        sheet = Figure(figsize=(9.6, 4.6), layout="constrained")
        left, right = sheet.subplots(1, 2)
        _first_tokens(left, whole)
        _queues(right, [w for w in whole if w["part"] == "pair" and w["pair"] == 0])
        sheet.suptitle(f"{model}: Poisson arrivals, streams, 2 cores for server and load generator together")
        files.append(folder / f"serving-{model}.png")
        sheet.savefig(files[-1], dpi=110)
    return files


def _first_tokens(axes: Any, windows: list[dict[str, Any]]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    for server, (title, colour) in _SERVERS.items():
        own = sorted((w for w in windows if w["server"] == server), key=lambda w: w["rate"])
        for w in own:
            axes.plot(
                w["rate"],
                min(w["first_token"]["p99"] or _BEYOND, _BEYOND),
                marker="o" if w["held"] else "x",
                color=colour,
            )
        axes.plot([], [], color=colour, marker="o", linestyle="none", label=title)
    axes.plot([], [], color="grey", marker="x", linestyle="none", label="not held")
    axes.axhline(MOST_SECONDS, color="grey", linestyle="--", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel="requests a second", ylabel="time to first token, p99, s")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter(NullFormatter())
    axes.legend(**_LEGEND)


def _queues(axes: Any, windows: list[dict[str, Any]]) -> None:
    for w in windows:
        title, colour = _SERVERS[w["server"]]
        style = {1: "-", 3: "-", 5: ":"}[w["times"]]
        axes.plot(
            w["in_flight"]["each_second"],
            color=colour,
            linestyle=style,
            label=f"{title} at {w['rate']:.3g}/s" if w["times"] == 1 else f"{title} at {w['times']}× that",
        )
    axes.set(xlabel="seconds", ylabel="requests in flight")
    axes.set_ylim(bottom=0)
    if windows:
        axes.legend(**_LEGEND)
