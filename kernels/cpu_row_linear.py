"""`row_linear`: a linear layer on a CPU whose result for one row depends on nothing but that row and the weights.

Libraries choose how they sum by the number of rows and of threads. Here the order is fixed (`cpu_row_linear_tile`).
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import torch
from torch import Tensor

from hf_paged.kernels.cpu_runtime import kernel_module, launch, loaded_kernels, num_bins
from hf_paged.kernels.cpu_scratch import scratch_address

__all__ = ["missing", "multiply", "row_linear"]


@functools.cache
def missing() -> str | None:
    """What this machine lacks for `row_linear`; None if nothing."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return None
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return f"no kernels for processors of the kind {platform.machine()}"
    try:
        import llvmlite.binding as llvm
    except Exception as error:  # a damaged installation raises more than ImportError
        return f"numba cannot be imported ({error})"
    return None if llvm.get_host_cpu_features().get("fma") else "this processor has no fused multiply-add"


@functools.cache
def _adds_pairs() -> bool:
    """Whether this processor adds products of two pairs of bfloat16 to a float32 at once."""
    jit: Any = kernel_module("cpu_jit")
    return jit is not None and jit.emits("avx512bf16", "avx512f")


def row_linear(
    x: Tensor,  # [..., K]
    weight: Tensor,  # [N, K], either dimension contiguous
    bias: Tensor | None,  # [N]
) -> Tensor:  # [..., N]
    """`torch.nn.functional.linear`, summed in float32 and rounded once, bit for bit the same beside any other rows.

    Raises:
        ValueError: dtypes, devices or strides that the kernels do not take.
    """
    dtype = weight.dtype
    in_pairs = dtype is torch.bfloat16 and _adds_pairs()
    kernels = loaded_kernels("cpu_row_linear_pairs_kernel" if in_pairs else "cpu_row_linear_kernel", dtype)
    columns, size = weight.shape
    along = weight.stride(1) == 1 or size == 1
    if (
        kernels is None
        or x.dtype is not dtype
        or (
            bias is not None
            and (bias.dtype is not dtype or bias.shape != (columns,) or not bias.is_contiguous())
        )
        or x.device.type != "cpu"
        or weight.device.type != "cpu"
        or not (along or weight.stride(0) == 1)
    ):
        raise ValueError(
            f"row_linear: x {x.dtype} on {x.device}, weight {dtype} on {weight.device} with strides {weight.stride()}"
        )
    rows = x.reshape(-1, size).contiguous()
    if not in_pairs:
        rows = rows.float()
    output = _multiply(rows, weight, bias, along, kernels)
    return output.to(x.dtype).view(*x.shape[:-1], columns)


def multiply(x: Tensor, weight: Tensor, bias: Tensor | None, along: bool) -> Tensor:
    """`row_linear` of float32 that its checks let through, once its kernels are loaded: contiguous x; `along`: rows of
    the weights are contiguous."""
    return _multiply(x, weight, bias, along, kernel_module("cpu_row_linear_kernel"))


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, along: bool, kernels: Any) -> Tensor:
    # Between two layers the caches hold weights, not Python: each line here costs what it would not cost alone.
    columns, size = weight.shape
    rows = x.numel() // max(1, size)
    # A user's default dtype and device may be others.
    output = torch.empty((*x.shape[:-1], columns), dtype=torch.float32, device="cpu")
    bins = num_bins((columns * size + rows * (size + columns)) * 4)
    room = kernels.scratch_size(size)
    arguments = (
        x.data_ptr(), size, weight.data_ptr(), weight.stride(0 if along else 1),
        0 if bias is None else bias.data_ptr(), output.data_ptr(), columns, rows, columns, size,
        scratch_address(4 * bins * room), room,
    )  # fmt: skip
    launch((kernels.linear_along if along else kernels.linear_across)(weight.dtype), bins, arguments)
    return output
