"""Code that users made sees exactly what upstream shows it, call for call, and decides as it does there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    StoppingCriteriaList,
    SynthIDTextWatermarkingConfig,
    TemperatureLogitsWarper,
)

import hf_paged
from tests.helpers import (
    FAMILIES,
    PAD,
    assert_same_tokens,
    left_pad,
    make_model,
    native_calls,
    random_prompts,
)
from tests.parity.test_generate_parity import BLOCK, pool_bytes
from tests.user_code import (
    InPlace,
    KeepingStreamer,
    Prefix,
    Recorder,
    RowCounter,
    StopAll,
    StopOnSum,
    assert_same_calls,
)

LENGTHS = (3, 14, 9, 1)
NEW = 14
#: So many that rows of random models end at different steps.
SOME_EOS = list(range(40, 56))

Made = tuple[dict[str, Any], list[Recorder]]


def a_processor() -> Made:
    made = RowCounter()
    return {"logits_processor": LogitsProcessorList([made])}, [made]


def processors_among_built_in_ones() -> Made:
    first, last = RowCounter(), InPlace()
    given = LogitsProcessorList([first, TemperatureLogitsWarper(0.7), last])
    return {"logits_processor": given, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}, [first, last]


def a_criterion_by_row() -> Made:
    made = StopOnSum()
    return {"stopping_criteria": StoppingCriteriaList([made])}, [made]


def a_criterion_by_row_without_eos() -> Made:
    made = StopOnSum()
    return {"stopping_criteria": StoppingCriteriaList([made]), "eos_token_id": None}, [made]


def a_criterion_for_all() -> Made:
    made = StopAll(6)
    return {"stopping_criteria": StoppingCriteriaList([made])}, [made]


def a_prefix_function() -> Made:
    made = Prefix()
    return {"prefix_allowed_tokens_fn": made}, [made]


def all_of_it() -> Made:
    processor, criterion, prefix, streamer = InPlace(), StopOnSum(), Prefix(), KeepingStreamer()
    kwargs = {
        "logits_processor": LogitsProcessorList([processor]),
        "stopping_criteria": StoppingCriteriaList([criterion]),
        "prefix_allowed_tokens_fn": prefix,
        "streamer": streamer,
        "return_dict_in_generate": True,
        "output_scores": True,
        "output_logits": True,
    }
    return kwargs, [processor, criterion, prefix, streamer]


def several_of_a_prompt() -> Made:
    made, prefix = RowCounter(), Prefix()
    # Upstream refuses copies of a greedy row.
    return {
        "do_sample": True,
        "logits_processor": LogitsProcessorList([made]),
        "prefix_allowed_tokens_fn": prefix,
        "num_return_sequences": 3,
    }, [made, prefix]


def a_streamer() -> Made:
    made = KeepingStreamer()
    return {"streamer": made}, [made]


def a_streamer_without_eos() -> Made:
    made, criterion = KeepingStreamer(), {"max_time": 1000.0}
    return {"streamer": made, "eos_token_id": None, **criterion}, [made]


def a_streamer_and_outputs() -> Made:
    made = KeepingStreamer()
    return {"streamer": made, "return_dict_in_generate": True, "output_scores": True}, [made]


def a_stateful_built_in() -> Made:
    watermark = SynthIDTextWatermarkingConfig(keys=[3, 1, 4, 1, 5], ngram_len=3)
    return {"watermarking_config": watermark}, []


KINDS = (
    a_processor,
    processors_among_built_in_ones,
    a_criterion_by_row,
    a_criterion_by_row_without_eos,
    a_criterion_for_all,
    a_prefix_function,
    all_of_it,
    several_of_a_prompt,
    a_streamer,
    a_streamer_without_eos,
    a_streamer_and_outputs,
    a_stateful_built_in,
)


@functools.lru_cache(maxsize=8)
def plain_model(family: str) -> Any:
    return make_model(family)


def check(family: str, kind: Callable[[], Made], sample: bool, pool: int | None, seed: int) -> int:
    """Compares one call. Returns how often rows were preempted."""
    batch = left_pad(random_prompts(LENGTHS, seed=seed), PAD)
    common = {**batch, "max_new_tokens": NEW, "do_sample": sample, "eos_token_id": SOME_EOS}
    theirs, expected_calls = kind()
    torch.manual_seed(seed)
    expected = plain_model(family).generate(**(common | theirs))
    state = torch.get_rng_state()
    model = make_model(family)
    options = {} if pool is None else {"kv_cache_memory": pool_bytes(model, pool)}
    ours, actual_calls = kind()
    with hf_paged.enabled(model, block_size=BLOCK, fallback="error", **options), native_calls(model):
        torch.manual_seed(seed)
        actual = model.generate(**(common | ours))
        for mine, other in zip(actual_calls, expected_calls, strict=True):
            assert_same_calls(mine, other)
        assert torch.equal(torch.get_rng_state(), state), "the global generator stands elsewhere"
        if isinstance(expected, torch.Tensor):
            assert_same_tokens(actual, expected)
        else:
            assert_same_tokens(actual.sequences, expected.sequences)
            for name in ("scores", "logits"):
                values, wanted = getattr(actual, name), getattr(expected, name)
                assert (values is None) == (wanted is None)
                torch.testing.assert_close(values, wanted, atol=1e-4, rtol=1e-4)
            assert actual.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
        return hf_paged.stats(model).preemptions


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_user_code_sees_what_upstream_shows_it(family: str, kind: Callable[[], Made]) -> None:
    for sample in (False, True):
        check(family, kind, sample, None, seed=5)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_user_code_sees_the_same_in_a_pool_that_preempts(kind: Callable[[], Made]) -> None:
    outputs = kind in (
        all_of_it,
        a_streamer_and_outputs,
    )  # all rows stay, so that their cache can be returned
    num_blocks = 30 if outputs else -(-(max(LENGTHS) + NEW) // BLOCK) + 1
    for sample in (False, True):
        preempted = check("llama", kind, sample, num_blocks, seed=6)
        # Rows that only wait for a streamer may end before they are in each other's way.
        assert preempted or outputs or kind is a_streamer, "nothing was preempted: the pool is too large"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pool", [None, 10])
def test_a_grid_of_seeds(family: str, kind: Callable[[], Made], pool: int | None) -> None:
    if pool is not None and kind in (all_of_it, a_streamer_and_outputs):
        pool = 30
    for seed in range(20, 28):
        for sample in (False, True):
            check(family, kind, sample, pool, seed)
