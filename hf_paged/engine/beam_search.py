"""Choosing the next beams of many groups at once, whichever calls they belong to.

Prompts of several lengths, calls and groups go through one `Choosing` (`engine.beam_choice`) as long as they are at the
same step and want the same.

    choices = choose(logits, rows)                # the beams of a step
    choices[group].sources, .tokens, .ended       # or the exception that the group's call fails with
"""

from __future__ import annotations

from collections.abc import Hashable

import torch
from torch import Tensor

from hf_paged.engine.beam_choice import Choice, Choosing
from hf_paged.engine.request import Sequence as Row
from hf_paged.engine.request import SequenceGroup

#: Float32 scores worked on at once.
_CHUNK_BYTES = 64 << 20


def choose(
    logits: Tensor, rows: dict[Row, int], *, apart: bool = False
) -> dict[SequenceGroup, Choice | BaseException]:
    """The choice of each group, or the exception its call fails with.

    Args:
        logits: [R, vocab] any float dtype. Not written to.
        rows: sequence -> row of `logits`, for all active ones of their groups.
        apart: compute each group by itself, so that no other has a part in its rounding.
    """
    stacks: dict[Hashable, list[SequenceGroup]] = {}
    for group in dict.fromkeys(s.group for s in rows if s.group is not None):
        stacks.setdefault(_stack_key(group), []).append(group)
    choices: dict[SequenceGroup, Choice | BaseException] = {}
    for groups in stacks.values():
        for part in [[g] for g in groups] if apart else _parts(groups, logits.shape[1]):
            own = torch.tensor([rows[s] for g in part for s in g.active], device=logits.device)
            choices |= _choose(logits[own], part)
    return choices


def _parts(groups: list[SequenceGroup], vocab: int) -> list[list[SequenceGroup]]:
    most = max(1, _CHUNK_BYTES // (4 * vocab))
    parts: list[list[SequenceGroup]] = []
    held = 0
    for group in groups:
        held += len(group.sequences)
        if not parts or held > most:
            parts.append([])
            held = len(group.sequences)
        parts[-1].append(group)
    return parts


def _stack_key(group: SequenceGroup) -> Hashable:
    """Equal for groups whose prompts can go through upstream's methods together."""
    spec = group.call.sampling
    # Criteria other than lengths and EOS are asked call by call.
    own = None if spec.stop_rules.simple else group.call.call_id
    return (spec.signature, spec.beams, group.num_steps, spec.eos_token_ids, own)


def _choose(logits: Tensor, groups: list[SequenceGroup]) -> dict[SequenceGroup, Choice | BaseException]:
    """The choices of groups of equal `_stack_key`; `logits` [R, vocab] are those of their active sequences."""
    try:
        return Choosing(logits, groups).choices()
    except Exception as error:
        if len(groups) == 1:
            return {groups[0]: error}
    # Each on its own shows whose fault it was.
    result: dict[SequenceGroup, Choice | BaseException] = {}
    at = 0
    for group in groups:
        size = len(group.active)
        result |= _choose(logits[at : at + size], [group])
        at += size
    return result
