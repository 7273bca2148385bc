"""Kernels alone: decode attention in GB/s, prefill in TFLOP/s beside what torch has, and the row-wise kernels."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator

import torch

from benchmarks.gpu.attention_inputs import Inputs, decode_inputs, prefill_inputs
from benchmarks.gpu.bench import Bench, Case, seconds_of
from benchmarks.gpu.results import Row
from benchmarks.gpu.row_cases import row_cases
from benchmarks.gpu.shapes import HEADS, TINY_HEADS, Heads
from benchmarks.gpu.torch_attention import flex_seconds, sdpa_seconds

#: Keys and values of one launch: more is skipped, it would not fit beside the rest.
_MOST_BYTES = 16e9
_FIRST = [(64, 4096), (256, 1024), (1, 32768), (32, 1024), (8, 4096)]
_BATCHES, _CONTEXTS = (1, 4, 8, 16, 32, 64, 128, 256), (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
#: Shares of the longest context, over and over.
_RAGGED = (1.0, 0.1, 0.4, 0.5, 1.0, 0.2)
_PREFILL_TOKENS = 16384


def cases(bench: Bench) -> Iterator[Case]:
    heads = TINY_HEADS if bench.tiny else HEADS
    first = [(2, 40)] if bench.tiny else _FIRST
    prompts = [24] if bench.tiny else [2048, 16384, 512, 4096, 1024, 8192]
    # The shapes that the claims are about, then prefill, then what is left of the grids.
    for shape, (batch, context) in itertools.product(heads[:4], first):
        yield from _decode_case(bench, shape, [context] * batch, f"batch {batch} context {context}")
    for shape, length in itertools.product(heads[:3], prompts):
        yield Case(f"prefill {shape.name} prompt {length}", _bound(_prefill, bench, shape, length, 0), 8)
    yield from row_cases(bench)
    for shape in heads[:3]:
        top = 40 if bench.tiny else 4096
        ragged = [int(top * share) for share in _RAGGED] * (1 if bench.tiny else 11)
        yield from _decode_case(bench, shape, ragged, f"ragged {len(ragged)} rows up to {top}")
        lonely = [8 * top] + [top // 8] * (1 if bench.tiny else 63)
        yield from _decode_case(bench, shape, lonely, f"one of {8 * top} among {len(lonely)}")
    chunks = [(8, 16)] if bench.tiny else [(512, 8192), (128, 2048), (2048, 8192), (2048, 2048)]
    for shape, (new, context) in itertools.product(heads[:2], chunks):
        name = f"chunk {shape.name} of {new} after {context}"
        yield Case(name, _bound(_prefill, bench, shape, new, context), 8)
    if bench.tiny:
        return
    for shape, batch, context in itertools.product(heads, _BATCHES, _CONTEXTS):
        if shape not in heads[:4] or (batch, context) not in first:
            yield from _decode_case(bench, shape, [context] * batch, f"batch {batch} context {context}")


def _bound(measure: Callable[..., Row], *arguments: object) -> Callable[[], Row]:
    return functools.partial(measure, *arguments)


def _decode_case(bench: Bench, shape: Heads, lengths: list[int], what: str) -> Iterator[Case]:
    if 4 * shape.kv_heads * shape.head_size * sum(lengths) <= _MOST_BYTES:
        yield Case(f"decode {shape.name} {what}", _bound(_decode, bench, shape, lengths))


def _decode(bench: Bench, shape: Heads, lengths: list[int]) -> Row:
    inputs = decode_inputs(shape, lengths, bench.device, _dtype(bench))
    seconds = seconds_of(inputs.run, bench.device)
    moved = inputs.kv_bytes + 2 * inputs.query.numel() * inputs.query.element_size()
    return {
        "us": 1e6 * seconds,
        "kv_gb": inputs.kv_bytes / 1e9,
        "gb_per_s": moved / seconds / 1e9,
        "percent_of_copy": bench.share_of_copy(moved / seconds),
    }


def _prefill(bench: Bench, shape: Heads, new: int, context: int) -> Row:
    rows = 1 if bench.tiny else max(1, _PREFILL_TOKENS // new)
    inputs: Inputs = prefill_inputs(shape, rows, new, context, bench.device, _dtype(bench))
    # A query sees its context and, on average, half of the new tokens.
    flop = 4 * shape.heads * shape.head_size * rows * new * (context + (new + 1) / 2)
    seconds = seconds_of(inputs.run, bench.device, graph=False)
    row: Row = {"us": 1e6 * seconds, "tflop_per_s": flop / seconds / 1e12}
    if context:
        return row
    best = None
    for backend, measured in sdpa_seconds(inputs, rows, new, bench.device).items():
        row[f"{backend}_tflop_per_s"] = None if measured is None else flop / measured / 1e12
        if measured is not None:
            best = min(best or measured, measured)
    row["flex_tflop_per_s"] = flop / flex_seconds(inputs, rows, new, bench.device) / 1e12
    row["percent_of_best_sdpa"] = None if best is None else 100 * best / seconds
    return row


def _dtype(bench: Bench) -> torch.dtype:
    return torch.float32 if bench.tiny else torch.bfloat16
