"""Enabling every supported model of this process at its first call: what `hf-paged run` switches on.

Nothing is imported for it: as soon as the script imports transformers, `GenerationMixin.generate`, the manager behind
`generate_batch` and the pipelines' `get_iterator` are wrapped. A wrapper enables the instance it is called for and
steps aside: an enabled instance has its own `generate`, and an unsupported one keeps the original.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import sys
import threading
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

_WRAPPED: dict[str, tuple[tuple[str, str], ...]] = {
    # generate_batch and its context manager both ask for a manager.
    "transformers.generation.utils": (
        ("GenerationMixin", "generate"),
        ("GenerationMixin", "init_continuous_batching"),
    ),
    "transformers.pipelines.base": (("Pipeline", "get_iterator"),),
}


@dataclass
class _Model:
    """A model that was enabled: its counters outlive it."""

    kind: str
    counters: Any


@dataclass
class ProcessWide:
    """What was enabled in this process, and what was not and why.

    Args:
        enabler: `hf_paged.enable`.
    """

    enabler: Callable[[Any], object]
    models: list[_Model] = field(default_factory=list)
    #: class of a model that was not enabled -> why
    refused: dict[str, str] = field(default_factory=dict)
    _seen: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    _lock: Any = field(default_factory=threading.RLock)

    def install(self) -> None:
        """Wraps transformers' methods, now or when they are imported."""
        waiting: dict[str, Callable[[Any], None]] = {}
        for module, places in _WRAPPED.items():
            if module in sys.modules:
                self._wrap(sys.modules[module], places)
            else:
                waiting[module] = functools.partial(self._wrap, places=places)
        if waiting:
            sys.meta_path.insert(0, _AfterImport(waiting))

    def summary(self) -> str:
        """One line: what was served natively, what was not, and why."""
        native = sum(m.counters.native_calls for m in self.models)
        fallbacks: Counter[str] = Counter()
        for model in self.models:
            fallbacks.update(model.counters.fallback_calls)
        kinds = Counter(m.kind for m in self.models)
        where = ", ".join(kind if n == 1 else f"{n} {kind}" for kind, n in kinds.items())
        parts = [f"{native} native calls" + (f" of {where}" if where else "")]
        if fallbacks:
            listed = ", ".join(f"{code} {count}" for code, count in fallbacks.most_common())
            parts.append(f"{fallbacks.total()} on the original generate ({listed})")
        parts += [f"{kind} not enabled ({why})" for kind, why in self.refused.items()]
        return "hf_paged: " + "; ".join(parts)

    def enable(self, obj: Any) -> None:
        """Enables the model in `obj`, a model or a text-generation pipeline, if that was not tried before."""
        from hf_paged.engine import registry
        from hf_paged.resolve import resolve_model

        with self._lock:
            if obj in self._seen:
                return
            self._seen.add(obj)
            model = obj
            try:
                model = resolve_model(obj)
                new = registry.get(model) is None
                self.enabler(obj)
            except Exception as error:
                # Whatever keeps us from serving a model, the script must run as if we were not there.
                self.refused.setdefault(type(model).__name__, " ".join(str(error).split()))
                return
            engine = registry.get(model)
            if new and engine is not None:
                self.models.append(_Model(type(model).__name__, engine.counters))

    def _wrap(self, module: Any, places: tuple[tuple[str, str], ...]) -> None:
        for owner, name in places:
            cls = getattr(module, owner)
            if hasattr(cls, name):
                setattr(cls, name, self._enabling(name, getattr(cls, name)))

    @staticmethod
    def _concerns(name: str, obj: Any) -> bool:
        from hf_paged.resolve import is_text_generation_pipeline

        return name != "get_iterator" or is_text_generation_pipeline(obj)

    def _enabling(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def call(self_: Any, *args: Any, **kwargs: Any) -> Any:
            if name in vars(self_) or not self._concerns(name, self_):
                # Enabled, and its own method came here for the original; or nothing of ours.
                return original(self_, *args, **kwargs)
            self.enable(self_)
            own = vars(self_).get(name)
            # A class with a method of its own came here from inside it: what it did before must not be done twice.
            if own is None or getattr(type(self_), name) is not call:
                return original(self_, *args, **kwargs)
            return own(*args, **kwargs)

        return call


class _AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module as soon as that was imported; finds the modules as the others would."""

    def __init__(self, waiting: dict[str, Callable[[Any], None]]) -> None:
        self._waiting = waiting

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        then = self._waiting.pop(name, None)
        if then is None:
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                then(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
