"""The CPU backend: which path each op takes.

    a few new tokens a sequence           numba rows over the blocks (`cpu_paged_decode`), each token a row of its own
    longer queries                        torch's SDPA, a sequence at a time (`cpu_paged_prefill`)
    longer queries, softcap or sinks      the reference
    no numba, float16 without f16c        as longer queries
    kernels still loading                 as longer queries
    deterministic, queries of any length  numba rows, none of them cut between threads
    float64                               the reference (`ops` refuses it for this backend)

Decode rows store their new keys and values in the launch that attends to them; all other tokens are stored before.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_paged.kernels import reference
from hf_paged.kernels.cpu_argmax import argmax_rows
from hf_paged.kernels.cpu_linear import load_products
from hf_paged.kernels.cpu_norm import rms_norm
from hf_paged.kernels.cpu_paged_prefill import attend_long_queries
from hf_paged.kernels.cpu_rope import rotate
from hf_paged.kernels.cpu_runtime import (
    float_bits,
    kernel_module,
    launch,
    load_in_background,
    loaded_kernels,
    num_bins,
)
from hf_paged.kernels.cpu_step import CpuStep
from hf_paged.kernels.cpu_uniform import negated_in_float32, uniform_rows
from hf_paged.kernels.metadata import PagedMetadata
from hf_paged.kernels.reference import copy_blocks

__all__ = ["copy_blocks", "load_kernels", "paged_attention", "store_kv"]


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
    kernels = loaded_kernels("cpu_store_kv", k_cache.dtype)
    if kernels is None:
        reference.store_kv(key, value, k_cache, v_cache, slot_mapping, k_scales=k_scales, v_scales=v_scales)
        return
    dtype = _stored_dtype(k_cache)
    key, value, slots = key.to(dtype), value.to(dtype), slot_mapping.contiguous()
    bins = num_bins(4 * key.numel() * key.element_size())
    arguments = (
        *_address(key), *_address(value), k_cache.data_ptr(), v_cache.data_ptr(), k_cache.shape[2], k_cache.shape[3],
        slots.data_ptr(), key.shape[0], _pointer(k_scales), _pointer(v_scales),
    )  # fmt: skip
    launch(kernels.store_rows(k_cache.dtype), bins, arguments)


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
    has_kernels = loaded_kernels("cpu_paged_decode", k_cache.dtype) is not None
    name = "cpu" if has_kernels else "cpu.sdpa"
    step = metadata.plan.get(name)
    if step is None:
        if metadata.deterministic and not has_kernels:
            raise ValueError(f"deterministic attention needs the numba kernels for {k_cache.dtype}")
        step = metadata.plan[name] = CpuStep.of(metadata, has_kernels=has_kernels)
    if step.groups and (softcap is not None or sinks is not None):
        return reference.paged_attention(
            query, key, value, k_cache, v_cache, metadata,
            scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks,
            k_scales=k_scales, v_scales=v_scales,
        )  # fmt: skip
    if step.stored_from < key.shape[0]:
        stored = slice(step.stored_from, None)
        slots = metadata.slot_mapping[stored]
        store_kv(key[stored], value[stored], k_cache, v_cache, slots, k_scales=k_scales, v_scales=v_scales)
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    if step.has_stray_tokens:
        output.zero_()
    if step.num_rows:
        _attend_rows(
            step, query, key, value, k_cache, v_cache, k_scales, v_scales, output, scale, sliding_window, softcap,
            sinks,
        )  # fmt: skip
    if step.groups:
        attend_long_queries(
            query, key, value, k_cache, v_cache, metadata.block_tables, step.groups, output, step.masks, scale,
            sliding_window, k_scales, v_scales,
        )  # fmt: skip
    return output


def _attend_rows(
    step: CpuStep,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    output: Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    kernels = kernel_module("cpu_paged_decode")
    assert kernels is not None, "rows are only planned where there are kernels"
    dtype = _stored_dtype(k_cache)
    wide_query, wide_output = query, output
    if query.dtype != dtype:
        # The kernels know queries of the cache's dtype and of float32.
        wide_query, wide_output = query.float(), torch.empty_like(output, dtype=torch.float32)
    new_kv = (0, 0, 0, 0, 0, 0)
    if step.stored_from:
        key, value = key.to(dtype), value.to(dtype)
        new_kv = (*_address(key), *_address(value))
    _, block_size, kv_heads, head_size = k_cache.shape
    heads, window = query.shape[1], sliding_window or 0
    bins = num_bins(2 * step.num_keys * kv_heads * head_size * k_cache.element_size())
    cuts = bins > 1 and not step.whole_rows
    states, owners = step.cut_rows(bins, heads * (head_size + 2)) if cuts else (0, 0)
    starts = step.row_starts(window, kernels.TILE)
    if sinks is not None:
        sinks = sinks.float().contiguous()
    arguments = (
        *_address(wide_query), *new_kv, wide_output.data_ptr(), k_cache.data_ptr(), v_cache.data_ptr(),
        block_size, kv_heads, heads // kv_heads, head_size,
        step.rows_address, step.num_rows, starts, step.tables_address, step.block_tables.shape[1],
        step.slots_address, window, states, owners, _pointer(sinks),
        float_bits(scale), float_bits(softcap or 0.0), bins,
        step.scratch(bins, kernels.scratch_size(heads, head_size)), _pointer(k_scales), _pointer(v_scales),
    )  # fmt: skip
    attend = kernels.attend_whole_rows if step.whole_rows else kernels.attend_bin
    launch(attend(wide_query.dtype, k_cache.dtype), bins, arguments)
    if cuts:
        launch(kernels.finish_cut_rows(wide_query.dtype), 1, arguments)
    if wide_output is not output:
        rows = torch.from_numpy(step.rows[:, 0].astype(np.int64))
        output[rows] = wide_output[rows].to(output.dtype)


def _stored_dtype(cache: Tensor) -> torch.dtype:
    """In which dtype the kernels take new keys and values for a cache, and queries."""
    return torch.float32 if cache.dtype == torch.int8 else cache.dtype


def _pointer(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _address(tensor: Tensor) -> tuple[int, int, int]:
    """Address, stride between tokens and stride between heads of [T, heads, D]."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def load_kernels(dtype: torch.dtype) -> None:
    """Starts loading the kernels for caches of `dtype` in the background, and for what else is in a float `dtype`:
    activations, logits. Once a process."""
    load_in_background(dtype, functools.partial(_warm_up, dtype))


def _warm_up(dtype: torch.dtype) -> None:
    # One tiny launch of each kernel: what numba compiles depends on types only.
    with torch.inference_mode(False), torch.no_grad():
        is_float = dtype.is_floating_point
        new = torch.zeros(2, 1, 8, dtype=dtype if is_float else torch.float32)
        caches = (torch.zeros(2, 4, 1, 8, dtype=dtype), torch.zeros(2, 4, 1, 8, dtype=dtype))
        scale = torch.zeros(2, 4, 1, dtype=torch.float32)
        scales: Any = {} if is_float else {"k_scales": scale, "v_scales": scale}
        metadata = PagedMetadata(
            slot_mapping=torch.tensor([0, 4]),
            block_tables=torch.tensor([[0], [1]], dtype=torch.int32),
            seq_lens=torch.tensor([1, 1], dtype=torch.int32),
            query_start_loc=torch.tensor([0, 1, 2], dtype=torch.int32),
            num_decodes=2,
            query_lens_list=[1, 1],
            seq_lens_list=[1, 1],
        )
        paged_attention(new, new, new, *caches, metadata, scale=1.0, **scales)
        store_kv(new, new, *caches, metadata.slot_mapping, **scales)
        if is_float:
            argmax_rows(new[:, 0])
            rms_norm(new, new[0, 0], 1e-5)
            rotate(new, new, new[:, 0], new[:, 0])
        kernels: Any = kernel_module("cpu_paged_decode")
        if kernels is not None:
            kernels.finish_cut_rows(new.dtype)
            loop: Any = kernel_module("cpu_bins")
            loop.compile_loop()
    if dtype is torch.float32:
        uniform_rows([0], (1, 1), torch.Generator())
        negated_in_float32(torch.zeros(1, dtype=torch.float64), 1)
        load_products()
