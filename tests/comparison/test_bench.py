"""`hf-paged bench`: suites are well formed, lines are kept as they finish and taken up again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hf_paged.comparison import bench, suites
from hf_paged.comparison.arms import ArmContext
from hf_paged.comparison.models import RANDOM_SHAPES
from hf_paged.comparison.options import ALL_ARMS, Options
from hf_paged.comparison.report import CompareReport
from hf_paged.comparison.runner import Runner
from hf_paged.comparison.workloads import workload_from_lengths
from tests.helpers import make_model

TINY = suites.BenchLine(
    "tiny",
    "tiny",
    "gpt2-tiny",
    "float32",
    3,
    (suites.Target("loop", 1e-9, 1e9),),
    options={"repeats": 1},
)
IMPOSSIBLE = suites.BenchLine(
    "impossible",
    "impossible",
    "gpt2-tiny",
    "float32",
    2,
    (suites.Target("loop", 1e9),),
    options={"repeats": 1},
)


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_line_names_a_shape_arms_and_options_that_exist(suite: str) -> None:
    for line in suites.SUITES[suite]:
        assert line.shape in RANDOM_SHAPES
        assert set(line.arms) <= set(ALL_ARMS)
        Options(arms=line.arms, **line.options)
        assert all(t.aim is None or t.aim >= t.must for t in line.targets)


def test_the_targets_are_those_the_project_holds_itself_to() -> None:
    wanted = {line.key: [(t.against, t.must) for t in line.targets] for line in suites.SUITES["full"]}
    assert wanted == {
        "gpt2-5m-fp32": [("loop", 10), ("padded", 6), ("generate_batch", 2.5)],
        "gpt2-124m-one-prompt": [("loop", 1.1)],
        "gpt2-124m-bf16": [("loop", 9)],
        "gpt2-124m-fp32": [("loop", 6), ("padded", 5.5), ("generate_batch", 2.2)],
    }
    assert [(line.key, line.num_requests) for line in suites.SUITES["full"] if line.num_requests > 1] == [
        ("gpt2-5m-fp32", 256),
        ("gpt2-124m-bf16", 128),
        ("gpt2-124m-fp32", 128),
    ]


def test_the_slowest_line_ends_within_a_quarter_of_an_hour_on_two_cores() -> None:
    """Its tokens over the rates of such a machine: 34 tokens/s of the loop were measured on this model (the line of
    one prompt in benchmarks/results); the others are as many times the loop as on the 5 M model, rounded down."""
    rates = {"loop": 34, "padded": 34 * 1.3, "generate_batch": 34 * 2.5, "hf_paged": 34 * 6}
    line = next(line for line in suites.SUITES["full"] if line.key == "gpt2-124m-fp32")
    options = Options(arms=line.arms, **line.options)
    model = make_model("gpt2", n_positions=1024)  # only its positions matter: they decide how batches are cut
    work = workload_from_lengths("design", line.num_requests, vocab_size=100, max_positions=1024)
    mean = work.describe()["max_new_tokens"]["mean"]
    runner = Runner(ArmContext(model, work.requests), options, CompareReport({}, {}, {}, {}))
    seconds = 0.0
    for name in options.arms:
        candidates = runner._candidates(name)
        trials = [c.trial().num_requests for c in candidates] if len(candidates) > 1 else []
        run = max(c.final().num_requests for c in candidates)
        seconds += (sum(trials) + run * options.repeats) * mean / rates[name]
    assert 400 < seconds < 840  # the rest is for building the model, warming up and comparing tokens


def test_lines_are_written_as_they_finish_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(bench.SUITES, "quick", (TINY, IMPOSSIBLE))
    path = tmp_path / "bench.json"
    (first,) = bench.run_suite("quick", path=path, only=("tiny",), device="cpu")
    assert first.ok
    assert [line["key"] for line in json.loads(path.read_text())["lines"]] == ["tiny"]
    started: list[str] = []
    both = bench.run_suite(
        "quick", path=path, resume=True, device="cpu", on_start=lambda line: started.append(line.key)
    )
    assert started == ["impossible"]
    assert both[0].data == json.loads(json.dumps(first.data))
    assert [r.ok for r in both] == [True, False]
    judgement = both[1].data["judgements"][0]
    assert not judgement["ok"]
    assert judgement["minimum"] == judgement["median"] == judgement["maximum"]


def test_a_file_of_something_else_is_not_resumed(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text('{"rows": []}')
    with pytest.raises(ValueError, match="not a result of hf-paged bench"):
        bench.run_suite("quick", path=path, resume=True)
    path.write_text('{"suite": "full", "lines": []}')
    with pytest.raises(ValueError, match="is of suite 'full', not 'quick'"):
        bench.run_suite("quick", path=path, resume=True)


def test_bf16_is_skipped_without_the_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    line = suites.BenchLine("b", "b", "gpt2-tiny", "bfloat16", 1, (suites.Target("loop", 1),))
    monkeypatch.setitem(bench.SUITES, "quick", (line,))
    monkeypatch.setattr(bench, "environment", lambda: {"cpu": {"flags": "avx2"}})
    (result,) = bench.run_suite("quick", device="cpu")
    assert "no bfloat16" in result.data["skipped"]
    assert result.ok
