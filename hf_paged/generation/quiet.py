"""Silence for one thread while a preparation runs only to be looked at."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_LOGGERS = tuple(
    logging.getLogger(f"transformers.generation.{name}")
    for name in ("utils", "configuration_utils", "logits_process", "stopping_criteria")
)
_METHODS = ("warning", "warning_once")
_silent_threads: set[int] = set()
_lock = threading.Lock()


@contextmanager
def quiet() -> Iterator[None]:
    """Inside, no warning of transformers' generation code is shown in this thread, nor marked as shown."""
    thread = threading.get_ident()
    with _lock:
        if not _silent_threads:
            _gag()
        _silent_threads.add(thread)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        with _lock:
            _silent_threads.discard(thread)
            if not _silent_threads:
                _ungag()


def is_quiet() -> bool:
    """Whether this thread is inside of `quiet`."""
    return threading.get_ident() in _silent_threads


def _gag() -> None:
    # A filter would not do: `warning_once` remembers what passed it, and the real call would stay silent.
    for logger in _LOGGERS:
        for name in _METHODS:
            logger.__dict__[name] = _unless_silent(getattr(logger, name))


def _ungag() -> None:
    for logger in _LOGGERS:
        for name in _METHODS:
            logger.__dict__.pop(name, None)


def _unless_silent(method: Callable[..., Any]) -> Callable[..., Any]:
    def log(*args: Any, **kwargs: Any) -> None:
        if threading.get_ident() not in _silent_threads:
            method(*args, **kwargs)

    return log
