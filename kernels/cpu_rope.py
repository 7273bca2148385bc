"""Rotary position embedding of a step's queries or keys on a CPU, in one pass: written out in torch it takes eight."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_paged.kernels.cpu_runtime import launch, loaded_kernels, num_bins

__all__ = ["rotate"]


def rotate(
    x: Tensor,  # [T, H, D]
    cos: Tensor,  # [T, D]
    sin: Tensor,  # [T, D]
) -> Tensor | None:
    """`x * cos + rotate_half(x) * sin` (RoFormer, arXiv:2104.09864, in the layout of LLaMA): [T, H, D] contiguous.

    Computed in float32 and rounded once. None where the kernel does not take these tensors, or is not loaded yet.
    """
    dtype = x.dtype
    kernels = loaded_kernels("cpu_rope_kernel", dtype)
    if (
        kernels is None
        or cos.dtype is not dtype
        or sin.dtype is not dtype
        or x.device.type != "cpu"
        or x.shape[2] % 2
        or cos.shape != (x.shape[0], x.shape[2])
        or sin.shape != cos.shape
        or x.stride(2) != 1
        or not (cos.is_contiguous() and sin.is_contiguous())
    ):
        return None
    output = torch.empty(x.shape, dtype=dtype)
    arguments = (
        x.data_ptr(), x.stride(0), x.stride(1), output.data_ptr(), cos.data_ptr(), sin.data_ptr(), *x.shape
    )  # fmt: skip
    launch(kernels.rotate_heads(dtype), num_bins(2 * x.numel() * x.element_size()), arguments)
    return output
