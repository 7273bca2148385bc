"""`past_key_values` given to `generate()`: a chat goes on without recomputing, and the user's cache is filled on."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

import hf_paged
from hf_paged.engine import registry
from tests.helpers import FAMILIES, assert_same_tokens, left_pad, make_model, native_calls, random_prompts

BATCH = left_pad(random_prompts([3, 9, 1]))
GREEDY = {"max_new_tokens": 6, "do_sample": False}


@pytest.fixture(params=FAMILIES)
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Any]]:
    plain, model = make_model(request.param), make_model(request.param)
    hf_paged.enable(model, block_size=4, fallback="error", kv_cache_memory="1MiB")
    yield plain, model
    hf_paged.disable(model)


def longer(sequences: torch.Tensor, mask: torch.Tensor, seed: int) -> dict[str, torch.Tensor]:
    """The next turn of every row: what there is and five tokens of its user's."""
    new = torch.tensor(random_prompts([5] * len(sequences), seed=seed))
    width = sequences.shape[1] + 5 - mask.shape[1]
    return {
        "input_ids": torch.cat([sequences, new], dim=-1),
        "attention_mask": torch.cat([mask, mask.new_ones(len(mask), width)], dim=-1),
    }


def assert_same_cache(ours: DynamicCache, theirs: DynamicCache, mask: torch.Tensor) -> None:
    """Equal except under left pads, which nobody attends to."""
    assert type(ours) is DynamicCache
    assert ours.get_seq_length() == theirs.get_seq_length()
    seen = mask.new_ones(len(mask), theirs.get_seq_length()).bool()
    seen[:, : mask.shape[1]] = mask.bool()
    for mine, other in zip(ours.layers, theirs.layers, strict=True):
        for name in ("keys", "values"):
            got, want = (getattr(x, name).transpose(1, 2)[seen] for x in (mine, other))
            torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


@pytest.mark.parametrize("returned", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_chat_goes_on_turn_by_turn_in_one_cache(
    pair: tuple[Any, Any], returned: bool, sampled: bool
) -> None:
    results = []
    for model in pair:
        torch.manual_seed(3)
        cache, batch = DynamicCache(config=model.config), dict(BATCH)
        for turn in range(3):
            options = {"do_sample": sampled, "max_new_tokens": 6, "return_dict_in_generate": returned}
            output = model.generate(**batch, past_key_values=cache, eos_token_id=None, **options)
            sequences = output.sequences if returned else output
            if returned:
                assert output.past_key_values is cache
            batch = longer(sequences, batch["attention_mask"], seed=turn)
        results.append((sequences, cache))
    (expected, theirs), (actual, ours) = results
    assert_same_tokens(actual, expected)
    assert_same_cache(ours, theirs, BATCH["attention_mask"])
    stats = hf_paged.stats(pair[1])
    assert stats.native_calls == 3
    assert stats.kv_blocks_used == 0


def test_nothing_the_cache_holds_is_computed_again(
    pair: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = pair[1]
    hf_paged.disable(model)
    hf_paged.enable(
        model, block_size=4, kv_cache_memory="1MiB", prefix_caching=False, max_num_batched_tokens=8
    )
    first = model.generate(**BATCH, **GREEDY, eos_token_id=None, return_dict_in_generate=True)
    batch = longer(first.sequences, BATCH["attention_mask"], seed=0)
    seen: list[int] = []
    runner = registry.get(model)._loop.runtime.runner
    forward = runner.forward
    monkeypatch.setattr(
        runner, "forward", lambda m, x, a: (seen.append(x.input_ids.numel()), forward(m, x, a))[1]
    )
    with native_calls(model):
        model.generate(**batch, **GREEDY, eos_token_id=None, past_key_values=first.past_key_values)
    # Of each row its last token of before, its user's five, and what is new but for the last.
    assert sum(seen) == 3 * (1 + 5 + 6 - 1)


@pytest.mark.parametrize("where", ["native", "forward"])
def test_the_keys_and_values_given_are_those_used(pair: tuple[Any, Any], where: str) -> None:
    plain, model = pair
    if where == "native":
        cache = model.generate(**BATCH, max_new_tokens=1, return_dict_in_generate=True).past_key_values
        assert cache.get_seq_length() == 9
    else:
        positions = (BATCH["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        with torch.no_grad():
            cache = model(**BATCH, position_ids=positions, use_cache=True).past_key_values
    for layer in cache.layers:
        layer.values *= -1.5  # what no model computes: it must not be computed anew
    batch = longer(BATCH["input_ids"], BATCH["attention_mask"], seed=4)
    expected = plain.generate(**batch, **GREEDY, past_key_values=copy.deepcopy(cache))
    assert not torch.equal(expected, plain.generate(**batch, **GREEDY)), "the change changes nothing"
    with native_calls(model, 2):
        assert_same_tokens(model.generate(**batch, **GREEDY, past_key_values=copy.deepcopy(cache)), expected)
        assert_same_tokens(
            model.generate(**batch, **GREEDY), plain.generate(**batch, **GREEDY)
        )  # and nobody else may find them


def test_given_keys_and_values_survive_preemption() -> None:
    plain, model = make_model("llama"), make_model("llama")
    batch = left_pad(random_prompts([20, 20, 20]))
    cache = plain.generate(**batch, max_new_tokens=1, return_dict_in_generate=True).past_key_values
    for layer in cache.layers:
        layer.values *= -1.5
    batch = longer(batch["input_ids"], batch["attention_mask"], seed=5)
    options = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
    expected = plain.generate(**batch, **options, past_key_values=copy.deepcopy(cache))
    block = 2 * 2 * 4 * 2 * 16 * 4  # layers, K and V, tokens, heads, head size, bytes
    hf_paged.enable(model, block_size=4, fallback="error", kv_cache_memory=60 * block)
    others = [hf_paged.engine(model).submit(p, **options) for p in random_prompts([8, 8])]
    with native_calls(model):
        assert_same_tokens(model.generate(**batch, **options, past_key_values=cache), expected)
    assert cache.get_seq_length() == 64
    assert hf_paged.stats(model).preemptions
    for handle in others:
        handle.result(timeout=60)
    hf_paged.disable(model)


@pytest.mark.parametrize("kept", ["given", "returned"])
def test_rows_whose_keys_and_values_cannot_all_stay_go_to_upstream(kept: str) -> None:
    model = hf_paged.enable(
        make_model("llama"), block_size=4, kv_cache_memory=2 * 2 * 2 * 2048, fallback="silent"
    )
    batch, cache = left_pad(random_prompts([8, 8, 8])), DynamicCache()
    options = {"past_key_values": cache} if kept == "given" else {"return_dict_in_generate": True}
    explanation = hf_paged.explain(model, **batch, max_new_tokens=20, **options)
    assert [r.code for r in explanation.reasons] == ["kv_budget"]
    assert hf_paged.explain(model, **batch, max_new_tokens=20)
    hf_paged.disable(model)


@pytest.mark.parametrize("kind", ["static", "longer than the input", "other rows", "other dtype"])
def test_caches_that_cannot_be_served_go_to_upstream_untouched(kind: str) -> None:
    model = hf_paged.enable(make_model("llama"), fallback="silent")
    batch = left_pad(random_prompts([8, 8]))
    cache: Any = model.generate(**batch, max_new_tokens=1, return_dict_in_generate=True).past_key_values
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=64)
    elif kind == "other rows":
        cache.batch_repeat_interleave(2)
    elif kind == "other dtype":
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.bfloat16(), layer.values.bfloat16()
    if kind != "longer than the input":
        batch = longer(batch["input_ids"], batch["attention_mask"], seed=0)
    explanation = hf_paged.explain(model, **batch, **GREEDY, past_key_values=cache)
    assert [r.code for r in explanation.reasons] == ["past_key_values"]
    hf_paged.disable(model)
