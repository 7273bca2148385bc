"""Offline throughput on ShareGPT lengths: `generate` by vLLM's protocol and by a fair one, `generate_batch`, hf_paged.

All arms of a model get the same fixed requests. Arms of `generate` run on a sample of their batches; the standard
error of their rate is in the row.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import hf_paged
from benchmarks.gpu.bench import Bench, Case
from benchmarks.gpu.models import Lent, engine_options
from benchmarks.gpu.results import Row
from benchmarks.gpu.shapes import MODELS, TINY_MODELS
from benchmarks.gpu.vllm_protocol import generate_rate, paged_rate
from hf_paged.comparison.arms import position_limit
from hf_paged.comparison.lengths import find_distribution
from hf_paged.comparison.workloads import Request, Workload, fit, prompt_source


def cases(bench: Bench) -> Iterator[Case]:
    shapes = TINY_MODELS if bench.tiny else (MODELS[0], MODELS[2], MODELS[1])
    for shape in shapes:
        lent = Lent(bench, shape)
        offline = _Offline(bench, lent)
        name = f"offline {shape.name}"
        yield Case(f"{name} hf_paged, greedy", offline.paged, 40)
        yield Case(f"{name} hf_paged, vLLM's protocol", offline.paged_by_vllm, 30)
        yield Case(f"{name} generate, vLLM's protocol", offline.generate_by_vllm, 80)
        yield Case(f"{name} generate_batch", offline.generate_batch, 60)
        yield Case(f"{name} generate, sorted by prompt", offline.generate_sorted, 80)
        lent.drop()


class _Offline:
    """The arms of one model; `_rates` are those of hf_paged by protocol, which ratios are of."""

    def __init__(self, bench: Bench, lent: Lent) -> None:
        self._bench, self._lent = bench, lent
        self._rates: dict[str, float] = {}

    @functools.cached_property
    def workload(self) -> Workload:
        model, count = self._lent.model, 3 if self._bench.tiny else 256
        lengths = find_distribution("sharegpt")
        if self._bench.tiny:
            lengths = lengths.scaled(1 / 60)
        draw = prompt_source(model.config.vocab_size, (0,), 0)
        requests = [Request(tuple(draw(p)), o) for p, o in lengths.draw(count, 0)]
        return fit(Workload("sharegpt", tuple(requests), 0), position_limit(model))

    def paged(self) -> Row:
        config = hf_paged.PagedConfig(**engine_options(self._bench))
        row = self._compare("hf_paged", config=config)
        self._rates["asked"] = row["output_tokens_per_s"]
        return row

    def paged_by_vllm(self) -> Row:
        row = paged_rate(self._lent.model, self.workload.requests, engine_options(self._bench))
        self._rates["credited"] = row["tokens_per_s"]
        return row

    def generate_by_vllm(self) -> Row:
        size, subset = (2, 2) if self._bench.tiny else (64, 128)
        row = generate_rate(self._lent.model, self.workload.requests, size, subset)
        return row | self._ratio("credited", row["tokens_per_s"])

    def generate_sorted(self) -> Row:
        sizes = (2,) if self._bench.tiny else (64,)
        row = self._compare(
            "padded", padded_sizes=sizes, padded_orders=("prompt",), padded_subset=2 * sizes[0]
        )
        return row | self._ratio("asked", row["output_tokens_per_s"])

    def generate_batch(self) -> Row:
        row = self._compare("generate_batch", pool_rows=(2,) if self._bench.tiny else (256,))
        return row | self._ratio("asked", row["output_tokens_per_s"])

    def _compare(self, arm: str, *, config: Any = None, **options: Any) -> Row:
        report = hf_paged.compare(
            self._lent.model, self.workload, arms=(arm,), repeats=1, config=config, ignore_eos=True, **options
        )
        found = report.arm(arm)
        if found is None or found.error is not None:
            raise RuntimeError(f"{arm}: {None if found is None else found.error}")
        run = found.runs[-1]
        return {
            "output_tokens_per_s": run.tokens_per_second,
            "relative_error": run.relative_error,
            "seconds": run.seconds,
            "settings": found.settings,
            "workload": self.workload.describe(),
        }

    def _ratio(self, protocol: str, rate: float) -> Row:
        ours = self._rates.get(protocol)
        return {"hf_paged_times_this": None if ours is None else ours / rate}
