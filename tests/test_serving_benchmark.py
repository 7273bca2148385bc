"""The load benchmark decides rightly: which rate comes next, and whether a window was held."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from tests.helpers import ROOT

ANSWER = 'data: {"choices":[{"text":"a"}]}\n\ndata: {"choices":[{"text":"b","finish_reason":"length"}]}\n\n'


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """benchmarks/ is no package: its files import each other by their own names."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield
    for name in [name for name in sys.modules if name.startswith("serving")]:
        del sys.modules[name]


@pytest.mark.parametrize("start", [0.5, 4.0, 60.0])
@pytest.mark.parametrize("limit", [0.3, 3.3, 41.0])
def test_the_search_ends_at_the_highest_rate_that_is_held(start: float, limit: float) -> None:
    search = import_module("serving_search")
    windows: list[dict[str, Any]] = []
    while (rate := search.next_rate(windows, start)) is not None:
        windows.append({"rate": rate, "held": rate <= limit, "queue_grows": rate > 1.5 * limit})
        assert len(windows) < 24
    assert limit / search.CLOSE <= search.highest(windows) <= limit


def test_a_stall_alone_does_not_end_the_search() -> None:
    search = import_module("serving_search")
    windows = [{"rate": 4.0, "held": False, "queue_grows": False}]
    assert search.next_rate(windows, 4.0) == 4.0
    windows.append({"rate": 4.0, "held": True, "queue_grows": False})
    assert search.next_rate(windows, 4.0) > 4.0
    assert search.highest(windows) == 4.0


def records(first: float, whole: float, rate: float = 10.0, count: int = 600) -> list[dict[str, Any]]:
    return [
        {
            "arrival": i / rate,
            "first": i / rate + first,
            "end": i / rate + whole,
            "status": 200,
            "body": ANSWER,
        }
        for i in range(count)
    ]


def judged(rows: list[dict[str, Any]]) -> dict[str, Any]:
    bodies = [{"max_tokens": 2}] * len(rows)
    return import_module("serving_windows").judge(rows, bodies, rows[-1]["arrival"])


def test_a_window_that_is_held() -> None:
    window = judged(records(0.5, 2.0))
    assert window["held"]
    assert window["first_token"]["p99"] == pytest.approx(0.5)
    assert window["in_flight"]["middle_third"] == pytest.approx(20, abs=1.5)
    assert not window["queue_grows"]


def test_what_misses_the_limit() -> None:
    late = records(0.5, 2.0)
    for row in late[100:106]:  # 1 of 100
        row["first"] += 5
        row["end"] += 5
    assert judged(late)["held"]
    late[107]["first"] += 5
    assert not judged(late)["held"]
    growing = [
        row | {"end": row["end"] + row["arrival"] * 0.5} for row in records(0.1, 1.0)
    ]  # first tokens come at once
    assert judged(growing)["queue_grows"]
    assert not judged(growing)["held"]
    for change in (
        {"end": None, "first": None},
        {"end": None},
        {"status": 429, "first": None, "end": None},
        {"body": ANSWER.replace("length", "stop")},
    ):
        rows = records(0.5, 2.0)
        rows[7] |= change
        assert not judged(rows)["held"], change


def test_texts_are_compared_by_what_the_events_say() -> None:
    digest_of = import_module("serving_windows").digest_of
    whole = 'data: {"choices":[{"text":"ab","finish_reason":"length"}]}\n\ndata: [DONE]\n\n'
    assert digest_of(ANSWER) == digest_of(whole) != digest_of(whole.replace("ab", "ac"))
