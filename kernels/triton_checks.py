"""Errors before a launch: each names the op, the value and what is supported. A kernel itself can only be wrong."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_paged.kernels.triton_launch import gpu_of

__all__ = [
    "FLOATS",
    "FP8",
    "MAX_HEAD_SIZE",
    "check_cache",
    "check_dtype",
    "check_rows",
    "check_tensors",
    "row_warps",
]

MAX_HEAD_SIZE = 256
#: Longest row of a norm: 64 elements a thread at 16 warps.
MAX_ROW = 32768
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FP8 = torch.float8_e4m3fn


def check_tensors(op: str, device: torch.device, **tensors: Tensor | None) -> None:
    """Every tensor is on `device` and contiguous in its last dimension.

    Raises:
        ValueError: naming the op, the tensor and what was found.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.device != device:
            raise ValueError(
                f"{op}: {name} on {str(tensor.device)!r}, others on {str(device)!r}; must be one device"
            )
        if tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"{op}: {name} with strides {tensor.stride()}; its last dimension must be contiguous"
            )


def check_dtype(op: str, name: str, tensor: Tensor, supported: tuple[torch.dtype, ...] = FLOATS) -> None:
    """Raises ValueError unless the tensor's dtype is one of `supported`."""
    if tensor.dtype not in supported:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in supported)
        raise ValueError(
            f"{op}: {name} of dtype {str(tensor.dtype).removeprefix('torch.')}; supported: {names}"
        )


def check_cache(
    op: str, k_cache: Tensor, v_cache: Tensor, k_scales: Tensor | None, v_scales: Tensor | None
) -> None:
    """Raises ValueError unless both caches, their scales and their GPU are something the kernels can read."""
    gpu = gpu_of(op, k_cache.device)
    check_tensors(op, k_cache.device, v_cache=v_cache, k_cache=k_cache, k_scales=k_scales, v_scales=v_scales)
    check_dtype(op, "k_cache", k_cache, (*FLOATS, torch.int8, FP8))
    if (
        k_cache.dtype != v_cache.dtype
        or k_cache.shape != v_cache.shape
        or k_cache.stride() != v_cache.stride()
    ):
        raise ValueError(f"{op}: k_cache and v_cache must have one dtype, shape and set of strides")
    if k_cache.dtype == FP8 and not gpu.has_fp8:
        raise ValueError(f"{op}: a float8_e4m3fn cache on {gpu.arch}; supported from sm_89, or use int8")
    num_blocks, block_size, kv_heads, head_size = k_cache.shape
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        raise ValueError(f"{op}: head size {head_size}; supported: 1 to {MAX_HEAD_SIZE}")
    expected = {torch.int8: (num_blocks, block_size, kv_heads), FP8: (kv_heads,)}.get(k_cache.dtype)
    for name, scales in (("k_scales", k_scales), ("v_scales", v_scales)):
        if expected is None and scales is not None:
            raise ValueError(f"{op}: {name} with a {k_cache.dtype} cache, which has none")
        if expected is None or (scales is not None and scales.shape == expected and scales.is_contiguous()):
            if scales is not None:
                check_dtype(op, name, scales, (torch.float32,))
            continue
        found = None if scales is None else tuple(scales.shape)
        raise ValueError(
            f"{op}: {name} {found} with a {k_cache.dtype} cache; must be contiguous {list(expected)}"
        )


def check_rows(op: str, x: Tensor, residual: Tensor | None, **vectors: Tensor | None) -> tuple[int, int]:
    """(T, C) of `x` for an op that holds one row of C elements in a program.

    Raises:
        ValueError: unless x and residual are [T, C] of one dtype and the vectors [C], on one supported device.
    """
    gpu_of(op, x.device)
    check_tensors(op, x.device, x=x, residual=residual, **vectors)
    check_dtype(op, "x", x)
    if x.dim() != 2 or not 1 <= x.shape[1] <= MAX_ROW:
        raise ValueError(f"{op}: x of shape {tuple(x.shape)}; must be [T, C] with C from 1 to {MAX_ROW}")
    if residual is not None and (residual.shape != x.shape or residual.dtype != x.dtype):
        raise ValueError(
            f"{op}: residual {residual.dtype} {tuple(residual.shape)}; must be {x.dtype} {tuple(x.shape)} as x"
        )
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[1:]:
            raise ValueError(f"{op}: {name} of shape {tuple(vector.shape)}; must be [{x.shape[1]}]")
    return x.shape[0], x.shape[1]


def row_warps(block: int) -> int:
    """Warps for a program that holds a row of `block` elements: at most 32 elements a thread up to 16,384."""
    return min(16, max(4, block // 1024))
