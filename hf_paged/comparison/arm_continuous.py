"""The arm of transformers' own continuous batching (`generate_batch` and its manager), with hand-set pools.

`generate_batch` takes one `max_new_tokens` for all requests; the manager behind it, which is public as well,
takes one a request. This arm uses the manager, so that it too stops each request at its own limit: the fair,
and faster, way. Left to itself on a CPU it would size its pool to 60 % of the machine's memory; here the pool
is sized to hold a stated number of requests of the workload's mean length.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import torch

from hf_paged.comparison.arms import Arm, ArmContext, ArmRun, Progress, cut_at_limit, short_requests
from hf_paged.comparison.sampling import Unit, sample_units
from hf_paged.comparison.timeline import Timeline, kv_bytes_per_token, of_token_times
from hf_paged.comparison.timing import RequestTiming
from hf_paged.comparison.workloads import Request

#: Requests of mean length a pool has room for; the best of these is used.
POOL_ROWS = (16, 32, 64)
_PAGE_SIZE = 16
_CPU_BATCH_TOKENS = 256
_CUDA_BATCH_TOKENS = 2048
_RESULT_TIMEOUT = 5.0


class ContinuousBatchingArm(Arm):
    """All requests at once through transformers' continuous batching manager."""

    name: ClassVar[str] = "generate_batch"
    title: ClassVar[str] = "HF generate_batch"

    def __init__(self, context: ArmContext, *, pool_rows: int, subset: int | None = None) -> None:
        super().__init__(context)
        self.pool_rows = pool_rows
        units = [Unit((i,)) for i in range(len(context.requests))]
        chosen = [u.indices[0] for u in sample_units(units, context.requests, subset, context.seed)]
        self.indices = chosen
        self.requests = [context.requests[i] for i in chosen]
        self.pool = pool_settings(context, pool_rows)

    @property
    def num_requests(self) -> int:
        return len(self.requests)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "call": "continuous_batching_context_manager, add_request with each request's max_new_tokens",
            "pool_rows": self.pool_rows,
            **self.pool,
            "timed": "from making the manager to the last result",
            "requests_run": self.num_requests,
        }

    def warm_up(self) -> None:
        self._serve(short_requests(self.requests), lambda count: None)

    def run(self, progress: Progress) -> ArmRun:
        started = time.perf_counter()
        served = self._serve(self.requests, progress)
        return self._measured(served, started, [0.0] * len(self.requests))

    def serve(self, arrivals: Sequence[float], progress: Progress) -> ArmRun:
        """The first requests, each handed over at its arrival (seconds), to a manager that is up and warm."""
        requests = self.requests[: len(arrivals)]
        served = self._serve(requests, progress, arrivals)
        return self._measured(served, served.began, arrivals)

    def _measured(self, served: _Served, started: float, arrivals: Sequence[float]) -> ArmRun:
        seconds = served.ended - started
        eos = self.context.eos_ids
        requests = self.requests[: len(arrivals)]
        rows = [served.results[f"r{k}"] for k in range(len(requests))]
        kept = [
            cut_at_limit(row.generated_tokens, request.max_new_tokens, eos)
            for row, request in zip(rows, requests, strict=True)
        ]
        tokens = sum(map(len, kept))
        run = ArmRun(seconds, dict(zip(self.indices, kept, strict=False)), [seconds], [tokens], 1)
        times = [
            [t - started for t in row.timestamps or ()][: len(k)] for row, k in zip(rows, kept, strict=True)
        ]
        run.timings = [
            RequestTiming(index, arrival, t[0] if t else None, t[-1] if t else seconds, len(k), tuple(t))
            for index, arrival, t, k in zip(self.indices, arrivals, times, kept, strict=False)
        ]
        run.timings_note = "tokens by the timestamps of transformers' manager"
        if all(times):
            run.first_token_seconds = sum(t[0] - a for t, a in zip(times, arrivals, strict=True)) / len(times)
            prompts = [len(r.prompt) for r in requests]
            moments = of_token_times(prompts, times, self.pool["page_size"], seconds)
            run.timeline = Timeline(tuple(moments), kv_bytes_per_token(self.context.model))
            run.mean_running, run.kv_waste = run.timeline.mean_running, run.timeline.waste
        return run

    def _serve(
        self, requests: Sequence[Request], progress: Progress, arrivals: Sequence[float] | None = None
    ) -> _Served:
        """Results by id "r0", "r1", ..., and when the clock began and the last one was there.

        Stopping the manager comes after that: it collects garbage twice, which is no part of generating.

        Raises:
            RuntimeError: the manager stopped or failed a request.
        """
        context = self.context
        eos = list(context.eos_ids) or -1
        with _kept_state(context.model), torch.no_grad():
            config = copy.deepcopy(context.model.generation_config)
            config.update(
                do_sample=False, num_beams=1, max_new_tokens=max(r.max_new_tokens for r in requests)
            )
            config.eos_token_id = eos
            manager_context = context.model.continuous_batching_context_manager(
                generation_config=config, continuous_batching_config=_continuous_config(self.pool), block=True
            )
            with manager_context as manager:

                def add(name: str, request: Request) -> None:
                    manager.add_request(
                        list(request.prompt),
                        request_id=name,
                        max_new_tokens=request.max_new_tokens,
                        record_timestamps=True,
                        eos_token_id=eos,
                    )

                if arrivals is not None:
                    add("warm", short_requests(requests)[0])
                    _collect(manager, 1, lambda count: None)
                began = time.perf_counter()
                with _feeding(add, requests, arrivals, began):
                    results = _collect(manager, len(requests), progress)
                ended = time.perf_counter()
        return _Served(results, began, ended)


class _Served(NamedTuple):
    results: dict[str, Any]
    began: float  # perf_counter
    ended: float


@contextlib.contextmanager
def _feeding(
    add: Callable[[str, Request], None],
    requests: Sequence[Request],
    arrivals: Sequence[float] | None,
    began: float,
) -> Iterator[None]:
    """Hands all requests over at once, or each at its arrival from a thread, while the caller collects results."""
    if arrivals is None:
        for k, request in enumerate(requests):
            add(f"r{k}", request)
        yield
        return

    def feed() -> None:
        for k, (request, arrival) in enumerate(zip(requests, arrivals, strict=True)):
            time.sleep(max(began + arrival - time.perf_counter(), 0.0))
            add(f"r{k}", request)

    thread = threading.Thread(target=feed, name="arrivals", daemon=True)
    thread.start()
    yield
    thread.join()


def _collect(manager: Any, count: int, progress: Progress) -> dict[str, Any]:
    results: dict[str, Any] = {}
    while len(results) < count:
        result = manager.get_result(timeout=_RESULT_TIMEOUT)
        if result is None and not manager.is_running():
            raise RuntimeError("transformers' continuous batching stopped before all requests were done")
        if result is not None and result.is_finished():
            if result.error is not None:
                raise RuntimeError(f"transformers' continuous batching failed a request: {result.error}")
            results[result.request_id] = result
            progress(1)
    return results


def pool_settings(context: ArmContext, pool_rows: int) -> dict[str, int]:
    """Pool for `pool_rows` requests of mean length, and never less than the longest request needs."""
    lengths = [len(r.prompt) + r.max_new_tokens for r in context.requests]
    rows = min(pool_rows, len(lengths))
    pages = [math.ceil(n / _PAGE_SIZE) + 1 for n in lengths]
    blocks = max(math.ceil(rows * sum(pages) / len(pages)), 2 * max(pages))
    budget = _CUDA_BATCH_TOKENS if context.model.device.type == "cuda" else _CPU_BATCH_TOKENS
    return {
        "page_size": _PAGE_SIZE,
        "num_blocks": blocks,
        "max_batch_tokens": max(budget, rows),
        "max_requests_per_batch": rows,
    }


def _continuous_config(pool: dict[str, int]) -> Any:
    from transformers import ContinuousBatchingConfig

    names = {f.name for f in dataclasses.fields(ContinuousBatchingConfig)}
    # transformers before 5.17 calls the page size `block_size`, and some fields came later.
    renamed: dict[str, Any] = {
        ("block_size" if k == "page_size" and k not in names else k): v for k, v in pool.items()
    }
    return ContinuousBatchingConfig(**{k: v for k, v in renamed.items() if k in names})


@contextlib.contextmanager
def _kept_state(model: Any) -> Iterator[None]:
    """Puts back what the manager changes on the model: training mode, attention, a manager the user kept."""
    training = model.training
    attention = model.config._attn_implementation
    kept = model.__dict__.pop("_cached_continuous_batching_manager", None)
    logger = logging.getLogger("ContinuousBatchingLogger")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
        model.train(training)
        if model.config._attn_implementation != attention:
            model.set_attn_implementation(attention)
        if kept is not None:
            model._cached_continuous_batching_manager = kept
