"""The public functions: enabling and disabling a model, and what can be asked of an enabled one.

Each takes the model, a pipeline, a PeftModel, a `torch.compile` or DDP wrapper, and acts on the one HF model inside.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from hf_paged.config import PagedConfig
from hf_paged.engine import registry
from hf_paged.engine.engine import PagedEngine
from hf_paged.engine.runtime import check_deterministic
from hf_paged.engine.stats import EngineStats
from hf_paged.errors import ConfigError, EngineStateError, UnsupportedModelError
from hf_paged.resolve import is_text_generation_pipeline, lost_by_resolving, resolve_model

if TYPE_CHECKING:
    from hf_paged.generation.client import EngineClient
    from hf_paged.generation.fallback import Explanation
    from hf_paged.generation.handle import GenerationResult

T = TypeVar("T")
_lock = threading.RLock()


def enable(model_or_pipeline: T, config: PagedConfig | None = None, **overrides: Any) -> T:
    """Makes `generate` of the model inside run on a paged KV cache with continuous batching.

    Nothing but this instance changes, and nothing is allocated until the first call. Again with the same
    options: no-op.

    Args:
        model_or_pipeline: an HF causal language model of a supported family, or anything that holds one.
        config: options; `overrides` replace single fields of it (see `PagedConfig`).

    Returns:
        The same object.

    Raises:
        UnsupportedModelError: no model of a supported family inside.
        ConfigError: an option is not allowed, or the model is enabled with other options already, or it cannot be
            `deterministic`.
    """
    from hf_paged.integrations.assistants import Assistants
    from hf_paged.integrations.continuous_batching import attach as attach_manager
    from hf_paged.integrations.peft import PeftAdapters
    from hf_paged.patches import registry as patches
    from hf_paged.patches.apply import InstancePatch, apply

    model = resolve_model(model_or_pipeline)
    config = PagedConfig.make(config, overrides)
    with _lock:
        present = registry.get(model)
        if present is not None:
            _check_same(present.config, config)
            _attach(present, model_or_pipeline)
            _follow(present, model_or_pipeline)
            return model_or_pipeline
        spec = patches.find(model)
        if config.deterministic:
            check_deterministic(model.device, config.backend)
        patch = apply(model, spec, deterministic=config.deterministic)
        front = InstancePatch(model)
        try:
            engine = PagedEngine(
                model,
                patch,
                config,
                position_limit=spec.position_limit(model),
                rope_limit=spec.rope_limit(model),
            )
            engine.front = front
            engine.adapters = PeftAdapters(
                model, patch, config.max_resident_adapters, config.adapter_host_bytes()
            )
            if config.max_resident_adapters is not None:
                engine.bound_adapters(engine.adapters)
            engine.adapters.sync()
            engine.set_assistants(Assistants())
            engine.replaced_generate = vars(model).get("generate")
            front.set("generate", _make_generate(model))
            attach_manager(model, engine)
            registry.put(model, engine)
            _attach(engine, model_or_pipeline)
            _follow(engine, model_or_pipeline)
        except BaseException:
            registry.pop(model)
            front.revert()
            patch.revert()
            raise
    return model_or_pipeline


def _make_generate(model: Any) -> Any:
    """The function put on the model as `generate`. It holds the model weakly, so that a dropped one is collected."""
    reference = weakref.ref(model)
    replaced = vars(model).get("generate")

    @functools.wraps(type(model).generate)
    def generate(*args: Any, **kwargs: Any) -> Any:
        model = reference()
        if model is None:
            raise EngineStateError("the model this generate belongs to no longer exists")
        engine = registry.get(model)
        if engine is None:  # disabled while somebody held on to this function
            return (replaced or type(model).generate.__get__(model))(*args, **kwargs)
        from hf_paged.generation.backend import paged_generate
        from hf_paged.generation.deferred import taker_of

        taker = taker_of(engine)
        if taker is not None:
            return taker(model, replaced, args, kwargs)
        return paged_generate(model, replaced, engine, args, kwargs)

    generate.__signature__ = inspect.signature(model.generate)  # type: ignore[attr-defined]
    return generate


def _follow(engine: PagedEngine, obj: Any) -> None:
    """Where `obj` is a PeftModel around the engine's model, listens to which adapters its calls ask for."""
    from hf_paged.integrations.peft import PeftAdapters, find_tuner

    tuner = find_tuner(obj)
    if tuner is not None and isinstance(engine.adapters, PeftAdapters):
        engine.adapters.follow(tuner)


def _attach(engine: PagedEngine, obj: Any) -> bool:
    """Lets a pipeline feed the engine as a stream. Returns whether it did not do so before."""
    if not is_text_generation_pipeline(obj):
        return False
    from hf_paged.integrations.pipeline import attach

    return attach(obj, engine)


def _detach(engine: PagedEngine) -> None:
    # Only `_attach` imports it: where that never ran there is no pipeline to detach.
    pipelines = sys.modules.get("hf_paged.integrations.pipeline")
    if pipelines is not None:
        pipelines.detach_all(engine)


def _check_same(old: PagedConfig, new: PagedConfig) -> None:
    for name, value in vars(new).items():
        if value != getattr(old, name):
            raise ConfigError(
                f"{name}={value!r}: the model is already enabled with {name}={getattr(old, name)!r}; disable it first"
            )


def disable(obj: T) -> T:
    """Makes the model exactly what it was before `enable`; requests still running fail. A no-op if it is not
    enabled."""
    model = resolve_model(obj)
    with _lock:
        engine = registry.pop(model)
    if engine is not None:
        _detach(engine)
        from hf_paged.generation.returned_cache import fill_pending

        fill_pending(engine)  # caches given to users must outlive the pool
        engine.front.revert()
        engine.close()
        if engine.adapters is not None:
            engine.adapters.revert()
        engine.patch.revert()
    return obj


@contextmanager
def enabled(model: T, config: PagedConfig | None = None, **overrides: Any) -> Iterator[T]:
    """`enable` for a block. A model that is enabled already stays so after it."""
    was_enabled = is_enabled(model)
    was_attached = is_text_generation_pipeline(model) and "get_iterator" in vars(model)
    enable(model, config, **overrides)
    try:
        yield model
    finally:
        if not was_enabled:
            disable(model)
        elif is_text_generation_pipeline(model) and not was_attached:
            from hf_paged.integrations.pipeline import detach

            detach(model)


def is_enabled(obj: Any) -> bool:
    """Whether the model inside `obj` is enabled."""
    return registry.get(resolve_model(obj)) is not None


def explain(model: Any, **generate_kwargs: Any) -> Explanation:
    """Whether `model.generate(**generate_kwargs)` would run natively, and if not, why. Nothing is generated.

    Raises:
        Whatever `generate` would raise while it checks its arguments.
    """
    from hf_paged.generation.backend import explain_call

    inner, engine = _require(model)
    return explain_call(inner, engine, generate_kwargs, replaced=engine.replaced_generate)


def stats(model: Any) -> EngineStats:
    """Counters since `enable` or `reset_stats`, and the state of the KV cache now."""
    return _require(model)[1].stats()


def reset_stats(model: Any) -> None:
    """Sets the counters of `stats` to zero."""
    _require(model)[1].reset_stats()


def generate_many(model: Any, inputs: Any, **kwargs: Any) -> list[GenerationResult]:
    """Generates for many prompts at once, each with its own length; see `hf_paged.generation.many.generate_many`."""
    from hf_paged.generation.many import generate_many as run

    inner, engine = _require(model)
    _refuse_lost(model)
    return run(engine, inner, inputs, **kwargs)


def engine(model: Any) -> EngineClient:
    """The engine of an enabled model, for `submit`."""
    from hf_paged.generation.client import EngineClient

    inner, paged = _require(model)
    _refuse_lost(model)
    return EngineClient(inner, paged)


def generate(model: Any, *args: Any, **kwargs: Any) -> Any:
    """For `model.generate(..., custom_generate=hf_paged.generate)`, enabled or not.

    Upstream hands a custom function everything it prepared, but no streamer: a streamer given beside it is not called.
    """
    from hf_paged.generation.backend import custom_generate

    inner = resolve_model(model)
    present = registry.get(inner)
    if present is not None:
        return custom_generate(inner, present, args, kwargs)
    with enabled(inner):
        return custom_generate(inner, _require(inner)[1], args, kwargs)


def invalidate(model: Any) -> None:
    """Drops cached prefixes."""
    _require(model)[1].invalidate()


def release_memory(model: Any) -> None:
    """Waits for running requests, then gives all KV memory back."""
    _require(model)[1].release_memory()


@contextmanager
def paused(model: Any) -> Iterator[Any]:
    """Waits for running requests and holds back new ones: inside, weights are yours to change."""
    _inner, paged = _require(model)
    with paged.paused():
        yield model


def _refuse_lost(obj: Any) -> None:
    """Requests go to the model inside: what a wrapper adds to it (virtual tokens, say) would be lost."""
    lost = lost_by_resolving(obj)
    if lost is not None:
        raise UnsupportedModelError(f"{type(obj).__name__}: {lost}; call its own generate() instead")


def _require(obj: Any) -> tuple[Any, PagedEngine]:
    model = resolve_model(obj)
    paged = registry.get(model)
    if paged is None:
        raise EngineStateError(
            f"this {type(model).__name__} is not enabled: call hf_paged.enable(model) first"
        )
    return model, paged
