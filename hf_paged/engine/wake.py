"""`Wake`: how the thread of a call is told to look at it."""

from __future__ import annotations

import threading


class Wake:
    """Wakes the one thread that waits for it: an event of a single lock, a tenth of `threading.Event`'s work."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()  # locked: not set
        self._lock.acquire()

    def set(self) -> None:
        """The thread that waits, or waits next, goes on. From any thread."""
        try:
            self._lock.release()
        except RuntimeError:
            pass  # it is set already

    def clear(self) -> None:
        """What was set so far wakes nobody."""
        self._lock.acquire(blocking=False)

    def wait(self) -> None:
        """Returns when it is set, and clears it."""
        self._lock.acquire()
