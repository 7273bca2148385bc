"""`lora_add_` on the CPU: numba launches for all groups; torch's products, two a group, where those cannot run.

With 16 adapters in a step of 64 rows a group has four rows, and each of its two products is smaller than the call that
asks for it: a thousand and more such calls a step are what the launches save (docs/decisions.md).
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hf_paged.kernels.cpu_runtime import (
    is_loading,
    launch,
    load_in_background,
    loaded_kernels,
    num_bins,
    wait_for_loading,
)
from hf_paged.kernels.lora_matmul import LoraFacts, LoraGroup, add_products

#: With fewer rows for each thread, all of them read a large part of the matrices: they share those out instead.
_ROWS_OF_PART = 4


def lora_add_(output: Tensor, x: Tensor, groups: Sequence[LoraGroup]) -> None:
    if not _add_by_kernel(output, x, groups):
        add_products(output, x, groups)


def lora_add_by_rows(output: Tensor, x: Tensor, groups: Sequence[LoraGroup]) -> None:
    """As `lora_add_`, by the kernels only: they compute a row alike whatever is beside it.

    A launch takes one dtype, so groups of each go by themselves, and which others there are decides nothing.

    Raises:
        ValueError: the kernels cannot take a group.
    """
    for dtype in dict.fromkeys(group.a.dtype for group in groups):
        if _kernels(x.dtype, dtype) is None:
            wait_for_loading()
        own = [group for group in groups if group.a.dtype is dtype]
        if not _add_by_kernel(output, x, own):
            raise ValueError(
                f"the low-rank kernels cannot take matrices of {dtype} for rows of {x.dtype}: "
                "another dtype, or matrices that are not contiguous"
            )


def _add_by_kernel(output: Tensor, x: Tensor, groups: Sequence[LoraGroup]) -> bool:
    """Whether the kernels took the groups; False leaves `output` as it was."""
    table = table_of(groups)
    return table is not None and add_by_table(output, x, table)


class Table(NamedTuple):
    """Groups as the kernels take them."""

    fields: array[int]
    scaling: array[float]
    dtype: torch.dtype  # of the matrices
    num_products: int  # numbers between the two launches
    ranks: int  # the most of a group
    work: int  # for each number of an input and an output row
    #: Of all groups, if each begins where or after the one before ends; else 0.
    num_rows: int


def table_of(groups: Sequence[LoraGroup]) -> Table | None:
    """None for groups that the kernels cannot take."""
    fields, scaling = array("q"), array("f")
    dtype = groups[0].a.dtype
    count = ranks = work = rows = last = 0
    for first, end, a, b, bias, factor, facts in groups:
        rank, _, own_dtype, addresses, is_plain = facts or LoraFacts.of(a, b, bias)
        if own_dtype is not dtype or not is_plain:
            return None
        fields.extend((first, end, rank, *addresses, count))
        scaling.append(factor)
        count += (end - first) * rank
        ranks = max(ranks, rank)
        work += rank * (end - first + 4)
        rows += end - first
        last = end if first >= last else 1 << 62
    return Table(fields, scaling, dtype, count, ranks, work, rows if last < 1 << 62 else 0)


def add_by_table(output: Tensor, x: Tensor, table: Table) -> bool:
    """Whether the kernels took these rows; False leaves `output` as it was."""
    fields, scaling, dtype, count, ranks, work, num_rows = table
    kernels = _kernels(x.dtype, dtype)
    if kernels is None or output.dtype is not x.dtype or output.device.type != "cpu":
        return False
    x_stride, x_step = x.stride()
    stride, step = output.stride()
    if x_step != 1 or step != 1 or torch.is_autocast_enabled("cpu"):
        return False
    bins = num_bins(work * (x.shape[1] + output.shape[1]) * 4)
    tables = (fields.buffer_info()[0], scaling.buffer_info()[0], len(scaling))
    source, target = (x.data_ptr(), x_stride, x.shape[1]), (output.data_ptr(), stride, output.shape[1])
    if num_rows and (bins == 1 or num_rows >= _ROWS_OF_PART * bins):
        scratch = torch.empty(bins * (ranks * kernels.CHUNK + (ranks + 1) * kernels.TILE))
        launch(
            kernels.update(x.dtype, dtype), bins, (*tables, scratch.data_ptr(), ranks, *source, *target)
        )
        return True
    scratch = torch.empty(count + bins * (ranks + 1) * kernels.TILE)
    products = scratch.data_ptr()
    launch(kernels.shrink(x.dtype, dtype), bins, (*tables, *source, products))
    launch(kernels.expand(x.dtype, dtype), bins, (*tables, products, products + 4 * count, ranks, *target))
    return True


def _kernels(dtype: torch.dtype, adapter_dtype: torch.dtype) -> Any:
    """The module of kernels for these dtypes; None where there are none, or until they are loaded."""
    known = _loaded.get((dtype, adapter_dtype))
    if known is not None:
        return known
    key = ("lora", dtype, adapter_dtype)
    # While attention's own kernels wait for a call that is worth loading them, these wait too.
    if is_loading(dtype) or is_loading(key):
        return None
    if key not in _known:
        _known.add(key)
        load_in_background(key, functools.partial(_warm_up, dtype, adapter_dtype))
        return None
    return loaded_kernels("cpu_lora_kernel", dtype, adapter_dtype)


#: What has been asked to load in this process, or in the one it was forked from.
_known: set[Any] = set()
#: Those whose kernels are there: this is asked once a layer.
_loaded: dict[tuple[torch.dtype, torch.dtype], Any] = {}


def _warm_up(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    # One tiny launch: what numba compiles depends on types only.
    with torch.inference_mode(False), torch.no_grad():
        rows, matrix = torch.zeros(1, 8, dtype=dtype), torch.zeros(2, 8, dtype=adapter_dtype)
        group = LoraGroup(0, 1, matrix, matrix.t().contiguous(), None, 1.0)
        lora_add_(rows, rows.clone(), [group])
        lora_add_(rows, rows.clone(), [group, group])  # groups that share rows are for the other kernels
    _loaded[dtype, adapter_dtype] = loaded_kernels("cpu_lora_kernel", dtype, adapter_dtype)
