"""Noticing that weights changed, so that KV computed with old ones is never used with new ones.

`_version` alone misses fused optimizers, `.data` edits and adapter merges, so the version also covers storage addresses, a
counter raised after every optimizer step of the process, a sample of values of each tensor, and the adapters' state.
"""

from __future__ import annotations

import hashlib
import threading
from array import array
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

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
    """A digest (32 bytes) that differs when any weight, buffer or adapter state of `model` does.

    Cost is a few microseconds a tensor. CUDA values are not sampled here: that would wait for the device.
    """
    facts = array("q", [_optimizer_steps])
    values: list[float] = []
    for tensor in _tensors(model):
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
    digest.update(_adapter_state(model))
    return digest.digest()


def _sample(tensor: Tensor) -> list[float]:
    numel = tensor.numel()
    if not numel:
        return []
    flat = tensor.view(-1) if tensor.is_contiguous() else tensor.flatten()[: _SAMPLES + 1]
    return flat[:: max(1, (flat.numel() - 1) // _SAMPLES)][: _SAMPLES + 1].tolist()


def _tensors(model: nn.Module) -> list[Tensor]:
    found: list[Tensor] = []
    for module in model.modules():
        found.extend(p for p in module._parameters.values() if p is not None)
        found.extend(b for b in module._buffers.values() if b is not None)
    return found


def _adapter_state(model: nn.Module) -> bytes:
    """Which adapters are active, merged, disabled and how they are scaled; empty where there are none."""
    parts = []
    for module in model.modules():
        # An attribute of PEFT's tuner layers only; the model itself has methods named like their other attributes.
        if "merged_adapters" in module.__dict__:
            scaling = sorted((getattr(module, "scaling", None) or {}).items())
            parts.append(
                repr((module.active_adapters, module.disable_adapters, module.merged_adapters, scaling))
            )
    return "|".join(parts).encode()
