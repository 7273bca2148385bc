"""The engines of this process, beside their models: an engine lives as long as its model and is not stored on it."""

from __future__ import annotations

import atexit
import os
import threading
import weakref
from typing import TYPE_CHECKING

from hf_paged.errors import EngineStateError

if TYPE_CHECKING:
    from torch import nn

    from hf_paged.engine.engine import PagedEngine

_engines: weakref.WeakKeyDictionary[nn.Module, PagedEngine] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def put(model: nn.Module, engine: PagedEngine) -> None:
    with _lock:
        _engines[model] = engine


def get(model: nn.Module) -> PagedEngine | None:
    with _lock:
        return _engines.get(model)


def pop(model: nn.Module) -> PagedEngine | None:
    with _lock:
        return _engines.pop(model, None)


def live_engines() -> list[PagedEngine]:
    """Every engine whose model is alive and enabled."""
    with _lock:
        return list(_engines.values())


def _after_fork_in_child() -> None:
    # Threads that ran steps do not exist in the child, and locks may be held by them: start from an idle state.
    global _lock
    _lock = threading.Lock()
    for engine in list(_engines.values()):
        engine.reset_after_fork()


def _stop_at_exit() -> None:
    # A thread that the interpreter stops in the middle of a product takes the process down with it.
    for engine in list(_engines.values()):
        engine.stop(EngineStateError("the interpreter exits"))


atexit.register(_stop_at_exit)
os.register_at_fork(after_in_child=_after_fork_in_child)
