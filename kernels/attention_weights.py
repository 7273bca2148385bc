"""What queries attend to, for callers who want to see it: by the reference path, on any device."""

from __future__ import annotations

import torch
from torch import Tensor

from hf_paged.kernels.metadata import PagedMetadata
from hf_paged.kernels.reference import gather_sequence, visible_keys

__all__ = ["attention_weights"]


def attention_weights(
    query: Tensor,  # [T, H, D]
    k_cache: Tensor,  # [N, B, H_kv, D]
    metadata: PagedMetadata,
    index: int,
    last: int,
    *,
    scale: float,
    k_scales: Tensor | None = None,  # [N, B, H_kv]
) -> Tensor:
    """The softmax of the last `last` queries of sequence `index`: [H, last, tokens of the sequence], in their dtype.

    Sums are in float32, or in float64 when the query or the cache is. The keys of the step are in the cache already.
    """
    end, seq_len = sum(metadata.query_lens_list[: index + 1]), metadata.seq_lens_list[index]
    table = metadata.block_tables[index]
    keys, _ = gather_sequence(k_cache, k_cache, table, seq_len, k_scales, k_scales)
    wide = torch.promote_types(torch.promote_types(query.dtype, keys.dtype), torch.float32)
    keys = keys.to(wide).repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    scores = torch.einsum("qhd,nhd->hqn", query[end - last : end].to(wide), keys) * scale
    visible = visible_keys(torch.arange(seq_len - last, seq_len, device=query.device), seq_len, None)
    return torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=-1).to(query.dtype)
