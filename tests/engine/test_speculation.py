"""The parts of speculation without a model: lookups, how much is drafted, blocks and draws of drafted tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from hf_paged.engine.draft_policy import Acceptance, DraftPolicy, StepTimes
from hf_paged.engine.draws import LockstepDraws, PeekedDraws, SeededDraws
from hf_paged.engine.prompt_lookup import NGramIndex
from hf_paged.engine.request import FinishReason
from tests.engine.policy import SlotDevice, expected_tokens, make_call, make_scheduler, next_token

# --- lookups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokens", "draft"),
    [
        ([1, 2, 3, 9, 1, 2], [3, 9, 1, 2]),
        ([1, 2, 3, 9, 8, 2, 4, 1, 2], [3, 9, 8, 2]),  # two tokens count more than the latest one
        ([1, 2, 3, 5, 1, 2, 4, 5, 1, 2], [4, 5, 1, 2]),  # the latest of two
        ([5, 6, 7, 5, 6, 7], [5, 6, 7, 5]),  # a match that overlaps the end goes round
        ([4, 4], [4, 4, 4, 4]),
        ([1, 2, 3, 4], []),
        ([1], []),
    ],
)
def test_a_draft_is_what_followed_before(tokens: list[int], draft: list[int]) -> None:
    assert NGramIndex(2).draft(tokens, 4)[0] == draft


def test_an_index_that_grows_equals_one_made_at_once() -> None:
    source = random.Random(0)
    for max_ngram in (1, 2, 4):
        tokens: list[int] = []
        index = NGramIndex(max_ngram)
        for _ in range(200):
            tokens += source.choices(range(4), k=source.randint(1, 5))
            draft, match = index.draft(tokens, 6)
            assert (
                (draft, match) == NGramIndex(max_ngram).draft(tokens, 6) == naive_draft(tokens, max_ngram, 6)
            )


def naive_draft(tokens: list[int], max_ngram: int, count: int) -> tuple[list[int], int]:
    for size in range(min(max_ngram, len(tokens) - 1), 0, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                text = list(tokens)
                for i in range(count):
                    text.append(text[start + size + i])
                end = start + size
                agreeing = [n for n in (4, 8, 16) if n <= end and tokens[end - n : end] == tokens[-n:]]
                return text[len(tokens) :], max([size, *agreeing])
    return [], 0


# --- how much ---------------------------------------------------------------------------------------------------------


def share(
    policy: DraftPolicy, num_tokens: int, rates: list[float], offers: list[int], **options
) -> list[int]:
    acceptances = [Acceptance(0, 100 * rate, 100) for rate in rates]
    options = {"room": 1000, "seconds_a_depth": [0.0] * len(offers)} | options
    return policy.share(num_tokens, acceptances, offers, **options)


def measured(seconds) -> DraftPolicy:
    policy = DraftPolicy()
    for _ in range(30):
        for num_tokens in (1, 2, 3, 6, 12, 24, 48, 96, 192, 384):
            policy.step_times.observe(num_tokens, seconds(num_tokens))
    return policy


def test_alone_much_is_drafted_and_among_many_only_what_is_likely() -> None:
    policy = measured(lambda n: 4 + 0.2 * n)
    assert share(policy, 1, [0.9], [10]) == [10]
    many = share(policy, 32, [0.95] * 16 + [0.3] * 16, [10] * 32)
    assert many[0] > 0
    assert many[-1] == 0


def test_where_each_token_costs_its_full_time_nothing_is_drafted() -> None:
    policy = measured(lambda n: float(n))
    assert share(policy, 4, [0.8] * 4, [10] * 4) == [0] * 4


def test_drafting_that_takes_as_long_as_the_step_is_left_alone() -> None:
    policy = measured(lambda n: 4 + 0.1 * n)
    assert share(policy, 1, [0.9], [10], seconds_a_depth=[5.0]) == [0]
    assert share(policy, 1, [0.9], [10], seconds_a_depth=[0.5])[0] > 0


def test_room_and_offers_are_kept() -> None:
    policy = measured(lambda n: 4 + 0.01 * n)
    assert share(policy, 3, [0.9, 0.9, 0.9], [1, 7, 3]) == [1, 7, 3]
    assert sum(share(policy, 3, [0.9, 0.9, 0.9], [1, 7, 3], room=4)) == 4
    assert share(policy, 3, [0.9, 0.9, 0.9], [1, 7, 3], room=-2) == [0, 0, 0]


def test_what_is_never_right_is_left_alone_and_tried_again_later() -> None:
    policy = measured(lambda n: 4 + 0.2 * n)
    acceptance = Acceptance()
    history = []
    for _ in range(300):
        (count,) = policy.share(32, [acceptance], [5], room=100, seconds_a_depth=[0.0])
        history.append(count)
        if count:
            policy.learn(acceptance, count, 0)
        else:
            acceptance.pause()
    assert sum(history[50:]) < 25, "too many tries"
    assert any(history[50:]), "no try at all"


def test_step_times_follow_what_is_measured() -> None:
    times = StepTimes()
    for _ in range(40):
        for num_tokens in (1, 8, 64):
            times.observe(num_tokens, 3 + 0.5 * num_tokens)
    assert np.allclose(times(np.array([1, 8, 64])), [3.5, 7, 35], rtol=0.25)
    before = times(np.array([8]))[0]
    times.observe(8, 1000.0)  # somebody else had the machine
    assert times(np.array([8]))[0] < 1.5 * before


# --- blocks -----------------------------------------------------------------------------------------------------------


class DraftingDevice(SlotDevice):
    """Drafts tokens of which some are right, and takes over those that are."""

    def __init__(self, scheduler, seed: int) -> None:
        super().__init__(scheduler)
        self.source = random.Random(seed)
        self.accepted = 0

    def propose(self) -> None:
        for seq in self.scheduler.running:
            most = min(6, seq.max_new_tokens - seq.num_generated - 1)
            seq.draft = []
            if seq.num_uncomputed != 1 or most < 1:
                continue
            known = list(seq.token_ids)
            for _ in range(self.source.randint(0, most)):
                token = next_token(seq) if self.source.random() < 0.7 else 1000
                seq.draft.append(token)
                seq.token_ids.append(token)
            seq.token_ids[:] = known

    def step(self):
        self.propose()
        plan = self.scheduler.schedule()
        assert plan is not None
        assert plan.num_tokens <= self.scheduler.max_num_batched_tokens
        drafts = dict(zip(plan.sequences, plan.num_drafts or [0] * len(plan.sequences), strict=True))
        for seq in plan.sequences:
            seq.token_ids += seq.draft[: drafts[seq]]
        self.run(plan)
        for seq in plan.sequences:
            del seq.token_ids[len(seq.token_ids) - drafts[seq] :]
        self.scheduler.advance(plan)
        ended = []
        for index, count in zip(plan.sample_indices, plan.logits_counts, strict=True):
            seq = plan.sequences[index]
            draft = seq.draft[: count - 1]
            assert len(draft) == count - 1
            for depth in range(count):
                seq.token_ids.append(next_token(seq))
                if depth == len(draft) or seq.token_ids[-1] != draft[depth]:
                    break
                self.accepted += 1
            self.scheduler.accept(seq)
            assert seq.num_uncomputed == 1
            if seq.num_generated >= seq.max_new_tokens:
                seq.finish_reason = FinishReason.LENGTH
                ended.append(seq)
        self.scheduler.remove(ended)
        self.check()
        return ended


@pytest.mark.parametrize("num_blocks", [9, 14, 60])
@pytest.mark.parametrize("seed", range(6))
def test_rejected_drafts_leave_no_trace_in_blocks_or_prefixes(num_blocks: int, seed: int) -> None:
    source = random.Random(seed)
    scheduler = make_scheduler(num_blocks, max_num_batched_tokens=24)
    device = DraftingDevice(scheduler, seed)
    common = [source.randrange(90) for _ in range(9)]
    calls = []
    for _ in range(3):
        prompts = [common[: source.randint(1, 9)] + [source.randrange(90)] for _ in range(3)]
        calls.append((prompts, make_call(*prompts, max_new_tokens=20)))
        scheduler.add(calls[-1][1])
        for _ in range(source.randint(0, 12)):
            if scheduler.has_work:
                device.step()
    device.run_all()
    for prompts, call in calls:
        for prompt, seq in zip(prompts, call.sequences, strict=True):
            assert seq.generated_ids == expected_tokens(prompt, 20)
    assert device.accepted > 0


def test_a_draft_takes_no_block_that_a_sequence_needs() -> None:
    # Three sequences of two blocks each and one spare one: drafts over the block's end would take it.
    scheduler = make_scheduler(num_blocks=9, block_size=4)
    device = SlotDevice(scheduler)
    call = make_call([1, 2, 3, 4, 5], [2, 3, 4, 5, 6], [3, 4, 5, 6, 7], max_new_tokens=7)
    scheduler.add(call)
    device.step()
    for seq in scheduler.running:
        seq.draft = [1000] * 5
    plan = scheduler.schedule()
    assert plan is not None
    assert scheduler.num_preemptions == 0
    assert [seq.num_uncomputed for seq in plan.sequences] == [1, 1, 1]
    assert scheduler.manager.num_available >= 0


# --- draws ------------------------------------------------------------------------------------------------------------


def test_peeking_gives_what_comes_and_leaves_no_trace() -> None:
    vocab, kind = 7, (torch.float32, torch.device("cpu"))
    torch.manual_seed(3)
    expected = [torch.empty(2, vocab).exponential_() for _ in range(3)]
    state = torch.get_rng_state()
    torch.manual_seed(3)
    draws = LockstepDraws(2, kept_bytes=0)
    peeked = PeekedDraws(draws)
    assert torch.equal(draws.exponential([0, 1], 0, vocab, *kind), expected[0])
    assert torch.equal(peeked.exponential([1], 2, vocab, *kind), expected[2][1:])
    assert torch.equal(peeked.exponential([1], 2, vocab, *kind), expected[2][1:])
    peeked.exponential([0, 1], 6, vocab, *kind)
    assert torch.equal(draws.exponential([1], 1, vocab, *kind), expected[1][1:])
    assert torch.equal(draws.exponential([1], 2, vocab, *kind), expected[2][1:])
    assert torch.equal(peeked.exponential([0], 1, vocab, *kind), expected[1][:1])
    assert torch.equal(draws.exponential([0], 1, vocab, *kind), expected[1][:1])
    draws.release(0)
    draws.release(1)
    draws.finish(3)
    assert torch.equal(torch.get_rng_state(), state), "three steps were made, however far was looked"


def test_a_counted_stream_may_be_looked_at() -> None:
    kind = (torch.float32, torch.device("cpu"))
    draws = SeededDraws(5)
    peeked = PeekedDraws(draws).exponential([0, 1], 4, 9, *kind)
    assert torch.equal(peeked, draws.exponential([0, 1], 4, 9, *kind))
