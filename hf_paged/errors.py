"""Errors a caller may want to catch. Each message names the argument, its value and what is allowed."""

from __future__ import annotations


class HfPagedError(Exception):
    """Base of all errors raised by hf_paged itself."""


class UnsupportedModelError(HfPagedError, TypeError):
    """`enable` was given something that holds no model of a supported family."""


class ConfigError(HfPagedError, ValueError):
    """A field of `PagedConfig` has a value that is not allowed, or `enable` was repeated with another one."""


class InvalidRequestError(HfPagedError, ValueError):
    """A request that can never be served: bad token ids, too long for the positions or for the pool."""


class FallbackError(HfPagedError, RuntimeError):
    """With `fallback="error"` or `deterministic=True`: a call could not be served natively. `reasons` says why."""

    def __init__(self, message: str, reasons: tuple = ()) -> None:
        super().__init__(message)
        self.reasons = reasons


class KVCacheOutOfMemory(HfPagedError, MemoryError):
    """The KV cache could not grow and nothing was left to preempt."""


class WeightsChangedError(HfPagedError, RuntimeError):
    """Weights or adapters changed while requests computed with the old ones were running."""


class RequestCancelledError(HfPagedError, RuntimeError):
    """The result of a cancelled request was asked for."""


class EngineStateError(HfPagedError, RuntimeError):
    """The model is not enabled, or it was disabled while the request ran."""
