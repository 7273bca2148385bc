"""Rotary position embedding of a step's queries or keys on a CPU, in one pass: written out in torch it takes eight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_paged.kernels.cpu_runtime import is_loading, kernel_module, launch, num_bins

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
    if (
        cos.dtype is not dtype
        or sin.dtype is not dtype
        or x.device.type != "cpu"
        or is_loading(dtype)
        or x.shape[2] % 2
        or cos.shape != (x.shape[0], x.shape[2])
        or sin.shape != cos.shape
        or x.stride(2) != 1
        or not (cos.is_contiguous() and sin.is_contiguous())
    ):
        return None
    kernels: Any = kernel_module("cpu_rope_kernel")
    if kernels is None or kernels.dtype_tag(dtype) is None:
        return None
    output = torch.empty(x.shape, dtype=dtype)
    arguments = (
        x.data_ptr(), x.stride(0), x.stride(1), output.data_ptr(), cos.data_ptr(), sin.data_ptr(), *x.shape
    )  # fmt: skip
    launch(kernels.rotate_heads(dtype), num_bins(2 * x.numel() * x.element_size()), arguments)
    return output
