"""hf_paged: vLLM-class generation for HuggingFace Transformers models, in process, from one line.

    import hf_paged
    hf_paged.enable(model)            # or a pipeline, or a PeftModel
    model.generate(...)               # the same answers, from a paged KV cache with continuous batching

Names are resolved at first use, so that importing this package costs nothing beyond its own few lines.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_paged.api import (
        disable,
        enable,
        enabled,
        engine,
        explain,
        generate,
        generate_many,
        invalidate,
        is_enabled,
        paused,
        release_memory,
        reset_stats,
        stats,
    )
    from hf_paged.comparison import CompareReport, compare
    from hf_paged.config import PagedConfig
    from hf_paged.engine.stats import EngineStats
    from hf_paged.errors import (
        ConfigError,
        EngineStateError,
        FallbackError,
        HfPagedError,
        InvalidRequestError,
        KVCacheOutOfMemory,
        RequestCancelledError,
        UnsupportedModelError,
        WeightsChangedError,
    )
    from hf_paged.generation.fallback import Explanation, FallbackReason
    from hf_paged.generation.handle import GenerationResult, RequestHandle

__version__ = "0.1.0"

__all__ = [
    "CompareReport",
    "ConfigError",
    "EngineStateError",
    "EngineStats",
    "Explanation",
    "FallbackError",
    "FallbackReason",
    "GenerationResult",
    "HfPagedError",
    "InvalidRequestError",
    "KVCacheOutOfMemory",
    "PagedConfig",
    "RequestCancelledError",
    "RequestHandle",
    "UnsupportedModelError",
    "WeightsChangedError",
    "compare",
    "disable",
    "enable",
    "enabled",
    "engine",
    "explain",
    "generate",
    "generate_many",
    "invalidate",
    "is_enabled",
    "paused",
    "release_memory",
    "reset_stats",
    "stats",
]

_MODULES = {
    "hf_paged.api": (
        "disable enable enabled explain generate generate_many invalidate is_enabled paused release_memory "
        "reset_stats stats"
    ),
    "hf_paged.comparison": "CompareReport compare",
    "hf_paged.config": "PagedConfig",
    "hf_paged.engine.stats": "EngineStats",
    "hf_paged.errors": (
        "ConfigError EngineStateError FallbackError HfPagedError InvalidRequestError KVCacheOutOfMemory "
        "RequestCancelledError UnsupportedModelError WeightsChangedError"
    ),
    "hf_paged.generation.fallback": "Explanation FallbackReason",
    "hf_paged.generation.handle": "GenerationResult RequestHandle",
}
_HOME = {name: module for module, names in _MODULES.items() for name in names.split()}


def __getattr__(name: str) -> object:
    import importlib

    if name == "engine":  # a callable package: see hf_paged/engine/__init__.py
        return importlib.import_module("hf_paged.engine")
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
