"""`lora_add_` on the CPU: two numba launches for all groups; torch's products, two a group, where those cannot run.

With 16 adapters in a step of 64 rows a group has four rows, and each of its two products is smaller than the call that
asks for it: a thousand and more such calls a step are what the launches save (docs/decisions.md).
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence
from typing import Any

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
from hf_paged.kernels.lora_matmul import LoraGroup, add_products


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
    dtype = groups[0].a.dtype
    kernels = _kernels(x.dtype, dtype)
    if kernels is None or output.dtype is not x.dtype or output.device.type != "cpu":
        return False
    if x.stride(1) != 1 or output.stride(1) != 1 or torch.is_autocast_enabled("cpu"):
        return False
    table, scaling = array("q"), array("f")
    count = ranks = work = 0
    for first, end, a, b, bias, factor in groups:
        if a.dtype is not dtype or b.dtype is not dtype or not (a.is_contiguous() and b.is_contiguous()):
            return False
        if bias is not None and (bias.dtype is not dtype or not bias.is_contiguous()):
            return False
        rank = len(a)
        table.extend(
            (first, end, rank, a.data_ptr(), b.data_ptr(), 0 if bias is None else bias.data_ptr(), count)
        )
        scaling.append(factor)
        count += (end - first) * rank
        ranks = max(ranks, rank)
        work += rank * (end - first + 4)
    bins = num_bins(work * (x.shape[1] + output.shape[1]) * 4)
    scratch = torch.empty(count + bins * (ranks + 1) * kernels.TILE)
    products = scratch.data_ptr()
    tables = (table.buffer_info()[0], scaling.buffer_info()[0], len(groups))
    rows = (x.data_ptr(), x.stride(0), x.shape[1])
    launch(kernels.shrink(x.dtype, dtype), bins, (*tables, *rows, products))
    rows = (output.data_ptr(), output.stride(0), output.shape[1])
    launch(kernels.expand(x.dtype, dtype), bins, (*tables, products, products + 4 * count, ranks, *rows))
    return True


def _kernels(dtype: torch.dtype, adapter_dtype: torch.dtype) -> Any:
    """The module of kernels for these dtypes; None where there are none, or until they are loaded."""
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


def _warm_up(dtype: torch.dtype, adapter_dtype: torch.dtype) -> None:
    # One tiny launch: what numba compiles depends on types only.
    with torch.inference_mode(False), torch.no_grad():
        rows, matrix = torch.zeros(1, 8, dtype=dtype), torch.zeros(2, 8, dtype=adapter_dtype)
        lora_add_(rows, rows.clone(), [LoraGroup(0, 1, matrix, matrix.t().contiguous(), None, 1.0)])
