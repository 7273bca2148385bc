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

import torch
from transformers.generation.streamers import BaseStreamer

from hf_paged.comparison.arms import (
    Arm,
    ArmContext,
    ArmRun,
    Progress,
    cut_at_limit,
    position_limit,
    short_requests,
)
from hf_paged.comparison.sampling import Unit, sample_units
from hf_paged.comparison.workloads import Request

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
        waits: list[float | None] = []
        with self._enabled():
            for unit, batch in zip(self.units, self.batches, strict=True):
                clock = FirstTokenClock()
                started = time.perf_counter()
                rows = generate_batch(self.context.model, batch, clock if self.clocked else None)
                seconds.append(time.perf_counter() - started)
                waits.append(None if clock.first_token_at is None else clock.first_token_at - started)
                kept = [self._cut(rows[k], i) for k, i in enumerate(unit.indices)]
                outputs.update(zip(unit.indices, kept, strict=True))
                tokens.append(sum(map(len, kept)))
                progress(len(unit.indices))
        run = ArmRun(sum(seconds), outputs, seconds, tokens, len(self.all_units))
        run.first_token_seconds, run.first_token_note = self._first_token(seconds, waits)
        return run

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
            if batch and (len(batch) == self.batch_size or not self._fits([*batch, index])):
                units.append(Unit(tuple(batch)))
                batch = []
            batch.append(index)
        return [*units, Unit(tuple(batch))]

    def _fits(self, indices: list[int]) -> bool:
        """Whether the longest prompt and the longest output of a batch fit the positions together."""
        limit = position_limit(self.context.model)
        requests = [self.context.requests[i] for i in indices]
        needed = max(len(r.prompt) for r in requests) + max(r.max_new_tokens for r in requests)
        return limit is None or needed <= limit

    @property
    def settings(self) -> dict[str, Any]:
        own = {
            "batch_size": self.batch_size,
            "order": self.order,
            "padding": "left",
        }
        return super().settings | own


class FirstTokenClock(BaseStreamer):
    """Notes when the first generated tokens come; `generate` hands a streamer the prompt first."""

    def __init__(self) -> None:
        self.first_token_at: float | None = None
        self._prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_seen:
            self._prompt_seen = True
        elif self.first_token_at is None:
            self.first_token_at = time.perf_counter()

    def end(self) -> None:
        """Nothing to flush."""


def pad_batch(requests: Sequence[Request], context: ArmContext) -> dict[str, Any]:
    """Arguments of `generate` for a left-padded batch: ids and mask [rows, longest prompt] int64."""
    width = max(len(r.prompt) for r in requests)
    ids = torch.full((len(requests), width), context.pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.prompt) :] = torch.tensor(request.prompt)
        mask[row, width - len(request.prompt) :] = 1
    device = context.model.device
    return {
        "input_ids": ids.to(device),
        "attention_mask": mask.to(device),
        "max_new_tokens": max(r.max_new_tokens for r in requests),
        "do_sample": False,
        "num_beams": 1,
        "pad_token_id": context.pad_id,
    }


def generate_batch(
    model: Any, batch: dict[str, Any], streamer: BaseStreamer | None = None
) -> list[list[int]]:
    """The new tokens of each row, pads and all."""
    extra = {} if streamer is None else {"streamer": streamer}
    with torch.no_grad():
        out = model.generate(**batch, **extra)
    return out[:, batch["input_ids"].shape[1] :].tolist()
