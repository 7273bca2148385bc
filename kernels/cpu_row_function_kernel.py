"""The numba kernels of `hf_paged.kernels.cpu_row_function`: each row by one and the same loop."""

from __future__ import annotations

import math

import numpy as np

from hf_paged.kernels.cpu_jit import FASTMATH, entry, helper, kernel_by_dtype
from hf_paged.kernels.cpu_memory import argument, exp, float_argument, item_bytes, load, store

__all__ = ["gelu_tanh_rows", "layer_norm_rows", "silu_rows"]

_ONE = np.float32(1)
#: sqrt(8 / pi): the tanh of GELU as a logistic function takes twice its argument.
_SLOPE, _CUBIC = np.float32(math.sqrt(8 / math.pi)), np.float32(0.044715)


@helper(inline="always", fastmath=FASTMATH)
def _logistic(x):
    small = exp(-abs(x))
    return (_ONE if x >= np.float32(0) else small) / (_ONE + small)


@kernel_by_dtype
def silu_rows(tag):
    """output[r] = x[r] / (1 + exp(-x[r])) for a part of the rows. Arguments: x, output; R, the size of a row."""

    @entry(fastmath=FASTMATH)
    def kernel(index, bins, arguments):
        x, output, rows, size = (
            argument(arguments, 0), argument(arguments, 1), argument(arguments, 2), argument(arguments, 3),
        )  # fmt: skip
        for row in range(rows * index // bins, rows * (index + 1) // bins):
            offset = row * size * item_bytes(tag)
            for i in range(size):
                number = load(x + offset, i, tag)
                store(output + offset, i, number * _logistic(number), tag)

    return kernel


@kernel_by_dtype
def gelu_tanh_rows(tag):
    """output[r] = GELU of x[r] by tanh, for a part of the rows. Arguments as `silu_rows`."""

    @entry(fastmath=FASTMATH)
    def kernel(index, bins, arguments):
        x, output, rows, size = (
            argument(arguments, 0), argument(arguments, 1), argument(arguments, 2), argument(arguments, 3),
        )  # fmt: skip
        for row in range(rows * index // bins, rows * (index + 1) // bins):
            offset = row * size * item_bytes(tag)
            for i in range(size):
                number = load(x + offset, i, tag)
                inner = _SLOPE * (number + _CUBIC * number * number * number)
                store(output + offset, i, number * _logistic(inner), tag)

    return kernel


@kernel_by_dtype
def layer_norm_rows(tag):
    """output[r] = (x[r] - mean) / deviation * weight + bias for a part of the rows; sums are float32.

    Arguments: x, weight, bias, output (weight and bias may be 0); R, the size of a row; epsilon (float32).
    """

    @entry(fastmath=FASTMATH)
    def kernel(index, bins, arguments):
        x, weight, bias, output = (
            argument(arguments, 0), argument(arguments, 1), argument(arguments, 2), argument(arguments, 3),
        )  # fmt: skip
        rows, size, epsilon = argument(arguments, 4), argument(arguments, 5), float_argument(arguments, 6)
        for row in range(rows * index // bins, rows * (index + 1) // bins):
            source = x + row * size * item_bytes(tag)
            target = output + row * size * item_bytes(tag)
            total = np.float32(0)
            for i in range(size):
                total += load(source, i, tag)
            mean = total / np.float32(size)
            squares = np.float32(0)
            for i in range(size):
                distance = load(source, i, tag) - mean
                squares += distance * distance
            factor = _ONE / np.float32(math.sqrt(squares / np.float32(size) + epsilon))
            for i in range(size):
                number = (load(source, i, tag) - mean) * factor
                if weight != 0:
                    number *= load(weight, i, tag)
                if bias != 0:
                    number += load(bias, i, tag)
                store(target, i, number, tag)

    return kernel
