"""Processors, criteria and streamers as users write them, which keep what they were called with."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer


class Recorder:
    """Keeps copies of the tensors of each call."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def record(self, *values: Any) -> None:
        self.calls.append(tuple(v.clone() if isinstance(v, torch.Tensor) else v for v in values))


class RowCounter(Recorder, LogitsProcessor):
    """Keeps a state for each row of its batch: bans the token a row had most recently, and every few steps more."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.record(input_ids, scores)
        if self.counts is None:
            self.counts = torch.zeros(len(input_ids), dtype=torch.long)
        assert len(self.counts) == len(input_ids), "the batch has changed"
        self.counts += input_ids[:, -1] % 3
        scores = scores.clone()
        scores.scatter_(1, input_ids[:, -1:], -float("inf"))
        scores[self.counts % 2 == 0, 3:30] -= 2.0
        return scores


class InPlace(Recorder, LogitsProcessor):
    """Writes to the scores it is given, as xgrammar does."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.record(input_ids, scores)
        scores[:, ::5] -= 3.0
        return scores


class StopOnSum(Recorder, StoppingCriteria):
    """Ends a row when the sum of its last tokens is a multiple of five."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        self.record(input_ids, None if scores is None else len(scores))
        return input_ids[:, -2:].sum(-1) % 5 == 0


class StopAll(Recorder, StoppingCriteria):
    """One plain bool for the whole batch, and an attribute that means something else upstream."""

    max_length = 3

    def __init__(self, num_calls: int) -> None:
        super().__init__()
        self.num_calls = num_calls

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> bool:  # type: ignore[override]
        self.record(input_ids)
        return len(self.calls) >= self.num_calls


class Prefix(Recorder):
    """A `prefix_allowed_tokens_fn`."""

    def __call__(self, batch_id: int, input_ids: torch.Tensor) -> list[int]:
        self.record(batch_id, input_ids)
        return [3 + (int(input_ids[-1]) * 7 + batch_id + i * i) % 120 for i in range(1, 9)]


class KeepingStreamer(Recorder, BaseStreamer):
    def put(self, value: torch.Tensor) -> None:
        self.record("put", value)

    def end(self) -> None:
        self.record("end")


def assert_same_calls(actual: Recorder, expected: Recorder) -> None:
    """The same calls: number, order, shapes, dtypes, token ids; scores to 1e-4."""
    assert len(actual.calls) == len(expected.calls), f"{len(actual.calls)} calls, not {len(expected.calls)}"
    for number, (ours, theirs) in enumerate(zip(actual.calls, expected.calls, strict=True)):
        assert len(ours) == len(theirs)
        for mine, other in zip(ours, theirs, strict=True):
            where = f"call {number}: {mine} is not {other}"
            if not isinstance(other, torch.Tensor):
                assert mine == other, where
                continue
            assert (mine.dtype, mine.shape, mine.device) == (other.dtype, other.shape, other.device), where
            if other.is_floating_point():
                torch.testing.assert_close(mine, other, atol=1e-4, rtol=1e-4)
            else:
                assert torch.equal(mine, other), where
