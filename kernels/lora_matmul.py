"""Low-rank updates of many adapters in one call: `lora_add_` adds each group's `x @ A.T @ B.T * scaling` to its rows.

The rows of a group lie together, so a group is a range and nothing is gathered. Ranks differ freely between groups, and
rows in no group stay as they are. One op, one file a backend; `reference` is the specification.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import Parameter

__all__ = [
    "BACKENDS",
    "LoraFacts",
    "LoraGroup",
    "PreparedGroups",
    "add_products",
    "lora_add_",
    "lora_add_prepared_",
    "prepare",
    "products_in",
]

#: Name -> module.
BACKENDS = {
    "reference": "hf_paged.kernels.reference_lora",
    "cpu": "hf_paged.kernels.cpu_lora",
    "triton": "hf_paged.kernels.triton_lora",
}


class LoraFacts(NamedTuple):
    """What kernels want to know of the matrices of an adapter. It holds no tensor."""

    rank: int
    widths: tuple[int, int]  # E_in, E_out
    dtype: torch.dtype
    addresses: tuple[int, int, int]  # of a, of b, of the bias or 0
    #: Whether they fit together and are plain tensors of one dtype whose numbers lie side by side. If not, nothing
    #: else here but the dtype says anything.
    is_plain: bool

    @classmethod
    def of(cls, a: Tensor, b: Tensor, bias: Tensor | None) -> LoraFacts:
        """Looks at matrices as those of a `LoraGroup`."""
        tensors = [t for t in (a, b, bias) if t is not None]
        fit = a.dim() == 2 and b.dim() == 2 and a.shape[0] == b.shape[1]
        fit = fit and (bias is None or bias.shape == b.shape[:1])
        if not fit or not all(type(t) in (Tensor, Parameter) and t.is_contiguous() for t in tensors):
            return cls(0, (0, 0), a.dtype, (0, 0, 0), False)
        is_plain = all(t.dtype is a.dtype for t in tensors)
        addresses = (a.data_ptr(), b.data_ptr(), 0 if bias is None else bias.data_ptr())
        return cls(a.shape[0], (a.shape[1], b.shape[0]), a.dtype, addresses, is_plain)


class LoraGroup(NamedTuple):
    """Rows `first` to `end` and the low-rank matrices they are multiplied with."""

    first: int
    end: int
    a: Tensor  # [rank, E_in]
    b: Tensor  # [E_out, rank]
    bias: Tensor | None  # [E_out], scaled as the product is
    scaling: float
    #: Of these matrices as they are now; None: nobody has looked yet. Looking takes longer than most else in a step.
    facts: LoraFacts | None = None


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
    _check_inputs(output, x)
    if not groups:
        return output
    for group in groups:
        _check(group, x.shape[0], (x.shape[1], output.shape[1]))
    if deterministic:
        if backend != "cpu":
            raise ValueError(f"lora_add_: backend={backend!r} is not deterministic")
        _module(BACKENDS[backend]).lora_add_by_rows(output, x, groups)
    else:
        _module(BACKENDS[backend]).lora_add_(output, x, groups)
    return output


class PreparedGroups(NamedTuple):
    """Groups and what a backend makes of them before it has rows to work on."""

    groups: Sequence[LoraGroup]
    end: int  # of all groups
    widths: tuple[int, int] | None  # E_in, E_out of all groups; None: they are looked at with the rows
    table: Any  # the backend's own
    ready: Any = None  # the same, where rows of the common kind need only be named


def prepare(groups: Sequence[LoraGroup], *, backend: str, room: list[Tensor] | None = None) -> PreparedGroups:
    """For `lora_add_prepared_`, with groups whose `facts` are known.

    Args:
        groups: at least one.
        backend: as for `lora_add_`.
        room: scratch memory shared with other groups, of products that are never computed at the same time.

    Making ready a step's groups for all layers in a row is several times as fast as between the layers' products, after
    each of which the caches hold something else.
    """
    first = groups[0].facts
    widths = None if first is None else first.widths
    if any(g.facts is None or g.facts.widths != widths or not 0 <= g.first <= g.end for g in groups):
        return PreparedGroups(groups, 0, None, None)
    end = max(g.end for g in groups)
    if backend != "cpu":
        return PreparedGroups(groups, end, widths, None)
    module = _module(BACKENDS[backend])
    table = module.table_of(groups)
    if table is None or room is None:
        return PreparedGroups(groups, end, widths, table)
    return PreparedGroups(groups, end, widths, table, module.make_ready(table, widths, end, room))


def lora_add_prepared_(output: Tensor, x: Tensor, prepared: PreparedGroups, *, backend: str) -> Tensor:
    """`lora_add_` of what `prepare` gave for the same backend, while the matrices are where they were then.

    Args:
        output: [..., E_out], whose rows are those of [N, E_out].
        x: [..., E_in].
        prepared: the groups.
        backend: as for `lora_add_`.
    """
    if prepared.ready is not None and _module(BACKENDS[backend]).add_ready(output, x, prepared.ready):
        return output
    # A view: what is added to a copy would be lost.
    _add_prepared(output.view(-1, output.shape[-1]), x.flatten(0, -2), prepared, backend)
    return output


def _add_prepared(output: Tensor, x: Tensor, prepared: PreparedGroups, backend: str) -> Tensor:
    widths = prepared.widths
    if widths is None:
        return lora_add_(output, x, prepared.groups, backend=backend)
    _check_inputs(output, x)
    if widths != (x.shape[1], output.shape[1]) or prepared.end > x.shape[0]:
        for group in prepared.groups:
            _check(group, x.shape[0], (x.shape[1], output.shape[1]))
    module = _module(BACKENDS[backend])
    if prepared.table is None or not module.add_by_table(output, x, prepared.table):
        module.lora_add_(output, x, prepared.groups)
    return output


def _check_inputs(output: Tensor, x: Tensor) -> None:
    if output.dim() != 2 or x.dim() != 2 or output.shape[0] != x.shape[0]:
        raise ValueError(
            f"lora_add_: output {tuple(output.shape)} and x {tuple(x.shape)} must be [N, E_out] and [N, E_in]"
        )


def _check(group: LoraGroup, rows: int, widths: tuple[int, int]) -> None:
    if not 0 <= group.first <= group.end <= rows:
        raise ValueError(f"lora_add_: rows {group.first} to {group.end} of {rows}")
    if group.facts is not None and group.facts.widths == widths:
        return
    a, b = group.a.shape, group.b.shape
    if len(a) != 2 or len(b) != 2 or (a[1], b[0]) != widths or a[0] != b[1]:
        raise ValueError(
            f"lora_add_: a {tuple(a)} and b {tuple(b)} must be [rank, {widths[0]}] and [{widths[1]}, rank]"
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
        first, end, a, b, bias, scaling, _ = group
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
