"""Tokens come in: sequences get them, and end with them. Only the holder of the crank calls what is here."""

from __future__ import annotations

import time
from collections.abc import Iterable

from torch import Tensor

from hf_paged.engine import beam_steps, lockstep, positions
from hf_paged.engine.call_table import CallTable
from hf_paged.engine.request import Call, FinishReason, Sequence, Status
from hf_paged.engine.runtime import Runtime
from hf_paged.engine.sampler import note_logprobs


class TokenIntake(CallTable):
    """Takes in what steps, and callers of lockstep calls, have chosen."""

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
                self.disturbed = True
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

    def _land(self, runtime: Runtime) -> Exception | None:
        """Waits for the tokens in flight, if there are any, and takes them in where they are still wanted.

        Returns:
            What the device has failed with, and with it the calls of that step.
        """
        flight = None if runtime.ahead is None else runtime.ahead.land()
        if flight is None:
            return None
        before = self.step_started
        self.step_started = before or time.perf_counter()
        try:
            tokens = flight.tokens.wait()
            logprobs = flight.tokens.logprobs()
        except Exception as error:  # the device's own, of whatever was launched: the step is lost
            self.failure = error
            self.fail(dict.fromkeys(s.call for s in flight.plan.sequences), error)
            return error
        finally:
            self.step_started = before
        wanted = [pair for pair in zip(flight.sequences, tokens, strict=True) if is_there(pair[0])]
        for seq, token in wanted:
            if (numbers := logprobs.get(flight.rows[seq])) is not None and isinstance(token, int):
                note_logprobs(seq, token, *numbers)
        self._append(
            runtime, [s for s, _ in wanted], [t if isinstance(t, BaseException) else [t] for _, t in wanted]
        )
        return None

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


def is_there(seq: Sequence) -> bool:
    """Whether `seq` has not ended."""
    return seq.status is not Status.FINISHED
