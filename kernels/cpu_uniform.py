"""Uniforms of some rows of a draw from torch's generator on the CPU, which moves as if it had made all of them.

torch makes one number after another, 3.6 ns each. Most of a draw may be for rows that nobody looks at; they take a
twist of the generator's state, which uses vectors, and no more.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hf_paged.kernels.cpu_runtime import launch, loaded_kernels

__all__ = ["negated_in_float32", "uniform_rows"]

#: Bytes of `torch.Generator.get_state()` and where they hold what moves: int32 left, int64 next, 624 words as int64.
_SIZE, _LEFT, _NEXT, _WORDS = 5056, 8, 16, 24


def uniform_rows(rows: Sequence[int], shape: tuple[int, int], generator: torch.Generator) -> Tensor | None:
    """`torch.empty(shape, dtype=torch.float64).uniform_(generator=generator)[rows]`, and the generator stands there.

    Args:
        rows: distinct.

    Returns:
        [len(rows), shape[1]] float64; None, and nothing has moved, where the kernel is not to be had (yet), or where
        this torch has another generator than the one known here.
    """
    kernels = loaded_kernels("cpu_uniform_kernel", torch.float32)
    if kernels is None or generator.device.type != "cpu" or not _is_known():
        return None
    return _draw(kernels, rows, shape, generator)


def negated_in_float32(numbers: Tensor, margin: int) -> Tensor | None:
    """`-numbers`, contiguous float64, in float32.

    Returns:
        None where the kernel is not to be had (yet), or where a number is within `margin` units of its last place of
        the middle between two float32.
    """
    kernels = loaded_kernels("cpu_uniform_kernel", torch.float32)
    if kernels is None:
        return None
    output = torch.empty(numbers.shape, dtype=torch.float32)
    num_near = torch.empty(1, dtype=torch.int64)
    arguments = (numbers.data_ptr(), numbers.numel(), output.data_ptr(), margin, num_near.data_ptr())
    launch(kernels.negated_in_float32(), 1, arguments)
    return None if num_near.item() else output


def _draw(kernels: Any, rows: Sequence[int], shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    num_rows, size = shape
    targets = torch.full((num_rows,), -1, dtype=torch.int64)
    targets[rows] = torch.arange(len(rows))
    output = torch.empty(len(rows), size, dtype=torch.float64)
    state = generator.get_state()
    left, following = state[_LEFT : _LEFT + 4].view(torch.int32), state[_NEXT : _NEXT + 8].view(torch.int64)
    place = torch.tensor([int(following), int(left)])
    address = state.data_ptr() + _WORDS
    arguments = (address, place.data_ptr(), num_rows, size, targets.data_ptr(), output.data_ptr())
    launch(kernels.uniform_rows(), 1, arguments)
    following[0], left[0] = place[0], place[1]
    generator.set_state(state)
    return output


@functools.cache
def _is_known() -> bool:
    """Whether numbers and states are torch's own, on a draw that renews the state and begins and ends amid it."""
    kernels: Any = loaded_kernels("cpu_uniform_kernel", torch.float32)
    ours, theirs = (torch.Generator().manual_seed(2**31 - 1) for _ in range(2))
    if sys.byteorder != "little" or theirs.get_state().numel() != _SIZE:
        return False
    shape = (5, 203)
    for generator in (ours, theirs):
        torch.empty(3, dtype=torch.float32).uniform_(generator=generator)
    for rows in ([3, 0], [0, 1, 2, 3, 4]):
        whole = torch.empty(shape, dtype=torch.float64).uniform_(generator=theirs)
        if not torch.equal(_draw(kernels, rows, shape, ours), whole[rows]):
            return False
        if not torch.equal(ours.get_state(), theirs.get_state()):
            return False
    return True
