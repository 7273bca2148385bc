"""Who runs the steps of an engine.

One thread at a time holds the crank. A lone caller holds it itself: no thread is made. When a second caller or a
submitted request appears, the holder gives it up at the next step boundary to an engine thread, which ends when
nothing is left. Only the holder touches scheduler, block manager and pool; everybody else leaves messages that the
holder reads between steps.
"""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, TypeAlias

from hf_paged.engine.request import Call, FinishReason
from hf_paged.engine.wake import Wake
from hf_paged.errors import EngineStateError, RequestCancelledError
from hf_paged.kernels.cpu_workers import let_workers_go

if TYPE_CHECKING:
    from hf_paged.engine.loop import StepLoop

#: Returns when its argument says so: turns the crank or waits meanwhile.
Until: TypeAlias = Callable[[Callable[[], bool]], None]

#: Seconds after which calls that wait for their callers lose their blocks to others that cannot go on without.
_PATIENCE_S = 0.05


class Crank:
    """The turning of one engine: `run`, `submit`, `cancel` and `call_soon` may come from any thread.

    Args:
        renew: called with a call that was made before a `paused` block and is taken up after it.
    """

    def __init__(self, loop: StepLoop, renew: Callable[[Call], object]) -> None:
        self._loop = loop
        self._renew = renew
        # Reentrant: the garbage collector may run in any line here, and drop a cache whose blocks go back.
        self._mutex = threading.RLock()
        self._idle = threading.Condition(self._mutex)
        self._posted = threading.Condition(self._mutex)  # something was put into the inbox
        self._inbox: deque[Callable[[], object]] = deque()
        self._held = False  # somebody is turning
        self._callers = 0  # threads inside `attend`
        self._inside: Counter[int] = Counter()  # the same, by identity
        self._hand_over = False  # the holding caller shall let an engine thread take over
        self._thread: threading.Thread | None = None
        self._paused_by: int | None = None  # the thread that changes weights now
        self._closed_by: BaseException | None = None  # what calls that come after `close` fail with
        self.num_pauses = 0  # `paused` blocks that have ended

    @property
    def is_paused_here(self) -> bool:
        return self._paused_by == threading.get_ident()

    @property
    def is_idle(self) -> bool:
        return not self._held and not self._inbox and not self._callers

    # --- from any thread ----------------------------------------------------------------------------------------------

    def run(self, calls: Sequence[Call]) -> None:
        """Returns when `calls` have ended. An interrupt of the calling thread cancels these calls only."""
        with self.attend(calls) as until:
            until(lambda: all(call.done.is_set() for call in calls))

    @contextmanager
    def attend(self, calls: Sequence[Call]) -> Iterator[Until]:
        """Takes `calls` up for the calling thread, which looks after them inside and leaves when they have ended.

        What is raised inside cancels them. Between two uses of what it gives, the thread does not hold the crank.
        """
        wake, me = Wake(), threading.get_ident()
        for call in calls:
            call.wake = wake
        with self._mutex:
            self._let_in(calls)
            self._inbox.extend(partial(self._loop.take_up, call) for call in calls)
            self._callers += 1
            self._inside[me] += 1
            if self._held or self._callers > 1:
                self._want_thread()
        try:
            yield partial(self._until, calls, wake)
        except BaseException:
            for call in calls:
                self.cancel(call)
            raise
        finally:
            with self._mutex:
                self._callers -= 1
                self._inside[me] -= 1
                if not self._inside[me]:
                    del self._inside[me]
                self._idle.notify_all()

    def answer(self, call: Call, tokens: list[int], reasons: list[FinishReason | None]) -> None:
        """From the thread that attends to the lockstep call `call`: see `StepLoop.answer`."""
        with self._mutex:
            self._inbox.append(partial(self._loop.answer, call, tokens, reasons))
            # A lone caller turns the crank itself as soon as it has nothing else to do.
            if self._held or self._callers > 1:
                self._want_thread()

    def submit(self, calls: Sequence[Call]) -> None:
        let_workers_go()
        with self._mutex:
            self._let_in(calls)
            self._inbox.extend(partial(self._loop.take_up, call) for call in calls)
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
                self._posted.notify()
                return
            self._held = True
        try:
            action()
        finally:
            self._let_go()

    def drain(self) -> None:
        """Returns when nobody turns and nothing is left to do.

        Raises:
            EngineStateError: the calling thread runs code of a user that one of the calls is waiting for.
        """
        if threading.get_ident() in self._inside:
            raise EngineStateError("this would wait for the very call that is running this code")
        self._wait_for_the_end()

    def _wait_for_the_end(self) -> None:
        with self._idle:
            self._idle.wait_for(lambda: not self._held and not self._inbox and not self._loop.calls)

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
                self.num_pauses += 1
                self._idle.notify_all()

    def _let_in(self, calls: Sequence[Call]) -> None:
        """With the mutex: waits while another thread changes weights."""
        if self._paused_by == threading.get_ident():
            raise EngineStateError("the engine is paused by this thread: generate after the paused() block")
        self._idle.wait_for(lambda: self._paused_by is None)
        if self._closed_by is not None:  # it may have waited long: the model is not patched any more
            raise EngineStateError(str(self._closed_by))
        for call in calls:
            if call.num_pauses != self.num_pauses:
                self._renew(call)

    def close(self, error: BaseException) -> None:
        """Ends every call with `error` and returns when nobody turns any more and no thread is left."""
        with self._mutex:
            self._closed_by = error
        thread = self._thread
        self.call_soon(lambda: self._loop.fail_all(error))
        self._wait_for_the_end()
        if thread is not None:
            thread.join()

    # --- turning ------------------------------------------------------------------------------------------------------

    def _want_thread(self) -> None:
        """With the mutex: an engine thread shall turn, now or when the holding caller lets go."""
        if self._held:
            self._hand_over = self._thread is None
            self._posted.notify()
        else:
            self._start_thread()

    def _start_thread(self) -> None:
        self._held = True
        self._hand_over = False
        self._thread = threading.Thread(target=self._turn_until_done, name="hf_paged-engine", daemon=True)
        self._thread.start()

    def _until(self, calls: Sequence[Call], wake: Wake, ready: Callable[[], bool]) -> None:
        while True:
            wake.clear()
            if ready():
                return
            with self._mutex:
                mine = not self._held and self._callers == 1
                if mine:
                    self._held = True
                elif not self._held:
                    self._start_thread()
            if mine:
                self._turn_for(calls, ready)
            else:
                let_workers_go()
                wake.wait()

    def _turn_for(self, calls: Sequence[Call], ready: Callable[[], bool]) -> None:
        """A lone caller turns until it is `ready` or an engine thread shall take over."""
        self._loop.disturbed = True
        try:
            while not ready() and not self._hand_over:
                self._turn_once()
        except Exception as error:  # a defect in the engine itself: nobody may wait for ever
            self._loop.fail_all(error)
        except BaseException as error:
            # An interrupt may have come between two lines of bookkeeping. A holding caller is alone, so what is
            # running is its own call and whatever was submitted a moment ago; nothing half-done may survive.
            self._loop.abandon(calls, error)
            raise
        finally:
            self._let_go(coming_back=any(not call.done.is_set() for call in calls))

    def _turn_until_done(self) -> None:
        impatient = False
        while True:
            going = True
            try:
                while going and (self._loop.has_work or self._inbox):
                    going = self._turn_once(impatient)
                    impatient = False
            except BaseException as error:
                self._loop.fail_all(error)
            with self._mutex:
                if self._inbox or (going and self._loop.has_work):
                    continue
                if self._loop.calls:  # all are with their callers, or wait for blocks of those that are
                    blocked = self._loop.has_work
                    # Never for ever: the garbage collector may post in the very moment before the wait begins.
                    impatient = not self._posted.wait(_PATIENCE_S if blocked else 1.0) and blocked
                    continue
                self._loop.went_idle()
                if self._inbox:  # left by the garbage collector
                    continue
                self._held = False
                self._thread = None
                self._idle.notify_all()
                return

    def _turn_once(self, impatient: bool = False) -> bool:
        """Returns False if a step was wanted and nothing could go on."""
        while self._inbox:
            self._loop.disturbed = True
            self._inbox.popleft()()
        return not self._loop.has_work or self._loop.step(impatient=impatient)

    def _let_go(self, *, coming_back: bool = False) -> None:
        """A caller stops turning: an engine thread goes on if anything is left.

        Args:
            coming_back: what is left is the caller's own, and it will turn again unless somebody else wants to.
        """
        with self._mutex:
            mine = coming_back and self._callers == 1 and not self._hand_over
            if not self._inbox and not self._loop.calls:
                self._loop.went_idle()
            if self._inbox or (self._loop.has_work and not mine):
                self._start_thread()
                let_workers_go()
                return
            self._held = False
            self._hand_over = False
            self._idle.notify_all()
