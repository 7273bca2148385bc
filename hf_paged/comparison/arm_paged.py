"""The arm of hf_paged: `generate_many` on the model, enabled for this arm's run only."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import hf_paged
from hf_paged.comparison.arms import Arm, ArmContext, ArmRun, Progress, cut_at_limit, short_requests
from hf_paged.comparison.timeline import Moment, Timeline, kv_bytes_per_token
from hf_paged.comparison.timing import RequestTiming
from hf_paged.comparison.workloads import Request
from hf_paged.engine import registry
from hf_paged.engine.stats import StepRecord


class PagedArm(Arm):
    """All requests at once through `hf_paged.generate_many`.

    Each run enables the model and disables it afterwards: a run starts without KV memory and without cached
    prefixes, and the other arms never see an enabled model. Enabling is not timed; what it leads to in the
    run (taking memory) is.
    """

    name: ClassVar[str] = "hf_paged"
    title: ClassVar[str] = "hf_paged"

    def __init__(self, context: ArmContext, *, config: Any = None) -> None:
        super().__init__(context)
        self.config = config if config is not None else hf_paged.PagedConfig()

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "call": "hf_paged.generate_many",
            "config": dataclasses.asdict(self.config),
            "requests_run": self.num_requests,
        }

    def warm_up(self) -> None:
        with hf_paged.enabled(self.context.model, self.config) as model:
            self._generate(model, short_requests(self.context.requests))

    def run(self, progress: Progress) -> ArmRun:
        requests = self.context.requests
        with hf_paged.enabled(self.context.model, self.config) as model:
            trace = traced(model)
            started = time.perf_counter()
            results = self._generate(model, requests)
            seconds = time.perf_counter() - started
            stats = hf_paged.stats(model)
        progress(len(requests))
        kept = self._kept(results, requests)
        run = ArmRun(seconds, dict(enumerate(kept)), [seconds], [sum(map(len, kept))], 1)
        # A request's clock starts when it is handed to the engine; what the call did before that counts as well.
        before = max(seconds - max(r.metrics.total for r in results), 0.0)
        firsts = [r.metrics.time_to_first_token for r in results]
        run.first_token_seconds = before + sum(firsts) / len(firsts)
        run.timings = [
            RequestTiming(
                i, 0.0, before + r.metrics.time_to_first_token, before + r.metrics.total, len(tokens)
            )
            for i, (r, tokens) in enumerate(zip(results, kept, strict=True))
        ]
        run.timings_note = "first and last token by the engine's clock"
        run.mean_running, run.kv_waste = stats.mean_running, stats.kv_waste
        run.timeline = timeline_of(trace, started, self.config.block_size, self.context.model)
        run.extra["stats"] = stats.to_dict()
        return run

    def serve(self, arrivals: Sequence[float], progress: Progress) -> ArmRun:
        """The first requests, each submitted at its arrival (seconds) to an engine that is warm."""
        requests = self.context.requests[: len(arrivals)]
        with hf_paged.enabled(self.context.model, self.config) as model:
            client = hf_paged.engine(model)
            configs = self._configs(requests)
            client.submit(list(requests[0].prompt), self._configs(short_requests(requests))[0]).result()
            trace = traced(model)
            began = time.perf_counter()
            handles = []
            for request, config, arrival in zip(requests, configs, arrivals, strict=True):
                time.sleep(max(began + arrival - time.perf_counter(), 0.0))
                handles.append(client.submit(list(request.prompt), config))
            results = []
            for handle in handles:
                results.append(handle.result())
                progress(1)
            seconds = time.perf_counter() - began
        kept = self._kept(results, requests)
        run = ArmRun(seconds, dict(enumerate(kept)), [seconds], [sum(map(len, kept))], 1)
        for index, (handle, arrival) in enumerate(zip(handles, arrivals, strict=True)):
            times = tuple(t - began for t in handle.token_times[: len(kept[index])])
            run.timings.append(RequestTiming(index, arrival, times[0], times[-1], len(times), times))
        run.timeline = timeline_of(trace, began, self.config.block_size, self.context.model)
        run.mean_running = None if run.timeline is None else run.timeline.mean_running
        return run

    def _kept(self, results: Sequence[Any], requests: Sequence[Request]) -> list[list[int]]:
        """The asked-for tokens.

        Raises:
            RuntimeError: a request did not end as it should.
        """
        for index, result in enumerate(results):
            if result.finish_reason not in ("stop", "length"):
                raise RuntimeError(
                    f"hf_paged: request {index} ended with {result.finish_reason!r}: {result.error}"
                )
        eos = self.context.eos_ids
        return [
            cut_at_limit(r.token_ids, q.max_new_tokens, eos) for r, q in zip(results, requests, strict=True)
        ]

    def _configs(self, requests: Sequence[Request]) -> list[Any]:
        from transformers import GenerationConfig

        base = self.context.model.generation_config.to_dict()
        return [
            GenerationConfig.from_dict(
                base | {"max_new_tokens": r.max_new_tokens, "do_sample": False, "num_beams": 1}
            )
            for r in requests
        ]

    def _generate(self, model: Any, requests: Sequence[Request]) -> list[Any]:
        prompts = [list(r.prompt) for r in requests]
        return hf_paged.generate_many(model, prompts, generation_config=self._configs(requests))


def traced(model: Any) -> list[StepRecord]:
    """The list into which the engine of an enabled model writes its steps from now on."""
    engine = registry.get(model)
    assert engine is not None, "the model is not enabled"
    trace: list[StepRecord] = []
    engine.counters.trace = trace
    return trace


def timeline_of(trace: Sequence[StepRecord], started: float, block_size: int, model: Any) -> Timeline | None:
    """The steps of a run; None if there were none."""
    if not trace:
        return None
    moments = [
        Moment(r.ended_at - started, r.num_sequences, r.blocks_used * block_size, r.tokens_held)
        for r in trace
    ]
    return Timeline(tuple(moments), kv_bytes_per_token(model))
