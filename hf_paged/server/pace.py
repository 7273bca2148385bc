"""How often streams send: tokens that come while many streams run share an event."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator

#: Seconds between two events of a stream: at most, and below which a wait is not worth its timer.
_LONGEST, _SHORTEST = 0.1, 0.005
#: Seconds between two moments at which streams go on: what is due at one moment is one turn of the event loop, which
#: then takes the interpreter's lock from the engine once and not once a stream.
_TICK = 0.01


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
        self._ticks: dict[int, asyncio.Event] = {}  # by their number: those that streams wait for

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        """Counts a stream while the block runs."""
        self._streams += 1
        try:
            yield
        finally:
            self._streams -= 1

    def seconds(self) -> float:
        """What a stream waits between two events now, on average, but for the ticks it can wait for."""
        seconds = min(_LONGEST, self._streams / self._most)
        return seconds if seconds > _SHORTEST else 0.0

    async def pause(self) -> None:
        """Waits until a stream that has sent an event may send the next."""
        seconds = self.seconds()
        if seconds:
            await self._tick(seconds).wait()

    def _tick(self, seconds: float) -> asyncio.Event:
        """A tick to come, `seconds` from now: of the two around that moment either, as often as it is the nearer."""
        loop = asyncio.get_running_loop()
        now = loop.time() / _TICK
        # By chance: all streams have their events at ticks, so rounding would be off by the same each time.
        number = max(int(now + seconds / _TICK + random.random()), int(now) + 1)
        tick = self._ticks.get(number)
        if tick is None:
            tick = self._ticks[number] = asyncio.Event()
            loop.call_at(number * _TICK, self._go_on, number)
        return tick

    def _go_on(self, number: int) -> None:
        self._ticks.pop(number).set()
