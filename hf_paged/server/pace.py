"""How often streams send: tokens that come while many streams run share an event."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

#: Seconds between two events of a stream: at most, and below which a wait is not worth its timer.
_LONGEST, _SHORTEST = 0.1, 0.005


class Pace:
    """Spaces the events of all streams, so that together they are about so many a second.

    An event costs the event loop, the interpreter's lock and the client the same for one token as for ten. The first
    event of a stream never waits, and few streams do not either. One event loop's own: no lock.

    Args:
        events_per_second: of all streams together; more than that only where `_LONGEST` says so.
    """

    def __init__(self, events_per_second: int) -> None:
        self._most = events_per_second
        self._streams = 0

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Counts a stream while the block runs."""
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    def pause(self) -> float:
        """Seconds that a stream waits between two events now."""
        seconds = min(_LONGEST, self._streams / self._most)
        return seconds if seconds > _SHORTEST else 0.0
