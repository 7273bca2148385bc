"""Tokens chosen on the device are those the sampler chooses while the host waits."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers.generation import logits_process as upstream

from hf_paged.engine import device_sampling, sampler
from hf_paged.engine.draws import LockstepDraws, SeededDraws
from hf_paged.engine.request import Call, Sequence
from hf_paged.engine.sampler import Sampler
from hf_paged.engine.sampling import SamplingSpec

VOCAB = 40
PENALTY = upstream.RepetitionPenaltyLogitsProcessor
#: What is done before the draw, as upstream orders it.
WARPERS: dict[str, Any] = {
    "none": lambda: [],
    "temperature": lambda: [upstream.TemperatureLogitsWarper(0.7)],
    "top_k": lambda: [upstream.TemperatureLogitsWarper(1.3), upstream.TopKLogitsWarper(5)],
    "top_p": lambda: [upstream.TopKLogitsWarper(20), upstream.TopPLogitsWarper(0.8)],
    "min_p": lambda: [upstream.TemperatureLogitsWarper(0.9), upstream.MinPLogitsWarper(0.1)],
    "penalty": lambda: [PENALTY(1.4)],
    "penalty_behind_prompt": lambda: [PENALTY(1.4, prompt_ignore_length=3), upstream.TopKLogitsWarper(9)],
    "penalty_behind_pads": lambda: [PENALTY(1.9, prompt_ignore_length=torch.tensor([5]))],
    "length": lambda: [upstream.MinNewTokensLengthLogitsProcessor(3, 2, [1]), upstream.TopKLogitsWarper(9)],
    "others": lambda: [upstream.TypicalLogitsWarper(0.9), upstream.EpsilonLogitsWarper(0.01)],
}


def make_call(kind: str, seed: int | None, **spec: Any) -> Call:
    """One row of three prompt tokens; sampled if it has a seed."""
    draws = None if seed is None else SeededDraws(seed)
    sampling = SamplingSpec(
        torch.tensor([[3, 4, 5]]), WARPERS[kind](), do_sample=seed is not None, draws=draws, **spec
    )
    call = Call(sampling)
    call.add_row([3, 4, 5], 50)
    return call


def logits_of(num_rows: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    # Few distinct values: ties at every cut.
    drawn = torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed))
    return (drawn * 4).round().div(2).to(dtype)


def chosen_ahead(logits: torch.Tensor, sequences: list[Sequence]) -> list[int | BaseException]:
    """By `choose`, while the newest token of each sequence that has any is on the device only."""
    newest = {}
    tokens = {s: s.token_ids.pop() for s in sequences if s.num_generated}
    for sequence, token in tokens.items():
        sequence.num_ahead = 1
        newest[sequence] = torch.tensor([token])
    try:
        return device_sampling.choose(logits, sequences, Sampler().argmax_rows, newest).wait()
    finally:
        for sequence, token in tokens.items():
            sequence.num_ahead = 0
            sequence.token_ids.append(token)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", WARPERS)
def test_every_kind_is_what_the_sampler_chooses(kind: str, dtype: torch.dtype) -> None:
    calls = [make_call(kind, seed) for seed in (None, 1, 2, 2)]
    sequences = [s for call in calls for s in call.sequences]
    for step in range(6):
        logits = logits_of(len(sequences), step, dtype)
        ahead = chosen_ahead(logits, sequences)
        tokens = Sampler().sample(logits, sequences)
        assert ahead == tokens
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.token_ids.append(token)


@pytest.mark.parametrize("most", [1, 3, 100])
def test_rows_of_all_kinds_in_one_step_keep_their_places(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(sampler, "_CHUNK_BYTES", most * 4 * VOCAB)
    source = random.Random(most)
    calls = [make_call(source.choice([*WARPERS]), source.choice([None, *range(9)])) for _ in range(30)]
    sequences = [s for call in calls for s in call.sequences]
    for step in range(4):
        logits = logits_of(len(sequences), step, torch.float32)
        ahead = chosen_ahead(logits, sequences)
        assert ahead == Sampler().sample(logits, sequences)
        for sequence, token in zip(sequences, ahead, strict=True):
            if source.random() < 0.7:
                sequence.token_ids.append(token)


def test_a_penalty_sees_the_token_that_only_the_device_knows() -> None:
    call = make_call("penalty", None)
    sequence = call.sequences[0]
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8] = 2.0, 1.9
    sequence.num_ahead = 1
    for newest, expected in ((7, 8), (9, 7)):
        tokens = device_sampling.choose(
            logits, [sequence], Sampler().argmax_rows, {sequence: torch.tensor([newest])}
        )
        assert tokens.wait() == [expected]


@pytest.mark.parametrize("ignored, expected", [(3, 8), (4, 7), (5, 7)])
def test_a_penalty_leaves_out_a_newest_token_among_those_it_ignores(ignored: int, expected: int) -> None:
    """Upstream counts what it ignores in columns of the mask, which may be more than the ids have."""
    call = make_call("penalty", None)
    call.sampling.processors[0].prompt_ignore_length = torch.tensor([ignored])
    sequence = call.sequences[0]
    sequence.num_ahead = 1  # the fourth
    logits = torch.zeros(1, VOCAB)
    logits[0, 7], logits[0, 8] = 2.0, 1.9
    chosen = device_sampling.choose(logits, [sequence], Sampler().argmax_rows, {sequence: torch.tensor([7])})
    assert chosen.wait() == [expected]


def test_a_row_of_no_numbers_fails_as_it_does_in_the_sampler() -> None:
    calls = [make_call("top_k", seed) for seed in (1, 2, 3)]
    sequences = [s for call in calls for s in call.sequences]
    logits = logits_of(3, 0, torch.float32)
    logits[1, 5] = float("nan")
    expected = Sampler().sample(logits, sequences)
    chosen = device_sampling.choose(logits, sequences, Sampler().argmax_rows, {})
    actual = chosen.wait()
    assert [actual[0], actual[2]] == [expected[0], expected[2]]
    assert isinstance(actual[1], RuntimeError)
    assert str(actual[1]) == str(expected[1])
    assert 0 <= int(chosen.tokens[1]) < VOCAB  # the step after is launched with it


def test_a_processor_that_raises_fails_its_call_only() -> None:
    calls = [make_call("penalty", seed) for seed in (1, 2)]
    # As many as there are rows, says upstream: here one.
    calls[1].sampling.processors[0].prompt_ignore_length = torch.tensor([1, 2])
    sequences = [s for call in calls for s in call.sequences]
    logits = logits_of(2, 0, torch.float32)
    chosen = device_sampling.choose(logits, sequences, Sampler().argmax_rows, {})
    tokens = chosen.wait()
    assert tokens[0] == Sampler().sample(logits[:1], sequences[:1])[0]
    assert isinstance(tokens[1], ValueError)


@pytest.mark.parametrize("kind", ["none", "top_k", "penalty"])
def test_log_probabilities_are_the_samplers(kind: str) -> None:
    wanted: list[dict[str, Any]] = [
        {"logprobs": 3},
        {},
        {"logprobs": 0, "raw_logprobs": True},
        {"logprobs": 60},
    ]
    calls = [make_call(kind, seed, **spec) for spec in wanted for seed in (None, 1)]
    sequences = [s for call in calls for s in call.sequences]
    assert all(call.sampling.on_device for call in calls)
    logits = logits_of(len(sequences), 3, torch.float32)
    chosen = device_sampling.choose(logits, sequences, Sampler().argmax_rows, {})
    for row, numbers in chosen.logprobs().items():
        sampler.note_logprobs(sequences[row], chosen.wait()[row], *numbers)
    ahead = [call.sampling.token_logprobs[0][:] for call in calls]
    for call in calls:
        call.sampling.token_logprobs[0].clear()
    assert Sampler().sample(logits, sequences) == chosen.wait()
    assert ahead == [call.sampling.token_logprobs[0] for call in calls]
    assert [len(entries) for entries in ahead] == [1, 1, 0, 0, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "rows, expected",
    [([0, 1, 2], [10, 11, 12, 3]), ([2, -1], [12, 1, 2, 3]), ([-1, 0, -1, 1], [0, 10, 2, 11])],
)
def test_tokens_are_put_where_a_step_wants_them(rows: list[int], expected: list[int]) -> None:
    tokens = torch.tensor([10, 11, 12])
    ids = torch.arange(4)
    device_sampling.ChosenTokens(tokens, tokens, {}, []).put(ids, rows)
    assert ids.tolist() == expected


@pytest.mark.parametrize(
    "what",
    [
        {"draws": LockstepDraws(1), "do_sample": True},
        {"processors": [upstream.NoRepeatNGramLogitsProcessor(2)]},
        {"output_scores": True},
        {"output_logits": True},
        {"edit": lambda generated, logits: None},
    ],
    ids=lambda what: next(iter(what)),
)
def test_what_wants_the_host_is_not_chosen_on_the_device(what: dict[str, Any]) -> None:
    assert not SamplingSpec(torch.tensor([[3]]), **what).on_device


@pytest.mark.parametrize("kind", WARPERS)
def test_the_kinds_above_are_chosen_on_the_device(kind: str) -> None:
    assert make_call(kind, 1).sampling.on_device
    assert make_call(kind, None).sampling.on_device
