"""`lora_add_` on CUDA and ROCm: one launch that shrinks and one that expands, for any mix of adapters and ranks.

A group is a row of a table on the device: its rows, its rank and where its matrices lie. The grid depends on nothing
but what the table has room for, and unused programs end at once, so that a CUDA graph which was captured with a table
serves whatever `fill` writes into it later, without the host waiting for the device. Long rows are summed in chunks at
fixed places, added up in order: no atomics, so a row's numbers do not depend on which groups are beside it.

Learned from Punica's segmented products (arXiv 2310.18547) and S-LoRA's ragged ranks (arXiv 2311.03285).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hf_paged.kernels.lora_matmul import LoraGroup, add_products
from hf_paged.kernels.triton_checks import FLOATS, check_dtype, check_tensors
from hf_paged.kernels.triton_launch import compute_dtype, gpu_of, launch

__all__ = ["LoraTable", "lora_add_", "lora_add_table_"]

_FIELDS = 6
#: Up to so many rows a group, rows are split into chunks of `_CHUNK` numbers, or few programs would do all the work.
_FEW_ROWS, _CHUNK = 64, 512
#: Columns of the output, and numbers of a row, in a program at a time.
_BLOCK_N, _BLOCK_K = 128, 64
_MAX_BLOCK_R = 32
_POINTERS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def lora_shrink_kernel(
    p_table,  # [G, 6] int64: first, end, rank, A, B, bias
    p_h,  # [S, N, R] float32
    p_x,  # [N, K]
    stride_x,
    num_rows,
    max_rank,
    K: tl.constexpr,
    CHUNK: tl.constexpr,
    WEIGHT: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """h[s, row, r] = x[row] . A[r] over chunk s. Grid (row tiles of a group, G, S)."""
    p_group = p_table + tl.program_id(1) * 6
    i_first, i_end = tl.load(p_group), tl.load(p_group + 1)
    i_start = i_first + tl.program_id(0) * BLOCK_M
    if i_start >= i_end:
        return
    rank = tl.load(p_group + 2)
    p_a = tl.multiple_of(tl.load(p_group + 3).to(tl.pointer_type(WEIGHT)), 16)
    i_s = tl.program_id(2)
    o_m = i_start + tl.arange(0, BLOCK_M)
    m_m = o_m < i_end
    p_rows = p_x + o_m[:, None] * stride_x
    p_out = p_h + (i_s * num_rows + o_m[:, None]) * max_rank
    for i_r in range(0, rank, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_r = o_r < rank
        b_h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for i_k in range(i_s * CHUNK, min(K, (i_s + 1) * CHUNK), BLOCK_K):
            o_k = i_k + tl.arange(0, BLOCK_K)
            m_k = o_k < K
            b_x = tl.load(p_rows + o_k[None, :], mask=m_m[:, None] & m_k[None, :], other=0.0)
            b_a = tl.load(p_a + o_r[None, :] * K + o_k[:, None], mask=m_r[None, :] & m_k[:, None], other=0.0)
            b_h = tl.dot(b_x.to(DOT), b_a.to(DOT), b_h, input_precision="ieee")
        tl.store(p_out + o_r[None, :], b_h, mask=m_m[:, None] & m_r[None, :])


@triton.jit
def lora_expand_kernel(
    p_table,  # [G, 6] int64
    p_scaling,  # [G] float32
    p_y,  # [N, C]
    p_h,  # [S, N, R] float32
    stride_y,
    num_rows,
    max_rank,
    C: tl.constexpr,
    SPLITS: tl.constexpr,
    WEIGHT: tl.constexpr,
    DOT: tl.constexpr,
    RANK_OF_8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """y[row] += scaling * (h[row] @ B.T + bias). Grid (row tiles of a group, ceil(C / BLOCK_N), G)."""
    i_g = tl.program_id(2)
    p_group = p_table + i_g * 6
    i_first, i_end = tl.load(p_group), tl.load(p_group + 1)
    i_start = i_first + tl.program_id(0) * BLOCK_M
    if i_start >= i_end:
        return
    rank = tl.load(p_group + 2)
    if RANK_OF_8:
        rank = tl.multiple_of(rank, 8)
    p_b = tl.multiple_of(tl.load(p_group + 4).to(tl.pointer_type(WEIGHT)), 16)
    i_bias = tl.load(p_group + 5)
    o_m = i_start + tl.arange(0, BLOCK_M)
    m_m = o_m < i_end
    o_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < C
    b_y = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for i_r in range(0, rank, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_r = o_r < rank
        b_h = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
        for i_s in range(SPLITS):
            p_part = p_h + (i_s * num_rows + o_m[:, None]) * max_rank + o_r[None, :]
            b_h += tl.load(p_part, mask=m_m[:, None] & m_r[None, :], other=0.0)
        b_b = tl.load(p_b + o_n[None, :] * rank + o_r[:, None], mask=m_n[None, :] & m_r[:, None], other=0.0)
        b_y = tl.dot(b_h.to(DOT), b_b.to(DOT), b_y, input_precision="ieee")
    if i_bias != 0:
        p_bias = i_bias.to(tl.pointer_type(WEIGHT))
        b_y += tl.load(p_bias + o_n, mask=m_n, other=0.0).to(tl.float32)[None, :]
    p_out = p_y + o_m[:, None] * stride_y + o_n[None, :]
    m_y = m_m[:, None] & m_n[None, :]
    b_y = tl.load(p_out, mask=m_y, other=0.0).to(tl.float32) + b_y * tl.load(p_scaling + i_g)
    tl.store(p_out, b_y.to(p_y.dtype.element_ty), mask=m_y)


@dataclass
class LoraTable:
    """Groups on a device. Grids and tiles follow from the bounds, within which `fill` may write what it likes.

    The table holds addresses: whoever fills it keeps the matrices alive, and where they are, while it is in use.
    """

    rows: Tensor  # [G, 6] int64
    scaling: Tensor  # [G] float32
    dtype: torch.dtype  # of all matrices and biases
    max_rows: int  # most rows of one group
    max_rank: int
    ranks_of_8: bool = (
        True  # whether every rank is a multiple of 8, so that columns of B are read in whole vectors
    )

    @classmethod
    def empty(
        cls, max_groups: int, max_rows: int, max_rank: int, dtype: torch.dtype, device: Any
    ) -> LoraTable:
        """A table without groups, for `fill`."""
        rows = torch.zeros(max_groups, _FIELDS, dtype=torch.int64, device=device)
        scaling = torch.zeros(max_groups, dtype=torch.float32, device=device)
        return cls(rows, scaling, dtype, max_rows, max_rank, ranks_of_8=max_rank % 8 == 0)

    def fill(self, groups: Sequence[LoraGroup]) -> None:
        """Writes `groups`, which may not overlap; does not wait for the device.

        Raises:
            ValueError: more groups, rows or ranks than there is room for, groups that overlap, other dtypes, or
                matrices that are not contiguous and 16-byte aligned.
        """
        count = self.rows.shape[0]
        ends = sorted((g.first, g.end) for g in groups if g.first < g.end)
        if len(groups) > count or any(b[0] < a[1] for a, b in itertools.pairwise(ends)):
            raise ValueError(f"lora_add_: {len(groups)} groups; at most {count} that do not overlap")
        for group in groups:
            rank, rows = group.a.shape[0], group.end - group.first
            if rank > self.max_rank or rows > self.max_rows or (self.ranks_of_8 and rank % 8):
                raise ValueError(
                    f"lora_add_: {rows} rows of rank {rank}; at most {self.max_rows} and {self.max_rank}"
                    + (", in multiples of 8" if self.ranks_of_8 else "")
                )
            if not _is_readable(group) or group.a.dtype is not self.dtype:
                raise ValueError(f"lora_add_: matrices must be contiguous, aligned and {self.dtype}")
        key = tuple(map(_row, groups)) + ((0,) * _FIELDS,) * (count - len(groups))
        scaling = [group.scaling for group in groups] + [0.0] * (count - len(groups))
        _move(torch.tensor(key, dtype=torch.int64), self.rows)
        _move(torch.tensor(scaling, dtype=torch.float32), self.scaling)


def lora_add_(output: Tensor, x: Tensor, groups: Sequence[LoraGroup]) -> None:
    """See `hf_paged.kernels.lora_matmul.lora_add_`.

    What the kernels cannot read (autocast, float64, matrices that are no plain rows) goes to torch's products.
    """
    if not (_is_plain(output) and _is_plain(x)) or torch.is_autocast_enabled(output.device.type):
        add_products(output, x, groups)
        return
    for batch in _batches(groups):
        if _is_readable(batch[0]):
            factors = tuple(g.scaling for g in batch)
            rows, scaling = _device_table(tuple(map(_row, batch)), factors, output.device)
            table = LoraTable(
                rows,
                scaling,
                batch[0].a.dtype,
                max(g.end - g.first for g in batch),
                max(g.a.shape[0] for g in batch),
                all(g.a.shape[0] % 8 == 0 for g in batch),
            )
            lora_add_table_(output, x, table)
        else:
            add_products(output, x, batch)


def lora_add_table_(output: Tensor, x: Tensor, table: LoraTable) -> None:
    """`lora_add_` of the groups in `table`, whatever they are by the time the device gets here.

    Args:
        output: [N, C], rows in any stride; written in place.
        x: [N, K] of its dtype.

    Raises:
        ValueError: an unsupported dtype, shape, GPU or mix of devices.
    """
    op = "lora_add_"
    gpu = gpu_of(op, output.device)
    check_tensors(op, output.device, output=output, x=x, rows=table.rows, scaling=table.scaling)
    check_dtype(op, "output", output)
    if x.dtype != output.dtype or x.shape[0] != output.shape[0]:
        raise ValueError(f"{op}: x {x.dtype} {tuple(x.shape)}, output {output.dtype} {tuple(output.shape)}")
    if not table.max_rows or not table.max_rank:
        return
    (num_rows, width), groups = x.shape, table.rows.shape[0]
    is_small = table.max_rows <= _FEW_ROWS
    chunk = _CHUNK if is_small else max(_BLOCK_K, width)
    splits = -(-width // chunk)
    block_m = 16 if is_small else 64
    tiles = -(-table.max_rows // block_m)
    h = torch.empty(splits, num_rows, table.max_rank, dtype=torch.float32, device=x.device)
    constants = {
        "WEIGHT": _POINTERS[table.dtype],
        "DOT": compute_dtype(gpu, x.dtype, table.dtype),
        "BLOCK_M": block_m,
        "BLOCK_R": min(_MAX_BLOCK_R, max(16, triton.next_power_of_2(table.max_rank))),
    }
    launch(
        lora_shrink_kernel, (tiles, groups, splits), x.device, table.rows, h, x, x.stride(0), num_rows,
        table.max_rank, K=width, CHUNK=chunk, BLOCK_K=_BLOCK_K, **constants, num_warps=4, num_stages=3,
    )  # fmt: skip
    columns = output.shape[1]
    launch(
        lora_expand_kernel, (tiles, -(-columns // _BLOCK_N), groups), x.device, table.rows, table.scaling, output,
        h, output.stride(0), num_rows, table.max_rank, C=columns, SPLITS=splits, RANK_OF_8=table.ranks_of_8,
        BLOCK_N=_BLOCK_N, **constants, num_warps=4, num_stages=1,
    )  # fmt: skip


def _batches(groups: Sequence[LoraGroup]) -> list[list[LoraGroup]]:
    """Groups that may share launches, in order: rows in one group only, one dtype, all of them readable or not."""
    batches: list[list[LoraGroup]] = []
    for group in groups:
        if group.first == group.end:
            continue
        for batch in reversed(batches):
            if any(group.first < g.end and g.first < group.end for g in batch):
                batches.append([group])  # adds to what that one left
                break
            if batch[0].a.dtype is group.a.dtype and _is_readable(batch[0]) == _is_readable(group):
                batch.append(group)
                break
        else:
            batches.append([group])
    return batches


def _is_plain(tensor: Tensor) -> bool:
    return tensor.dtype in FLOATS and tensor.stride(1) == 1


def _is_readable(group: LoraGroup) -> bool:
    matrices = [group.a, group.b] if group.bias is None else [group.a, group.b, group.bias]
    return group.a.dtype in FLOATS and all(
        m.dtype is group.a.dtype and m.is_contiguous() and m.data_ptr() % 16 == 0 for m in matrices
    )


def _row(group: LoraGroup) -> tuple[int, ...]:
    first, end, a, b, bias, _, _ = group
    return first, end, a.shape[0], a.data_ptr(), b.data_ptr(), 0 if bias is None else bias.data_ptr()


@functools.lru_cache(maxsize=4096)
def _device_table(
    rows: tuple[tuple[int, ...], ...], scaling: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """The columns of a table by content: a layer's are the same for as long as the same requests run."""
    tables = torch.tensor(rows, dtype=torch.int64), torch.tensor(scaling, dtype=torch.float32)
    targets = [torch.empty_like(table, device=device) for table in tables]
    for table, target in zip(tables, targets, strict=True):
        _move(table, target)
    return targets[0], targets[1]


def _move(source: Tensor, target: Tensor) -> None:
    """To the device in the order of its stream, without waiting for it."""
    if target.device.type == "cuda":
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)
