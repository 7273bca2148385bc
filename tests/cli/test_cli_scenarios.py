"""`hf-paged compare --scenario` and `hf-paged report`: tables, JSON, page, baseline, and what they refuse."""

from __future__ import annotations

import json
from pathlib import Path

from typer.testing import CliRunner

from hf_paged.cli.main import app

FAST = [
    "--scale",
    "0.1",
    "--num-requests",
    "4",
    "--repeats",
    "1",
    "--arms",
    "loop,hf_paged",
    "--rate-requests",
    "3",
]


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, " ".join(result.output.split())


def test_scenarios_give_one_file_and_one_page_that_can_be_a_baseline(tmp_path: Path) -> None:
    first, page = tmp_path / "report.json", tmp_path / "report.html"
    arguments = ("compare", "random:gpt2-tiny", "--scenario", "uniform,poisson", *FAST)
    code, text = run(*arguments, "--json", first, "--html", page)
    assert code == 0, text
    assert "All scenarios" in text
    assert "Under Poisson arrivals" in text
    reports = json.loads(first.read_text())["reports"]
    assert [r["scenario"]["name"] for r in reports] == ["uniform", "poisson"]
    assert [bool(r["rates"]) for r in reports] == [False, True]
    assert all(r["complete"] for r in reports)
    assert "<!doctype html>" in page.read_text()
    code, text = run("compare", "random:gpt2-tiny", "--scenario", "uniform", *FAST, "--baseline", first)
    assert code == 0, text
    assert "Against the baseline" in text
    code, text = run("report", first, "--html", tmp_path / "again.html", "--baseline", first)
    assert code == 0, text
    assert "Against the baseline" in text
    assert "poisson" in text
    assert "Against the baseline" in (tmp_path / "again.html").read_text()


def test_bad_options_end_in_one_line(tmp_path: Path) -> None:
    tiny = ("compare", "random:gpt2-tiny")
    other = tmp_path / "other.json"
    other.write_text('{"rows": []}')
    for arguments, message in (
        ((*tiny, "--scenario", "vllm"), "scenario='vllm': must be one of design"),
        ((*tiny, "--scenario", "design", "--lengths", "design"), "not both"),
        ((*tiny, "--limits", "ttft"), "must be NAME:SECONDS"),
        ((*tiny, "--limits", "speed:1"), "limit 'speed'"),
        ((*tiny, "--rates", "1,0"), "must be numbers above 0"),
        ((*tiny, "--baseline", tmp_path / "absent.json"), "cannot read a report"),
        ((*tiny, "--baseline", other), "holds no report"),
        ((*tiny, "--html", tmp_path / "no" / "page.html"), "cannot write"),
        (("report", other), "holds no report"),
    ):
        code, text = run(*arguments)
        assert code == 2, arguments
        assert text.startswith("error: "), text
        assert message in text
