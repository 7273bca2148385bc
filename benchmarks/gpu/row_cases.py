"""Row-wise kernels beside torch's own operations, in GB/s of what they must move."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.gpu.bench import Bench, Case, seconds_of
from benchmarks.gpu.results import Row
from hf_paged.kernels.triton_activation import gelu, silu_mul
from hf_paged.kernels.triton_rms_norm import rms_norm
from hf_paged.kernels.triton_sample import sample
from hf_paged.kernels.triton_seeded_uniform import seeded_uniform


def row_cases(bench: Bench) -> Iterator[Case]:
    """Norm with its residual, activations and the sampler, at decode batches."""
    sizes = [(2, 48)] if bench.tiny else [(256, 4096), (1, 4096), (256, 14336)]
    for make in (_rms_norm, _silu_mul, _gelu):
        for rows, width in sizes:
            name = f"{make.__name__.strip('_')} {rows}x{width}"
            yield Case(name, functools.partial(_beside_torch, bench, make, rows, width))
    for rows, vocab in [(2, 40)] if bench.tiny else [(256, 128256), (1, 128256), (64, 50257)]:
        yield Case(f"sample {rows}x{vocab}", functools.partial(_sample, bench, rows, vocab))
        yield Case(f"seeded_uniform {rows}x{vocab}", functools.partial(_seeded_uniform, bench, rows, vocab))


#: (ours, torch's, bytes that must move)
_Pair = tuple[Callable[[], Any], Callable[[], Any], int]


def _beside_torch(bench: Bench, make: Callable[..., _Pair], rows: int, width: int) -> Row:
    dtype = torch.float32 if bench.tiny else torch.bfloat16
    x, other = (torch.randn(rows, width, dtype=dtype, device=bench.device) for _ in range(2))
    ours, theirs, moved = make(x, other)
    seconds, torch_seconds = seconds_of(ours, bench.device), seconds_of(theirs, bench.device)
    return {
        "us": 1e6 * seconds,
        "gb_per_s": moved / seconds / 1e9,
        "percent_of_copy": bench.share_of_copy(moved / seconds),
        "torch_us": 1e6 * torch_seconds,
    }


def _rms_norm(x: torch.Tensor, residual: torch.Tensor) -> _Pair:
    weight = torch.ones_like(x[0])

    def theirs() -> torch.Tensor:
        return F.rms_norm(x + residual, weight.shape, weight, 1e-5)

    return lambda: rms_norm(x, weight, 1e-5, residual), theirs, 4 * x.numel() * x.element_size()


def _silu_mul(gate: torch.Tensor, up: torch.Tensor) -> _Pair:
    moved = 3 * gate.numel() * gate.element_size()
    return lambda: silu_mul(gate, up), lambda: F.silu(gate) * up, moved


def _gelu(x: torch.Tensor, _: torch.Tensor) -> _Pair:
    moved = 2 * x.numel() * x.element_size()
    return lambda: gelu(x, "tanh"), lambda: F.gelu(x, approximate="tanh"), moved


def _seeded_uniform(bench: Bench, rows: int, vocab: int) -> Row:
    places = torch.arange(4 * rows, device=bench.device).view(rows, 4)
    out = torch.empty(rows, vocab, device=bench.device)
    seconds = seconds_of(lambda: seeded_uniform(places, vocab), bench.device)
    return {
        "us": 1e6 * seconds,
        "gb_per_s": 4 * rows * vocab / seconds / 1e9,
        "torch_us": 1e6 * seconds_of(lambda: out.exponential_(), bench.device, graph=False),
    }


def _sample(bench: Bench, rows: int, vocab: int) -> Row:
    device = bench.device
    logits = torch.randn(rows, vocab, device=device)
    ones, numbers = torch.ones(rows, device=device), torch.arange(rows, device=device)
    top_k = torch.full((rows,), 50, dtype=torch.int32, device=device)

    def with_sort() -> torch.Tensor:
        kept = logits.masked_fill(logits < logits.topk(min(50, vocab)).values[:, -1:], float("-inf"))
        ordered, places = kept.sort(descending=True)
        odds = ordered.softmax(-1)
        odds = odds.masked_fill(odds.cumsum(-1) - odds > 0.9, 0.0)
        return places.gather(1, torch.multinomial(odds, 1))

    return {
        "us": 1e6 * seconds_of(lambda: sample(logits, ones, numbers, numbers), device),
        "top_k_top_p_us": 1e6
        * seconds_of(lambda: sample(logits, ones, numbers, numbers, top_k=top_k, top_p=ones * 0.9), device),
        "torch_sort_us": 1e6 * seconds_of(with_sort, device, graph=False),
    }
