"""Arms that call `model.generate`: one request at a time, or padded batches of a fixed size.

A padded batch is padded on the left with its mask and runs until its longest row is done, as generate() does;
of each row only the tokens its request asked for are counted. With `paged=True` the same calls are made on
the enabled model.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from hf_paged.comparison.arms import (
    Arm,
    ArmContext,
    ArmRun,
    Progress,
    cut_at_limit,
    position_limit,
    short_requests,
)
from hf_paged.comparison.generate_calls import TokenClock, generate_batch, pad_batch
from hf_paged.comparison.sampling import Unit, sample_units
from hf_paged.comparison.timeline import Moment, Timeline, kv_bytes_per_token, of_batch
from hf_paged.comparison.timing import RequestTiming

#: How the requests are ordered before they are cut into batches.
ORDERS = {
    "dataset": "as they come",
    "prompt": "sorted by prompt length",
    "oracle": "sorted by output length, which nobody knows before the output is there, then by prompt length",
}


class GenerateArm(Arm):
    """Units of requests through `model.generate`; subclasses say which units."""

    def __init__(self, context: ArmContext, *, subset: int | None = None, paged: bool = False) -> None:
        super().__init__(context)
        self.paged = paged
        # On a GPU a streamer would make upstream wait for every token, and the enabled model runs otherwise with one.
        self.clocked = not paged and context.model.device.type == "cpu"
        self.all_units = self.make_units()
        self.units = sample_units(self.all_units, context.requests, subset, context.seed)
        self.batches = [pad_batch([context.requests[i] for i in u.indices], context) for u in self.units]

    def make_units(self) -> list[Unit]:
        raise NotImplementedError

    @property
    def num_requests(self) -> int:
        return sum(len(u.indices) for u in self.units)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "call": "model.generate",
            "paged": self.paged,
            "requests_run": self.num_requests,
            "units_run": len(self.units),
            "units_total": len(self.all_units),
        }

    def warm_up(self) -> None:
        with self._enabled():
            batch = pad_batch(short_requests(self.context.requests, len(self.units[0].indices)), self.context)
            generate_batch(self.context.model, batch)

    def run(self, progress: Progress) -> ArmRun:
        outputs: dict[int, list[int]] = {}
        seconds: list[float] = []
        tokens: list[int] = []
        steps: list[list[float]] = []  # of each unit, since it began
        with self._enabled():
            for unit, batch in zip(self.units, self.batches, strict=True):
                clock = TokenClock()
                started = time.perf_counter()
                rows = generate_batch(self.context.model, batch, clock if self.clocked else None)
                seconds.append(time.perf_counter() - started)
                steps.append([t - started for t in clock.times])
                kept = [self._cut(rows[k], i) for k, i in enumerate(unit.indices)]
                outputs.update(zip(unit.indices, kept, strict=True))
                tokens.append(sum(map(len, kept)))
                progress(len(unit.indices))
        run = ArmRun(sum(seconds), outputs, seconds, tokens, len(self.all_units))
        waits = [times[0] if times else None for times in steps]
        run.first_token_seconds, run.first_token_note = self._first_token(seconds, waits)
        run.timings, run.timings_note = self._timings(run, steps), self._timings_note()
        run.timeline = self._timeline(run, steps)
        if run.timeline is not None:
            run.mean_running, run.kv_waste = run.timeline.mean_running, run.timeline.waste
        return run

    def serve(self, arrivals: Sequence[float], progress: Progress) -> ArmRun:
        """The first requests as they arrive (seconds): whenever it is free it takes those that wait, oldest first."""
        count, began, done = len(arrivals), time.perf_counter(), 0
        run = ArmRun(0.0, {}, [], [], 0)
        while done < count:
            time.sleep(max(began + arrivals[done] - time.perf_counter(), 0.0))
            now = time.perf_counter() - began
            indices = [done]
            while (n := done + len(indices)) < count and arrivals[n] <= now and self.may_join(indices, n):
                indices.append(n)
            clock = TokenClock()
            batch = pad_batch([self.context.requests[i] for i in indices], self.context)
            with self._enabled():
                rows = generate_batch(self.context.model, batch, clock if self.clocked else None)
            end = time.perf_counter() - began
            times = [t - began for t in clock.times]
            for index, row in zip(indices, rows, strict=True):
                kept = run.outputs[index] = self._cut(row, index)
                own = tuple(times[: len(kept)])
                first = own[0] if own else None
                run.timings.append(RequestTiming(index, arrivals[index], first, end, len(kept), own))
            run.unit_seconds.append(end - now)
            run.unit_tokens.append(sum(len(run.outputs[i]) for i in indices))
            done += len(indices)
            progress(len(indices))
        run.seconds, run.num_units = time.perf_counter() - began, len(run.unit_seconds)
        run.mean_running = count / run.num_units
        return run

    def may_join(self, indices: Sequence[int], index: int) -> bool:
        """Whether a waiting request may join a batch that is about to start."""
        return False

    def _timings(self, run: ArmRun, steps: list[list[float]]) -> list[RequestTiming]:
        """Times of the requests that were run, had all units run one after another from the start."""
        mean = sum(run.unit_seconds) / len(run.unit_seconds)
        sampled = len(self.units) < len(self.all_units)
        places = {unit: place for place, unit in enumerate(self.all_units)}
        starts = itertools.accumulate(run.unit_seconds[:-1], initial=0.0)
        timings = []
        for unit, start, seconds, times in zip(self.units, starts, run.unit_seconds, steps, strict=True):
            begin = places[unit] * mean if sampled else start
            for index in unit.indices:
                count = len(run.outputs[index])
                own = tuple(begin + t for t in times[:count])
                timings.append(
                    RequestTiming(index, 0.0, own[0] if own else None, begin + seconds, count, own)
                )
        return timings

    def _timings_note(self) -> str:
        how = (
            "tokens by a streamer, an answer when generate() returned"
            if self.clocked
            else "no single tokens seen"
        )
        if len(self.units) < len(self.all_units):
            how += "; a sample was run, and the wait before each unit is its place times the mean unit"
        return how

    def _timeline(self, run: ArmRun, steps: list[list[float]]) -> Timeline | None:
        """Of the units that were run, one after another; None where their steps were not seen."""
        if not all(steps):
            return None
        moments: list[Moment] = []
        starts = itertools.accumulate(run.unit_seconds[:-1], initial=0.0)
        for unit, start, times in zip(self.units, starts, steps, strict=True):
            prompts = [len(self.context.requests[i].prompt) for i in unit.indices]
            outputs = [len(run.outputs[i]) for i in unit.indices]
            moments += of_batch(start, [start + t for t in times], prompts, outputs)
        return Timeline(tuple(moments), kv_bytes_per_token(self.context.model))

    def _cut(self, row: list[int], index: int) -> list[int]:
        return cut_at_limit(row, self.context.requests[index].max_new_tokens, self.context.eos_ids)

    def _first_token(
        self, seconds: list[float], measured: list[float | None]
    ) -> tuple[float | None, str | None]:
        """Requests wait for all units before theirs; of units that were not run the mean is taken."""
        waits = [w for w in measured if w is not None]
        if len(waits) < len(measured):
            return None, "not measured: a streamer would change how the model runs"
        sizes = [len(u.indices) for u in self.units]
        own = sum(size * wait for size, wait in zip(sizes, waits, strict=True)) / sum(sizes)
        if len(self.units) == len(self.all_units):
            starts = itertools.accumulate(seconds[:-1], initial=0.0)
            queued = sum(size * start for size, start in zip(sizes, starts, strict=True)) / sum(sizes)
            return queued + own, None
        mean = sum(seconds) / len(seconds)
        return own + mean * (len(self.all_units) - 1) / 2, "estimated from the units that were run"

    @contextlib.contextmanager
    def _enabled(self) -> Iterator[None]:
        if not self.paged:
            yield
            return
        import hf_paged

        with hf_paged.enabled(self.context.model):
            yield


class LoopArm(GenerateArm):
    """`generate` for one request after another."""

    name: ClassVar[str] = "loop"
    title: ClassVar[str] = "HF loop, batch 1"

    def make_units(self) -> list[Unit]:
        return [Unit((i,)) for i in range(len(self.context.requests))]


class PagedLoopArm(LoopArm):
    """The same calls as `LoopArm` with the model enabled."""

    name: ClassVar[str] = "hf_paged_loop"
    title: ClassVar[str] = "hf_paged, one by one"

    def __init__(self, context: ArmContext, *, subset: int | None = None) -> None:
        super().__init__(context, subset=subset, paged=True)


class PaddedArm(GenerateArm):
    """`generate` for left-padded batches of `batch_size` requests in one of `ORDERS`."""

    name: ClassVar[str] = "padded"
    title: ClassVar[str] = "HF padded batches"

    def __init__(
        self,
        context: ArmContext,
        *,
        batch_size: int,
        order: str = "dataset",
        subset: int | None = None,
        paged: bool = False,
    ) -> None:
        if order not in ORDERS:
            raise ValueError(f"order={order!r}: must be one of {', '.join(ORDERS)}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: must be at least 1")
        self.batch_size, self.order = batch_size, order
        super().__init__(context, subset=subset, paged=paged)

    def make_units(self) -> list[Unit]:
        requests = self.context.requests
        indices = list(range(len(requests)))
        if self.order == "prompt":
            indices.sort(key=lambda i: len(requests[i].prompt))
        elif self.order == "oracle":
            indices.sort(key=lambda i: (requests[i].max_new_tokens, len(requests[i].prompt)))
        units: list[Unit] = []
        batch: list[int] = []
        for index in indices:
            if batch and (len(batch) == self.batch_size or not self.fits([*batch, index])):
                units.append(Unit(tuple(batch)))
                batch = []
            batch.append(index)
        return [*units, Unit(tuple(batch))]

    def may_join(self, indices: Sequence[int], index: int) -> bool:
        return len(indices) < self.batch_size and self.fits([*indices, index])

    def fits(self, indices: Sequence[int]) -> bool:
        """Whether the longest prompt and the longest output of a batch fit the positions together."""
        limit = self.token_limit()
        requests = [self.context.requests[i] for i in indices]
        needed = max(len(r.prompt) for r in requests) + max(r.max_new_tokens for r in requests)
        return limit is None or needed <= limit

    def token_limit(self) -> int | None:
        """Most tokens that the longest prompt and the longest output of a batch may have together."""
        return position_limit(self.context.model)

    @property
    def settings(self) -> dict[str, Any]:
        own = {
            "batch_size": self.batch_size,
            "order": self.order,
            "padding": "left",
        }
        return super().settings | own
