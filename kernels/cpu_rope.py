"""Rotary position embedding of a step's queries and keys on a CPU, in one pass: written out in torch it takes eight."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from hf_paged.kernels.cpu_runtime import launch, loaded_kernels, num_bins

__all__ = ["rotate"]


def rotate(
    query: Tensor,  # [T, H, D]
    key: Tensor,  # [T, H_kv, D]
    cos: Tensor,  # [T, D]
    sin: Tensor,  # [T, D]
) -> tuple[Tensor, Tensor] | None:
    """`x * cos + rotate_half(x) * sin` of both (RoFormer, arXiv:2104.09864, in the layout of LLaMA), contiguous.

    Computed in float32 and rounded once. None where the kernel does not take these tensors, or is not loaded yet.
    """
    dtype = query.dtype
    tokens, _, size = query.shape
    kernels = loaded_kernels("cpu_rope_kernel", dtype)
    if (
        kernels is None
        or not key.dtype is cos.dtype is sin.dtype is dtype
        or query.device.type != "cpu"
        or size % 2
        or key.shape[0] != tokens
        or key.shape[2] != size
        or cos.shape != (tokens, size)
        or sin.shape != cos.shape
        or not query.stride(2) == key.stride(2) == 1
        or not (cos.is_contiguous() and sin.is_contiguous())
    ):
        return None
    new = functools.partial(torch.empty, dtype=dtype, device="cpu")
    outputs = new(query.shape), new(key.shape)
    arguments = [cos.data_ptr(), sin.data_ptr(), tokens, size]
    for x, output in zip((query, key), outputs, strict=True):
        arguments += (x.data_ptr(), x.stride(0), x.stride(1), x.shape[1], output.data_ptr())
    num_bytes = 2 * (query.numel() + key.numel()) * query.element_size()
    launch(kernels.rotate_heads(dtype), num_bins(num_bytes), arguments)
    return outputs
