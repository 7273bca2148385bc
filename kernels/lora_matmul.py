"""Low-rank updates of many adapters in one call: `lora_add_` adds each group's `x @ A.T @ B.T * scaling` to its rows.

The rows of a group lie together, so a group is a range and nothing is gathered. Ranks differ freely between groups, and
rows in no group stay as they are. One op, one file a backend; `reference` is the specification.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BACKENDS", "LoraGroup", "add_products", "lora_add_", "products_in"]

#: Name -> module.
BACKENDS = {
    "reference": "hf_paged.kernels.reference_lora",
    "cpu": "hf_paged.kernels.cpu_lora",
    "triton": "hf_paged.kernels.triton_lora",
}


class LoraGroup(NamedTuple):
    """Rows `first` to `end` and the low-rank matrices they are multiplied with."""

    first: int
    end: int
    a: Tensor  # [rank, E_in]
    b: Tensor  # [E_out, rank]
    bias: Tensor | None  # [E_out], scaled as the product is
    scaling: float


def lora_add_(
    output: Tensor, x: Tensor, groups: Sequence[LoraGroup], *, backend: str, deterministic: bool = False
) -> Tensor:
    """Adds `(x[i] @ a.T @ b.T + bias) * scaling` to `output[i]` for the rows of each group, in place.

    Groups may overlap: several adapters add up. Products are in the dtype of `a` and `b`, the sum is rounded once to
    the dtype of `output`.

    Args:
        output: [N, E_out], contiguous rows.
        x: [N, E_in].
        backend: "reference", "cpu" or "triton".
        deterministic: what a row gets must not depend, in a single bit, on other rows and groups: "cpu" only.

    Returns:
        `output`.

    Raises:
        ValueError: a shape does not fit, the backend is unknown, or its kernels cannot be deterministic here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"lora_add_: backend={backend!r}; must be one of {', '.join(BACKENDS)}")
    if output.dim() != 2 or x.dim() != 2 or output.shape[0] != x.shape[0]:
        raise ValueError(
            f"lora_add_: output {tuple(output.shape)} and x {tuple(x.shape)} must be [N, E_out] and [N, E_in]"
        )
    if not groups:
        return output
    for group in groups:
        _check(group, output, x)
    if deterministic:
        if backend != "cpu":
            raise ValueError(f"lora_add_: backend={backend!r} is not deterministic")
        _module(BACKENDS[backend]).lora_add_by_rows(output, x, groups)
    else:
        _module(BACKENDS[backend]).lora_add_(output, x, groups)
    return output


def _check(group: LoraGroup, output: Tensor, x: Tensor) -> None:
    a, b = group.a.shape, group.b.shape
    if not 0 <= group.first <= group.end <= x.shape[0]:
        raise ValueError(f"lora_add_: rows {group.first} to {group.end} of {x.shape[0]}")
    if len(a) != 2 or len(b) != 2 or a[1] != x.shape[1] or b[0] != output.shape[1] or a[0] != b[1]:
        raise ValueError(
            f"lora_add_: a {tuple(a)} and b {tuple(b)} must be [rank, {x.shape[1]}] and [{output.shape[1]}, rank]"
        )


def products_in(dtype: torch.dtype, x: Tensor, group: LoraGroup) -> Tensor:
    """The update of one group [end - first, E_out], computed in `dtype`."""
    rows = x[group.first : group.end].to(dtype)
    update = rows @ group.a.to(dtype).t() @ group.b.to(dtype).t()
    if group.bias is not None:
        update = update + group.bias.to(dtype)
    return update * group.scaling


def add_products(output: Tensor, x: Tensor, groups: Sequence[LoraGroup]) -> None:
    """`lora_add_` with torch's matrix products, two a group, on any device: what the kernels cannot take."""
    autocast = torch.is_autocast_enabled(output.device.type)
    for group in groups:
        first, end, a, b, bias, scaling = group
        rows = output[first:end]
        if autocast or not (output.dtype is a.dtype is b.dtype is x.dtype):
            # The sum is in the wider dtype, as PEFT's, and rounded once.
            rows.copy_(rows + products_in(a.dtype, x, group))
            continue
        rows.addmm_(F.linear(x[first:end], a), b.t(), alpha=scaling)
        if bias is not None:
            rows.add_(bias, alpha=scaling)


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(name)
