"""`kv_cache_dtype="int8"`: near the model's own results, the same whatever else happens, in a part of the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hf_paged
from hf_paged.engine import registry
from hf_paged.errors import ConfigError
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
from tests.test_deterministic import (
    ON,
    Transcript,
    differing,
    in_chunks,
    in_one_batch,
    make_requests,
    preempted,
    run_alone,
    with_drafts,
    with_prefix_hits,
)

INT8: dict[str, Any] = {"kv_cache_dtype": "int8"}
TEXTS = ["def read(path):", "import os", "class Shape:", "The answer is", "for name in sorted(names):", "x ="]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_near_and_text_is_mostly_equal(family: str, backend: Any) -> None:
    model, tokenizer = demo_model(family), demo_tokenizer(family)
    inputs = tokenizer(TEXTS, return_tensors="pt", padding=True)
    options = {"max_new_tokens": 24, "do_sample": False, "output_logits": True}
    expected = model.generate(**inputs, **options, return_dict_in_generate=True)
    with hf_paged.enabled(model, backend=backend, **INT8), native_calls(model):
        actual = model.generate(**inputs, **options, return_dict_in_generate=True)
    first = actual.logits[0] - expected.logits[0]
    assert 0 < first.abs().max() < 0.05 * expected.logits[0].std()
    width = min(actual.sequences.shape[1], expected.sequences.shape[1])
    same = (actual.sequences[:, :width] == expected.sequences[:, :width])[:, inputs["input_ids"].shape[1] :]
    # A row counts up to its first other token: what follows is another text.
    assert same.cumprod(dim=1).float().mean() > 0.8


@pytest.mark.parametrize(
    "family, dtype", [*((f, torch.float32) for f in FAMILIES), ("llama", torch.bfloat16)], ids=str
)
def test_the_same_bits_in_any_batch_chunk_preemption_and_prefix_hit(family: str, dtype: torch.dtype) -> None:
    model = make_model(family, eos_token_id=None, dtype=dtype)
    requests = make_requests(20, 7)
    options = ON | INT8
    expected: list[Transcript] = run_alone(model, requests, **INT8)
    for condition in (in_one_batch, in_chunks, preempted, with_prefix_hits, with_drafts):
        assert differing(expected, condition(model, requests, **options)) == [], condition.__name__


def test_the_same_tokens_without_deterministic_mode() -> None:
    """Sums in another order alone: the quantised numbers are the same in each condition."""
    model = make_model("llama", eos_token_id=None)
    prompts = random_prompts([3, 60, 17, 40, 33, 5, 64, 21])
    with hf_paged.enabled(model, prefix_caching=False, **INT8):
        alone = [hf_paged.generate_many(model, [p], max_new_tokens=12)[0].token_ids for p in prompts]
    with hf_paged.enabled(model, **INT8):
        batched = [r.token_ids for r in hf_paged.generate_many(model, prompts, max_new_tokens=12)]
        again = [r.token_ids for r in hf_paged.generate_many(model, prompts, max_new_tokens=12)]
        assert hf_paged.stats(model).prefix_hit_tokens > 0
    assert batched == again == alone


@pytest.mark.parametrize("family", FAMILIES)
def test_beams_take_their_scales_along(family: str) -> None:
    model, tokenizer = demo_model(family), demo_tokenizer(family)
    inputs = tokenizer(TEXTS[:3], return_tensors="pt", padding=True)
    options = {"max_new_tokens": 20, "num_beams": 4, "output_scores": True, "return_dict_in_generate": True}
    expected = model.generate(**inputs, **options, do_sample=False)
    with hf_paged.enabled(model, block_size=4, **INT8), native_calls(model):
        actual = model.generate(**inputs, **options, do_sample=False)
    assert (actual.sequences_scores - expected.sequences_scores).abs().max() < 0.02


def test_a_returned_cache_is_in_the_models_dtype_and_is_taken_back() -> None:
    model = make_model("llama", eos_token_id=None)
    batch = left_pad(random_prompts([20, 33]))
    plain = model.generate(**batch, max_new_tokens=8, return_dict_in_generate=True, do_sample=False)
    with hf_paged.enabled(model, **INT8):
        with native_calls(model):
            first = model.generate(**batch, max_new_tokens=8, return_dict_in_generate=True, do_sample=False)
        cache = first.past_key_values
        assert isinstance(cache, DynamicCache)
        for layer, exact in zip(cache.layers, plain.past_key_values.layers, strict=True):
            assert layer.keys.dtype == torch.float32
            assert layer.keys.shape == exact.keys.shape
        row = exact.keys[1, :, :33]  # without pads, and before tokens could differ
        assert 0 < (layer.keys[1, :, :33] - row).abs().max() < 0.1 * row.abs().max()
        longer = torch.cat([first.sequences, torch.full((2, 1), 9)], dim=1)
        mask = torch.cat([batch["attention_mask"], torch.ones(2, 9, dtype=torch.int64)], dim=1)
        options = {"max_new_tokens": 6, "do_sample": False}
        with native_calls(model, 2):
            fresh = model.generate(longer, attention_mask=mask, **options)
            given = model.generate(longer, attention_mask=mask, past_key_values=cache, **options)
    assert_same_tokens(given, fresh)


def test_an_assistant_drafts_over_int8_too() -> None:
    model, assistant = make_model("llama", eos_token_id=None), make_model("llama", seed=1, eos_token_id=None)
    batch = {"input_ids": torch.tensor(random_prompts([30]))}
    with hf_paged.enabled(model, deterministic=True, **INT8), native_calls(model, 2):
        expected = model.generate(**batch, max_new_tokens=16, do_sample=False)
        drafted = model.generate(**batch, max_new_tokens=16, do_sample=False, assistant_model=assistant)
        assert hf_paged.stats(model).drafted_tokens > 0
    assert_same_tokens(drafted, expected)


@pytest.mark.parametrize("dtype, share", [(torch.float32, 0.27), (torch.bfloat16, 0.54)])
def test_blocks_take_a_fraction_of_the_memory(dtype: torch.dtype, share: float) -> None:
    model = make_model("gpt2", dtype=dtype, n_embd=128, n_head=2)  # heads of 64
    held = {}
    for name in ("auto", "int8"):
        with hf_paged.enabled(model, kv_cache_dtype=name):
            hf_paged.generate_many(model, random_prompts([40] * 4), max_new_tokens=4)
            stats = hf_paged.stats(model)
            held[name] = stats.kv_bytes / stats.kv_blocks_total
            runtime = registry.get(model)._loop.runtime
            # Kernels of a kind that is not used are not loaded.
            assert runtime._cpu_kernels._dtypes == ({dtype} if name == "auto" else {dtype, torch.int8})
    assert held["int8"] <= share * held["auto"]


@pytest.mark.parametrize("value", ["int4", "fp8", None, torch.int8, 8])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_dtype=.*must be one of 'auto', 'int8'"):
        hf_paged.PagedConfig(kv_cache_dtype=value)


def test_explain_says_that_results_are_not_exact() -> None:
    model = make_model("llama")
    prompt = torch.tensor(random_prompts([5]))
    with hf_paged.enabled(model, **INT8):
        explanation = hf_paged.explain(model, input_ids=prompt, max_new_tokens=2)
        assert explanation
        assert "kv_cache_dtype='int8' rounds" in str(explanation)
    with hf_paged.enabled(model):
        assert str(hf_paged.explain(model, input_ids=prompt, max_new_tokens=2)) == "native"
