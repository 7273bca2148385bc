"""The numba kernels of `hf_paged.kernels.cpu_row_linear`: loops around the tiles of `cpu_row_linear_tile`."""

from __future__ import annotations

import numpy as np

from hf_paged.kernels.cpu_jit import entry, helper, kernel_by_dtype
from hf_paged.kernels.cpu_memory import argument, item_bytes, load, load_f32, store_f32
from hf_paged.kernels.cpu_row_linear_few import FEW, few_across
from hf_paged.kernels.cpu_row_linear_tile import LANES, add_across, add_along, fma

__all__ = ["linear_across", "linear_along", "scratch_size"]

#: Rows of x that stay in the second cache while all weights go by, and bytes they may take.
_ROWS, _CHUNK_BYTES = 64, 384 * 1024
#: Columns of a tile across N, and rows of weights gone through before the next tile of rows.
_WIDTH, _DEPTH = 4 * LANES, 512
_ZERO = np.float32(0)

_along_4x4, _along_1x4 = add_along(4, 4), add_along(1, 4)
_along_4x1, _along_1x1 = add_along(4, 1), add_along(1, 1)
_across_4x4, _across_1x4 = add_across(4, 4), add_across(1, 4)
_across_4x1, _across_1x1 = add_across(4, 1), add_across(1, 1)


def scratch_size(size: int) -> int:
    """Float32 numbers each part works in, for rows of `size`: sums, then a copy of the last columns."""
    return _ROWS * _WIDTH + _DEPTH * LANES


@helper()
def _finish_along(x, x_stride, w, w_stride, bias, size, sums, output, stride, rows, columns, tag):
    """Adds what is left of K beyond the last whole vector, and the bias, and writes the tile."""
    for r in range(rows):
        for c in range(columns):
            total = load_f32(sums, r * columns + c)
            for k in range(size - size % LANES, size):
                total = fma(
                    load_f32(x + 4 * r * x_stride, k), load(w + c * w_stride * item_bytes(tag), k, tag), total
                )
            if bias != 0:
                total += load(bias, c, tag)
            store_f32(output + 4 * r * stride, c, total)


@kernel_by_dtype
def linear_along(tag):
    """output = x @ w.T + bias with rows of w [N, K] contiguous, for a part of the columns.

    Arguments: x (float32), its row's stride in numbers; w, its row's stride; bias ([N], or 0); output (float32), its
    row's stride; M, N, K; scratch (float32 [bins, `scratch_size`]), its stride. w and bias are of `tag`.
    """

    @entry()
    def kernel(index, bins, arguments):
        x, x_stride, w, w_stride = (
            argument(arguments, 0),
            argument(arguments, 1),
            argument(arguments, 2),
            argument(arguments, 3),
        )
        bias, output, stride = argument(arguments, 4), argument(arguments, 5), argument(arguments, 6)
        rows, width, size = argument(arguments, 7), argument(arguments, 8), argument(arguments, 9)
        sums = argument(arguments, 10) + 4 * index * argument(arguments, 11)
        groups, chunks = (width + 3) // 4, size // LANES
        begin, end = 4 * (groups * index // bins), min(width, 4 * (groups * (index + 1) // bins))
        together = max(4, min(_ROWS, _CHUNK_BYTES // (4 * size)) // 4 * 4)
        for chunk in range(0, rows, together):
            last = min(rows, chunk + together)
            for n in range(begin, end, 4):
                columns = min(4, end - n)
                for column in range(n, n + columns, 4 if columns == 4 else 1):
                    at = w + column * w_stride * item_bytes(tag)
                    offset = 0 if bias == 0 else bias + column * item_bytes(tag)
                    many = 4 if columns == 4 else 1
                    m = chunk
                    while m < last:
                        source, target = x + 4 * m * x_stride, output + 4 * (m * stride + column)
                        count = 4 if last - m >= 4 else 1
                        if count == 4 and many == 4:
                            _along_4x4(source, x_stride, at, w_stride, chunks, sums, tag)
                        elif many == 4:
                            _along_1x4(source, x_stride, at, w_stride, chunks, sums, tag)
                        elif count == 4:
                            _along_4x1(source, x_stride, at, w_stride, chunks, sums, tag)
                        else:
                            _along_1x1(source, x_stride, at, w_stride, chunks, sums, tag)
                        _finish_along(
                            source,
                            x_stride,
                            at,
                            w_stride,
                            offset,
                            size,
                            sums,
                            target,
                            stride,
                            count,
                            many,
                            tag,
                        )
                        m += count

    return kernel


@helper()
def _add_vector(x, x_stride, w, w_stride, count, sums, rows, tag):
    """sums[m, c] += x[m, k] * w[k, c] for `count` k, all rows and LANES columns."""
    m = 0
    while m + 4 <= rows:
        _across_4x1(x + 4 * m * x_stride, x_stride, w, w_stride, count, sums + 4 * m * _WIDTH, _WIDTH, tag)
        m += 4
    while m < rows:
        _across_1x1(x + 4 * m * x_stride, x_stride, w, w_stride, count, sums + 4 * m * _WIDTH, _WIDTH, tag)
        m += 1


@helper()
def _add_columns(x, x_stride, w, w_stride, count, sums, rows, columns, edge, tag):
    """sums[m, c] += x[m, k] * w[k, c] for `count` k, all rows and up to `_WIDTH` columns.

    Columns beyond the last whole vector are copied to `edge`; what lies beyond them there is anything.
    """
    if columns == _WIDTH:
        m = 0
        while m + 4 <= rows:
            _across_4x4(
                x + 4 * m * x_stride, x_stride, w, w_stride, count, sums + 4 * m * _WIDTH, _WIDTH, tag
            )
            m += 4
        while m < rows:
            _across_1x4(
                x + 4 * m * x_stride, x_stride, w, w_stride, count, sums + 4 * m * _WIDTH, _WIDTH, tag
            )
            m += 1
        return
    size = item_bytes(tag)
    whole = columns // LANES * LANES
    for c in range(0, whole, LANES):
        _add_vector(x, x_stride, w + c * size, w_stride, count, sums + 4 * c, rows, tag)
    if whole < columns:
        for k in range(count):
            for c in range(columns - whole):
                store_f32(edge, k * LANES + c, load(w + (k * w_stride + whole) * size, c, tag))
        _add_vector(x, x_stride, edge, LANES, count, sums + 4 * whole, rows, _ZERO)


@kernel_by_dtype
def linear_across(tag):
    """output = x @ w + bias with rows of w [K, N] contiguous, for a part of the columns.

    Arguments as `linear_along`.
    """

    @entry()
    def kernel(index, bins, arguments):
        x, x_stride, w, w_stride = (
            argument(arguments, 0),
            argument(arguments, 1),
            argument(arguments, 2),
            argument(arguments, 3),
        )
        bias, output, stride = argument(arguments, 4), argument(arguments, 5), argument(arguments, 6)
        rows, width, size = argument(arguments, 7), argument(arguments, 8), argument(arguments, 9)
        sums = argument(arguments, 10) + 4 * index * argument(arguments, 11)
        edge = sums + 4 * _ROWS * _WIDTH
        tiles = (width + _WIDTH - 1) // _WIDTH
        begin, end = _WIDTH * (tiles * index // bins), min(width, _WIDTH * (tiles * (index + 1) // bins))
        if rows <= FEW:
            few_across(x, x_stride, w, w_stride, bias, output, stride, rows, begin, end, size, sums, tag)
            rows = 0
        for chunk in range(0, rows, _ROWS):
            count = min(_ROWS, rows - chunk)
            for n in range(begin, end, _WIDTH):
                columns = min(_WIDTH, end - n)
                for i in range(count * _WIDTH):
                    store_f32(sums, i, _ZERO)
                for k in range(0, size, _DEPTH):
                    source = x + 4 * (chunk * x_stride + k)
                    part = w + (k * w_stride + n) * item_bytes(tag)
                    _add_columns(
                        source,
                        x_stride,
                        part,
                        w_stride,
                        min(_DEPTH, size - k),
                        sums,
                        count,
                        columns,
                        edge,
                        tag,
                    )
                for m in range(count):
                    target = output + 4 * ((chunk + m) * stride + n)
                    for c in range(columns):
                        total = load_f32(sums, m * _WIDTH + c)
                        if bias != 0:
                            total += load(bias, n + c, tag)
                        store_f32(target, c, total)

    return kernel
