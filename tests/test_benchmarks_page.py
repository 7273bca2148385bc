"""docs/benchmarks.md, its chart and the README's figures are what the results say; the counting tool counts right."""

from __future__ import annotations

import importlib.util
import json
import random
import shutil
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from hf_paged.comparison.api import plain_defaults
from hf_paged.comparison.arm_paged import PagedArm
from hf_paged.comparison.arms import ArmContext
from hf_paged.comparison.timeline import kv_bytes_per_token
from hf_paged.comparison.workloads import Request
from hf_paged.config import PagedConfig
from tests.comparison.sample_reports import sample_report
from tests.helpers import ROOT, make_model


def script(name: str) -> ModuleType:
    """A module of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make_page, running_batch = script("make_page"), script("running_batch")


def test_what_is_committed_is_what_the_command_writes() -> None:
    for path, text in make_page.texts().items():
        stale = f"{path.relative_to(ROOT)} is not what benchmarks/results says: run make benchmarks-page"
        assert path.read_text(encoding="utf-8") == text, stale


def test_the_chart_stands_alone_in_light_and_dark() -> None:
    text = (ROOT / make_page.CHART).read_text(encoding="utf-8")
    ElementTree.fromstring(text)
    assert "prefers-color-scheme:dark" in text
    assert "url(" not in text


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files the page is made from and goes to."""
    for name in (make_page.RESULTS, "docs"):
        (tmp_path / name).mkdir(parents=True)
    for source in (ROOT / make_page.RESULTS).glob("*.json"):
        shutil.copy(source, tmp_path / make_page.RESULTS)
    shutil.copy(ROOT / "README.md", tmp_path)
    return tmp_path


def test_figures_follow_the_results(copy: Path) -> None:
    source = max((copy / make_page.RESULTS).glob("cpu-*.json"))
    data = json.loads(source.read_text())
    judgement = data["lines"][0]["judgements"][0]
    judgement |= {"median": 987.6, "minimum": 900.0, "maximum": 1000.0}
    source.write_text(json.dumps(data))
    found = make_page.texts(copy)
    assert "987.6× (900.0–1000.0)" in found[copy / "README.md"]
    assert "987.6× (900.0–1000.0)" in found[copy / make_page.PAGE]


def test_results_of_every_kind_are_shown_and_unknown_ones_named(copy: Path) -> None:
    results = copy / make_page.RESULTS
    (results / "a-report.json").write_text(json.dumps(sample_report("uniform")))
    (results / "b-rows.json").write_text(json.dumps({"rows": [1]}))
    table = {"about": "What it is.", "head": ["arm", "times"], "rows": [["plain | first", "2.00×"]]}
    (results / "c-table.json").write_text(json.dumps({"table": table}))
    text = make_page.texts(copy)[copy / make_page.PAGE]
    assert "## a-report" in text
    assert "4 requests (uniform)" in text
    assert "Raw figures: [b-rows.json]" in text
    assert "What it is.\n\n| arm | times |\n| --- | --- |\n| plain \\| first | 2.00× |\n" in text


def test_a_readme_without_marks_or_no_suite_is_refused(copy: Path) -> None:
    (copy / "README.md").write_text("# nothing")
    with pytest.raises(ValueError, match="needs the lines"):
        make_page.texts(copy)
    for path in (copy / make_page.RESULTS).glob("*.json"):
        path.unlink()
    with pytest.raises(ValueError, match="no result of"):
        make_page.texts(copy)


def test_padded_rows_are_counted_by_hand() -> None:
    requests = [Request((1,) * p, o) for p, o in ((10, 10), (20, 30), (5, 5), (60, 10))]
    # With outputs known: 2 x (20 + 30) = 100, a third row would need 150; then (5, 5) alone, since with (60, 10) it
    # needs 2 x (60 + 10) = 140; then (60, 10), which nobody waits for.
    known = running_batch.padded(requests, 120, 100, known=True)
    assert known == {"mean_running": (40 + 5) / 35, "mean_held": (2 * 30 + 5) / 35, "steps": 35}
    alone = running_batch.padded(requests, 120, 100, known=False)
    assert alone["mean_running"] == alone["mean_held"] == 1
    # The second and the last would exceed 80 positions together: 60 + 30.
    assert running_batch.padded(requests, 10_000, 80, known=True)["steps"] == 30


def test_both_engines_are_counted_in_the_same_room() -> None:
    requests = [Request((1, 2, 3), 20)] * 6
    ours = running_batch.paged(requests, 4 * 32)  # 8 blocks of 16: two a request
    theirs = running_batch.continuous(requests, 4 * 32, 32)
    assert 2 < ours["mean_running"] <= 4
    assert 2 < theirs["mean_running"] <= 4
    assert ours["peak_running"] <= 6
    assert ours["steps"] < ours["all_steps"]


def test_the_policy_alone_takes_the_steps_of_the_engine() -> None:
    model = make_model("gpt2")
    rng = random.Random(0)
    requests = [
        Request(tuple(rng.choices(range(1, 60), k=rng.randint(1, 12))), rng.randint(30, 80))
        for _ in range(24)
    ]
    slots = 24 * 16
    counted = running_batch.paged(requests, slots)
    assert counted["preemptions"], "room for all shows nothing"
    with plain_defaults(model, (), 0):
        config = PagedConfig(kv_cache_memory=slots * kv_bytes_per_token(model))
        stats = PagedArm(ArmContext(model, requests), config=config).run(lambda count: None).extra["stats"]
    assert (counted["all_steps"], counted["preemptions"]) == (stats["steps"], stats["preemptions"])


def test_the_room_is_that_of_the_named_shape() -> None:
    assert running_batch.shape_bytes_per_token("gpt2-124m") == 2 * 12 * 768 * 4
    assert running_batch.parse_memory("2GiB") == 2 << 30
