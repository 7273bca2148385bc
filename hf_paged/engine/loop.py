"""The life of a step: plan, forward, sample, finish. Only the holder of the crank calls what is here."""

from __future__ import annotations

import functools
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterable
from collections.abc import Sequence as SequenceOf
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from hf_paged.config import PagedConfig
from hf_paged.engine import batch, beam_steps
from hf_paged.engine.assistant import Assistant, AssistantHost, NoAssistants
from hf_paged.engine.given_kv import write_given
from hf_paged.engine.request import Call, FinishReason, Sequence, Status
from hf_paged.engine.runtime import Runtime
from hf_paged.engine.speculation import Speculator
from hf_paged.engine.stats import Counters
from hf_paged.engine.weights_guard import WeightsGuard
from hf_paged.errors import EngineStateError, InvalidRequestError, RequestCancelledError, WeightsChangedError
from hf_paged.step import StepPlan

if TYPE_CHECKING:
    from typing import Protocol

    class Patch(Protocol):
        """What the engine needs of `hf_paged.patches.apply.AppliedPatch`."""

        owner: object

        def layer_geometry(self) -> list: ...
        def reasons(self) -> list[tuple[str, str]]: ...
        def revert(self) -> None: ...


class StepLoop:
    """Takes calls up, runs their steps and ends them. Holds the model weakly."""

    def __init__(self, model: nn.Module, patch: Patch, config: PagedConfig) -> None:
        self._model = weakref.ref(model)
        self.patch = patch
        self.config = config
        self.counters = Counters()
        self.runtime: Runtime | None = None
        self._building = threading.Lock()
        self.calls: dict[Call, None] = {}
        self.assistants: AssistantHost = NoAssistants()  # set by `enable`
        self.speculator = Speculator(lambda model: Assistant(model, self.assistants, config))
        self.guard = WeightsGuard()
        self.kept: set[Sequence] = set()  # finished, their blocks still wanted (`Call.keep_kv`)
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
        self.calls[call] = None
        self.counters.requests += len(call.sequences)
        self.counters.prompt_tokens += sum(s.prompt_len for s in call.sequences)
        runtime.scheduler.add(call)

    @property
    def has_work(self) -> bool:
        return self.runtime is not None and self.runtime.scheduler.has_work

    def step(self) -> None:
        """Plans and runs one step. An exception of the forward fails the calls that were in it, nobody else."""
        runtime = self.runtime
        if runtime is None:
            return
        while self.dropped:
            self.fail([self.dropped.popleft()], RequestCancelledError("the request was dropped"))
        start = time.perf_counter()
        if failed := self.speculator.propose(runtime.scheduler):
            for seq, error in failed.items():
                self.fail([seq.call], error)
            return
        plan = runtime.scheduler.schedule()
        if plan is None:
            self._fail_stuck(runtime)
            return
        now = time.perf_counter()
        for seq in plan.sequences:
            if seq.call.first_scheduled_at is None:
                seq.call.first_scheduled_at = now
        self.step_started = now
        try:
            logits = self._forward(runtime, plan)
        except Exception as error:
            self.failure, self.step_started = error, None
            if not self._fail_lost(plan):
                self.fail(dict.fromkeys(s.call for s in plan.sequences), error)
            return
        if self._fail_lost(plan) or self._fail_stale(runtime, plan):
            return  # the others' tokens are planned again
        self.failure, self.step_started = None, None
        runtime.stepped()
        runtime.scheduler.advance(plan)
        self.counters.count_step(runtime.scheduler, len(plan.sequences))
        if plan.sample_indices:
            self._sample(runtime, plan, logits)
        if restored := [s for s in plan.sequences if s.finish_reason is not None and s.call.keep_kv]:
            self._finish(runtime, [s for s in restored if s.status is Status.RUNNING])
        self.speculator.stepped(plan, time.perf_counter() - start)

    def _fail_lost(self, plan: StepPlan) -> bool:
        """Fails the calls whose adapters were taken away under them. Asked after a step: it may happen during one."""
        lost = {
            s.call: s.adapters for s in plan.sequences if s.adapters is not None and not s.adapters.is_present
        }
        for call, selection in lost.items():
            self.fail(
                [call],
                WeightsChangedError(f"adapter {selection} was removed or replaced while a request ran"),
            )
        return bool(lost)

    def _fail_stale(self, runtime: Runtime, plan: StepPlan) -> bool:
        """Fails the calls whose weights changed since they began: their KV belongs to no state of the model."""
        stale = dict.fromkeys(s.call for s in self.guard.changed(self.model, plan.sequences))
        if stale:
            # One error each: a traceback grows where it is raised.
            for call in stale:
                error = WeightsChangedError(
                    "the model's weights or this request's adapters changed while it ran; "
                    "change them inside of `with hf_paged.paused(model):`"
                )
                self.fail([call], error)
            runtime.manager.drop_cached()
        return bool(stale)

    def _forward(self, runtime: Runtime, plan: StepPlan) -> Tensor:
        write_given(plan.sequences, runtime.cache)
        if plan.block_copies:
            runtime.cache.copy_blocks(plan.block_copies, runtime.backend)
        inputs = batch.build(
            plan,
            block_size=runtime.manager.block_size,
            owner=self.patch.owner,
            backend=runtime.backend,
            device=runtime.device,
            kv_layer=runtime.cache.layer,
        )
        return runtime.runner.forward(self.model, inputs, plan.sequences[0].call.ambient)

    def _sample(self, runtime: Runtime, plan: StepPlan, logits: Tensor) -> None:
        """A next token for each sequence that reached its last one, and for those forked from it just now."""
        sequences = [plan.sequences[i] for i in plan.sample_indices]
        rows = list(itertools.accumulate(plan.logits_counts[:-1], initial=0))
        beams, rows, sequences = beam_steps.set_apart(rows, sequences)
        if beams:
            self._advance_beams(runtime, logits, beams)
            if not sequences:
                return
        for row, seq in zip(tuple(rows), tuple(sequences), strict=True):
            if seq.num_generated == 0 and len(seq.call.sequences) > 1:
                for child in runtime.scheduler.fork_children(seq):
                    sequences.append(child)
                    rows.append(row)
        last = logits
        if beams or len(rows) > len(plan.sample_indices) or plan.num_drafts:
            last = logits[torch.tensor(rows, device=logits.device)]
        with sequences[0].call.ambient.enter():
            tokens = runtime.sampler.sample(last, sequences)
        self._append(runtime, sequences, tokens)
        if plan.num_drafts:
            append = functools.partial(self._append, runtime)
            drafted, accepted = self.speculator.verify(
                plan, logits, runtime.sampler, runtime.scheduler, append
            )
            self.counters.drafted_tokens += drafted
            self.counters.accepted_tokens += accepted

    def _append(self, runtime: Runtime, sequences: list[Sequence], tokens: list[int | BaseException]) -> None:
        """Takes in a new token of each sequence, or what it failed with, and ends those whose last it was."""
        failed: dict[Call, BaseException] = {}
        accepted: list[Sequence] = []
        now = time.perf_counter()
        for seq, token in zip(sequences, tokens, strict=True):
            if isinstance(token, BaseException):
                failed.setdefault(seq.call, token)
                continue
            seq.token_ids.append(token)
            accepted.append(seq)
            if seq.finish_reason is None:
                self.counters.generated_tokens += 1
            if seq.call.first_token_at is None:
                seq.call.first_token_at = now
            if seq.call.on_token is not None and seq.finish_reason is None:
                seq.call.on_token(seq, token)
        for call, error in failed.items():
            self.fail([call], error)
        self._finish(runtime, [s for s in accepted if s.call not in failed])

    def _advance_beams(self, runtime: Runtime, logits: Tensor, beams: dict[Sequence, int]) -> None:
        ended, failed = beam_steps.advance(runtime.scheduler, logits, beams)
        for call, error in failed.items():
            self.fail([call], error)
        for group in ended:
            self.counters.generated_tokens += beam_steps.end(group)
            self._retire(runtime, group.sequences)
            if all(s.status is Status.FINISHED for s in group.call.sequences):
                self._complete(group.call)

    def _finish(self, runtime: Runtime, sequences: list[Sequence]) -> None:
        """Ends the sequences whose new token was their last, and the calls whose last sequence ended."""
        ended: list[Sequence] = []
        touched: dict[Call, None] = {}
        for seq, reason in zip(sequences, runtime.sampler.stops(sequences), strict=True):
            if seq.finish_reason is None:
                if reason is None:
                    continue
                seq.finish_reason = reason
                seq.num_kept = seq.num_generated
                if not seq.call.run_on:
                    ended.append(seq)
            touched[seq.call] = None
        for call in touched:
            if call.run_on and call.has_run_out:
                ended.extend(call.sequences)
        if ended:
            self._retire(runtime, ended)
        for call in touched:
            if all(s.status is Status.FINISHED for s in call.sequences):
                self._complete(call)

    def _retire(self, runtime: Runtime, sequences: list[Sequence]) -> None:
        kept = [s for s in sequences if s.call.keep_kv]
        runtime.scheduler.remove(kept, keep_blocks=True)
        self.kept.update(kept)
        runtime.scheduler.remove(s for s in sequences if not s.call.keep_kv)

    def _complete(self, call: Call) -> None:
        self.calls.pop(call, None)
        self.speculator.ended(call)
        call.finished_at = time.perf_counter()
        if call.on_finish is not None:
            call.on_finish(call)
        call.done.set()

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
        self.kept.clear()
        self.speculator.abandon()
        if self.runtime is not None:
            self.runtime.close()
            self.runtime = None
        for seq in (s for c in (*calls, *others) for s in c.sequences):
            seq.block_table, seq.block_keys, seq.num_computed = [], [], 0
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
            call.done.set()

    def restart_empty(self) -> None:
        """In a forked child: the parent's calls are not ours."""
        self.calls.clear()
        self.kept.clear()
        self.speculator.abandon()
        self.runtime = None
        self._building = threading.Lock()

    def _restart(self, call: Call) -> None:
        self.calls[call] = None
        try:
            self.speculator.take_up(call)
            self.ready().scheduler.add(call)
        except Exception as error:
            self.fail([call], error)

    def _fail_stuck(self, runtime: Runtime) -> None:
        """Nothing can be scheduled though something waits: the pool shrank under it or kept blocks fill it."""
        stuck = dict.fromkeys(s.call for s in (*runtime.scheduler.running, *runtime.scheduler.waiting))
        of_which = f"{sum(len(s.block_table) for s in self.kept)} of them kept for returned past_key_values"
        text = f"no block is free for a waiting request: {runtime.manager.max_blocks} blocks, {of_which}"
        self.fail(stuck, InvalidRequestError(text))

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
