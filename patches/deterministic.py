"""Parts of a model by kernels whose result for one token does not depend on the others of a step, in no bit.

    Linear, Conv1D           `kernels.cpu_row_linear`: one order of summation
    LayerNorm, LlamaRMSNorm  `kernels.cpu_row_function`
    NewGELU, GELUTanh, SiLU  likewise
    other activations        the module's own forward, a token at a time
    LlamaRotaryEmbedding     its own forward on fixed blocks of positions

What a forward does between them is exact for each number (sums of two, products of two, gathers), and attention is
`PagedMetadata.deterministic`. Every other kind of module is a reason not to run: `problem` names it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hf_paged.kernels.cpu_row_function import row_gelu_tanh, row_layer_norm, row_rms_norm, row_silu
from hf_paged.kernels.cpu_row_linear import row_linear
from hf_paged.patches.attention import forward_slot
from hf_paged.patches.registry import PatchSpec, class_reason, qualified_name
from hf_paged.step import StepInputs

__all__ = ["find_deterministic", "problem"]

#: Positions whose angles are computed together. Small enough that torch never splits them between threads.
_POSITIONS = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_LLAMA = "transformers.models.llama.modeling_llama"
_ROTARY = f"{_LLAMA}.LlamaRotaryEmbedding"
_LORA = "peft.tuners.lora.layer.Linear"
#: Their forward only calls other modules, gathers, adds and multiplies. So do the classes of a family's `structure`.
_TRANSPARENT = frozenset(
    {
        "torch.nn.modules.container.ModuleList",
        "torch.nn.modules.dropout.Dropout",
        "torch.nn.modules.linear.Identity",
        "torch.nn.modules.sparse.Embedding",
        "transformers.models.gpt2.modeling_gpt2.GPT2MLP",
        "transformers.models.gpt_bigcode.modeling_gpt_bigcode.GPTBigCodeMLP",
        f"{_LLAMA}.LlamaMLP",
    }
)
_ACTIVATIONS = ("transformers.activations", "torch.nn.modules.activation")


def find_deterministic(model: nn.Module) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """The modules of `model` that need another forward to be deterministic, each with the one to run in a step."""
    found = []
    module: Any
    for module in model.modules():
        cls: Any = type(module)
        form = _form_of(module)
        if form is not None and vars(module).get(forward_slot(module)) is None:
            found.append((module, _guarded(form, cls.forward)))
    return found


def _form_of(module: nn.Module) -> Callable[..., Any] | None:
    name = qualified_name(type(module))
    if name in _FORMS:
        return _FORMS[name]
    if name.rpartition(".")[0] in _ACTIVATIONS and not module._parameters and not module._modules:
        return _token_by_token
    return None


def _guarded(form: Callable[..., Any], known: Callable[..., Any]) -> Callable[..., Any]:
    def in_step(module: nn.Module, step: StepInputs, *args: Any, **kwargs: Any) -> Any:
        forward: Any = type(module).forward
        if not step.metadata.deterministic:  # drafts of an assistant: they decide nothing
            return forward(module, *args, **kwargs)
        if forward is not known:
            raise RuntimeError(
                f"deterministic=True: the forward of {type(module).__name__} was replaced in a step"
            )
        return form(module, *args, **kwargs)

    return in_step


def _linear(module: Any, input: Tensor) -> Tensor:
    return row_linear(input, module.weight, module.bias)


def _conv1d(module: Any, x: Tensor) -> Tensor:
    return row_linear(x, module.weight.t(), module.bias)


def _layer_norm(module: Any, input: Tensor) -> Tensor:
    return row_layer_norm(input, module.weight, module.bias, module.eps)


def _rms_norm(module: Any, hidden_states: Tensor) -> Tensor:
    return row_rms_norm(hidden_states, module.weight, module.variance_epsilon)


def _gelu_tanh(module: Any, input: Tensor) -> Tensor:
    return row_gelu_tanh(input)


def _silu(module: Any, input: Tensor) -> Tensor:
    return row_silu(input)


def _token_by_token(module: Any, x: Tensor) -> Tensor:  # [1, T, E]
    forward: Any = type(module).forward
    # Copied, so that each lies in memory alike.
    tokens = [forward(module, x[:, i : i + 1].clone()) for i in range(x.shape[1])]
    return torch.cat(tokens, dim=1) if tokens else forward(module, x)


def _rotary(module: Any, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [1, T, D]: where in a block a position lies decides its last bit, so blocks are fixed."""
    positions = position_ids[0]
    if not len(positions):
        return type(module).forward(module, x, position_ids)
    blocks, place = torch.unique(positions // _POSITIONS, return_inverse=True)
    # What lies behind the last position must not look like a longer forward: some frequencies depend on its length.
    last = int(positions.max())
    lines = (blocks[:, None] * _POSITIONS + torch.arange(_POSITIONS)).clamp(max=last)
    parts = [type(module).forward(module, x, line[None]) for line in lines]
    cos, sin = (torch.cat(part)[place, positions % _POSITIONS] for part in zip(*parts, strict=True))
    return cos[None], sin[None]


_FORMS: dict[str, Callable[..., Any]] = {
    "torch.nn.modules.linear.Linear": _linear,
    "transformers.pytorch_utils.Conv1D": _conv1d,
    "torch.nn.modules.normalization.LayerNorm": _layer_norm,
    f"{_LLAMA}.LlamaRMSNorm": _rms_norm,
    "transformers.activations.NewGELUActivation": _gelu_tanh,
    "transformers.activations.GELUTanh": _gelu_tanh,
    "transformers.activations.SiLUActivation": _silu,
    "torch.nn.modules.activation.SiLU": _silu,
    _ROTARY: _rotary,
}


# --- what cannot be ---------------------------------------------------------------------------------------------------


def problem(model: Any, spec: PatchSpec, forwards: dict[int, Callable[..., Any]] | None) -> str | None:
    """Why a step of `model` as it is now would not be deterministic; None if it is.

    Args:
        forwards: id of a bound module -> the function bound to it; None before the model is patched.
    """
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    structure = {id(module): name for module, name in spec.structure(model)}
    dtypes = set()
    for module in _modules_in_steps(model):
        text = _module_problem(module, structure.get(id(module)), forwards)
        if text is not None:
            return text
        for parameter in module._parameters.values():
            if parameter is not None:
                if parameter.device.type != "cpu":
                    return f"weights on {parameter.device}; only the CPU is supported so far"
                dtypes.add(parameter.dtype)
    if len(dtypes) > 1 or not dtypes <= set(_DTYPES):
        return f"weights of dtype {', '.join(sorted(map(str, dtypes)))}; one of float32, bfloat16, float16 is needed"
    return None


def _modules_in_steps(model: nn.Module) -> Iterator[nn.Module]:
    """Every module once, without the parts of LoRA layers that the engine's own kernels stand for."""
    seen: set[nn.Module | None] = {None, model}
    stack = [model]
    for module in stack:
        yield module
        children: Any = module._modules.values()
        if qualified_name(type(module)) == _LORA:
            children = [module._modules["base_layer"]]
        new = [child for child in children if child not in seen]
        seen.update(new)
        stack += new


def _module_problem(
    module: Any, family_name: str | None, forwards: dict[int, Callable[..., Any]] | None
) -> str | None:
    cls: Any = type(module)
    name = qualified_name(cls)
    if name == _LORA:
        return _lora_problem(module)
    form = _form_of(module)
    if form is None:
        if name in _TRANSPARENT:
            return class_reason(cls, cls.forward, name) if name.startswith("transformers.") else None
        return None if family_name is not None else f"{name} is not known to treat each token alike"
    reason = class_reason(cls, cls.forward, name)
    if reason is not None:
        return reason
    if forwards is None:
        if vars(module).get(forward_slot(module)) is not None:
            return f"the forward of a {cls.__name__} was replaced"
    elif id(module) not in forwards:
        return f"a {cls.__name__} came to the model, or had another forward, when it was enabled"
    weight = module._parameters.get("weight")
    if weight is None:
        return None
    if type(weight) is not nn.Parameter or (weight.dim() == 2 and 1 not in weight.stride()):
        return f"a {cls.__name__} with a weight of {type(weight).__name__}, strides {weight.stride()}"
    return None


def _lora_problem(layer: Any) -> str | None:
    if layer.lora_variant:
        kinds = sorted({type(variant).__name__ for variant in layer.lora_variant.values()})
        return f"LoRA of the kind {', '.join(kinds)}"
    for part in ("lora_A", "lora_B"):
        for matrix in layer._modules[part]._modules.values():
            weight = matrix._parameters.get("weight")
            if type(matrix) is not nn.Linear or weight.dtype not in _DTYPES or not weight.is_contiguous():
                return "a LoRA layer with matrices of an unusual kind"
    return None
