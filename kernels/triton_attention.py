"""What decode and prefill share on the device: reading keys through a block table, one tile of online softmax.

All scores are in the log2 domain (the factor log2 e is folded into the scale), so that `exp2` needs no product.
Sums and maxima are float32 whatever the inputs.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

__all__ = ["LOG2E", "attend_tile", "host_scale", "load_rows", "locate_rows", "resolve_sink"]

LOG2E = math.log2(math.e)
#: The same for kernels, which may only read globals that are constants of the language.
_LOG2E = tl.constexpr(LOG2E)


def host_scale(scale: float, softcap: float | None) -> float:
    """The factor the kernels apply to a dot product: to log2 units, or to the argument of the soft cap's exp2."""
    return scale * LOG2E if softcap is None else scale * 2.0 * LOG2E / softcap


@triton.jit
def locate_rows(
    p_table,  # [M] int32, one sequence's row of the block table
    i_start,  # a multiple of BLOCK_N
    m_n,  # [BLOCK_N] which positions may be looked up
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """int64 (block, offset in the block) of the BLOCK_N positions from i_start; [BLOCK_N] or, for the block, scalar."""
    o_n = i_start + tl.arange(0, BLOCK_N)
    if BLOCK_SIZE % BLOCK_N == 0:
        # The tile lies in one block, since it starts at a multiple of its size.
        b_block = tl.load(p_table + i_start // BLOCK_SIZE).to(tl.int64)
    else:
        b_block = tl.load(p_table + o_n // BLOCK_SIZE, mask=m_n, other=0).to(tl.int64)
    return b_block, (o_n % BLOCK_SIZE).to(tl.int64)


@triton.jit
def load_rows(
    p_cache,  # [N, B, H_KV, D], advanced to one KV head
    b_block,
    b_offset,
    m_n,  # [BLOCK_N]
    stride_n,
    stride_b,
    COMPUTE: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
):
    """[BLOCK_N, BLOCK_D] keys or values in COMPUTE.

    Positions outside of m_n read as zero: unused slots may hold NaN, which no weight of zero would undo.
    """
    o_d = tl.arange(0, BLOCK_D)
    p_rows = p_cache + (b_block * stride_n + b_offset * stride_b)[:, None] + o_d[None, :]
    if MASKED:
        b_rows = tl.load(p_rows, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0)
    elif BLOCK_D != D:
        b_rows = tl.load(p_rows, mask=(o_d < D)[None, :], other=0.0)
    else:
        b_rows = tl.load(p_rows)
    return b_rows.to(COMPUTE)


@triton.jit
def attend_tile(
    b_q,  # [BLOCK_M, BLOCK_D]
    b_k,  # [BLOCK_N, BLOCK_D]
    b_v,  # [BLOCK_N, BLOCK_D]
    b_k_scale,  # [BLOCK_N] fp32 factors of the keys, or None
    b_v_scale,  # [BLOCK_N] fp32 factors of the values, or None
    m_visible,  # broadcastable to [BLOCK_M, BLOCK_N]
    b_m,  # [BLOCK_M] running maximum
    b_l,  # [BLOCK_M] running sum
    b_acc,  # [BLOCK_M, BLOCK_D] running weighted values
    qk_scale,
    SOFTCAP: tl.constexpr,  # 0 for none
    MASKED: tl.constexpr,
    EMPTY_ROWS: tl.constexpr,  # whether a row may see no key of this tile nor of those before it
):
    """The running (maximum, sum, values) after one more tile of keys."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * qk_scale
    if b_k_scale is not None:
        b_s *= b_k_scale[None, :]
    if SOFTCAP > 0.0:
        # cap * tanh(x) with tanh x = 1 - 2 / (1 + e^2x), and the factor 2 log2 e already in qk_scale.
        b_s = (SOFTCAP * _LOG2E) * (1.0 - 2.0 / (1.0 + tl.exp2(b_s)))
    if MASKED:
        b_s = tl.where(m_visible, b_s, float("-inf"))
    b_m_new = tl.maximum(b_m, tl.max(b_s, axis=1))
    if EMPTY_ROWS:
        b_shift = tl.where(b_m_new == float("-inf"), 0.0, b_m_new)
    else:
        b_shift = b_m_new
    b_p = tl.exp2(b_s - b_shift[:, None])
    b_alpha = tl.exp2(b_m - b_shift)
    b_l = b_l * b_alpha + tl.sum(b_p, axis=1)
    if b_v_scale is not None:
        b_p *= b_v_scale[None, :]
    b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_alpha[:, None], input_precision="ieee")
    return b_m_new, b_l, b_acc


@triton.jit
def resolve_sink(
    p_sinks,  # [H]
    o_head,  # [BLOCK_M]
    m_row,  # [BLOCK_M]
    b_m,  # [BLOCK_M]
    b_l,  # [BLOCK_M]
    b_acc,  # [BLOCK_M, BLOCK_D]
):
    """The running state after a head's sink: a logit that takes weight and brings no value."""
    b_sink = tl.load(p_sinks + o_head, mask=m_row, other=0.0).to(tl.float32) * _LOG2E
    b_m_new = tl.maximum(b_m, b_sink)
    b_alpha = tl.exp2(b_m - b_m_new)
    b_l = b_l * b_alpha + tl.exp2(b_sink - b_m_new)
    return b_m_new, b_l, b_acc * b_alpha[:, None]
