"""Noticing that weights changed, so that KV computed with old ones is never used with new ones.

`_version` alone misses fused optimizers, `.data` edits and adapter merges, so the version also covers storage
addresses, the optimizer steps each tensor took part in, a sample of values of each tensor, and what is merged; and of
modules without weights (activations) which they are, and the float options of all (an epsilon, the scale of attention).
`optimizer_steps` counts those of the whole process, for optimizers that work on copies. Adapters
have versions of their own: loading or changing one leaves prefixes of the others and of the base model.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_paged.engine.adapters import adapter_facts, containers, entries, is_adapter_layer
from hf_paged.engine.weight_samples import Samples

_optimizer_steps = 0
_steps_of: dict[int, int] = {}  # id of a tensor -> optimizer steps it took part in
_hook_lock = threading.Lock()
_hook_installed = False

#: Rotary embeddings that make other frequencies as longer sequences come: these change nothing that is cached.
_GROWING_ROPE = ("dynamic", "longrope")
_float_options: dict[type, tuple[str, ...]] = {}  # class of modules -> their attributes that are floats


def watch_optimizers() -> None:
    """Counts optimizer steps of the whole process from now on. Installed once, costs nothing between steps."""
    global _hook_installed
    with _hook_lock:
        if not _hook_installed:
            register_optimizer_step_post_hook(_count_step)
            _hook_installed = True


def _count_step(optimizer: Any, *_args: Any) -> None:
    global _optimizer_steps
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            _steps_of[id(tensor)] = _steps_of.get(id(tensor), 0) + 1
    _optimizer_steps += 1


def optimizer_steps() -> int:
    """Steps of all optimizers of this process since `watch_optimizers`."""
    return _optimizer_steps


def weights_version(modules: Iterable[nn.Module], samples: Samples | None = None) -> bytes:
    """A digest (32 bytes) that differs when a weight, buffer or float option outside of adapters does, or a merge.

    `modules` are those of `adapters.base_modules`. Cost is a few microseconds a tensor; less with the `samples` of the
    call before. CUDA values are not sampled here: that would wait for the device.
    """
    tensors: list[Tensor] = []
    merged: list[Any] = []
    parts: list[Any] = []
    for module in modules:
        state = module.__dict__
        if state["_parameters"]:
            tensors.extend([p for p in state["_parameters"].values() if p is not None])
        elif not state["_modules"]:
            parts += (id(module), id(type(module)))
        if state["_buffers"]:
            tensors.extend(buffers_of(state))
        # An attribute of PEFT's tuner layers only; the model itself has methods named like their other attributes.
        if "merged_adapters" in state:
            merged.append(module.merged_adapters)
            continue
        names = _float_options.get(type(module))
        if names is None:
            names = _float_options[type(module)] = _float_names(module)
        if names:
            parts += [state.get(name) for name in names]
    return _digest(tensors, (merged if any(merged) else None, parts), samples)


def buffers_of(state: dict[str, Any]) -> list[Tensor]:
    """The buffers of a module with this `__dict__` that what it computes depends on."""
    growing = state.get("rope_type") in _GROWING_ROPE
    derived = state.get("_non_persistent_buffers_set", ())
    # Derived booleans are masks, which no step reads.
    return [
        b
        for n, b in state["_buffers"].items()
        if b is not None and not (n in derived and (growing or b.dtype is torch.bool))
    ]


def _float_names(module: nn.Module) -> tuple[str, ...]:
    if isinstance(module, _DropoutNd):
        return ()
    return tuple(n for n, v in vars(module).items() if type(v) is float and "dropout" not in n)


def adapters_version(modules: Iterable[nn.Module], names: tuple[str, ...] | None) -> bytes:
    """The same for the adapters `names`: their weights, ranks and scaling in every layer.

    With None for all adapters there are, and for which of them are active and disabled, layer by layer.
    """
    tensors: list[Tensor] = []
    facts: list[object] = [names]
    for layer in modules:
        if not is_adapter_layer(layer):
            continue
        if names is None:
            facts.append((vars(layer).get("_active_adapter"), vars(layer).get("_disable_adapters")))
            own = dict.fromkeys(name for container in containers(layer) for name in tuple(entries(container)))
        else:
            own = dict.fromkeys(names)
        for name in own:
            found, options = adapter_facts(layer, name)
            tensors.extend(found)
            facts.append(options)
    return _digest(tensors, facts, None) if len(facts) > 1 else b""


def _digest(tensors: list[Tensor], others: object, samples: Samples | None) -> bytes:
    digest = hashlib.sha256((samples or Samples()).read(tensors, _steps_of))
    digest.update(repr(others).encode())
    return digest.digest()
