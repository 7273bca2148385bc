"""The numba kernel of `hf_paged.kernels.cpu_argmax`."""

from __future__ import annotations

import numpy as np

from hf_paged.kernels.cpu_jit import entry, helper, kernel_by_dtype
from hf_paged.kernels.cpu_memory import argument, item_bytes, load, ordered_bits, store_i64

__all__ = ["argmax_part"]

#: Numbers looked at before the search for the index of a new maximum: small enough to still be in the cache then.
_BLOCK = 4096


@helper(inline="always")
def _argmax(row, size, tag):
    best = np.int32(-0x80000000)
    best_block = 0
    for begin in range(0, size, _BLOCK):
        top = np.int32(-0x80000000)
        for i in range(begin, min(begin + _BLOCK, size)):
            top = max(top, ordered_bits(load(row, i, tag)))
        if top > best:
            best, best_block = top, begin
    i = best_block
    while i + 1 < size and ordered_bits(load(row, i, tag)) != best:
        i += 1
    return i


@kernel_by_dtype
def argmax_part(tag):
    """indices[r] = argmax of the `size` numbers from logits[r * stride] on, for a part of the rows.

    Arguments: logits, stride, size; indices ([R] int64), R.
    """

    @entry()
    def kernel(index, bins, arguments):
        logits, stride, size = argument(arguments, 0), argument(arguments, 1), argument(arguments, 2)
        indices, rows = argument(arguments, 3), argument(arguments, 4)
        for row in range(rows * index // bins, rows * (index + 1) // bins):
            store_i64(indices, row, _argmax(logits + row * stride * item_bytes(tag), size, tag))

    return kernel
