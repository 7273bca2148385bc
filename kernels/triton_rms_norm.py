"""RMS norm of each row, with the addition of a residual before it in the same pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_paged.kernels.tiles import next_power_of_2
from hf_paged.kernels.triton_checks import check_dtype, check_rows, row_warps
from hf_paged.kernels.triton_launch import launch

__all__ = ["rms_norm"]


@triton.jit
def rms_norm_kernel(
    p_y,  # [T, C] contiguous
    p_sum,  # [T, C] contiguous, or None
    p_x,  # [T, C]
    p_residual,  # [T, C], or None
    p_weight,  # [C]
    eps,
    stride_x,
    stride_residual,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid (T,): a row a program, always summed in one order."""
    i_t = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BLOCK)
    m_c = o_c < C
    b_x = tl.load(p_x + i_t * stride_x + o_c, mask=m_c, other=0.0).to(tl.float32)
    if p_residual is not None:
        b_x += tl.load(p_residual + i_t * stride_residual + o_c, mask=m_c, other=0.0).to(tl.float32)
        # The sum is a tensor of the model's dtype upstream, and the norm sees it rounded.
        b_sum = b_x.to(p_sum.dtype.element_ty)
        tl.store(p_sum + i_t * C + o_c, b_sum, mask=m_c)
        b_x = b_sum.to(tl.float32)
    b_scale = 1.0 / tl.sqrt(tl.sum(b_x * b_x, axis=0) / C + eps)
    b_weight = tl.load(p_weight + o_c, mask=m_c, other=0.0)
    b_y = (b_x * b_scale).to(p_x.dtype.element_ty).to(tl.float32) * b_weight.to(tl.float32)
    tl.store(p_y + i_t * C + o_c, b_y.to(p_y.dtype.element_ty), mask=m_c)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Normalises the rows of `x + residual` by their root mean square.

    Args:
        x: [T, C], any row stride.
        weight: [C].
        eps: added to the mean square.
        residual: [T, C] or None.

    Returns:
        (normalised [T, C], x + residual [T, C]), in the dtype of x, rounded where LLaMA's modules round; the second is
        `x` itself without a residual.

    Raises:
        ValueError: an unsupported dtype, shape, GPU or mix of devices.
    """
    op = "rms_norm"
    rows, width = check_rows(op, x, residual=residual, weight=weight)
    check_dtype(op, "weight", weight)
    y = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    total = x if residual is None else torch.empty_like(y)
    block = next_power_of_2(width)
    launch(
        rms_norm_kernel,
        (rows,),
        x.device,
        *(y, None if residual is None else total, x, residual, weight, eps),
        *(x.stride(0), 0 if residual is None else residual.stride(0)),
        C=width,
        BLOCK=block,
        num_warps=row_warps(block),
        num_stages=1,
    )
    return y, total
