"""One step ahead of the device: while a step runs there, the next one is planned and launched.

    host    plan 1, launch 1 | plan 2, launch 2 | tokens of 1 | plan 3, launch 3 | tokens of 2 | ...
    device                   | step 1 ......... | step 2 ................ | step 3 ...

Between two turns of the loop at most one step is in flight: launched, its inputs counted as computed, its tokens not
here yet. Each sequence that gets a token from it has `num_ahead` 1, so that the scheduler plans the step after it; the
token itself goes from one step to the next on the device. When a step is launched the tokens of the one before are
taken in: a sequence that has ended with its own leaves, and what the newer step computed of it is never counted,
registered or looked at. Its blocks may be somebody else's by then: the device works in the order of the launches.

Plans and sequences only; the loop launches, waits, and goes step by step wherever `suits` says no.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

from hf_paged.engine.request import Call, Sequence, Status
from hf_paged.engine.scheduler import Scheduler
from hf_paged.step import StepPlan


class Tokens(Protocol):
    """What the loop launched to choose tokens."""

    @property
    def is_in_order(self) -> bool: ...
    def wait(self) -> list[int | BaseException]: ...
    def put(self, ids: Any, rows: list[int]) -> None: ...
    def of(self, row: int) -> Any: ...
    def logprobs(self) -> dict[int, tuple[Any, ...]]: ...


@dataclass
class Flight:
    """A launched step. Row i of `tokens` is that of `sequences[i]`."""

    plan: StepPlan
    sequences: list[Sequence]
    tokens: Tokens
    rows: dict[Sequence, int] = field(init=False)

    def __post_init__(self) -> None:
        self.rows = {seq: row for row, seq in enumerate(self.sequences)}


class StepsAhead:
    """What is in flight, and whether there may be something."""

    def __init__(self) -> None:
        self.flight: Flight | None = None
        self.num_steps = 0  # launched while another was in flight
        self._hosted: set[Call] = set()
        self._forking: set[Call] = set()

    def take_up(self, call: Call) -> None:
        """`call` is among those that run, or wait to, from now on."""
        if _needs_host(call):
            self._hosted.add(call)
        elif any(seq.fork_of is not None for seq in call.sequences):
            self._forking.add(call)

    def suits(self, calls: Container[Call]) -> bool:
        """Whether none of `calls`, all that have not ended, wants anything of the host between two steps."""
        if self._hosted:
            self._hosted = {call for call in self._hosted if call in calls}
        if self._forking:
            # Rows get their share of a prompt with the first token after it.
            self._forking = {c for c in self._forking if any(s.will_be_forked for s in c.sequences)}
        return not self._hosted and not self._forking

    def may_plan(self, scheduler: Scheduler) -> bool:
        """Whether the next step can be planned while one is in flight.

        Not where blocks are short: a token that may turn out to be none is not worth a preemption.
        """
        flight = self.flight
        return flight is None or (flight.tokens.is_in_order and _has_room(scheduler))

    def launched(self, plan: StepPlan, sequences: list[Sequence], tokens: Tokens) -> None:
        """`plan` is in flight; those of `sequences` that have not ended meanwhile get a token from it."""
        assert self.flight is None, "two steps in flight"
        self.flight = Flight(plan, sequences, tokens)
        for seq in sequences:
            if seq.status is not Status.FINISHED:
                seq.num_ahead = 1

    def land(self) -> Flight | None:
        """Takes out what is in flight: its tokens are waited for next."""
        flight, self.flight = self.flight, None
        for seq in () if flight is None else flight.sequences:
            seq.num_ahead = 0
        return flight

    def finish(self) -> None:
        """Lets go of what is in flight. The engine is idle only when the device is."""
        if (flight := self.land()) is not None:
            self.discard(flight.tokens)

    @staticmethod
    def discard(tokens: Tokens) -> None:
        """Waits for what nobody wants any more."""
        with contextlib.suppress(Exception):  # its calls have ended: the next step will meet what is wrong
            tokens.wait()

    def pass_on(self, plan: StepPlan, ids: Any) -> None:
        """A step is launched: gives it the tokens in flight, into its `ids` on the device [T]."""
        if self.flight is None:
            return
        self.num_steps += 1
        rows = self.flight.rows
        sources = [rows[s] if s.num_ahead else -1 for s in plan.sequences[: plan.num_decodes]]
        if any(row >= 0 for row in sources):
            self.flight.tokens.put(ids, sources)

    def newest(self, sequences: Iterable[Sequence]) -> dict[Sequence, Any]:
        """On the device, the newest token of each of `sequences` of which the host does not know it."""
        flight = self.flight
        return (
            {} if flight is None else {s: flight.tokens.of(flight.rows[s]) for s in sequences if s.num_ahead}
        )


def make_ahead(backend: str, num_devices: int) -> StepsAhead | None:
    """None where steps run in the thread that launches them, so that there is nothing to be ahead of."""
    return StepsAhead() if backend == "triton" and num_devices == 1 else None


def _has_room(scheduler: Scheduler) -> bool:
    """Whether all that run can go on, each with one block more that has to be copied before it is written."""
    manager = scheduler.manager
    needed = 0
    for seq in scheduler.running:
        needed += max(0, manager.blocks_for(seq.num_tokens + seq.num_ahead) - len(seq.block_table)) + 1
    return needed <= manager.num_available


def _needs_host(call: Call) -> bool:
    """Whether the host chooses, records or changes something between two steps of `call`."""
    return (
        call.sampling is None
        or not call.sampling.on_device
        or call.lockstep is not None
        or call.speculation is not None
        or call.states is not None
        or call.run_on
        or call.keep_kv
        or any(s.group is not None or s.given_kv is not None for s in call.sequences)
    )
