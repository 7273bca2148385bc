"""`amx_linear`: float32 linear layers on processors with Intel's AMX, by products of bfloat16 (`cpu_amx_tile`)."""

from __future__ import annotations

import ctypes
import functools
import platform
import sys
from array import array
from typing import Any

import torch
from torch import Tensor

from hf_paged.kernels.cpu_runtime import kernel_module, launch, num_bins
from hf_paged.kernels.cpu_scratch import scratch_address

__all__ = ["amx_linear", "missing", "multiply"]

#: The system call that asks Linux for the use of tile registers by this process, and its arguments.
_ARCH_PRCTL, _REQUEST, _TILE_DATA = 158, 0x1023, 18


@functools.cache
def missing() -> str | None:
    """What this machine lacks for `amx_linear`; None if nothing. Asks the system for tile registers."""
    if sys.platform != "linux" or platform.machine().lower() not in ("x86_64", "amd64"):
        return f"no AMX on {sys.platform} {platform.machine()}"
    try:
        import llvmlite.binding as llvm
    except Exception as error:  # a damaged installation raises more than ImportError
        return f"numba cannot be imported ({error})"
    features = llvm.get_host_cpu_features()
    if not all(features.get(name) for name in ("avx512f", "amx-tile", "amx-bf16")):
        return "this processor has no AMX for bfloat16"
    if ctypes.CDLL(None).syscall(_ARCH_PRCTL, _REQUEST, _TILE_DATA) != 0:
        return "the system does not give this process tile registers"
    return None


def amx_linear(
    x: Tensor,  # [..., K] float32
    weight: Tensor,  # [N, K] float32, either dimension contiguous
    bias: Tensor | None,  # [N] float32
) -> Tensor | None:  # [..., N] float32
    """`torch.nn.functional.linear` as exact as float32 sums are; None if a number of the result is not finite.

    Numbers are cut in three parts, and infinity cannot be: what comes of it, and of a sum beyond float32, is for who
    computes without parts. Parts below 2**-126 are zero.

    Raises:
        ValueError: dtypes, devices or strides that the kernels do not take.
    """
    along = weight.stride(1) == 1 or weight.shape[1] == 1
    tensors = [x, weight] if bias is None else [x, weight, bias]
    if (
        any(tensor.dtype is not torch.float32 or tensor.device.type != "cpu" for tensor in tensors)
        or not (along or weight.stride(0) == 1)
        or (bias is not None and (bias.shape != weight.shape[:1] or not bias.is_contiguous()))
    ):
        kinds = ", ".join(f"{tensor.dtype} on {tensor.device}" for tensor in tensors)
        strides = ", ".join(f"{tuple(tensor.shape)} with strides {tensor.stride()}" for tensor in tensors[1:])
        raise ValueError(f"amx_linear: {kinds}, of {strides}: float32 on cpu is supported")
    return multiply(x.contiguous(), weight, bias, along)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, along: bool) -> Tensor | None:
    """`amx_linear` of what its checks let through, with contiguous x; `along`: rows of the weights are contiguous."""
    # Between two layers the caches hold weights, not Python: each line here costs what it would not cost alone.
    columns, size = weight.shape
    rows = x.numel() // max(1, size)
    kernels: Any = kernel_module("cpu_amx_kernel")
    # A user's default dtype and device may be others.
    output = torch.empty((*x.shape[:-1], columns), dtype=torch.float32, device="cpu")
    bins = num_bins((columns * size + rows * (size + columns)) * 4)
    room = kernels.scratch_bytes(rows, size, along)
    checks = array("f", bytes(4 * bins))
    arguments = (
        x.data_ptr(), size, weight.data_ptr(), weight.stride(0 if along else 1),
        0 if bias is None else bias.data_ptr(), output.data_ptr(), columns, rows, columns, size,
        scratch_address(bins * room), room, checks.buffer_info()[0],
    )  # fmt: skip
    launch((kernels.linear_along if along else kernels.linear_across)(torch.float32), bins, arguments)
    return None if any(checks) else output  # NaN
