"""The life of a step: plan, forward, choose tokens, take them in. Only the holder of the crank calls what is here."""

from __future__ import annotations

import functools
import itertools
import time

import torch
from torch import Tensor

from hf_paged.engine import batch, beam_steps, lockstep, states
from hf_paged.engine.adapter_gate import AdapterGate
from hf_paged.engine.ahead import StepsAhead
from hf_paged.engine.device_sampling import ChosenTokens, choose
from hf_paged.engine.given_kv import write_given
from hf_paged.engine.intake import TokenIntake, is_there
from hf_paged.engine.request import Call, Status
from hf_paged.engine.runtime import Runtime
from hf_paged.errors import RequestCancelledError, WeightsChangedError
from hf_paged.step import StepPlan, StepRecording


class StepLoop(TokenIntake):
    """Runs the steps of the calls it has taken up."""

    @property
    def has_work(self) -> bool:
        """Whether there are calls that do not wait for their callers."""
        return (
            self.runtime is not None
            and self.runtime.scheduler.has_work
            and len(self.calls) > len(self.attended)
        )

    def step(self, *, impatient: bool = False) -> bool:
        """Plans and runs one step. An exception of the forward fails the calls that were in it, nobody else.

        Args:
            impatient: take blocks from rows that wait for their callers where nothing can go on without.

        Returns:
            False if all that is left waits, for callers or for the blocks of those that do.
        """
        runtime = self.runtime
        if runtime is None:
            return False
        while self.dropped:
            self.fail([self.dropped.popleft()], RequestCancelledError("the request was dropped"))
        start = time.perf_counter()
        ahead = None
        if runtime.ahead is not None:
            ahead = self._clear_for_planning(runtime, runtime.ahead)
            if not self.has_work:
                return True  # the last tokens have come
        if not self.speculator.propose(runtime.scheduler, self.fail):
            return True
        plan = runtime.scheduler.schedule()
        while plan is None and impatient and runtime.scheduler.make_room():
            plan = runtime.scheduler.schedule()
        failed = [] if self.gate is None else self._adapters_moved(self.gate)
        if plan is not None:
            self._run(runtime, plan, start, ahead)
        elif runtime.ahead is not None and runtime.ahead.flight is not None:
            self._land(runtime)
        elif not failed:
            if self.attended:
                return False
            if not self.spill_kept():
                self._fail_stuck(runtime)
        for call, error in failed:
            self.fail([call], error)
        if ahead is not None and not self.calls:
            ahead.finish()  # here, where nobody waits for the lock of the crank meanwhile
        return True

    def _adapters_moved(self, gate: AdapterGate) -> list[tuple[Call, Exception]]:
        """Takes notice of adapters that came and went while a step was planned.

        Returns:
            Calls whose adapters could not be read, to fail after the step: its plan may have made copies of blocks.
        """
        if gate.moved:
            gate.moved = False
            self.guard.watch_again()
        failed, gate.failed = gate.failed, []
        return failed

    def _clear_for_planning(self, runtime: Runtime, ahead: StepsAhead) -> StepsAhead | None:
        """Takes in the tokens in flight where no step can be planned without them.

        Returns:
            `ahead` if the next step may be left in flight.
        """
        suits = ahead.suits(self.calls)
        if not (suits and ahead.may_plan(runtime.scheduler)):
            self._land(runtime)
        return ahead if suits else None

    def _run(self, runtime: Runtime, plan: StepPlan, start: float, ahead: StepsAhead | None) -> None:
        """Runs a step, and takes in the tokens of the one before, if that is in flight.

        Args:
            ahead: where to leave the step's own tokens in flight; None: they are waited for.
        """
        if not plan.is_plain:
            for seq in plan.sequences:
                if seq.call.first_scheduled_at is None:
                    seq.call.first_scheduled_at = start
        self.step_started = start
        recording = None if plan.is_plain else states.start(plan)
        chosen: ChosenTokens | None = None
        try:
            logits = self._forward(runtime, plan, recording)
            if ahead is not None:  # a step of nothing but parts of prompts is in flight, too
                chosen = self._choose(runtime, ahead, plan, logits)
        except Exception as error:
            self._land(runtime)
            self.failure, self.step_started = error, None
            if not self._fail_lost(plan):
                self.fail(dict.fromkeys(s.call for s in plan.sequences), error)
            return
        trouble = self._land(runtime)  # of the step before, while this one runs
        if self._fail_lost(plan) or self._fail_stale(runtime, plan):
            if ahead is not None and chosen is not None:
                ahead.discard(chosen)
            return  # the others' tokens are planned again
        self.failure, self.step_started, self.stuck_since = trouble, None, None
        runtime.stepped()
        if recording is not None:
            states.keep(plan, recording)
        runtime.scheduler.advance(plan)
        # Step by step none has ended meanwhile.
        num_left = len(plan.sequences) if ahead is None else sum(map(is_there, plan.sequences))
        if num_left:
            self.counters.count_step(runtime.scheduler, num_left)
        if chosen is not None and ahead is not None:
            ahead.launched(plan, [plan.sequences[i] for i in plan.sample_indices], chosen)
        elif plan.sample_indices:
            self._sample(runtime, plan, logits)
        if not plan.is_plain:
            self._finish_restored(runtime, plan)
        self.speculator.stepped(plan, time.perf_counter() - start)

    def _finish_restored(self, runtime: Runtime, plan: StepPlan) -> None:
        """Ends the calls that only waited for the KV of finished rows, which is here again."""
        if restored := [s for s in plan.sequences if s.finish_reason is not None and s.call.keep_kv]:
            self._finish(runtime, [s for s in restored if s.status is Status.RUNNING])

    def _fail_lost(self, plan: StepPlan) -> bool:
        """Fails the calls whose adapters were taken away under them. Asked after a step: it may happen during one."""
        if plan.is_plain:
            return False
        lost = {
            s.call: s.adapters
            for s in plan.sequences
            if s.adapters is not None and is_there(s) and not s.adapters.is_present
        }
        for call, selection in lost.items():
            self.fail(
                [call],
                WeightsChangedError(f"adapter {selection} was removed or replaced while a request ran"),
            )
        return bool(lost)

    def _fail_stale(self, runtime: Runtime, plan: StepPlan) -> bool:
        """Fails the calls whose weights changed since they began: their KV belongs to no state of the model."""
        live = runtime.scheduler.running
        if self.gate is None:  # those that wait have their adapters in the model, too
            live = [*live, *runtime.scheduler.waiting]
        # Of a plain step one tells for all: none has adapters of its own.
        planned = plan.sequences[:1] if plan.is_plain else plan.sequences
        changed = self.guard.changed(self.model, planned, live, undisturbed=not self.disturbed)
        self.disturbed = False
        stale = dict.fromkeys(s.call for s in changed)
        if stale:
            runtime.look_again()
            # One error each: a traceback grows where it is raised.
            for call in stale:
                error = WeightsChangedError(
                    "the model's weights or this request's adapters changed while it ran; "
                    "change them inside of `with hf_paged.paused(model):`"
                )
                self.fail([call], error)
            runtime.manager.drop_cached()
        return bool(stale)

    def _forward(self, runtime: Runtime, plan: StepPlan, recording: StepRecording | None) -> Tensor:
        if not plan.is_plain:
            write_given(plan.sequences, runtime.cache)
        if plan.block_copies:
            runtime.cache.copy_blocks(plan.block_copies, runtime.backend)
        model, ambient, owner = self.model, plan.sequences[0].call.ambient, self.patch.owner
        inputs = None
        if runtime.graphs is not None and recording is None:
            inputs = runtime.graphs.inputs(plan, model, owner, ambient)
        if inputs is None:
            inputs = batch.build(
                plan,
                block_size=runtime.manager.block_size,
                owner=owner,
                backend=runtime.backend,
                device=runtime.device,
                kv_layer=runtime.cache.layer,
                kv_scales=runtime.cache.scales,
                deterministic=self.config.deterministic,
                least_cut=self.patch.least_cut,
            )
            inputs.recording = recording
        if runtime.ahead is not None:
            runtime.ahead.pass_on(plan, inputs.input_ids[0])
        return runtime.runner.forward(model, inputs, ambient)

    def _choose(self, runtime: Runtime, ahead: StepsAhead, plan: StepPlan, logits: Tensor) -> ChosenTokens:
        """Launches the choice of what `_sample` would choose and wait for."""
        sequences = [plan.sequences[i] for i in plan.sample_indices]
        newest = ahead.newest(s for s in sequences if s.call.sampling.processors)
        with plan.sequences[0].call.ambient.enter():
            return choose(logits, sequences, runtime.sampler.argmax_rows, newest)

    def _sample(self, runtime: Runtime, plan: StepPlan, logits: Tensor) -> None:
        """A next token for each sequence that reached its last one, and for those forked from it just now."""
        if plan.is_plain:
            with plan.sequences[0].call.ambient.enter():
                chosen = runtime.sampler.sample(logits, plan.sequences)
            self._append(runtime, plan.sequences, _one_each(chosen))
            return
        sequences = [plan.sequences[i] for i in plan.sample_indices]
        rows = list(itertools.accumulate(plan.logits_counts[:-1], initial=0))
        beams, rows, sequences = beam_steps.set_apart(rows, sequences)
        if beams:
            self._advance_beams(runtime, logits, beams)
            if not sequences:
                return
        firsts = {seq.call for seq in sequences if seq.num_generated == 0 and len(seq.call.sequences) > 1}
        forking = {call for call in firsts if any(seq.fork_of is not None for seq in call.sequences)}
        for row, seq in zip(tuple(rows), tuple(sequences), strict=True) if forking else ():
            if seq.call in forking and seq.num_generated == 0:
                for child in runtime.scheduler.fork_children(seq):
                    sequences.append(child)
                    rows.append(row)
        last = logits
        if beams or len(rows) > len(plan.sample_indices) or plan.num_drafts:
            last = logits[torch.tensor(rows, device=logits.device)]
        with sequences[0].call.ambient.enter():
            last, sequences, complete = lockstep.hand_over(last, sequences)
            self.attended.update(complete)
            for call in complete:
                call.look()
            if not sequences:
                return
            tokens = runtime.sampler.sample(last, sequences)
        self._append(runtime, sequences, _one_each(tokens))
        if plan.num_drafts:
            append = functools.partial(self._append, runtime, drafted=True)
            drafted, accepted = self.speculator.verify(plan, logits, runtime.sampler, append)
            self.counters.drafted_tokens += drafted
            self.counters.accepted_tokens += accepted


def _one_each(tokens: list[int | BaseException]) -> list[list[int] | BaseException]:
    return [token if isinstance(token, BaseException) else [token] for token in tokens]
