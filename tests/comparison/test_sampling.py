"""Samples of units: whole when they can be, spread along the cost, and with an honest error."""

from __future__ import annotations

import itertools
import random
import statistics

import pytest

from hf_paged.comparison.sampling import Unit, rate_error, sample_units
from hf_paged.comparison.workloads import Request


def singles(outputs: list[int]) -> tuple[list[Unit], list[Request]]:
    return [Unit((i,)) for i in range(len(outputs))], [Request((1,), n) for n in outputs]


def test_no_limit_runs_everything_in_order() -> None:
    units, requests = singles([5, 1, 3])
    assert sample_units(units, requests, None, 0) == units
    assert sample_units(units, requests, 3, 0) == units


@pytest.mark.parametrize("seed", range(5))
def test_a_sample_is_spread_along_the_cost(seed: int) -> None:
    outputs = list(range(1, 101))
    random.Random(seed).shuffle(outputs)
    units, requests = singles(outputs)
    chosen = sample_units(units, requests, 10, seed)
    values = sorted(requests[u.indices[0]].max_new_tokens for u in chosen)
    assert len(values) == 10
    assert [u.indices[0] for u in chosen] == sorted(u.indices[0] for u in chosen)
    assert {b - a for a, b in itertools.pairwise(values)} == {10}
    assert chosen == sample_units(units, requests, 10, seed)


def test_batches_are_taken_whole() -> None:
    requests = [Request((1,), n) for n in range(1, 13)]
    units = [Unit(tuple(range(k, k + 4))) for k in (0, 4, 8)]
    assert len(sample_units(units, requests, 5, 0)) == 2
    assert len(sample_units(units, requests, 1, 0)) == 1


def test_the_error_is_zero_for_all_units_and_unknown_for_one() -> None:
    assert rate_error([1, 2], [1.0, 2.0], 2) == 0.0
    assert rate_error([1], [1.0], 2) is None
    assert rate_error([2, 4], [1.0, 2.0], 9) == pytest.approx(0.0)


def test_the_error_is_the_spread_of_estimates_over_samples() -> None:
    """Against brute force: the standard deviation of the rate over many random samples."""
    rng = random.Random(0)
    seconds = [rng.uniform(1, 5) for _ in range(60)]
    tokens = [max(1, round(s * rng.uniform(6, 14))) for s in seconds]
    rates, errors = [], []
    for _ in range(3000):
        rows = rng.sample(range(60), 15)
        picked = [tokens[i] for i in rows], [seconds[i] for i in rows]
        rates.append(sum(picked[0]) / sum(picked[1]))
        errors.append(rate_error(*picked, 60))
    spread = statistics.stdev(rates) / statistics.mean(rates)
    assert statistics.mean(errors) == pytest.approx(spread, rel=0.1)
