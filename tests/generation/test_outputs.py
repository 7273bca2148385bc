"""What a native call returns: padding, stops, `return_dict_in_generate`, and a cache to go on from."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.generation import GenerateDecoderOnlyOutput

import hf_paged
from hf_paged.generation.returned_cache import fill_pending
from tests.helpers import (
    FAMILIES,
    assert_same_tokens,
    demo_model,
    demo_tokenizer,
    left_pad,
    make_model,
    native_calls,
    random_prompts,
)

BATCH = left_pad(random_prompts([3, 9, 1]))
TEXTS = ["def __init__(self", "The", "class Foo:\n    def bar(self):\n"]


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    """The same tiny model twice: as it is, and enabled."""
    plain, model = make_model(request.param), make_model(request.param)
    hf_paged.enable(model, block_size=4, backend="reference", fallback="error", kv_cache_memory="1MiB")
    yield plain, model
    hf_paged.disable(model)


@pytest.fixture(scope="module")
def demo() -> Iterator[tuple[Any, Any, Any]]:
    """A trained model twice, and its tokenizer."""
    plain, model = demo_model("llama"), demo_model("llama")
    hf_paged.enable(model, backend="reference", fallback="error", kv_cache_memory="16MiB")
    yield plain, model, demo_tokenizer("llama")
    hf_paged.disable(model)


def both(pair: tuple[Any, Any], **kwargs: Any) -> tuple[Any, Any]:
    """Upstream's result and ours for the same seed, ours native."""
    plain, model = pair
    torch.manual_seed(7)
    expected = plain.generate(**kwargs)
    state = torch.get_rng_state()
    torch.manual_seed(7)
    with native_calls(model):
        actual = model.generate(**kwargs)
    assert torch.equal(torch.get_rng_state(), state)
    return expected, actual


def some_eos(plain: Any, **kwargs: Any) -> list[int]:
    """Tokens that end rows at different steps: one the first greedy row has early, and a seventh of the
    vocabulary.
    """
    tokens = plain.generate(**kwargs)[:, -8:]
    return [int(tokens[0, 2]), *range(3, 21)]


@pytest.mark.parametrize(
    "options", [{}, {"do_sample": True, "top_k": 5}, {"do_sample": True, "num_return_sequences": 2}]
)
def test_finished_rows_are_padded_to_the_longest(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    eos = some_eos(pair[0], **BATCH, max_new_tokens=8)
    expected, actual = both(pair, **BATCH, max_new_tokens=8, eos_token_id=eos, pad_token_id=77, **options)
    assert_same_tokens(actual, expected)
    assert (expected == 77).any(), "no row was padded: this would prove nothing"


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "num_return_sequences": 2}])
def test_scores_logits_and_cache_are_upstreams(pair: tuple[Any, Any], options: dict[str, Any]) -> None:
    eos = some_eos(pair[0], **BATCH, max_new_tokens=8)
    wanted = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    expected, actual = both(
        pair, **BATCH, max_new_tokens=8, eos_token_id=eos, repetition_penalty=1.3, **wanted, **options
    )
    assert type(actual) is type(expected) is GenerateDecoderOnlyOutput
    assert actual.keys() == expected.keys()
    assert_same_tokens(actual.sequences, expected.sequences)
    for name in ("scores", "logits"):
        for ours, theirs in zip(actual[name], expected[name], strict=True):
            assert ours.dtype == theirs.dtype
            torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert_same_cache(
        actual.past_key_values, expected.past_key_values, options.get("num_return_sequences", 1)
    )


def assert_same_cache(actual: DynamicCache, expected: DynamicCache, copies: int) -> None:
    """Equal shapes, and equal contents except under left pads, which nobody attends to."""
    assert isinstance(actual, DynamicCache)
    assert actual.get_seq_length() == expected.get_seq_length()
    assert type(actual) is DynamicCache
    mask = BATCH["attention_mask"].repeat_interleave(copies, 0).bool()
    mask = torch.nn.functional.pad(mask, (0, expected.get_seq_length() - mask.shape[1]), value=True)
    assert len(actual.layers) == len(expected.layers)
    for ours, theirs in zip(actual.layers, expected.layers, strict=True):
        for name in ("keys", "values"):
            got, want = getattr(ours, name), getattr(theirs, name)
            assert got.shape == want.shape
            torch.testing.assert_close(
                got.transpose(1, 2)[mask], want.transpose(1, 2)[mask], atol=1e-4, rtol=0
            )
            assert not got.transpose(1, 2)[~mask].any()


def test_only_what_was_asked_for_is_returned(pair: tuple[Any, Any]) -> None:
    expected, actual = both(pair, **BATCH, max_new_tokens=3, return_dict_in_generate=True)
    assert actual.keys() == expected.keys()
    assert actual.scores is None
    assert actual.logits is None


def test_generation_goes_on_from_the_returned_cache(pair: tuple[Any, Any]) -> None:
    plain, model = pair
    first = model.generate(**BATCH, max_new_tokens=5, return_dict_in_generate=True)
    mask = torch.cat([BATCH["attention_mask"], torch.ones(3, 5, dtype=torch.long)], dim=-1)
    again = plain.generate(
        first.sequences, attention_mask=mask, past_key_values=first.past_key_values, max_new_tokens=5
    )
    assert_same_tokens(again, plain.generate(**BATCH, max_new_tokens=10))


def test_blocks_stay_until_the_cache_is_looked_at_or_dropped(pair: tuple[Any, Any]) -> None:
    model = pair[1]
    kwargs = BATCH | {"max_new_tokens": 5, "return_dict_in_generate": True}
    output = model.generate(**kwargs)
    assert hf_paged.stats(model).kv_blocks_used > 0
    assert output.past_key_values.get_seq_length() == 13
    assert hf_paged.stats(model).kv_blocks_used == 0
    output = model.generate(**kwargs)
    assert hf_paged.stats(model).kv_blocks_used > 0
    del output
    gc.collect()
    assert hf_paged.stats(model).kv_blocks_used == 0


@pytest.mark.parametrize(
    "use",
    [
        copy.deepcopy,
        lambda cache: pickle.loads(pickle.dumps(cache)),
        lambda cache: [cache.layers and cache][0],
        lambda cache: len(cache) and cache,
    ],
    ids=["deepcopy", "pickle", "attribute", "len"],
)
def test_the_cache_is_an_ordinary_one_however_it_is_used(pair: tuple[Any, Any], use: Any) -> None:
    kwargs = BATCH | {"max_new_tokens": 5, "return_dict_in_generate": True}
    expected, actual = both(pair, **kwargs)
    assert_same_cache(use(actual.past_key_values), expected.past_key_values, 1)


def test_a_later_call_fills_caches_that_are_still_open(pair: tuple[Any, Any]) -> None:
    kwargs = BATCH | {"max_new_tokens": 5, "return_dict_in_generate": True}
    expected, actual = both(pair, **kwargs)
    pair[1].generate(**BATCH, max_new_tokens=2)
    assert type(actual.past_key_values) is DynamicCache
    assert hf_paged.stats(pair[1]).kv_blocks_used == 0
    assert_same_cache(actual.past_key_values, expected.past_key_values, 1)


@pytest.mark.parametrize("change", ["disable", "bfloat16", "double", "release_memory"])
def test_an_open_cache_survives_what_happens_to_the_model(pair: tuple[Any, Any], change: str) -> None:
    model = pair[1]
    expected, actual = both(pair, **BATCH, max_new_tokens=5, return_dict_in_generate=True)
    if change == "double":  # which is not native
        assert not hf_paged.explain(model.double(), **BATCH, max_new_tokens=2)
    elif change == "bfloat16":
        model.bfloat16().generate(**BATCH, max_new_tokens=2)
    else:
        getattr(hf_paged, change)(model)
    assert_same_cache(actual.past_key_values, expected.past_key_values, 1)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_an_open_cache_is_there_in_a_forked_child(pair: tuple[Any, Any]) -> None:
    expected, actual = both(pair, **BATCH, max_new_tokens=5, return_dict_in_generate=True)
    child = os.fork()
    if child == 0:
        try:
            assert_same_cache(actual.past_key_values, expected.past_key_values, 1)
            os._exit(0)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_what_a_user_puts_on_an_open_cache_stays(pair: tuple[Any, Any]) -> None:
    _, actual = both(pair, **BATCH, max_new_tokens=2, return_dict_in_generate=True)
    actual.past_key_values.turn = 3
    assert actual.past_key_values.get_seq_length()
    assert actual.past_key_values.turn == 3


@pytest.mark.parametrize("places", [1, 3])
def test_more_rows_than_places_though_all_of_them_are_returned(places: int) -> None:
    """Rows that are done keep their blocks, not their places."""
    plain, model = make_model("llama"), make_model("llama")
    inputs = left_pad(random_prompts([5, 2, 9, 1, 7, 3, 4]))
    kwargs = inputs | {"max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True}
    hf_paged.enable(model, block_size=4, max_num_seqs=places, fallback="error", kv_cache_memory="1MiB")
    expected, actual = both((plain, model), **kwargs)
    assert_same_tokens(actual.sequences, expected.sequences)
    torch.testing.assert_close(torch.stack(actual.scores), torch.stack(expected.scores), atol=1e-4, rtol=1e-4)


def test_an_open_cache_gives_way_to_a_request_that_runs() -> None:
    plain, model = make_model("llama"), make_model("llama")
    hf_paged.enable(model, block_size=4, fallback="error", kv_cache_memory=_bytes_of(model, 16 * 4))
    long, short = random_prompts([4, 20])
    options = {"do_sample": False, "eos_token_id": None}
    inputs = left_pad([short])
    running = hf_paged.engine(model).submit(
        long, max_new_tokens=56, logits_edit=lambda *_: time.sleep(0.005), **options
    )
    output = model.generate(**inputs, **options, max_new_tokens=8, return_dict_in_generate=True)
    assert not running.done
    expected = plain.generate(**left_pad([long]), max_new_tokens=56, **options)
    assert running.result(60).token_ids == expected[0, 4:].tolist()
    wanted = plain.generate(**inputs, **options, max_new_tokens=8, return_dict_in_generate=True)
    keys, wanted_keys = (o.past_key_values.layers[1].keys for o in (output, wanted))
    torch.testing.assert_close(keys, wanted_keys, atol=1e-4, rtol=0)


def _bytes_of(model: Any, num_tokens: int) -> int:
    config = model.config
    heads = config.num_key_value_heads * config.hidden_size // config.num_attention_heads
    return 2 * config.num_hidden_layers * heads * 4 * num_tokens


def test_an_open_cache_outlives_its_model() -> None:
    model = make_model("llama")
    hf_paged.enable(model, backend="reference", kv_cache_memory="1MiB")
    output = model.generate(**BATCH, max_new_tokens=5, return_dict_in_generate=True)
    del model
    gc.collect()
    assert output.past_key_values.get_seq_length() == 13


def test_caches_can_be_filled_before_the_pool_goes(pair: tuple[Any, Any]) -> None:
    model = pair[1]
    kwargs = BATCH | {"max_new_tokens": 5, "return_dict_in_generate": True}
    expected, actual = both(pair, **kwargs)
    fill_pending(hf_paged.engine.registry.get(model))
    hf_paged.disable(model)
    assert_same_cache(actual.past_key_values, expected.past_key_values, 1)


def test_rows_of_a_trained_model_end_by_themselves(demo: tuple[Any, Any, Any]) -> None:
    plain, model, tokenizer = demo
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    kwargs = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "max_new_tokens": 60,
    }
    assert_same_tokens(*reversed(both((plain, model), **kwargs)))
    assert_same_tokens(*reversed(both((plain, model), **kwargs, do_sample=True, temperature=1.5)))


@pytest.mark.parametrize("eos", [True, False])
def test_stop_strings_end_rows(demo: tuple[Any, Any, Any], eos: bool) -> None:
    """Without an EOS, upstream lets rows that hit a stop string go on until the last one has."""
    plain, model, tokenizer = demo
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    kwargs = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "max_new_tokens": 40,
        "stop_strings": ["\n", "self"],
        "tokenizer": tokenizer,
    }
    models = (plain, model)
    if not eos:
        models = tuple(_without_eos(m) for m in models)
    expected, actual = both(models, **kwargs)
    assert_same_tokens(actual, expected)
    assert expected.shape[1] < batch["input_ids"].shape[1] + 40, "no stop string came up: this proves nothing"


def _without_eos(model: Any) -> Any:
    config = copy.deepcopy(model.generation_config)
    config.eos_token_id = None
    model = copy.deepcopy(model)
    model.generation_config = config
    if not hf_paged.is_enabled(model):
        hf_paged.enable(model, backend="reference", fallback="error", kv_cache_memory="16MiB")
    return model


def test_one_token_from_nothing_but_bos(pair: tuple[Any, Any]) -> None:
    expected, actual = both(pair, max_new_tokens=1)
    assert_same_tokens(actual, expected)


def test_time_that_is_up_ends_all_rows(pair: tuple[Any, Any]) -> None:
    expected, actual = both(pair, **BATCH, max_new_tokens=8, max_time=0.0)
    assert_same_tokens(actual, expected)


def test_results_under_inference_mode_are_its_tensors(pair: tuple[Any, Any]) -> None:
    with torch.inference_mode():
        expected, actual = both(pair, **BATCH, max_new_tokens=3, return_dict_in_generate=True)
    assert actual.sequences.is_inference() == expected.sequences.is_inference()
    assert_same_tokens(actual.sequences, expected.sequences)
    assert actual.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()
