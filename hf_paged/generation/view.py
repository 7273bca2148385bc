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
import inspect
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

from transformers.generation.utils import GENERATION_MODES_MAPPING

from hf_paged.generation.config_memo import remembering
from hf_paged.generation.quiet import is_quiet

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


class _Inspected:
    """A method whose signature is known: upstream asks for that of `forward` half a dozen times a call."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        parameters = inspect.signature(method).parameters.values()
        self._signature = inspect.Signature(list(parameters)[1:])

    def __get__(self, instance: Any, owner: type) -> Callable[..., Any]:
        if instance is None:
            return self._method
        return _BoundInspected(self._method, instance, self._signature)


class _BoundInspected:
    """What `_Inspected` is on an instance."""

    __slots__ = ("__func__", "__self__", "__signature__")

    def __init__(self, method: Callable[..., Any], instance: Any, signature: inspect.Signature) -> None:
        self.__func__, self.__self__, self.__signature__ = method, instance, signature

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.__func__(self.__self__, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__func__, name)


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


def _without_cache(method: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves out what preparation makes that the engine has no use for, a tenth of its time: an empty cache of the
    usual kind. Should upstream run the call after all, `Prepared.run_upstream` makes it.
    """

    @functools.wraps(method)
    def prepare(
        self: Any, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        usual = (
            generation_config.cache_implementation is None
            and generation_config.use_cache
            and generation_config.num_beams == 1
            and not generation_config.return_dict_in_generate
            and not generation_config.is_assistant
            and model_kwargs.get("past_key_values") is None
        )
        if not usual:
            return method(self, generation_config, model_kwargs, *args, **kwargs)
        return None

    return prepare


def _unless_looked_at(method: Callable[..., Any]) -> Callable[..., Any]:
    """Leaves prompts as they are where a preparation is only looked at: to heal them the model generates."""

    @functools.wraps(method)
    def heal(self: Any, input_ids: Any, tokenizer: Any = None) -> Any:
        return input_ids if is_quiet() and tokenizer is not None else method(self, input_ids, tokenizer)

    return heal


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
    for name in ("forward", "prepare_inputs_for_generation"):
        namespace[name] = _Inspected(getattr(cls, name))
    cache_method = getattr(cls, "_prepare_cache_for_generation", None)
    if cache_method is not None:
        namespace["_prepare_cache_for_generation"] = _without_cache(cache_method)
    merge = getattr(cls, "_prepare_generation_config", None)
    if merge is not None and merge.__module__ == "transformers.generation.utils":
        namespace["_prepare_generation_config"] = remembering(merge)
    namespace["heal_tokens"] = _unless_looked_at(getattr(cls, "heal_tokens"))  # noqa: B009 - mypy knows no mixin here
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
