"""Copy whole blocks of the cache, keys and values in one launch (copy-on-write)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_paged.kernels.triton_checks import check_cache, check_tensors
from hf_paged.kernels.triton_launch import launch

__all__ = ["copy_blocks"]

_TILE = 4096


@triton.jit
def copy_rows_kernel(
    p_k_to,
    p_v_to,
    p_k_from,
    p_v_from,
    p_to,  # [n] int64 rows written, or None: row i
    p_from,  # [n] int64 rows read, or None: row i
    stride_to,
    stride_from,
    ROW: tl.constexpr,  # contiguous elements a row
    BLOCK: tl.constexpr,
):
    """Grid (n, ceil(ROW / BLOCK)): copies one stretch of one row of two tensors."""
    i_to = tl.program_id(0).to(tl.int64)
    i_from = i_to
    if p_from is not None:
        i_from = tl.load(p_from + i_from).to(tl.int64)
    if p_to is not None:
        i_to = tl.load(p_to + i_to).to(tl.int64)
    o_x = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < ROW
    b_k = tl.load(p_k_from + i_from * stride_from + o_x, mask=m_x)
    b_v = tl.load(p_v_from + i_from * stride_from + o_x, mask=m_x)
    tl.store(p_k_to + i_to * stride_to + o_x, b_k, mask=m_x)
    tl.store(p_v_to + i_to * stride_to + o_x, b_v, mask=m_x)


def copy_blocks(
    k_cache: Tensor,  # [N, B, H_kv, D]
    v_cache: Tensor,  # [N, B, H_kv, D]
    src: Tensor,  # [n] int64
    dst: Tensor,  # [n] int64
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Copies block `src[i]` to block `dst[i]`, in K and V and in an int8 cache's scales.

    All sources are read before any target is written (they pass through a buffer), so a block may be in both lists.
    `dst` names no block twice.

    Raises:
        ValueError: an unsupported dtype, layout, GPU or mix of devices, or blocks that are not contiguous inside.
    """
    op = "copy_blocks"
    check_cache(op, k_cache, v_cache, k_scales, v_scales)
    check_tensors(op, k_cache.device, src=src, dst=dst)
    if not k_cache[0].is_contiguous():
        raise ValueError(f"{op}: blocks with strides {k_cache.stride()}; each block must be contiguous")
    if src.shape != dst.shape or src.dim() != 1:
        raise ValueError(f"{op}: src {tuple(src.shape)} and dst {tuple(dst.shape)}; must both be [n]")
    _copy(k_cache, v_cache, src, dst)
    if k_scales is not None and v_scales is not None and k_cache.dtype == torch.int8:
        _copy(k_scales, v_scales, src, dst)


def _copy(k_blocks: Tensor, v_blocks: Tensor, src: Tensor, dst: Tensor) -> None:
    row = k_blocks[0].numel()
    staged = torch.empty(2, src.shape[0], row, dtype=k_blocks.dtype, device=k_blocks.device)
    block = min(_TILE, triton.next_power_of_2(row))
    grid = (src.shape[0], -(-row // block))
    constants = {"ROW": row, "BLOCK": block, "num_warps": 4, "num_stages": 1}
    stride = k_blocks.stride(0)
    launch(
        copy_rows_kernel,
        grid,
        k_blocks.device,
        *staged,
        k_blocks,
        v_blocks,
        None,
        src,
        row,
        stride,
        **constants,
    )
    launch(
        copy_rows_kernel,
        grid,
        k_blocks.device,
        k_blocks,
        v_blocks,
        *staged,
        dst,
        None,
        stride,
        row,
        **constants,
    )
