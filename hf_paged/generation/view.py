"""A view of a model: the same model under another class, whose decoding loops are ours.

`generate()` does two things: it prepares (merges configs, validates, warns, builds processors and criteria,
pads, expands) and then runs a decoding loop, which it looks up on `type(self)`. A view lets upstream do the
first, exactly, and hands the second to a callable:

    view = make_view(model, decoder)          # shares model.__dict__: weights, hooks, config, everything
    type(view).generate(view, **kwargs)       # upstream's generate, or the one a user's class overrides it
    with -> decoder("_sample", input_ids, logits_processor=..., ...)

The model itself is not touched, so any number of threads may hold views of it at once.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from transformers.generation.utils import GENERATION_MODES_MAPPING

#: A `PreTrainedModel` that is a `GenerationMixin` too: upstream has no type that says both.
GenerativeModel: TypeAlias = Any


class Decoder(Protocol):
    """Runs in place of the decoding loop `method`, with the arguments upstream gives that loop (without
    self).
    """

    def __call__(self, method: str, /, *args: Any, **kwargs: Any) -> Any: ...


class HubDecodingMode(Exception):
    """The call asks for a decoding loop that upstream moved to a repository on the hub."""


#: Names of the decoding loops `generate()` looks up on the class; those with a slash are hub repositories.
DECODING_METHODS: tuple[str, ...] = tuple(
    sorted({name for name in GENERATION_MODES_MAPPING.values() if "/" not in name})
)


class _NoSubclassHook:
    """Comes first in a view class's bases, so that no `__init_subclass__` of the model's classes runs for
    it.
    """

    __slots__ = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def _routed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    # `wraps` keeps the signature: upstream reads it to decide what to pass.
    @functools.wraps(method)
    def route(self: Any, *args: Any, **kwargs: Any) -> Any:
        return self._hf_paged_decoder(name, *args, **kwargs)

    return route


def _hub_mode_guard(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def guard(self: Any, *args: Any, **kwargs: Any) -> Any:
        repository = method(self, *args, **kwargs)
        if repository is not None:
            raise HubDecodingMode(repository)
        return repository

    return guard


@functools.lru_cache(maxsize=64)
def view_class(cls: type) -> type:
    """The class of views of models whose class is `cls`: its subclass, with its name."""
    namespace: dict[str, Any] = {
        "__slots__": ("_hf_paged_decoder",),
        "__module__": cls.__module__,
        "__qualname__": cls.__qualname__,
        "__doc__": cls.__doc__,
    }
    for name in DECODING_METHODS:
        namespace[name] = _routed(name, getattr(cls, name))
    hub_mode = getattr(cls, "_get_deprecated_gen_repo", None)
    if hub_mode is not None:
        namespace["_get_deprecated_gen_repo"] = _hub_mode_guard(hub_mode)
    return type(cls)(cls.__name__, (_NoSubclassHook, cls), namespace)


def make_view(model: GenerativeModel, decoder: Decoder) -> Any:
    """A view of `model` whose decoding loops call `decoder`; it lives as long as one call of `generate`."""
    cls: Any = type(model)
    view: Any = object.__new__(view_class(cls))
    # nn.Module.__setattr__ would look into a __dict__ that is not there yet.
    object.__setattr__(view, "__dict__", model.__dict__)
    object.__setattr__(view, "_hf_paged_decoder", decoder)
    return view


def is_view(model: object) -> bool:
    """Whether `model` is a view made by `make_view`."""
    return isinstance(model, _NoSubclassHook)
