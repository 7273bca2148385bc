"""What an arm of a comparison is, and what one timed run of it gives.

An arm gets the workload when it is made and does all preparation (lists, sorting, pool sizes) there; `run`
does the work and nothing else. All arms decode greedily under the limits of each request and the same EOS
ids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from hf_paged.comparison.sampling import Unit, rate_error
from hf_paged.comparison.timeline import Timeline
from hf_paged.comparison.timing import RequestTiming
from hf_paged.comparison.workloads import Request

#: Called with the number of requests just finished.
Progress = Callable[[int], None]


@dataclass
class ArmContext:
    """What all arms of a comparison share."""

    model: Any  # the plain HF model, not enabled
    requests: Sequence[Request]
    eos_ids: tuple[int, ...] = ()  # empty: nothing ends before its limit
    pad_id: int = 0
    seed: int = 0


@dataclass
class ArmRun:
    """One timed run. Times are seconds; `outputs` are the asked-for new tokens of the requests that were
    run."""

    seconds: float
    outputs: dict[int, list[int]]
    unit_seconds: list[float]
    unit_tokens: list[int]
    num_units: int  # of the whole workload, run or not
    #: Mean time from the start of the run, when all requests are there, to the first token of a request.
    first_token_seconds: float | None = None
    first_token_note: str | None = None
    #: Of the requests that were run; `timings_note` says how they were taken.
    timings: list[RequestTiming] = field(default_factory=list)
    timings_note: str | None = None
    #: Sequences that got a token at once: mean over steps, of generate_batch over time.
    mean_running: float | None = None
    kv_waste: float | None = None
    timeline: Timeline | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return sum(self.unit_tokens)

    @property
    def tokens_per_second(self) -> float:
        return self.num_tokens / self.seconds

    @property
    def relative_error(self) -> float | None:
        return rate_error(self.unit_tokens, self.unit_seconds, self.num_units)


class Arm(ABC):
    """One way to serve the workload."""

    name: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, context: ArmContext) -> None:
        self.context = context

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """Everything somebody needs to repeat this arm, JSON-able."""

    @abstractmethod
    def run(self, progress: Progress) -> ArmRun:
        """One timed run, leaving the model as it was."""

    @abstractmethod
    def warm_up(self) -> None:
        """A short untimed run of the same code, for compilers, allocators and caches."""

    @property
    def num_requests(self) -> int:
        """Requests one `run` serves."""
        return len(self.context.requests)


def cut_at_limit(tokens: Sequence[int], limit: int, eos_ids: tuple[int, ...]) -> list[int]:
    """The asked-for part of a row: at most `limit` tokens, and nothing after the first EOS."""
    kept = list(tokens[:limit])
    for position, token in enumerate(kept):
        if token in eos_ids:
            return kept[: position + 1]
    return kept


def short_requests(requests: Sequence[Request], count: int = 2, max_new_tokens: int = 4) -> list[Request]:
    """The first requests with a few new tokens, for warming up."""
    return [Request(r.prompt, min(r.max_new_tokens, max_new_tokens)) for r in requests[:count]]


def whole(requests: Sequence[Request]) -> list[Unit]:
    """The workload as one unit, for arms that batch by themselves."""
    return [Unit(tuple(range(len(requests))))]


def position_limit(model: Any) -> int | None:
    """Most tokens a sequence of this model may have, or None."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)
