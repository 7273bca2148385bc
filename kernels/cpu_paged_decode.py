"""Attention of single tokens over KV blocks on a CPU: walks the block table and gathers nothing.

A *row* is one query token with all its heads; rows are independent. All rows' keys laid end to end are cut into
equal parts, one *bin* a thread, wherever that falls, so that one long row keeps all threads as busy as many short
ones:

    rows      |---- row 0 ----|-- row 1 --|--------- row 2 ---------|
    bins      |......... bin 0 .........|.......... bin 1 ..........|

A row inside one bin is finished there. A row cut by bins leaves its state in each, and these are merged at the end.

Where bins cut depends on the other rows. `attend_whole_rows` cuts none, so that a row's sums have an order which its
own positions decide: what deterministic mode needs.
"""

from __future__ import annotations

from typing import NamedTuple

from hf_paged.kernels.cpu_jit import FASTMATH, entry, helper, kernel_by_dtype
from hf_paged.kernels.cpu_memory import (
    argument,
    float_argument,
    has_scales,
    item_bytes,
    load,
    load_i32,
    load_i64,
    store_f32,
    store_i64,
)
from hf_paged.kernels.cpu_quantise import scale_scores
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
from hf_paged.kernels.cpu_store_kv import new_token_bytes, store_token

__all__ = ["TILE", "attend_bin", "attend_whole_rows", "finish_cut_rows", "scratch_size"]

#: Rows are cut between bins at multiples of this many tokens.
TILE = 16


class _Layer(NamedTuple):
    """Addresses and strides (in numbers) of one layer's tensors: the first twelve arguments and the last two."""

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
    k_scales: int  # [N, B, H_kv] float32 of an int8 cache, else 0
    v_scales: int


class _Rows(NamedTuple):
    """What is attended, after the layer and the shape: addresses, and numbers."""

    rows: int  # [R, 3] int32: token, sequence, and how many of its keys the token sees
    num_rows: int
    starts: int  # [R + 1] int64: prefix sum of the tiles of each row, at least one a row
    block_tables: int  # [S, M] int32
    table_width: int  # M
    slot_mapping: int  # [T] int64
    window: int  # keys each token sees at most; 0 for all
    states: int  # [2 * bins] states of rows that bins have cut: at most the one a bin begins in and the one it ends in
    owners: int  # [2 * bins] int64: the row of each, -1 for none


@helper(inline="always")
def _layer(arguments):
    return _Layer(
        argument(arguments, 0), argument(arguments, 1), argument(arguments, 2), argument(arguments, 3),
        argument(arguments, 4), argument(arguments, 5), argument(arguments, 6), argument(arguments, 7),
        argument(arguments, 8), argument(arguments, 9), argument(arguments, 10), argument(arguments, 11),
        argument(arguments, 30), argument(arguments, 31),
    )  # fmt: skip


@helper(inline="always")
def _shape(arguments):
    return RowShape(
        argument(arguments, 12), argument(arguments, 13), argument(arguments, 14), argument(arguments, 15)
    )


@helper(inline="always")
def _rows(arguments):
    return _Rows(
        argument(arguments, 16), argument(arguments, 17), argument(arguments, 18), argument(arguments, 19),
        argument(arguments, 20), argument(arguments, 21), argument(arguments, 22), argument(arguments, 23),
        argument(arguments, 24),
    )  # fmt: skip


@helper(inline="always")
def _store_new(layer, token, slot, shape, tag):
    heads, size, width = shape.kv_heads, shape.head_size, new_token_bytes(tag)
    key = layer.key + token * layer.key_stride * width
    store_token(key, layer.k_cache, layer.k_scales, slot, layer.key_head_stride, heads, size, tag)
    value = layer.value + token * layer.value_stride * width
    store_token(value, layer.v_cache, layer.v_scales, slot, layer.value_head_stride, heads, size, tag)


@helper(inline="always", fastmath=FASTMATH)
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
        if has_scales(tag):
            scale_scores(scores, layer.k_scales, block_table, first, last, shape, CHUNK)
        weigh(scores, state, last - first, shape, softcap)
        if has_scales(tag):
            scale_scores(scores, layer.v_scales, block_table, first, last, shape, CHUNK)
        add_values(scores, state, layer.v_cache, block_table, first, last, shape, tag)
        first = last


def scratch_size(heads: int, head_size: int) -> int:
    """Float32 numbers a bin works in.

    The caller owns them: numba frees an array of a kernel's own after the last line that names it, though its address
    is still in use.
    """
    return heads * (head_size + CHUNK) + heads * (head_size + 2)


@kernel_by_dtype
def attend_bin(io_tag, tag):
    """Attends what falls into one bin.

    Arguments: the fields of `_Layer`, of `RowShape` and of `_Rows`; sinks ([H] float32, or 0), scale and softcap
    (float32; 0 for none); how many bins there are; scratch ([bins, `scratch_size`] float32); k_scales and v_scales.
    The dtypes are those of query and output, and of the cache; new keys and values are in the cache's, for int8 in
    float32.
    """

    @entry(fastmath=FASTMATH)
    def kernel(index, bins, arguments):
        layer, shape, rows = _layer(arguments), _shape(arguments), _rows(arguments)
        sinks = argument(arguments, 25)
        scale, softcap = float_argument(arguments, 26), float_argument(arguments, 27)
        heads = shape.kv_heads * shape.group
        state_size = heads * (shape.head_size + 2)
        scratch = argument(arguments, 29) + 4 * index * (heads * (shape.head_size + CHUNK) + state_size)
        local = scratch + 4 * heads * (shape.head_size + CHUNK)
        tiles = load_i64(rows.starts, rows.num_rows)
        low, high = tiles * index // bins, tiles * (index + 1) // bins
        row = 0
        while row < rows.num_rows and load_i64(rows.starts, row + 1) <= low:
            row += 1
        while row < rows.num_rows and load_i64(rows.starts, row) < high:
            row_start, next_start = load_i64(rows.starts, row), load_i64(rows.starts, row + 1)
            token, sequence = load_i32(rows.rows, 3 * row), load_i32(rows.rows, 3 * row + 1)
            row_end = load_i32(rows.rows, 3 * row + 2)
            row_begin = max(0, row_end - rows.window) if rows.window > 0 else 0
            # Both borders, in tiles of absolute positions.
            first = row_begin // TILE + max(0, low - row_start)
            last = row_begin // TILE + high - row_start
            begin, end = max(row_begin, first * TILE), min(row_end, last * TILE)
            if layer.key != 0 and end == row_end:
                slot = load_i64(rows.slot_mapping, token)
                if slot >= 0:
                    _store_new(layer, token, slot, shape, tag)
            state = local
            if row_start < low or next_start > high:
                place = 2 * index + (1 if row_start >= low else 0)
                store_i64(rows.owners, place, row)
                state = rows.states + 4 * place * state_size
            block_table = rows.block_tables + 4 * sequence * rows.table_width
            _attend_span(
                layer, token, block_table, begin, end, shape, scale, softcap, scratch, state, io_tag, tag
            )
            if state == local:
                output = layer.output + token * heads * shape.head_size * item_bytes(io_tag)
                finish(state, output, shape, sinks, io_tag)
            row += 1

    return kernel


@kernel_by_dtype
def attend_whole_rows(io_tag, tag):
    """Attends the rows that begin in one bin, each to its end. Arguments as `attend_bin`."""

    @entry(fastmath=FASTMATH)
    def kernel(index, bins, arguments):
        layer, shape, rows = _layer(arguments), _shape(arguments), _rows(arguments)
        sinks = argument(arguments, 25)
        scale, softcap = float_argument(arguments, 26), float_argument(arguments, 27)
        heads = shape.kv_heads * shape.group
        state_size = heads * (shape.head_size + 2)
        scratch = argument(arguments, 29) + 4 * index * (heads * (shape.head_size + CHUNK) + state_size)
        state = scratch + 4 * heads * (shape.head_size + CHUNK)
        tiles = load_i64(rows.starts, rows.num_rows)
        low, high = tiles * index // bins, tiles * (index + 1) // bins
        for row in range(rows.num_rows):
            start = load_i64(rows.starts, row)
            if start < low or start >= high:
                continue
            token, sequence = load_i32(rows.rows, 3 * row), load_i32(rows.rows, 3 * row + 1)
            end = load_i32(rows.rows, 3 * row + 2)
            begin = max(0, end - rows.window) if rows.window > 0 else 0
            if layer.key != 0:
                slot = load_i64(rows.slot_mapping, token)
                if slot >= 0:
                    _store_new(layer, token, slot, shape, tag)
            block_table = rows.block_tables + 4 * sequence * rows.table_width
            _attend_span(
                layer, token, block_table, begin, end, shape, scale, softcap, scratch, state, io_tag, tag
            )
            output = layer.output + token * heads * shape.head_size * item_bytes(io_tag)
            finish(state, output, shape, sinks, io_tag)

    return kernel


@kernel_by_dtype
def finish_cut_rows(io_tag):
    """Merges and finishes the rows that bins have cut: their states lie in the order of their positions.

    Arguments as `attend_bin`. One part, after all bins; no row has an owner then.
    """

    @entry(fastmath=FASTMATH)
    def kernel(index, bins, arguments):
        layer, shape, rows = _layer(arguments), _shape(arguments), _rows(arguments)
        sinks = argument(arguments, 25)
        heads = shape.kv_heads * shape.group
        state_bytes = 4 * heads * (shape.head_size + 2)
        places = 2 * argument(arguments, 28)
        place = 0
        while place < places:
            row = load_i64(rows.owners, place)
            state = rows.states + place * state_bytes
            place += 1
            if row < 0:
                continue
            while place < places and (
                load_i64(rows.owners, place) == row or load_i64(rows.owners, place) < 0
            ):
                if load_i64(rows.owners, place) == row:
                    merge(state, rows.states + place * state_bytes, shape)
                place += 1
            token = load_i32(rows.rows, 3 * row)
            finish(
                state,
                layer.output + token * heads * shape.head_size * item_bytes(io_tag),
                shape,
                sinks,
                io_tag,
            )
        for place in range(places):
            store_i64(rows.owners, place, -1)

    return kernel
