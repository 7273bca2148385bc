"""Attention of single tokens over KV blocks on a CPU: walks the block table and gathers nothing.

A *row* is one query token with all its heads; rows are independent. All rows' keys laid end to end are cut into
equal parts, one *bin* a thread, wherever that falls, so that one long row keeps all threads as busy as many short
ones:

    rows      |---- row 0 ----|-- row 1 --|--------- row 2 ---------|
    bins      |......... bin 0 .........|.......... bin 1 ..........|

A row inside one bin is finished there. A row cut by bins leaves its state in each, and these are merged at the end.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from hf_paged.kernels.cpu_jit import FASTMATH, entry, helper, item_bytes, load, store_f32
from hf_paged.kernels.cpu_row_attention import (
    CHUNK,
    RowShape,
    add_values,
    clear,
    dot_keys,
    finish,
    merge,
    weigh,
)
from hf_paged.kernels.cpu_store_kv import store_token

__all__ = ["TILE", "attend_rows", "attend_rows_parallel"]

#: Rows are cut between bins at multiples of this many tokens.
TILE = 16


class _Layer(NamedTuple):
    """Addresses and strides (in numbers) of one layer's tensors."""

    query: int  # [T, H, D]
    query_stride: int
    query_head_stride: int
    key: int  # [T, H_kv, D]; 0: keys and values are in the cache already
    key_stride: int
    key_head_stride: int
    value: int  # [T, H_kv, D]
    value_stride: int
    value_head_stride: int
    output: int  # [T, H, D] contiguous
    k_cache: int  # [N, B, H_kv, D]
    v_cache: int


@helper()
def _store_new(layer, token, slot, shape, tag):
    key = layer.key + token * layer.key_stride * item_bytes(tag)
    store_token(key, layer.k_cache, slot, layer.key_head_stride, shape.kv_heads, shape.head_size, tag)
    value = layer.value + token * layer.value_stride * item_bytes(tag)
    store_token(value, layer.v_cache, slot, layer.value_head_stride, shape.kv_heads, shape.head_size, tag)


@helper(fastmath=FASTMATH)
def _attend_span(layer, token, block_table, begin, end, shape, scale, softcap, scratch, state, io_tag, tag):
    """Brings `state` to what the token sees at positions begin to end; scratch is float32 [H, D + CHUNK]."""
    heads = shape.kv_heads * shape.group
    query = layer.query + token * layer.query_stride * item_bytes(io_tag)
    for head in range(heads):
        source = query + head * layer.query_head_stride * item_bytes(io_tag)
        for d in range(shape.head_size):
            store_f32(scratch, head * shape.head_size + d, load(source, d, io_tag) * scale)
    scores = scratch + 4 * heads * shape.head_size
    clear(state, shape)
    first = begin
    while first < end:
        last = min(end, (first // CHUNK + 1) * CHUNK)
        dot_keys(scratch, scores, layer.k_cache, block_table, first, last, shape, tag)
        weigh(scores, state, last - first, shape, softcap)
        add_values(scores, state, layer.v_cache, block_table, first, last, shape, tag)
        first = last


@helper()
def _attend_bin(
    index, bins, layer, shape, rows, starts, block_tables, slot_mapping, window, scale, softcap, sinks, states,
    owners, io_tag, tag,
):  # fmt: skip
    """Attends what falls into bin `index`. `starts` counts the tiles before each row."""
    heads = shape.kv_heads * shape.group
    state_size = heads * (shape.head_size + 2)
    buffer = np.empty(heads * (shape.head_size + CHUNK) + state_size, np.float32)
    scratch = buffer.ctypes.data
    local = scratch + 4 * heads * (shape.head_size + CHUNK)
    low, high = starts[-1] * index // bins, starts[-1] * (index + 1) // bins
    row = 0
    while row < rows.shape[0] and starts[row + 1] <= low:
        row += 1
    while row < rows.shape[0] and starts[row] < high:
        token, sequence, row_end = np.int64(rows[row, 0]), rows[row, 1], np.int64(rows[row, 2])
        row_begin = max(0, row_end - window) if window > 0 else 0
        # Both borders, in tiles of absolute positions.
        first = row_begin // TILE + max(0, low - starts[row])
        last = row_begin // TILE + high - starts[row]
        begin, end = max(row_begin, first * TILE), min(row_end, last * TILE)
        if layer.key != 0 and end == row_end and slot_mapping[token] >= 0:
            _store_new(layer, token, slot_mapping[token], shape, tag)
        state = local
        if starts[row] < low or starts[row + 1] > high:
            place = 2 * index + (1 if starts[row] >= low else 0)
            owners[place] = row
            state = states.ctypes.data + 4 * place * state_size
        _attend_span(
            layer,
            token,
            block_tables[sequence],
            begin,
            end,
            shape,
            scale,
            softcap,
            scratch,
            state,
            io_tag,
            tag,
        )
        if state == local:
            output = layer.output + token * heads * shape.head_size * item_bytes(io_tag)
            finish(state, output, shape, sinks, io_tag)
        row += 1


@helper()
def _finish_cut_rows(layer, shape, rows, sinks, states, owners, io_tag):
    """Merges and finishes the rows which bins have cut. Their states lie in the order of their positions."""
    heads = shape.kv_heads * shape.group
    state_bytes = 4 * heads * (shape.head_size + 2)
    place = 0
    while place < owners.shape[0]:
        row = owners[place]
        state = states.ctypes.data + place * state_bytes
        place += 1
        if row < 0:
            continue
        while place < owners.shape[0] and (owners[place] == row or owners[place] < 0):
            if owners[place] == row:
                merge(state, states.ctypes.data + place * state_bytes, shape)
            place += 1
        output = layer.output + np.int64(rows[row, 0]) * heads * shape.head_size * item_bytes(io_tag)
        finish(state, output, shape, sinks, io_tag)


@entry()
def attend_rows(
    query, query_stride, query_head_stride, key, key_stride, key_head_stride, value, value_stride, value_head_stride,
    output, k_cache, v_cache, block_size, kv_heads, group, head_size,
    rows, starts, block_tables, slot_mapping, window, scale, softcap, sinks, io_tag, tag,
):  # fmt: skip
    """Attends all rows on the calling thread.

    Args:
        query ... v_cache: the fields of `_Layer`.
        block_size ... head_size: the fields of `RowShape`.
        rows: [R, 3] int32: token, sequence, and how many of its keys the token sees.
        starts: [R + 1] int64: prefix sum of the tiles of each row, at least one a row.
        block_tables: [S, M] int32.
        slot_mapping: [T] int64.
        window: keys each token sees at most; 0 for all.
        scale: float32 factor on scores. softcap: float32; 0 for none. sinks: [H] float32, or empty.
        io_tag, tag: what numbers query and output, keys and values are (`cpu_jit.dtype_tag`).
    """
    layer = _Layer(
        query, query_stride, query_head_stride, key, key_stride, key_head_stride, value, value_stride,
        value_head_stride, output, k_cache, v_cache,
    )  # fmt: skip
    shape = RowShape(block_size, kv_heads, group, head_size)
    states, owners = np.empty((0, 0), np.float32), np.empty(0, np.int64)
    _attend_bin(
        0, 1, layer, shape, rows, starts, block_tables, slot_mapping, window, scale, softcap, sinks,
        states, owners, io_tag, tag,
    )  # fmt: skip


@entry(parallel=True)
def attend_rows_parallel(
    bins, query, query_stride, query_head_stride, key, key_stride, key_head_stride, value, value_stride,
    value_head_stride, output, k_cache, v_cache, block_size, kv_heads, group, head_size,
    rows, starts, block_tables, slot_mapping, window, scale, softcap, sinks, io_tag, tag,
):  # fmt: skip
    """`attend_rows` on `bins` threads."""
    layer = _Layer(
        query, query_stride, query_head_stride, key, key_stride, key_head_stride, value, value_stride,
        value_head_stride, output, k_cache, v_cache,
    )  # fmt: skip
    shape = RowShape(block_size, kv_heads, group, head_size)
    # A bin cuts at most two rows: the one it begins in and the one it ends in.
    states = np.empty((2 * bins, kv_heads * group * (head_size + 2)), np.float32)
    owners = np.empty(2 * bins, np.int64)
    for place in range(2 * bins):
        owners[place] = -1
    for index in prange(bins):
        _attend_bin(
            np.int64(index), bins, layer, shape, rows, starts, block_tables, slot_mapping, window, scale, softcap,
            sinks, states, owners, io_tag, tag,
        )  # fmt: skip
    _finish_cut_rows(layer, shape, rows, sinks, states, owners, io_tag)
