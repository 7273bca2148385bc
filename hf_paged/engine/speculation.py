"""Speculation: tokens are guessed cheaply, computed together in one step, and kept as far as they prove right.

A drafter puts guesses on `Sequence.draft`. The step computes them behind the sequence's last token and gives logits
for each, and `verify` then chooses tokens one after another, as if each had had a step of its own: with its row of
logits, the processors and the stop rules see the very history they would have seen, and the random numbers are
those of its position. The next row counts only if the token chosen is the one guessed. So drafts decide how fast tokens
come and never which (docs/decisions.md says why there is no other rejection rule for sampling):

    known ... t | d1 d2 d3        the step computes t and three drafts
              a   b  c            chosen; a = d1, b = d2, c != d3: three new tokens, d3 is overwritten by what follows

This is speculative decoding (Leviathan et al., 2022, arXiv 2211.17192) with each draft and each choice coupled to one
random number (Daliri et al., 2024, arXiv 2408.07978).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable
from typing import Any

from torch import Tensor

from hf_paged.engine.draft_policy import DraftPolicy
from hf_paged.engine.draft_rows import DraftRows, Going, goes_on, is_simple
from hf_paged.engine.drafting import Drafter, Drafting, Speculation
from hf_paged.engine.request import Call, Sequence
from hf_paged.engine.sampler import Sampler
from hf_paged.engine.scheduler import Scheduler
from hf_paged.step import StepPlan

#: Pads a finished row is given at a time, in a call that runs on.
_MAX_PADS = 16
#: In steps of this many sequences looking for drafts takes time; it rests for up to so many steps where it was in vain.
_MIN_RESTING, _MAX_RESTS = 8, 7


class Speculator:
    """Drafts before a step and learns from what became of it.

    Args:
        make_assistant: the drafter of an assistant model, or of the model's first layers; its `close` takes everything
            back.
    """

    def __init__(self, make_assistant: Callable[[Speculation], Any]) -> None:
        self.policy = DraftPolicy()
        self._make_assistant = make_assistant
        self._assistants: dict[Hashable, tuple[Any, set[Call]]] = {}  # by `Speculation.assistant_key`
        self._calls: set[Call] = set()
        self._drafting_seconds = 0.0
        self._rest = self._num_rests = 0  # steps without drafting after one in which nothing was worth it

    # --- calls --------------------------------------------------------------------------------------------------------

    def take_up(self, call: Call) -> None:
        """Called for each call before its sequences are scheduled; raises what an assistant model cannot do."""
        speculation: Speculation | None = call.speculation
        if speculation is None:
            return
        if (key := speculation.assistant_key) is not None:
            if key not in self._assistants:
                self._assistants[key] = (self._make_assistant(speculation), set())
            speculation.drafter, users = self._assistants[key]
            users.add(call)
        for sequence in call.sequences:
            sequence.drafting = Drafting()
        self._calls.add(call)

    def ended(self, call: Call) -> None:
        """`call` has ended, in whatever way. Again does nothing."""
        if call not in self._calls:
            return
        self._calls.discard(call)
        for sequence in call.sequences:
            call.speculation.drafter.forget(sequence)
            sequence.drafting, sequence.draft = None, []
        for key, (assistant, users) in list(self._assistants.items()):
            users.discard(call)
            if not users:
                del self._assistants[key]
                assistant.close()

    def abandon(self) -> None:
        """Forgets all calls and what assistant models hold, after an interrupt or in a forked child."""
        for assistant, _ in self._assistants.values():
            assistant.close()
        self._assistants.clear()
        for sequence in (s for call in self._calls for s in call.sequences):
            sequence.drafting, sequence.draft = None, []
        self._calls.clear()

    # --- a step -------------------------------------------------------------------------------------------------------

    def propose(self, scheduler: Scheduler, fail: Callable[[list[Call], BaseException], None]) -> bool:
        """Drafts for the running sequences that are next.

        Args:
            fail: ends calls, with what went wrong with them.

        Returns:
            Whether nothing went wrong.
        """
        if not self._calls:
            return True
        if self._num_rests:
            self._num_rests -= 1
            self._drafting_seconds = 0.0
            return True
        start = time.perf_counter()
        ambient = scheduler.next_ambient
        offers: list[tuple[Sequence, int]] = []
        num_tokens = 0
        for sequence in scheduler.running:
            if sequence.call.ambient != ambient:
                continue
            num_tokens += 1
            if sequence.drafting is None:
                continue
            sequence.draft = []
            sequence.drafting.padding = sequence.finish_reason is not None
            if sequence.num_uncomputed != 1:
                continue
            if sequence.drafting.padding:
                sequence.draft = _pads(sequence)
            # The last token is never computed, and one comes without being drafted.
            elif (most := sequence.max_new_tokens - sequence.num_generated - 1) > 0:
                count = sequence.call.speculation.drafter.offer(sequence, most)
                if count:
                    offers.append((sequence, count))
        failed = self._draft(offers, num_tokens, scheduler) if offers else {}
        if num_tokens >= _MIN_RESTING:
            self._rest = (
                0 if any(sequence.draft for sequence, _ in offers) else min(2 * self._rest + 1, _MAX_RESTS)
            )
            self._num_rests = self._rest
        self._drafting_seconds = time.perf_counter() - start
        for sequence, error in failed.items():
            fail([sequence.call], error)
        return not failed

    def _draft(
        self, offers: list[tuple[Sequence, int]], num_tokens: int, scheduler: Scheduler
    ) -> dict[Sequence, BaseException]:
        counts = self.policy.share(
            num_tokens,
            [s.drafting.acceptance for s, _ in offers],
            [count for _, count in offers],
            room=scheduler.max_num_batched_tokens // 2 - num_tokens,
            seconds_a_depth=[s.call.speculation.drafter.seconds_a_depth for s, _ in offers],
        )
        wanted: dict[Drafter, list[tuple[Sequence, int]]] = {}
        for (sequence, _), count in zip(offers, counts, strict=True):
            sequence.draft = sequence.draft[:count]
            if count:
                wanted.setdefault(sequence.call.speculation.drafter, []).append((sequence, count))
            else:
                sequence.drafting.acceptance.pause()
        failed: dict[Sequence, BaseException] = {}
        for drafter, part in wanted.items():
            try:
                failed |= drafter.draft(part)
            except Exception as error:  # the assistant's forward: whoever wanted it to draft is concerned
                failed |= {sequence: error for sequence, _ in part}
        return failed

    def verify(
        self,
        plan: StepPlan,
        logits: Tensor,
        sampler: Sampler,
        append: Callable[[list[Sequence], list[list[int] | BaseException]], None],
    ) -> tuple[int, int]:
        """Goes on behind the first new token of each sequence of `plan`, as long as drafts prove right.

        Args:
            logits: [R, V] of the step.
            append: takes new tokens of sequences in, each list's last one being the first that may end its sequence;
                a sequence that ended goes no further.

        Returns:
            How many tokens had been drafted, and how many of them were right.
        """
        rows = DraftRows(logits, sampler)
        going: list[Going] = []
        drafted: dict[Sequence, int] = {}
        row = 0
        for i, count in zip(plan.sample_indices, plan.logits_counts, strict=True):
            if count > 1:
                sequence = plan.sequences[i]
                going.append((sequence, sequence.draft[: count - 1], row))
                if sequence.drafting is None or not sequence.drafting.padding:
                    drafted[sequence] = count - 1
                sequence.draft = []
            row += count
        accepted = dict.fromkeys(drafted, 0)
        at_once = [item for item in going if item[0].finish_reason is None and is_simple(item[0])]
        if at_once:
            runs = rows.most_probable_runs(at_once)
            for sequence, run in runs.items():
                accepted[sequence] = len(run)
            append(list(runs), list(runs.values()))
            going = [item for item in going if item not in at_once]
        depth = 0
        while going := [item for item in going if goes_on(*item[:2], depth, accepted)]:
            sequences = [sequence for sequence, _, _ in going]
            for sequence in sequences:
                if sequence in accepted:
                    accepted[sequence] += 1
            depth += 1
            tokens = rows.choose([row + depth for _, _, row in going], sequences)
            append(sequences, [t if isinstance(t, BaseException) else [t] for t in tokens])
        self._learn(drafted, accepted)
        return sum(drafted.values()), sum(accepted.values())

    def _learn(self, drafted: dict[Sequence, int], accepted: dict[Sequence, int]) -> None:
        for sequence, num_drafted in drafted.items():
            if sequence.drafting is None or sequence.finish_reason is not None:
                continue  # what came after its end says nothing of its drafts
            self.policy.learn(sequence.drafting.acceptance, num_drafted, accepted[sequence])
            sequence.call.speculation.drafter.verified(sequence, num_drafted, accepted[sequence])

    def stepped(self, plan: StepPlan, seconds: float) -> None:
        """A step took so long, drafting included."""
        drafts = plan.num_drafts or [0] * len(plan.sequences)
        if self._calls and all(c - d == 1 for c, d in zip(plan.num_scheduled_tokens, drafts, strict=True)):
            self.policy.step_times.observe(plan.num_tokens, seconds - self._drafting_seconds)


def _pads(sequence: Sequence) -> list[int]:
    """What a finished row will be given next, as far as its call has come for now."""
    spec = sequence.call.sampling
    if not spec.has_eos or spec.pad_token_id is None:
        return []
    count = sequence.call.run_on_width - sequence.num_generated - 1
    return [spec.pad_token_id] * max(0, min(count, _MAX_PADS))
