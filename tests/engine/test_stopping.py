"""Why rows stop, against upstream's criteria on the very rows upstream would show."""

from __future__ import annotations

import logging
import random
import time
from typing import Any

import pytest
import torch
from transformers import MaxLengthCriteria, MaxTimeCriteria, StoppingCriteriaList, StopStringCriteria
from transformers.generation import stopping_criteria as upstream
from transformers.generation.stopping_criteria import ConfidenceCriteria, EosTokenCriteria

from hf_paged.engine import stopping
from hf_paged.engine.request import Call, FinishReason, Sequence
from hf_paged.engine.sampler import Sampler
from hf_paged.engine.sampling import SamplingSpec, unsupported
from tests.engine.sampling_runs import Replay, record, run
from tests.helpers import demo_model, demo_tokenizer, left_pad, make_model, random_prompts


def make_call(prompts: list[list[int]], criteria: list[Any], max_new_tokens: int = 100, pad: int = 0) -> Call:
    """One call of left-padded rows."""
    width = max(len(prompt) for prompt in prompts)
    columns = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    call = Call(SamplingSpec(torch.tensor(columns), criteria=criteria))
    for prompt in prompts:
        call.add_row(prompt, max_new_tokens, num_pad=width - len(prompt))
    return call


def stops(sequences: list[Sequence]) -> list[FinishReason | None]:
    return Sampler().stops(sequences)


def test_end_of_sequence_goes_before_length() -> None:
    call = make_call([[5], [5, 6], [7]], [EosTokenCriteria([3, 4])], max_new_tokens=2)
    for sequence, tokens in zip(call.sequences, ([8, 4], [9], [8, 8]), strict=True):
        sequence.token_ids += tokens
    assert stops(call.sequences) == [FinishReason.STOP, None, FinishReason.LENGTH]


def test_lengths_count_pads() -> None:
    call = make_call([[5], [5, 6, 7]], [MaxLengthCriteria(5), MaxLengthCriteria(9)])
    for sequence in call.sequences:
        sequence.token_ids.append(8)
    assert stops(call.sequences) == [None, None]
    for sequence in call.sequences:
        sequence.token_ids.append(8)
    assert stops(call.sequences) == [FinishReason.LENGTH, FinishReason.LENGTH]
    assert call.sampling.max_length == 5


def test_what_is_finished_stays_finished() -> None:
    call = make_call([[5], [6]], [EosTokenCriteria(3)])
    call.run_on = True
    for sequence in call.sequences:
        sequence.token_ids.append(3)
    call.sequences[0].finish_reason = FinishReason.LENGTH
    assert stops(call.sequences) == [FinishReason.LENGTH, FinishReason.STOP]


def test_time_ends_all_rows_of_its_call_only() -> None:
    late = make_call(
        [[5], [6]], [MaxTimeCriteria(10.0, initial_timestamp=time.time() - 11), EosTokenCriteria(3)]
    )
    early = make_call([[5]], [MaxTimeCriteria(1000.0)])
    sequences = late.sequences + early.sequences
    for sequence, token in zip(sequences, (8, 3, 8), strict=True):
        sequence.token_ids.append(token)
    assert stops(sequences) == [FinishReason.TIMEOUT, FinishReason.STOP, None]


def test_passing_the_positions_warns_as_upstream_does(caplog: pytest.LogCaptureFixture) -> None:
    upstream.logger.warning_once.cache_clear()
    caplog.set_level(
        logging.WARNING, logger="transformers"
    )  # the command line, tested before, makes it quiet
    logging.getLogger("transformers").propagate = True
    try:
        call = make_call([[5, 6]], [MaxLengthCriteria(20, max_position_embeddings=4)])
        (sequence,) = call.sequences
        warned_at = []
        for length in range(3, 8):
            sequence.token_ids.append(9)
            assert stops([sequence]) == [None]
            if caplog.records:
                warned_at.append(length)
                caplog.clear()
    finally:
        logging.getLogger("transformers").propagate = False
    assert warned_at == [5]


STRINGS = ["self", "the ", "\n", "e", " return ", "ing"]


@pytest.mark.parametrize("seed", range(6))
def test_stop_strings_are_upstreams(seed: int) -> None:
    """Random tokens of a real vocabulary, calls with equal and unequal strings, rows of all lengths."""
    tokenizer = demo_tokenizer("llama")
    source = random.Random(seed)
    tokens = [t for s in STRINGS for t in tokenizer(s, add_special_tokens=False)["input_ids"]]
    pool = tokens * 3 + [source.randrange(len(tokenizer)) for _ in range(20)]
    calls = []
    for n in range(4):
        strings = source.sample(STRINGS, 2) if n else STRINGS[:2]
        criteria = [StopStringCriteria(tokenizer, strings)]
        prompts = [[source.choice(pool) for _ in range(source.randint(1, 9))] for _ in range(3)]
        calls += [
            make_call(prompts, criteria),
            make_call(prompts[:1], [StopStringCriteria(tokenizer, strings)]),
        ]
    sequences = [s for call in calls for s in call.sequences]
    stopped = 0
    for _ in range(12):
        stepping = source.sample(sequences, 7)
        for sequence in stepping:
            sequence.token_ids.append(source.choice(pool))
        for sequence, reason in zip(stepping, stops(stepping), strict=True):
            spec = sequence.call.sampling
            shown = torch.tensor(
                [spec.prompt_ids[sequence.row].tolist() + sequence.token_ids[sequence.prompt_len :]]
            )
            expected = bool(spec.criteria[0](shown, None))
            assert (reason is FinishReason.STOP) == expected
            stopped += expected
    assert stopped > 3


@pytest.mark.parametrize("with_eos", [False, True])
def test_stop_strings_in_a_whole_run(with_eos: bool) -> None:
    """Without an end-of-sequence criterion upstream's finished rows go on with real tokens, with one, pads."""
    model, tokenizer = demo_model("llama"), demo_tokenizer("llama")
    model.generation_config.eos_token_id = model.generation_config.eos_token_id if with_eos else None
    model.generation_config.pad_token_id = (
        tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    )
    texts = ["def main(self):", "import", "The list of", "class Thread:\n    "]
    inputs = left_pad([tokenizer(text)["input_ids"] for text in texts], model.generation_config.pad_token_id)
    recording = record(
        model, inputs, max_new_tokens=40, do_sample=True, stop_strings=["self", " the"], tokenizer=tokenizer
    )
    torch.set_rng_state(recording.rng_before)
    replay = Replay.of(recording)
    run([replay])
    replay.check()
    assert any(s.finish_reason is FinishReason.STOP for s in replay.call.sequences)
    assert torch.equal(torch.get_rng_state(), recording.rng_after)


def test_max_length_by_criterion_in_a_whole_run() -> None:
    model = make_model("gpt2")
    criteria = StoppingCriteriaList([MaxLengthCriteria(11)])
    recording = record(
        model,
        left_pad(random_prompts([2, 5])),
        do_sample=False,
        stopping_criteria=criteria,
        eos_token_id=None,
    )
    replay = Replay.of(recording)
    run([replay])
    replay.check()


def test_every_criterion_of_upstream_is_known() -> None:
    names = {
        cls.__name__
        for cls in upstream.StoppingCriteria.__subclasses__()
        if cls.__module__ == upstream.__name__
    }
    unsupported_names = {"ConfidenceCriteria"}  # of assistants only; reads scores
    assert names == {cls.__name__ for cls in stopping.SUPPORTED} | unsupported_names


def test_user_made_criteria_are_named() -> None:
    class Mine(EosTokenCriteria):
        pass

    assert unsupported([], [MaxTimeCriteria(1.0), Mine(3)]) == "stopping criterion Mine"
    assert unsupported([], [ConfidenceCriteria(0.5)]) == "stopping criterion ConfidenceCriteria"
    assert unsupported([], [MaxTimeCriteria(1.0), EosTokenCriteria(3)]) is None
