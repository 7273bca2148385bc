"""The kernels of `cpu_row_linear` for bfloat16 where the processor adds products of pairs: twice as fast.

An odd number at the end of K is added by itself, in float32.
"""

from __future__ import annotations

import numpy as np

from hf_paged.kernels.cpu_jit import entry, helper, kernel_by_dtype
from hf_paged.kernels.cpu_memory import argument, copy_bits, load, load_f32, store_f32
from hf_paged.kernels.cpu_row_linear_tile import LANES, add_pairs_across, add_pairs_along, fma, pair_columns

__all__ = ["linear_across", "linear_along", "scratch_size"]

#: Rows of x that stay in the second cache while all weights go by, and bytes they may take.
_ROWS, _CHUNK_BYTES = 64, 384 * 1024
#: Columns of a tile across N, and pairs of rows of weights gone through before the next tile of rows.
_WIDTH, _DEPTH = 4 * LANES, 256
_BFLOAT16, _ZERO = np.uint16(0), np.float32(0)

_along_4x4, _along_1x4 = add_pairs_along(4, 4), add_pairs_along(1, 4)
_along_4x1, _along_1x1 = add_pairs_along(4, 1), add_pairs_along(1, 1)
_across_4x4, _across_1x4 = add_pairs_across(4, 4), add_pairs_across(1, 4)


def scratch_size(size: int) -> int:
    """Float32 numbers each part works in: sums, then pairs of weights."""
    return _ROWS * _WIDTH + _DEPTH * _WIDTH


@helper()
def _along_columns(x, x_stride, w, w_stride, bias, output, stride, rows, columns, size, sums):
    """`columns` (4 or 1) columns of the output, all rows."""
    chunks = size // (2 * LANES)
    m = 0
    while m < rows:
        source = x + 2 * m * x_stride
        many = 4 if rows - m >= 4 else 1
        if many == 4 and columns == 4:
            _along_4x4(source, x_stride, w, w_stride, chunks, sums)
        elif columns == 4:
            _along_1x4(source, x_stride, w, w_stride, chunks, sums)
        elif many == 4:
            _along_4x1(source, x_stride, w, w_stride, chunks, sums)
        else:
            _along_1x1(source, x_stride, w, w_stride, chunks, sums)
        for r in range(many):
            row, target = source + 2 * r * x_stride, output + 4 * (m + r) * stride
            for c in range(columns):
                total = load_f32(sums, r * columns + c)
                for k in range(2 * LANES * chunks, size):
                    total = fma(load(row, k, _BFLOAT16), load(w + 2 * c * w_stride, k, _BFLOAT16), total)
                if bias != 0:
                    total += load(bias, c, _BFLOAT16)
                store_f32(target, c, total)
        m += many


@kernel_by_dtype
def linear_along(tag):
    """As `cpu_row_linear_kernel.linear_along`, for x, w and bias of bfloat16."""

    @entry()
    def kernel(index, bins, arguments):
        x, x_stride = argument(arguments, 0), argument(arguments, 1)
        w, w_stride = argument(arguments, 2), argument(arguments, 3)
        bias, output, stride = argument(arguments, 4), argument(arguments, 5), argument(arguments, 6)
        rows, width, size = argument(arguments, 7), argument(arguments, 8), argument(arguments, 9)
        sums = argument(arguments, 10) + 4 * index * argument(arguments, 11)
        groups = (width + 3) // 4
        begin, end = 4 * (groups * index // bins), min(width, 4 * (groups * (index + 1) // bins))
        together = max(4, min(_ROWS, _CHUNK_BYTES // (2 * size)) // 4 * 4)
        for chunk in range(0, rows, together):
            count, source = min(together, rows - chunk), x + 2 * chunk * x_stride
            n = begin
            while n < end:
                columns = 4 if end - n >= 4 else 1
                at, target = w + 2 * n * w_stride, output + 4 * (chunk * stride + n)
                offset = 0 if bias == 0 else bias + 2 * n
                _along_columns(
                    source, x_stride, at, w_stride, offset, target, stride, count, columns, size, sums
                )
                n += columns

    return kernel


@helper()
def _pair(w, w_stride, count, columns, pairs):
    """Puts `count` pairs of rows of w side by side, column by column. What lies beyond the columns is anything."""
    for k in range(count):
        first, second = w + 4 * k * w_stride, w + 2 * (2 * k + 1) * w_stride
        target = pairs + 4 * k * _WIDTH
        c = 0
        while c + LANES <= columns:
            pair_columns(first + 2 * c, second + 2 * c, target + 4 * c)
            c += LANES
        while c < columns:
            copy_bits(first + 2 * c, target + 4 * c, 0, _BFLOAT16)
            copy_bits(second + 2 * c, target + 4 * c + 2, 0, _BFLOAT16)
            c += 1


@helper()
def _add_pairs(x, x_stride, pairs, count, sums, rows):
    """sums[m, c] += x[m, 2 * k] * w[2 * k, c] + x[m, 2 * k + 1] * w[2 * k + 1, c] for `count` k."""
    m = 0
    while m < rows:
        source, target = x + 2 * m * x_stride, sums + 4 * m * _WIDTH
        if rows - m >= 4:
            _across_4x4(source, x_stride, pairs, _WIDTH, count, target, _WIDTH)
            m += 4
        else:
            _across_1x4(source, x_stride, pairs, _WIDTH, count, target, _WIDTH)
            m += 1


@helper()
def _finish_across(x, x_stride, w, bias, output, stride, rows, columns, is_odd, sums):
    """Adds the last k where their number is odd, and the bias. x and w lie at that k."""
    for m in range(rows):
        for c in range(columns):
            total = load_f32(sums, m * _WIDTH + c)
            if is_odd:
                total = fma(load(x, m * x_stride, _BFLOAT16), load(w, c, _BFLOAT16), total)
            if bias != 0:
                total += load(bias, c, _BFLOAT16)
            store_f32(output + 4 * m * stride, c, total)


@kernel_by_dtype
def linear_across(tag):
    """As `cpu_row_linear_kernel.linear_across`, for x, w and bias of bfloat16."""

    @entry()
    def kernel(index, bins, arguments):
        x, x_stride = argument(arguments, 0), argument(arguments, 1)
        w, w_stride = argument(arguments, 2), argument(arguments, 3)
        bias, output, stride = argument(arguments, 4), argument(arguments, 5), argument(arguments, 6)
        rows, width, size = argument(arguments, 7), argument(arguments, 8), argument(arguments, 9)
        sums = argument(arguments, 10) + 4 * index * argument(arguments, 11)
        pairs = sums + 4 * _ROWS * _WIDTH
        tiles = (width + _WIDTH - 1) // _WIDTH
        begin, end = _WIDTH * (tiles * index // bins), min(width, _WIDTH * (tiles * (index + 1) // bins))
        for chunk in range(0, rows, _ROWS):
            count, source = min(_ROWS, rows - chunk), x + 2 * chunk * x_stride
            for n in range(begin, end, _WIDTH):
                columns = min(_WIDTH, end - n)
                for i in range(count * _WIDTH):
                    store_f32(sums, i, _ZERO)
                for k in range(0, size - 1, 2 * _DEPTH):
                    depth = min(_DEPTH, (size - k) // 2)
                    _pair(w + 2 * (k * w_stride + n), w_stride, depth, columns, pairs)
                    _add_pairs(source + 2 * k, x_stride, pairs, depth, sums, count)
                last = size - 1
                _finish_across(
                    source + 2 * last, x_stride, w + 2 * (last * w_stride + n), 0 if bias == 0 else bias + 2 * n,
                    output + 4 * (chunk * stride + n), stride, count, columns, size % 2 == 1, sums,
                )  # fmt: skip

    return kernel
