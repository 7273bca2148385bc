"""Scenarios: each can be drawn for a small model, is the same for the same seed, and has what it is named for."""

from __future__ import annotations

import itertools
import statistics

import pytest

from hf_paged.comparison.options import Options
from hf_paged.comparison.scenarios import SCENARIOS, find_scenario, poisson_arrivals
from hf_paged.comparison.workloads import Workload

NAMES = [
    "sharegpt",
    "alpaca",
    "azure-code",
    "azure-chat",
    "uniform",
    "shared-prefix",
    "rl-groups",
    "single",
    "poisson",
]


def draw(name: str, count: int = 24, positions: int | None = 1024, **more: object) -> Workload:
    return find_scenario(name).draw(count, vocab_size=500, max_positions=positions, special_ids=(0,), **more)


def test_all_promised_scenarios_are_there() -> None:
    assert set(NAMES) | {"design"} == set(SCENARIOS)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("positions", [128, 1024, None])
def test_each_fits_the_model_and_is_decided_by_the_seed(name: str, positions: int | None) -> None:
    work = draw(name, positions=positions)
    assert len(work.requests) == (1 if name == "single" else 24)
    assert work == draw(name, positions=positions)
    assert all(0 < i < 500 for r in work.requests for i in r.prompt)
    if positions is not None:
        assert max(len(r.prompt) + r.max_new_tokens for r in work.requests) <= positions
    Options(**find_scenario(name).options)


@pytest.mark.parametrize("name", ["azure-code", "azure-chat", "shared-prefix"])
def test_long_scenarios_shrink_until_nothing_is_cut_and_say_so(name: str) -> None:
    whole, small = draw(name, 200, None), draw(name, 200, 256)
    assert not any("cut" in note for note in small.notes)
    (note,) = [note for note in small.notes if note.startswith("all lengths times")]
    factor = float(note.split()[-1])
    assert factor < 1
    for column in (lambda r: len(r.prompt), lambda r: r.max_new_tokens):
        means = [statistics.mean(map(column, work.requests)) for work in (whole, small)]
        assert means[1] == pytest.approx(means[0] * factor, rel=0.15, abs=0.6)  # no output is below one token


def test_a_scale_is_the_callers_word() -> None:
    assert draw("azure-chat", scale=0.01).notes == ("all lengths times 0.01",)
    with pytest.raises(ValueError, match="scale=0: must be above 0"):
        draw("design", scale=0)


def test_a_shared_prefix_is_shared_by_all_and_nothing_else_is() -> None:
    work = draw("shared-prefix")
    assert len({r.prompt[:256] for r in work.requests}) == 1
    assert len({r.prompt for r in work.requests}) == 24
    assert work.notes == ("the first 256 tokens of every prompt are the same",)


def test_groups_repeat_each_prompt_eight_times_with_limits_of_their_own() -> None:
    work = draw("rl-groups")
    groups = [list(g) for _, g in itertools.groupby(work.requests, key=lambda r: r.prompt)]
    assert [len(g) for g in groups] == [8, 8, 8]
    assert len({r.max_new_tokens for r in groups[0]}) > 1


def test_arrivals_are_poisson() -> None:
    times = poisson_arrivals(4000, 5.0, seed=1)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert times[0] == 0
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.05)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.1)  # exponential: as wide as its mean
    assert times == poisson_arrivals(4000, 5.0, seed=1) != poisson_arrivals(4000, 5.0, seed=2)
    with pytest.raises(ValueError, match="rate=0"):
        poisson_arrivals(3, 0, seed=1)


def test_an_unknown_name_lists_those_there_are() -> None:
    with pytest.raises(ValueError, match="scenario='vllm': must be one of design, sharegpt"):
        find_scenario("vllm")
