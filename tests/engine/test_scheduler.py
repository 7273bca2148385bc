from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.engine.policy import SlotDevice, expected_tokens, make_call, make_scheduler


def test_decodes_and_prompt_chunks_share_a_step():
    scheduler = make_scheduler(num_blocks=64, max_num_batched_tokens=8, max_num_seqs=4)
    device = SlotDevice(scheduler)
    scheduler.add(make_call([1, 2, 3], max_new_tokens=9))
    device.step()
    scheduler.add(make_call(list(range(20)), max_new_tokens=1))
    plan = scheduler.schedule()
    assert plan.num_scheduled_tokens == [1, 7]
    assert plan.sample_indices == [0]


def test_order_of_arrival_and_priority():
    scheduler = make_scheduler(num_blocks=64, max_num_seqs=1)
    device = SlotDevice(scheduler)
    late, urgent = make_call([1], max_new_tokens=1), make_call([2], max_new_tokens=1, priority=-1)
    scheduler.add(late)
    scheduler.add(urgent)
    assert device.step() == urgent.sequences
    assert device.step() == late.sequences


def test_ambient_states_never_share_a_step_and_take_turns():
    scheduler = make_scheduler(num_blocks=64)
    device = SlotDevice(scheduler)
    calls = [make_call([i, i], max_new_tokens=3, ambient=i % 2) for i in range(4)]
    for call in calls:
        scheduler.add(call)
    device.run_all()
    seen = [{s.call.ambient for s in plan.sequences} for plan in device.plans]
    assert all(len(states) == 1 for states in seen)
    assert seen[0] != seen[1]


def test_prompt_shared_by_returned_sequences_is_computed_once():
    scheduler = make_scheduler(num_blocks=64)
    device = SlotDevice(scheduler)
    call = make_call([7] * 10, max_new_tokens=6)
    for _ in range(3):
        call.add_row([7] * 10, 6, fork_of=0)
    scheduler.add(call)
    device.run_all()
    assert device.plans[0].num_scheduled_tokens == [10]
    assert device.plans[1].num_scheduled_tokens == [1, 1, 1, 1]
    assert device.plans[1].block_copies
    assert {tuple(s.generated_ids) for s in call.sequences} == {tuple(expected_tokens([7] * 10, 6))}
    assert scheduler.manager.num_used == 0


def test_preempted_sequences_give_the_same_tokens():
    scheduler = make_scheduler(num_blocks=6, block_size=2, max_num_batched_tokens=16)
    device = SlotDevice(scheduler)
    prompts = [[i, i + 1, i + 2] for i in range(5)]
    calls = [make_call(p, max_new_tokens=8) for p in prompts]
    for call in calls:
        scheduler.add(call)
    device.run_all()
    assert scheduler.num_preemptions > 0
    for prompt, call in zip(prompts, calls, strict=True):
        assert call.sequences[0].generated_ids == expected_tokens(prompt, 8)


def test_long_waiting_line_costs_no_time_per_step():
    scheduler = make_scheduler(num_blocks=1000, max_num_seqs=4)
    for i in range(2000):
        scheduler.add(make_call([i], max_new_tokens=1))
    device = SlotDevice(scheduler)
    device.run_all()
    assert device.steps == 500


prompts = st.lists(st.integers(0, 2), min_size=1, max_size=12)


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    block_size=st.integers(1, 5),
    extra_blocks=st.integers(0, 12),
    max_num_seqs=st.integers(1, 5),
    max_tokens=st.integers(1, 20),
    caching=st.booleans(),
)
def test_any_traffic_gives_each_sequence_its_own_tokens(
    data, block_size, extra_blocks, max_num_seqs, max_tokens, caching
):
    """Arrivals, forks, cancellations, tiny pools: every key read is the right one, every block comes back."""
    longest = 12 + 8
    scheduler = make_scheduler(
        num_blocks=-(-longest // block_size) + extra_blocks,
        block_size=block_size,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_tokens,
        prefix_caching=caching,
    )
    device = SlotDevice(scheduler)
    calls, cancelled = [], set()
    for _ in range(data.draw(st.integers(1, 12), label="events")):
        event = data.draw(st.sampled_from(["add", "add", "step", "step", "step", "cancel"]), label="event")
        if event == "add":
            prompt = data.draw(prompts)
            new = data.draw(st.integers(1, 8))
            call = make_call(
                prompt, max_new_tokens=new, namespace=data.draw(st.sampled_from([b"a", b"b", None]))
            )
            for _ in range(data.draw(st.integers(0, 2))):
                call.add_row(prompt, new, fork_of=0)
            calls.append(call)
            scheduler.add(call)
        elif event == "cancel" and calls:
            call = data.draw(st.sampled_from(calls))
            cancelled.add(call)
            scheduler.remove(call.sequences)
            device.check()
        elif scheduler.has_work:
            device.step()
    device.run_all()
    for call in calls:
        for seq in call.sequences:
            if call not in cancelled:
                assert seq.generated_ids == expected_tokens(
                    seq.token_ids[: seq.prompt_len], seq.max_new_tokens
                )
    assert scheduler.manager.num_used == 0


@pytest.mark.parametrize("blocks", [3, 4, 5])
def test_pool_of_one_sequence_serves_many(blocks):
    scheduler = make_scheduler(num_blocks=blocks, block_size=4)
    device = SlotDevice(scheduler)
    calls = [make_call([i] * 5, max_new_tokens=7) for i in range(6)]
    for call in calls:
        scheduler.add(call)
    device.run_all()
    assert all(c.sequences[0].num_generated == 7 for c in calls)


@settings(max_examples=100, deadline=None)
@given(data=st.data(), num_blocks=st.integers(6, 24), max_num_seqs=st.integers(1, 6), caching=st.booleans())
def test_steps_of_nothing_but_decodes_are_planned_as_all_are(data, num_blocks, max_num_seqs, caching):
    """The short way of `_schedule_decodes` plans what the general one plans, in pools that preempt, too."""
    work = [
        (at, data.draw(prompts), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 2)))
        for at in sorted(data.draw(st.lists(st.integers(0, 12), min_size=1, max_size=6)))
    ]

    def plans(*, short_way: bool) -> tuple[list[tuple], int]:
        scheduler = make_scheduler(
            num_blocks=num_blocks,
            max_num_seqs=max_num_seqs,
            prefix_caching=caching,
            max_num_batched_tokens=16,
        )
        if not short_way:
            scheduler._has_only_decodes = lambda: False
        device, todo = SlotDevice(scheduler), list(work)
        while todo or scheduler.has_work:
            while todo and todo[0][0] <= device.steps:
                _, prompt, new, forks = todo.pop(0)
                call = make_call(prompt, max_new_tokens=new)
                for _ in range(forks):
                    call.add_row(prompt, new, fork_of=0)
                scheduler.add(call)
            if scheduler.has_work:
                device.step()
            else:
                todo[0] = (0, *todo[0][1:])
        found = [
            (
                [s.arrival for s in p.sequences],
                p.num_scheduled_tokens,
                p.num_decodes,
                p.block_copies,
                p.sample_indices,
                p.num_drafts,
            )
            for p in device.plans
        ]
        return found, sum(p.is_plain for p in device.plans)

    short, num_plain = plans(short_way=True)
    general, none = plans(short_way=False)
    assert short == general
    assert none == 0
    assert num_plain <= len(short)


def test_steps_of_nothing_but_decodes_are_plain():
    scheduler = make_scheduler(num_blocks=64)
    device = SlotDevice(scheduler)
    for i in range(3):
        scheduler.add(make_call([i] * 5, max_new_tokens=4))
    device.run_all()
    scheduler.add(make_call([9] * 5, max_new_tokens=4, run_on=True))
    device.run_all()
    assert [p.is_plain for p in device.plans] == [False, True, True, True] + [False] * 4
