"""Every logits processor upstream has, alone and combined, against upstream's own loop."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, WatermarkingConfig
from transformers.generation import logits_process as upstream

from hf_paged.engine import processors as rules
from hf_paged.engine.draws import LockstepDraws
from hf_paged.engine.processor_rules import Line
from hf_paged.engine.sampling import unsupported
from tests.engine.sampling_runs import Replay, record, run
from tests.helpers import left_pad, make_model, random_prompts

#: Many ends of sequence: rows of random models end at different steps.
EOS = list(range(1, 12))

BY_CONFIG: dict[str, dict[str, Any]] = {
    "sequence_bias": {"sequence_bias": [[[5], 3.0], [[7, 9], -4.0], [[20, 21, 22], 8.0], [[33, 34], 9.0]]},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 1.7},
    "repetition_penalty": {"repetition_penalty": 1.9},
    "repetition_reward": {"repetition_penalty": 0.6},
    "no_repeat_ngram_1": {"no_repeat_ngram_size": 1},
    "no_repeat_ngram_2": {"no_repeat_ngram_size": 2},
    "no_repeat_ngram_4": {"no_repeat_ngram_size": 4},
    "encoder_no_repeat_ngram_1": {"encoder_no_repeat_ngram_size": 1},
    "encoder_no_repeat_ngram_2": {"encoder_no_repeat_ngram_size": 2},
    "bad_words": {"bad_words_ids": [[40], [41, 42], [50, 51, 52, 53]]},
    "min_length": {"min_length": 13},
    "min_new_tokens": {"min_new_tokens": 5},
    "forced_bos": {"forced_bos_token_id": 17},
    "forced_eos": {"forced_eos_token_id": [3, 4]},
    "remove_invalid_values": {"remove_invalid_values": True},
    "exponential_decay": {"exponential_decay_length_penalty": (3, 1.4)},
    "suppress_tokens": {"suppress_tokens": [30, 31, 32, 90]},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(64))},
    "temperature": {"temperature": 0.6},
    "top_h": {"top_h": 0.5},
    "top_k": {"top_k": 7},
    "top_p": {"top_p": 0.7},
    "min_p": {"min_p": 0.1},
    "typical_p": {"typical_p": 0.6},
    "epsilon_cutoff": {"epsilon_cutoff": 0.01},
    "eta_cutoff": {"eta_cutoff": 0.02},
    "watermark": {"watermarking_config": WatermarkingConfig(bias=4.0)},
    "watermark_selfhash": {
        "watermarking_config": WatermarkingConfig(bias=4.0, seeding_scheme="selfhash", context_width=3)
    },
    "renormalize": {"renormalize_logits": True},
}

#: Given by the user; nothing in a config makes these for a decoder.
BY_OBJECT: dict[str, Any] = {
    "repetition_ignoring_5": lambda: upstream.RepetitionPenaltyLogitsProcessor(1.8, prompt_ignore_length=5),
    "bark": lambda: upstream.BarkEosPrioritizerLogitsProcessor(EOS, min_eos_p=0.2),
    "alternating_codebooks": lambda: upstream.AlternatingCodebooksLogitsProcessor(3, 40, 30),
    "whisper_timestamps": lambda: upstream.WhisperTimeStampLogitsProcessor(
        type("Config", (), {"no_timestamps_token_id": 80, "eos_token_id": 1, "bos_token_id": 0})(),
        begin_index=9,
    ),
}

#: Cannot be run row by row; calls with one of these fall back.
DECLARED_UNSUPPORTED = {
    "PrefixConstrainedLogitsProcessor",  # calls the user's function
    "UnbatchedClassifierFreeGuidanceLogitsProcessor",  # runs the model
    "SynthIDTextWatermarkLogitsProcessor",  # a state for the whole batch
    "ClassifierFreeGuidanceLogitsProcessor",  # scores have twice the rows
    "WhisperNoSpeechDetection",  # runs the model
    "DiaClassifierFreeGuidanceLogitsProcessor",  # scores have twice the rows
    "DiaEOSChannelFilterLogitsProcessor",  # rows are channels of a batch row
    "DiaEOSDelayPatternLogitsProcessor",  # the same, and a state
}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("gpt2", seed=3)


def possible(names: Sequence[str]) -> list[str]:
    """`names` that go together in the installed upstream: its decay once made nan of an EOS others had banned."""
    decay = upstream.ExponentialDecayLengthPenalty((0, 2.0), [0], 0)
    scores = decay(torch.zeros(1, 1, dtype=torch.int64), torch.full((1, 2), -torch.inf))
    return [name for name in names if name != "exponential_decay" or not scores.isnan().any()]


def options(*names: str) -> dict[str, Any]:
    kwargs: dict[str, Any] = {"max_new_tokens": 12, "eos_token_id": EOS, "pad_token_id": 2, "top_k": 0}
    objects = LogitsProcessorList()
    for name in names:
        if name in BY_CONFIG:
            kwargs |= BY_CONFIG[name]
        else:
            objects.append(BY_OBJECT[name]())
    return kwargs | ({"logits_processor": objects} if objects else {})


def prompts(seed: int, num_rows: int) -> dict[str, torch.Tensor]:
    source = random.Random(seed)
    return left_pad(random_prompts([source.randint(1, 9) for _ in range(num_rows)], seed=seed))


@pytest.mark.parametrize("do_sample", [False, True])
@pytest.mark.parametrize("name", [*BY_CONFIG, *BY_OBJECT])
def test_each_processor_is_upstreams(model: Any, name: str, do_sample: bool) -> None:
    seen = set()
    for seed, num_rows in enumerate((1, 4, 7)):
        recording = record(model, prompts(seed, num_rows), seed, do_sample=do_sample, **options(name))
        seen |= {type(p) for p in recording.processors}
        torch.set_rng_state(recording.rng_before)
        replay = Replay.of(recording)
        run([replay], seed)
        replay.check()
        if do_sample:
            replay.call.sampling.draws.finish(recording.num_steps)
        assert torch.equal(torch.get_rng_state(), recording.rng_after)
    warper = name in {
        "temperature",
        "top_h",
        "top_k",
        "top_p",
        "min_p",
        "typical_p",
        "epsilon_cutoff",
        "eta_cutoff",
    }
    assert bool(seen) == (not warper or do_sample), "the option made no processor"


@pytest.mark.parametrize("seed", range(16))
def test_random_combinations_are_upstreams(model: Any, seed: int) -> None:
    source = random.Random(seed)
    names = possible(source.sample([*BY_CONFIG, *BY_OBJECT], source.randint(2, 6)))
    recording = record(
        model, prompts(seed, source.randint(1, 8)), seed, do_sample=seed % 4 > 0, **options(*names)
    )
    torch.set_rng_state(recording.rng_before)
    replay = Replay.of(recording)
    run([replay], seed)
    replay.check()


@pytest.mark.parametrize(
    "names",
    [
        ("repetition_penalty",),
        ("no_repeat_ngram_2", "min_new_tokens"),
        ("no_repeat_ngram_4", "bad_words"),
        ("sequence_bias", "forced_eos", "begin_suppress_tokens"),
        ("encoder_repetition_penalty", "encoder_no_repeat_ngram_2"),
        ("exponential_decay", "min_length", "watermark"),
        ("repetition_ignoring_5", "top_k", "top_p", "temperature", "renormalize"),
        ("whisper_timestamps", "typical_p", "eta_cutoff", "top_h"),
    ],
    ids="+".join,
)
def test_rows_of_many_calls_go_together(model: Any, names: tuple[str, ...]) -> None:
    """Requests of equal options and unequal lengths, as `generate_many` makes them."""
    replays = []
    for seed in range(9):
        rows = 1 if seed < 7 else 3
        recording = record(model, prompts(seed, rows), seed, do_sample=True, **options(*possible(names)))
        generator = torch.Generator()
        generator.set_state(recording.rng_before)
        replays.append(Replay.of(recording, LockstepDraws(rows, generator)))
    assert len({replay.call.sampling.signature for replay in replays}) == (
        9 if "whisper_timestamps" in names else 1
    )
    run(replays, lag=0.3)
    for replay in replays:
        replay.check()


@pytest.mark.parametrize(
    "name", ["encoder_repetition_penalty", "encoder_no_repeat_ngram_2", "repetition_penalty"]
)
def test_several_sequences_a_prompt(model: Any, name: str) -> None:
    """Upstream makes the encoder processors before it repeats rows, so they hold fewer rows than the batch has."""
    recording = record(model, prompts(5, 3), do_sample=True, num_return_sequences=2, **options(name))
    torch.set_rng_state(recording.rng_before)
    replay = Replay.of(recording)
    run([replay])
    replay.check()


def test_every_processor_of_upstream_is_known() -> None:
    subclasses = {upstream.LogitsProcessor}
    while True:
        grown = subclasses | {sub for cls in subclasses for sub in cls.__subclasses__()}
        if grown == subclasses:
            break
        subclasses = grown
    names = {
        cls.__name__ for cls in subclasses - {upstream.LogitsProcessor} if cls.__module__ == upstream.__name__
    }
    handled = {cls.__name__ for cls in rules._RULES}
    assert not handled & DECLARED_UNSUPPORTED
    assert names == handled | DECLARED_UNSUPPORTED


def test_a_subclass_is_user_made() -> None:
    class Mine(upstream.TemperatureLogitsWarper):
        pass

    assert unsupported([Mine(0.5)], []) == "logits processor Mine"
    assert unsupported([upstream.TemperatureLogitsWarper(0.5)], []) is None
    assert unsupported([lambda ids, scores: scores], []) == "logits processor function"


def lines_of(processor: Any, histories: list[list[int]]) -> list[Line]:
    return [
        Line([processor], row, len(histories), len(ids), lambda ids=ids: np.array(ids))
        for row, ids in enumerate(histories)
    ]


def test_tokens_beyond_the_vocabulary_are_upstreams() -> None:
    """An embedding may be larger than the head."""
    histories = [[9, 3, 9], [2, 30, 2, 30, 2], [30], [4, 5, 4, 5, 4, 5]]
    scores = torch.randn(4, 10)
    for processor in (
        upstream.RepetitionPenaltyLogitsProcessor(1.5),
        upstream.NoRepeatNGramLogitsProcessor(2),
        upstream.NoRepeatNGramLogitsProcessor(3),
    ):
        try:
            alone = [
                processor(torch.tensor([ids]), scores[row : row + 1]) for row, ids in enumerate(histories)
            ]
        except (IndexError, RuntimeError):
            pytest.skip("this version of transformers refuses such tokens itself")
        assert torch.equal(rules.run(lines_of(processor, histories), scores), torch.cat(alone))


def test_repetition_penalty_for_another_batch_raises_upstreams_error() -> None:
    try:
        processor = upstream.RepetitionPenaltyLogitsProcessor(1.5, torch.tensor([1, 2, 0]))
    except ValueError:
        pytest.skip("this version of transformers knows no length a row")
    scores, ids = torch.randn(2, 10), [[1, 2], [3, 4]]
    with pytest.raises(ValueError) as theirs:
        processor(torch.tensor(ids), scores)
    with pytest.raises(ValueError) as ours:
        rules.run(lines_of(processor, ids), scores)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sorting", [upstream.TopPLogitsWarper(0.6), upstream.TypicalLogitsWarper(0.6)])
def test_sorting_what_a_top_k_left_keeps_what_upstream_keeps(sorting: Any, dtype: torch.dtype) -> None:
    """Ties, of which bfloat16 makes many, are where an order of one's own would show."""
    scores = (2 * torch.randn(64, 5003, generator=torch.Generator().manual_seed(0))).to(dtype).float()
    scores[3] = 1.0  # nothing but ties: the top-k removes none
    chain = [upstream.TopKLogitsWarper(50), sorting]
    expected = sorting(None, chain[0](None, scores))
    for rows in (slice(0, 3), slice(2, 5), slice(4, 64)):
        lines = [Line(chain, i, 64, 1, lambda: np.zeros(1, dtype=np.int64)) for i in range(64)[rows]]
        assert torch.equal(rules.run(lines, scores[rows]), expected[rows])


def test_sorting_where_nothing_is_left_or_numbers_are_none() -> None:
    scores = torch.full((2, 100), -torch.inf)
    lines = [
        Line([upstream.TopPLogitsWarper(0.5)], i, 2, 1, lambda: np.zeros(1, dtype=np.int64)) for i in range(2)
    ]
    assert torch.equal(rules.run(lines, scores), scores)
    scores[1, 7] = torch.nan
    assert rules.run(lines, scores)[1].isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_ngrams_of_unequal_histories_are_each_rows_own(size: int) -> None:
    """Few tokens, so that anything filled in would be taken for part of a history."""
    source = random.Random(size)
    histories = [[source.randrange(8) for _ in range(length)] for length in (1, 2, 3, 5, 9, 14, 14, 30)] * 8
    histories += [[source.randrange(8) for _ in range(length)] for length in range(1, 40)]
    processor, scores = upstream.NoRepeatNGramLogitsProcessor(size), torch.randn(len(histories), 8)
    alone = [processor(torch.tensor([ids]), scores[row : row + 1]) for row, ids in enumerate(histories)]
    assert torch.equal(rules.run(lines_of(processor, histories), scores), torch.cat(alone))
