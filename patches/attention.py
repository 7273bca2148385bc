"""Binding of paged attention to one attention module: inside an engine step paged, everywhere else what it
ran before.

`bind` puts a forward on the module's instance. It asks `current_step()` whether this thread runs a step of
this very patch; if not, the call goes on to the forward the module had. The families' own parts (projections,
head layout) come as the spec's `paged_forward`, which ends in `attend`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.kernels import ops
from hf_paged.kernels.attention_weights import attention_weights
from hf_paged.kernels.metadata import PagedMetadata
from hf_paged.patches.instance import InstancePatch
from hf_paged.step import StepInputs, current_step

__all__ = ["attend", "bind", "bind_step_forward", "forward_slot", "is_bound", "rotates_in_kernel", "store"]


def store(step: StepInputs, layer: int, key: Tensor, value: Tensor) -> None:
    """Stores the keys and values of layer `layer`, each [T, H_kv, D], and attends to nothing."""
    k_cache, v_cache = step.kv_layer(layer)
    k_scales, v_scales = step.kv_scales(layer)
    slots = step.metadata.slot_mapping.to(key.device)
    ops.store_kv(
        key, value, k_cache, v_cache, slots, k_scales=k_scales, v_scales=v_scales, backend=step.backend
    )


def attend(
    step: StepInputs,
    layer: int,
    query: Tensor,  # [T, H, D]
    key: Tensor,  # [T, H_kv, D]
    value: Tensor,  # [T, H_kv, D]
    scale: float,
    rotary: tuple[Tensor, Tensor] | None = None,  # cos and sin, each [T, R]
) -> Tensor:
    """Stores the keys and values of layer `layer` and attends over the step's sequences.

    Under autocast the three are cast to its dtype first, as SDPA would; the cache keeps its own dtype.

    Args:
        rotary: queries and keys are still to be rotated by these, which `rotates_in_kernel` allowed.

    Returns:
        [1, T, H * D], ready for the output projection.
    """
    device = query.device
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    k_cache, v_cache = step.kv_layer(layer)
    k_scales, v_scales = step.kv_scales(layer)
    metadata = step.metadata
    if metadata.slot_mapping.device != device:
        metadata = _metadata_on(metadata, device)
    if rotary is not None:
        output = ops.rotary_paged_attention(
            query, key, value, *rotary, k_cache, v_cache, metadata,
            scale=scale, k_scales=k_scales, v_scales=v_scales, backend=step.backend,
        )  # fmt: skip
        return output.view(1, output.shape[0], -1)
    output = ops.paged_attention(
        query, key, value, k_cache, v_cache, metadata,
        scale=scale, k_scales=k_scales, v_scales=v_scales, backend=step.backend,
    )  # fmt: skip
    if step.recording is not None and step.recording.attention_of:
        step.recording.attentions[layer] = {
            index: attention_weights(query, k_cache, metadata, index, last, scale=scale, k_scales=k_scales)
            for index, last in step.recording.attention_of.items()
        }
    return output.view(1, output.shape[0], -1)


def rotates_in_kernel(step: StepInputs, query: Tensor, key: Tensor) -> bool:
    """Whether `attend` can rotate queries and keys itself. Under autocast upstream rotates in the wider dtype."""
    return (
        step.backend == "triton"
        and step.recording is None
        and query.dtype is key.dtype
        and not torch.is_autocast_enabled(query.device.type)
    )


def _metadata_on(metadata: PagedMetadata, device: torch.device) -> PagedMetadata:
    """The step's metadata on a layer's device, copied once a step and device (models over several devices)."""
    name = f"patches.metadata_on.{device}"
    if name not in metadata.plan:
        metadata.plan[name] = replace(
            metadata,
            slot_mapping=metadata.slot_mapping.to(device),
            block_tables=metadata.block_tables.to(device),
            seq_lens=metadata.seq_lens.to(device),
            query_start_loc=metadata.query_start_loc.to(device),
            plan={},
        )
    return metadata.plan[name]


def bind(
    patch: InstancePatch, module: nn.Module, layer: int, owner: object, paged_forward: Callable[..., Any]
) -> Callable[..., Any]:
    """Binds paged attention to one attention module.

    Args:
        patch: takes the binding back on revert.
        module: an attention module of a supported family.
        layer: its number, by which the step hands out KV blocks.
        owner: only steps of this owner run paged.
        paged_forward: the family's `PatchSpec.paged_forward`.

    Returns:
        The function now bound. It becomes a pass-through once `owner` runs no more steps.
    """

    def in_step(module: nn.Module, step: StepInputs, *args: Any, **kwargs: Any) -> Any:
        return paged_forward(module, step, layer, *args, **kwargs)

    return bind_step_forward(patch, module, owner, in_step)


def bind_step_forward(
    patch: InstancePatch, module: nn.Module, owner: object, in_step: Callable[..., Any]
) -> Callable[..., Any]:
    """Binds `in_step(module, step, *args, **kwargs)` for steps of `owner`; elsewhere the former forward runs."""
    slot = forward_slot(module)
    before = vars(module).get(slot)
    reference = weakref.ref(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        step = current_step()
        module = reference()
        if module is None:
            raise ReferenceError("the module of this forward is gone")
        if step is not None and step.owner is owner:
            return in_step(module, step, *args, **kwargs)
        if before is not None:
            return before(*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)

    # Not `functools.wraps`: its `__wrapped__` would be the bound method, which keeps the module alive.
    forward.__signature__ = inspect.signature(module.forward)  # type: ignore[attr-defined]
    forward.__doc__ = module.forward.__doc__
    # What the instance had, for the safety checks.
    forward.hf_paged_before = before  # type: ignore[attr-defined]
    patch.set(slot, forward)
    return forward


def is_bound(module: nn.Module) -> bool:
    """Whether the module carries one of our forwards that has not been taken back."""
    return hasattr(vars(module).get(forward_slot(module)), "hf_paged_before")


def forward_slot(module: nn.Module) -> str:
    """The attribute which holds the module's own forward.

    accelerate's hooks keep it in `_old_forward` and put a wrapper in `forward`, which places inputs on the
    module's device: ours goes inside of it.
    """
    state = vars(module)
    return "_old_forward" if "_hf_hook" in state and "_old_forward" in state else "forward"
