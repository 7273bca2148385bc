"""Norms and activations on a CPU whose result for one row depends on nothing but that row.

torch's activations use vectors for most of a tensor and single numbers for what is left at the end of each thread's
share, and the two differ in the last bit: a number's value depends on where it lies.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_paged.kernels import cpu_norm
from hf_paged.kernels.cpu_runtime import float_bits, launch, loaded_kernels, num_bins

__all__ = ["row_gelu_tanh", "row_layer_norm", "row_rms_norm", "row_silu"]


def row_silu(x: Tensor) -> Tensor:
    """`torch.nn.functional.silu` of [..., E]."""
    return _activation("silu_rows", x)


def row_gelu_tanh(x: Tensor) -> Tensor:
    """`torch.nn.functional.gelu(approximate="tanh")` of [..., E]."""
    return _activation("gelu_tanh_rows", x)


def row_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`torch.nn.functional.layer_norm` over the last dimension of [..., E]. weight, bias: [E] of the same dtype."""
    kernels = _kernels(x, weight, bias)
    x = x.contiguous()
    output, size = torch.empty_like(x), x.shape[-1]
    arguments = (
        x.data_ptr(), 0 if weight is None else weight.data_ptr(), 0 if bias is None else bias.data_ptr(),
        output.data_ptr(), x.numel() // size, size, float_bits(eps),
    )  # fmt: skip
    launch(kernels.layer_norm_rows(x.dtype), _bins(x), arguments)
    return output


def row_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`torch.nn.functional.rms_norm` over the last dimension of [..., E]. weight: [E] of the same dtype."""
    _kernels(x, weight)
    return cpu_norm.rms_norm(x.contiguous(), weight, eps)


def _activation(name: str, x: Tensor) -> Tensor:
    kernels = _kernels(x)
    x = x.contiguous()
    output, size = torch.empty_like(x), x.shape[-1]
    arguments = (x.data_ptr(), output.data_ptr(), x.numel() // size, size)
    launch(getattr(kernels, name)(x.dtype), _bins(x), arguments)
    return output


def _bins(x: Tensor) -> int:
    return num_bins(2 * x.numel() * x.element_size())


def _kernels(x: Tensor, *parameters: Tensor | None) -> Any:
    kernels = loaded_kernels("cpu_row_function_kernel", x.dtype)
    if kernels is None or x.device.type != "cpu":
        raise ValueError(f"no row kernels for {x.dtype} on {x.device}")
    for parameter in parameters:
        if parameter is not None and not (
            parameter.dtype is x.dtype and parameter.shape == x.shape[-1:] and parameter.is_contiguous()
        ):
            raise ValueError(
                f"row kernels: a parameter of {parameter.dtype} {tuple(parameter.shape)} for rows of {x.dtype} "
                f"[{x.shape[-1]}]"
            )
    return kernels
