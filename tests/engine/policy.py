"""A model of the device for tests of the policy half: slots remember which token of which position was stored
in them."""

from __future__ import annotations

from hf_paged.engine.block_manager import BlockManager
from hf_paged.engine.request import Call, FinishReason, Sequence
from hf_paged.engine.scheduler import Scheduler
from hf_paged.step import StepPlan


def make_manager(num_blocks: int = 8, block_size: int = 4, **options) -> BlockManager:
    return BlockManager(block_size, num_blocks, lambda wanted: wanted, **options)


def make_scheduler(
    num_blocks: int = 8,
    block_size: int = 4,
    max_num_seqs: int = 8,
    max_num_batched_tokens: int = 64,
    **options,
) -> Scheduler:
    manager = make_manager(num_blocks, block_size, **options)
    return Scheduler(manager, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)


def make_call(*prompts: list[int], max_new_tokens: int = 4, **options) -> Call:
    call = Call(sampling=None, **options)
    for prompt in prompts:
        call.add_row(prompt, max_new_tokens)
    return call


def next_token(seq: Sequence) -> int:
    """A made-up greedy model: depends on the whole history, so that a wrong one shows."""
    return hash(tuple(seq.token_ids)) % 97


class SlotDevice:
    """Runs plans: checks that every key a token may see is the right one, then makes up next tokens."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.scheduler = scheduler
        self.slots: dict[tuple[int, int], tuple[int, int]] = {}
        self.plans: list[StepPlan] = []

    @property
    def steps(self) -> int:
        return len(self.plans)

    def run(self, plan: StepPlan) -> None:
        size = self.scheduler.manager.block_size
        for src, dst in plan.block_copies:
            for offset in range(size):
                if (src, offset) in self.slots:
                    self.slots[dst, offset] = self.slots[src, offset]
        written = set()
        for seq, count in zip(plan.sequences, plan.num_scheduled_tokens, strict=True):
            for position in range(seq.num_computed, seq.num_computed + count):
                slot = (seq.block_table[position // size], position % size)
                assert slot not in written, "two sequences write one slot"
                written.add(slot)
                self.slots[slot] = (position, self.history(seq)[position])
        for seq, count in zip(plan.sequences, plan.num_scheduled_tokens, strict=True):
            for position in range(seq.num_computed + count):
                slot = (seq.block_table[position // size], position % size)
                assert self.slots[slot] == (position, self.history(seq)[position]), "a key of another history"
        self.plans.append(plan)

    def history(self, seq: Sequence) -> list[int]:
        """The tokens of `seq` as the device knows them."""
        return seq.token_ids

    def step(self) -> list[Sequence]:
        """One step; returns the sequences that ended in it."""
        plan = self.scheduler.schedule()
        assert plan is not None
        assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
        assert [c == 1 for c in plan.num_scheduled_tokens] == [True] * plan.num_decodes + [False] * (
            len(plan.sequences) - plan.num_decodes
        )
        self.run(plan)
        self.scheduler.advance(plan)
        sampled = [plan.sequences[i] for i in plan.sample_indices]
        for seq in tuple(sampled):
            if seq.num_generated == 0:
                sampled.extend(self.scheduler.fork_children(seq))
        ended = []
        for seq in sampled:
            seq.token_ids.append(next_token(seq))
            if seq.num_generated >= seq.max_new_tokens:
                seq.finish_reason = FinishReason.LENGTH
                ended.append(seq)
        self.scheduler.remove(ended)
        self.check()
        return ended

    def run_all(self, limit: int = 10_000) -> None:
        while self.scheduler.has_work:
            self.step()
            assert self.steps < limit, "no progress"

    def check(self) -> None:
        self.scheduler.manager.check_integrity(self.scheduler.running)


def expected_tokens(prompt: list[int], max_new_tokens: int) -> list[int]:
    """What `next_token` gives for a prompt alone."""
    call = make_call(prompt, max_new_tokens=max_new_tokens)
    seq = call.sequences[0]
    for _ in range(max_new_tokens):
        seq.token_ids.append(next_token(seq))
    return seq.generated_ids
