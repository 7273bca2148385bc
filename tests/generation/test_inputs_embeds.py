"""`inputs_embeds`: prompts given as embeddings, with and without ids beside them."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, TextStreamer

import hf_paged
from tests.helpers import FAMILIES, assert_same_tokens, left_pad, make_model, native_calls, random_prompts

BATCH = left_pad(random_prompts([6, 11, 1], seed=8))
IDS, MASK = BATCH["input_ids"], BATCH["attention_mask"]
LIMIT = {"max_new_tokens": 8}


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    plain, model = make_model(request.param), make_model(request.param)
    hf_paged.enable(model, block_size=4, kv_cache_memory="1MiB", fallback="error")
    yield plain, model
    hf_paged.disable(model)


def embedded(model: Any, ids: torch.Tensor = IDS) -> torch.Tensor:
    """Not the embeddings of any ids: between those of these and of others."""
    table = model.get_input_embeddings()
    return (0.7 * table(ids) + 0.3 * table(ids.roll(1, -1))).detach()


def both(pair: tuple[Any, Any], **kwargs: Any) -> tuple[Any, Any]:
    plain, model = pair
    torch.manual_seed(5)
    expected = plain.generate(**copy.deepcopy(kwargs))
    state = torch.get_rng_state()
    torch.manual_seed(5)
    with native_calls(model):
        actual = model.generate(**kwargs)
    assert torch.equal(torch.get_rng_state(), state)
    return actual, expected


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_k": 9},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "do_sample": True, "num_return_sequences": 2},
        {"do_sample": False, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2, "min_new_tokens": 4},
        {"do_sample": False, "eos_token_id": [*range(3, 12)]},
    ],
)
@pytest.mark.parametrize("with_ids", [False, True], ids=["alone", "with ids"])
def test_tokens_are_upstreams(pair: tuple[Any, Any], with_ids: bool, options: dict[str, Any]) -> None:
    ids = {"input_ids": IDS} if with_ids else {}
    actual, expected = both(
        pair, inputs_embeds=embedded(pair[0]), attention_mask=MASK, **ids, **LIMIT, **options
    )
    assert_same_tokens(actual, expected)
    assert actual.shape[1] <= LIMIT["max_new_tokens"] + (IDS.shape[1] if with_ids else 0)


def test_without_a_mask_all_columns_count(pair: tuple[Any, Any]) -> None:
    assert_same_tokens(*both(pair, inputs_embeds=embedded(pair[0]), **LIMIT, do_sample=False))


def test_max_length_counts_the_embeddings(pair: tuple[Any, Any]) -> None:
    actual, expected = both(pair, inputs_embeds=embedded(pair[0]), max_length=15, do_sample=False)
    assert_same_tokens(actual, expected)
    assert actual.shape[1] == 4


def test_fewer_ids_than_embeddings(pair: tuple[Any, Any]) -> None:
    """The ids are what processors see and what comes back; the model sees the embeddings alone."""
    inputs = {"inputs_embeds": embedded(pair[0]), "input_ids": IDS[:, -2:], "attention_mask": MASK}
    assert_same_tokens(*both(pair, **inputs, **LIMIT, do_sample=False, repetition_penalty=1.4))


def test_no_prefix_is_shared_by_embeddings_or_with_ids(pair: tuple[Any, Any]) -> None:
    plain, model = pair
    ids = torch.tensor(random_prompts([20], seed=9))
    for inputs in (
        {"input_ids": ids},
        {"inputs_embeds": embedded(plain, ids)},
        {"inputs_embeds": embedded(plain, ids.roll(1, -1))},
        {"input_ids": torch.zeros_like(ids)},
        {"inputs_embeds": embedded(plain, ids)},
    ):
        hits = hf_paged.stats(model).prefix_hit_tokens
        assert_same_tokens(*both(pair, **inputs, **LIMIT, do_sample=False))
        assert hf_paged.stats(model).prefix_hit_tokens == hits


def test_everything_is_returned_as_upstream_does(pair: tuple[Any, Any]) -> None:
    wanted = {"return_dict_in_generate": True, "output_logits": True, "output_hidden_states": True}
    actual, expected = both(
        pair, inputs_embeds=embedded(pair[0]), attention_mask=MASK, **LIMIT, do_sample=False, **wanted
    )
    assert actual.keys() == expected.keys()
    assert_same_tokens(actual.sequences, expected.sequences)
    for ours, theirs in zip(actual.logits, expected.logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    for step, (ours, theirs) in enumerate(zip(actual.hidden_states, expected.hidden_states, strict=True)):
        for got, want in zip(ours, theirs, strict=True):
            assert got.shape == want.shape
            seen = MASK.bool() if step == 0 else torch.ones(want.shape[:2], dtype=torch.bool)
            torch.testing.assert_close(got[seen], want[seen], atol=1e-4, rtol=0)
    assert actual.past_key_values.get_seq_length() == expected.past_key_values.get_seq_length()


@pytest.mark.parametrize("filled", [False, True])
def test_a_cache_is_filled_on(pair: tuple[Any, Any], filled: bool) -> None:
    plain, model = pair
    embeds = embedded(plain)
    caches = [DynamicCache(), DynamicCache()]
    if filled:
        first = plain.generate(
            inputs_embeds=embeds[:, :-3], attention_mask=MASK[:, :-3], max_new_tokens=1, do_sample=False,
            return_dict_in_generate=True,
        )  # fmt: skip
        caches = [first.past_key_values, copy.deepcopy(first.past_key_values)]
    if filled:
        rows = MASK[:, :-3].any(1)
        embeds, mask = embeds[rows], MASK[rows]
        for cache in caches:
            cache.batch_select_indices(rows.nonzero()[:, 0])
    else:
        mask = MASK
    kwargs = {"inputs_embeds": embeds, "attention_mask": mask, "do_sample": False, **LIMIT}
    expected = plain.generate(past_key_values=caches[0], **kwargs)
    with native_calls(model):
        actual = model.generate(past_key_values=caches[1], **kwargs)
    assert_same_tokens(actual, expected)
    assert caches[0].get_seq_length() == caches[1].get_seq_length()


def test_a_preempted_row_is_computed_again_from_its_embeddings(pair: tuple[Any, Any]) -> None:
    plain, model = pair
    hf_paged.disable(model)
    hf_paged.enable(model, block_size=4, kv_cache_memory="16KiB", max_num_batched_tokens=16, fallback="error")
    plan = {
        "inputs_embeds": embedded(plain),
        "attention_mask": MASK,
        "do_sample": False,
        "eos_token_id": None,
    }
    others = [
        hf_paged.engine(model).submit([7, 8, 9, 5 + i], max_new_tokens=12, eos_token_id=None, priority=-1)
        for i in range(10)
    ]
    assert_same_tokens(*both((plain, model), **plan, max_new_tokens=5))
    for other in others:
        other.result(60)
    if plain.config.model_type != "gpt_bigcode":  # its one head of keys leaves room for all
        assert hf_paged.stats(model).preemptions


def test_beside_other_calls(pair: tuple[Any, Any]) -> None:
    plain, model = pair
    embeds = embedded(plain)
    wanted = plain.generate(inputs_embeds=embeds, attention_mask=MASK, **LIMIT, do_sample=False)
    wanted_ids = plain.generate(**BATCH, **LIMIT, do_sample=False)
    results: dict[int, Any] = {}

    def run(i: int) -> None:
        inputs = BATCH if i % 2 else {"inputs_embeds": embeds, "attention_mask": MASK}
        results[i] = model.generate(**inputs, **LIMIT, do_sample=False)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(6):
        assert_same_tokens(results[i], wanted_ids if i % 2 else wanted)


def test_embeddings_that_want_gradients(pair: tuple[Any, Any]) -> None:
    table = pair[0].get_input_embeddings()
    assert_same_tokens(
        *both(pair, inputs_embeds=table(IDS).detach().requires_grad_(), **LIMIT, do_sample=False)
    )


@pytest.mark.parametrize("width", [1, 2, 3])
def test_what_upstream_refuses_or_makes_of_odd_ones(pair: tuple[Any, Any], width: int) -> None:
    """Other dtypes, drafts and chunks go to the original, whatever it makes of them."""
    _, model = pair
    embeds = embedded(model)
    odd = {
        1: {"inputs_embeds": embeds.double()},
        2: {"inputs_embeds": embeds, "prefill_chunk_size": 2},
        3: {"inputs_embeds": embeds[:1], "prompt_lookup_num_tokens": 2},
    }[width]
    reasons = hf_paged.explain(model, **odd, **LIMIT).reasons
    assert "inputs_embeds" in {reason.code for reason in reasons}


def test_requests_are_token_ids(pair: tuple[Any, Any]) -> None:
    with pytest.raises(hf_paged.InvalidRequestError, match="inputs_embeds"):
        hf_paged.generate_many(pair[1], [[5, 6]], inputs_embeds=embedded(pair[0]), max_new_tokens=2)


def test_a_streamer_gets_the_same_pieces(pair: tuple[Any, Any]) -> None:
    class Recorder(TextStreamer):
        def __init__(self) -> None:
            self.pieces: list[list[Any]] = []

        def put(self, value: torch.Tensor) -> None:
            self.pieces.append(value.tolist())

        def end(self) -> None:
            self.pieces.append(["end"])

    pieces = []
    for model in pair:
        recorder = Recorder()
        model.generate(inputs_embeds=embedded(model)[:1], **LIMIT, do_sample=False, streamer=recorder)
        pieces.append(recorder.pieces)
    assert pieces[0] == pieces[1]
