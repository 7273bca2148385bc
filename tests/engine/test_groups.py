"""Beams in the scheduler: groups start, advance, fork and are preempted whole, and every key read is the right one."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged.engine import groups
from hf_paged.engine.request import Call, FinishReason, SequenceGroup
from tests.engine.policy import SlotDevice, expected_tokens, make_call, make_scheduler, next_token


def make_beams(prompts: list[list[int]], num_beams: int, max_new_tokens: int, *, whole: bool = False) -> Call:
    """A call of beams; their choices are drawn from its `sampling`."""
    call = make_call(max_new_tokens=max_new_tokens)
    call.sampling = random.Random(str(prompts))
    for prompt in prompts:
        for _ in range(num_beams):
            call.add_row(prompt, max_new_tokens)
    numbers = list(range(len(prompts)))
    for part in [numbers] if whole else [[i] for i in numbers]:
        rows = call.sequences[part[0] * num_beams : (part[-1] + 1) * num_beams]
        group = SequenceGroup(call, num_beams, part, rows)
        for sequence in rows:
            sequence.group = group
    return call


class BeamDevice(SlotDevice):
    """Also makes choices for groups, and checks that all of a group step together."""

    def step(self) -> list:
        plan = self.scheduler.schedule()
        assert plan is not None
        assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
        assert len(self.scheduler.running) <= self.scheduler.max_num_seqs
        self.run(plan)
        self.scheduler.advance(plan)
        sampled = [plan.sequences[i] for i in plan.sample_indices]
        for group in dict.fromkeys(s.group for s in sampled if s.group is not None):
            self.choose(group, [s for s in sampled if s.group is group])
        ended = []
        for seq in (s for s in sampled if s.group is None):
            seq.token_ids.append(next_token(seq))
            if seq.num_generated >= seq.max_new_tokens:
                seq.finish_reason = FinishReason.LENGTH
                ended.append(seq)
        self.scheduler.remove(ended)
        self.check()
        return ended

    def choose(self, group: SequenceGroup, present: list) -> None:
        assert set(present) == set(group.active), "a part of a group took a step"
        source = group.call.sampling
        beams = group.num_beams
        sources = [
            i - i % beams + source.randrange(beams) if group.num_steps else i - i % beams
            for i in range(len(group.sequences))
        ]
        self.scheduler.regroup(group, sources)
        group.take(sources, [source.randrange(100) for _ in sources])
        if group.num_steps >= group.sequences[0].max_new_tokens:
            for seq in group.sequences:
                seq.finish_reason = FinishReason.LENGTH
            self.scheduler.remove(group.sequences)


def test_a_prompt_is_computed_once_and_shared_by_its_beams() -> None:
    scheduler = make_scheduler(num_blocks=64)
    device = BeamDevice(scheduler)
    scheduler.add(make_beams([list(range(10))], 4, 5))
    device.step()
    assert device.plans[0].num_scheduled_tokens == [10]
    assert scheduler.manager.num_used == 3
    device.step()
    assert device.plans[1].num_scheduled_tokens == [1, 1, 1, 1]
    assert len(device.plans[1].block_copies) == 3
    assert scheduler.manager.peak_used == 2 + 4
    while scheduler.has_work:
        device.step()
    assert scheduler.manager.num_used == 0


def test_groups_are_preempted_whole_and_share_again_without_a_prefix_cache() -> None:
    num_blocks = groups.most_blocks([9], 12, 3, 4)
    scheduler = make_scheduler(num_blocks=num_blocks, prefix_caching=False)
    device = BeamDevice(scheduler)
    calls = [make_beams([[i] * 9], 3, 12) for i in range(3)]
    for call in calls:
        scheduler.add(call)
    while scheduler.has_work:
        device.step()
    assert scheduler.num_preemptions > 0
    assert all(s.num_generated == 12 for call in calls for s in call.sequences)


def test_places_are_kept_for_beams_that_are_not_computed_yet() -> None:
    scheduler = make_scheduler(num_blocks=64, max_num_seqs=5, max_num_batched_tokens=5)
    device = BeamDevice(scheduler)
    scheduler.add(make_beams([[1] * 12], 4, 3))
    for i in range(4):
        scheduler.add(make_call([i], max_new_tokens=9))
    while scheduler.has_work:
        device.step()
    assert max(len(plan.sequences) for plan in device.plans) == 5


prompts = st.lists(st.integers(0, 1), min_size=1, max_size=10)


@settings(max_examples=200, deadline=None)
@given(
    data=st.data(),
    block_size=st.integers(1, 5),
    extra_blocks=st.integers(0, 12),
    max_num_seqs=st.integers(6, 9),
    max_tokens=st.integers(1, 16),
    caching=st.booleans(),
)
def test_any_traffic_keeps_each_beam_its_own_history(
    data, block_size, extra_blocks, max_num_seqs, max_tokens, caching
) -> None:
    scheduler = make_scheduler(
        num_blocks=2 * groups.most_blocks([10], 6, 3, block_size) + extra_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        prefix_caching=caching,
    )
    device = BeamDevice(scheduler)
    calls, cancelled = [], set()
    for _ in range(data.draw(st.integers(1, 12), label="events")):
        event = data.draw(st.sampled_from(["add", "beams", "step", "step", "step", "cancel"]), label="event")
        if event == "add":
            calls.append(make_call(data.draw(prompts), max_new_tokens=data.draw(st.integers(1, 6))))
            scheduler.add(calls[-1])
        elif event == "beams":
            several = data.draw(st.lists(prompts, min_size=1, max_size=2))
            whole = data.draw(st.booleans())
            beams, new = data.draw(st.integers(2, 3)), data.draw(st.integers(1, 6))
            calls.append(make_beams(several, beams, new, whole=whole))
            scheduler.add(calls[-1])
        elif event == "cancel" and calls:
            call = data.draw(st.sampled_from(calls))
            cancelled.add(call)
            scheduler.remove(call.sequences)
            device.check()
        elif scheduler.has_work:
            device.step()
    while scheduler.has_work:
        device.step()
        assert device.steps < 5000, "no progress"
    for call in calls:
        for seq in call.sequences:
            if call in cancelled:
                continue
            assert seq.num_generated == seq.max_new_tokens
            if seq.group is None:
                assert seq.generated_ids == expected_tokens(
                    seq.token_ids[: seq.prompt_len], seq.max_new_tokens
                )
    assert scheduler.manager.num_used == 0


@pytest.mark.parametrize("num_beams", [1, 2, 5])
@pytest.mark.parametrize("lengths", [[3], [16, 17], [1, 40, 8]])
def test_the_most_blocks_of_beams_that_share_nothing_but_full_prompt_blocks(num_beams, lengths) -> None:
    shared = sum(length // 8 for length in lengths)
    own = sum(-(-(length + 20) // 8) - length // 8 for length in lengths)
    assert groups.most_blocks(lengths, 20, num_beams, 8) == shared + num_beams * own
