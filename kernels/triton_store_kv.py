"""Write new keys and values into their slots.

The cache may hold fewer bits than the model: int8 with one scale a token and head, which these kernels compute and
store beside the cache, or fp8 (e4m3) with one given scale a head.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hf_paged.kernels import quantised
from hf_paged.kernels.tiles import head_tile, next_power_of_2
from hf_paged.kernels.triton_checks import check_cache, check_dtype, check_tensors
from hf_paged.kernels.triton_launch import launch

__all__ = ["TILE", "store_kv", "write_heads"]

#: Elements of one program's tile: enough for full-width loads, small enough that one token fills several SMs.
TILE = 2048
LEAST: tl.constexpr = tl.constexpr(quantised.LEAST)


@triton.jit
def write_heads(
    b_x,  # [BLOCK_H, BLOCK_D] fp32
    p_cache,  # [N, B, H_KV, D]
    p_scale,  # [N * B, H_KV] (int8), [H_KV] (fp8) or None, fp32
    i_slot,
    o_h,  # [BLOCK_H] heads
    m_x,  # [BLOCK_H, BLOCK_D]
    stride_n,
    stride_b,
    stride_h,
    H_KV: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Quantises one token's heads to the cache's dtype and writes them."""
    o_d = tl.arange(0, BLOCK_D)
    m_h = o_h < H_KV
    if p_cache.dtype.element_ty == tl.int8:
        # By their bits, a NaN is larger than all numbers: its head gets the scale NaN (see `quantised`).
        b_bits = tl.max(tl.abs(b_x).to(tl.int32, bitcast=True), axis=1)
        b_max = b_bits.to(tl.float32, bitcast=True)
        m_finite = b_bits < 0x7F800000
        m_usable = m_finite & (b_max >= LEAST)
        tl.store(p_scale + i_slot * H_KV + o_h, tl.where(m_finite, b_max / 127.0, float("nan")), mask=m_h)
        b_inverse = tl.where(m_usable, 127.0 / tl.where(m_usable, b_max, 1.0), 0.0)
        b_x = tl.where(m_finite[:, None], b_x, 0.0)
        # Adding 1.5 * 2^23 rounds to the nearest integer, ties to even, in hardware and interpreter alike.
        b_x = (b_x * b_inverse[:, None] + 12582912.0) - 12582912.0
    elif p_scale is not None:
        b_scale = tl.load(p_scale + o_h, mask=m_h, other=1.0)
        b_x = tl.minimum(tl.maximum(b_x / b_scale[:, None], -448.0), 448.0)
    i_block = i_slot // BLOCK_SIZE
    i_offset = i_slot % BLOCK_SIZE
    p_row = p_cache + i_block * stride_n + i_offset * stride_b
    tl.store(p_row + o_h[:, None] * stride_h + o_d[None, :], b_x.to(p_cache.dtype.element_ty), mask=m_x)


@triton.jit
def store_kv_kernel(
    p_k_cache,  # [N, B, H_KV, D]
    p_v_cache,  # [N, B, H_KV, D]
    p_key,  # [T, H_KV, D]
    p_value,  # [T, H_KV, D]
    p_slots,  # [T] int64
    p_k_scale,  # see write_heads
    p_v_scale,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_n,
    stride_b,
    stride_h,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (T, ceil(H_KV / BLOCK_H)): one token's heads a program."""
    i_t = tl.program_id(0).to(tl.int64)
    i_slot = tl.load(p_slots + i_t).to(tl.int64)
    if i_slot < 0:
        return
    o_h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    o_d = tl.arange(0, BLOCK_D)
    m_x = (o_h < H_KV)[:, None] & (o_d < D)[None, :]
    p_k = p_key + i_t * stride_kt + o_h[:, None] * stride_kh + o_d[None, :]
    b_k = tl.load(p_k, mask=m_x, other=0.0).to(tl.float32)
    write_heads(
        b_k, p_k_cache, p_k_scale, i_slot, o_h, m_x, stride_n, stride_b, stride_h, H_KV, BLOCK_SIZE, BLOCK_D
    )
    p_v = p_value + i_t * stride_vt + o_h[:, None] * stride_vh + o_d[None, :]
    b_v = tl.load(p_v, mask=m_x, other=0.0).to(tl.float32)
    write_heads(
        b_v, p_v_cache, p_v_scale, i_slot, o_h, m_x, stride_n, stride_b, stride_h, H_KV, BLOCK_SIZE, BLOCK_D
    )


def store_kv(
    key: Tensor,  # [T, H_kv, D]
    value: Tensor,  # [T, H_kv, D]
    k_cache: Tensor,  # [N, B, H_kv, D]
    v_cache: Tensor,  # [N, B, H_kv, D]
    slot_mapping: Tensor,  # [T] int64
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Writes each token's key and value into its slot; slot -1 stores nothing.

    Args:
        key, value: any strides with a contiguous last dimension.
        k_cache, v_cache: float, int8 or float8_e4m3fn, of equal strides; written in place.
        slot_mapping: block * B + offset of each token.
        k_scales, v_scales: float32. For int8 [N, B, H_kv], written here; for fp8 [H_kv], read; else None.

    Raises:
        ValueError: an unsupported dtype, head size, layout, GPU or mix of devices.
    """
    op = "store_kv"
    check_cache(op, k_cache, v_cache, k_scales, v_scales)
    check_tensors(op, k_cache.device, key=key, value=value, slot_mapping=slot_mapping)
    check_dtype(op, "key", key)
    check_dtype(op, "value", value)
    num_tokens, kv_heads, head_size = key.shape
    block_d = head_tile(head_size)
    block_h = min(next_power_of_2(kv_heads), max(1, TILE // block_d))
    launch(
        store_kv_kernel,
        (num_tokens, -(-kv_heads // block_h)),
        k_cache.device,
        *(k_cache, v_cache, key, value, slot_mapping, k_scales, v_scales),
        *(*key.stride()[:2], *value.stride()[:2], *k_cache.stride()[:3]),
        H_KV=kv_heads,
        D=head_size,
        BLOCK_SIZE=k_cache.shape[1],
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=4,
        num_stages=1,
    )
