"""The numba kernel of `hf_paged.kernels.cpu_rope`."""

from __future__ import annotations

from hf_paged.kernels.cpu_jit import FASTMATH, entry, helper, kernel_by_dtype
from hf_paged.kernels.cpu_memory import argument, item_bytes, load, store

__all__ = ["rotate_heads"]


@helper(inline="always", fastmath=FASTMATH)
def _rotate(source, target, cos, sin, half, tag):
    # Number i of the first half turns with number i of the second.
    for i in range(half):
        first, second = load(source, i, tag), load(source, half + i, tag)
        store(target, i, first * load(cos, i, tag) - second * load(sin, i, tag), tag)
        store(target, half + i, second * load(cos, half + i, tag) + first * load(sin, half + i, tag), tag)


@kernel_by_dtype
def rotate_heads(tag):
    """output[t, h] = rotated x[t, h] for a part of the tokens.

    Arguments: x, its strides between tokens and between heads, in numbers; output ([T, H, D] contiguous); cos, sin
    ([T, D] contiguous); T, H, D.
    """

    @entry(fastmath=FASTMATH)
    def kernel(index, bins, arguments):
        x, stride, head_stride = argument(arguments, 0), argument(arguments, 1), argument(arguments, 2)
        output, cos, sin = argument(arguments, 3), argument(arguments, 4), argument(arguments, 5)
        tokens, heads, head_size = argument(arguments, 6), argument(arguments, 7), argument(arguments, 8)
        size = item_bytes(tag)
        for token in range(tokens * index // bins, tokens * (index + 1) // bins):
            angles = token * head_size * size
            for head in range(heads):
                source = x + (token * stride + head * head_stride) * size
                target = output + (token * heads + head) * head_size * size
                _rotate(source, target, cos + angles, sin + angles, head_size // 2, tag)

    return kernel
