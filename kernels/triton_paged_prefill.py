"""Attention of ragged runs of new tokens (prompts, chunks of prompts, several tokens to verify) over their blocks.

Keys are read from the cache, where this step's are already: a prompt in one piece and the same prompt in chunks, with
a cached prefix or without, do the same sums. One program holds BLOCK_Q consecutive tokens of one sequence times PACK
query heads of one KV head as its rows, so that short chunks of grouped heads fill the tile too.

The work list, one entry a program column, is made on the host from the lengths it knows and sent once a step; the
longest runs of keys start first. These launches are never captured.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_paged.kernels.metadata import PagedMetadata
from hf_paged.kernels.tiles import head_tile, lookup
from hf_paged.kernels.triton_attention import attend_tile, host_scale, load_rows, locate_rows, resolve_sink
from hf_paged.kernels.triton_launch import compute_dtype, gpu_of, launch

__all__ = ["paged_prefill"]

#: More heads than this in one tile gain nothing: keys are then read from L2 anyway.
_MAX_PACK = 16


@triton.jit
def _attend_range(
    b_q,
    b_m,
    b_l,
    b_acc,
    o_pos,  # [BLOCK_M] absolute positions of the rows
    i_from,  # a multiple of BLOCK_N
    i_to,
    i_first,  # keys before this are seen by no row
    p_table,
    p_k_cache,  # advanced to the KV head
    p_v_cache,
    p_k_scale,  # advanced to the KV head, or None
    p_v_scale,
    qk_scale,
    stride_n,
    stride_b,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    COMPUTE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,  # False: every row sees every key of the range
):
    for i_n in range(i_from, i_to, BLOCK_N):
        o_n = i_n + tl.arange(0, BLOCK_N)
        m_n = (o_n >= i_first) & (o_n < i_to)
        b_block, b_offset = locate_rows(p_table, i_n, m_n, BLOCK_SIZE, BLOCK_N)
        b_k = load_rows(p_k_cache, b_block, b_offset, m_n, stride_n, stride_b, COMPUTE, D, BLOCK_D, MASKED)
        b_v = load_rows(p_v_cache, b_block, b_offset, m_n, stride_n, stride_b, COMPUTE, D, BLOCK_D, MASKED)
        b_k_scale = None
        b_v_scale = None
        if p_k_cache.dtype.element_ty == tl.int8:
            o_scale = (b_block * BLOCK_SIZE + b_offset) * H_KV
            b_k_scale = tl.load(p_k_scale + o_scale, mask=m_n, other=0.0)
            b_v_scale = tl.load(p_v_scale + o_scale, mask=m_n, other=0.0)
        m_visible = o_n[None, :] <= o_pos[:, None]
        if WINDOW > 0:
            m_visible = m_visible & (o_pos[:, None] - o_n[None, :] < WINDOW)
        b_m, b_l, b_acc = attend_tile(
            b_q,
            b_k,
            b_v,
            b_k_scale,
            b_v_scale,
            m_visible,
            b_m,
            b_l,
            b_acc,
            qk_scale,
            SOFTCAP,
            MASKED,
            WINDOW > 0,
        )
    return b_m, b_l, b_acc


@triton.jit(do_not_specialize=["stride_table"])
def paged_prefill_kernel(
    p_out,  # [T, H, D] contiguous
    p_query,  # [T, H, D]
    p_k_cache,  # [N, B, H_KV, D]
    p_v_cache,  # [N, B, H_KV, D]
    p_tables,  # [S, M] int32
    p_seq_lens,  # [S] int32
    p_query_start,  # [S + 1] int32
    p_work,  # [tiles, 2] int32: sequence, first of its new tokens
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
    H: tl.constexpr,
    H_KV: tl.constexpr,
    D: tl.constexpr,
    PACK: tl.constexpr,  # query heads a program; divides H / H_KV
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,  # 0 for none
    SOFTCAP: tl.constexpr,  # 0 for none
    COMPUTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Grid (H / PACK, tiles)."""
    BLOCK_Q: tl.constexpr = BLOCK_M // PACK
    i_work = tl.program_id(1)
    i_seq = tl.load(p_work + i_work * 2).to(tl.int64)
    i_q0 = tl.load(p_work + i_work * 2 + 1)
    i_kv = tl.program_id(0) * PACK // (H // H_KV)
    i_row0 = tl.load(p_query_start + i_seq)
    i_queries = tl.load(p_query_start + i_seq + 1) - i_row0
    i_context = tl.load(p_seq_lens + i_seq) - i_queries

    o_m = tl.arange(0, BLOCK_M)
    o_q = i_q0 + o_m // PACK
    o_head = tl.program_id(0) * PACK + o_m % PACK
    m_row = (o_q < i_queries) & (o_m < BLOCK_Q * PACK)
    o_d = tl.arange(0, BLOCK_D)
    m_q = m_row[:, None] & (o_d < D)[None, :]
    o_t = (i_row0 + o_q).to(tl.int64)
    p_q = p_query + o_t[:, None] * stride_qt + o_head[:, None] * stride_qh + o_d[None, :]
    b_q = tl.load(p_q, mask=m_q, other=0.0).to(COMPUTE)
    o_pos = i_context + o_q

    i_end = i_context + tl.minimum(i_q0 + BLOCK_Q, i_queries)
    i_first = 0
    # Tiles of keys that the first row sees whole are seen whole by all rows.
    i_masked = (i_context + i_q0 + 1) // BLOCK_N * BLOCK_N
    if WINDOW > 0:
        i_first = tl.maximum(i_context + i_q0 - WINDOW + 1, 0)
        i_masked = i_first // BLOCK_N * BLOCK_N
    SCALE_A_TOKEN: tl.constexpr = p_k_cache.dtype.element_ty == tl.int8
    if p_k_scale is not None:
        p_k_scale += i_kv
        p_v_scale += i_kv
        if not SCALE_A_TOKEN:
            qk_scale *= tl.load(p_k_scale)
    p_table = p_tables + i_seq * stride_table
    p_k = p_k_cache + i_kv * stride_h
    p_v = p_v_cache + i_kv * stride_h
    b_m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    b_l = tl.zeros([BLOCK_M], dtype=tl.float32)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    if WINDOW == 0:
        b_m, b_l, b_acc = _attend_range(
            *(b_q, b_m, b_l, b_acc, o_pos, 0, i_masked, 0, p_table, p_k, p_v, p_k_scale, p_v_scale, qk_scale),
            *(stride_n, stride_b, H_KV, D, BLOCK_SIZE, WINDOW, SOFTCAP, COMPUTE, BLOCK_N, BLOCK_D, False),
        )
    b_m, b_l, b_acc = _attend_range(
        *(
            b_q,
            b_m,
            b_l,
            b_acc,
            o_pos,
            i_masked,
            i_end,
            i_first,
            p_table,
            p_k,
            p_v,
            p_k_scale,
            p_v_scale,
            qk_scale,
        ),
        *(stride_n, stride_b, H_KV, D, BLOCK_SIZE, WINDOW, SOFTCAP, COMPUTE, BLOCK_N, BLOCK_D, True),
    )
    if (p_v_scale is not None) and (not SCALE_A_TOKEN):
        b_acc *= tl.load(p_v_scale)
    if p_sinks is not None:
        b_m, b_l, b_acc = resolve_sink(p_sinks, o_head, m_row, b_m, b_l, b_acc)
    p_o = p_out + (o_t * H + o_head)[:, None] * D + o_d[None, :]
    tl.store(p_o, (b_acc / b_l[:, None]).to(p_out.dtype.element_ty), mask=m_q)


def paged_prefill(
    output: Tensor,  # [T, H, D]
    query: Tensor,  # [T, H, D]
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
    """Attends the new tokens of the sequences after `metadata.num_decodes`; writes their rows of `output` only.

    T counts all tokens of the step, decodes included. Trusts its arguments; see `triton_backend`.
    """
    heads, head_size = query.shape[1:]
    block_size, kv_heads = k_cache.shape[1:3]
    group = heads // kv_heads
    gpu = gpu_of("paged_prefill", query.device)
    compute = compute_dtype(gpu, query.dtype, k_cache.dtype)
    itemsizes = {"itemsize": compute.primitive_bitwidth // 8, "cache_itemsize": k_cache.element_size()}
    tile = lookup("prefill", gpu.arch, head_size, **itemsizes)
    pack = max(size for size in range(1, min(_MAX_PACK, group, tile.block_m) + 1) if group % size == 0)
    work = _work_list(metadata, tile.block_m // pack, query.device)
    launch(
        paged_prefill_kernel,
        (heads // pack, work.shape[0]),
        query.device,
        *(
            output,
            query,
            k_cache,
            v_cache,
            metadata.block_tables,
            metadata.seq_lens,
            metadata.query_start_loc,
        ),
        *(work, sinks, k_scales, v_scales, host_scale(scale, softcap)),
        *(*query.stride()[:2], *k_cache.stride()[:3], metadata.block_tables.stride(0)),
        H=heads,
        H_KV=kv_heads,
        D=head_size,
        PACK=pack,
        BLOCK_SIZE=block_size,
        WINDOW=sliding_window or 0,
        SOFTCAP=softcap or 0.0,
        COMPUTE=compute,
        BLOCK_M=tile.block_m,
        BLOCK_N=tile.block_n,
        BLOCK_D=head_tile(head_size),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _work_list(metadata: PagedMetadata, block_q: int, device: torch.device) -> Tensor:
    """[tiles, 2] int32 on `device`: (sequence, its first new token) of each tile, most keys first; once a step."""
    key = f"triton.prefill {device} {block_q}"
    if key not in metadata.plan:
        tiles = []
        for index in range(metadata.num_decodes, metadata.num_seqs):
            query_len, seq_len = metadata.query_lens_list[index], metadata.seq_lens_list[index]
            context = seq_len - query_len
            if seq_len == 0:
                continue
            tiles += [
                (-min(context + start + block_q, seq_len), index, start)
                for start in range(0, query_len, block_q)
            ]
        tiles.sort()
        work = torch.tensor([tile[1:] for tile in tiles], dtype=torch.int32).reshape(-1, 2)
        if device.type == "cuda":
            work = work.pin_memory()
        metadata.plan[key] = work.to(device, non_blocking=True)
    return metadata.plan[key]
