"""Latency percentiles and goodput, against numbers worked out by hand and numpy."""

from __future__ import annotations

import numpy as np
import pytest

from hf_paged.comparison.timing import (
    RequestTiming,
    check_limits,
    goodput,
    percentile,
    summarise,
)

STREAMED = RequestTiming(
    0, 1.0, 1.5, 4.0, 3, (1.5, 2.0, 3.5)
)  # the answer came half a second after its last token
WHOLE = RequestTiming(1, 0.0, 2.0, 4.0, 5)
SINGLE = RequestTiming(2, 0.0, 0.25, 0.5, 1, (0.25,))
UNSEEN = RequestTiming(3, 0.0, None, 9.0, 4)


def test_times_of_a_request() -> None:
    assert (STREAMED.ttft, STREAMED.tpot, STREAMED.e2e, STREAMED.gaps) == (0.5, 1.0, 3.0, [0.5, 1.5])
    assert (WHOLE.ttft, WHOLE.tpot, WHOLE.e2e, WHOLE.gaps) == (2.0, 0.5, 4.0, [])
    assert (SINGLE.tpot, SINGLE.gaps) == (None, [])
    assert (UNSEEN.ttft, UNSEEN.tpot, UNSEEN.e2e) == (None, None, 9.0)


def test_a_summary_has_what_was_seen_and_nothing_else() -> None:
    found = summarise([STREAMED, WHOLE, SINGLE])
    assert found["ttft"]["mean"] == pytest.approx((0.5 + 2.0 + 0.25) / 3)
    assert found["itl"] == pytest.approx({"mean": 1.0, "p50": 1.0, "p90": 1.4, "p99": 1.49})
    assert found["e2e"]["p50"] == 3.0
    assert set(summarise([UNSEEN])) == {"e2e"}
    assert summarise([]) == {}


@pytest.mark.parametrize("percent", [0, 1, 50, 90, 99, 100])
@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentiles_are_numpys(count: int, percent: float) -> None:
    values = np.random.default_rng(count).normal(size=count).tolist()
    assert percentile(values, percent) == pytest.approx(np.percentile(values, percent))


def test_goodput_counts_the_requests_that_keep_every_limit() -> None:
    found = goodput([STREAMED, WHOLE, SINGLE], {"ttft": 1.0, "tpot": 1.0}, 4.0)
    assert found == {"requests_per_second": 0.5, "share": 2 / 3, "limits": {"ttft": 1.0, "tpot": 1.0}}
    assert goodput([STREAMED, WHOLE, SINGLE], {"e2e": 0.1}, 4.0)["share"] == 0
    assert goodput([STREAMED, UNSEEN], {"ttft": 1.0}, 4.0) is None
    assert goodput([STREAMED, UNSEEN], {"e2e": 5.0}, 4.0)["share"] == 0.5


@pytest.mark.parametrize(
    "limits, message",
    [({}, "must not be empty"), ({"p99": 1}, "'p99': must be one of ttft"), ({"ttft": 0}, "ttft=0: must be")],
)
def test_bad_limits_are_refused(limits: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_limits(limits)
