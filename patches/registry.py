"""The model families that can be patched: a family is one `PatchSpec`, found by the class of the model.

The three built-in families register themselves when their file is imported, which happens the first time a
model of theirs is looked up: importing this file imports no modeling code. Knows what may differ between
    families, not how a patch is put on.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from hf_paged.errors import UnsupportedModelError

__all__ = [
    "AttentionShape",
    "PatchSpec",
    "class_override_reason",
    "find",
    "register",
    "supported_model_types",
]


@dataclass(frozen=True)
class AttentionShape:
    """One attention layer as the KV cache sees it."""

    num_heads: int  # H
    num_kv_heads: int  # H_kv
    head_dim: int  # D
    projection: nn.Module  # makes the keys; its weight tells dtype and device where it is a plain weight


@dataclass(frozen=True)
class PatchSpec:
    """One model family.

    `model_class` and `trusted_classes` are "module.ClassName" strings: comparing names needs no import of
    modeling code.
    """

    model_types: tuple[str, ...]
    model_class: str  # a causal LM with a head; subclasses are supported if they keep its forward
    #: Classes whose forward the packed step relies on; a subclass that overrides one of them is refused.
    trusted_classes: tuple[str, ...]
    find_attention_layers: Callable[[Any], list[nn.Module]]  # model -> modules in KV-layer order
    attention_shape: Callable[[Any], AttentionShape]  # attention module -> its shape, read live
    #: (attention module, StepInputs, layer number, *args, **kwargs of its forward) -> what its forward
    #: returns
    paged_forward: Callable[..., Any]
    check: Callable[[Any], str | None]  # model -> why this variant cannot run natively, or None
    position_limit: Callable[[Any], int | None]  # model -> positions it has (learned embeddings), or None
    rope_limit: Callable[[Any], int | None]  # model -> longest sequence for which packing is exact, or None
    attention_dropout: Callable[
        [Any], float
    ]  # attention module -> probability that is active in training mode


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


def override_reason(model: nn.Module, spec: PatchSpec) -> str | None:
    """Which class in `model` has another forward than the family's, or None."""
    for cls in {type(module) for module in model.modules()}:
        reason = class_override_reason(cls, cls.forward, spec.trusted_classes)
        if reason is not None:
            return reason
    return None


@functools.lru_cache(maxsize=1024)
def class_override_reason(
    cls: type, forward: Callable[..., Any], trusted_classes: tuple[str, ...]
) -> str | None:
    """Why `forward`, the one `cls` has now, is not that of the trusted class it descends from; None if it is.

    A forward that was replaced on the trusted class itself (by a process-wide monkey patch) counts too: its
    `__module__` is not that of the class. `forward` is an argument so that the cached answer is of one
    moment.
    """
    base = next((base for base in cls.__mro__ if qualified_name(base) in trusted_classes), None)
    if base is None:
        return None
    if forward is not base.__dict__.get("forward"):
        return f"{cls.__name__} overrides the forward of {base.__name__}"
    if forward.__module__ != base.__module__:
        return f"the forward of {base.__name__} was replaced by one from {forward.__module__!r}"
    return None
