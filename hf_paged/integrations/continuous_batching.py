"""`model.generate_batch` and its manager, served by the paged engine.

Upstream's `generate_batch` and `continuous_batching_context_manager` stay: both ask the model for a manager by
`init_continuous_batching`, and that an enabled model answers with a `PagedBatchingManager`. Its requests share the
running batch with every other call of the model. A manager keeps no memory and no thread of its own: starting,
stopping and keeping one costs nothing, and a warm-up has nothing to do.
"""

from __future__ import annotations

import functools
import weakref
from typing import TYPE_CHECKING, Any

from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching import ContinuousBatchingManager

from hf_paged.engine import registry
from hf_paged.errors import EngineStateError
from hf_paged.generation.fallback import report_fallback
from hf_paged.generation.view import GenerativeModel
from hf_paged.integrations.batch_manager import PagedBatchingManager
from hf_paged.integrations.batch_requests import BatchRequests, configuration_reasons

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine

_INIT = "init_continuous_batching"
_DESTROY = "destroy_cached_continuous_batching_manager"


def attach(model: GenerativeModel, engine: PagedEngine) -> None:
    """Puts our manager behind `generate_batch` of `model`, as part of `engine.front`.

    A model without that method, or on which somebody replaced it, is left as it is.
    """
    if not hasattr(type(model), _INIT) or _INIT in vars(model):
        return
    door = _Door(model)
    engine.front.set(_INIT, door.make_init(model))
    if hasattr(type(model), _DESTROY):
        engine.front.set(_DESTROY, door.make_destroy(model))


class _Door:
    """Gives out managers for one model, which it holds weakly, and keeps the one that is to be used again."""

    def __init__(self, model: GenerativeModel) -> None:
        self._model = weakref.ref(model)
        self._kept: PagedBatchingManager | None = None

    def make_init(self, model: GenerativeModel) -> Any:
        @functools.wraps(getattr(type(model), _INIT))
        def init_continuous_batching(
            generation_config: Any = None, continuous_batching_config: Any = None, *args: Any, **kwargs: Any
        ) -> ContinuousBatchingManager:
            return self._manager(generation_config, continuous_batching_config, args, kwargs)

        return init_continuous_batching

    def make_destroy(self, model: GenerativeModel) -> Any:
        @functools.wraps(getattr(type(model), _DESTROY))
        def destroy_cached_continuous_batching_manager() -> None:
            kept, self._kept = self._kept, None
            if kept is not None:
                kept.destroy()
            getattr(type(self._alive()), _DESTROY)(self._alive())

        return destroy_cached_continuous_batching_manager

    def _manager(
        self, generation_config: Any, batching_config: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> ContinuousBatchingManager:
        model = self._alive()
        engine = registry.get(model)
        original = functools.partial(
            getattr(type(model), _INIT), model, generation_config, batching_config, *args, **kwargs
        )
        if engine is None:  # disabled while somebody held on to this method
            return original()
        if self._kept is not None:
            return self._kept
        config = model.generation_config if generation_config is None else generation_config
        model.eval()  # as upstream does: requests of training steps are made without dropout
        if batching_config is None:
            batching_config = (
                getattr(config, "continuous_batching_config", None) or ContinuousBatchingConfig()
            )
        reasons = configuration_reasons(
            model, kwargs | {f"argument {i}": value for i, value in enumerate(args[1:], 4)}
        )
        if config is not None and not reasons:
            requests = BatchRequests(model, engine, config, batching_config)
            reasons = requests.reasons()
            if not reasons:
                return PagedBatchingManager(model, engine, requests, config, batching_config, self._keep)
        if reasons:
            report_fallback(engine, reasons)
        return original()

    def _keep(self, manager: PagedBatchingManager) -> None:
        self._kept = manager

    def _alive(self) -> GenerativeModel:
        model = self._model()
        if model is None:
            raise EngineStateError("the model this method belongs to no longer exists")
        return model
