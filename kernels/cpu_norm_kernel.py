"""The numba kernel of `hf_paged.kernels.cpu_norm`."""

from __future__ import annotations

import math

import numpy as np

from hf_paged.kernels.cpu_jit import FASTMATH, entry, kernel_by_dtype
from hf_paged.kernels.cpu_memory import argument, float_argument, item_bytes, load, store

__all__ = ["rms_norm_rows"]


@kernel_by_dtype
def rms_norm_rows(tag):
    """output[r] = x[r] / rms(x[r]) * weight for a part of the rows; the sum of squares is float32.

    Arguments: x, weight, output; R, the size of a row; epsilon (float32).
    """

    @entry(fastmath=FASTMATH)
    def kernel(index, bins, arguments):
        x, weight, output = argument(arguments, 0), argument(arguments, 1), argument(arguments, 2)
        rows, size, epsilon = argument(arguments, 3), argument(arguments, 4), float_argument(arguments, 5)
        row_bytes = size * item_bytes(tag)
        for row in range(rows * index // bins, rows * (index + 1) // bins):
            source, target = x + row * row_bytes, output + row * row_bytes
            squares = np.float32(0)
            for i in range(size):
                number = load(source, i, tag)
                squares += number * number
            factor = np.float32(1) / np.float32(math.sqrt(squares / np.float32(size) + epsilon))
            for i in range(size):
                store(target, i, load(source, i, tag) * factor * load(weight, i, tag), tag)

    return kernel
