"""`RequestHandle`: a submitted request, followed from any thread or event loop while the engine works on
it.
"""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterator
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from hf_paged.generation.results import GenerationResult, RequestMetrics, result_of

if TYPE_CHECKING:
    from hf_paged.engine.engine import PagedEngine
    from hf_paged.engine.request import Call, Sequence
    from hf_paged.engine.sampling import TokenLogprobs

__all__ = ["GenerationResult", "RequestHandle", "RequestMetrics"]


class RequestHandle:
    """One submitted request. It makes progress unwaited. When nobody holds the handle any more, and nobody
    iterates over it or awaits it, the request is cancelled and its blocks go back at the next step: so
    `for token in engine.submit(...)` may be left at any time.

    for token in handle: ...            # token ids as they come; each iteration starts at the first one
    async for token in handle: ...
    async for tokens in handle.updates(): ...   # those that came together in one list
    result = handle.result(timeout=60)  # or: result = await handle
    handle.cancel()
    """

    def __init__(self, engine: PagedEngine) -> None:
        self._engine = engine
        self._call: Call | None = None
        self._tokens: list[int] = []
        #: When each token came: seconds of `time.perf_counter`.
        self.token_times: list[float] = []
        self._ended = False
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        self._over = threading.Condition(lock)  # only who reads tokens is woken by each of them
        self._watchers: list[Callable[[], object]] = []  # woken by each change
        self._enders: list[Callable[[], object]] = []  # woken by the end
        #: This handle, once for each event loop that waits for it: a loop holds its tasks weakly.
        self._holders: list[RequestHandle] = []

    def start(self, call: Call) -> None:
        """Hands `call` to the engine. Once, by whoever made the handle."""
        # The engine holds the call, and the call must not hold the handle, or nobody could drop it.
        handle, holders = weakref.ref(self), self._holders

        def on_token(sequence: Sequence, token: int) -> None:
            alive = handle()
            if alive is not None:
                alive._on_token(sequence, token)

        def on_finish(call: Call) -> None:
            alive = handle()
            if alive is not None:
                alive._on_finish(call)
            holders.clear()

        call.on_token, call.on_finish = on_token, on_finish
        self._call = call
        self._engine.submit(call)
        weakref.finalize(self, self._engine.drop, call).atexit = False

    # --- for users
    # ----------------------------------------------------------------------------------------------------

    @property
    def done(self) -> bool:
        """Whether the request has ended, in whatever way."""
        return self._ended

    def result(self, timeout: float | None = None) -> GenerationResult:
        """Waits for the end.

        Args:
            timeout: seconds to wait; None for as long as it takes.

        Raises:
            TimeoutError: it has not ended in time; it runs on.
            RequestCancelledError: it was cancelled.
            Exception: what the request failed with.
        """
        with self._over:
            if not self._over.wait_for(lambda: self._ended, timeout):
                raise TimeoutError(f"the request has not ended within {timeout} s")
        return self._outcome()

    @property
    def logprobs(self) -> list[TokenLogprobs]:
        """Of the new tokens so far, if they were asked for; grows while the request runs, not to be changed."""
        return self._started.sampling.token_logprobs[0]

    def partial(self) -> GenerationResult:
        """What there is now, also of a request that runs, failed or was cancelled."""
        return result_of(self._started)

    def cancel(self) -> None:
        """Ends the request at the next step and gives its blocks back. Does nothing if it has ended."""
        if not self._ended:
            self._engine.cancel(self._started)

    def __iter__(self) -> Iterator[int]:
        """Token ids as they come. Raises at the end what the request failed with, if it did."""
        seen = 0
        while True:
            with self._changed:
                while not self._ended and len(self._tokens) == seen:
                    self._changed.wait()
                new, ended = self._tokens[seen:], self._ended
            yield from new
            seen += len(new)
            if ended:
                self._outcome()
                return

    async def __aiter__(self) -> AsyncIterator[int]:
        """As `__iter__`, without blocking the event loop."""
        async for tokens in self.updates():
            for token in tokens:
                yield token

    async def updates(self) -> AsyncGenerator[list[int], None]:
        """Token ids as they come, those of one moment in one list. Raises at the end what the request failed with."""
        seen = 0
        async with aclosing(self._changes(self._watchers)) as changes:
            async for ended in changes:
                new = self._tokens[seen:]
                seen += len(new)
                if new:
                    yield new
                if ended:
                    self._outcome()
                    return

    def __await__(self) -> Generator[Any, None, GenerationResult]:
        """The result, as `result()` gives it."""
        return self._await().__await__()

    # --- inside
    # -------------------------------------------------------------------------------------------------------

    async def _await(self) -> GenerationResult:
        async with aclosing(self._changes(self._enders)) as changes:
            async for ended in changes:
                if ended:
                    break
        return self._outcome()

    async def _changes(self, watchers: list[Callable[[], object]]) -> AsyncGenerator[bool, None]:
        """Whether the request has ended: once now, then whenever `watchers` are woken, until it has."""
        loop, event = asyncio.get_running_loop(), asyncio.Event()
        changed = waiting = False  # who is busy with the last change is not called: it costs both threads

        def wake() -> None:
            nonlocal changed, waiting
            changed = True
            if waiting:
                waiting = False
                loop.call_soon_threadsafe(event.set)

        with self._changed:
            watchers.append(wake)
            if not self._ended:
                self._holders.append(self)
        try:
            while True:
                with self._changed:
                    changed, ended = False, self._ended
                yield ended
                if ended:
                    return
                event.clear()
                with self._changed:  # as `wake` is called
                    waiting = not changed
                if waiting:
                    await event.wait()
                else:
                    await asyncio.sleep(0)  # a caller that never waits for anything leaves others their turn
        finally:
            with self._changed:
                watchers.remove(wake)
                if self._holders:
                    self._holders.pop()

    @property
    def _started(self) -> Call:
        assert self._call is not None, "the request was not handed to the engine"
        return self._call

    def _outcome(self) -> GenerationResult:
        if self._started.error is not None:
            raise self._started.error
        return result_of(self._started)

    def _on_token(self, sequence: Sequence, token: int) -> None:
        with self._changed:
            self._tokens.append(token)
            self.token_times.append(time.perf_counter())
            self._notify(self._watchers)

    def _on_finish(self, call: Call) -> None:
        with self._changed:
            self._ended = True
            self._over.notify_all()
            self._notify(self._watchers)
            self._notify(self._enders)

    def _notify(self, watchers: list[Callable[[], object]]) -> None:
        self._changed.notify_all()
        for wake in watchers:
            try:
                wake()
            except RuntimeError:
                pass  # the watcher's event loop was closed: nobody is left to wake
