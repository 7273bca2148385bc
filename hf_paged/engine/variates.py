"""Exponential variates for some rows of a draw, bit for bit those that `Tensor.exponential_` makes for all rows.

On a CPU that makes a variate of a uniform of 53 bits, with one logarithm after another: these take four fifths of its
time. Here the generator moves over all uniforms, so that it stands where it would (`kernels.cpu_uniform`: those of
other rows need not be made for that), and logarithms are taken of the wanted rows only, many at a time. Vectorised
logarithms differ in the last bits of float64 from those of the C library, which decides about one float32 in 10^8:
where it might, the C library is asked.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from hf_paged.kernels.cpu_uniform import negated_in_float32, uniform_rows

__all__ = ["exponential", "exponential_rows"]

#: Bits by which float64 is longer than float32, and by how many units of its last two logarithms may differ.
_DROPPED_BITS, _MARGIN = 29, 8


def exponential(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """What `torch.empty(shape).exponential_(generator=generator)` gives."""
    if not _is_quicker(dtype, generator.device):
        return _plainly(shape, dtype, generator)
    uniforms = uniform_rows(range(shape[0]), shape, generator)
    return _of_uniforms(_uniforms(shape, generator) if uniforms is None else uniforms)


def exponential_rows(
    rows: Sequence[int], shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    """[len(rows), shape[1]]: `exponential(shape, ...)[rows]`, and the generator stands where that leaves it."""
    if not _is_quicker(dtype, generator.device):
        return _plainly(shape, dtype, generator)[rows]
    uniforms = uniform_rows(rows, shape, generator)
    return _of_uniforms(_uniforms(shape, generator)[rows] if uniforms is None else uniforms)


def _plainly(shape: tuple[int, int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=generator.device).exponential_(generator=generator)


def _uniforms(shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    return torch.empty(shape, dtype=torch.float64).uniform_(generator=generator)


def _is_quicker(dtype: torch.dtype, device: torch.device) -> bool:
    return dtype is torch.float32 and device.type == "cpu" and _makes_them_of_uniforms()


@functools.cache
def _makes_them_of_uniforms() -> bool:
    """Whether this build of torch makes variates as it is said above. Some have made them with MKL's generators."""
    shape = (5, 1021)
    ours, theirs = (torch.Generator().manual_seed(2**31 - 1) for _ in range(2))
    made = _of_uniforms(_uniforms(shape, ours))
    return torch.equal(made, _plainly(shape, torch.float32, theirs)) and torch.equal(
        ours.get_state(), theirs.get_state()
    )


def _of_uniforms(uniforms: Tensor) -> Tensor:  # float64 in [0, 1), not kept -> float32
    negated = uniforms.neg_()
    logarithms = torch.log1p(negated)
    # Mostly none is near: one pass in place of six.
    rounded = negated_in_float32(logarithms, _MARGIN)
    return _rounded(logarithms.neg_(), negated) if rounded is None else rounded


def _rounded(variates: Tensor, negated: Tensor) -> Tensor:
    """`variates` [n, m] float64, right to a few units in the last place, in float32 as if they were those of the
    C library; `negated` are the uniforms they are of, with a minus."""
    # A number is rounded up or down by its dropped bits; it is close where these are about half of what they can be.
    bits = variates.view(torch.int64) + ((1 << (_DROPPED_BITS - 1)) + _MARGIN)
    close = bits.bitwise_and_((1 << _DROPPED_BITS) - 1) < 2 * _MARGIN
    rounded = variates.float()
    if close.any():
        exact = [-math.log1p(number) for number in negated[close].tolist()]
        rounded[close] = torch.tensor(exact, dtype=torch.float64).float()
    return rounded
