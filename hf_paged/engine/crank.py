"""Who runs the steps of an engine.

One thread at a time holds the crank. A lone caller holds it itself: no thread is made. When a second caller or a
submitted request appears, the holder gives it up at the next step boundary to an engine thread, which ends when
nothing is left. Only the holder touches scheduler, block manager and pool; everybody else leaves messages that the
holder reads between steps.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from hf_paged.engine.request import Call
from hf_paged.errors import EngineStateError, RequestCancelledError

if TYPE_CHECKING:
    from hf_paged.engine.loop import StepLoop


class Crank:
    """The turning of one engine: `run`, `submit`, `cancel` and `call_soon` may come from any thread."""

    def __init__(self, loop: StepLoop) -> None:
        self._loop = loop
        # Reentrant: the garbage collector may run in any line here, and drop a cache whose blocks go back.
        self._mutex = threading.RLock()
        self._idle = threading.Condition(self._mutex)
        self._inbox: deque[Callable[[], object]] = deque()
        self._held = False  # somebody is turning
        self._callers = 0  # threads inside `run`
        self._hand_over = False  # the holding caller shall let an engine thread take over
        self._thread: threading.Thread | None = None
        self._paused_by: int | None = None  # the thread that changes weights now

    @property
    def is_idle(self) -> bool:
        return not self._held and not self._inbox and not self._callers

    # --- from any thread ----------------------------------------------------------------------------------------------

    def run(self, calls: Sequence[Call]) -> None:
        """Returns when `calls` have ended. An interrupt of the calling thread cancels these calls only."""
        with self._mutex:
            self._wait_while_paused()
            self._inbox.extend(partial(self._loop.take_up, call) for call in calls)
            self._callers += 1
            mine = not self._held and self._callers == 1
            self._held = self._held or mine
            if not mine:
                self._want_thread()
        try:
            if mine:
                self._turn_for(calls)
            for call in calls:
                call.done.wait()
        except BaseException:
            for call in calls:
                self.cancel(call)
            raise
        finally:
            with self._mutex:
                self._callers -= 1
                self._idle.notify_all()

    def submit(self, call: Call) -> None:
        with self._mutex:
            self._wait_while_paused()
            self._inbox.append(partial(self._loop.take_up, call))
            self._want_thread()

    def cancel(self, call: Call) -> None:
        def end() -> None:
            self._loop.fail([call], RequestCancelledError("the request was cancelled"))

        call.cancelled = True
        if not call.done.is_set():
            self.call_soon(end)

    def drop(self, call: Call) -> None:
        """As `cancel`, at the next step; takes no lock, so that a finalizer may call it anywhere."""
        call.cancelled = True
        if not call.done.is_set():
            self._loop.dropped.append(call)

    def call_soon(self, action: Callable[[], object]) -> None:
        """Runs `action` at the next step boundary; at once, here, when nobody turns."""
        with self._mutex:
            if self._held:
                self._inbox.append(action)
                return
            self._held = True
        try:
            action()
        finally:
            self._let_go()

    def drain(self) -> None:
        """Returns when nobody turns and nothing is left to do."""
        with self._idle:
            self._idle.wait_for(lambda: not self._held and not self._inbox and not self._loop.has_work)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Drains, then holds back new calls of other threads until the block ends."""
        me = threading.get_ident()
        with self._idle:
            if self._paused_by == me:
                raise EngineStateError("the engine is already paused by this thread")
            self._idle.wait_for(lambda: self._paused_by is None)
            self._paused_by = me
        try:
            self.drain()
            yield
        finally:
            with self._idle:
                self._paused_by = None
                self._idle.notify_all()

    def _wait_while_paused(self) -> None:
        """With the mutex held."""
        if self._paused_by == threading.get_ident():
            raise EngineStateError("the engine is paused by this thread: generate after the paused() block")
        self._idle.wait_for(lambda: self._paused_by is None)

    def close(self, error: BaseException) -> None:
        """Ends every call with `error` and returns when nobody turns any more and no thread is left."""
        thread = self._thread
        self.call_soon(lambda: self._loop.fail_all(error))
        self.drain()
        if thread is not None:
            thread.join()

    # --- turning ------------------------------------------------------------------------------------------------------

    def _want_thread(self) -> None:
        """With the mutex: an engine thread shall turn, now or when the holding caller lets go."""
        if self._held:
            self._hand_over = self._thread is None
        else:
            self._start_thread()

    def _start_thread(self) -> None:
        self._held = True
        self._hand_over = False
        self._thread = threading.Thread(target=self._turn_until_done, name="hf_paged-engine", daemon=True)
        self._thread.start()

    def _turn_for(self, calls: Sequence[Call]) -> None:
        """A lone caller turns until its calls have ended or an engine thread shall take over."""
        try:
            for call in calls:
                while not call.done.is_set() and not self._hand_over:
                    self._turn_once()
        except Exception as error:  # a defect in the engine itself: nobody may wait for ever
            self._loop.fail_all(error)
        except BaseException as error:
            # An interrupt may have come between two lines of bookkeeping. A holding caller is alone, so what is
            # running is its own call and whatever was submitted a moment ago; nothing half-done may survive.
            self._loop.abandon(calls, error)
            raise
        finally:
            self._let_go()

    def _turn_until_done(self) -> None:
        while True:
            try:
                while self._loop.has_work or self._inbox:
                    self._turn_once()
            except BaseException as error:
                self._loop.fail_all(error)
            with self._mutex:
                if self._inbox or self._loop.has_work:
                    continue
                self._loop.went_idle()
                if self._inbox:  # left by the garbage collector
                    continue
                self._held = False
                self._thread = None
                self._idle.notify_all()
                return

    def _turn_once(self) -> None:
        while self._inbox:
            self._inbox.popleft()()
        if self._loop.has_work:
            self._loop.step()

    def _let_go(self) -> None:
        """A caller stops turning: an engine thread goes on if anything is left."""
        with self._mutex:
            if not self._inbox and not self._loop.has_work:
                self._loop.went_idle()
            if self._inbox or self._loop.has_work:
                self._start_thread()
                return
            self._held = False
            self._hand_over = False
            self._idle.notify_all()
