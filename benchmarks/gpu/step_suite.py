"""Whole models: milliseconds a decode step, against the time to read weights and keys once, and what the host adds."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch

import hf_paged
from benchmarks.gpu.bench import Bench, Case
from benchmarks.gpu.idle import idle_share
from benchmarks.gpu.models import Lent, engine_options
from benchmarks.gpu.results import Row
from benchmarks.gpu.shapes import MODELS, TINY_MODELS, kv_bytes_per_token, read_bytes
from benchmarks.step_recorder import Step, recorded_steps
from hf_paged.comparison.arm_paged import traced
from hf_paged.comparison.workloads import prompt_source
from hf_paged.engine.stats import StepRecord

#: The mean of tokens that a ShareGPT request has while it runs is about 330.
_PROMPT, _NEW = 314, 33


def cases(bench: Bench) -> Iterator[Case]:
    for shape in TINY_MODELS if bench.tiny else MODELS:
        lent = Lent(bench, shape)
        for batch in (2,) if bench.tiny else (1, 256, 64, 32):
            yield Case(f"step {shape.name} batch {batch}", functools.partial(_step, bench, lent, batch), 15)
        lent.drop()


def _step(bench: Bench, lent: Lent, batch: int) -> Row:
    model = lent.model
    length, new = (5, 4) if bench.tiny else (_PROMPT, _NEW)
    draw = prompt_source(model.config.vocab_size, (), 0)
    prompts = [draw(length) for _ in range(batch)]
    kv = kv_bytes_per_token(model)
    options = engine_options(bench) | {"prefix_caching": False, "max_num_seqs": batch}
    # The default is half of what is free, in a machine that may have other uses; here there are none.
    options["kv_cache_memory"] = 2 * batch * (length + new + 16) * kv
    with hf_paged.enabled(model, **options):
        _generate(model, prompts, min(new, 5))  # compiles, and captures
        trace = traced(model)
        with recorded_steps() as recording:
            _generate(model, prompts, new)
        step_s = _seconds_between(trace, batch)
        forward_s = _forward_seconds(bench, recording.steps, batch)
        with idle_share(bench.device, batch) as idle:
            _generate(model, prompts, new)
        steps_ahead = hf_paged.stats(model).steps_ahead
    moved = read_bytes(model) + batch * (length + new / 2) * kv
    floor_s = moved / _known(bench.copy_rate)
    flop = 2 * batch * read_bytes(model) / model.dtype.itemsize
    floor_s = max(floor_s, flop / _known(bench.matrix_rate))
    return {
        "ms": 1e3 * step_s,
        "tokens_per_s": batch / step_s,
        "floor_ms": 1e3 * floor_s,
        "percent_of_roofline": 100 * floor_s / step_s,
        "forward_ms": 1e3 * forward_s,
        "percent_beside_forward": 100 * (1 - forward_s / step_s),
        "percent_idle": idle.percent(),
        "steps_ahead": steps_ahead,
    }


def _known(rate: float | None) -> float:
    if rate is None:
        raise RuntimeError("the ceilings of this machine were not measured: their rows failed")
    return rate


def _generate(model: Any, prompts: list[list[int]], new: int) -> None:
    hf_paged.generate_many(model, prompts, max_new_tokens=new, do_sample=False)


def _seconds_between(trace: list[StepRecord], batch: int) -> float:
    """Median seconds from one step to the next, of steps that made one token for each of `batch` sequences."""
    gaps = [
        after.ended_at - before.ended_at
        for before, after in itertools.pairwise(trace)
        if before.num_sequences == after.num_sequences == batch
        and after.tokens_held - before.tokens_held == batch
    ]
    return statistics.median(gaps)


def _forward_seconds(bench: Bench, steps: list[Step], batch: int) -> float:
    """Seconds of a decode step's forward alone, one after another without the host's work in between."""
    last = next(s for s in reversed(steps) if s.num_tokens == len(s.seq_lens) == batch)
    runner, *arguments = last.arguments
    repeats = 1 if bench.tiny else 20
    runner.forward(*arguments)
    _wait(bench)
    started = time.perf_counter()
    for _ in range(repeats):
        runner.forward(*arguments)
    _wait(bench)
    return (time.perf_counter() - started) / repeats


def _wait(bench: Bench) -> None:
    if bench.device.type == "cuda":
        torch.cuda.synchronize(bench.device)
