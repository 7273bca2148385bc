"""The life of a step: plan, forward, sample, finish. Only the holder of the crank calls what is here."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable

import torch
from torch import Tensor

from hf_paged.engine import batch, beam_steps, lockstep, positions, states
from hf_paged.engine.adapter_gate import AdapterGate
from hf_paged.engine.call_table import CallTable
from hf_paged.engine.given_kv import write_given
from hf_paged.engine.request import Call, FinishReason, Sequence, Status
from hf_paged.engine.runtime import Runtime
from hf_paged.errors import RequestCancelledError, WeightsChangedError
from hf_paged.step import StepPlan, StepRecording


class StepLoop(CallTable):
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
        if not self.speculator.propose(runtime.scheduler, self.fail):
            return True
        plan = runtime.scheduler.schedule()
        while plan is None and impatient and runtime.scheduler.make_room():
            plan = runtime.scheduler.schedule()
        failed = [] if self.gate is None else self._adapters_moved(self.gate)
        if plan is not None:
            self._run(runtime, plan, start)
        elif not failed:
            if self.attended:
                return False
            if not self.spill_kept():
                self._fail_stuck(runtime)
        for call, error in failed:
            self.fail([call], error)
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

    def _run(self, runtime: Runtime, plan: StepPlan, start: float) -> None:
        for seq in plan.sequences:
            if seq.call.first_scheduled_at is None:
                seq.call.first_scheduled_at = start
        self.step_started = start
        recording = states.start(plan)
        try:
            logits = self._forward(runtime, plan, recording)
        except Exception as error:
            self.failure, self.step_started = error, None
            if not self._fail_lost(plan):
                self.fail(dict.fromkeys(s.call for s in plan.sequences), error)
            return
        if self._fail_lost(plan) or self._fail_stale(runtime, plan):
            return  # the others' tokens are planned again
        self.failure, self.step_started, self.stuck_since = None, None, None
        runtime.stepped()
        if recording is not None:
            states.keep(plan, recording)
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
        live = runtime.scheduler.running
        if self.gate is None:  # those that wait have their adapters in the model, too
            live = [*live, *runtime.scheduler.waiting]
        stale = dict.fromkeys(s.call for s in self.guard.changed(self.model, plan.sequences, live))
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
        return runtime.runner.forward(model, inputs, ambient)

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
            last, sequences, complete = lockstep.hand_over(last, sequences)
            self.attended.update(complete)
            for call in complete:
                call.look()
            if not sequences:
                return
            tokens = runtime.sampler.sample(last, sequences)
        self._append(runtime, sequences, [t if isinstance(t, BaseException) else [t] for t in tokens])
        if plan.num_drafts:
            append = functools.partial(self._append, runtime, drafted=True)
            drafted, accepted = self.speculator.verify(plan, logits, runtime.sampler, append)
            self.counters.drafted_tokens += drafted
            self.counters.accepted_tokens += accepted

    def _append(
        self,
        runtime: Runtime,
        sequences: list[Sequence],
        tokens: list[list[int] | BaseException],
        *,
        drafted: bool = False,
    ) -> None:
        """Takes in new tokens of each sequence, or what it failed with, and ends those whose last has come.

        Args:
            tokens: of each sequence; of several none but the last may end it.
            drafted: all before the last were drafts of this step, and so is the token before them.
        """
        failed: dict[Call, BaseException] = {}
        accepted: list[Sequence] = []
        now = time.perf_counter()
        for seq, new in zip(sequences, tokens, strict=True):
            if isinstance(new, BaseException):
                failed.setdefault(seq.call, new)
                continue
            seq.token_ids += new
            if drafted:
                runtime.scheduler.accept(seq)
            accepted.append(seq)
            if seq.finish_reason is None:
                self.counters.generated_tokens += len(new)
            if seq.call.first_token_at is None:
                seq.call.first_token_at = now
            if seq.call.on_token is not None and seq.finish_reason is None:
                for token in new:
                    seq.call.on_token(seq, token)
        for call, error in failed.items():
            self.fail([call], error)
        self._finish(runtime, [s for s in accepted if s.call not in failed])
        self._fail_out_of_positions(accepted)

    def _fail_out_of_positions(self, sequences: Iterable[Sequence]) -> None:
        """Fails the calls of those that have a new token and go on, though no position is left for it."""
        for seq in sequences:
            if positions.needs_another(seq):
                self.fail([seq.call], positions.out_of_positions(seq.prompt_len, seq.num_generated))

    def _advance_beams(self, runtime: Runtime, logits: Tensor, beams: dict[Sequence, int]) -> None:
        ended, failed = beam_steps.advance(runtime.scheduler, logits, beams, apart=self.config.deterministic)
        for call, error in failed.items():
            self.fail([call], error)
        for group in ended:
            self.counters.generated_tokens += beam_steps.end(group)
            self._retire(runtime, group.sequences)
            if all(s.status is Status.FINISHED for s in group.call.sequences):
                self._complete(group.call)
        self._fail_out_of_positions(beams)

    def answer(self, call: Call, tokens: list[int], reasons: list[FinishReason | None]) -> None:
        """What the caller of a lockstep call has chosen: a token for each row, and why rows end with it."""
        if call not in self.attended or self.runtime is None:
            return  # it has ended in the meantime
        self.attended.discard(call)
        call.first_token_at = call.first_token_at or time.perf_counter()
        self.counters.generated_tokens += sum(1 for s in call.sequences if s.finish_reason is None)
        lockstep.take_answer(call, tokens, reasons)
        if call.has_run_out:
            self._retire(self.runtime, call.sequences)
            self._complete(call)
        self._fail_out_of_positions(call.sequences)

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
