"""One layer's tensors of a step, over blocks in random order."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.shapes import Heads
from hf_paged.kernels import triton_backend
from hf_paged.kernels.metadata import PagedMetadata

BLOCK_SIZE = 16


@dataclass
class Inputs:
    """Attention over keys that are stored already, as it is timed."""

    query: Tensor  # [T, H, D]
    k_cache: Tensor  # [N, B, H_kv, D]
    v_cache: Tensor
    metadata: PagedMetadata
    kv_bytes: int  # of the keys and values that are seen

    @property
    def run(self) -> Callable[[], Any]:
        scale = self.query.shape[-1] ** -0.5
        caches = self.k_cache, self.v_cache
        return functools.partial(triton_backend.attend, self.query, *caches, self.metadata, scale=scale)


def decode_inputs(shape: Heads, lengths: list[int], device: torch.device, dtype: torch.dtype) -> Inputs:
    """One new token for each of sequences of these lengths."""
    return _inputs(shape, [1] * len(lengths), lengths, len(lengths), device, dtype)


def prefill_inputs(
    shape: Heads, rows: int, new: int, context: int, device: torch.device, dtype: torch.dtype
) -> Inputs:
    """`new` tokens after `context` others, in each of `rows` sequences."""
    return _inputs(shape, [new] * rows, [context + new] * rows, 0, device, dtype)


def _inputs(
    shape: Heads, new: list[int], lengths: list[int], decodes: int, device: torch.device, dtype: torch.dtype
) -> Inputs:
    blocks = [-(-length // BLOCK_SIZE) for length in lengths]
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(sum(blocks), generator=generator).to(torch.int32)
    tables = torch.zeros(len(lengths), max(blocks), dtype=torch.int32)
    for row, own in enumerate(order.split(blocks)):
        tables[row, : len(own)] = own
    cache_shape = (sum(blocks), BLOCK_SIZE, shape.kv_heads, shape.head_size)
    k_cache, v_cache = (torch.empty(cache_shape, dtype=dtype, device=device).normal_() for _ in range(2))
    metadata = PagedMetadata(
        slot_mapping=torch.full((sum(new),), -1, device=device),
        block_tables=tables.to(device),
        seq_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        query_start_loc=torch.tensor([0, *new], device=device).cumsum(0).int(),
        num_decodes=decodes,
        query_lens_list=new,
        seq_lens_list=lengths,
    )
    query = torch.randn(sum(new), shape.heads, shape.head_size, dtype=dtype, device=device)
    token_bytes = 2 * shape.kv_heads * shape.head_size * dtype.itemsize
    return Inputs(query, k_cache, v_cache, metadata, token_bytes * sum(lengths))
