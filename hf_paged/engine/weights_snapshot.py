"""A model's tensors as they were at one moment, kept so that a look tells whether they still are."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.engine.adapters import base_modules, is_adapter_layer
from hf_paged.engine.weight_samples import PLAIN_TENSORS, SAMPLES, number_places
from hf_paged.engine.weights import buffers_of


class WeightsSnapshot:
    """Which modules and tensors there were, where their storage lay, and some of their numbers.

    Each `holds` looks at the next eighth of it and costs about half a microsecond a tensor there. It reads one
    number of each, another one each round; an edit that changes whole tensors is seen within eight looks, one of
    single elements maybe never, as with `weights_version`.
    """

    _PARTS = 8

    def __init__(self, model: nn.Module) -> None:
        tables: list[tuple[dict, list]] = []
        tensors: list[Tensor] = []
        for module in base_modules(model):
            state = module.__dict__
            for table in (state["_modules"], state["_parameters"], state["_buffers"]):
                tables.append((table, list(table.values())))
            tensors.extend(_tensors(state))
        entries = [(tensor, tensor.data_ptr(), _places(tensor)) for tensor in tensors]
        self._parts = [_Part(tables[i :: self._PARTS], entries[i :: self._PARTS]) for i in range(self._PARTS)]
        self._looks = 0

    @classmethod
    def of(cls, model: nn.Module) -> WeightsSnapshot | None:
        """None where a snapshot would not tell enough: with adapters, or tensors that are no plain memory."""
        for module in base_modules(model):
            if is_adapter_layer(module) or not all(map(_is_plain, _tensors(module.__dict__))):
                return None
        return cls(model)

    def holds(self) -> bool:
        """Whether nothing it looks at this time has changed since."""
        turn, part = divmod(self._looks, self._PARTS)
        self._looks = (self._looks + 1) % (self._PARTS * (SAMPLES + 1))
        return self._parts[part].holds(turn)


class _Part:
    """Some tables of modules, and some tensors with their addresses and where their numbers lie."""

    def __init__(self, tables: list[tuple[dict, list]], tensors: list[tuple[Tensor, int, list[Any]]]) -> None:
        self._tables = tables
        self._tensors = tensors
        self._numbers = [self._read(turn) for turn in range(SAMPLES + 1)]

    def holds(self, turn: int) -> bool:
        for table, values in self._tables:
            if len(table) != len(values) or not all(map(operator.is_, table.values(), values)):
                return False
        return self._read(turn) == self._numbers[turn]

    def _read(self, turn: int) -> list[int] | None:
        """One number of each tensor; None if one has other storage now. Its old address is not read then."""
        numbers = []
        for tensor, address, places in self._tensors:
            if tensor.data_ptr() != address:
                return None
            if places:
                numbers.append(places[turn % len(places)].value)
        return numbers


def _tensors(state: dict[str, Any]) -> Iterator[Tensor]:
    yield from (p for p in state["_parameters"].values() if p is not None)
    yield from buffers_of(state)


def _is_plain(tensor: Tensor) -> bool:
    if (
        type(tensor) not in PLAIN_TENSORS
        or tensor.layout is not torch.strided
        or tensor.device.type == "meta"
    ):
        return False
    return tensor.device.type != "cpu" or tensor.is_contiguous()


def _places(tensor: Tensor) -> list[Any]:
    """Of a tensor on a device only the address is looked at: its numbers would have to be waited for."""
    if tensor.device.type != "cpu" or not tensor.data_ptr():
        return []
    return number_places(tensor.data_ptr(), tensor.numel(), tensor.dtype)
