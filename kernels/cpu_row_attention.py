"""What one thread does for one query token over a span of its keys, on a CPU: scores, softmax and weighted sum.

Four tokens at a time are read from front to back for all heads, so memory is read in order and once, whatever the
number of query heads to a KV head. The softmax is online: what is known of a row so far is its *state*,

    weighted values [H, D] | highest score [H] | sum of weights [H]        float32

and states of parts of a row merge. Arguments are addresses; see `hf_paged.kernels.cpu_jit`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from hf_paged.kernels.cpu_jit import FASTMATH, helper
from hf_paged.kernels.cpu_memory import exp, item_bytes, load, load_f32, load_i32, store, store_f32

__all__ = ["CHUNK", "RowShape", "add_values", "clear", "dot_keys", "finish", "merge", "weigh"]

#: Tokens whose scores are held at a time.
CHUNK = 64
_ZERO = np.float32(0)
#: Stands for "no score yet": finite, so that a difference of two is never NaN.
_LOWEST = np.float32(-1e30)


class RowShape(NamedTuple):
    """The sizes all rows of a layer share."""

    block_size: int
    kv_heads: int
    group: int  # query heads to a KV head
    head_size: int


@helper(fastmath=FASTMATH)
def dot_keys(query, scores, cache, block_table, begin, end, shape, tag):
    """scores[h, t - begin] = query[h] . key[t] for begin <= t < end; scores is float32 [H, CHUNK]."""
    head_bytes = shape.head_size * item_bytes(tag)
    token_bytes = shape.kv_heads * head_bytes
    position = begin
    while position < end:
        offset = position % shape.block_size
        count = 4 if min(shape.block_size - offset, end - position) >= 4 else 1
        slot = load_i32(block_table, position // shape.block_size) * shape.block_size + offset
        key = cache + slot * token_bytes
        row = query
        target = scores + 4 * (position - begin)
        for _kv_head in range(shape.kv_heads):
            for _member in range(shape.group):
                if count == 4:
                    _dot_four(row, key, token_bytes, target, shape.head_size, tag)
                else:
                    dot = _ZERO
                    for d in range(shape.head_size):
                        dot += load_f32(row, d) * load(key, d, tag)
                    store_f32(target, 0, dot)
                row += 4 * shape.head_size
                target += 4 * CHUNK
            key += head_bytes
        position += count


@helper(inline="always", fastmath=FASTMATH)
def _dot_four(row, key, token_bytes, target, head_size, tag):
    key1, key2, key3 = key + token_bytes, key + 2 * token_bytes, key + 3 * token_bytes
    dot0, dot1, dot2, dot3 = _ZERO, _ZERO, _ZERO, _ZERO
    for d in range(head_size):
        x = load_f32(row, d)
        dot0 += x * load(key, d, tag)
        dot1 += x * load(key1, d, tag)
        dot2 += x * load(key2, d, tag)
        dot3 += x * load(key3, d, tag)
    store_f32(target, 0, dot0)
    store_f32(target, 1, dot1)
    store_f32(target, 2, dot2)
    store_f32(target, 3, dot3)


@helper(fastmath=FASTMATH)
def add_values(weights, sums, cache, block_table, begin, end, shape, tag):
    """sums[h] += weights[h, t - begin] * value[t] for begin <= t < end; weights is float32 [H, CHUNK]."""
    head_bytes = shape.head_size * item_bytes(tag)
    token_bytes = shape.kv_heads * head_bytes
    position = begin
    while position < end:
        offset = position % shape.block_size
        count = 4 if min(shape.block_size - offset, end - position) >= 4 else 1
        slot = load_i32(block_table, position // shape.block_size) * shape.block_size + offset
        value = cache + slot * token_bytes
        target = sums
        source = weights + 4 * (position - begin)
        for _kv_head in range(shape.kv_heads):
            for _member in range(shape.group):
                if count == 4:
                    _add_four(source, value, token_bytes, target, shape.head_size, tag)
                else:
                    weight = load_f32(source, 0)
                    for d in range(shape.head_size):
                        store_f32(target, d, load_f32(target, d) + weight * load(value, d, tag))
                target += 4 * shape.head_size
                source += 4 * CHUNK
            value += head_bytes
        position += count


@helper(inline="always", fastmath=FASTMATH)
def _add_four(source, value, token_bytes, target, head_size, tag):
    value1, value2, value3 = value + token_bytes, value + 2 * token_bytes, value + 3 * token_bytes
    weight0, weight1 = load_f32(source, 0), load_f32(source, 1)
    weight2, weight3 = load_f32(source, 2), load_f32(source, 3)
    for d in range(head_size):
        near = weight0 * load(value, d, tag) + weight1 * load(value1, d, tag)
        far = weight2 * load(value2, d, tag) + weight3 * load(value3, d, tag)
        store_f32(target, d, load_f32(target, d) + (near + far))


@helper(fastmath=FASTMATH)
def weigh(scores, state, count, shape, softcap):
    """Turns `count` scores a head into weights relative to the highest score so far, and rescales what was summed."""
    heads = shape.kv_heads * shape.group
    highest = state + 4 * heads * shape.head_size
    totals = highest + 4 * heads
    for head in range(heads):
        row = scores + 4 * head * CHUNK
        if softcap > _ZERO:
            for t in range(count):
                store_f32(row, t, softcap * np.float32(math.tanh(load_f32(row, t) / softcap)))
        before = load_f32(highest, head)
        top = before
        for t in range(count):
            score = load_f32(row, t)
            top = score if score > top else top
        total = _ZERO
        for t in range(count):
            weight = exp(load_f32(row, t) - top)
            store_f32(row, t, weight)
            total += weight
        if top != before:
            factor = exp(before - top)
            total += load_f32(totals, head) * factor
            sums = state + 4 * head * shape.head_size
            for d in range(shape.head_size):
                store_f32(sums, d, load_f32(sums, d) * factor)
        else:
            total += load_f32(totals, head)
        store_f32(highest, head, top)
        store_f32(totals, head, total)


@helper()
def clear(state, shape):
    heads = shape.kv_heads * shape.group
    for i in range(heads * shape.head_size):
        store_f32(state, i, _ZERO)
    for i in range(heads):
        store_f32(state, heads * shape.head_size + i, _LOWEST)
        store_f32(state, heads * (shape.head_size + 1) + i, _ZERO)


@helper(fastmath=FASTMATH)
def finish(state, output, shape, sinks, tag):
    """Writes a row's weighted mean [H, D] to `output`. sinks: address of [H] float32, or 0."""
    heads, head_size = shape.kv_heads * shape.group, shape.head_size
    for head in range(heads):
        top = load_f32(state, heads * head_size + head)
        total = load_f32(state, heads * (head_size + 1) + head)
        factor = np.float32(1)
        if sinks != 0:
            sink = load_f32(sinks, head)
            highest = max(top, sink)
            factor = exp(top - highest)
            total = total * factor + exp(sink - highest)
        # A row without keys has no weights: its output is zero.
        factor = _ZERO if total == _ZERO else factor / total
        for d in range(head_size):
            store(output, head * head_size + d, load_f32(state, head * head_size + d) * factor, tag)


@helper(fastmath=FASTMATH)
def merge(state, other, shape):
    """Adds the state of another part of the row to `state`."""
    heads, head_size = shape.kv_heads * shape.group, shape.head_size
    for head in range(heads):
        at_top, at_total = heads * head_size + head, heads * (head_size + 1) + head
        top0, top1 = load_f32(state, at_top), load_f32(other, at_top)
        top = max(top0, top1)
        factor0, factor1 = exp(top0 - top), exp(top1 - top)
        store_f32(state, at_top, top)
        store_f32(state, at_total, load_f32(state, at_total) * factor0 + load_f32(other, at_total) * factor1)
        for i in range(head * head_size, (head + 1) * head_size):
            store_f32(state, i, load_f32(state, i) * factor0 + load_f32(other, i) * factor1)
