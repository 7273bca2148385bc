"""Steps one ahead of a model of the device: what may be planned, who gets tokens, what a surplus token leaves."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged.engine.ahead import StepsAhead, make_ahead
from hf_paged.engine.block_manager import _block_key
from hf_paged.engine.request import Call, FinishReason, Sequence, Status
from hf_paged.engine.scheduler import Scheduler
from hf_paged.step import StepPlan
from tests.engine.policy import SlotDevice, make_call, make_scheduler, next_token

ON_DEVICE = SimpleNamespace(on_device=True)


class Late:
    """Tokens that the device has and the host gets by `wait`."""

    def __init__(self, tokens: list[int], is_in_order: bool = True) -> None:
        self.tokens, self.is_in_order = tokens, is_in_order

    def wait(self) -> list[Any]:
        return self.tokens

    def put(self, ids: list[int], rows: list[int]) -> None:
        for place, row in enumerate(rows):
            ids[place] = self.tokens[row] if row >= 0 else ids[place]

    def of(self, row: int) -> int:
        return self.tokens[row]


class AheadDevice(SlotDevice):
    """Takes steps as the loop does. A token that `ends` divides ends its sequence."""

    def __init__(self, scheduler: Scheduler, ends: int = 0, *, patient: bool = True) -> None:
        super().__init__(scheduler)
        self.ahead = StepsAhead()
        self.ends = ends
        self.patient = patient  # lets `may_plan` speak
        self.surplus = 0

    def history(self, seq: Sequence) -> list[int]:
        flight = self.ahead.flight
        return [*seq.token_ids, flight.tokens.of(flight.rows[seq])] if seq.num_ahead else seq.token_ids

    def step(self) -> list[Sequence]:
        if self.patient and not self.ahead.may_plan(self.scheduler):
            self.land()
        plan = self.scheduler.schedule()
        if plan is None:
            return self.land()
        assert len(plan.sequences) <= self.scheduler.max_num_seqs
        self.run(plan)
        self.check_inputs(plan)
        sampled = [plan.sequences[i] for i in plan.sample_indices]
        tokens = [next_token_after(self.history(s)) for s in sampled]
        ended = self.land()
        self.surplus += sum(s.status is Status.FINISHED for s in plan.sequences)
        self.scheduler.advance(plan)
        if sampled:
            self.ahead.launched(plan, sampled, Late(tokens))
        self.check()
        return ended

    def check_inputs(self, plan: StepPlan) -> None:
        """What is passed on is what the device's own history says."""
        ids = [
            s.token_ids[s.num_computed] if not s.num_ahead else -1 for s in plan.sequences[: plan.num_decodes]
        ]
        self.ahead.pass_on(plan, ids)
        assert ids == [self.history(s)[s.num_computed] for s in plan.sequences[: plan.num_decodes]]

    def land(self) -> list[Sequence]:
        flight = self.ahead.land()
        ended = []
        for seq, token in zip(flight.sequences, flight.tokens.wait(), strict=True) if flight else ():
            if seq.status is Status.FINISHED:
                continue
            seq.token_ids.append(token)
            if self.is_last(seq):
                seq.finish_reason = FinishReason.STOP
                ended.append(seq)
        self.scheduler.remove(ended)
        return ended

    def is_last(self, seq: Sequence) -> bool:
        ends = self.ends and seq.token_ids[-1] % self.ends == 0
        return bool(ends) or seq.num_generated >= seq.max_new_tokens

    def alone(self, prompt: list[int], limit: int) -> list[int]:
        seq = make_call(prompt, max_new_tokens=limit).sequences[0]
        while not seq.num_generated or not self.is_last(seq):
            seq.token_ids.append(next_token_after(seq.token_ids))
        return seq.generated_ids

    def check_registered(self, sequences: list[Sequence]) -> None:
        """Found by prefix are blocks of tokens before the last of a sequence only, with just their tokens in them."""
        manager = self.scheduler.manager
        known = {}
        for seq in sequences:
            # The last token of one that was cancelled was just being computed.
            key, tokens = seq.call.namespace, seq.token_ids[:-1] if seq.finish_reason else seq.token_ids
            for start in range(0, len(tokens) - manager.block_size + 1, manager.block_size):
                part = tokens[start : start + manager.block_size]
                key = _block_key(key, part)
                known[key] = [(start + i, token) for i, token in enumerate(part)]
        for key, block in manager._by_key.items():
            held = [self.slots[block, i] for i in range(manager.block_size)]
            assert held == known.get(key), "registered, but nobody's known tokens"


def next_token_after(history: list[int]) -> int:
    return next_token(SimpleNamespace(token_ids=history))  # type: ignore[arg-type]


@settings(deadline=None, max_examples=150)
@given(
    seed=st.integers(0, 10**6),
    num_blocks=st.integers(10, 40),
    block_size=st.sampled_from([1, 4]),
    ends=st.sampled_from([0, 2, 5]),
    patient=st.booleans(),
)
def test_tokens_are_those_of_each_sequence_alone(
    seed: int, num_blocks: int, block_size: int, ends: int, patient: bool
) -> None:
    source = random.Random(seed)
    scheduler = make_scheduler(
        num_blocks * 4 // block_size,
        block_size,
        max_num_seqs=source.choice([2, 8]),
        max_num_batched_tokens=source.choice([8, 64]),
    )
    device = AheadDevice(scheduler, ends, patient=patient)
    calls: list[Call] = []
    shared = [source.randrange(9) for _ in range(8)]
    for _ in range(12):
        prompt = shared[: source.choice([0, 8])] + [
            source.randrange(9) for _ in range(source.randrange(1, 12))
        ]
        call = make_call(prompt, max_new_tokens=source.randrange(1, 20))
        calls.append(call)
        scheduler.add(call)
        for _ in range(source.randrange(4)):
            if scheduler.has_work:
                device.step()
        if source.random() < 0.1:
            scheduler.remove(source.choice(calls).sequences)  # cancelled, maybe with a token on its way
            device.check()
    while scheduler.has_work:
        device.step()
        assert device.steps < 5000, "no progress"
    device.ahead.finish()
    for seq in (call.sequences[0] for call in calls):
        expected = device.alone(seq.token_ids[: seq.prompt_len], seq.max_new_tokens)
        if seq.finish_reason is None:  # cancelled
            expected = expected[: seq.num_generated]
        assert seq.generated_ids == expected
        assert not seq.num_ahead
    assert scheduler.manager.num_used == 0
    device.check_registered([s for call in calls for s in call.sequences])


def test_a_step_is_planned_before_the_tokens_of_the_last_are_known() -> None:
    device = AheadDevice(make_scheduler(num_blocks=64))
    device.scheduler.add(make_call([1, 2, 3], [4, 5], max_new_tokens=5))
    for step in range(1, 6):
        device.step()
        for seq in device.scheduler.running:
            assert (seq.num_generated, seq.num_ahead) == (step - 1, 1)
    assert device.ahead.num_steps == 4
    assert len(device.step()) == 2
    assert device.steps == 5, "a step for a token beyond the limit"
    assert not device.surplus


def test_a_surplus_token_leaves_its_blocks_and_no_prefix() -> None:
    device = AheadDevice(make_scheduler(num_blocks=64, block_size=4), ends=1)
    # The token that ends it would fill the second block.
    device.scheduler.add(make_call(list(range(7)), max_new_tokens=9))
    device.step()
    assert len(device.step()) == 1
    assert device.surplus == 1
    manager = device.scheduler.manager
    assert (manager.num_used, manager.num_cached) == (0, 1)


def test_a_block_is_found_as_soon_as_its_last_token_is_known() -> None:
    device = AheadDevice(make_scheduler(num_blocks=64, block_size=4))
    device.scheduler.add(make_call(list(range(7)), max_new_tokens=9))
    device.step()
    device.step()
    assert len(device.scheduler.manager._by_key) == 2


def crowded(*, patient: bool) -> tuple[AheadDevice, list[Call]]:
    """Two sequences in four blocks; the seventh step needs a fifth."""
    device = AheadDevice(make_scheduler(num_blocks=4, block_size=4), patient=patient)
    calls = [make_call([i] * 3, max_new_tokens=9) for i in (1, 2)]
    for call in calls:
        device.scheduler.add(call)
    for _ in range(6):
        device.step()
    assert [c.sequences[0].num_ahead for c in calls] == [1, 1]
    return device, calls


def test_a_sequence_preempted_with_a_token_on_its_way_waits_for_it() -> None:
    device, calls = crowded(patient=False)
    plan = device.scheduler.schedule()
    late = calls[1].sequences[0]
    assert device.scheduler.num_preemptions == 1
    assert plan.sequences == calls[0].sequences, "it cannot start again without its newest token"
    assert (late.status, late.num_ahead, late.num_generated) == (Status.WAITING, 1, 5)
    device.run(plan)
    device.land()
    assert (late.num_ahead, late.num_generated) == (0, 6)
    device.run_all()
    assert [c.sequences[0].generated_ids for c in calls] == [device.alone([i] * 3, 9) for i in (1, 2)]


def test_no_sequence_starts_again_before_its_token_has_come() -> None:
    scheduler = make_scheduler(num_blocks=64)
    call = make_call([1, 2])
    scheduler.add(call)
    call.sequences[0].num_ahead = 1
    assert scheduler.schedule() is None
    call.sequences[0].num_ahead = 0
    assert scheduler.schedule().sequences == call.sequences


def test_nothing_is_planned_ahead_where_blocks_are_short() -> None:
    device, _ = crowded(patient=True)
    assert not device.ahead.may_plan(device.scheduler)
    landed = device.ahead.num_steps
    device.step()
    assert device.ahead.num_steps == landed
    device.run_all()
    assert device.scheduler.num_preemptions == 1


def test_tokens_made_on_another_stream_are_waited_for() -> None:
    ahead, scheduler = StepsAhead(), make_scheduler(num_blocks=64)
    call = make_call([1, 2])
    scheduler.add(call)
    plan = scheduler.schedule()
    ahead.launched(plan, call.sequences, Late([3]))
    assert ahead.may_plan(scheduler)
    ahead.flight.tokens.is_in_order = False
    assert not ahead.may_plan(scheduler)


@pytest.mark.parametrize(
    "options",
    [
        {"lockstep": object()},
        {"speculation": object()},
        {"states": object()},
        {"run_on": True},
        {"keep_kv": True},
        {"sampling": SimpleNamespace(on_device=False)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_a_call_that_wants_the_host_keeps_all_in_step_until_it_ends(options: dict[str, Any]) -> None:
    ahead = StepsAhead()
    plain, hosted = Call(ON_DEVICE), Call(**{"sampling": ON_DEVICE, **options})
    plain.add_row([1], 4)
    ahead.take_up(plain)
    assert ahead.suits([plain])
    ahead.take_up(hosted)
    assert not ahead.suits([plain, hosted])
    assert ahead.suits([plain])


def test_rows_that_share_a_prompt_are_forked_before_anything_is_ahead() -> None:
    ahead = StepsAhead()
    call = Call(ON_DEVICE)
    call.add_row([1, 2], 4)
    call.add_row([1, 2], 4, fork_of=0)
    ahead.take_up(call)
    assert not ahead.suits([call])
    call.sequences[0].token_ids.append(5)
    assert ahead.suits([call])


def test_the_end_waits_for_the_device_and_forgets() -> None:
    waited = []

    class Failing(Late):
        def wait(self) -> list[Any]:
            waited.append(True)
            raise RuntimeError("of a step that nobody wants")

    ahead, scheduler = StepsAhead(), make_scheduler()
    call = make_call([1])
    scheduler.add(call)
    ahead.launched(scheduler.schedule(), call.sequences, Failing([1]))
    ahead.finish()
    ahead.finish()
    assert waited == [True]
    assert ahead.flight is None
    assert not call.sequences[0].num_ahead


def test_only_a_device_of_its_own_is_worth_being_ahead_of() -> None:
    assert make_ahead("triton", 1) is not None
    assert make_ahead("triton", 2) is None
    assert make_ahead("cpu", 1) is None
    assert make_ahead("reference", 1) is None
