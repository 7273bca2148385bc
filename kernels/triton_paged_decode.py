"""Attention of one new token a sequence over its blocks (flash decoding).

A sequence is cut into chunks at fixed absolute positions; each chunk is one program a KV head, which reads its keys
once for all query heads of the group. Sequences of one chunk write their output directly, the others partial results
that a second kernel combines. The launch depends on shapes alone: every program derives its part from `seq_lens` on
the device and leaves if it has none, so a captured graph replays with other lengths and tables.

    positions   | chunk 0 | chunk 1 | ... | chunk n - 1 |     n = ceil(seq_len / chunk)
                            ^ first chunk inside of a sliding window
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_paged.kernels.metadata import PagedMetadata
from hf_paged.kernels.tiles import decode_splits, head_tile, lookup
from hf_paged.kernels.triton_attention import attend_tile, host_scale, load_rows, locate_rows, resolve_sink
from hf_paged.kernels.triton_launch import compute_dtype, gpu_of, launch

__all__ = ["paged_decode"]

#: Splits combined at a time; one number, so that no bound on splits compiles a variant of its own.
_COMBINE_SPLITS = 16


@triton.jit
def _chunking(i_len, min_chunk, max_splits, WINDOW: tl.constexpr):
    """(tokens a chunk, first visible position, first chunk, end of chunks) of a sequence of i_len tokens."""
    chunk = min_chunk
    while chunk * max_splits < i_len:
        chunk *= 2
    if WINDOW > 0:
        i_first = tl.maximum(i_len - WINDOW, 0)
    else:
        i_first = 0
    return chunk, i_first, i_first // chunk, tl.cdiv(i_len, chunk)


# A value of these that happens to be 1 or a multiple of 16 must not compile a variant in the middle of serving.
@triton.jit(do_not_specialize=["stride_table", "min_chunk", "max_splits"])
def paged_decode_kernel(
    p_out,  # [S, H, D] contiguous
    p_partial,  # [S, H, max_splits, D] fp32 contiguous, or None when max_splits is 1
    p_lse,  # [S, H, max_splits] fp32 contiguous, or None: log2 of the sum of a split's weights
    p_query,  # [S, H, D]
    p_k_cache,  # [N, B, H_KV, D]
    p_v_cache,  # [N, B, H_KV, D]
    p_tables,  # [S, M] int32
    p_seq_lens,  # [S] int32
    p_sinks,  # [H] or None
    p_k_scale,  # [N * B, H_KV] (int8), [H_KV] (fp8) fp32, or None
    p_v_scale,
    qk_scale,
    stride_qt,
    stride_qh,
    stride_n,
    stride_b,
    stride_h,
    stride_table,
    min_chunk,
    max_splits,
    H_KV: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 for none
    SOFTCAP: tl.constexpr,  # 0 for none
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (H_KV * ceil(GROUP / BLOCK_M), S, max_splits)."""
    HEAD_TILES: tl.constexpr = (GROUP + BLOCK_M - 1) // BLOCK_M
    i_kv = tl.program_id(0) // HEAD_TILES
    i_seq = tl.program_id(1).to(tl.int64)
    i_split = tl.program_id(2)
    o_m = tl.program_id(0) % HEAD_TILES * BLOCK_M + tl.arange(0, BLOCK_M)
    m_row = o_m < GROUP
    o_head = i_kv * GROUP + o_m
    o_d = tl.arange(0, BLOCK_D)
    m_q = m_row[:, None] & (o_d < D)[None, :]
    p_o = p_out + (i_seq * (H_KV * GROUP) + o_head)[:, None] * D + o_d[None, :]

    i_len = tl.load(p_seq_lens + i_seq)
    if (i_len <= 0) & (i_split == 0):
        tl.store(p_o, tl.zeros([BLOCK_M, BLOCK_D], dtype=p_out.dtype.element_ty), mask=m_q)
    chunk, i_first, i_chunk_start, i_chunk_end = _chunking(i_len, min_chunk, max_splits, WINDOW)
    i_start = tl.maximum(i_split * chunk, i_first)
    i_end = tl.minimum((i_split + 1) * chunk, i_len)
    if i_start >= i_end:
        return

    SCALE_A_TOKEN: tl.constexpr = p_k_cache.dtype.element_ty == tl.int8
    p_table = p_tables + i_seq * stride_table
    b_q = tl.load(
        p_query + i_seq * stride_qt + o_head[:, None] * stride_qh + o_d[None, :], mask=m_q, other=0.0
    )
    b_q = b_q.to(COMPUTE)
    if (p_k_scale is not None) and (not SCALE_A_TOKEN):
        qk_scale *= tl.load(p_k_scale + i_kv)
    b_m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for i_n in range(i_start // BLOCK_N * BLOCK_N, i_end, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = (o_n >= i_start) & (o_n < i_end)
        b_block, b_offset = locate_rows(p_table, i_n, m_n, BLOCK_SIZE, BLOCK_N)
        b_k = load_rows(
            p_k_cache + i_kv * stride_h, b_block, b_offset, m_n, stride_n, stride_b, COMPUTE, D, BLOCK_D, True
        )
        b_v = load_rows(
            p_v_cache + i_kv * stride_h, b_block, b_offset, m_n, stride_n, stride_b, COMPUTE, D, BLOCK_D, True
        )
        b_k_scale = None
        b_v_scale = None
        if SCALE_A_TOKEN:
            o_scale = (b_block * BLOCK_SIZE + b_offset) * H_KV + i_kv
            b_k_scale = tl.load(p_k_scale + o_scale, mask=m_n, other=0.0)
            b_v_scale = tl.load(p_v_scale + o_scale, mask=m_n, other=0.0)
        b_m, b_l, b_acc = attend_tile(
            b_q, b_k, b_v, b_k_scale, b_v_scale, m_n[None, :], b_m, b_l, b_acc, qk_scale, SOFTCAP, True, False
        )
    if (p_v_scale is not None) and (not SCALE_A_TOKEN):
        b_acc *= tl.load(p_v_scale + i_kv)

    if i_chunk_end - i_chunk_start == 1:
        if p_sinks is not None:
            b_m, b_l, b_acc = resolve_sink(p_sinks, o_head, m_row, b_m, b_l, b_acc)
        tl.store(p_o, (b_acc / b_l[:, None]).to(p_out.dtype.element_ty), mask=m_q)
    elif p_partial is not None:
        o_part = (i_seq * (H_KV * GROUP) + o_head) * max_splits + i_split
        tl.store(p_partial + o_part[:, None] * D + o_d[None, :], b_acc / b_l[:, None], mask=m_q)
        tl.store(p_lse + o_part, b_m + tl.log2(b_l), mask=m_row)


@triton.jit(do_not_specialize=["min_chunk", "max_splits"])
def combine_splits_kernel(
    p_out,  # [S, H, D] contiguous
    p_partial,  # [S, H, max_splits, D] fp32
    p_lse,  # [S, H, max_splits] fp32
    p_seq_lens,  # [S] int32
    p_sinks,  # [H] or None
    min_chunk,
    max_splits,
    H: tl.constexpr,
    D: tl.constexpr,
    WINDOW: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (H, S): weighs the splits of one head by their sums. Sequences of one split are already written."""
    i_head = tl.program_id(0)
    i_seq = tl.program_id(1).to(tl.int64)
    i_len = tl.load(p_seq_lens + i_seq)
    _, _, i_chunk_start, i_chunk_end = _chunking(i_len, min_chunk, max_splits, WINDOW)
    if i_chunk_end - i_chunk_start <= 1:
        return
    o_row = i_seq * H + i_head
    o_d = tl.arange(0, BLOCK_D)
    # A column of ones keeps [1]-shaped state, which the sink's update shares with the attention kernels.
    b_m = tl.full([1], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([1], dtype=tl.float32)
    b_acc = tl.zeros([1, BLOCK_D], dtype=tl.float32)
    for i_s in range(i_chunk_start, i_chunk_end, BLOCK_S):
        o_s = i_s + tl.arange(0, BLOCK_S)
        m_s = o_s < i_chunk_end
        b_lse = tl.load(p_lse + o_row * max_splits + o_s, mask=m_s, other=float("-inf"))
        p_part = p_partial + (o_row * max_splits + o_s)[:, None] * D + o_d[None, :]
        b_part = tl.load(p_part, mask=m_s[:, None] & (o_d < D)[None, :], other=0.0)
        b_m_new = tl.maximum(b_m, tl.max(b_lse, axis=0))
        b_w = tl.exp2(b_lse - b_m_new)
        b_alpha = tl.exp2(b_m - b_m_new)
        b_l = b_l * b_alpha + tl.sum(b_w, axis=0)
        b_acc = b_acc * b_alpha[:, None] + tl.sum(b_w[:, None] * b_part, axis=0)[None, :]
        b_m = b_m_new
    if p_sinks is not None:
        o_one = i_head + tl.zeros([1], dtype=tl.int32)
        b_m, b_l, b_acc = resolve_sink(p_sinks, o_one, o_one >= 0, b_m, b_l, b_acc)
    p_o = p_out + o_row * D + o_d[None, :]
    tl.store(p_o, (b_acc / b_l[:, None]).to(p_out.dtype.element_ty), mask=(o_d < D)[None, :])


def paged_decode(
    output: Tensor,  # [S, H, D]
    query: Tensor,  # [S, H, D]
    k_cache: Tensor,  # [N, B, H_kv, D]
    v_cache: Tensor,  # [N, B, H_kv, D]
    metadata: PagedMetadata,
    *,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Attends the first S = `metadata.num_decodes` sequences' single new tokens; writes `output`.

    Rows with seq_len 0 (padding of a captured batch) become zero. `metadata.plan` may hold bounds made at capture:
    `max_splits`, how many splits a sequence may have, and `split_chunk`, the smallest number of tokens of one. Given
    both, results do not depend on the batch around a sequence. Trusts its arguments; see `triton_backend`.
    """
    num_seqs, heads, head_size = query.shape
    block_size, kv_heads = k_cache.shape[1:3]
    group = heads // kv_heads
    gpu = gpu_of("paged_decode", query.device)
    compute = compute_dtype(gpu, query.dtype, k_cache.dtype)
    tile = lookup("decode", gpu.arch, head_size, group=group, itemsize=compute.primitive_bitwidth // 8)
    programs = kv_heads * -(-group // tile.block_m)
    plan = metadata.plan
    capacity = metadata.block_tables.shape[1] * block_size
    splits = decode_splits(tile, num_seqs, programs, capacity, gpu.num_sms)
    max_splits = plan.get("max_splits", splits.max_splits)
    min_chunk = plan.get("split_chunk", splits.min_chunk)
    if max_splits < 1 or min_chunk % tile.block_n or min_chunk < 1:
        raise ValueError(
            f"paged_decode: plan with max_splits={max_splits}, split_chunk={min_chunk}; "
            f"must be at least 1 and a multiple of {tile.block_n}"
        )
    partial, lse = _workspace(plan, query, max_splits) if max_splits > 1 else (None, None)
    block_d = head_tile(head_size)
    window = sliding_window or 0
    launch(
        paged_decode_kernel,
        (programs, num_seqs, max_splits),
        query.device,
        *(output, partial, lse, query, k_cache, v_cache, metadata.block_tables, metadata.seq_lens),
        *(sinks, k_scales, v_scales, host_scale(scale, softcap)),
        *(*query.stride()[:2], *k_cache.stride()[:3], metadata.block_tables.stride(0), min_chunk, max_splits),
        H_KV=kv_heads,
        GROUP=group,
        D=head_size,
        BLOCK_SIZE=block_size,
        WINDOW=window,
        SOFTCAP=softcap or 0.0,
        COMPUTE=compute,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=block_d,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if max_splits > 1:
        launch(
            combine_splits_kernel,
            (heads, num_seqs),
            query.device,
            *(output, partial, lse, metadata.seq_lens, sinks, min_chunk, max_splits),
            H=heads,
            D=head_size,
            WINDOW=window,
            BLOCK_S=_COMBINE_SPLITS,
            BLOCK_D=block_d,
            num_warps=4,
            num_stages=1,
        )


def _workspace(plan: dict, query: Tensor, max_splits: int) -> tuple[Tensor, Tensor]:
    """Partial outputs and their weights, one pair for all layers of like shape on one device; never initialised."""
    num_seqs, heads, head_size = query.shape
    key = f"triton.decode {query.device} {num_seqs} {heads} {head_size} {max_splits}"
    if key not in plan:
        partial = torch.empty(
            num_seqs, heads, max_splits, head_size, dtype=torch.float32, device=query.device
        )
        lse = torch.empty(num_seqs, heads, max_splits, dtype=torch.float32, device=query.device)
        plan[key] = (partial, lse)
    return plan[key]
