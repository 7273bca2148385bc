"""The Triton backend: the three ops of `hf_paged.kernels.ops` on CUDA and ROCm, each a few launches.

Decode rows and rows of longer runs go to separate launches, so that what a decode computes does not depend on what
else is in the step. Besides the ops' own arguments these functions take the scales of a quantised cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hf_paged.kernels.metadata import PagedMetadata
from hf_paged.kernels.triton_checks import check_cache, check_dtype, check_tensors
from hf_paged.kernels.triton_copy_blocks import copy_blocks
from hf_paged.kernels.triton_paged_decode import paged_decode
from hf_paged.kernels.triton_paged_prefill import paged_prefill
from hf_paged.kernels.triton_store_kv import store_kv
from hf_paged.kernels.triton_store_kv_rope import store_kv_rope

__all__ = [
    "attend",
    "copy_blocks",
    "paged_attention",
    "rotary_paged_attention",
    "store_kv",
    "store_kv_rope",
]


def paged_attention(
    query: Tensor,  # [T, H, D]
    key: Tensor,  # [T, H_kv, D]
    value: Tensor,  # [T, H_kv, D]
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
) -> Tensor:
    """See `hf_paged.kernels.ops.paged_attention`; `k_scales` and `v_scales` as in `store_kv`.

    Raises:
        ValueError: an unsupported dtype, head size, layout, GPU or mix of devices.
    """
    store_kv(key, value, k_cache, v_cache, metadata.slot_mapping, k_scales=k_scales, v_scales=v_scales)
    return attend(
        query,
        k_cache,
        v_cache,
        metadata,
        scale=scale,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=sinks,
        k_scales=k_scales,
        v_scales=v_scales,
    )


def rotary_paged_attention(
    query: Tensor,  # [T, H, D]
    key: Tensor,  # [T, H_kv, D]
    value: Tensor,  # [T, H_kv, D]
    cos: Tensor,  # [T, R]
    sin: Tensor,  # [T, R]
    k_cache: Tensor,  # [N, B, H_kv, D]
    v_cache: Tensor,  # [N, B, H_kv, D]
    metadata: PagedMetadata,
    *,
    scale: float,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """See `hf_paged.kernels.ops.rotary_paged_attention`: rotation and store are one launch.

    Raises:
        ValueError: as `paged_attention`.
    """
    slots, scales = metadata.slot_mapping, {"k_scales": k_scales, "v_scales": v_scales}
    rotated = store_kv_rope(query, key, value, cos, sin, k_cache, v_cache, slots, **scales)
    return attend(rotated, k_cache, v_cache, metadata, scale=scale, **scales)


def attend(
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
) -> Tensor:
    """`paged_attention` for keys and values that are already in their slots (after `store_kv_rope`, say).

    Raises:
        ValueError: as `paged_attention`.
    """
    _check(query, k_cache, v_cache, metadata, sinks, k_scales, v_scales)
    options: dict[str, Any] = {
        "scale": scale,
        "sliding_window": sliding_window,
        "softcap": softcap,
        "sinks": sinks,
        "k_scales": k_scales,
        "v_scales": v_scales,
    }
    make = torch.empty if _covers_all_tokens(metadata, query.shape[0]) else torch.zeros
    output = make(query.shape, dtype=query.dtype, device=query.device)
    decodes = metadata.num_decodes
    if decodes:
        paged_decode(output, query[:decodes], k_cache, v_cache, metadata, **options)
    if decodes < metadata.num_seqs:
        paged_prefill(output, query, k_cache, v_cache, metadata, **options)
    return output


def _check(
    query: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    metadata: PagedMetadata,
    sinks: Tensor | None,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
) -> None:
    op = "paged_attention"
    check_cache(op, k_cache, v_cache, k_scales, v_scales)
    tables, lengths, starts = metadata.block_tables, metadata.seq_lens, metadata.query_start_loc
    check_tensors(
        op, k_cache.device, query=query, sinks=sinks, block_tables=tables, seq_lens=lengths, starts=starts
    )
    check_dtype(op, "query", query)
    heads, head_size = query.shape[1:]
    kv_heads = k_cache.shape[2]
    if head_size != k_cache.shape[3] or heads % kv_heads:
        raise ValueError(
            f"{op}: query of {heads} heads of size {head_size} over a cache of {kv_heads} heads of size "
            f"{k_cache.shape[3]}; sizes must be equal and the heads a multiple"
        )


def _covers_all_tokens(metadata: PagedMetadata, num_tokens: int) -> bool:
    """Whether the launches write every row; decode writes its padding too. Found once a step."""
    key = "triton.covers_all_tokens"
    if key not in metadata.plan:
        decodes = metadata.num_decodes
        new = metadata.query_lens_list[decodes:]
        metadata.plan[key] = decodes + sum(new) == num_tokens and 0 not in metadata.seq_lens_list[decodes:]
    return metadata.plan[key]
