"""Which rows of a step meet which LoRA matrices, made ready for all layers of a model at once.

Between two layers' products the caches hold weights, and Python is several times as slow as in a loop. So the first
layer of a step to ask has the groups of all of them made.
"""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

from torch import Tensor, nn

from hf_paged.engine.adapters import Selection
from hf_paged.errors import WeightsChangedError
from hf_paged.kernels.lora_matmul import LoraFacts, LoraGroup, PreparedGroups, prepare
from hf_paged.step import StepInputs

Runs = list[tuple[Selection | None, int, int]]


class _Known(NamedTuple):
    """What is known of an adapter's matrices in one layer, as long as these are where they were. Holds them weakly."""

    a: weakref.ref[Tensor]
    b: weakref.ref[Tensor]
    bias: weakref.ref[Tensor] | None
    facts: LoraFacts

    def holds(self, a: Tensor, b: Tensor, bias: Tensor | None) -> bool:
        if self.a() is not a or self.b() is not b or (None if self.bias is None else self.bias()) is not bias:
            return False
        at_a, at_b, at_bias = self.facts.addresses
        return a.data_ptr() == at_a and b.data_ptr() == at_b and (bias is None or bias.data_ptr() == at_bias)


class _Layer(NamedTuple):
    module: weakref.ref[nn.Module]
    known: dict[str, _Known]  # by the adapter's name


class LoraLayers:
    """The layers of one model that compute their base once for all rows, each held weakly."""

    def __init__(self) -> None:
        self._layers: dict[int, _Layer] = {}  # by id

    def add(self, layer: nn.Module) -> None:
        self._layers[id(layer)] = _Layer(weakref.ref(layer), {})

    def remove(self, key: int) -> None:
        """Forgets the layer that had this id, if it was one of them."""
        self._layers.pop(key, None)

    def look_again(self) -> None:
        """Matrices may have been changed in a way that leaves no trace."""
        for layer in self._layers.values():
            layer.known.clear()

    def groups(self, layer: nn.Module, step: StepInputs, parts: Runs) -> PreparedGroups | None:
        """The groups of `layer` for rows that belong to `parts`; None: none of them has an adapter there.

        Those of all layers for all tokens are in `step.adapters.prepared` once one layer has asked, of those layers
        whose adapters in the step are all plain.
        """
        runs, key = step.adapters, id(layer)
        if runs is None or parts is not runs.tokens:
            return self._of(key, layer, parts, step.backend)
        if not runs.prepared:
            for one_key, one in list(self._layers.items()):
                module: Any = one.module()
                if module is not None and not module.merged_adapters and are_plain(module, parts):
                    runs.prepared[one_key] = self._of(one_key, module, parts, step.backend, runs.room)
        if key not in runs.prepared:
            runs.prepared[key] = self._of(key, layer, parts, step.backend, runs.room)
        return runs.prepared[key]

    def _of(
        self, key: int, layer: Any, parts: Runs, backend: str, room: list[Tensor] | None = None
    ) -> PreparedGroups | None:
        entry = self._layers.get(key)
        known = {} if entry is None else entry.known
        modules, scaling = layer._modules, layer.scaling
        all_a, all_b = modules["lora_A"]._modules, modules["lora_B"]._modules
        groups = []
        for selection, first, end in parts:
            for name in applied(layer, selection):
                module_a, module_b = all_a.get(name), all_b.get(name)
                if module_a is None or module_b is None:
                    continue
                in_b = module_b._parameters
                a, b, bias = module_a._parameters["weight"], in_b["weight"], in_b["bias"]
                found = known.get(name)
                if found is None or not found.holds(a, b, bias):
                    found = _look(known, name, a, b, bias)
                facts = None if found is None else found.facts
                groups.append(LoraGroup(first, end, a, b, bias, scaling[name], facts))
        return prepare(groups, backend=backend, room=room) if groups else None


def are_plain(layer: Any, parts: Runs) -> bool:
    """Whether no adapter of `parts` has a variant of LoRA's forward in this layer."""
    variants = layer.lora_variant
    if not variants:
        return True
    selected = (layer.active_adapters if selection is None else selection.names for selection, _, _ in parts)
    return not any(name in variants for names in selected for name in names)


def applied(layer: Any, selection: Selection | None) -> Any:
    """The adapters `layer` applies to tokens of `selection`.

    Raises:
        WeightsChangedError: the selection is one of its own, and adapters are merged into the weights.
    """
    if selection is None:
        return () if layer.merged or layer.disable_adapters else layer.active_adapters
    if layer.merged_adapters:
        refuse_merged(layer)
    return selection.names


def refuse_merged(layer: Any) -> None:
    """
    Raises:
        WeightsChangedError: adapters are merged into the weights of `layer`.
    """
    if vars(layer).get("merged_adapters"):
        raise WeightsChangedError(
            f"adapters {layer.merged_adapters} were merged into the weights while requests ran"
        )


def _look(known: dict[str, _Known], name: str, a: Tensor, b: Tensor, bias: Tensor | None) -> _Known | None:
    """Of matrices that are new or elsewhere; None for odd ones, which are looked at each time."""
    facts = LoraFacts.of(a, b, bias)
    if not facts.is_plain:
        known.pop(name, None)
        return None
    in_bias = None if bias is None else weakref.ref(bias)
    found = known[name] = _Known(weakref.ref(a), weakref.ref(b), in_bias, facts)
    return found
