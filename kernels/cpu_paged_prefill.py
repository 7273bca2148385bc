"""Attention of long queries on a CPU: torch's SDPA over whole sequences.

A sequence without cached tokens attends to the fresh keys of this step; neighbours of equal length share one call. A
sequence with cached tokens has its blocks gathered first and takes an explicit mask, since SDPA's own causal mask is
aligned to the first key and not to the last. Query heads of one KV head lie along the head axis and their keys are
expanded without a copy: SDPA's `enable_gqa` would repeat them in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hf_paged.kernels.quantised import quantised
from hf_paged.kernels.reference import gather_sequence, visible_keys

__all__ = ["LongQueries", "attend_long_queries", "group_long_queries"]


class LongQueries(NamedTuple):
    """`count` neighbouring sequences with equally long queries; more than one only if nothing of them is cached."""

    first_sequence: int
    first_token: int
    count: int
    query_len: int
    seq_len: int


def group_long_queries(
    query_lens: Sequence[int], seq_lens: Sequence[int], is_long: Sequence[bool]
) -> list[LongQueries]:
    """Groups the sequences for which `is_long`, in order. Sequences with no new token are left out."""
    groups: list[LongQueries] = []
    token = 0
    for index, (query_len, seq_len, wanted) in enumerate(zip(query_lens, seq_lens, is_long, strict=True)):
        if wanted and query_len > 0:
            last = groups[-1] if groups else None
            fresh = query_len == seq_len
            joins = last is not None and fresh and last.query_len == last.seq_len == seq_len
            if joins and last.first_sequence + last.count == index:
                groups[-1] = last._replace(count=last.count + 1)
            else:
                groups.append(LongQueries(index, token, 1, query_len, seq_len))
        token += query_len
    return groups


def attend_long_queries(
    query: Tensor,  # [T, H, D]
    key: Tensor,  # [T, H_kv, D]
    value: Tensor,  # [T, H_kv, D]
    k_cache: Tensor,  # [N, B, H_kv, D], which holds key and value already
    v_cache: Tensor,
    block_tables: Tensor,  # [S, M] int32
    groups: Sequence[LongQueries],
    output: Tensor,  # [T, H, D], of which these sequences' rows are written
    masks: dict[Any, Tensor],
    scale: float,
    sliding_window: int | None,
    k_scales: Tensor | None = None,  # [N, B, H_kv]
    v_scales: Tensor | None = None,
) -> None:
    """Attends the sequences of `groups`. `masks` keeps masks for the step's other layers."""
    for group in groups:
        stop = group.first_token + group.count * group.query_len
        new = slice(group.first_token, stop)
        if group.seq_len == group.query_len:
            # Another cache dtype rounds what later steps read: this step must see the same numbers.
            keys, values = (quantised(x[new], k_cache.dtype).to(query.dtype) for x in (key, value))
        else:
            table = block_tables[group.first_sequence]
            keys, values = gather_sequence(k_cache, v_cache, table, group.seq_len, k_scales, v_scales)
            keys, values = keys.to(query.dtype), values.to(query.dtype)
        mask = _mask(group, query, masks, sliding_window)
        output[new] = _sdpa(query[new], keys, values, group.count, mask, group.query_len > 1, scale)


def _mask(group: LongQueries, query: Tensor, masks: dict[Any, Tensor], window: int | None) -> Tensor | None:
    """[q, n] added to the scores; None if plain causal order, or the sight of all keys, says the same."""
    windowed = window is not None and window < group.seq_len
    if not windowed and (group.seq_len == group.query_len or group.query_len == 1):
        return None
    name = (group.query_len, group.seq_len, window if windowed else None, query.dtype)
    if name not in masks:
        positions = torch.arange(group.seq_len - group.query_len, group.seq_len, device=query.device)
        visible = visible_keys(positions, group.seq_len, window)
        mask = torch.zeros(visible.shape, dtype=query.dtype, device=query.device)
        masks[name] = mask.masked_fill_(~visible, float("-inf"))
    return masks[name]


def _sdpa(
    query: Tensor,  # [count * q, H, D]
    keys: Tensor,  # [count * n, H_kv, D]
    values: Tensor,
    count: int,
    mask: Tensor | None,
    several: bool,
    scale: float,
) -> Tensor:  # [count * q, H, D]
    heads, kv_heads, head_size = query.shape[1], *keys.shape[1:]
    group = heads // kv_heads
    causal = mask is None and several
    k, v = (x.view(count, -1, kv_heads, head_size).transpose(1, 2) for x in (keys, values))
    if group == 1:
        q = query.view(count, -1, heads, head_size).transpose(1, 2)
        attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
        return attended.transpose(1, 2).reshape(query.shape)
    # [count * H_kv, group, tokens, D]: SDPA's head axis is the group, along which keys are expanded.
    q = query.view(count, -1, kv_heads, group, head_size).permute(0, 2, 3, 1, 4).flatten(0, 1)
    k, v = (x.flatten(0, 1).unsqueeze(1).expand(-1, group, -1, -1) for x in (k, v))
    attended = scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    return attended.unflatten(0, (count, kv_heads)).permute(0, 3, 1, 2, 4).reshape(query.shape)
