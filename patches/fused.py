"""Parts of a model by faster calls, inside a step of ours only.

    NewGELUActivation  seven element-wise kernels   -> gelu(approximate="tanh"), the same formula
    LlamaRMSNorm       six                          -> rms_norm
    LlamaRotaryEmbedding     cosines and sines      -> rows of a table (`patches.rotary`)
    LlamaDecoderLayer  sum and norm after attention -> one launch, in steps of the Triton backend
    LlamaMLP           activation and product       -> one launch, in steps of the Triton backend
    these and GPT's MLPs     calls of their modules -> the functions that these are (`patches.direct`)
    Linear, Conv1D     MKL's product                -> oneDNN's or ours, where faster (`kernels.cpu_linear`)

In float32 all agree with the original to rounding; in half precision they round once instead of at each
operation, so they are nearer to the exact result. Bound like attention: outside of a step, and wherever the class
has another forward than the one known here, the module runs what it ran before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_paged.kernels import cpu_linear, cpu_norm
from hf_paged.patches import direct
from hf_paged.patches.attention import forward_slot, is_bound
from hf_paged.patches.registry import class_reason, qualified_name
from hf_paged.patches.rotary import RotaryTable
from hf_paged.step import StepInputs

__all__ = ["find_fused"]

_LLAMA = "transformers.models.llama.modeling_llama"
_RMS_NORM = f"{_LLAMA}.LlamaRMSNorm"
_SILU = ("torch.nn.modules.activation.SiLU", "transformers.activations.SiLUActivation")
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
#: As `kernels.triton_checks.MAX_ROW`, which importing this file must not import.
_MAX_ROW = 32768


def find_fused(model: nn.Module) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """The modules of `model` that have a fused form, each with the function to run in a step."""
    found = []
    table = dict(_FUSED)
    if cpu_linear.has_faster_products():
        table |= _PRODUCTS
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
            form = fused() if isinstance(fused, type) else fused
            found.append((module, _guarded(form, cls.forward, least)))
    return found


def _guarded(fused: Callable[..., Any], known: Callable[..., Any], least: int) -> Callable[..., Any]:
    def in_step(
        module: nn.Module, step: StepInputs, hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        forward = type(module).forward
        if hidden_states.numel() >= least and forward is known and not args:
            output = fused(module, step, hidden_states, **kwargs)
            if output is not None:
                return output
        return forward(module, hidden_states, *args, **kwargs)

    return in_step


def _as_linear(weight: Tensor, name: str) -> Tensor:
    """The weight [N, K] of the product a class makes."""
    return weight.t() if name.endswith("Conv1D") else weight


def _gelu_tanh(module: Any, step: StepInputs, hidden_states: Tensor) -> Tensor:
    return F.gelu(hidden_states, approximate="tanh")


def _rms_norm(module: Any, step: StepInputs, hidden_states: Tensor) -> Tensor | None:
    weight = module.weight
    if weight.dtype != hidden_states.dtype:
        return None  # the original promotes to the wider dtype
    if _in_triton(step, hidden_states):
        from hf_paged.kernels.triton_rms_norm import rms_norm

        return rms_norm(_rows(hidden_states), weight, module.variance_epsilon)[0].view_as(hidden_states)
    if hidden_states.device.type == "cpu":
        return cpu_norm.rms_norm(hidden_states, weight, module.variance_epsilon)
    return F.rms_norm(hidden_states, weight.shape, weight, module.variance_epsilon)


def _llama_layer(module: Any, step: StepInputs, hidden_states: Tensor, **kwargs: Any) -> Tensor:
    norm = module.post_attention_layernorm
    attended, _ = direct.call(
        module.self_attn, hidden_states=direct.call(module.input_layernorm, hidden_states), **kwargs
    )
    if not (
        _in_triton(step, hidden_states)
        and _is_plain(norm, _RMS_NORM)
        and attended.dtype == hidden_states.dtype == norm.weight.dtype  # else the sum is of the wider dtype
    ):
        total = hidden_states + attended
        del attended  # memory
        return total + direct.call(module.mlp, direct.call(norm, total))
    from hf_paged.kernels.triton_rms_norm import rms_norm

    rows = _rows(attended), norm.weight, norm.variance_epsilon, _rows(hidden_states)
    normed, total = (part.view_as(hidden_states) for part in rms_norm(*rows))
    return total + direct.call(module.mlp, normed)


def _llama_mlp(module: Any, step: StepInputs, x: Tensor) -> Tensor:
    gate, up = direct.call(module.gate_proj, x), direct.call(module.up_proj, x)
    is_silu = _is_plain(module.act_fn, *_SILU)
    if not (is_silu and _in_triton(step, x) and gate.dtype == up.dtype and gate.dtype in _FLOATS):
        gate = F.silu(gate) if is_silu else direct.call(module.act_fn, gate)
        up = gate * up
        del gate  # memory
        return direct.call(module.down_proj, up)
    from hf_paged.kernels.triton_activation import silu_mul

    return direct.call(module.down_proj, silu_mul(_rows(gate), _rows(up)).view_as(gate))


def _gpt_mlp(module: Any, step: StepInputs, x: Tensor) -> Tensor:
    hidden = direct.call(module.act, direct.call(module.c_fc, x))
    return direct.call(module.dropout, direct.call(module.c_proj, hidden))


def _in_triton(step: StepInputs | None, x: Tensor) -> bool:
    """Whether this is for Triton's row-wise kernels, which hold a row in one program."""
    return step is not None and step.backend == "triton" and x.dtype in _FLOATS and x.shape[-1] <= _MAX_ROW


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _is_plain(module: Any, *names: str) -> bool:
    """Whether what `module` computes is known: its class, nothing of somebody else on the instance, no hooks."""
    cls: Any = type(module)
    name = qualified_name(cls)
    if name not in names:
        return False
    state = vars(module)
    if "_hf_hook" in state or state["_forward_hooks"] or state["_forward_pre_hooks"]:
        return False
    return class_reason(cls, cls.forward, name) is None and ("forward" not in state or is_bound(module))


def _linear(module: Any, step: StepInputs, x: Tensor) -> Tensor | None:
    return cpu_linear.linear(x, module.weight, module.bias)


def _conv1d(module: Any, step: StepInputs, x: Tensor) -> Tensor | None:
    return cpu_linear.linear(x, module.weight.t(), module.bias)


#: A class makes a form of its own for each module.
_FUSED: dict[str, Callable[..., Any]] = {
    "transformers.activations.NewGELUActivation": _gelu_tanh,
    _RMS_NORM: _rms_norm,
    f"{_LLAMA}.LlamaRotaryEmbedding": RotaryTable,
    f"{_LLAMA}.LlamaDecoderLayer": _llama_layer,
    f"{_LLAMA}.LlamaMLP": _llama_mlp,
    "transformers.models.gpt2.modeling_gpt2.GPT2MLP": _gpt_mlp,
    "transformers.models.gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeMLP": _gpt_mlp,
}
_PRODUCTS: dict[str, Callable[..., Tensor | None]] = {
    "torch.nn.modules.linear.Linear": _linear,
    "transformers.pytorch_utils.Conv1D": _conv1d,
}
