"""Rotate queries and keys by their positions (RoPE) and write keys and values into their slots, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_paged.kernels.tiles import head_tile, next_power_of_2
from hf_paged.kernels.triton_checks import check_cache, check_dtype, check_tensors
from hf_paged.kernels.triton_launch import launch
from hf_paged.kernels.triton_store_kv import TILE, write_heads

__all__ = ["store_kv_rope"]


@triton.jit
def _rotate(
    p_x,  # [heads, D] of one token
    p_cos,  # [ROTARY] of one token
    p_sin,
    stride_h,
    o_h,  # [BLOCK_H]
    m_x,  # [BLOCK_H, BLOCK_D]
    ROTARY: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """fp32 [BLOCK_H, BLOCK_D]: x * cos + rotate_half(x) * sin in the first ROTARY elements, x in the others."""
    o_d = tl.arange(0, BLOCK_D)
    m_r = o_d < ROTARY
    o_partner = tl.where(o_d < ROTARY // 2, o_d + ROTARY // 2, o_d - ROTARY // 2)
    b_cos = tl.load(p_cos + o_d, mask=m_r, other=1.0).to(tl.float32)
    b_sin = tl.load(p_sin + o_d, mask=m_r, other=0.0).to(tl.float32)
    b_sin = tl.where(o_d < ROTARY // 2, -b_sin, b_sin)
    p_row = p_x + o_h[:, None] * stride_h
    b_x = tl.load(p_row + o_d[None, :], mask=m_x, other=0.0).to(tl.float32)
    b_partner = tl.load(p_row + o_partner[None, :], mask=m_x & m_r[None, :], other=0.0).to(tl.float32)
    return b_x * b_cos[None, :] + b_partner * b_sin[None, :]


@triton.jit
def store_kv_rope_kernel(
    p_q_out,  # [T, H, D] contiguous
    p_k_cache,  # [N, B, H_KV, D]
    p_v_cache,  # [N, B, H_KV, D]
    p_query,  # [T, H, D]
    p_key,  # [T, H_KV, D]
    p_value,  # [T, H_KV, D]
    p_cos,  # [T, ROTARY]
    p_sin,  # [T, ROTARY]
    p_slots,  # [T] int64
    p_k_scale,  # see triton_store_kv.write_heads
    p_v_scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_rt,
    stride_n,
    stride_b,
    stride_h,
    H: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    ROTARY: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (T, ceil(H / BLOCK_H) + ceil(H_KV / BLOCK_H)): the first programs rotate queries, the others store."""
    i_t = tl.program_id(0).to(tl.int64)
    i_tile = tl.program_id(1)
    o_d = tl.arange(0, BLOCK_D)
    p_cos += i_t * stride_rt
    p_sin += i_t * stride_rt
    Q_TILES: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    if i_tile < Q_TILES:
        o_h = i_tile * BLOCK_H + tl.arange(0, BLOCK_H)
        m_x = (o_h < H)[:, None] & (o_d < D)[None, :]
        b_q = _rotate(p_query + i_t * stride_qt, p_cos, p_sin, stride_qh, o_h, m_x, ROTARY, BLOCK_D)
        p_o = p_q_out + (i_t * H + o_h[:, None]) * D + o_d[None, :]
        tl.store(p_o, b_q.to(p_q_out.dtype.element_ty), mask=m_x)
    else:
        i_slot = tl.load(p_slots + i_t).to(tl.int64)
        if i_slot >= 0:
            o_h = (i_tile - Q_TILES) * BLOCK_H + tl.arange(0, BLOCK_H)
            m_x = (o_h < H_KV)[:, None] & (o_d < D)[None, :]
            b_k = _rotate(p_key + i_t * stride_kt, p_cos, p_sin, stride_kh, o_h, m_x, ROTARY, BLOCK_D)
            # As if the rotated key had been a tensor of the model's dtype, which the unfused path makes of it.
            b_k = b_k.to(p_key.dtype.element_ty).to(tl.float32)
            write_heads(
                b_k,
                p_k_cache,
                p_k_scale,
                i_slot,
                o_h,
                m_x,
                stride_n,
                stride_b,
                stride_h,
                H_KV,
                BLOCK_SIZE,
                BLOCK_D,
            )
            p_v = p_value + i_t * stride_vt + o_h[:, None] * stride_vh + o_d[None, :]
            b_v = tl.load(p_v, mask=m_x, other=0.0).to(tl.float32)
            write_heads(
                b_v,
                p_v_cache,
                p_v_scale,
                i_slot,
                o_h,
                m_x,
                stride_n,
                stride_b,
                stride_h,
                H_KV,
                BLOCK_SIZE,
                BLOCK_D,
            )


def store_kv_rope(
    query: Tensor,  # [T, H, D]
    key: Tensor,  # [T, H_kv, D]
    value: Tensor,  # [T, H_kv, D]
    cos: Tensor,  # [T, R]
    sin: Tensor,  # [T, R]
    k_cache: Tensor,  # [N, B, H_kv, D]
    v_cache: Tensor,  # [N, B, H_kv, D]
    slot_mapping: Tensor,  # [T] int64
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Rotates queries and keys by their positions' angles (halves layout, as LLaMA) and stores keys and values.

    The first R elements of a head are rotated, R even and at most D. See `store_kv` for the caches and scales.

    Returns:
        [T, H, D] rotated queries in the query's dtype, contiguous; also for tokens whose slot is -1.

    Raises:
        ValueError: as `store_kv`, or cos and sin which do not fit.
    """
    op = "store_kv_rope"
    check_cache(op, k_cache, v_cache, k_scales, v_scales)
    tensors = {"query": query, "key": key, "value": value, "cos": cos, "sin": sin}
    check_tensors(op, k_cache.device, slot_mapping=slot_mapping, **tensors)
    for name, tensor in tensors.items():
        check_dtype(op, name, tensor)
    num_tokens, heads, head_size = query.shape
    kv_heads, rotary = key.shape[1], cos.shape[-1]
    if cos.shape != (num_tokens, rotary) or sin.shape != cos.shape or cos.stride() != sin.stride():
        raise ValueError(
            f"{op}: cos {tuple(cos.shape)} and sin {tuple(sin.shape)}; both must be [{num_tokens}, R]"
        )
    if rotary % 2 or rotary > head_size:
        raise ValueError(
            f"{op}: {rotary} rotated elements; must be even and at most the head size {head_size}"
        )
    rotated = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    block_d = head_tile(head_size)
    block_h = min(next_power_of_2(heads), max(1, TILE // block_d))
    launch(
        store_kv_rope_kernel,
        (num_tokens, -(-heads // block_h) + -(-kv_heads // block_h)),
        k_cache.device,
        *(rotated, k_cache, v_cache, query, key, value, cos, sin, slot_mapping, k_scales, v_scales),
        *(*query.stride()[:2], *key.stride()[:2], *value.stride()[:2], cos.stride(0), *k_cache.stride()[:3]),
        H=heads,
        H_KV=kv_heads,
        D=head_size,
        ROTARY=rotary,
        BLOCK_SIZE=k_cache.shape[1],
        BLOCK_H=block_h,
        BLOCK_D=block_d,
        num_warps=4,
        num_stages=1,
    )
    return rotated
