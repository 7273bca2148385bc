"""The calls an engine has, and how they come and end. Only the holder of the crank calls what is here."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

from torch import nn

from hf_paged.config import PagedConfig
from hf_paged.engine.adapter_gate import AdapterGate
from hf_paged.engine.assistant import make_assistant
from hf_paged.engine.assistant_host import AssistantHost, NoAssistants
from hf_paged.engine.request import Call, FinishReason, Sequence, Status
from hf_paged.engine.runtime import Runtime
from hf_paged.engine.speculation import Speculator
from hf_paged.engine.stats import Counters
from hf_paged.engine.weights_guard import WeightsGuard
from hf_paged.errors import EngineStateError, InvalidRequestError, KVCacheOutOfMemory, RequestCancelledError

if TYPE_CHECKING:
    from typing import Protocol

    class Patch(Protocol):
        """What the engine needs of `hf_paged.patches.apply.AppliedPatch`."""

        owner: object

        #: `layer_geometry` as `reasons` saw it last.
        geometry: tuple
        #: See `engine.batch.build`.
        least_cut: int | None

        def layer_geometry(self) -> list: ...
        def reasons(self) -> list[tuple[str, str]]: ...
        def revert(self) -> None: ...


#: Seconds in which blocks that are kept for returned caches come back when others wait for them.
_SPILLING_S = 10.0


class CallTable:
    """Takes calls up and ends them, whatever happened. Holds the model weakly."""

    def __init__(self, model: nn.Module, patch: Patch, config: PagedConfig) -> None:
        self._model = weakref.ref(model)
        self.patch = patch
        self.config = config
        self.counters = Counters()
        self.runtime: Runtime | None = None
        self._building = threading.Lock()
        self.calls: dict[Call, None] = {}
        self.attended: set[Call] = set()  # lockstep calls whose callers choose tokens now
        self.assistants: AssistantHost = NoAssistants()  # set by `enable`
        self.speculator = Speculator(
            lambda speculation: make_assistant(speculation, self.assistants, self.model, patch, config)
        )
        self.guard = WeightsGuard()
        #: Code that is not the engine's may have run in the thread of the steps since the guard was asked.
        self.disturbed = True
        self.gate: AdapterGate | None = None  # set where the number of adapters in the model is bounded
        self.kept: set[Sequence] = set()  # finished, their blocks still wanted (`Call.keep_kv`)
        #: `perf_counter()` since when nothing runs for want of blocks.
        self.stuck_since: float | None = None
        self.dropped: deque[Call] = deque()  # calls nobody waits for any more
        self.failure: BaseException | None = None  # what the last step or the turning of it failed with
        self.step_started: float | None = None  # `perf_counter()` while the model runs

    @property
    def model(self) -> nn.Module:
        model = self._model()
        if model is None:
            raise EngineStateError("the model of this engine no longer exists")
        return model

    def ready(self) -> Runtime:
        """The runtime for the model as it is now: rebuilt when dtype, device or shapes changed while idle."""
        geometry = tuple(self.patch.layer_geometry())
        runtime = self.runtime
        if runtime is not None and runtime.geometry == geometry:
            return runtime
        with self._building:  # callers ask for it too, not only the holder of the crank
            runtime = self.runtime
            if runtime is not None and runtime.geometry == geometry:
                return runtime
            if runtime is not None:
                if self.calls or self.kept:
                    raise EngineStateError(
                        "the model's dtype, device or layers changed while requests were running"
                    )
                runtime.close()
            self.runtime = Runtime(geometry, self.config)
            self.runtime.scheduler.gate = self.gate
            return self.runtime

    def take_up(self, call: Call) -> None:
        """Called by the crank holder for each new call."""
        if call.cancelled:
            call.mark_unfinished(FinishReason.CANCELLED)
            self._end(call, RequestCancelledError("the request was cancelled"))
            return
        try:
            runtime = self.ready()
            self.speculator.take_up(call)
        except Exception as error:
            self._end(call, error)
            return
        runtime.look_again()
        self.calls[call] = None
        self.counters.requests += len(call.sequences)
        self.counters.prompt_tokens += sum(s.prompt_len for s in call.sequences)
        self._schedule(runtime, call)

    @staticmethod
    def _schedule(runtime: Runtime, call: Call) -> None:
        runtime.scheduler.add(call)
        if runtime.ahead is not None:
            runtime.ahead.take_up(call)

    def _retire(self, runtime: Runtime, sequences: list[Sequence]) -> None:
        kept = [s for s in sequences if s.call.keep_kv]
        runtime.scheduler.remove(kept, keep_blocks=True)
        self.kept.update(kept)
        runtime.scheduler.remove(s for s in sequences if not s.call.keep_kv)

    def _complete(self, call: Call) -> None:
        self.calls.pop(call, None)
        self.attended.discard(call)
        self.speculator.ended(call)
        call.finished_at = time.perf_counter()
        if call.on_finish is not None:
            self.disturbed = True
            call.on_finish(call)
        call.end()

    # --- endings ------------------------------------------------------------------------------------------------------

    def fail(self, calls: Iterable[Call], error: BaseException) -> None:
        """Ends `calls` with `error`; their blocks go back. Crank holder only."""
        for call in calls:
            if call not in self.calls:
                continue
            if self.runtime is not None:
                self.runtime.scheduler.remove(call.sequences)
            cancelled = isinstance(error, RequestCancelledError)
            call.mark_unfinished(FinishReason.CANCELLED if cancelled else FinishReason.ERROR)
            call.error = error
            self._complete(call)

    def fail_all(self, error: BaseException) -> None:
        """Ends every call with `error`, which is a defect of the engine, or why it ends."""
        self.failure, self.step_started = error, None
        calls = list(self.calls)
        try:
            self.fail(calls, error)
        except BaseException:  # not even that works: the bookkeeping is broken, and nobody may wait for ever
            self.abandon(calls, error)

    def abandon(self, calls: SequenceOf[Call], error: BaseException) -> None:
        """After an interrupt anywhere in a step: starts from an empty runtime, since bookkeeping may be half-done.

        `calls` end with `error`; others, submitted a moment ago, start again from their prompts and tokens.
        """
        others = [c for c in self.calls if c not in calls]
        self.calls.clear()
        self.attended.difference_update(calls)
        self.kept.clear()
        self.speculator.abandon()
        if self.runtime is not None:
            self.runtime.close()
            self.runtime = None
        for seq in (s for c in (*calls, *others) for s in c.sequences):
            seq.block_table, seq.block_keys, seq.num_computed, seq.num_ahead = [], [], 0, 0
            if seq.status is Status.RUNNING:
                seq.status = Status.WAITING
        for call in calls:
            if not call.done.is_set():
                self._end(call, error)
        for other in others:
            self._restart(other)

    @staticmethod
    def _end(call: Call, error: BaseException) -> None:
        """Ends a call that the scheduler does not know, or does not know any more."""
        call.error = error
        call.finished_at = time.perf_counter()
        try:
            if call.on_finish is not None:
                call.on_finish(call)
        finally:
            call.end()

    def restart_empty(self) -> None:
        """In a forked child: the parent's calls are not ours."""
        self.calls.clear()
        self.attended.clear()
        self.kept.clear()
        self.speculator.abandon()
        self.runtime = None
        self._building = threading.Lock()

    def _restart(self, call: Call) -> None:
        self.calls[call] = None
        try:
            self.speculator.take_up(call)
            self._schedule(self.ready(), call)
        except Exception as error:
            self.fail([call], error)

    def spill_kept(self) -> bool:
        """Has blocks that are kept for returned caches given back: requests which run go before.

        Returns:
            Whether there are any, which come with one of the next steps.
        """
        calls = {s.call for s in self.kept}
        self.stuck_since = self.stuck_since or time.perf_counter()
        if not calls or time.perf_counter() - self.stuck_since > _SPILLING_S:
            return False
        for call in calls:
            if call.spill is not None:
                call.spill()
        time.sleep(0.001)  # those of calls that have ended just now are still with the threads of these
        return True

    def _fail_stuck(self, runtime: Runtime) -> None:
        """Nothing can be scheduled though something waits: the pool shrank under it or kept blocks fill it."""
        stuck = dict.fromkeys(s.call for s in (*runtime.scheduler.running, *runtime.scheduler.waiting))
        of_which = f"{sum(len(s.block_table) for s in self.kept)} of them kept for returned past_key_values"
        text = f"no block is free for a waiting request: {runtime.manager.max_blocks} blocks, {of_which}"
        refused = runtime.manager.max_blocks < runtime.cache.max_blocks  # the system gave no more
        self.fail(stuck, KVCacheOutOfMemory(text) if refused else InvalidRequestError(text))

    # --- when nothing runs ------------------------------------------------------------------------------------------

    def release_kept(self, call: Call) -> None:
        for seq in call.sequences:
            if seq in self.kept:
                self.kept.discard(seq)
                if self.runtime is not None:
                    self.runtime.manager.free(seq)

    def went_idle(self) -> None:
        """Called by the crank holder when nothing is left to run."""
        self.guard.forget()
        if self.runtime is not None:
            self.runtime.went_idle()

    def drop_cached(self) -> None:
        if self.runtime is not None:
            self.runtime.manager.drop_cached()

    def release_memory(self) -> None:
        """Gives all KV memory back, unless something runs again or blocks are kept for the user."""
        if self.runtime is not None and not self.calls and not self.kept:
            self.runtime.close()
            self.runtime = None

    def reset_counters(self) -> None:
        self.counters = Counters.starting_at(self.runtime)

    def close(self) -> None:
        """Gives everything back."""
        self.kept.clear()
        if self.runtime is not None:
            self.runtime.close()
            self.runtime = None
