"""Adapters in host memory: taken out of the model whole, and put back as they were without PEFT's loader.

Only LoRA that steps compute in groups is parked: all its layers keep of it lies under its name in tables that they
declare, so that taking it out and putting it back is the same for any of them. A parked adapter is the very objects
that were in the model; PEFT sees a model that it was deleted from, and later one that has it again.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hf_paged.engine.memory import available_bytes
from hf_paged.engine.weight_samples import Samples
from hf_paged.integrations.peft_tuners import is_grouped

__all__ = ["HostMover", "Mover", "Parked", "host_budget"]

#: The share of the host's memory that parked adapters take where nobody has said how much they may.
_SHARE = 8


class Mover(Protocol):
    """Moves the numbers of a tensor, bit for bit."""

    def to_host(self, tensor: Tensor) -> Tensor: ...
    def to_device(self, tensor: Tensor, device: torch.device) -> Tensor: ...


class HostMover:
    """Between a device and the host: pinned memory for CUDA. On the host there is nothing to move."""

    def to_host(self, tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.device.type == "cuda")
        return host.copy_(tensor)

    def to_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        # In the order of the stream that runs the step, which needs it next.
        return tensor.to(device, non_blocking=tensor.is_pinned()) if tensor.device != device else tensor


def host_budget(device: torch.device, most_bytes: int | None) -> int:
    """Bytes that parked adapters of a model on `device` may take: `most_bytes`, or an eighth of what is free now.

    On the host itself none by default: parked there, they would take the memory that the bound is meant to save.
    """
    if most_bytes is not None:
        return most_bytes
    return 0 if device.type == "cpu" else available_bytes("cpu") // _SHARE


class _Entry(NamedTuple):
    layer: weakref.ref[nn.Module]
    table: str  # the attribute of the layer that had it under the adapter's name
    value: Any


class Parked:
    """One adapter that is out of its model, its tensors in host memory.

    Args:
        name: of the adapter.
        config: PEFT's.
        entries: what its layers had of it.
        bases: of each layer where and what its base weight was.
        mover: moves tensors.
    """

    def __init__(
        self, name: str, config: Any, entries: list[_Entry], bases: list[tuple[Any, Any]], mover: Mover
    ) -> None:
        self._name, self._config, self._entries, self._bases = name, config, entries, bases
        self._mover = mover
        self._devices = [tensor.device for tensor in self._tensors()]
        for tensor in self._tensors():
            tensor.data = mover.to_host(tensor.data)
        self.num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self._tensors())
        self._samples = Samples()
        self._facts = self._samples.read(self._tensors())

    @classmethod
    def take_out(cls, holder: Any, name: str, layers: Iterable[Any], mover: Mover) -> Parked | None:
        """Takes adapter `name` out of the model; None, and the model as it was, for an adapter of another kind.

        Args:
            holder: the PeftModel, or model, that it was loaded into.
            name: it is not active.
            layers: the adapter layers of the model.
            mover: moves tensors.
        """
        config = (getattr(holder, "peft_config", None) or {}).get(name)
        entries, bases = [], []
        for layer in layers:
            own = [(table, layer_table[name]) for table, layer_table in _tables(layer) if name in layer_table]
            if not own:
                continue
            if not is_grouped(layer, name):
                return None
            bases.append((weakref.ref(layer), _place(layer)))
            entries += [_Entry(weakref.ref(layer), table, value) for table, value in own]
        if config is None or not entries or not _is_within_layers(config):
            return None
        holder.delete_adapter(name)
        return cls(name, config, entries, bases, mover)

    def has_changed(self) -> bool:
        """Whether somebody who held its tensors has edited them since."""
        return self._samples.read(self._tensors()) != self._facts

    def put_back(self, holder: Any, layers: Iterable[Any]) -> bool:
        """Puts it into the model it was taken from. False, with nothing done, where that has other layers now."""
        present = {id(layer) for layer in layers}
        configs = getattr(holder, "peft_config", None)
        if not isinstance(configs, dict) or self._name in configs:
            return False
        for reference, place in self._bases:
            layer = reference()
            if layer is None or id(layer) not in present or _place(layer) != place:
                return False
        for tensor, device in zip(self._tensors(), self._devices, strict=True):
            tensor.data = self._mover.to_device(tensor.data, device)
        for reference, table, value in self._entries:
            layer = reference()
            if isinstance(value, nn.Module):
                value.train(layer.training)  # type: ignore[union-attr]
            getattr(layer, table)[self._name] = value
        configs[self._name] = self._config
        return True

    def _tensors(self) -> Iterator[Tensor]:
        for entry in self._entries:
            if isinstance(entry.value, Tensor):
                yield entry.value
            elif isinstance(entry.value, nn.Module):
                yield from entry.value.parameters()
                yield from entry.value.buffers()


def _tables(layer: Any) -> Iterator[tuple[str, Any]]:
    """The tables of a layer that are by name of adapter, as PEFT's own `delete_adapter` goes through them."""
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        table = getattr(layer, attribute, None)
        if isinstance(table, dict | nn.ModuleDict | nn.ParameterDict):
            yield attribute, table


def _place(layer: Any) -> tuple[torch.device, torch.dtype]:
    """What PEFT's loader fits a new adapter to."""
    weight = layer.get_base_layer().weight
    return weight.device, weight.dtype


def _is_within_layers(config: Any) -> bool:
    """Whether an adapter has nothing but matrices in LoRA layers."""
    beside = ("modules_to_save", "trainable_token_indices", "target_parameters", "ensure_weight_tying")
    return getattr(config, "bias", "none") == "none" and not any(getattr(config, k, None) for k in beside)
