"""The numba kernel of `hf_paged.kernels.cpu_argmax`."""

from __future__ import annotations

import numpy as np
from numba import prange

from hf_paged.kernels.cpu_jit import dtype_tag, entry, helper, item_bytes, load, ordered_bits

__all__ = ["argmax_rows_parallel", "dtype_tag"]

#: Numbers looked at before the search for the index of a new maximum: small enough to still be in the cache then.
_BLOCK = 4096


@helper()
def _argmax(row, size, tag):
    best = np.int32(-0x80000000)
    best_block = 0
    for begin in range(0, size, _BLOCK):
        top = np.int32(-0x80000000)
        for i in range(begin, min(begin + _BLOCK, size)):
            top = max(top, ordered_bits(load(row, i, tag)))
        if top > best:
            best, best_block = top, begin
    for i in range(best_block, size):
        if ordered_bits(load(row, i, tag)) == best:
            return i
    return 0


@entry(parallel=True)
def argmax_rows_parallel(bins, logits, stride, size, indices, tag):
    """indices[r] = argmax of the `size` numbers from logits[r * stride] on. indices: [R] int64."""
    rows = indices.shape[0]
    for index in prange(bins):
        part = np.int64(index)
        for row in range(rows * part // bins, rows * (part + 1) // bins):
            indices[row] = _argmax(logits + row * stride * item_bytes(tag), size, tag)
