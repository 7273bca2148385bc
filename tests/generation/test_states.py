"""`output_hidden_states` and `output_attentions`: shapes and numbers of upstream's, step by step."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList

import hf_paged
from hf_paged.generation.states import selects_layers
from tests.helpers import FAMILIES, assert_same_tokens, left_pad, make_model, native_calls, random_prompts

WANTED = {"return_dict_in_generate": True, "output_hidden_states": True, "output_attentions": True}
BATCH = left_pad(random_prompts([3, 9, 1], seed=3))
ONE = {"input_ids": torch.tensor(random_prompts([7], seed=4))}


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def pair(family: str) -> Iterator[tuple[Any, Any]]:
    yield from make_pair(family)


def make_pair(family: str, attention: str = "eager", **options: Any) -> Iterator[tuple[Any, Any]]:
    """The same tiny model twice: as it is, and enabled."""
    plain, model = make_model(family), make_model(family)
    for one in (plain, model):
        one.set_attn_implementation(attention)
    settings = {"block_size": 4, "kv_cache_memory": "1MiB", "fallback": "error"} | options
    hf_paged.enable(model, **settings)
    yield plain, model
    hf_paged.disable(model)


def check(pair: tuple[Any, Any], pads: torch.Tensor | None = None, **kwargs: Any) -> tuple[Any, Any]:
    """Runs both and compares; `pads` [rows, width] bool tells columns that hold no token."""
    plain, model = pair
    torch.manual_seed(7)
    expected = plain.generate(**(WANTED | copy.deepcopy(kwargs)))
    torch.manual_seed(7)
    with native_calls(model):
        actual = model.generate(**(WANTED | kwargs))
    assert type(actual) is type(expected)
    assert actual.keys() == expected.keys()
    assert_same_tokens(actual.sequences, expected.sequences)
    for name in ("hidden_states", "attentions"):
        assert_same_states(actual[name], expected[name], pads, is_attention=name == "attentions")
    return actual, expected


def assert_same_states(actual: Any, expected: Any, pads: torch.Tensor | None, *, is_attention: bool) -> None:
    assert type(actual) is tuple
    assert len(actual) == len(expected)
    for step, (ours, theirs) in enumerate(zip(actual, expected, strict=True)):
        assert type(ours) is tuple
        assert len(ours) == len(theirs)
        for got, want in zip(ours, theirs, strict=True):
            if want is None:
                assert got is None
                continue
            assert got.shape == want.shape
            assert got.dtype == want.dtype
            assert got.is_contiguous()
            if step == 0 and pads is not None:
                # What upstream computes at pads depends on the attention implementation; nobody reads it.
                columns = pads[:, -want.shape[2 if is_attention else 1] :]
                got, want = (x.transpose(1, 2) if is_attention else x for x in (got, want))
                assert not got[columns].any()
                got, want = got[~columns], want[~columns]
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


def pads_of(batch: dict[str, torch.Tensor], copies: int = 1) -> torch.Tensor:
    return batch["attention_mask"].repeat_interleave(copies, 0) == 0


@pytest.mark.parametrize(
    ("options", "copies"),
    [
        ({"do_sample": False}, 1),
        ({"do_sample": True, "top_k": 20}, 1),
        ({"do_sample": True, "num_return_sequences": 2}, 2),
        ({"num_beams": 3, "do_sample": False}, 3),
        ({"num_beams": 2, "do_sample": True, "num_return_sequences": 2}, 2),
        ({"do_sample": False, "output_scores": True, "repetition_penalty": 1.3}, 1),
    ],
)
def test_states_of_padded_rows_are_upstreams(
    pair: tuple[Any, Any], options: dict[str, Any], copies: int
) -> None:
    eos = [*range(3, 12)]
    check(pair, pads_of(BATCH, copies), **BATCH, max_new_tokens=9, eos_token_id=eos, **options)


def test_one_row(pair: tuple[Any, Any]) -> None:
    actual, _ = check(pair, **ONE, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert [step[0].shape[1] for step in actual.hidden_states] == [7, 1, 1, 1, 1]


def test_nothing_is_taken_from_the_prefix_cache(pair: tuple[Any, Any]) -> None:
    """What is cached has no hidden states, and what was recorded once must be recorded again."""
    _, model = pair
    model.generate(**ONE, max_new_tokens=5, do_sample=False)
    for _ in range(2):
        check(pair, **ONE, max_new_tokens=5, do_sample=False)


@pytest.mark.parametrize("chunk", [2, 5, 9, 50])
def test_of_a_prompt_in_chunks_upstream_returns_the_last(pair: tuple[Any, Any], chunk: int) -> None:
    check(pair, pads_of(BATCH), **BATCH, max_new_tokens=3, do_sample=False, prefill_chunk_size=chunk)


def test_a_continued_conversation_gives_states_of_new_tokens(pair: tuple[Any, Any]) -> None:
    plain, model = pair
    cache = plain.generate(**ONE, max_new_tokens=4, do_sample=False, return_dict_in_generate=True)
    longer = torch.cat([cache.sequences, torch.tensor([[5, 6, 7]])], dim=1)
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    expected = plain.generate(
        longer, past_key_values=copy.deepcopy(cache.past_key_values), **kwargs, **WANTED
    )
    with native_calls(model):
        actual = model.generate(longer, past_key_values=cache.past_key_values, **kwargs, **WANTED)
    assert isinstance(actual.past_key_values, DynamicCache)
    assert actual.hidden_states[0][0].shape[1] == 4
    for name in ("hidden_states", "attentions"):
        assert_same_states(actual[name], expected[name], None, is_attention=name == "attentions")


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["rows", "beams"])
def test_preemption_and_chunks_of_the_engine_do_not_show(family: str, options: dict[str, Any]) -> None:
    small = {"kv_cache_memory": _blocks(family, 25), "max_num_batched_tokens": 9, "max_num_seqs": 15}
    copies = options.get("num_beams", 1)
    batch = BATCH if options else left_pad(random_prompts([13, 6, 9], seed=5))
    options |= {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    for pair in make_pair(family, **small):
        model = pair[1]
        # They go first, and take more blocks as they grow.
        others = [
            hf_paged.engine(model).submit([7, 8, 9, 5 + i], max_new_tokens=30, eos_token_id=None, priority=-1)
            for i in range(4)
        ]
        check(pair, pads_of(batch, copies), **batch, **options)
        for other in others:
            other.result(60)
        assert hf_paged.stats(model).preemptions, "nothing was preempted: this would prove nothing"


def _blocks(family: str, count: int) -> int:
    """Bytes of so many blocks of 4 tokens: two layers of keys and values in float32."""
    config = make_model(family).config
    heads = {"gpt2": 4, "gpt_bigcode": 1, "llama": 2}[family]
    return count * 2 * 2 * 4 * heads * (config.hidden_size // config.num_attention_heads) * 4


def test_without_weights_the_attentions_are_empty_as_upstreams(family: str) -> None:
    for pair in make_pair(family, "sdpa"):
        actual, _ = check(pair, pads_of(BATCH), **BATCH, max_new_tokens=3, do_sample=False)
        assert actual.attentions == ((), (), ())


def test_user_code_sees_the_same_call(pair: tuple[Any, Any]) -> None:
    class Own(LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores.roll(1, -1)

    check(
        pair,
        pads_of(BATCH),
        **BATCH,
        max_new_tokens=4,
        do_sample=False,
        logits_processor=LogitsProcessorList([Own()]),
    )


def test_an_assisted_call_gives_a_token_a_step(pair: tuple[Any, Any]) -> None:
    check(pair, **ONE, max_new_tokens=6, do_sample=False, prompt_lookup_num_tokens=3)


def test_flags_without_a_dict_change_nothing(pair: tuple[Any, Any]) -> None:
    plain, model = pair
    options = {
        "max_new_tokens": 4,
        "do_sample": False,
        "output_hidden_states": True,
        "output_attentions": True,
    }
    expected = plain.generate(**BATCH, **options)
    with native_calls(model):
        assert_same_tokens(model.generate(**BATCH, **options), expected)


def test_layers_can_be_chosen_by_number(pair: tuple[Any, Any]) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, "output_hidden_states": [0, -1]}
    if selects_layers():
        check(pair, pads_of(BATCH), **BATCH, **options)
    else:
        explanation = hf_paged.explain(pair[1], **BATCH, **options, return_dict_in_generate=True)
        assert [reason.code for reason in explanation.reasons] == ["unknown_option"]


def test_half_precision_keeps_its_dtype(family: str) -> None:
    for pair in make_pair(family):
        plain, model = (one.to(torch.bfloat16) for one in pair)
        kwargs = {**BATCH, "max_new_tokens": 1, "do_sample": False, **WANTED}
        expected, actual = plain.generate(**kwargs), model.generate(**kwargs)
        for name in ("hidden_states", "attentions"):
            assert [x.dtype for x in actual[name][0]] == [x.dtype for x in expected[name][0]]


def test_the_weights_are_guarded_all_the_same(pair: tuple[Any, Any]) -> None:
    """No cached prefix serves such a call, but a change of weights under it is still noticed."""
    _, model = pair
    with torch.no_grad():
        before = model.generate(**ONE, max_new_tokens=3, do_sample=False, **WANTED)
        next(p for p in model.parameters() if p.ndim > 1).mul_(-1.5)
        after = model.generate(**ONE, max_new_tokens=3, do_sample=False, **WANTED)
    assert not torch.equal(before.hidden_states[0][0], after.hidden_states[0][0])
