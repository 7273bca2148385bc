"""The loops of `cpu_row_linear_kernel` for a few rows of x and weights across N, which are as fast as memory.

Each weight is used so few times that only its way from memory counts. Eight rows of weights are gone through side by
side, a page or so of each, while the same columns of the next eight are asked for: no processor foresees those, each
lies in another page. The sums of that many columns stay in the first cache.

The order of a sum is the one of all these kernels: k = 0, 1, 2, ... for each column (`cpu_row_linear_tile`).
"""

from __future__ import annotations

import numpy as np

from hf_paged.kernels.cpu_jit import helper
from hf_paged.kernels.cpu_memory import item_bytes, load, load_f32, store_f32
from hf_paged.kernels.cpu_row_linear_tile import LANES, add_across, add_block

__all__ = ["FEW", "few_across"]

#: Rows of x at most; columns whose sums are kept, and rows of weights side by side.
FEW, _BAND, _DEPTH = 16, 512, 8
_ZERO = np.float32(0)

_eight, _four, _two, _one = (add_block(rows, _DEPTH) for rows in (8, 4, 2, 1))
_any_depth = add_across(1, 1)


@helper()
def _add_vectors(x, x_stride, w, w_stride, sums, rows, columns, ahead, tag):
    """sums[m, c] += x[m, k] * w[k, c] for `_DEPTH` k, all rows and whole vectors of columns."""
    size = item_bytes(tag)
    for c in range(0, columns, LANES):
        at, next_rows = w + c * size, ahead + c * size
        source, place, left = x, sums + 4 * c, rows
        while left >= 8:
            _eight(source, x_stride, at, w_stride, next_rows, place, _BAND, tag)
            source, place, left = source + 4 * 8 * x_stride, place + 4 * 8 * _BAND, left - 8
        if left >= 4:
            _four(source, x_stride, at, w_stride, next_rows, place, _BAND, tag)
            source, place, left = source + 4 * 4 * x_stride, place + 4 * 4 * _BAND, left - 4
        if left >= 2:
            _two(source, x_stride, at, w_stride, next_rows, place, _BAND, tag)
            source, place, left = source + 4 * 2 * x_stride, place + 4 * 2 * _BAND, left - 2
        if left > 0:
            _one(source, x_stride, at, w_stride, next_rows, place, _BAND, tag)


@helper()
def _add_edge(x, x_stride, w, w_stride, count, sums, rows, columns, edge, tag):
    """As `_add_vectors` for `count` k and columns fewer than a vector, which are copied to `edge`."""
    for k in range(count):
        for c in range(columns):
            store_f32(edge, k * LANES + c, load(w + k * w_stride * item_bytes(tag), c, tag))
    for m in range(rows):
        _any_depth(x + 4 * m * x_stride, x_stride, edge, LANES, count, sums + 4 * m * _BAND, _BAND, _ZERO)


@helper()
def _add_last(x, x_stride, w, w_stride, count, sums, rows, columns, tag):
    """As `_add_vectors` for fewer k."""
    for c in range(0, columns, LANES):
        for m in range(rows):
            place = sums + 4 * (m * _BAND + c)
            _any_depth(
                x + 4 * m * x_stride, x_stride, w + c * item_bytes(tag), w_stride, count, place, _BAND, tag
            )


@helper()
def few_across(x, x_stride, w, w_stride, bias, output, stride, rows, begin, end, size, sums, tag):
    """output = x @ w + bias for up to `FEW` rows of x and columns `begin` to `end`.

    `sums`: room for (FEW * _BAND + _DEPTH * LANES) float32.
    """
    edge = sums + 4 * FEW * _BAND
    for n in range(begin, end, _BAND):
        columns = min(_BAND, end - n)
        whole = columns // LANES * LANES
        for i in range(rows * _BAND):
            store_f32(sums, i, _ZERO)
        for k in range(0, size, _DEPTH):
            count = min(_DEPTH, size - k)
            source, at = x + 4 * k, w + (k * w_stride + n) * item_bytes(tag)
            if count == _DEPTH:
                # The next rows; behind the last ones, the next columns.
                ahead = at + _DEPTH * w_stride * item_bytes(tag)
                if k + 2 * _DEPTH > size:
                    ahead = w + (n + _BAND) * item_bytes(tag)
                _add_vectors(source, x_stride, at, w_stride, sums, rows, whole, ahead, tag)
            else:
                _add_last(source, x_stride, at, w_stride, count, sums, rows, whole, tag)
            if whole < columns:
                last = at + whole * item_bytes(tag)
                _add_edge(
                    source,
                    x_stride,
                    last,
                    w_stride,
                    count,
                    sums + 4 * whole,
                    rows,
                    columns - whole,
                    edge,
                    tag,
                )
        for m in range(rows):
            for c in range(columns):
                total = load_f32(sums, m * _BAND + c)
                if bias != 0:
                    total += load(bias, n + c, tag)
                store_f32(output + 4 * m * stride, n + c, total)
