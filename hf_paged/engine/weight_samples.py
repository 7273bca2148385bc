"""What tells the tensors of a model from others, and a few of their numbers: read before every call.

A call of one token on a small model takes two milliseconds, in which there is no room for a loop of Python over the
tensors: what can be is asked by functions of C for all of them, and their numbers are read at one go.
"""

from __future__ import annotations

import ctypes
import functools
from array import array
from collections.abc import Callable, Iterable
from itertools import chain, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["PLAIN_TENSORS", "SAMPLES", "Samples", "number_places", "version_of"]

PLAIN_TENSORS = (Tensor, nn.Parameter)
#: Values read from each tensor; a change that leaves all of them as they were goes unnoticed unless `_version` tells.
SAMPLES = 4
_UNITS: dict[int, Any] = {1: ctypes.c_int8, 2: ctypes.c_int16, 4: ctypes.c_int32, 8: ctypes.c_int64}
#: Below this no process has memory.
_FIRST_ADDRESS = 4096


def _getter(name: str) -> Callable[[Tensor], Any]:
    return vars(torch._C.TensorBase)[name].__get__


#: `tensor._version` without a frame of Python for each. Raises RuntimeError for tensors of inference mode.
version_of: Callable[[Tensor], int] = _getter("_version")
_dtype_of, _device_of = _getter("dtype"), _getter("device")
_address_of, _numel_of = torch._C.TensorBase.data_ptr, torch._C.TensorBase.numel
_is_contiguous = torch._C.TensorBase.is_contiguous


class Samples:
    """Remembers where the numbers lie that it reads.

    Addresses are kept, not tensors, and used only for tensors that are still where and as large as they were.
    """

    def __init__(self) -> None:
        self._known: tuple[list[Any], _Places] | None = None  # one object: callers in threads share it

    def read(self, tensors: Iterable[Tensor], steps_of: dict[int, int] | None = None) -> bytes:
        """What tells `tensors`, and the numbers read of those that are in a CPU's memory.

        Args:
            steps_of: id of a tensor -> optimizer steps it took part in.
        """
        tensors = list(tensors)
        ids = list(map(id, tensors))
        versions = _versions(tensors)
        try:
            identity = [ids, list(map(_address_of, tensors)), list(map(_numel_of, tensors))]
        except RuntimeError:  # sparse ones
            return _read_one_by_one(tensors, versions, steps_of)
        kinds = [list(map(_dtype_of, tensors)), list(map(_device_of, tensors))]
        kinds.append(list(map(_is_contiguous, tensors)))
        known = self._known
        if known is None or known[0] != [*identity, *kinds]:
            known = self._known = [*identity, *kinds], _Places(tensors)
        facts = array("q", chain(versions, *identity, map(hash, map(tuple, kinds))))
        if steps_of and any(steps := list(map(steps_of.get, ids, repeat(0)))):  # not those of other models
            facts.extend(steps)
        return facts.tobytes() + known[1].read(tensors)


class _Places:
    """Where the numbers of some tensors lie."""

    def __init__(self, tensors: list[Tensor]) -> None:
        places: dict[int, list[int]] = {}
        self._others: list[int] = []  # on a CPU, but no plain memory
        for i, tensor in enumerate(tensors):
            if tensor.device.type != "cpu" or not tensor.numel():
                continue
            address, unit = tensor.data_ptr(), min(tensor.dtype.itemsize, 8)
            is_plain = type(tensor) in PLAIN_TENSORS and tensor.is_contiguous()
            if not is_plain or address < _FIRST_ADDRESS or address % unit:  # 0: its storage was let go
                self._others.append(i)
                continue
            offsets = _offsets(tensor.numel(), tensor.dtype)
            places.setdefault(unit, []).extend((address - _FIRST_ADDRESS + o) // unit for o in offsets)
        # A view of memory, and indices into it.
        self._plain = [(_memory(unit), np.array(found, np.int64)) for unit, found in places.items()]

    def read(self, tensors: list[Tensor]) -> bytes:
        parts = [memory[indices].tobytes() for memory, indices in self._plain]
        return b"".join([*parts, *(_numbers(tensors[i]) for i in self._others)])


def _versions(tensors: list[Tensor]) -> list[int]:
    try:
        return list(map(version_of, tensors))
    except RuntimeError:  # those of inference mode have none
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]


@functools.cache
def _memory(unit: int) -> np.ndarray:
    """The memory of this process as integers of `unit` bytes, the first of them at `_FIRST_ADDRESS`."""
    whole = (_UNITS[unit] * ((1 << 62) // unit)).from_address(_FIRST_ADDRESS)
    return np.frombuffer(whole, np.dtype(f"i{unit}"))


def _offsets(numel: int, dtype: torch.dtype) -> list[int]:
    """Bytes from the first number of a tensor to those that are read; of a complex number the real part is."""
    stride = max(1, (numel - 1) // SAMPLES)
    return [i * dtype.itemsize for i in range(0, numel, stride)[: SAMPLES + 1]]


def number_places(address: int, numel: int, dtype: torch.dtype) -> list[Any]:
    """Objects whose `value` is a number at that moment, as an int."""
    unit = _UNITS[min(dtype.itemsize, 8)]
    return [unit.from_address(address + offset) for offset in _offsets(numel, dtype)]


def _read_one_by_one(tensors: list[Tensor], versions: list[int], steps_of: dict[int, int] | None) -> bytes:
    """`Samples.read` for tensors that cannot all be asked for an address."""
    parts: list[bytes] = []
    for tensor, version in zip(tensors, versions, strict=True):
        key = id(tensor)
        facts = [key, version, hash((tensor.dtype, tensor.device)), (steps_of or {}).get(key, 0)]
        is_memory = tensor.layout is torch.strided and tensor.device.type != "meta"
        parts.append(array("q", [*facts, tensor.data_ptr() if is_memory else 0]).tobytes())
        if is_memory and tensor.device.type == "cpu":
            parts.append(_numbers(tensor))
    return b"".join(parts)


def _numbers(tensor: Tensor) -> bytes:
    """The numbers of a tensor that is no plain memory."""
    flat = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    flat = flat.view(-1) if flat.is_contiguous() else flat.flatten()
    stride = max(1, (flat.numel() - 1) // SAMPLES)
    return array("d", flat[::stride][: SAMPLES + 1].tolist()).tobytes()
