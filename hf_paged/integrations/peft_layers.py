"""One adapter layer of PEFT inside of an engine step, whose tokens may belong to many adapters.

Plain LoRA computes its base product once for all tokens and adds each adapter's low-rank product to the tokens of
that adapter. Every other layer that works token by token (DoRA, (IA)³, OFT, VeRA, `modules_to_save`, ...) runs PEFT's
own forward for one selection's tokens after another. Either way the layer itself is not touched: what is active in it
is the user's, and another thread may be using it. PEFT's forward is run on a shadow instead, which shares everything
but what is active.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.engine.adapters import Selection
from hf_paged.errors import FallbackError
from hf_paged.integrations.peft_groups import LoraLayers, Runs, applied, are_plain, refuse_merged
from hf_paged.kernels.lora_matmul import lora_add_, lora_add_prepared_
from hf_paged.step import AdapterRuns, StepInputs

#: What PEFT's hooks add to the arguments of a layer; the step knows better.
_ROW_ARGUMENTS = ("adapter_names", "alora_offsets")


def run_in_step(lora: LoraLayers, layer: nn.Module, step: StepInputs, *args: Any, **kwargs: Any) -> Any:
    """The forward of `layer` within a step: each token with the adapters of its sequence.

    Args:
        lora: of the model; `layer` is one of them if `is_lora_linear(layer)`.
    """
    runs = step.adapters
    if runs is not None and id(layer) in runs.prepared and len(args) == 1 and not kwargs:
        output = _prepared(layer, step, runs, args[0])
        if output is not None:
            return output
    for name in _ROW_ARGUMENTS:
        kwargs.pop(name, None)
    deterministic = step.metadata.deterministic
    if runs is None and not deterministic:
        return type(layer).forward(layer, *args, **kwargs)
    if runs is not None and runs.within:
        return _run_as(layer, runs.within[-1], args, kwargs)
    if not args or not isinstance(args[0], Tensor):
        raise TypeError(f"{type(layer).__name__} was called without an input tensor in first place")
    x = args[0]
    axis = 1 if x.dim() > 1 and x.shape[0] == 1 else 0
    parts: Runs = [(None, 0, x.shape[axis])] if runs is None else runs.of(x.shape[axis])
    grouped = _grouped_forward(type(layer).forward)
    if grouped is not None and are_plain(layer, parts):
        return grouped(lora, layer, step, parts, axis, x, args[1:], kwargs)
    if deterministic or runs is None:
        raise FallbackError(f"deterministic=True: {type(layer).__name__} does not treat each token alike")
    if not parts:  # no token
        return _within(layer, runs, None, args, kwargs)
    outputs = []
    for selection, first, end in parts:
        part = x if end - first == x.shape[axis] else x.narrow(axis, first, end - first)
        outputs.append(_within(layer, runs, selection, (part, *args[1:]), kwargs))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=axis)


def _prepared(layer: Any, step: StepInputs, runs: AdapterRuns, x: Any) -> Tensor | None:
    """`_linear` of a layer that has been made ready for all tokens of the step; None for other input."""
    if runs.within or step.metadata.deterministic or not isinstance(x, Tensor):
        return None
    if x.shape[:-1] != (1, runs.tokens[-1][2]):
        return None
    output = layer._modules["base_layer"](x)
    groups = runs.prepared[id(layer)]
    if groups is not None:
        lora_add_prepared_(output, x, groups, backend=step.backend)
    return output


def shadow(layer: nn.Module, selection: Selection) -> nn.Module:
    """A layer that shares all of `layer` except for what is active: the adapters of `selection`."""
    twin = object.__new__(type(layer))
    object.__setattr__(twin, "__dict__", vars(layer) | active_state(layer, selection))
    return twin


def active_state(layer: Any, selection: Selection) -> dict[str, Any]:
    """The attributes of `layer` with which it applies the adapters of `selection`."""
    names = list(selection.names)
    if hasattr(layer, "merged_adapters"):
        return {"_active_adapter": names, "_disable_adapters": not names}
    # `modules_to_save` and other wrappers have one active adapter, or are off.
    name = next((name for name in names if name in layer._adapters), None)
    return {"_active_adapter": [] if name is None else name, "_disable_adapters": name is None}


def _within(
    layer: nn.Module, runs: AdapterRuns, selection: Selection | None, args: tuple, kwargs: dict
) -> Any:
    runs.within.append(selection)
    try:
        return _run_as(layer, selection, args, kwargs)
    finally:
        runs.within.pop()


def _run_as(layer: nn.Module, selection: Selection | None, args: tuple, kwargs: dict) -> Any:
    forward = type(layer).forward
    if selection is None:
        return forward(layer, *args, **kwargs)
    refuse_merged(layer)
    return forward(shadow(layer, selection), *args, **kwargs)


# --- plain LoRA -------------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _grouped_forward(forward: Any) -> Callable[..., Tensor] | None:
    """What computes the base once, for layers whose own `forward` is one known here (`is_grouped`)."""
    from peft.tuners.lora import layer as lora

    if forward is lora.Linear.forward:
        return _linear
    if forward is lora.Embedding.forward:
        return _embedding
    return None


def is_lora_linear(layer: nn.Module) -> bool:
    """Whether the groups of `layer` are those of `LoraLayers`."""
    return _grouped_forward(type(layer).forward) is _linear


def _linear(
    lora: LoraLayers,
    layer: Any,
    step: StepInputs,
    parts: Runs,
    axis: int,
    x: Tensor,
    args: tuple,
    kwargs: dict,
) -> Tensor:
    output = layer._modules["base_layer"](x, *args, **kwargs)
    groups = lora.groups(layer, step, parts)
    if groups is not None:
        if step.metadata.deterministic:
            rows, inputs = output.flatten(0, -2), x.flatten(0, -2)
            lora_add_(rows, inputs, groups.groups, backend=step.backend, deterministic=True)
        else:
            lora_add_prepared_(output, x, groups, backend=step.backend)
    return output


def _embedding(
    lora: LoraLayers,
    layer: Any,
    step: StepInputs,
    parts: Runs,
    axis: int,
    x: Tensor,
    args: tuple,
    kwargs: dict,
) -> Tensor:
    output = layer.base_layer(x, *args, **kwargs)
    scale = layer._get_embed_scale()
    for selection, first, end in parts:
        for name in applied(layer, selection):
            if name not in layer.lora_embedding_A:
                continue
            after_a = layer._embed(x.narrow(axis, first, end - first), layer.lora_embedding_A[name].T)
            update = (after_a @ layer.lora_embedding_B[name].T) * layer.scaling[name]
            if scale is not None:
                update = update * scale.to(update.dtype)
            rows = output.narrow(axis, first, end - first)
            rows.copy_(rows + update)
    return output
