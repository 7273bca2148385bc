"""Writes new keys and values into their slots on a CPU, tokens shared out over threads."""

from __future__ import annotations

from hf_paged.kernels.cpu_jit import entry, helper, kernel_by_dtype
from hf_paged.kernels.cpu_memory import argument, copy_bits, has_scales, item_bytes, load_i64
from hf_paged.kernels.cpu_quantise import store_quantised

__all__ = ["new_token_bytes", "store_rows", "store_token"]


@helper()
def new_token_bytes(tag):
    """Bytes of a number of new keys and values: they come in the cache's dtype, or in float32 to be quantised."""
    return 4 if has_scales(tag) else item_bytes(tag)


@helper()
def store_token(source, target, scales, slot, head_stride, kv_heads, head_size, tag):
    """Writes one token's heads from `source`, `head_stride` numbers apart, to its slot of the cache at `target`."""
    if has_scales(tag):
        store_quantised(source, target, scales, slot, head_stride, kv_heads, head_size)
    else:
        size = item_bytes(tag)
        target += slot * kv_heads * head_size * size
        for head in range(kv_heads):
            read = source + head * head_stride * size
            write = target + head * head_size * size
            for d in range(head_size):
                copy_bits(read, write, d, tag)


@kernel_by_dtype
def store_rows(tag):
    """Stores a part of the tokens: token t in slot_mapping[t]; -1 stores nothing.

    Arguments: key, its strides between tokens and between heads, in numbers; the same of value; k_cache, v_cache,
    kv_heads, head_size; slot_mapping ([T] int64), T; k_scales and v_scales ([N, B, H_kv] float32), or 0.
    """

    @entry()
    def kernel(index, bins, arguments):
        key, key_stride, key_head_stride = (
            argument(arguments, 0),
            argument(arguments, 1),
            argument(arguments, 2),
        )
        value, value_stride, value_head_stride = (
            argument(arguments, 3), argument(arguments, 4), argument(arguments, 5),
        )  # fmt: skip
        k_cache, v_cache = argument(arguments, 6), argument(arguments, 7)
        kv_heads, head_size = argument(arguments, 8), argument(arguments, 9)
        slot_mapping, tokens = argument(arguments, 10), argument(arguments, 11)
        k_scales, v_scales = argument(arguments, 12), argument(arguments, 13)
        size = new_token_bytes(tag)
        for token in range(tokens * index // bins, tokens * (index + 1) // bins):
            slot = load_i64(slot_mapping, token)
            if slot >= 0:
                source = key + token * key_stride * size
                store_token(source, k_cache, k_scales, slot, key_head_stride, kv_heads, head_size, tag)
                source = value + token * value_stride * size
                store_token(source, v_cache, v_scales, slot, value_head_stride, kv_heads, head_size, tag)

    return kernel
