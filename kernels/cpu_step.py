"""What the CPU backend works out once a step, for all layers: which tokens are rows, which are long queries."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
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
