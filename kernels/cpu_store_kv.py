"""Writes new keys and values into their slots on a CPU, tokens shared out over threads."""

from __future__ import annotations

import numpy as np
from numba import prange

from hf_paged.kernels.cpu_jit import copy_bits, entry, helper, item_bytes

__all__ = ["store_rows_parallel", "store_token"]


@helper()
def store_token(source, target, slot, head_stride, kv_heads, head_size, tag):
    """Copies one token's heads from `source`, `head_stride` numbers apart, to its slot of the cache at `target`."""
    size = item_bytes(tag)
    target += slot * kv_heads * head_size * size
    for head in range(kv_heads):
        read = source + head * head_stride * size
        write = target + head * head_size * size
        for d in range(head_size):
            copy_bits(read, write, d, tag)


@entry(parallel=True)
def store_rows_parallel(
    bins, key, key_stride, key_head_stride, value, value_stride, value_head_stride, k_cache, v_cache, kv_heads,
    head_size, slot_mapping, tag,
):  # fmt: skip
    """Stores token t in slot_mapping[t] ([T] int64; -1 stores nothing) on `bins` threads. Strides are in numbers."""
    size = item_bytes(tag)
    tokens = slot_mapping.shape[0]
    for index in prange(bins):
        part = np.int64(index)
        for token in range(tokens * part // bins, tokens * (part + 1) // bins):
            slot = slot_mapping[token]
            if slot >= 0:
                source = key + token * key_stride * size
                store_token(source, k_cache, slot, key_head_stride, kv_heads, head_size, tag)
                source = value + token * value_stride * size
                store_token(source, v_cache, slot, value_head_stride, kv_heads, head_size, tag)
