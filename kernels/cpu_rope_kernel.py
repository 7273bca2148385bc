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


@helper(inline="always", fastmath=FASTMATH)
def _rotate_token(arguments, place, token, cos, sin, head_size, tag):
    x, stride, head_stride = (
        argument(arguments, place),
        argument(arguments, place + 1),
        argument(arguments, place + 2),
    )
    heads, output = argument(arguments, place + 3), argument(arguments, place + 4)
    size = item_bytes(tag)
    for head in range(heads):
        source = x + (token * stride + head * head_stride) * size
        _rotate(source, output + (token * heads + head) * head_size * size, cos, sin, head_size // 2, tag)


@kernel_by_dtype
def rotate_heads(tag):
    """output[t, h] = rotated x[t, h] for a part of the tokens, of two tensors.

    Arguments: cos, sin ([T, D] contiguous); T, D; then of each tensor: itself, its strides between tokens and between
    heads, in numbers; H, output ([T, H, D] contiguous).
    """

    @entry(fastmath=FASTMATH)
    def kernel(index, bins, arguments):
        cos, sin = argument(arguments, 0), argument(arguments, 1)
        tokens, head_size = argument(arguments, 2), argument(arguments, 3)
        size = item_bytes(tag)
        for token in range(tokens * index // bins, tokens * (index + 1) // bins):
            angles = token * head_size * size
            _rotate_token(arguments, 4, token, cos + angles, sin + angles, head_size, tag)
            _rotate_token(arguments, 9, token, cos + angles, sin + angles, head_size, tag)

    return kernel
