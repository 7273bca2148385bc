"""The numba kernels of `hf_paged.kernels.cpu_lora`: the low-rank products of all groups.

`shrink` writes each row's product with its adapter's A, [rank] float32, scaled; `expand` adds that times B to the
output; they share out ranks and columns among threads. `update` is both in one launch, whose threads share out rows.
Rows of a group share each matrix while it is in the cache, so every adapter is read from memory once. A group is a row
of a table of int64:

    first row | end row | rank | address of A | of B | of the bias or 0 | where its products begin in the scratch

A row's numbers are computed alike whatever rows and groups are beside it.
"""

from __future__ import annotations

import numpy as np

from hf_paged.kernels.cpu_jit import FASTMATH, entry, helper, kernel_by_dtype
from hf_paged.kernels.cpu_lora_tile import SIDE, add_tile
from hf_paged.kernels.cpu_memory import argument, item_bytes, load, load_f32, load_i64, store, store_f32

__all__ = ["CHUNK", "FIELDS", "TILE", "expand", "shrink", "update"]

#: Numbers in a row of the table.
FIELDS = 7
_FIRST, _END, _RANK, _A, _B, _BIAS, _PRODUCTS = range(FIELDS)
#: Columns of the output whose part of B is turned at a time: with 64 ranks it takes half of the first cache.
TILE = 64
#: Rows, and numbers of each, gone through for all ranks before the next: four rows of A stay in the first cache.
_ROWS, _DEPTH = 16, 1024
#: Rows whose products `update` holds at a time.
CHUNK = 64
_ZERO = np.float32(0)


@helper(inline="always")
def _of(table, group, field):
    return load_i64(table, group * FIELDS + field)


@kernel_by_dtype
def shrink(x_tag, tag):
    """products[group][row, r] = scaling * (x[row] . A[r]) for a part of the ranks.

    Arguments: table, scaling ([G] float32), G; x ([N, width] of `x_tag`), its row's stride in numbers, width; products
    (float32, [rows, rank] for each group). A is [rank, width] of `tag`.
    """

    @entry(fastmath=FASTMATH)
    def kernel(index, bins, arguments):
        table, scaling, groups = argument(arguments, 0), argument(arguments, 1), argument(arguments, 2)
        x, x_stride, width = argument(arguments, 3), argument(arguments, 4), argument(arguments, 5)
        products = argument(arguments, 6)
        cost = np.int64(0)
        for group in range(groups):
            cost += _blocks(table, group) * _weight(table, group)
        low, high = cost * index // bins, cost * (index + 1) // bins
        before = np.int64(0)
        for group in range(groups):
            weight, blocks = _weight(table, group), _blocks(table, group)
            # A block of four ranks belongs to the part in whose share it begins.
            begin = min(blocks, max(np.int64(0), -((before - low) // weight)))
            end = min(blocks, max(np.int64(0), -((before - high) // weight)))
            before += blocks * weight
            if begin < end:
                scale, target = load_f32(scaling, group), products + 4 * _of(table, group, _PRODUCTS)
                first, last = _of(table, group, _FIRST), _of(table, group, _END)
                _shrink(table, group, scale, x, x_stride, width, target, first, last, begin, end, x_tag, tag)

    return kernel


@helper()
def _blocks(table, group):
    return (_of(table, group, _RANK) + 3) // 4


@helper()
def _weight(table, group):
    # Reading a row of A from memory takes about as long as four products with it.
    return _of(table, group, _END) - _of(table, group, _FIRST) + 4


@helper(fastmath=FASTMATH)
def _shrink(table, group, scale, x, x_stride, width, target, first, last, begin, end, x_tag, tag):
    """Rows `first` to `last` by blocks of ranks `begin` to `end`; the products of row `first` lie at `target`."""
    rank, matrix = _of(table, group, _RANK), _of(table, group, _A)
    for chunk in range(first, last, _ROWS):
        for k in range(0, width, _DEPTH):
            depth = min(_DEPTH, width - k)
            for block in range(begin, end):
                r = 4 * block
                for row in range(chunk, min(chunk + _ROWS, last)):
                    source = x + (row * x_stride + k) * item_bytes(x_tag)
                    place = target + 4 * (row - first) * rank
                    if r + 4 <= rank:
                        a = matrix + (r * width + k) * item_bytes(tag)
                        _add_four(source, a, width, depth, scale, place + 4 * r, k == 0, x_tag, tag)
                    else:
                        for single in range(r, rank):
                            a = matrix + (single * width + k) * item_bytes(tag)
                            _add_one(source, a, depth, scale, place + 4 * single, k == 0, x_tag, tag)


@helper(inline="always", fastmath=FASTMATH)
def _add_four(source, a0, width, depth, scale, place, is_first, x_tag, tag):
    """place[i] (+)= scale * (source . A[i]) for four ranks: each number of the row is read once for them."""
    a1 = a0 + width * item_bytes(tag)
    a2 = a1 + width * item_bytes(tag)
    a3 = a2 + width * item_bytes(tag)
    dot0, dot1, dot2, dot3 = _ZERO, _ZERO, _ZERO, _ZERO
    for k in range(depth):
        number = load(source, k, x_tag)
        dot0 += number * load(a0, k, tag)
        dot1 += number * load(a1, k, tag)
        dot2 += number * load(a2, k, tag)
        dot3 += number * load(a3, k, tag)
    _put(place, 0, scale * dot0, is_first)
    _put(place, 1, scale * dot1, is_first)
    _put(place, 2, scale * dot2, is_first)
    _put(place, 3, scale * dot3, is_first)


@helper(inline="always", fastmath=FASTMATH)
def _add_one(source, a, depth, scale, place, is_first, x_tag, tag):
    dot = _ZERO
    for k in range(depth):
        dot += load(source, k, x_tag) * load(a, k, tag)
    _put(place, 0, scale * dot, is_first)


@helper(inline="always")
def _put(place, i, number, is_first):
    store_f32(place, i, number if is_first else load_f32(place, i) + number)


@kernel_by_dtype
def expand(x_tag, tag):
    """output[row] += products[group][row] @ B.T + scaling * bias for a part of the columns.

    Arguments: table, scaling, G, products as for `shrink`; scratch (float32, (ranks + 1) * TILE for each part),
    the most ranks of a group; output ([N, width] of `x_tag`), its row's stride in numbers, width. B is [width, rank]
    of `tag`.
    """
    tiled = bool(isinstance(x_tag, np.float32) and isinstance(tag, np.float32))

    @entry(fastmath=FASTMATH)
    def kernel(index, bins, arguments):
        table, scaling, groups = argument(arguments, 0), argument(arguments, 1), argument(arguments, 2)
        products, scratch, ranks = argument(arguments, 3), argument(arguments, 4), argument(arguments, 5)
        output, stride, width = argument(arguments, 6), argument(arguments, 7), argument(arguments, 8)
        tiles = (width + TILE - 1) // TILE
        begin, end = TILE * (tiles * index // bins), min(width, TILE * (tiles * (index + 1) // bins))
        turned = scratch + 4 * index * (ranks + 1) * TILE
        for group in range(groups):
            scale, source = load_f32(scaling, group), products + 4 * _of(table, group, _PRODUCTS)
            first, last = _of(table, group, _FIRST), _of(table, group, _END)
            _expand_rows(
                table,
                group,
                scale,
                source,
                first,
                last,
                begin,
                end,
                turned,
                output,
                stride,
                x_tag,
                tag,
                tiled,
            )

    return kernel


@kernel_by_dtype
def update(x_tag, tag):
    """output[row] += scaling * (x[row] @ A.T @ B.T + bias) for a part of the rows. No row is in two groups.

    Arguments: table, scaling, G as for `shrink`; scratch (float32, ranks * CHUNK + (ranks + 1) * TILE for each part),
    the most ranks of a group; x, its row's stride in numbers, width; output, stride, width.
    """
    tiled = bool(isinstance(x_tag, np.float32) and isinstance(tag, np.float32))

    @entry(fastmath=FASTMATH)
    def kernel(index, bins, arguments):
        table, scaling, groups = argument(arguments, 0), argument(arguments, 1), argument(arguments, 2)
        scratch, ranks = argument(arguments, 3), argument(arguments, 4)
        x, x_stride, x_width = argument(arguments, 5), argument(arguments, 6), argument(arguments, 7)
        output, stride, width = argument(arguments, 8), argument(arguments, 9), argument(arguments, 10)
        products = scratch + 4 * index * (ranks * CHUNK + (ranks + 1) * TILE)
        turned = products + 4 * ranks * CHUNK
        cost = np.int64(0)
        for group in range(groups):
            cost += _of(table, group, _RANK) * _weight(table, group)
        low, high = cost * index // bins, cost * (index + 1) // bins
        before = np.int64(0)
        for group in range(groups):
            own, rows = _of(table, group, _RANK) * _weight(table, group), _num_rows(table, group)
            begin, end = _share(low - before, own, rows), _share(high - before, own, rows)
            before += own
            scale, blocks = load_f32(scaling, group), _blocks(table, group)
            for chunk in range(_of(table, group, _FIRST) + begin, _of(table, group, _FIRST) + end, CHUNK):
                last = min(chunk + CHUNK, _of(table, group, _FIRST) + end)
                _shrink(
                    table, group, scale, x, x_stride, x_width, products, chunk, last, 0, blocks, x_tag, tag
                )
                _expand_rows(
                    table,
                    group,
                    scale,
                    products,
                    chunk,
                    last,
                    0,
                    width,
                    turned,
                    output,
                    stride,
                    x_tag,
                    tag,
                    tiled,
                )

    return kernel


@helper()
def _num_rows(table, group):
    return _of(table, group, _END) - _of(table, group, _FIRST)


@helper()
def _share(cost, whole, rows):
    """How many of a group's rows come before `cost`, of the `whole` that all of them cost."""
    if cost <= 0 or whole <= 0:
        return np.int64(0)
    return rows if cost >= whole else -(-cost * rows // whole)


@helper()
def _expand_rows(
    table, group, scale, source, first, last, begin, end, turned, output, stride, x_tag, tag, tiled
):
    """Rows `first` to `last`, columns `begin` to `end`; the products of row `first` lie at `source`."""
    rank, rest = _of(table, group, _RANK), begin
    if tiled and rank > 0 and rank % SIDE == 0:
        rest = end - (end - begin) % SIDE
        _expand_tiles(table, group, source, first, last, begin, rest, output, stride)
        if _of(table, group, _BIAS) != 0:
            _add_bias(table, group, scale, first, last, begin, rest, output, stride)
    for column in range(rest, end, TILE):
        count = min(TILE, end - column)
        _expand(table, group, scale, source, first, last, column, count, turned, output, stride, x_tag, tag)


@helper()
def _expand_tiles(table, group, source, first, last, begin, end, output, stride):
    rank = _of(table, group, _RANK)
    for column in range(begin, end, SIDE):
        target = output + 4 * (first * stride + column)
        for r in range(0, rank, SIDE):
            b = _of(table, group, _B) + 4 * (column * rank + r)
            add_tile(b, rank, source + 4 * r, rank, target, stride, last - first)


@helper(fastmath=FASTMATH)
def _expand(table, group, scale, source, first, last, column, count, turned, output, stride, x_tag, tag):
    """`count` columns by loops, with their part of B turned to lie rank by rank."""
    rank = _of(table, group, _RANK)
    _turn(table, group, column, count, turned, tag)
    sums = turned + 4 * TILE * rank
    for row in range(first, last):
        products = source + 4 * (row - first) * rank
        if count == TILE:
            _sum_up(rank, products, turned, sums, TILE)
        else:
            _sum_up(rank, products, turned, sums, count)
        if _of(table, group, _BIAS) != 0:
            for j in range(count):
                bias = load(_of(table, group, _BIAS), column + j, tag)
                store_f32(sums, j, load_f32(sums, j) + scale * bias)
        target = output + (row * stride + column) * item_bytes(x_tag)
        for j in range(count):
            store(target, j, load(target, j, x_tag) + load_f32(sums, j), x_tag)


@helper()
def _add_bias(table, group, scale, first, last, begin, end, output, stride):
    for row in range(first, last):
        target = output + 4 * row * stride
        for j in range(begin, end):
            store_f32(target, j, load_f32(target, j) + scale * load_f32(_of(table, group, _BIAS), j))


@helper()
def _turn(table, group, column, count, turned, tag):
    """turned[r, j] = B[column + j, r]."""
    rank = _of(table, group, _RANK)
    source = _of(table, group, _B) + column * rank * item_bytes(tag)
    for j in range(count):
        for r in range(rank):
            store_f32(turned, r * TILE + j, load(source, j * rank + r, tag))


@helper(inline="always", fastmath=FASTMATH)
def _sum_up(rank, source, turned, sums, count):
    """sums[j] = a row's products, at `source`, . B[column + j]."""
    for j in range(count):
        store_f32(sums, j, _ZERO)
    r = np.int64(0)
    while r + 4 <= rank:
        p0, p1, p2, p3 = (
            load_f32(source, r), load_f32(source, r + 1), load_f32(source, r + 2), load_f32(source, r + 3),
        )  # fmt: skip
        b0 = turned + 4 * TILE * r
        b1, b2, b3 = b0 + 4 * TILE, b0 + 8 * TILE, b0 + 12 * TILE
        for j in range(count):
            more = (p0 * load_f32(b0, j) + p1 * load_f32(b1, j)) + (
                p2 * load_f32(b2, j) + p3 * load_f32(b3, j)
            )
            store_f32(sums, j, load_f32(sums, j) + more)
        r += 4
    while r < rank:
        p = load_f32(source, r)
        b = turned + 4 * TILE * r
        for j in range(count):
            store_f32(sums, j, load_f32(sums, j) + p * load_f32(b, j))
        r += 1
