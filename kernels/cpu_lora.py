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
    launch_packed,
    load_in_background,
    loaded_kernels,
    num_bins,
    wait_for_loading,
)
from hf_paged.kernels.lora_matmul import LoraFacts, LoraGroup, add_products

#: With fewer rows for each thread, all of them read a large part of the matrices: they share those out instead.
_ROWS_OF_PART = 4
#: Up to so many bytes that it goes through, a part takes less time than a second launch.
_SMALL_BYTES = 4 << 20


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
    size = work * (x.shape[1] + output.shape[1]) * 4
    bins = num_bins(size)
    tables = (fields.buffer_info()[0], scaling.buffer_info()[0], len(scaling))
    source, target = (x.data_ptr(), x_stride, x.shape[1]), (output.data_ptr(), stride, output.shape[1])
    if parts := _parts(num_rows, size, bins):
        scratch = _scratch(parts * (ranks * kernels.CHUNK + (ranks + 1) * kernels.TILE))
        launch(kernels.update(x.dtype, dtype), parts, (*tables, scratch.data_ptr(), ranks, *source, *target))
        return True
    scratch = _scratch(count + bins * (ranks + 1) * kernels.TILE)
    products = scratch.data_ptr()
    launch(kernels.shrink(x.dtype, dtype), bins, (*tables, *source, products))
    launch(kernels.expand(x.dtype, dtype), bins, (*tables, products, products + 4 * count, ranks, *target))
    return True


def _scratch(size: int) -> Tensor:
    """Memory of kernels, whatever a user's default dtype and device are."""
    return torch.empty(size, dtype=torch.float32, device="cpu")


def _parts(num_rows: int, size: int, bins: int) -> int:
    """Into how many parts one launch shares out rows; 0 for two launches that share out ranks and columns."""
    if not num_rows or num_rows >= _ROWS_OF_PART * bins:
        return bins if num_rows else 0
    parts = max(1, num_rows // _ROWS_OF_PART)
    return parts if size <= _SMALL_BYTES * parts else 0


class Ready(NamedTuple):
    """A launch for rows that are yet to come: contiguous, and of the dtype of the matrices."""

    arguments: array[int]  # of `update`; the addresses of the rows are put in
    address: int  # of the arguments
    kernel: Any
    bins: int
    dtype: torch.dtype
    widths: tuple[int, int]
    sizes: tuple[int, int]  # numbers of input and output up to the last row of a group
    table: Table  # whose addresses are among the arguments


def make_ready(table: Table, widths: tuple[int, int], end: int, room: list[Tensor]) -> Ready | None:
    """None where the kernels cannot take such rows, or would take them in two launches.

    Args:
        table: of the groups.
        widths: E_in, E_out.
        end: of the last group.
        room: scratch memory of launches that follow one another. More is added where it is too small.
    """
    kernels = _kernels(table.dtype, table.dtype)
    size = table.work * sum(widths) * 4
    bins = _parts(table.num_rows, size, num_bins(size))
    if kernels is None or not bins:
        return None
    wanted = bins * (table.ranks * kernels.CHUNK + (table.ranks + 1) * kernels.TILE)
    if not room or room[-1].numel() < wanted:
        room.append(_scratch(wanted))
    tables = (table.fields.buffer_info()[0], table.scaling.buffer_info()[0], len(table.scaling))
    e_in, e_out = widths
    arguments = array("q", (*tables, room[-1].data_ptr(), table.ranks, 0, e_in, e_in, 0, e_out, e_out))
    kernel = kernels.update(table.dtype, table.dtype)
    address, sizes = arguments.buffer_info()[0], (end * e_in, end * e_out)
    return Ready(arguments, address, kernel, bins, table.dtype, widths, sizes, table)


def add_ready(output: Tensor, x: Tensor, ready: Ready) -> bool:
    """Whether these rows, [..., E_out] and [..., E_in], were what was made ready for; False leaves them as they were.

    Between two products of a model nearly all that this touches has left the caches, so it touches little.
    """
    arguments, address, kernel, bins, dtype, widths, sizes, _ = ready
    if (
        x.dtype is not dtype
        or output.dtype is not dtype
        or (x.shape[-1], output.shape[-1]) != widths
        or x.numel() < sizes[0]
        or output.numel() < sizes[1]
        or not (x.is_cpu and output.is_cpu and x.is_contiguous() and output.is_contiguous())
        or torch.is_autocast_enabled("cpu")
    ):
        return False
    arguments[5], arguments[8] = x.data_ptr(), output.data_ptr()
    launch_packed(kernel, bins, address)
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
