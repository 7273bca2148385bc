"""Parts of a model by faster calls of torch, inside a step of ours only.

    NewGELUActivation  seven element-wise kernels   -> gelu(approximate="tanh"), the same formula
    LlamaRMSNorm       six                          -> rms_norm
    Linear, Conv1D     MKL's product                -> oneDNN's, where that is faster (`kernels.cpu_linear`)

In float32 all agree with the original to rounding; in half precision they round once instead of at each
operation, so they are nearer to the exact result. Bound like attention: outside of a step, and wherever the class
has another forward than the one known here, the module runs what it ran before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from hf_paged.kernels import cpu_linear, cpu_norm
from hf_paged.patches.attention import forward_slot
from hf_paged.patches.registry import class_reason, qualified_name
from hf_paged.step import StepInputs

__all__ = ["find_fused"]


def find_fused(model: nn.Module) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """The modules of `model` that have a fused form, each with the function to run in a step."""
    found = []
    table = _FUSED | _PRODUCTS if cpu_linear.onednn_is_faster() else _FUSED
    module: Any
    for module in model.modules():
        cls: Any = type(module)
        name = qualified_name(cls)
        fused = table.get(name)
        # A forward somebody put on the instance is theirs to keep, in a step too.
        if fused is None or vars(module).get(forward_slot(module)) is not None:
            continue
        # Known beforehand, so that a small layer of a small model loses no time over it.
        least = cpu_linear.least_input(_as_linear(module.weight, name)) if name in _PRODUCTS else 0
        if least is not None and class_reason(cls, cls.forward, name) is None:
            found.append((module, _guarded(fused, cls.forward, least)))
    return found


def _guarded(
    fused: Callable[[Any, Tensor], Tensor | None], known: Callable[..., Any], least: int
) -> Callable[..., Any]:
    def in_step(module: nn.Module, step: StepInputs, hidden_states: Tensor) -> Tensor:
        forward = type(module).forward
        if hidden_states.numel() >= least and forward is known:
            output = fused(module, hidden_states)
            if output is not None:
                return output
        return forward(module, hidden_states)

    return in_step


def _as_linear(weight: Tensor, name: str) -> Tensor:
    """The weight [N, K] of the product a class makes."""
    return weight.t() if name.endswith("Conv1D") else weight


def _gelu_tanh(module: Any, hidden_states: Tensor) -> Tensor:
    return F.gelu(hidden_states, approximate="tanh")


def _rms_norm(module: Any, hidden_states: Tensor) -> Tensor | None:
    weight = module.weight
    if weight.dtype != hidden_states.dtype:
        return None  # the original promotes to the wider dtype
    if hidden_states.device.type == "cpu":
        return cpu_norm.rms_norm(hidden_states, weight, module.variance_epsilon)
    return F.rms_norm(hidden_states, weight.shape, weight, module.variance_epsilon)


def _linear(module: Any, x: Tensor) -> Tensor | None:
    return cpu_linear.linear(x, module.weight, module.bias)


def _conv1d(module: Any, x: Tensor) -> Tensor | None:
    return cpu_linear.linear(x, module.weight.t(), module.bias)


_FUSED: dict[str, Callable[[Any, Tensor], Tensor | None]] = {
    "transformers.activations.NewGELUActivation": _gelu_tanh,
    "transformers.models.llama.modeling_llama.LlamaRMSNorm": _rms_norm,
}
_PRODUCTS: dict[str, Callable[[Any, Tensor], Tensor | None]] = {
    "torch.nn.modules.linear.Linear": _linear,
    "transformers.pytorch_utils.Conv1D": _conv1d,
}
