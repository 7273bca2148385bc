"""Assistant models, paged for as long as somebody drafts with them."""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass
from typing import Any

from hf_paged.engine import registry
from hf_paged.errors import UnsupportedModelError
from hf_paged.patches import registry as patches
from hf_paged.patches.apply import AppliedPatch, LayerGeometry, apply
from hf_paged.patches.first_layers import first_layers

_lock = threading.RLock()
_applied: weakref.WeakKeyDictionary[Any, _Shared] = weakref.WeakKeyDictionary()


@dataclass
class _Shared:
    patch: AppliedPatch
    num_leases: int = 0


class AssistantLease:
    """A patch on an assistant: the one it has where it is enabled itself, else one for the time of the lease."""

    def __init__(self, model: Any) -> None:
        spec = patches.find(model)
        self.position_limit = spec.position_limit(model)
        self._model: Any = None
        enabled = registry.get(model)
        if enabled is not None:
            self.patch: Any = enabled.patch
            return
        with _lock:
            shared = _applied.get(model)
            if shared is None:
                shared = _applied[model] = _Shared(apply(model, spec))
            shared.num_leases += 1
            self.patch, self._model = shared.patch, model

    def release(self) -> None:
        """Takes the patch off after the last lease. Again does nothing."""
        model, self._model = self._model, None
        if model is None:
            return
        with _lock:
            shared = _applied[model]
            shared.num_leases -= 1
            if not shared.num_leases:
                shared.patch.revert()
                del _applied[model]


class FirstLayersLease:
    """The patch of an enabled model, as far as its first layers go."""

    def __init__(self, model: Any, patch: AppliedPatch, num_layers: int) -> None:
        self.position_limit = patch.spec.position_limit(model)
        self.patch = _FirstLayersPatch(patch, num_layers)

    def release(self) -> None:
        """The patch stays: it is the model's."""


class _FirstLayersPatch:
    def __init__(self, patch: AppliedPatch, num_layers: int) -> None:
        self._patch = patch
        self._num_layers = num_layers
        self.owner = patch.owner

    def layer_geometry(self) -> list[LayerGeometry]:
        return self._patch.layer_geometry()[: self._num_layers]


class Assistants:
    """What an engine asks about assistant models."""

    def first_layers(self, model: Any, patch: Any, num_layers: int) -> tuple[Any, FirstLayersLease]:
        return first_layers(model, patch.spec, num_layers), FirstLayersLease(model, patch, num_layers)

    def borrow(self, model: Any) -> AssistantLease:
        return AssistantLease(model)

    def problems(self, model: Any) -> list[str]:
        """Why `model` cannot draft; empty when it can."""
        try:
            lease = self.borrow(model)
        except UnsupportedModelError as error:
            return [str(error)]
        try:
            return [f"{code}: {text}" for code, text in lease.patch.reasons()]
        finally:
            lease.release()
