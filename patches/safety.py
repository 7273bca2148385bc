"""What makes native execution of a patched model unsafe at this moment, found by one walk over its modules.

Run at every generate call, so it must stay below 0.3 ms on GPT-2 124M: plain `__dict__` reads, nothing per
parameter but its type and device. Codes, each with a text that names the culprit:

    unsupported_variant       an option of the family that is not covered (cross-attention, unknown RoPE type)
    class_forward_replaced    a class the step relies on has another forward (monkey patch, swapped layer)
    layers_changed            attention layers were added, removed or swapped since the model was enabled
    attention_implementation  a user-registered attention function, whose result cannot be known
    prepare_inputs_replaced   `prepare_inputs_for_generation` is not the library's
    forward_hooks             a foreign forward (pre-)hook: it would see packed tokens of several requests
    adapter_names             PEFT's hooks for adapters per row, which expect one row a request
    alora_offsets             PEFT's hooks for aLoRA, which count from the end of each row
    forward_replaced          the forward of a module instance was wrapped or replaced
    compiled_forward          a module runs through `torch.compile`
    offloaded_weights         weights live on disk or are moved in for each forward
    sharded_parameters        FSDP, ZeRO or tensor-parallel parameters
    unsupported_device        weights on a device other than cpu or cuda
    unsupported_dtype         keys and values of a dtype the KV cache does not hold
    batch_dependent           a layer whose result for one token depends on the others in the forward
    dropout_active            training mode with a dropout probability above zero
"""

from __future__ import annotations

import functools
import sys
import types
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.nn.modules.dropout import _DropoutNd

from hf_paged.patches.registry import PatchSpec, override_reason

__all__ = ["find_reasons"]

_DEVICES = ("cpu", "cuda")
_ATTENTION = ("eager", "sdpa", "flex_attention")
_device_of: Callable[[torch.Tensor], torch.device] = vars(torch._C.TensorBase)["device"].__get__
#: (module, function) of wrappers of a model's forward, with what they wrapped as `original_forward`.
_PASS_THROUGH = frozenset({("trl.trainer.utils", "_fused_forward")})
#: Modules whose hooks do not depend on how tokens are arranged: they record outputs only when asked to, mark
#: gradients, or recompute a weight from its parametrisation.
_HARMLESS_HOOKS = (
    "transformers.utils.output_capturing",
    "torch.nn.utils.prune",
    "torch.nn.utils.weight_norm",
)
_HARMLESS_HOOK_NAMES = ("make_inputs_require_grads", "make_inputs_require_grad")
_PER_TENSOR_QUANTISED = "torch.ao.nn.quantized.dynamic"
_PEFT_ROW_ARGUMENTS = ("adapter_names", "alora_offsets")


@dataclass
class _Walk:
    """What one pass over the modules found."""

    reasons: dict[str, str] = field(default_factory=dict)
    classes: set[type] = field(default_factory=set)
    parameter_classes: set[type] = field(default_factory=set)
    devices: set[torch.device] = field(default_factory=set)
    training: list[nn.Module] = field(default_factory=list)

    def add(self, code: str, text: str) -> None:
        self.reasons.setdefault(code, text)


def find_reasons(
    model: Any,
    spec: PatchSpec,
    layers: list[weakref.ref[nn.Module]],
    forwards: dict[int, Callable[..., Any]],
) -> list[tuple[str, str]]:
    """All reasons, one per code.

    Args:
        model: a model patched with `spec`.
        layers: the attention modules bound, in order.
        forwards: id of a bound module -> the function bound to it.
    """
    walk = _walk_modules(model, forwards)
    variant = spec.check(model)
    if variant is not None:
        walk.add("unsupported_variant", variant)
    now = spec.find_attention_layers(model)
    overridden = override_reason(model, spec, now)
    if overridden is not None:
        walk.add("class_forward_replaced", overridden)
    if len(now) != len(layers) or any(a is not b() for a, b in zip(now, layers, strict=True)):
        walk.add(
            "layers_changed", "the attention layers are not those the model was enabled with: enable it again"
        )
    _check_config(walk, model)
    _check_classes(walk)
    _check_parameters(walk, model)
    if walk.training:
        _check_dropout(walk, spec, now)
    if torch_module._global_forward_hooks or torch_module._global_forward_pre_hooks:
        hooks = [
            *torch_module._global_forward_hooks.values(),
            *torch_module._global_forward_pre_hooks.values(),
        ]
        walk.add("forward_hooks", f"global module hook {_name_of(hooks[0])}")
    return list(walk.reasons.items())


def _walk_modules(model: nn.Module, forwards: dict[int, Callable[..., Any]]) -> _Walk:
    walk = _Walk()
    parameters: list[torch.Tensor | None] = []
    seen = {None, model}
    stack: list[nn.Module] = [model]
    for module in stack:
        state = module.__dict__
        if state.get("_forward_hooks") or state.get("_forward_pre_hooks"):
            _check_hooks(walk, module)
        forward = state.get("forward")
        ours = forwards.get(id(module))
        if (
            "_hf_hook" in state
            or forward is not ours
            or (ours is not None and ours.hf_paged_before is not None)
        ):
            _check_forward(walk, module, state, ours)
        if state.get("training"):  # script modules keep it elsewhere
            walk.training.append(module)
        if state.get("_compiled_call_impl") is not None:
            walk.add("compiled_forward", f"{type(module).__name__} runs through torch.compile")
        if own := state["_parameters"]:
            parameters += tuple(own.values())  # a copy first: adapters may come and go meanwhile
        if children := state["_modules"]:
            new = [child for child in tuple(children.values()) if child not in seen]
            seen.update(new)
            stack += new
    found = [parameter for parameter in parameters if parameter is not None]
    walk.classes, walk.parameter_classes = set(map(type, stack)), set(map(type, found))
    walk.devices = set(map(_device_of, found))
    return walk


def _check_classes(walk: _Walk) -> None:
    for cls in walk.classes:
        if cls.__name__ == "OptimizedModule":
            walk.add("compiled_forward", "a part of the model runs through torch.compile")
        if cls.__module__.startswith(_PER_TENSOR_QUANTISED):
            walk.add("batch_dependent", f"{cls.__name__} quantises its input by the range of the whole batch")


def _check_hooks(walk: _Walk, module: nn.Module) -> None:
    for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
        keywords = hook.keywords if isinstance(hook, functools.partial) else {}
        code = next((name for name in _PEFT_ROW_ARGUMENTS if keywords.get(name)), None)
        if code is not None:
            walk.add(code, f"{type(module).__name__} has {code} chosen row by row")
            continue
        source = hook if hasattr(hook, "__qualname__") else type(hook)
        name = source.__qualname__.rpartition(".")[2]
        if source.__module__ not in _HARMLESS_HOOKS and name not in _HARMLESS_HOOK_NAMES:
            walk.add("forward_hooks", f"{type(module).__name__} has the forward hook {_name_of(hook)}")


def _check_forward(walk: _Walk, module: nn.Module, state: dict[str, Any], ours: Any) -> None:
    """Follows the forwards stacked on an instance down to ours, or to the class's own."""
    top = state.get("forward")
    if "_hf_hook" in state:
        problem = _accelerate_problem(state["_hf_hook"])
        if problem is not None:
            walk.add(problem, f"{type(module).__name__} has accelerate's {type(state['_hf_hook']).__name__}")
        if not _is_accelerate(top):
            walk.add("forward_replaced", f"{type(module).__name__}.forward was wrapped by {_name_of(top)}")
            return
        top = state.get("_old_forward")
    if ours is not None:
        before = ours.hf_paged_before
        if top is not ours:
            text = f"{type(module).__name__}.forward was replaced by {_name_of(top)} after enable"
            walk.add("forward_replaced", text)
            return
        top = before
    top = _below_pass_through(top)
    if top is None or _is_own_method(module, top):
        return
    if hasattr(top, "_torchdynamo_orig_callable"):
        walk.add("compiled_forward", f"{type(module).__name__}.forward runs through torch.compile")
    elif not _is_mixed_precision(module, state):
        walk.add("forward_replaced", f"{type(module).__name__}.forward was replaced by {_name_of(top)}")


def _below_pass_through(forward: Any) -> Any:
    """What a known wrapper calls unless a keyword of its own is given, as it never is in a step; else `forward`."""
    function: Any = getattr(forward, "__func__", None)
    code = getattr(function, "__code__", None)
    # By code and globals: the wrapper bears the name and module of what it wraps.
    if code is None or (function.__globals__.get("__name__"), code.co_name) not in _PASS_THROUGH:
        return forward
    names = dict(zip(code.co_freevars, function.__closure__ or (), strict=True))
    return names["original_forward"].cell_contents if "original_forward" in names else forward


def _is_own_method(module: nn.Module, forward: Any) -> bool:
    return getattr(forward, "__func__", None) is type(module).forward and forward.__self__ is module


def _is_accelerate(forward: Any) -> bool:
    function = forward.func if isinstance(forward, functools.partial) else None
    return getattr(function, "__module__", None) == "accelerate.hooks"


def _is_mixed_precision(module: nn.Module, state: dict[str, Any]) -> bool:
    """Whether `Accelerator.prepare` put autocast and a cast of outputs around the forward: both by token."""
    forward, original = state.get("forward"), state.get("_original_forward")
    function = getattr(forward, "__func__", forward)
    source = getattr(function, "__module__", None)
    # The wrapper of outputs hides its origin behind the names of what it wraps.
    wrapped = type(getattr(function, "__wrapped__", None)).__module__
    return "accelerate.utils.operations" in (source, wrapped) and _is_own_method(module, original)


def _accelerate_problem(hook: Any) -> str | None:
    kind = f"{type(hook).__module__}.{type(hook).__name__}"
    if kind == "accelerate.hooks.SequentialHook":
        return next((problem for inner in hook.hooks if (problem := _accelerate_problem(inner))), None)
    if kind == "accelerate.hooks.AlignDevicesHook":
        return "offloaded_weights" if hook.offload else None
    if kind in ("accelerate.hooks.CpuOffload", "accelerate.hooks.UserCpuOffloadHook"):
        return "offloaded_weights"
    return "forward_hooks"


def _check_config(walk: _Walk, model: Any) -> None:
    attention = getattr(model.config, "_attn_implementation", None) or "eager"
    if attention not in _ATTENTION and "flash" not in attention:
        walk.add("attention_implementation", f"attention implementation {attention!r}")
    prepare = model.__dict__.get("prepare_inputs_for_generation")
    own = type(model).prepare_inputs_for_generation
    if prepare is not None and getattr(prepare, "__func__", None) is not own:
        walk.add("prepare_inputs_replaced", f"prepare_inputs_for_generation is {_name_of(prepare)}")
    if own.__module__ != "transformers.generation.utils":
        walk.add("prepare_inputs_replaced", f"{type(model).__name__} overrides prepare_inputs_for_generation")


def _check_parameters(walk: _Walk, model: nn.Module) -> None:
    for device in walk.devices:
        if device.type == "meta":
            walk.add("offloaded_weights", "weights on the meta device: they are not in memory")
        elif device.type not in _DEVICES:
            walk.add("unsupported_device", f"weights on device {device}; supported: cpu, cuda")
    for cls in (*walk.parameter_classes, *walk.classes):
        if cls.__name__ in ("DTensor", "FlatParameter", "FullyShardedDataParallel"):
            walk.add("sharded_parameters", f"the model has {cls.__name__} parameters")
    if "deepspeed" in sys.modules and any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        walk.add("sharded_parameters", "the model has ZeRO parameters")


def _check_dropout(walk: _Walk, spec: PatchSpec, layers: Iterable[nn.Module]) -> None:
    for module in walk.training:
        if isinstance(module, _DropoutNd) and module.p > 0:
            walk.add("dropout_active", f"training mode with {type(module).__name__}(p={module.p})")
            return
    for layer in layers:
        if layer.training and spec.attention_dropout(layer) > 0:
            walk.add(
                "dropout_active", f"training mode with attention dropout {spec.attention_dropout(layer)}"
            )
            return


def _name_of(function: Any) -> str:
    if isinstance(function, functools.partial):
        function = function.func
    source = function if isinstance(function, types.FunctionType | types.MethodType) else type(function)
    return f"{source.__module__}.{source.__qualname__}"
