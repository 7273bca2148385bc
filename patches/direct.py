"""Modules of a layer without the ceremony of a module call, where nobody would notice.

`torch.nn.Module.__call__` looks for hooks, compiled forms and attributes: 1.4 us of a call with warm caches, of which a
decode step of a small model makes dozens. Inside a step of ours a module without hooks is its forward, and a linear
layer that is just what its class says is the function of its weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.pytorch_utils import Conv1D

__all__ = ["call"]

_OWN = {"weight", "bias"}
_LINEAR, _CONV1D, _DROPOUT = nn.Linear.forward, Conv1D.forward, nn.Dropout.forward


def call(module: Any, *args: Any, **kwargs: Any) -> Any:
    """`module(*args, **kwargs)`: the same operations, and where it has hooks or somebody's forward the very call."""
    state = getattr(module, "__dict__", None)
    if (
        state is None  # a function of C in place of an activation
        or state.get("_forward_hooks")
        or state.get("_forward_pre_hooks")
        or state.get("_backward_hooks")
        or state.get("_backward_pre_hooks")
    ):
        return module(*args, **kwargs)
    forward = state.get("forward")
    if forward is not None:
        return (forward if hasattr(forward, "hf_paged_before") else module)(*args, **kwargs)
    if len(args) == 1 and not kwargs:
        known = _KNOWN.get(type(module))
        if known is not None and (output := known(module, state["_parameters"], args[0])) is not None:
            return output
    return module(*args, **kwargs)


def _linear(module: Any, weights: dict[str, Any], x: torch.Tensor) -> torch.Tensor | None:
    if nn.Linear.forward is not _LINEAR or weights.keys() != _OWN:
        return None
    return F.linear(x, weights["weight"], weights["bias"])


def _conv1d(module: Any, weights: dict[str, Any], x: torch.Tensor) -> torch.Tensor | None:
    if Conv1D.forward is not _CONV1D or weights.keys() != _OWN:
        return None
    product = torch.addmm(weights["bias"], x.view(-1, x.shape[-1]), weights["weight"])
    return product.view(*x.shape[:-1], product.shape[-1])


def _dropout(module: Any, weights: dict[str, Any], x: torch.Tensor) -> torch.Tensor | None:
    return None if module.training or nn.Dropout.forward is not _DROPOUT else x


_KNOWN = {nn.Linear: _linear, Conv1D: _conv1d, nn.Dropout: _dropout}
