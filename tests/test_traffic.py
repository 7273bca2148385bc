"""Many threads with requests of every kind at once: each gets what it gets alone, and nothing is left behind."""

from __future__ import annotations

import importlib.util
import itertools
import sys
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import hf_paged
from hf_paged.engine import registry
from tests.helpers import ROOT, VOCAB_SIZE, make_model

NUM_STATES = 3  # of the weights: two training steps


def script(name: str) -> ModuleType:
    """A module of benchmarks/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


mixed = script("mixed_requests")
MIX = mixed.Mix(VOCAB_SIZE)


@pytest.fixture
def served() -> Iterator[Any]:
    model = hf_paged.enable(make_model("llama"), block_size=4, kv_cache_memory="2MiB", fallback="error")
    yield model
    hf_paged.disable(model)


def run_traffic(model: Any, num_threads: int, per_thread: int, *, states: int, times: int = 1) -> None:
    jobs = mixed.jobs_of(MIX, num_threads * per_thread, seed=1)
    wanted = mixed.alone(make_model("llama"), jobs, states)
    assert all(a != b for a, b in itertools.pairwise(wanted)), "training changes nothing"
    for _ in range(times):
        run_once(model, jobs, num_threads, wanted)


def run_once(model: Any, jobs: list[Any], num_threads: int, wanted: list[list[Any]]) -> None:
    before = threading.active_count()
    with mixed.restored_weights(model):
        _, results = mixed.at_once(model, jobs, num_threads, len(wanted))
    for i in mixed.differing(jobs, results, wanted):
        assert results[i] == wanted[-1][i], f"job {i}: {jobs[i].kind}, seed {jobs[i].seed}"
    engine = registry.get(model)
    assert engine is not None
    engine.drain()  # what was dropped ends at a step boundary
    for thread in threading.enumerate():
        if thread.name.startswith("hf_paged-engine"):
            thread.join(mixed.DEADLINE_S)
            assert not thread.is_alive(), "the engine's thread stays"
    assert threading.active_count() <= before
    stats = hf_paged.stats(model)
    assert stats.fallback_calls == {}
    assert stats.kv_blocks_used == 0
    assert stats.peak_running > 1


@pytest.mark.parametrize("states", [1, NUM_STATES])
def test_every_result_is_that_of_the_request_alone(served: Any, states: int) -> None:
    run_traffic(served, 8, 6, states=states)


def test_every_kind_occurs() -> None:
    """The runs above mean something only if their seed draws all kinds."""
    assert {job.kind for job in mixed.jobs_of(MIX, 48, seed=1)} == mixed.KINDS.keys()


@pytest.mark.slow
def test_32_threads_of_20_requests_ten_times(served: Any) -> None:
    run_traffic(served, 32, 20, states=2, times=10)
