"""The numba kernels of `hf_paged.kernels.cpu_amx_linear`: loops around the tiles of `cpu_amx_tile`."""

from __future__ import annotations

import numpy as np

from hf_paged.kernels.cpu_amx_tile import (
    BLOCK,
    TILE,
    WIDTH,
    add_tile,
    begin_tiles,
    end_tiles,
    lies_across,
    multiply,
    split_pairs,
    transpose,
)
from hf_paged.kernels.cpu_jit import emits, entry, helper, kernel_by_dtype
from hf_paged.kernels.cpu_memory import argument, load_f32, store_f32

__all__ = ["can_compile", "linear_across", "linear_along", "scratch_bytes"]

#: Rows, numbers along K and columns gone through before the next ones: the second cache then holds the rows' blocks of
#: that depth, where weights lie along K, or the sums of that many columns, where they lie across it.
_ROWS, _DEPTH, _BAND = 256, 768, 1024
#: Bytes of a square of float32 weights, and of its blocks.
_SQUARE, _SQUARE_BLOCKS = WIDTH * WIDTH * 4, 2 * (WIDTH // 16) * BLOCK
_W_STEP = (WIDTH // 16) * BLOCK
#: Groups of products in a call of `multiply`, and cache lines of a square.
_GROUPS, _LINES = 12, _SQUARE // 64
_ZERO = np.float32(0)

_ALONG, _ACROSS = np.int16(0), np.int8(0)


def can_compile() -> bool:
    """Whether numba, as the user has set it, makes code for a processor with AMX."""
    return emits("avx512f", "amx-tile", "amx-bf16")


def scratch_bytes(rows: int, size: int, along: bool) -> int:
    """Bytes each part works in, for that many rows of `size`: a check and a row, a square of numbers, its blocks, sums
    and blocks of rows."""
    blocks = (min(rows, _ROWS) + 15) // 16
    depth = (min(size, _DEPTH) + WIDTH - 1) // WIDTH * WIDTH if along else WIDTH
    sums = blocks * (WIDTH if along else _BAND) // 16 * TILE
    return 64 + 2 * 64 + _SQUARE + _SQUARE_BLOCKS + sums + blocks * depth // 32 * BLOCK


@helper()
def _copy_square(source, row_stride, rows, columns, target):
    """Copies [rows, columns] numbers to a square, and zeros beyond them."""
    for r in range(WIDTH):
        for c in range(WIDTH):
            value = _ZERO
            if r < rows and c < columns:
                value = load_f32(source + 4 * r * row_stride, c)
            store_f32(target, r * WIDTH + c, value)


@helper()
def _split_along(source, row_stride, target):
    """A square of rows along K to blocks [step, block of rows]: a row of a tile is a row."""
    for r in range(WIDTH):
        at = target + (r // 16) * BLOCK + (r % 16) * 64
        line = source + 4 * r * row_stride
        split_pairs(line, line + 64, at)
        split_pairs(line + 128, line + 192, at + _W_STEP)


@helper()
def _split_across(source, row_stride, target):
    """A square of rows across K to blocks [step, block of columns]: a row of a tile is a pair of rows."""
    for step in range(2):
        for p in range(16):
            first = source + 4 * (32 * step + p) * row_stride
            second = first + 64 * row_stride
            at = target + step * _W_STEP + p * 64
            for c in range(WIDTH // 16):
                split_pairs(first + 64 * c, second + 64 * c, at + c * BLOCK)


@helper()
def _split_rows(x, x_stride, rows, size, square, target, layout):
    """Rows of x to blocks [WIDTH along K, block of rows, step]; those beyond the last are zeros."""
    blocks = (rows + 15) // 16
    for k in range(0, size, WIDTH):
        for block in range(blocks):
            source, stride = x + 4 * (16 * block * x_stride + k), x_stride
            if size - k < WIDTH or rows - 16 * block < 16:
                _copy_square(source, x_stride, rows - 16 * block, min(WIDTH, size - k), square)
                source, stride = square, WIDTH
            at = target + ((k // WIDTH) * blocks + block) * 2 * BLOCK
            for r in range(16):
                line = source + 4 * r * stride
                split_pairs(line, line + 64, at + r * 64)
                split_pairs(line + 128, line + 192, at + BLOCK + r * 64)
            if not lies_across(layout):
                for tile in range(6):
                    transpose(at + tile * TILE)


@helper()
def _write(sums, rows, columns, base, base_stride, output, stride, row, check, layout):
    """output[r, c] = base[r, c] + sums for a strip of `columns`; a `base` of 0 adds nothing, stride 0 is a bias.

    `row`: room for a row whose tile goes beyond the last column.
    """
    for block in range((rows + 15) // 16):
        for c in range((columns + 15) // 16):
            tile = sums + (block * (WIDTH // 16) + c) * TILE
            if not lies_across(layout):
                transpose(tile)
            count = min(16, columns - 16 * c)
            for r in range(min(16, rows - 16 * block)):
                m = 16 * block + r
                target = output + 4 * (m * stride + 16 * c)
                added = 0 if base == 0 else base + 4 * (m * base_stride + 16 * c)
                if count == 16:
                    add_tile(tile, r, added, target, check)
                else:
                    for i in range(16):
                        store_f32(row, i, _ZERO if added == 0 or i >= count else load_f32(added, i))
                    add_tile(tile, r, row, row, check)
                    for i in range(count):
                        store_f32(target, i, load_f32(row, i))


@helper()
def _add_square(parts, blocks, weights, sums, is_first, ahead, ahead_row, layout):
    """All rows of x by one square of weights, while the cache lines of the next one come."""
    calls = _GROUPS * (blocks + blocks % 2)
    lines, line = (_LINES + calls - 1) // calls, 0
    for block in range(0, blocks, 2):
        for c in range(0, WIDTH // 16, 2):
            total = sums + (block * (WIDTH // 16) + c) * TILE
            x, w = parts + block * 2 * BLOCK, weights + c * BLOCK
            multiply(
                x,
                w,
                _W_STEP,
                total,
                4 * TILE,
                block + 1 < blocks,
                is_first,
                ahead,
                ahead_row,
                line,
                lines,
                layout,
            )
            line += _GROUPS * lines


@helper()
def _add_strip(w, w_stride, columns, deep, parts, blocks, square, weights, sums):
    """sums[m, c] = x[m] . w[c] for all rows of x, `columns` columns and `deep` numbers along K, as weights lie."""
    for k in range(0, deep, WIDTH):
        high = min(WIDTH, deep - k)
        source, stride = w + 4 * k, w_stride
        ahead = source + 4 * WIDTH if k + WIDTH < deep else w + 4 * WIDTH * w_stride
        if high < WIDTH or columns < WIDTH:
            _copy_square(source, w_stride, columns, high, square)
            source, stride = square, WIDTH
        _split_along(source, stride, weights)
        at = parts + (k // WIDTH) * blocks * 2 * BLOCK
        _add_square(at, blocks, weights, sums, k == 0, ahead, 4 * w_stride, _ALONG)


@helper()
def _add_band(w, w_stride, columns, high, is_first, parts, blocks, square, weights, sums):
    """sums[m, c] += x[m] . w[:, c] for all rows of x, `columns` columns and `high` numbers along K.

    Weights lie across K: going along their rows, few pages are met at a time.
    """
    for n in range(0, columns, WIDTH):
        wide = min(WIDTH, columns - n)
        source, stride = w + 4 * n, w_stride
        ahead = source + 4 * WIDTH if n + WIDTH < columns else w + 4 * WIDTH * w_stride
        if high < WIDTH or wide < WIDTH:
            _copy_square(source, w_stride, high, wide, square)
            source, stride = square, WIDTH
        _split_across(source, stride, weights)
        at = sums + (n // 16) * blocks * TILE
        _add_square(parts, blocks, weights, at, is_first, ahead, 4 * w_stride, _ACROSS)


@helper()
def _begin_check(check):
    for i in range(16):
        store_f32(check, i, _ZERO)


@helper()
def _end_check(check, checks, index):
    total = _ZERO
    for i in range(16):
        total += load_f32(check, i)
    store_f32(checks, index, total)


@kernel_by_dtype
def linear_along(tag):
    """output = x @ w.T + bias with rows of w [N, K] contiguous, for a part of the columns.

    Arguments: x (float32), its row's stride in numbers; w, its row's stride; bias ([N], or 0); output (float32), its
    row's stride; M, N, K; scratch ([bins, `scratch_bytes`]), its stride in bytes; a float32 for each part, which
    becomes NaN if something is not finite and 0 otherwise. w and bias are of `tag`: float32.
    """

    @entry()
    def kernel(index, bins, arguments):
        x, x_stride = argument(arguments, 0), argument(arguments, 1)
        w, w_stride = argument(arguments, 2), argument(arguments, 3)
        bias, output, stride = argument(arguments, 4), argument(arguments, 5), argument(arguments, 6)
        rows, width, size = argument(arguments, 7), argument(arguments, 8), argument(arguments, 9)
        check = (argument(arguments, 10) + index * argument(arguments, 11) + 63) // 64 * 64
        row, square = check + 64, check + 2 * 64
        weights = square + _SQUARE
        sums = weights + _SQUARE_BLOCKS
        strips = (width + WIDTH - 1) // WIDTH
        begin, end = WIDTH * (strips * index // bins), min(width, WIDTH * (strips * (index + 1) // bins))
        _begin_check(check)
        begin_tiles()
        for chunk in range(0, rows, _ROWS):
            count = min(_ROWS, rows - chunk)
            blocks = (count + 15) // 16
            parts = sums + blocks * (WIDTH // 16) * TILE
            for depth in range(0, size, _DEPTH):
                deep = min(_DEPTH, size - depth)
                source = x + 4 * (chunk * x_stride + depth)
                _split_rows(source, x_stride, count, deep, square, parts, _ALONG)
                for n in range(begin, end, WIDTH):
                    columns = min(WIDTH, end - n)
                    at = w + 4 * (n * w_stride + depth)
                    _add_strip(at, w_stride, columns, deep, parts, blocks, square, weights, sums)
                    target = output + 4 * (chunk * stride + n)
                    base, base_stride = target, stride
                    if depth == 0:
                        base, base_stride = 0 if bias == 0 else bias + 4 * n, 0
                    _write(sums, count, columns, base, base_stride, target, stride, row, check, _ALONG)
        end_tiles()
        _end_check(check, argument(arguments, 12), index)

    return kernel


@kernel_by_dtype
def linear_across(tag):
    """output = x @ w + bias with rows of w [K, N] contiguous, for a part of the columns.

    Arguments as `linear_along`.
    """

    @entry()
    def kernel(index, bins, arguments):
        x, x_stride = argument(arguments, 0), argument(arguments, 1)
        w, w_stride = argument(arguments, 2), argument(arguments, 3)
        bias, output, stride = argument(arguments, 4), argument(arguments, 5), argument(arguments, 6)
        rows, width, size = argument(arguments, 7), argument(arguments, 8), argument(arguments, 9)
        check = (argument(arguments, 10) + index * argument(arguments, 11) + 63) // 64 * 64
        row, square = check + 64, check + 2 * 64
        weights = square + _SQUARE
        parts = weights + _SQUARE_BLOCKS
        strips = (width + WIDTH - 1) // WIDTH
        begin, end = WIDTH * (strips * index // bins), min(width, WIDTH * (strips * (index + 1) // bins))
        bands = (end - begin + _BAND - 1) // _BAND
        band = 0 if bands == 0 else (end - begin + bands * WIDTH - 1) // (bands * WIDTH) * WIDTH
        _begin_check(check)
        begin_tiles()
        for chunk in range(0, rows, _ROWS):
            count = min(_ROWS, rows - chunk)
            blocks = (count + 15) // 16
            sums = parts + blocks * 2 * BLOCK
            for i in range(bands):
                n = begin + i * band
                columns = min(band, end - n)
                for k in range(0, size, WIDTH):
                    high = min(WIDTH, size - k)
                    source = x + 4 * (chunk * x_stride + k)
                    _split_rows(source, x_stride, count, high, square, parts, _ACROSS)
                    at = w + 4 * (k * w_stride + n)
                    _add_band(at, w_stride, columns, high, k == 0, parts, blocks, square, weights, sums)
                for c in range(0, columns, WIDTH):
                    base = 0 if bias == 0 else bias + 4 * (n + c)
                    target, at = output + 4 * (chunk * stride + n + c), sums + (c // 16) * blocks * TILE
                    wide = min(WIDTH, columns - c)
                    _write(at, count, wide, base, 0, target, stride, row, check, _ACROSS)
        end_tiles()
        _end_check(check, argument(arguments, 12), index)

    return kernel
