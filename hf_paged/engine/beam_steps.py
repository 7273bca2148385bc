"""The step of beams between a forward and the scheduler: choose, fork, and what a group leaves behind when it ends."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from torch import Tensor

from hf_paged.engine import beam_search, beam_state
from hf_paged.engine.request import Call, Sequence, SequenceGroup
from hf_paged.engine.scheduler import Scheduler

if TYPE_CHECKING:
    from hf_paged.engine.beam_choice import Choice


def set_apart(
    rows: list[int], sequences: list[Sequence]
) -> tuple[dict[Sequence, int], list[int], list[Sequence]]:
    """The beams among `sequences` with their rows, then rows and sequences of the others."""
    pairs = list(zip(rows, sequences, strict=True))
    others = [(row, s) for row, s in pairs if s.group is None]
    beams = {s: row for row, s in pairs if s.group is not None}
    return beams, [row for row, _ in others], [s for _, s in others]


def advance(
    scheduler: Scheduler, logits: Tensor, beams: dict[Sequence, int], *, apart: bool
) -> tuple[list[SequenceGroup], dict[Call, BaseException]]:
    """Lets the beams at these rows of `logits` go on; `apart`: those of each group by themselves.

    Returns:
        The groups that ended with it, and the calls that failed.
    """
    with next(iter(beams)).call.ambient.enter():
        choices = beam_search.choose(logits, beams, apart=apart)
    failed: dict[Call, BaseException] = {}
    for group, choice in choices.items():
        if isinstance(choice, BaseException):
            failed.setdefault(group.call, choice)
    ended = []
    for group, choice in choices.items():
        if not isinstance(choice, BaseException) and group.call not in failed:
            _take(scheduler, group, choice)
            if choice.ended:
                ended.append(group)
    return ended, failed


def _take(scheduler: Scheduler, group: SequenceGroup, choice: Choice) -> None:
    # The blocks of an ended group are given back all the same, unless its user wants to go on from them.
    if not choice.ended or group.call.keep_kv:
        scheduler.regroup(group, choice.sources)
    group.take(choice.sources, choice.tokens)


def end(group: SequenceGroup) -> int:
    """Notes why the beams of an ended group finished and shows its results. Returns the tokens in these."""
    call = group.call
    call.first_token_at = call.first_token_at or time.perf_counter()
    count = 0
    for place, (prompt, results) in enumerate(
        zip(group.prompts, beam_state.finished_beams(group), strict=True)
    ):
        count += sum(len(beam.token_ids) for beam in results)
        own = group.sequences[place * group.num_beams : (place + 1) * group.num_beams]
        reason = beam_state.finish_reason(own[0], results[0].token_ids)
        for seq in own:
            seq.finish_reason = reason
            seq.num_kept = group.num_steps
        if call.on_token is not None:
            for token in results[0].token_ids:
                call.on_token(own[0], token)
        call.sampling.release(prompt)
    return count
