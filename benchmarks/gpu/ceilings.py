"""What the machine can do at most, measured: shares of the other rows are of these."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.bench import Bench, Case, seconds_of
from benchmarks.gpu.results import Row


def cases(bench: Bench) -> Iterator[Case]:
    yield Case("ceiling copy", lambda: _copy(bench), 1)
    yield Case("ceiling matrix bf16", lambda: _matrix(bench), 1)


def _copy(bench: Bench) -> Row:
    size = 2**20 if bench.tiny else 2**30
    source = torch.empty(size, dtype=torch.uint8, device=bench.device).fill_(1)
    target = torch.empty_like(source)
    seconds = seconds_of(lambda: target.copy_(source), bench.device)
    bench.copy_rate = 2 * size / seconds
    return {"gb_per_s": bench.copy_rate / 1e9, "bytes": size}


def _matrix(bench: Bench) -> Row:
    size = 64 if bench.tiny else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=bench.device) for _ in range(2))
    seconds = seconds_of(lambda: a @ b, bench.device)
    bench.matrix_rate = 2 * size**3 / seconds
    return {"tflop_per_s": bench.matrix_rate / 1e12, "size": size}
