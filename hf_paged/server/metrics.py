"""What /metrics says: vLLM's names under our prefix, so that dashboards need no more than a rename.

Counters of the engine are read when somebody asks; what happened to requests is counted when they end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from hf_paged.engine.stats import EngineStats

if TYPE_CHECKING:
    from hf_paged.server.choice import Choice

PREFIX = "hf_paged:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 600)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class _EngineCollector(Collector):
    """The engine's counters at the moment of asking."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats | None]) -> None:
        self._label = model_name
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        s = self._stats()
        if s is None:
            return
        blocks = max(1, s.kv_blocks_total)
        gauges = {
            "num_requests_running": ("Sequences in the running batch", s.running),
            "num_requests_waiting": ("Sequences waiting for the batch", s.waiting),
            "kv_cache_usage_perc": (
                "Share of the KV blocks made so far that are in use, 0 to 1",
                s.kv_blocks_used / blocks,
            ),
            "kv_cache_blocks": ("KV blocks made so far", s.kv_blocks_total),
            "kv_cache_bytes": ("Memory held for KV", s.kv_bytes),
        }
        counters = {
            "num_preemptions": ("Sequences put back for want of blocks", s.preemptions),
            "prefix_cache_queries": ("Prompt tokens looked up in the prefix cache", s.prompt_tokens),
            "prefix_cache_hits": ("Prompt tokens found in the prefix cache", s.prefix_hit_tokens),
            "prompt_tokens": ("Prompt tokens taken up", s.prompt_tokens),
            "generation_tokens": ("Tokens generated", s.generated_tokens),
            "engine_steps": ("Forward passes", s.steps),
        }
        for name, (text, value) in gauges.items():
            yield self._one(GaugeMetricFamily(PREFIX + name, text, labels=["model_name"]), value)
        for name, (text, value) in counters.items():
            yield self._one(CounterMetricFamily(PREFIX + name, text, labels=["model_name"]), value)

    def _one(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric([self._label], value)
        return family


class Metrics:
    """The metrics of one app, in a registry of their own: several apps in a process do not meet."""

    def __init__(self, model_name: str, stats: Callable[[], EngineStats | None], *, vllm_names: bool) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(model_name, stats))
        self._vllm_names = vllm_names
        self._finished = Counter(
            PREFIX + "request_success",
            "Texts that came to their end",
            ["model_name", "finished_reason"],
            registry=self._registry,
        )
        self._refused = Counter(
            PREFIX + "request_errors",
            "Requests answered with an error",
            ["model_name", "status"],
            registry=self._registry,
        )

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(PREFIX + name, text, ["model_name"], buckets=buckets, registry=self._registry)
            return family.labels(model_name)

        self._first = histogram("time_to_first_token_seconds", "From submission to the first token", _SECONDS)
        self._each = histogram(
            "request_time_per_output_token_seconds", "Mean time between tokens of a text", _SECONDS
        )
        self._total = histogram("e2e_request_latency_seconds", "From submission to the last token", _SECONDS)
        self._queued = histogram("request_queue_time_seconds", "From submission to the first step", _SECONDS)
        self._prompt = histogram("request_prompt_tokens", "Prompt tokens of a text", _TOKENS)
        self._output = histogram("request_generation_tokens", "Tokens generated for a text", _TOKENS)
        self._n = histogram("request_params_n", "Texts asked for in one request", (1, 2, 5, 10, 20, 50, 100))
        self._model_name = model_name

    def asked(self, num_choices: int) -> None:
        """A request for so many texts was taken up."""
        self._n.observe(num_choices)

    def finished(self, reason: str) -> None:
        """A text came to its end."""
        self._finished.labels(self._model_name, reason).inc()

    def failed(self, status: int) -> None:
        """A request was answered with an error."""
        self._refused.labels(self._model_name, str(status)).inc()

    def ended(self, choice: Choice) -> None:
        """A text will not go on, finished or not."""
        result = choice.handle.partial()
        times = result.metrics
        self._prompt.observe(result.prompt_length)
        self._output.observe(choice.num_tokens)
        if times.queued is not None:
            self._queued.observe(times.queued)
        if times.time_to_first_token is not None:
            self._first.observe(times.time_to_first_token)
        if choice.seconds is not None:
            self._total.observe(choice.seconds)
            if times.time_to_first_token is not None and choice.num_tokens > 1:
                self._each.observe((choice.seconds - times.time_to_first_token) / (choice.num_tokens - 1))

    def render(self) -> bytes:
        """Everything, in Prometheus' text form."""
        text = generate_latest(self._registry)
        if self._vllm_names:
            text += text.replace(PREFIX.encode(), b"vllm:")
        return text
