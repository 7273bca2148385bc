"""The model families that can be patched: a family is one `PatchSpec`, found by the class of the model.

The three built-in families register themselves when their file is imported, which happens the first time a
model of theirs is looked up: importing this file imports no modeling code. Knows what may differ between
    families, not how a patch is put on.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_paged.errors import UnsupportedModelError

__all__ = [
    "AttentionShape",
    "PatchSpec",
    "class_reason",
    "find",
    "override_reason",
    "register",
    "supported_model_types",
    "unwrapped",
]


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer as the KV cache sees it: what upstream fixes when it makes the module."""

    num_heads: int  # H
    num_kv_heads: int  # H_kv
    head_dim: int  # D


@dataclass(frozen=True)
class PatchSpec:
    """One model family. Classes are "module.ClassName" strings: comparing names needs no modeling code."""

    model_types: tuple[str, ...]
    model_class: str  # a causal LM with a head; subclasses are supported if they keep its forward
    #: model -> the modules whose forward the packed step relies on, each with the class it must descend from
    structure: Callable[[Any], list[tuple[nn.Module, str]]]
    find_attention_layers: Callable[[Any], list[nn.Module]]  # model -> modules in KV-layer order
    attention_shape: Callable[[Any], AttentionShape]  # attention module -> its shape
    blocks: Callable[[Any], Sequence[nn.Module]]  # model -> the modules around its attention layers, in order
    #: attention module -> what makes the keys; its weight tells dtype and device where it is a plain weight
    key_projection: Callable[[Any], nn.Module]
    #: (attention module, StepInputs, layer number, *args, **kwargs of its forward) -> what that forward returns
    paged_forward: Callable[..., Any]
    #: (block, StepInputs, layer number, hidden states [1, T, E], **kwargs of its forward): stores what its attention
    #: would, of all tokens, and computes nothing else
    store_new_kv: Callable[..., None]
    check: Callable[[Any], str | None]  # model -> why this variant cannot run natively, or None
    position_limit: Callable[[Any], int | None]  # model -> positions it has (learned embeddings), or None
    rope_limit: Callable[[Any], int | None]  # model -> longest sequence for which packing is exact, or None
    attention_dropout: Callable[[Any], float]  # attention module -> probability active in training mode


#: Qualified class -> module that registers its spec.
_BUILTIN = {
    f"transformers.models.{name}.modeling_{name}.{cls}": f"hf_paged.patches.{name}"
    for name, cls in (
        ("gpt2", "GPT2LMHeadModel"),
        ("gpt_bigcode", "GPTBigCodeForCausalLM"),
        ("llama", "LlamaForCausalLM"),
    )
}
_BUILTIN_TYPES = ("gpt2", "gpt_bigcode", "llama")
_specs: dict[str, PatchSpec] = {}


def qualified_name(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def register(spec: PatchSpec) -> None:
    """Adds a family. Registering the same `model_class` again replaces the earlier spec."""
    _specs[spec.model_class] = spec


def supported_model_types() -> tuple[str, ...]:
    """The `config.model_type` of every family, sorted."""
    return tuple(sorted({*_BUILTIN_TYPES, *(name for spec in _specs.values() for name in spec.model_types)}))


def find(model: Any) -> PatchSpec:
    """The spec of the model's family.

    Raises:
        UnsupportedModelError: the class is of no supported family, has no language-model head, or overrides a
            forward that
            the packed step relies on.
    """
    for cls in type(model).__mro__:
        name = qualified_name(cls)
        if name not in _specs and name in _BUILTIN:
            importlib.import_module(_BUILTIN[name])
        if name in _specs:
            spec = _specs[name]
            reason = override_reason(model, spec)
            if reason is not None:
                raise UnsupportedModelError(f"{type(model).__name__} cannot be enabled: {reason}")
            return spec
    classes = ", ".join(sorted(name.rpartition(".")[2] for name in {*_BUILTIN, *_specs}))
    raise UnsupportedModelError(
        f"{type(model).__name__} is not supported. Supported model types: {', '.join(supported_model_types())}; "
        f"classes: {classes} and subclasses that keep their forward"
    )


def unwrapped(module: Any) -> Any:
    """The module inside `torch.compile` and FSDP wrappers around a part of a model."""
    children = module._modules
    while "_orig_mod" in children or "_fsdp_wrapped_module" in children:
        module = children["_orig_mod" if "_orig_mod" in children else "_fsdp_wrapped_module"]
        children = module._modules
    return module


def override_reason(model: Any, spec: PatchSpec, layers: list[nn.Module] | None = None) -> str | None:
    """Which part of `model` is not the family's own, or None.

    Args:
        layers: its attention modules, if they are known.
    """
    # Layers are many and of few classes.
    parts: dict[tuple[Any, str], None] = dict.fromkeys(
        (type(module), name) for module, name in spec.structure(model)
    )
    for cls, name in parts:
        reason = class_reason(cls, getattr(cls, "forward", None), name)
        if reason is not None:
            return reason
    if layers is None:
        layers = spec.find_attention_layers(model)
    if len(set(map(id, layers))) < len(layers):
        return "several layers share one attention module"
    return None


@functools.lru_cache(maxsize=1024)
def class_reason(cls: type, forward: Callable[..., Any] | None, trusted: str) -> str | None:
    """Why instances of `cls`, whose forward is `forward` at the moment, cannot stand for the class `trusted`.

    A forward that was replaced on the trusted class itself (by a process-wide monkey patch) counts too: its
    `__module__` is not that of the class.
    """
    base = next((base for base in cls.__mro__ if qualified_name(base) == trusted), None)
    if base is None:
        return f"{qualified_name(cls)} stands in place of {trusted.rpartition('.')[2]}"
    if forward is not base.__dict__.get("forward"):
        return f"{cls.__name__} overrides the forward of {base.__name__}"
    if forward is None or forward.__module__ != base.__module__:
        source = getattr(forward, "__module__", None)
        return f"the forward of {base.__name__} was replaced by one from {source!r}"
    return None
