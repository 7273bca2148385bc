"""Which sequences advance in the next step, and by how many tokens.

There are no phases. Sequences that need one token (decode) go first, then chunks of longer remainders, then new
admissions, all within `max_num_batched_tokens`. When blocks run out, the youngest running sequence is
preempted: its blocks go back and its tokens are computed again later, which the prefix cache often shortens.
The oldest sequence always advances. Drafted tokens come with their sequence's next one, as long as they take
nothing that another sequence needs. Beams come, go and take their steps as one (`engine.groups`).
Rows of a lockstep call that have handed over their logits need nothing until
their token is chosen; their blocks are taken when otherwise nobody could go on.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable

from hf_paged.engine import groups
from hf_paged.engine.adapter_gate import AdapterGate
from hf_paged.engine.block_manager import BlockManager
from hf_paged.engine.plans import decode_plan, is_special, make_plan, num_missing, turn
from hf_paged.engine.request import Call, Sequence, SequenceGroup, Status
from hf_paged.step import StepPlan


def _order(seq: Sequence) -> tuple[int, int]:
    return (seq.call.priority, seq.arrival)


def _put(line: list[Sequence], sequences: list[Sequence]) -> None:
    """Puts `sequences`, which are in order, into `line`, which stays so."""
    if not sequences:
        return
    at_the_end = not line or _order(line[-1]) < _order(sequences[0])
    line += sequences
    if not at_the_end:
        line.sort(key=_order)


class Scheduler:
    """Holds the waiting and the running sequences; plans steps and takes sequences out when they end."""

    def __init__(self, manager: BlockManager, *, max_num_seqs: int, max_num_batched_tokens: int) -> None:
        self.manager = manager
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max(max_num_batched_tokens, max_num_seqs)
        self.waiting: list[Sequence] = []  # by (priority, arrival)
        self.running: list[Sequence] = []  # by (priority, arrival)
        self.gate: AdapterGate | None = None  # set where the number of adapters in the model is bounded
        self.num_preemptions = 0
        self.prefix_hit_tokens = 0
        self._arrivals = 0
        self._ambients: Counter[object] = Counter()  # sequences present, by ambient state
        self._special: set[Sequence] = set()  # those present of which more is wanted than their next tokens
        self._last_ambient: object = None

    # --- coming and going -------------------------------------------------------------------------------------------

    def add(self, call: Call) -> None:
        present = [seq for seq in call.sequences if seq.status is not Status.FINISHED]
        for arrival, seq in enumerate(present, self._arrivals):
            seq.arrival = arrival
            if is_special(seq):
                self._special.add(seq)
        self._arrivals += len(present)
        if present:
            self._ambients[call.ambient] += len(present)
        _put(self.waiting, [seq for seq in present if seq.group is None or seq in seq.group.active])

    def remove(self, sequences: Iterable[Sequence], *, keep_blocks: bool = False) -> None:
        """Takes sequences out, whatever their state; their blocks go back unless `keep_blocks`."""
        leaving = {s for s in sequences if s.status is not Status.FINISHED}
        if any(s.status is Status.WAITING for s in leaving):
            self.waiting = [s for s in self.waiting if s not in leaving]
        if any(s.status is Status.RUNNING for s in leaving):
            self.running = [s for s in self.running if s not in leaving]
        self._special -= leaving
        for call, count in Counter(seq.call for seq in leaving).items():
            self._ambients[call.ambient] -= count
            if not self._ambients[call.ambient]:
                del self._ambients[call.ambient]
        for seq in leaving:
            seq.status = Status.FINISHED
            if not keep_blocks:
                self.manager.free(seq)

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    # --- planning ---------------------------------------------------------------------------------------------------

    def schedule(self) -> StepPlan | None:
        """The next step; None when there is no work."""
        for ambient in self._turns():
            plan = self._schedule(ambient)
            if plan is not None:
                self._last_ambient = ambient
                return plan
        return None

    @property
    def next_ambient(self) -> object:
        """The ambient state whose turn it is."""
        return next(iter(self._turns()), None)

    def _turns(self) -> list[object]:
        """Ambient states take turns, so that no caller starves another."""
        states = list(self._ambients)
        if self._last_ambient in self._ambients:
            start = states.index(self._last_ambient) + 1
            states = states[start:] + states[:start]
        return states

    def _schedule(self, ambient: object) -> StepPlan | None:
        if self._has_only_decodes():
            return self._schedule_decodes(ambient)
        chosen: dict[Sequence, int] = {}
        copies: dict[Sequence, list[tuple[int, int]]] = {}
        budget, num_preemptions = self.max_num_batched_tokens, self.num_preemptions
        # The sort is stable: by age within a turn.
        candidates = [s for s in self.running if s.call.ambient == ambient and num_missing(s)]
        shares = self._group_shares(candidates)
        for seq in sorted(candidates, key=turn):
            if budget <= 0 or len(chosen) >= self.max_num_seqs:
                break
            if seq.status is not Status.RUNNING:
                continue
            wanted = shares.get(seq, 0) if seq.group is not None else num_missing(seq) + self._num_drafts(seq)
            count = min(wanted, budget)
            if not count:
                continue
            budget += self._allocate(seq, count, chosen, copies) - count
        if self.num_preemptions == num_preemptions:
            self._admit(ambient, chosen, copies, budget)
            if not chosen:
                self._admit_by_force(ambient, chosen, copies, budget)
        return make_plan(chosen, copies) if chosen else None

    def _has_only_decodes(self) -> bool:
        """Whether all that run have tokens of their own and want the next, and there is place for all of them."""
        running = self.running
        return (
            not self._special
            and len(self._ambients) == 1
            and 0 < len(running) <= self.max_num_seqs
            and all(
                len(s.token_ids) - s.num_computed == 1 and s.num_computed >= s.prompt_len and not s.draft
                for s in running
            )
        )

    def _schedule_decodes(self, ambient: object) -> StepPlan | None:
        """What `_schedule` would plan where `_has_only_decodes`, in a few microseconds for dozens of sequences."""
        chosen = dict.fromkeys(self.running, 1)
        copies: dict[Sequence, list[tuple[int, int]]] = {}
        num_preemptions = self.num_preemptions
        for seq in self.manager.without_place(self.running):
            if seq.status is Status.RUNNING:
                self._allocate(seq, 1, chosen, copies)
        num_decodes = len(chosen)
        if self.waiting and self.num_preemptions == num_preemptions:
            self._admit(ambient, chosen, copies, self.max_num_batched_tokens - num_decodes)
        if len(chosen) > num_decodes:
            return make_plan(chosen, copies)
        return decode_plan(list(chosen), copies) if chosen else None

    def _allocate(self, seq: Sequence, count: int, chosen: dict, copies: dict) -> int:
        """Plans `count` tokens of `seq`, in blocks of the youngest where there are no others.

        Returns:
            How many planned tokens were given up for it: its own among them where it was the youngest itself.
        """
        given_up = 0
        while (made := self.manager.allocate(seq, seq.num_computed + count)) is None:
            victims = self._preempt(self.running[-1])
            for victim in victims:
                given_up += count if victim is seq else chosen.get(victim, 0)
                chosen.pop(victim, None)
                copies.pop(victim, None)
            if seq in victims:
                return given_up
        chosen[seq], copies[seq] = count, made
        return given_up

    def _admit_by_force(self, ambient: object, chosen: dict, copies: dict, budget: int) -> None:
        """Starts one that waits for blocks of finished rows, or of rows of a lockstep call, which wait for it."""
        held = [s for s in self.running if s.call.ambient == ambient and not s.call.keep_kv]
        held = [s for s in held if not num_missing(s) and not s.call.attended and not s.num_ahead]
        while held and not chosen:
            self._preempt(held.pop())
            self._admit(ambient, chosen, copies, budget)

    def _num_drafts(self, seq: Sequence) -> int:
        """How many drafts of `seq` go with it: none where that would take one of the last blocks."""
        if not seq.draft:
            return 0
        new_blocks = self.manager.blocks_for(seq.num_tokens + len(seq.draft)) - len(seq.block_table)
        # One spare block for each running sequence, as at admission.
        if new_blocks > 0 and new_blocks + len(self.running) > self.manager.num_available:
            seq.draft = []
        return len(seq.draft)

    def _group_shares(self, candidates: list[Sequence]) -> dict[Sequence, int]:
        """What each beam among `candidates` should compute next."""
        shares: dict[Sequence, int] = {}
        for group in dict.fromkeys(s.group for s in candidates if s.group is not None):
            shares |= groups.shares(group, self.manager)
        return shares

    @property
    def _num_places(self) -> int:
        """Sequences that run, and beams that will as soon as their prompt is computed."""
        return sum(1 if s.group is None or s.group.num_steps else s.group.num_beams for s in self.running)

    def _admit(self, ambient: object, chosen: dict, copies: dict, budget: int) -> None:
        """Starts waiting sequences while tokens, places and blocks last."""
        admitted: list[int] = []  # places in `waiting`
        # Those that take no part in a step: they wait for their callers, or for the other rows of their call. They keep
        # their blocks, but no place.
        held = sum(1 for s in self.running if not num_missing(s)) if self.waiting else 0
        taken = self._num_places
        if self.gate is not None:
            self.gate.begin()
        for place, seq in enumerate(self.waiting):
            if budget <= 0 or taken - held >= self.max_num_seqs:
                break
            if seq.call.ambient != ambient or seq.will_be_forked or not num_missing(seq):
                continue
            if seq.group is not None:
                if seq.status is Status.RUNNING:
                    continue  # started with its group, a few places before
                if not self._has_room_for(seq.group, taken):
                    break
                if not self._adapters_are_there(seq.group.sequences, chosen):
                    continue
                started = self._start_group(seq.group, chosen, copies, budget)
                if started is None:
                    break
                if started:
                    active = seq.group.active
                    budget -= sum(chosen.get(s, 0) for s in active)
                    taken += len(seq.group.sequences)
                    admitted.extend(range(place, place + len(active)))
                continue
            # One spare block for each running sequence keeps a new one from being preempted at once.
            needed = self.manager.blocks_for(seq.num_tokens) + 1
            if taken and needed + taken > self.manager.num_available:
                break
            if not self._adapters_are_there([seq], chosen) or not self.manager.attach_prefix(seq):
                continue
            hit = seq.num_computed
            if seq.given_kv is not None:
                # No prefix was looked for. The loop writes them before the step.
                seq.given_kv.in_blocks = False
                seq.num_computed = seq.given_kv.num_tokens
            if not num_missing(seq):
                seq.num_computed -= (
                    1  # a row that only wants its KV back, and found it all: one token makes a step
                )
            count = min(num_missing(seq), budget)
            made = self.manager.allocate(seq, seq.num_computed + count)
            if made is None:
                self.manager.free(seq)
                break
            if seq.num_generated == 0:
                self.prefix_hit_tokens += hit
                seq.num_cached_prompt = hit
            seq.status = Status.RUNNING
            chosen[seq], copies[seq] = count, made
            budget -= count
            taken += 1
            admitted.append(place)
        _put(self.running, [self.waiting[place] for place in admitted])
        if admitted and admitted[-1] == len(admitted) - 1:
            del self.waiting[: len(admitted)]
        elif admitted:
            places = set(admitted)
            self.waiting = [seq for place, seq in enumerate(self.waiting) if place not in places]

    def _adapters_are_there(self, starting: list[Sequence], chosen: dict[Sequence, int]) -> bool:
        """Whether the adapters of what starts are in the model, or could be brought in now."""
        return self.gate is None or self.gate.admits(starting, {*self.running, *chosen})

    def _has_room_for(self, group: SequenceGroup, taken: int) -> bool:
        """Whether a waiting group may start beside `taken` others; alone it always may: it was checked to fit."""
        if taken + len(group.sequences) > self.max_num_seqs:
            return False
        return not taken or groups.blocks_to_start(group, self.manager) + taken <= self.manager.num_available

    def _start_group(
        self,
        group: SequenceGroup,
        chosen: dict[Sequence, int],
        copies: dict[Sequence, list[tuple[int, int]]],
        budget: int,
    ) -> bool | None:
        """Starts the active sequences of a waiting group: their first tokens go into `chosen`, `budget` at most.

        Returns:
            False where it waits for a prefix that another sequence computes, None where there are no blocks for it.
        """
        active = group.active
        if not groups.attach(group, self.manager):
            return False
        hits = {s: s.num_computed for s in active}
        shares = groups.shares(group, self.manager)
        left = budget if groups.fits(shares, budget) else 0
        mine: dict[Sequence, int] = {}
        for seq, share in shares.items():
            count = min(share, left)
            made = self.manager.allocate(seq, seq.num_computed + count) if count else []
            if made is None:
                for other in active:
                    self.manager.free(other)
                return None
            if count:
                mine[seq], copies[seq] = count, made
                left -= count
        chosen.update(mine)
        for seq in active:
            seq.status = Status.RUNNING
            if not group.num_steps:
                self.prefix_hit_tokens += hits[seq]
                seq.num_cached_prompt = hits[seq]
        return True

    def make_room(self) -> bool:
        """Takes the blocks of a row whose token its caller chooses, the youngest. Returns whether there was one."""
        for seq in reversed(self.running):
            if seq.handed_over:
                self._preempt(seq)
                return True
        return False

    def _preempt(self, seq: Sequence) -> list[Sequence]:
        """Takes the blocks of `seq` back, and with it those of its group. Returns all whose blocks went."""
        preempted = [seq] if seq.group is None else seq.group.active
        for one in preempted:
            self.running.remove(one)
            self.manager.free(one)
            one.status = Status.WAITING
            one.draft = []
            bisect.insort(self.waiting, one, key=_order)
        self.num_preemptions += 1
        return preempted

    # --- after the forward ------------------------------------------------------------------------------------------

    def advance(self, plan: StepPlan) -> None:
        """The planned tokens are computed: moves `num_computed` and registers filled blocks.

        Drafts wait for `accept`. What was computed of a sequence that has ended since the plan is nobody's.
        """
        for i, (seq, count) in enumerate(zip(plan.sequences, plan.num_scheduled_tokens, strict=True)):
            if seq.status is Status.FINISHED:
                continue
            seq.num_computed += count - (plan.num_drafts[i] if plan.num_drafts else 0)
        self.manager.commit_filled(plan.sequences)

    def accept(self, seq: Sequence) -> None:
        """The tokens of `seq` before its newest were right drafts of the last step: they are computed already.

        What was computed of rejected drafts lies behind `num_computed`, where the next tokens overwrite it.
        """
        seq.num_computed = seq.num_tokens - 1
        self.manager.commit(seq)

    def fork_children(self, parent: Sequence) -> list[Sequence]:
        """Starts the sequences that share `parent`'s prompt, whose KV is complete now; no token was sampled yet."""
        children: list[Sequence] = []
        for child in parent.call.sequences:
            if child.fork_of is not parent or child.status is not Status.WAITING or child.num_generated:
                continue
            if self._num_places + len(children) >= self.max_num_seqs:
                break
            self.manager.fork(parent, child, parent.prompt_len)
            child.status = Status.RUNNING
            children.append(child)
        for child in children:
            self.waiting.remove(child)
            bisect.insort(self.running, child, key=_order)
        return children

    def regroup(self, group: SequenceGroup, sources: list[int]) -> None:
        """Beam i of `group` goes on from what beam `sources[i]` has computed; all of them run from now on."""
        if not group.num_steps:
            sources = [source - source % group.num_beams for source in sources]
        self.manager.reassign(group.sequences, sources)
        for seq in group.sequences:
            if seq.status is Status.WAITING:
                seq.status = Status.RUNNING
                bisect.insort(self.running, seq, key=_order)
