"""Beams as the scheduler sees them: groups that start, advance and are preempted whole.

Between two steps all active sequences of a group lack exactly one token, and get it in one step. After a preemption
they first catch up, each as far as its last token, sharing what they have in common: one computes it, the
others fork its blocks.
"""

from __future__ import annotations

from collections.abc import Iterable

from hf_paged.engine.block_manager import BlockManager
from hf_paged.engine.request import Sequence, SequenceGroup


def most_blocks(prompt_lens: Iterable[int], max_new_tokens: int, num_beams: int, block_size: int) -> int:
    """Blocks that beams of these prompts may hold at once: each its own, but for the full blocks of the prompt."""
    total = 0
    for length in prompt_lens:
        shared = length // block_size
        total += shared + num_beams * (-(-(length + max_new_tokens) // block_size) - shared)
    return total


def blocks_to_start(group: SequenceGroup, manager: BlockManager) -> int:
    """Blocks that the group holds when it has caught up and each beam has written its next token to its own."""
    needed = 0
    for seq in group.active:
        common = _nearest(group, seq)[1] // manager.block_size
        needed += manager.blocks_for(seq.num_tokens) - common
    return needed + len(group.sequences)


def attach(group: SequenceGroup, manager: BlockManager) -> bool:
    """Gives the active sequences of a group without blocks what the prefix cache has, and plans their forks.

    Returns:
        False, with nothing changed, when a group of one sequence should wait for another that computes its prefix.
    """
    active = group.active
    group.forks.clear()
    for seq in active:
        found = manager.attach_prefix(seq)
        if not found and len(active) == 1:
            return False
        parent, common = _nearest(group, seq)
        if parent is not None and common > seq.num_computed:
            manager.free(seq)
            group.forks[seq] = (parent, common)
    return True


def shares(group: SequenceGroup, manager: BlockManager) -> dict[Sequence, int]:
    """How many tokens each active sequence should compute next; none for those that wait for others of the group.

    Forks whose source has come far enough are made here.
    """
    active = group.active
    for seq, (parent, common) in list(group.forks.items()):
        if parent.num_computed >= common:
            manager.fork(parent, seq, common)
            del group.forks[seq]
    if len(active) == 1:
        return {active[0]: active[0].num_uncomputed}
    behind = [s for s in active if s.num_uncomputed > 1]
    if not behind:
        return dict.fromkeys(active, 1)
    return {s: s.num_uncomputed - 1 for s in behind if s not in group.forks}


def fits(shares: dict[Sequence, int], budget: int) -> bool:
    """Whether `budget` tokens let the group go on: a part of a prompt is enough, a part of the beams is not."""
    together = all(seq.num_uncomputed == 1 for seq in shares)
    return budget >= len(shares) or not together


def _nearest(group: SequenceGroup, seq: Sequence) -> tuple[Sequence | None, int]:
    """An earlier beam of the same prompt that begins with most of the tokens of `seq`, and how many these are.

    The last token is left out: it is computed when all are ready.
    """
    if not group.num_steps:
        return None, 0
    place = group.sequences.index(seq)
    best: Sequence | None = None
    most = 0
    for other in group.sequences[place - place % group.num_beams : place]:
        common = _num_common(seq.token_ids[:-1], other.token_ids[:-1])
        if common > most:
            best, most = other, common
    return best, most


def _num_common(a: list[int], b: list[int]) -> int:
    if a == b:
        return len(a)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
