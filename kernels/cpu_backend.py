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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_paged.kernels import reference
from hf_paged.kernels.cpu_argmax import argmax_rows
from hf_paged.kernels.cpu_norm import rms_norm
from hf_paged.kernels.cpu_paged_prefill import LongQueries, attend_long_queries, group_long_queries
from hf_paged.kernels.cpu_rope import rotate
from hf_paged.kernels.cpu_runtime import (
    float_bits,
    kernel_module,
    launch,
    load_in_background,
    loaded_kernels,
    num_bins,
)
from hf_paged.kernels.metadata import PagedMetadata
from hf_paged.kernels.reference import copy_blocks

__all__ = ["copy_blocks", "load_kernels", "paged_attention", "store_kv"]

#: Queries up to this long are attended token by token: measured against SDPA, with cached tokens and without.
_MAX_ROW_QUERY, _MAX_ROW_PROMPT = 16, 32


def store_kv(key: Tensor, value: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """See `hf_paged.kernels.ops.store_kv`."""
    kernels = loaded_kernels("cpu_store_kv", k_cache.dtype)
    if kernels is None:
        reference.store_kv(key, value, k_cache, v_cache, slot_mapping)
        return
    key, value, slots = key.to(k_cache.dtype), value.to(k_cache.dtype), slot_mapping.contiguous()
    bins = num_bins(4 * key.numel() * key.element_size())
    arguments = (
        *_address(key), *_address(value), k_cache.data_ptr(), v_cache.data_ptr(), k_cache.shape[2], k_cache.shape[3],
        slots.data_ptr(), key.shape[0],
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
) -> Tensor:
    """See `hf_paged.kernels.ops.paged_attention`."""
    has_kernels = loaded_kernels("cpu_paged_decode", k_cache.dtype) is not None
    name = "cpu" if has_kernels else "cpu.sdpa"
    step = metadata.plan.get(name)
    if step is None:
        if metadata.deterministic and not has_kernels:
            raise ValueError(f"deterministic attention needs the numba kernels for {k_cache.dtype}")
        step = metadata.plan[name] = _Step.of(metadata, has_kernels=has_kernels)
    if step.groups and (softcap is not None or sinks is not None):
        return reference.paged_attention(
            query, key, value, k_cache, v_cache, metadata,
            scale=scale, sliding_window=sliding_window, softcap=softcap, sinks=sinks,
        )  # fmt: skip
    if step.stored_from < key.shape[0]:
        stored = slice(step.stored_from, None)
        store_kv(key[stored], value[stored], k_cache, v_cache, metadata.slot_mapping[stored])
    output = torch.empty_like(query, memory_format=torch.contiguous_format)
    if step.has_stray_tokens:
        output.zero_()
    if step.num_rows:
        _attend_rows(step, query, key, value, k_cache, v_cache, output, scale, sliding_window, softcap, sinks)
    if step.groups:
        attend_long_queries(
            query, key, value, k_cache, v_cache, metadata.block_tables, step.groups, output, step.masks, scale,
            sliding_window,
        )  # fmt: skip
    return output


@dataclass
class _Step:
    """What all layers of a step share: computed by the first, kept in the metadata's plan."""

    rows: np.ndarray  # [R, 3] int32: token, sequence, keys it sees
    num_rows: int
    num_keys: int  # of all rows together
    stored_from: int  # tokens from here on are stored before attention, those before by their rows
    groups: list[LongQueries]
    has_stray_tokens: bool  # tokens after those of the last sequence
    whole_rows: bool  # no row may be cut between threads
    block_tables: np.ndarray  # [S, M] int32
    slot_mapping: np.ndarray  # [T] int64
    rows_address: int
    tables_address: int
    slots_address: int
    masks: dict[Any, Tensor] = field(default_factory=dict)
    #: sliding window -> [R + 1] int64 prefix sum of tiles, and its address
    starts: dict[int, tuple[np.ndarray, int]] = field(default_factory=dict)
    #: (bins, numbers of each) -> memory to work in, and its address
    scratches: dict[tuple[int, int], tuple[np.ndarray, int]] = field(default_factory=dict)
    #: (bins, numbers of a state) -> states and owners of cut rows, and their addresses
    cut: dict[tuple[int, int], tuple[np.ndarray, np.ndarray, int, int]] = field(default_factory=dict)

    @classmethod
    def of(cls, metadata: PagedMetadata, *, has_kernels: bool) -> _Step:
        query_lens, seq_lens = metadata.query_lens_list, metadata.seq_lens_list
        is_long = [
            not has_kernels
            or (
                not metadata.deterministic
                and query_len > (_MAX_ROW_PROMPT if query_len == seq_len else _MAX_ROW_QUERY)
            )
            for query_len, seq_len in zip(query_lens, seq_lens, strict=True)
        ]
        decodes = 0 if not has_kernels else metadata.num_decodes
        tokens = np.arange(decodes, dtype=np.int32)
        rows = [np.stack([tokens, tokens, np.asarray(seq_lens[:decodes], np.int32)], axis=1)]
        token = decodes
        for index in range(decodes if has_kernels else 0, metadata.num_seqs):
            query_len, seq_len = query_lens[index], seq_lens[index]
            if not is_long[index]:
                part = np.empty((query_len, 3), np.int32)
                part[:, 0] = np.arange(token, token + query_len)
                part[:, 1] = index
                part[:, 2] = np.arange(seq_len - query_len + 1, seq_len + 1)
                rows.append(part)
            token += query_len
        only_decodes = len(rows) == 1 or all(len(part) == 0 for part in rows[1:])
        table = rows[0] if len(rows) == 1 else np.concatenate(rows)
        block_tables = np.ascontiguousarray(metadata.block_tables.numpy())
        slot_mapping = np.ascontiguousarray(metadata.slot_mapping.numpy())
        return cls(
            rows=table,
            num_rows=len(table),
            num_keys=int(table[:, 2].sum()),
            stored_from=decodes if only_decodes else 0,
            groups=group_long_queries(query_lens, seq_lens, is_long),
            has_stray_tokens=token < metadata.slot_mapping.shape[0],
            whole_rows=metadata.deterministic,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            rows_address=table.ctypes.data,
            tables_address=block_tables.ctypes.data,
            slots_address=slot_mapping.ctypes.data,
        )

    def row_starts(self, window: int, tile: int) -> int:
        if window not in self.starts:
            ends = self.rows[:, 2].astype(np.int64)
            begins = np.maximum(0, ends - window) if window else np.zeros_like(ends)
            tiles = np.maximum(1, -(-ends // tile) - begins // tile)
            starts = np.zeros(len(tiles) + 1, np.int64)
            np.cumsum(tiles, out=starts[1:])
            self.starts[window] = starts, starts.ctypes.data
        return self.starts[window][1]

    def scratch(self, bins: int, size: int) -> int:
        """The address of float32 [bins, size] to work in, for one layer after another."""
        if (bins, size) not in self.scratches:
            numbers = np.empty((bins, size), np.float32)
            self.scratches[bins, size] = numbers, numbers.ctypes.data
        return self.scratches[bins, size][1]

    def cut_rows(self, bins: int, state_size: int) -> tuple[int, int]:
        """Addresses of the states and the owners of rows that bins cut."""
        if (bins, state_size) not in self.cut:
            states, owners = np.empty((2 * bins, state_size), np.float32), np.full(2 * bins, -1, np.int64)
            self.cut[bins, state_size] = states, owners, states.ctypes.data, owners.ctypes.data
        return self.cut[bins, state_size][2:]


def _attend_rows(
    step: _Step,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    output: Tensor,
    scale: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    kernels = kernel_module("cpu_paged_decode")
    assert kernels is not None, "rows are only planned where there are kernels"
    dtype = k_cache.dtype
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
        step.slots_address, window, states, owners, 0 if sinks is None else sinks.data_ptr(),
        float_bits(scale), float_bits(softcap or 0.0), bins,
        step.scratch(bins, kernels.scratch_size(heads, head_size)),
    )  # fmt: skip
    attend = kernels.attend_whole_rows if step.whole_rows else kernels.attend_bin
    launch(attend(wide_query.dtype, dtype), bins, arguments)
    if cuts:
        launch(kernels.finish_cut_rows(wide_query.dtype), 1, arguments)
    if wide_output is not output:
        rows = torch.from_numpy(step.rows[:, 0].astype(np.int64))
        output[rows] = wide_output[rows].to(output.dtype)


def _address(tensor: Tensor) -> tuple[int, int, int]:
    """Address, stride between tokens and stride between heads of [T, heads, D]."""
    return tensor.data_ptr(), tensor.stride(0), tensor.stride(1)


def load_kernels(dtype: torch.dtype) -> None:
    """Starts loading the kernels for caches and logits of `dtype` in the background, if that has not happened yet."""
    load_in_background(dtype, functools.partial(_warm_up, dtype))


def _warm_up(dtype: torch.dtype) -> None:
    # One tiny launch of each kernel: what numba compiles depends on types only.
    with torch.inference_mode(False), torch.no_grad():
        new = torch.zeros(2, 1, 8, dtype=dtype)
        caches = (torch.zeros(2, 4, 1, 8, dtype=dtype), torch.zeros(2, 4, 1, 8, dtype=dtype))
        metadata = PagedMetadata(
            slot_mapping=torch.tensor([0, 4]),
            block_tables=torch.tensor([[0], [1]], dtype=torch.int32),
            seq_lens=torch.tensor([1, 1], dtype=torch.int32),
            query_start_loc=torch.tensor([0, 1, 2], dtype=torch.int32),
            num_decodes=2,
            query_lens_list=[1, 1],
            seq_lens_list=[1, 1],
        )
        paged_attention(new, new, new, *caches, metadata, scale=1.0)
        store_kv(new, new, *caches, metadata.slot_mapping)
        argmax_rows(new[:, 0])
        rms_norm(new, new[0, 0], 1e-5)
        rotate(new, new[:, 0], new[:, 0])
        kernels: Any = kernel_module("cpu_paged_decode")
        if kernels is not None:
            kernels.finish_cut_rows(dtype)
            loop: Any = kernel_module("cpu_bins")
            loop.compile_loop()
