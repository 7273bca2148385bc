"""Puts a family's patch on one model and takes it off again.

`apply(model, spec)` binds every attention layer or none. `AppliedPatch` then answers what the engine must
know about the model as it is now (layers, dtypes, devices, what makes native execution unsafe), however it
was moved or changed meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.errors import ConfigError, UnsupportedModelError
from hf_paged.patches import safety
from hf_paged.patches.attention import bind, bind_step_forward, is_bound
from hf_paged.patches.deterministic import find_deterministic, problem
from hf_paged.patches.fused import find_fused
from hf_paged.patches.instance import InstancePatch
from hf_paged.patches.last_block import find_last_block, least_cut, short_form
from hf_paged.patches.registry import PatchSpec

__all__ = ["AppliedPatch", "InstancePatch", "LayerGeometry", "apply"]

_KV_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PLAIN_DTYPES = (*_KV_DTYPES, torch.float64)


@dataclass(frozen=True)
class LayerGeometry:
    """What one layer's KV blocks look like and where they live."""

    num_kv_heads: int  # H_kv
    num_heads: int  # H
    head_dim: int  # D
    dtype: torch.dtype  # of the keys the layer makes outside of autocast
    device: torch.device


class _Owner:
    """Unique identity of one applied patch. Steps carry it; layers compare it."""


class AppliedPatch:
    """A patch in place on one model, which it holds weakly."""

    def __init__(
        self,
        model: nn.Module,
        spec: PatchSpec,
        layers: list[nn.Module],
        owner: object,
        *,
        deterministic: bool = False,
    ) -> None:
        self.spec = spec
        self.deterministic = deterministic
        self.owner = owner
        self._model = weakref.ref(model)
        self._layers = [weakref.ref(layer) for layer in layers]
        #: What was found last, by layer: this is asked several times a call.
        self._geometry: weakref.WeakKeyDictionary[nn.Module, LayerGeometry] = weakref.WeakKeyDictionary()
        #: `layer_geometry` as `reasons` saw it last.
        self.geometry: tuple[LayerGeometry, ...] = ()
        #: See `patches.last_block`; None: the last block has no short form.
        self.least_cut: int | None = None
        self._patches: list[InstancePatch] = []
        self._forwards: dict[int, Any] = {}
        self._adopted: dict[int, InstancePatch] = {}

    @property
    def model(self) -> Any:
        """The patched model.

        Raises:
            ReferenceError: it is gone.
        """
        model = self._model()
        if model is None:
            raise ReferenceError("the patched model is gone")
        return model

    def _new_patch(self, module: nn.Module) -> InstancePatch:
        patch = InstancePatch(module)
        self._patches.append(patch)
        return patch

    def adopt(self, module: nn.Module, in_step: Callable[..., Any]) -> None:
        """Binds `in_step(module, step, *args, **kwargs)` to a module that came to the model later."""
        patch = InstancePatch(module)
        self._forwards[id(module)] = bind_step_forward(patch, module, self.owner, in_step)
        self._adopted[id(module)] = patch

    def release(self, key: int) -> None:
        """Takes the binding off the adopted module whose id was `key`; it may be gone."""
        self._forwards.pop(key, None)
        self._adopted.pop(key).revert()

    def layer_geometry(self) -> list[LayerGeometry]:
        """The KV geometry of every layer, in layer order, as the model is now."""
        model = self.model
        default: Tensor | None = None
        geometry = []
        for layer in self.spec.find_attention_layers(model):
            weight = getattr(self.spec.key_projection(layer), "weight", None)
            if not isinstance(weight, Tensor) or weight.dtype not in _PLAIN_DTYPES:
                # A quantised projection: it gives back the dtype it is given, which is that of the
                # embeddings.
                if default is None:
                    default = model.get_input_embeddings().weight
                dtype = default.dtype
            else:
                dtype = weight.dtype
            device = weight.device if isinstance(weight, Tensor) else _device_of(layer, model)
            known = self._geometry.get(layer)
            if known is None or known.dtype is not dtype or known.device != device:
                shape = self.spec.attention_shape(layer)
                known = LayerGeometry(shape.num_kv_heads, shape.num_heads, shape.head_dim, dtype, device)
                self._geometry[layer] = known
            geometry.append(known)
        return geometry

    def reasons(self) -> list[tuple[str, str]]:
        """What makes native execution unsafe right now, as (code, text): the codes of `patches.safety`."""
        reasons = safety.find_reasons(self.model, self.spec, self._layers, self._forwards)
        self.geometry = tuple(self.layer_geometry())
        dtypes = {layer.dtype for layer in self.geometry} - set(_KV_DTYPES)
        if dtypes:
            reasons.append(("unsupported_dtype", f"keys and values of dtype {', '.join(map(str, dtypes))}"))
        if self.deterministic and (text := problem(self.model, self.spec, self._forwards)) is not None:
            reasons.append(("not_deterministic", text))
        return reasons

    def revert(self) -> None:
        """Takes the patch off: the model has every attribute as before. Again does nothing."""
        for patch in (*self._patches, *self._adopted.values()):
            patch.revert()
        self._patches.clear()
        self._adopted.clear()
        self._forwards.clear()


def apply(model: nn.Module, spec: PatchSpec, *, deterministic: bool = False) -> AppliedPatch:
    """Binds paged attention to every attention layer of `model`, or to none.

    Args:
        model: of the family of `spec`. It is not moved, converted or switched to another mode.
        spec: from `registry.find(model)`.
        deterministic: bind forms of the other modules whose result for a token depends on that token alone.

    Raises:
        ConfigError: `deterministic`, and a part of the model cannot be that.
        UnsupportedModelError: the model has no attention layers, or one is patched already (this model is
            enabled, or another enabled model shares the layer).
    """
    layers = spec.find_attention_layers(model)
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} has no attention layers")
    if deterministic and (text := problem(model, spec, None)) is not None:
        raise ConfigError(f"deterministic=True: {text}")
    owner = _Owner()
    applied = AppliedPatch(model, spec, layers, owner, deterministic=deterministic)
    try:
        for number, layer in enumerate(layers):
            if is_bound(layer):
                raise UnsupportedModelError(
                    f"attention layer {number} of this {type(model).__name__} is already patched: "
                    "it is enabled, or shares its layers with another enabled model"
                )
            patch = applied._new_patch(layer)
            applied._forwards[id(layer)] = bind(patch, layer, number, owner, spec.paged_forward)
        forms = dict(find_deterministic(model) if deterministic else find_fused(model))
        block = find_last_block(model, spec)
        if block is not None:
            forms[block] = short_form(block, len(layers) - 1, spec, forms.get(block))
            applied.least_cut = least_cut(block)
        for module, in_step in forms.items():
            applied._forwards[id(module)] = bind_step_forward(
                applied._new_patch(module), module, owner, in_step
            )
    except BaseException:
        applied.revert()
        raise
    return applied


def _device_of(layer: nn.Module, model: nn.Module) -> torch.device:
    for tensor in (*layer.parameters(), *layer.buffers(), *model.parameters()):
        return tensor.device
    return torch.device("cpu")
