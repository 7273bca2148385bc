"""The scales of an int8 cache on a CPU: made when tokens are stored, applied to scores and to weights.

A row attends to the integers as they are, and a score or a weight is multiplied by its token's scale: one
multiplication for a whole head. What is stored is bit for bit what `hf_paged.kernels.quantised` says.
"""

from __future__ import annotations

import numpy as np

from hf_paged.kernels.cpu_jit import FASTMATH, helper
from hf_paged.kernels.cpu_memory import (
    float_bits,
    float_from_bits,
    load_f32,
    load_i32,
    store_f32,
    store_integer,
)

__all__ = ["scale_scores", "store_quantised"]

_ZERO, _MOST = np.float32(0), np.float32(127)
#: The bits of float32 numbers >= 0 order as they do. `quantised.LEAST`, and infinity.
_LEAST, _INFINITE = np.int32(27 << 23), np.int32(0x7F800000)
_MAGNITUDE = np.int32(0x7FFFFFFF)
_NAN = np.float32(np.nan)


@helper(fastmath=False)
def store_quantised(source, target, scales, slot, head_stride, kv_heads, head_size):
    """Quantises one token's float32 heads at `source`, `head_stride` numbers apart, to its slot.

    What is stored is specified to the last bit. Without `fastmath=False` numba would take the caller's options.
    """
    target += slot * kv_heads * head_size
    for head in range(kv_heads):
        read = source + 4 * head * head_stride
        # By their bits, a NaN is larger than all numbers.
        largest = np.int32(0)
        for d in range(head_size):
            bits = np.int32(float_bits(load_f32(read, d)) & _MAGNITUDE)
            largest = bits if bits > largest else largest
        top = float_from_bits(largest)
        factor, scale = _ZERO, _NAN
        if largest < _INFINITE:
            scale = top / _MOST
            if largest >= _LEAST:
                factor = _MOST / top
        store_f32(scales, slot * kv_heads + head, scale)
        write = target + head * head_size
        if factor > _ZERO:
            for d in range(head_size):
                store_integer(write, d, load_f32(read, d) * factor)
        else:
            for d in range(head_size):
                store_integer(write, d, _ZERO)


@helper(fastmath=FASTMATH)
def scale_scores(scores, scales, block_table, begin, end, shape, chunk):
    """scores[h, t - begin] *= scale[t, h // group] for begin <= t < end; scores is float32 [H, chunk]."""
    position = begin
    while position < end:
        offset = position % shape.block_size
        count = min(shape.block_size - offset, end - position)
        slot = load_i32(block_table, position // shape.block_size) * shape.block_size + offset
        for kv_head in range(shape.kv_heads):
            source = scales + 4 * (slot * shape.kv_heads + kv_head)
            for member in range(shape.group):
                target = scores + 4 * ((kv_head * shape.group + member) * chunk + position - begin)
                for t in range(count):
                    store_f32(target, t, load_f32(target, t) * load_f32(source, t * shape.kv_heads))
        position += count
