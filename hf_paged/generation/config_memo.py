"""Merged generation configs of earlier calls: upstream's merging is half of what it takes to prepare a short call.

What is merged depends on the content of three configs and the keyword arguments. Where all of that is plain (numbers,
strings, lists of ints) and equals that of an earlier call, the config of that one is copied. Everything else, and every
call that upstream would warn of, goes to upstream. Calls that differ in `max_new_tokens` alone share an entry: upstream
carries a positive number along and looks at it only later.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

from hf_paged.generation.quiet import is_quiet

_PLAIN = frozenset({int, float, str, bool, type(None)})
_MOST = 64  # merged configs to remember, of all models of a class
_LIMIT = "max_new_tokens"


@dataclass(frozen=True)
class ModelConfig:
    """A model's config at one moment, told by its very values."""

    config: weakref.ref[Any]
    values: dict[str, Any]

    @classmethod
    def of(cls, config: Any) -> ModelConfig:
        return cls(weakref.ref(config), _copied(vars(config)))

    def is_still(self, config: Any) -> bool:
        """Whether `config` is that config, and has not been changed."""
        now, then = vars(config), self.values
        return (
            self.config() is config
            and len(now) == len(then)
            and all(name in then and _is_same(then[name], value) for name, value in now.items())
        )


@dataclass(frozen=True)
class _Merged:
    """What upstream made of a call."""

    model_config: ModelConfig
    options: dict[str, Any]  # the attributes of the merged config
    passed_on: tuple[str, ...]  # keyword arguments that were none of its options
    added: dict[str, Any]  # to those

    def give(self, kwargs: Mapping[str, Any]) -> tuple[GenerationConfig, dict[str, Any]]:
        """As upstream's: a config of its own, lists included, and the arguments it leaves."""
        config = GenerationConfig.__new__(GenerationConfig)
        vars(config).update(_copied(self.options))
        if _LIMIT in kwargs:
            vars(config)[_LIMIT] = kwargs[_LIMIT]
        return config, {name: kwargs[name] for name in self.passed_on} | self.added


def remembering(method: Callable[..., Any]) -> Callable[..., Any]:
    """`method`, which is upstream's `_prepare_generation_config`, asked once for equal calls."""
    known: dict[Hashable, _Merged] = {}

    @functools.wraps(method)
    def merge(self: Any, generation_config: Any, *args: Any, **kwargs: Any) -> Any:
        key = None if args else _key(self, generation_config, kwargs)
        if key is None:
            return method(self, generation_config, *args, **kwargs)
        merged = known.get(key)
        if merged is not None and merged.model_config.is_still(self.config):
            return merged.give(kwargs)
        config, left = method(self, generation_config, **kwargs)
        # A silenced call may have swallowed what the first real one has to say.
        fresh = None if is_quiet() else _merged(self.config, config, left, generation_config, kwargs)
        if fresh is not None:
            if len(known) >= _MOST:
                known.clear()
            known[key] = fresh
        return config, left

    return merge


def _key(model: Any, given: Any, kwargs: Mapping[str, Any]) -> Hashable | None:
    """Equal for calls whose configs and plain arguments are equal; None where something is not plain."""
    contents = [content(model.generation_config), None if given is None else content(given)]
    if contents[0] is None or (given is not None and contents[1] is None):
        return None
    types = tuple(map(type, kwargs.values()))
    values = tuple([v if t in _PLAIN else None for v, t in zip(kwargs.values(), types, strict=True)])
    limit = kwargs.get(_LIMIT)
    if type(limit) is int and limit > 0:
        values = tuple([1 if name == _LIMIT else v for name, v in zip(kwargs, values, strict=True)])
    # True and 1 are equal keys, hence the types.
    return (id(model.config), *contents, tuple(kwargs), values, types)


def content(config: Any) -> tuple[Any, ...] | None:
    """Names, values and types of a config's options, hashable; None if one of them is more than plain."""
    if type(config) is not GenerationConfig:
        return None
    options = vars(config)
    types = tuple(map(type, options.values()))
    values = tuple(options.values())
    if not _PLAIN.issuperset(types):
        if not all(map(is_plain, values)):
            return None
        values = tuple([tuple(v) if type(v) is list else v for v in values])
    return tuple(options), values, types


def is_plain(value: Any) -> bool:
    """Whether `value` is a number, a string, None or a list of ints."""
    return type(value) in _PLAIN or (type(value) is list and all(type(item) is int for item in value))


def _merged(
    model_config: Any, config: Any, left: dict[str, Any], given: Any, kwargs: Mapping[str, Any]
) -> _Merged | None:
    """What to remember of a call; None where it is not to be answered from memory."""
    added = {name: value for name, value in left.items() if name not in kwargs}
    passed_on = tuple(name for name in left if name in kwargs)
    used = [name for name in kwargs if name not in left]
    if (
        content(config) is None
        or not all(map(is_plain, added.values()))
        or any(left[name] is not kwargs[name] for name in passed_on)
        or any(not is_plain(kwargs[name]) or type(kwargs[name]) is list for name in used)
        or (given is not None and used)  # upstream warns of the mixture
        or _is_warned_of(config)
    ):
        return None
    return _Merged(ModelConfig.of(model_config), _copied(vars(config)), passed_on, added)


def _is_warned_of(config: GenerationConfig) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return True
    return getattr(config, "max_cache_len", None) is not None


def _is_same(then: Any, now: Any) -> bool:
    """Whether that is the very value, or for lists the very items."""
    if type(now) is not list:
        return then is now
    return type(then) is list and len(then) == len(now) and all(map(operator.is_, then, now))


def _copied(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: [*value] if type(value) is list else value for name, value in options.items()}
