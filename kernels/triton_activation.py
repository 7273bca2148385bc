"""Activations of the MLPs: SiLU of the gate times up (LLaMA), and GELU in the forms the GPTs use."""

from __future__ import annotations

import math
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_paged.kernels.triton_checks import check_dtype, check_tensors
from hf_paged.kernels.triton_launch import gpu_of, launch

__all__ = ["gelu", "silu_mul"]

_BLOCK = 1024
_SQRT_2_OVER_PI = tl.constexpr(math.sqrt(2.0 / math.pi))
_SQRT_HALF = tl.constexpr(math.sqrt(0.5))


@triton.jit
def silu_mul_kernel(
    p_y,  # [T, C] contiguous
    p_gate,  # [T, C]
    p_up,  # [T, C]
    stride_gate,
    stride_up,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (T, ceil(C / BLOCK))."""
    i_t = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < C
    b_gate = tl.load(p_gate + i_t * stride_gate + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_up = tl.load(p_up + i_t * stride_up + o_c, mask=m_c, other=0.0).to(tl.float32)
    b_gate = b_gate / (1.0 + tl.exp(-b_gate))
    # Upstream's activation is a tensor of its own: rounded before the product.
    b_y = b_gate.to(p_gate.dtype.element_ty).to(tl.float32) * b_up
    tl.store(p_y + i_t * C + o_c, b_y.to(p_y.dtype.element_ty), mask=m_c)


@triton.jit
def gelu_kernel(
    p_y,  # [T, C] contiguous
    p_x,  # [T, C]
    stride_x,
    C: tl.constexpr,
    TANH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (T, ceil(C / BLOCK))."""
    i_t = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_c = o_c < C
    b_x = tl.load(p_x + i_t * stride_x + o_c, mask=m_c, other=0.0).to(tl.float32)
    if TANH:
        b_z = _SQRT_2_OVER_PI * (b_x + 0.044715 * b_x * b_x * b_x)
        # (1 + tanh z) / 2 is the logistic function of 2 z.
        b_y = b_x / (1.0 + tl.exp(-2.0 * b_z))
    else:
        b_y = 0.5 * b_x * (1.0 + tl.erf(b_x * _SQRT_HALF))
    tl.store(p_y + i_t * C + o_c, b_y.to(p_y.dtype.element_ty), mask=m_c)


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate, up: [T, C] of one dtype, any row stride (halves of one projection, say).

    Returns:
        [T, C], contiguous.

    Raises:
        ValueError: an unsupported dtype, shape, GPU or mix of devices.
    """
    op = "silu_mul"
    rows, width = _check(op, gate)
    check_tensors(op, gate.device, up=up)
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(
            f"{op}: gate {gate.dtype} {tuple(gate.shape)}, up {up.dtype} {tuple(up.shape)}; must be alike"
        )
    y = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    grid = (rows, -(-width // _BLOCK))
    options = {"num_warps": 4, "num_stages": 1}
    launch(
        silu_mul_kernel,
        grid,
        gate.device,
        y,
        gate,
        up,
        gate.stride(0),
        up.stride(0),
        C=width,
        BLOCK=_BLOCK,
        **options,
    )
    return y


def gelu(x: Tensor, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    """GELU of [T, C] (any row stride), exact or by the tanh formula, as `torch.nn.functional.gelu`.

    Returns:
        [T, C], contiguous.

    Raises:
        ValueError: an unsupported approximation, dtype, shape or GPU.
    """
    op = "gelu"
    if approximate not in ("none", "tanh"):
        raise ValueError(f"{op}: approximate={approximate!r}; supported: 'none' and 'tanh'")
    rows, width = _check(op, x)
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    grid = (rows, -(-width // _BLOCK))
    constants = {"C": width, "TANH": approximate == "tanh", "BLOCK": _BLOCK}
    launch(gelu_kernel, grid, x.device, y, x, x.stride(0), **constants, num_warps=4, num_stages=1)
    return y


def _check(op: str, x: Tensor) -> tuple[int, int]:
    gpu_of(op, x.device)
    check_tensors(op, x.device, x=x)
    check_dtype(op, "x", x)
    if x.dim() != 2:
        raise ValueError(f"{op}: x of shape {tuple(x.shape)}; must be [T, C]")
    return x.shape[0], x.shape[1]
