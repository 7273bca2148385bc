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
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import torch

from hf_paged.comparison.arms import Arm, ArmContext, ArmRun, Progress, cut_at_limit, short_requests
from hf_paged.comparison.sampling import Unit, sample_units
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
        results, ended = self._serve(self.requests, progress)
        seconds = ended - started
        eos = self.context.eos_ids
        rows = [results[f"r{k}"] for k in range(len(self.requests))]
        kept = [
            cut_at_limit(row.generated_tokens, request.max_new_tokens, eos)
            for row, request in zip(rows, self.requests, strict=True)
        ]
        tokens = sum(map(len, kept))
        run = ArmRun(seconds, dict(zip(self.indices, kept, strict=True)), [seconds], [tokens], 1)
        firsts = [row.timestamps[0] - started for row in rows if row.timestamps]
        run.first_token_seconds = sum(firsts) / len(firsts) if firsts else None
        return run

    def _serve(self, requests: Sequence[Request], progress: Progress) -> tuple[dict[str, Any], float]:
        """Results by id "r0", "r1", ..., and when the last one was there.

        Stopping the manager comes after that: it collects garbage twice, which is no part of generating.

        Raises:
            RuntimeError: the manager stopped or failed a request.
        """
        context = self.context
        eos = list(context.eos_ids) or -1
        results: dict[str, Any] = {}
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
                for k, request in enumerate(requests):
                    manager.add_request(
                        list(request.prompt),
                        request_id=f"r{k}",
                        max_new_tokens=request.max_new_tokens,
                        record_timestamps=True,
                        eos_token_id=eos,
                    )
                while len(results) < len(requests):
                    result = manager.get_result(timeout=_RESULT_TIMEOUT)
                    if result is None and not manager.is_running():
                        raise RuntimeError(
                            "transformers' continuous batching stopped before all requests were done"
                        )
                    if result is not None and result.is_finished():
                        if result.error is not None:
                            raise RuntimeError(
                                f"transformers' continuous batching failed a request: {result.error}"
                            )
                        results[result.request_id] = result
                        progress(1)
                ended = time.perf_counter()
        return results, ended


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
