"""The specification: paged attention in plain torch, one sequence at a time, on any device.

Scores and sums are in float32, or in float64 when the query or the cache is: other backends are held against that.
Nothing here is clever; where another backend disagrees with this file, this file is right.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_paged.kernels.metadata import PagedMetadata
from hf_paged.kernels.quantised import dequantise, quantise

__all__ = ["copy_blocks", "paged_attention", "rotary_paged_attention", "rotate", "store_kv"]


def store_kv(
    key: Tensor,  # [T, H_kv, D]
    value: Tensor,  # [T, H_kv, D]
    k_cache: Tensor,  # [N, B, H_kv, D]
    v_cache: Tensor,  # [N, B, H_kv, D]
    slot_mapping: Tensor,  # [T] int64
    *,
    k_scales: Tensor | None = None,  # [N, B, H_kv]
    v_scales: Tensor | None = None,
) -> None:
    """See `hf_paged.kernels.ops.store_kv`."""
    stored = slot_mapping >= 0
    slots = slot_mapping[stored]
    for new, cache, scales in ((key, k_cache, k_scales), (value, v_cache, v_scales)):
        if scales is None:
            cache.flatten(0, 1)[slots] = new[stored].to(cache.dtype)
        else:
            cache.flatten(0, 1)[slots], scales.flatten(0, 1)[slots] = quantise(new[stored])


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
    sinks: Tensor | None = None,  # [H]
    k_scales: Tensor | None = None,  # [N, B, H_kv]
    v_scales: Tensor | None = None,
) -> Tensor:
    """See `hf_paged.kernels.ops.paged_attention`."""
    store_kv(key, value, k_cache, v_cache, metadata.slot_mapping, k_scales=k_scales, v_scales=v_scales)
    output = torch.zeros(query.shape, dtype=query.dtype, device=query.device)
    start = 0
    lengths = zip(metadata.query_lens_list, metadata.seq_lens_list, strict=True)
    for index, (query_len, seq_len) in enumerate(lengths):
        new = slice(start, start + query_len)
        start += query_len
        if query_len == 0 or seq_len == 0:
            continue
        table = metadata.block_tables[index]
        keys, values = gather_sequence(k_cache, v_cache, table, seq_len, k_scales, v_scales)
        positions = torch.arange(seq_len - query_len, seq_len, device=query.device)
        visible = visible_keys(positions, seq_len, sliding_window)
        output[new] = attend(query[new], keys, values, visible, scale, softcap, sinks).to(query.dtype)
    return output


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
    k_scales: Tensor | None = None,  # [N, B, H_kv]
    v_scales: Tensor | None = None,
) -> Tensor:
    """See `hf_paged.kernels.ops.rotary_paged_attention`."""
    query, key = rotate(query, cos, sin), rotate(key, cos, sin)
    return paged_attention(
        query, key, value, k_cache, v_cache, metadata, scale=scale, k_scales=k_scales, v_scales=v_scales
    )


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, D] with its first R elements turned by the angles of cos and sin [T, R]; in the dtype of x."""
    turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    partner = torch.cat((-second, first), dim=-1)
    return torch.cat((turned * cos[:, None] + partner * sin[:, None], rest), dim=-1).to(x.dtype)


def copy_blocks(
    k_cache: Tensor,  # [N, B, H_kv, D]
    v_cache: Tensor,  # [N, B, H_kv, D]
    src: Tensor,  # [n] int64
    dst: Tensor,  # [n] int64
    *,
    k_scales: Tensor | None = None,  # [N, B, H_kv]
    v_scales: Tensor | None = None,
) -> None:
    """See `hf_paged.kernels.ops.copy_blocks`."""
    for blocks in (k_cache, v_cache, k_scales, v_scales):
        if blocks is not None:
            blocks.index_copy_(0, dst, blocks.index_select(0, src))


def gather_sequence(
    k_cache: Tensor,  # [N, B, H_kv, D]
    v_cache: Tensor,  # [N, B, H_kv, D]
    block_table: Tensor,  # [M]
    seq_len: int,
    k_scales: Tensor | None = None,  # [N, B, H_kv]
    v_scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # [seq_len, H_kv, D] each
    """Keys and values of positions 0..seq_len - 1 of a sequence: in the cache's dtype, of an int8 one in float32."""
    used = block_table[: -(-seq_len // k_cache.shape[1])]

    def gather(cache: Tensor, scales: Tensor | None) -> Tensor:
        numbers = cache.index_select(0, used).flatten(0, 1)[:seq_len]
        if scales is None:
            return numbers
        return dequantise(numbers, scales.index_select(0, used).flatten(0, 1)[:seq_len])

    return gather(k_cache, k_scales), gather(v_cache, v_scales)


def visible_keys(positions: Tensor, num_keys: int, sliding_window: int | None) -> Tensor:
    """[q, num_keys] bool: which keys a query at absolute position `positions[i]` sees."""
    distance = positions[:, None] - torch.arange(num_keys, device=positions.device)
    visible = distance >= 0
    return visible if sliding_window is None else visible & (distance < sliding_window)


def attend(
    query: Tensor,  # [q, H, D]
    keys: Tensor,  # [n, H_kv, D]
    values: Tensor,  # [n, H_kv, D]
    visible: Tensor,  # [q, n] bool
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,  # [H]
) -> Tensor:
    """[q, H, D] softmax attention in float32, or in float64 if the query or the keys are."""
    wide = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), torch.float32)
    group = query.shape[1] // keys.shape[1]
    keys = keys.to(wide).repeat_interleave(group, dim=1)
    values = values.to(wide).repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,nhd->hqn", query.to(wide), keys) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible, float("-inf"))
    if sinks is not None:
        sink_column = sinks.to(wide)[:, None, None].expand(-1, scores.shape[1], 1)
        scores = torch.cat([scores, sink_column], dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : keys.shape[0]]
    return torch.einsum("hqn,nhd->qhd", weights, values)
