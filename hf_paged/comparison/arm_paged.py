"""The arm of hf_paged: `generate_many` on the model, enabled for this arm's run only."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from typing import Any, ClassVar

import hf_paged
from hf_paged.comparison.arms import Arm, ArmContext, ArmRun, Progress, cut_at_limit, short_requests
from hf_paged.comparison.workloads import Request


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
        requests, eos = self.context.requests, self.context.eos_ids
        with hf_paged.enabled(self.context.model, self.config) as model:
            started = time.perf_counter()
            results = self._generate(model, requests)
            seconds = time.perf_counter() - started
            stats = hf_paged.stats(model)
        progress(len(requests))
        for index, result in enumerate(results):
            if result.finish_reason not in ("stop", "length"):
                raise RuntimeError(
                    f"hf_paged: request {index} ended with {result.finish_reason!r}: {result.error}"
                )
        kept = [
            cut_at_limit(r.token_ids, q.max_new_tokens, eos) for r, q in zip(results, requests, strict=True)
        ]
        run = ArmRun(seconds, dict(enumerate(kept)), [seconds], [sum(map(len, kept))], 1)
        # A request's clock starts when it is handed to the engine; what the call did before that counts as well.
        before = max(seconds - max(r.metrics.total for r in results), 0.0)
        firsts = [r.metrics.time_to_first_token for r in results]
        run.first_token_seconds = before + sum(firsts) / len(firsts)
        run.kv_waste = stats.kv_waste
        run.extra["stats"] = stats.to_dict()
        return run

    def _generate(self, model: Any, requests: Sequence[Request]) -> list[Any]:
        from transformers import GenerationConfig

        base = self.context.model.generation_config.to_dict()
        configs = [
            GenerationConfig.from_dict(
                base | {"max_new_tokens": r.max_new_tokens, "do_sample": False, "num_beams": 1}
            )
            for r in requests
        ]
        return hf_paged.generate_many(model, [list(r.prompt) for r in requests], generation_config=configs)
