"""Noticing that weights changed, so that KV computed with old ones is never used with new ones.

`_version` alone misses fused optimizers, `.data` edits and adapter merges, so the version also covers storage
addresses, a counter raised after every optimizer step of the process, a sample of values of each tensor, and
what is merged. Adapters have versions of their own: loading or changing one leaves prefixes of the others and
of the base model.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from hf_paged.engine.adapters import adapter_facts, base_modules, containers, entries, is_adapter_layer

_optimizer_steps = 0
_hook_lock = threading.Lock()
_hook_installed = False

#: Values read from each tensor; a change that leaves all of them as they were goes unnoticed unless `_version` tells.
_SAMPLES = 4


def watch_optimizers() -> None:
    """Counts optimizer steps of the whole process from now on. Installed once, costs nothing between steps."""
    global _hook_installed
    with _hook_lock:
        if not _hook_installed:
            register_optimizer_step_post_hook(_count_step)
            _hook_installed = True


def _count_step(*_args: Any) -> None:
    global _optimizer_steps
    _optimizer_steps += 1


def weights_version(model: nn.Module) -> bytes:
    """A digest (32 bytes) that differs when a weight or saved buffer outside of adapters does, or what is merged.

    Cost is a few microseconds a tensor. CUDA values are not sampled here: that would wait for the device.
    """
    tensors: list[Tensor] = []
    merged = []
    for module in base_modules(model):
        tensors.extend(p for p in module._parameters.values() if p is not None)
        # Buffers that are not saved are derived (RoPE frequencies grow with the longest forward): they are no weights.
        derived = vars(module).get("_non_persistent_buffers_set", ())
        tensors.extend(b for name, b in module._buffers.items() if b is not None and name not in derived)
        # An attribute of PEFT's tuner layers only; the model itself has methods named like their other attributes.
        if "merged_adapters" in module.__dict__:
            merged.append(module.merged_adapters)
    return _digest(tensors, merged if any(merged) else None)


def adapters_version(model: nn.Module, names: tuple[str, ...] | None) -> bytes:
    """The same for the adapters `names`: their weights, ranks and scaling in every layer.

    With None for all adapters there are, and for which of them are active and disabled, layer by layer.
    """
    tensors: list[Tensor] = []
    facts: list[object] = [names]
    for layer in base_modules(model):
        if not is_adapter_layer(layer):
            continue
        if names is None:
            facts.append((vars(layer).get("_active_adapter"), vars(layer).get("_disable_adapters")))
            own = dict.fromkeys(name for container in containers(layer) for name in entries(container))
        else:
            own = dict.fromkeys(names)
        for name in own:
            found, options = adapter_facts(layer, name)
            tensors.extend(found)
            facts.append(options)
    return _digest(tensors, facts) if len(facts) > 1 else b""


def _digest(tensors: list[Tensor], others: object) -> bytes:
    facts = array("q", [_optimizer_steps])
    values: list[float] = []
    for tensor in tensors:
        facts.append(id(tensor))
        if tensor.device.type == "meta":
            continue
        facts.append(tensor.data_ptr())
        facts.append(-1 if tensor.is_inference() else tensor._version)
        facts.append(hash((tensor.dtype, tensor.device)))
        if tensor.device.type == "cpu" and tensor.layout is torch.strided:
            values.extend(_sample(tensor.detach()))
    digest = hashlib.sha256(facts.tobytes())
    digest.update(array("d", values).tobytes())
    digest.update(repr(others).encode())
    return digest.digest()


def _sample(tensor: Tensor) -> list[float]:
    numel = tensor.numel()
    if not numel:
        return []
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.flatten()[: _SAMPLES + 1]
    return flat[:: max(1, (flat.numel() - 1) // _SAMPLES)][: _SAMPLES + 1].tolist()
