"""The report page: whole, self-contained, escaped, with what is lost in it; and the same charts as PNG."""

from __future__ import annotations

import builtins
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest

import hf_paged
from hf_paged.comparison.page import render_page
from hf_paged.comparison.plots import save_plots
from hf_paged.comparison.style import ARM_COLOURS, page_style
from hf_paged.comparison.svg import Bar, Line, bar_chart, line_chart
from tests.comparison.sample_reports import sample_arm, sample_rate, sample_report
from tests.helpers import make_model

VOID = {"meta", "br"}


class Balance(HTMLParser):
    """Fails on a tag that is not closed where it should be; collects what the page refers to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [
            v or "" for k, v in attrs if k in ("src", "href", "data", "action") or k.startswith("on")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without a start"
        assert self.open.pop() == tag


def parsed(page: str) -> Balance:
    parser = Balance()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


@pytest.fixture(scope="module")
def real() -> dict:
    """Of a real comparison, with rates."""
    prompts = [[5, 6, 7], list(range(10, 40)), [9] * 12, [3, 4]]
    small = {"padded_sizes": (2, 4), "padded_orders": ("prompt",), "pool_rows": (4,), "repeats": 2}
    report = hf_paged.compare(
        make_model("llama"),
        prompts,
        max_new_tokens=8,
        ignore_eos=True,
        rates=(50.0, 100.0),
        rate_requests=4,
        **small,
    )
    assert report.complete
    return report.to_dict()


def test_a_real_comparison_gives_a_whole_page_that_needs_nothing_else(real: dict) -> None:
    page = render_page([real])
    found = parsed(page)
    assert found.links == []
    assert "script" not in found.tags
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", page)
    for arm in real["arms"]:
        assert arm["title"] in page
    for part in (
        "Output tokens per second",
        "Sequences running at once",
        "KV memory in use over time",
        "Goodput",
    ):
        assert part in page
    for part in (
        "Time to first token, median",
        "Under Poisson arrivals",
        "Environment",
        "Settings of each arm",
    ):
        assert part in page
    assert real["environment"]["packages"]["transformers"] in page
    charts = re.findall(r"<svg xmlns.*?</svg>", page)
    assert len(charts) == 3 + 5
    for chart in charts:
        ElementTree.fromstring(chart)
        assert "NaN" not in chart
        assert "inf" not in chart


def test_every_text_is_escaped() -> None:
    evil = '<img src=x onerror="alert(1)">&'
    report = sample_report(evil, rates=[sample_rate("loop", 1.0)])
    report["model"]["name"] = report["model"]["class"] = evil
    report["environment"] |= {"settings": {evil: evil}, "cpu": {"model": evil}, "packages": {"torch": evil}}
    report["workload"]["notes"] = [evil]
    report["options"] = {evil: evil}
    report["scenario"] |= {"what": evil, "lengths": evil}
    trial = {"settings": {"batch": evil}, "tokens_per_second": 3.0}
    broken = sample_arm("x", title=evil, error=evil)
    report["arms"] += [
        sample_arm(evil, 3.0, title=evil, settings={evil: evil}, calibration=[trial, trial]),
        broken,
    ]
    for run in report["arms"][0]["runs"]:
        run["latency_note"] = evil
    found = parsed(render_page([report, sample_report()], [report]))
    assert "img" not in found.tags
    assert found.links == []


def test_what_is_lost_stands_in_the_same_table_and_is_marked() -> None:
    lost = sample_report("uniform", arms=[sample_arm("padded", 50.0), sample_arm("hf_paged", 40.0)])
    page = render_page([sample_report(), lost])
    summary = page[: page.index("<h2>")]
    assert "uniform" in summary
    assert '<span class="loss">0.80×</span>' in summary
    assert '<span class="win">4.50×</span>' in summary  # 40 of 10 and 55 of 11: the median of 4 and 5


def test_failed_arms_and_unfinished_runs_are_said() -> None:
    report = sample_report(complete=False)
    report["arms"].append(sample_arm("generate_batch", error="RuntimeError: no room", timeline=None))
    page = render_page([report])
    parsed(page)
    assert "RuntimeError: no room" in page
    assert "Not complete" in page


def test_a_baseline_is_compared_with_runs_of_the_same_work() -> None:
    slower = sample_report(arms=[sample_arm("loop", 10.5), sample_arm("hf_paged", 30.0)])
    page = render_page([sample_report()], [slower])
    parsed(page)
    assert "+58.3%" in page  # 47.5 over 30
    assert "2.86×" in page
    assert "4.52×" in page
    other = sample_report()
    other["workload"] |= {"num_requests": 9}
    assert "no run of the same model and work" in render_page([sample_report()], [other])


def test_no_report_is_refused() -> None:
    with pytest.raises(ValueError, match="no report"):
        render_page([])


def test_both_colour_schemes_are_there_for_every_arm() -> None:
    style = page_style()
    light, _, dark = style.partition("prefers-color-scheme:dark")
    for arm, pair in ARM_COLOURS.items():
        assert f"--{arm}:{pair[0]};" in light
        assert f"--{arm}:{pair[1]};" in dark
    assert "color-scheme:light dark" in style


def test_bars_are_as_long_as_their_values_and_lines_go_through_their_points() -> None:
    bars = ElementTree.fromstring(bar_chart([Bar("a", "loop", 50), Bar("b", "padded", 100)], title="t"))
    widths = [float(r.get("width")) for r in bars.iter("{http://www.w3.org/2000/svg}rect")]
    assert widths[1] == pytest.approx(2 * widths[0])
    line = Line("l", "loop", [(0, 1), (5, 10), (10, 100)], marks=True)
    chart = ElementTree.fromstring(line_chart([line], title="t", x_label="x", y_label="y", log_y=True))
    dots = [
        (float(c.get("cx")), float(c.get("cy"))) for c in chart.iter("{http://www.w3.org/2000/svg}circle")
    ]
    assert dots[1] == pytest.approx(
        tuple((a + b) / 2 for a, b in zip(dots[0], dots[2], strict=True)), abs=0.1
    )
    flat = line_chart([Line("l", "loop", [(0, 0)])], title="t", x_label="x", y_label="y")
    ElementTree.fromstring(flat)
    assert "nan" not in flat


def test_plots_without_matplotlib_are_refused_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: object, **kwargs: object) -> object:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'hf-paged\[plots\]'"):
        save_plots([sample_report()], Path("never-made"))
    assert not Path("never-made").exists()


def test_plots_are_png_files_one_a_chart_with_data(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    reports = [
        sample_report(rates=[sample_rate("loop", 1.0), sample_rate("loop", 2.0)]),
        sample_report("a/b c"),
    ]
    files = save_plots(reports, tmp_path / "new")
    assert [f.name for f in files] == [
        "1-design-throughput.png",
        "1-design-running.png",
        "1-design-kv.png",
        "1-design-ttft-against-rate.png",
        "2-a_b_c-throughput.png",
        "2-a_b_c-running.png",
        "2-a_b_c-kv.png",
    ]
    assert all(f.read_bytes().startswith(b"\x89PNG") for f in files)
