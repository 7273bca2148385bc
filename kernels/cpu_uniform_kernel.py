"""The numba kernel of `hf_paged.kernels.cpu_uniform`."""

from __future__ import annotations

import functools

import numpy as np

from hf_paged.kernels.cpu_jit import Kernel, entry, helper
from hf_paged.kernels.cpu_memory import (
    argument,
    load_f64,
    load_i64,
    store_f32,
    store_f64,
    store_i32,
    store_i64,
)

__all__ = ["negated_in_float32", "uniform_rows"]

#: MT19937 (Matsumoto and Nishimura, 1998, doi 10.1145/272991.272995): words of its state, and how far apart it adds.
_N, _M = 624, 397


@helper(inline="always")
def _twisted(word, following, far):
    mixed = (word & 0x80000000) | (following & 0x7FFFFFFF)
    return far ^ (mixed >> 1) ^ ((following & 1) * 0x9908B0DF)


@helper(inline="always")
def _renew(state):
    # Cut where a loop would read what it wrote itself within one vector's reach.
    for i in range(_N - _M):
        store_i64(state, i, _twisted(load_i64(state, i), load_i64(state, i + 1), load_i64(state, i + _M)))
    for i in range(_N - _M, 2 * (_N - _M)):
        store_i64(
            state, i, _twisted(load_i64(state, i), load_i64(state, i + 1), load_i64(state, i - _N + _M))
        )
    for i in range(2 * (_N - _M), _N - 1):
        store_i64(
            state, i, _twisted(load_i64(state, i), load_i64(state, i + 1), load_i64(state, i - _N + _M))
        )
    last = _twisted(load_i64(state, _N - 1), load_i64(state, 0), load_i64(state, _M - 1))
    store_i64(state, _N - 1, last)


@helper(inline="always")
def _tempered(word):
    word ^= word >> 11
    word ^= (word << 7) & 0x9D2C5680
    word ^= (word << 15) & 0xEFC60000
    return word ^ (word >> 18)


@functools.cache
def uniform_rows() -> Kernel:
    """Moves a generator over R rows of V uniforms of 53 bits, and writes out those of the rows that are wanted.

    Arguments: state (624 words, int64 each), place ([2] int64: the next word, and how many are left with it); R, V;
    rows ([R] int64: where a row goes in the output, or -1), output ([n, V] float64).
    """

    @entry()
    def kernel(index, bins, arguments):
        state, place = argument(arguments, 0), argument(arguments, 1)
        num_rows, size = argument(arguments, 2), argument(arguments, 3)
        rows, output = argument(arguments, 4), argument(arguments, 5)
        position, left = load_i64(place, 0), load_i64(place, 1) - 1
        for row in range(num_rows):
            target = load_i64(rows, row)
            # The two words of a number are first written where it will lie.
            numbers = output + target * size * 8
            done = 0
            while done < 2 * size:
                if left == 0:
                    _renew(state)
                    position, left = 0, _N
                count = min(2 * size - done, left)
                if target >= 0:
                    for i in range(count):
                        store_i32(numbers, done + i, _tempered(load_i64(state, position + i)))
                position, left, done = position + count, left - count, done + count
            if target >= 0:
                for i in range(size):
                    words = load_i64(numbers, i)
                    bits = ((words & 0x1FFFFF) << 32) | ((words >> 32) & 0xFFFFFFFF)
                    store_f64(numbers, i, bits * 2.0**-53)
        store_i64(place, 0, position)
        store_i64(place, 1, left + 1)

    return Kernel(kernel)


@functools.cache
def negated_in_float32() -> Kernel:
    """output[i] = -numbers[i], of n float64 in float32, and how many are near the middle between two float32.

    Arguments: numbers, n, output; units of the last place of a float64 that are near; address of the count (int64).
    """

    @entry()
    def kernel(index, bins, arguments):
        numbers, size, output = argument(arguments, 0), argument(arguments, 1), argument(arguments, 2)
        margin, num_near = argument(arguments, 3), 0
        # A number is rounded up or down by the 29 bits it loses; it is near where these are about half of what they
        # can be.
        for i in range(size):
            lost = (load_i64(numbers, i) + (1 << 28) + margin) & ((1 << 29) - 1)
            num_near += lost < 2 * margin
            store_f32(output, i, np.float32(-load_f64(numbers, i)))
        store_i64(argument(arguments, 4), 0, num_near)

    return Kernel(kernel)
