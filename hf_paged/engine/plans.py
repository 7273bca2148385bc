"""What sequences want of the next step, and the plan that is made of it."""

from __future__ import annotations

from hf_paged.engine.request import Sequence, Status
from hf_paged.step import StepPlan


def _is_chunk(seq: Sequence) -> bool:
    return seq.num_computed + 1 < len(seq.token_ids)


def turn(seq: Sequence) -> tuple[bool, bool]:
    """Single tokens before chunks; beams first, since they take their step together or not at all."""
    return (_is_chunk(seq), seq.group is None)


def is_special(seq: Sequence) -> bool:
    """Whether steps have to do more for `seq` than to compute its tokens and choose the next."""
    call = seq.call
    return (
        seq.group is not None
        or seq.adapters is not None
        or call.lockstep is not None
        or call.speculation is not None
        or call.states is not None
        or call.run_on
        or call.keep_kv
    )


def num_missing(seq: Sequence) -> int:
    """How many tokens of `seq` the next steps have to compute, drafts aside."""
    if seq.handed_over:
        return 0
    if seq.num_ahead and (seq.num_chosen >= seq.max_new_tokens or seq.status is Status.WAITING):
        return 0  # the token on its way is its last, or it was preempted since and needs that one first
    if seq.finish_reason is None or not seq.call.run_on or seq.num_generated < seq.call.run_on_width:
        return seq.num_uncomputed
    # It runs on and has gone as far as it may for now: only what its user wants of it may be missing.
    return seq.num_uncomputed - 1 if seq.call.keep_kv else 0


def make_plan(chosen: dict[Sequence, int], copies: dict[Sequence, list[tuple[int, int]]]) -> StepPlan:
    """The step in which each sequence of `chosen` gets so many tokens, after the block copies of each."""
    ordered = sorted(chosen, key=lambda s: chosen[s] > 1)  # stable: single tokens first
    if any(s.adapters is not None for s in ordered):
        # Within both parts rows of one adapter lie together, so that its products are few and large.
        ordered.sort(key=lambda s: (chosen[s] > 1, () if s.adapters is None else s.adapters.names))
    counts = [chosen[s] for s in ordered]
    drafts = [max(0, c - s.num_uncomputed) if s.draft else 0 for s, c in zip(ordered, counts, strict=True)]
    return StepPlan(
        sequences=ordered,
        num_scheduled_tokens=counts,
        num_decodes=sum(1 for c in counts if c == 1),
        block_copies=[pair for s in ordered for pair in copies.get(s, ())],
        sample_indices=[
            i for i, (s, c) in enumerate(zip(ordered, counts, strict=True)) if s.num_uncomputed <= c
        ],
        num_drafts=drafts if any(drafts) else [],
    )


def decode_plan(sequences: list[Sequence], copies: dict[Sequence, list[tuple[int, int]]]) -> StepPlan:
    """`make_plan` of one token each, for sequences that are not `is_special` and have tokens of their own."""
    return StepPlan(
        sequences=sequences,
        num_scheduled_tokens=[1] * len(sequences),
        num_decodes=len(sequences),
        block_copies=[pair for made in copies.values() for pair in made],
        sample_indices=list(range(len(sequences))),
        is_plain=True,
    )
