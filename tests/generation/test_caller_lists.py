"""Upstream's lists in lockstep calls: as upstream runs them, errors included."""

from __future__ import annotations

import inspect
import itertools
from typing import Any

import pytest
import torch
from transformers import (
    EosTokenCriteria,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
)

from hf_paged.generation.caller_lists import ends_nothing, processing

IDS, SCORES = torch.tensor([[5, 6], [7, 8]]), torch.zeros(2, 9)


class Plus(LogitsProcessor):
    def __init__(self, amount: float) -> None:
        self.amount = amount

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        return scores + self.amount


class Wanting(LogitsProcessor):
    def __call__(self, input_ids: Any, scores: Any, more: Any) -> Any:
        raise AssertionError("upstream calls it without `more`?")


def test_processors_run_as_in_upstreams_list_and_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    given = LogitsProcessorList([Plus(1), lambda ids, scores: scores * 2])
    run = processing(given)
    looks: list[Any] = []
    original = inspect.signature
    monkeypatch.setattr(inspect, "signature", lambda *a, **k: looks.append(a) or original(*a, **k))
    for _ in range(3):
        assert torch.equal(run(IDS, SCORES), (SCORES + 1) * 2)
    assert len(looks) == 2
    given.append(Plus(5))
    assert torch.equal(run(IDS, SCORES), given(IDS, SCORES))


@pytest.mark.parametrize("wrong", [Wanting(), None])
def test_a_processor_that_cannot_be_called_so_raises_upstreams_error_each_time(wrong: Any) -> None:
    given = LogitsProcessorList([Plus(1), wrong])
    run = processing(given)
    with pytest.raises(Exception) as upstreams:
        given(IDS, SCORES)
    for _ in range(2):
        with pytest.raises(type(upstreams.value)) as ours:
            run(IDS, SCORES)
        assert str(ours.value) == str(upstreams.value)


def test_a_list_of_the_users_own_class_runs_itself() -> None:
    class Own(LogitsProcessorList):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return "its own"

    assert processing(Own([Plus(1)]))(IDS, SCORES) == "its own"  # type: ignore[comparison-overlap]


def test_what_is_said_to_end_nothing_ends_nothing() -> None:
    parts = [
        MaxLengthCriteria(4),
        MaxLengthCriteria(9, max_position_embeddings=5),
        EosTokenCriteria([7, 3]),
        EosTokenCriteria(1),
    ]
    seen = set()
    for count in range(3):
        for some in itertools.combinations(parts, count):
            criteria = StoppingCriteriaList(some)
            for tokens, length in itertools.product(itertools.product([1, 2, 3], repeat=2), [3, 4, 5, 6]):
                ids = torch.zeros((2, length), dtype=torch.long)
                ids[:, -1] = torch.tensor(tokens)
                says, ends = ends_nothing(criteria, tokens, length), bool(criteria(ids, None).any())
                assert not (says and ends)
                # Where there are more tokens than positions upstream has something to say.
                assert says or ends or length > 5
                seen.add((says, ends))
    assert {(True, False), (False, True)} <= seen


@pytest.mark.parametrize(
    "criteria",
    [
        StoppingCriteriaList([MaxLengthCriteria(9), MaxTimeCriteria(100.0)]),
        StoppingCriteriaList([lambda ids, scores, **k: torch.zeros(2, dtype=torch.bool)]),
        type("Own", (StoppingCriteriaList,), {})([MaxLengthCriteria(9)]),
        [MaxLengthCriteria(9)],
    ],
)
def test_what_only_running_can_tell_is_run(criteria: Any) -> None:
    assert not ends_nothing(criteria, [1, 2], 3)
