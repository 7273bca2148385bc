"""What the CPU backend works out once a step, for all layers: which tokens are rows, which are long queries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_paged.kernels.cpu_paged_prefill import LongQueries, group_long_queries
from hf_paged.kernels.metadata import PagedMetadata

__all__ = ["CpuStep"]

#: Queries up to this long are attended token by token: measured against SDPA, with cached tokens and without.
_MAX_ROW_QUERY, _MAX_ROW_PROMPT = 16, 32


@dataclass
class CpuStep:
    """What all layers of a step share: computed by the first, kept in the metadata's plan."""

    rows: np.ndarray  # [R, 3] int32: token, sequence, keys it sees
    num_rows: int
    num_keys: int  # of all rows together
    stored_from: int  # tokens from here on are stored before attention, those before by their rows
    groups: list[LongQueries]
    has_stray_tokens: bool  # tokens after those of the last sequence
    whole_rows: bool  # no row may be cut between threads
    block_tables: Tensor  # [S, M] int32
    slot_mapping: Tensor  # [T] int64
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
    def of(cls, metadata: PagedMetadata, *, has_kernels: bool) -> CpuStep:
        query_lens, seq_lens = metadata.query_lens_list, metadata.seq_lens_list
        is_long = [
            not has_kernels
            or (
                not metadata.deterministic
                and query_len > (_MAX_ROW_PROMPT if query_len == seq_len else _MAX_ROW_QUERY)
            )
            for query_len, seq_len in zip(query_lens, seq_lens, strict=True)
        ]
        only_decodes = has_kernels and metadata.num_decodes == metadata.num_seqs
        table = _decode_rows(seq_lens) if only_decodes else _rows(query_lens, seq_lens, is_long)
        decodes = metadata.num_decodes if has_kernels else 0
        block_tables, slot_mapping = metadata.block_tables.contiguous(), metadata.slot_mapping.contiguous()
        return cls(
            rows=table,
            num_rows=len(table),
            num_keys=int(table[:, 2].sum()),
            stored_from=decodes if len(table) == decodes else 0,
            groups=group_long_queries(query_lens, seq_lens, is_long) if True in is_long else [],
            has_stray_tokens=sum(query_lens) < slot_mapping.shape[0],
            whole_rows=metadata.deterministic,
            block_tables=block_tables,
            slot_mapping=slot_mapping,
            rows_address=_address_of(table),
            tables_address=block_tables.data_ptr(),
            slots_address=slot_mapping.data_ptr(),
        )

    def row_starts(self, window: int, tile: int) -> int:
        if window not in self.starts:
            ends = self.rows[:, 2].astype(np.int64)
            begins = np.maximum(0, ends - window) if window else np.zeros_like(ends)
            tiles = np.maximum(1, -(-ends // tile) - begins // tile)
            starts = np.zeros(len(tiles) + 1, np.int64)
            np.cumsum(tiles, out=starts[1:])
            self.starts[window] = starts, _address_of(starts)
        return self.starts[window][1]

    def scratch(self, bins: int, size: int) -> int:
        """The address of float32 [bins, size] to work in, for one layer after another."""
        if (bins, size) not in self.scratches:
            numbers = np.empty((bins, size), np.float32)
            self.scratches[bins, size] = numbers, _address_of(numbers)
        return self.scratches[bins, size][1]

    def cut_rows(self, bins: int, state_size: int) -> tuple[int, int]:
        """Addresses of the states and the owners of rows that bins cut."""
        if (bins, state_size) not in self.cut:
            states, owners = np.empty((2 * bins, state_size), np.float32), np.full(2 * bins, -1, np.int64)
            self.cut[bins, state_size] = states, owners, _address_of(states), _address_of(owners)
        return self.cut[bins, state_size][2:]


def _decode_rows(seq_lens: list[int]) -> np.ndarray:
    """`CpuStep.rows` where each sequence has one token."""
    rows = np.empty((len(seq_lens), 3), np.int32)
    rows[:, 0] = rows[:, 1] = np.arange(len(seq_lens))
    rows[:, 2] = seq_lens
    return rows


def _rows(query_lens: list[int], seq_lens: list[int], is_long: list[bool]) -> np.ndarray:
    """`CpuStep.rows`: the tokens of all sequences that are not `is_long`."""
    lens = np.asarray(query_lens, np.int32)
    ends = np.asarray(seq_lens, np.int32)
    firsts = np.cumsum(lens) - lens
    kept = np.arange(len(lens), dtype=np.int32)
    if True in is_long:
        kept = kept[np.logical_not(is_long)]
        lens, ends, firsts = lens[kept], ends[kept], firsts[kept]
    if (lens != 1).any():
        # Rows of a sequence count up from its first one.
        places = np.arange(lens.sum()) - np.repeat(np.cumsum(lens) - lens, lens)
        kept, firsts, ends = (np.repeat(a, lens) for a in (kept, firsts, ends - lens + 1))
        firsts, ends = firsts + places, ends + places
    rows = np.empty((len(kept), 3), np.int32)
    rows[:, 0], rows[:, 1], rows[:, 2] = firsts, kept, ends
    return rows


def _address_of(array: np.ndarray) -> int:
    # Several times as fast as `array.ctypes.data`.
    return torch.from_numpy(array).data_ptr() if array.size else 0
