"""Memory grows with the work and goes back."""

from __future__ import annotations

import gc
import random

import pytest
import torch
from transformers import GenerationConfig

import hf_paged
from tests.helpers import PAD, left_pad, make_model, random_prompts

MIB = 2**20
SLACK = 64 * MIB


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096


def wide_model():
    """8 KiB of KV a token."""
    return make_model("gpt2", n_embd=256, n_layer=4, n_head=4, n_positions=1024)


def share_gpt_requests(count: int, seed: int = 0) -> tuple[list[list[int]], list[GenerationConfig]]:
    """ShareGPT-shaped lengths: means 161 in, 338 out (kernel of the published distribution: exponential, cut)."""
    source = random.Random(seed)
    lengths = [min(900, 1 + int(source.expovariate(1 / 161))) for _ in range(count)]
    outputs = [min(1024 - n, 1 + int(source.expovariate(1 / 338))) for n in lengths]
    configs = [GenerationConfig(max_new_tokens=n, do_sample=False) for n in outputs]
    return random_prompts(lengths, seed=seed), configs


def test_enable_allocates_nothing():
    with hf_paged.enabled(make_model("llama")):
        pass  # what importing the code takes is not the model's
    model = make_model("llama")
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False)
    gc.collect()
    before = resident_bytes()
    hf_paged.enable(model)
    assert hf_paged.stats(model).kv_bytes == 0
    assert hf_paged.stats(model).kv_blocks_total == 0
    assert resident_bytes() - before < 2 * MIB
    hf_paged.disable(model)


def test_waste_is_small_on_share_gpt_lengths():
    model = make_model("gpt2", n_positions=1024, eos_token_id=None)
    prompts, configs = share_gpt_requests(48)
    hf_paged.enable(model, max_num_seqs=32)
    hf_paged.generate_many(model, prompts, generation_config=configs)
    stats = hf_paged.stats(model)
    assert stats.native_calls == 48
    assert stats.kv_waste <= 0.04, f"{stats.kv_waste:.1%} of the slots in used blocks held no token"
    hf_paged.disable(model)


def test_pool_follows_use_and_goes_back():
    model = wide_model()
    hf_paged.enable(model)
    gc.collect()
    start = resident_bytes()
    for rows, length in ((2, 50), (24, 600), (1, 10), (3, 100)):
        inputs = left_pad(random_prompts([length] * rows, seed=rows), PAD)
        model.generate(**inputs, max_new_tokens=40, do_sample=False, eos_token_id=None)
        stats = hf_paged.stats(model)
        block_bytes = 16 * 8 * 1024
        assert stats.kv_blocks_total * block_bytes == stats.kv_bytes
        assert stats.kv_bytes <= 2 * stats.peak_blocks_used * block_bytes + SLACK
        assert stats.kv_blocks_used + stats.kv_blocks_cached + stats.kv_blocks_free == stats.kv_blocks_total
    assert hf_paged.stats(model).peak_blocks_used * block_bytes > 100 * MIB
    assert resident_bytes() - start > 80 * MIB
    hf_paged.release_memory(model)
    assert hf_paged.stats(model).kv_bytes == 0
    gc.collect()
    assert resident_bytes() - start < SLACK
    model.generate(**inputs, max_new_tokens=8, do_sample=False)
    hf_paged.disable(model)
    gc.collect()
    assert resident_bytes() - start < SLACK


def test_idle_pool_keeps_little_beyond_its_cached_prefixes():
    model = wide_model()
    hf_paged.enable(model, prefix_caching=False)
    inputs = left_pad(random_prompts([600] * 24), PAD)
    model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert hf_paged.stats(model).kv_bytes <= SLACK
    hf_paged.disable(model)


@pytest.mark.parametrize("memory", ["200KiB", 400_000])
def test_pool_limit_is_kept(memory):
    model = make_model("gpt2")
    hf_paged.enable(model, kv_cache_memory=memory)
    inputs = left_pad(random_prompts([20] * 8), PAD)
    model.generate(**inputs, max_new_tokens=70, do_sample=False, eos_token_id=None)
    stats = hf_paged.stats(model)
    assert stats.native_calls == 1
    assert stats.kv_bytes <= 400_000
    assert stats.preemptions > 0
    hf_paged.disable(model)


def test_request_that_can_never_fit():
    model = make_model("gpt2")
    want = model.generate(torch.tensor([[5] * 60]), max_new_tokens=50, do_sample=False)
    hf_paged.enable(model, kv_cache_memory="64KiB", fallback="silent")
    with pytest.raises(hf_paged.InvalidRequestError, match="KV cache"):
        hf_paged.generate_many(model, [[5, 6], [5] * 60], max_new_tokens=50)
    with pytest.raises(hf_paged.InvalidRequestError, match="KV cache"):
        hf_paged.engine(model).submit([5] * 60, max_new_tokens=50)
    assert torch.equal(model.generate(torch.tensor([[5] * 60]), max_new_tokens=50, do_sample=False), want)
    assert hf_paged.stats(model).fallback_calls == {"kv_budget": 1}
    hf_paged.disable(model)
    with pytest.raises(hf_paged.ConfigError, match="kv_cache_memory"):
        hf_paged.enable(model, kv_cache_memory=100).generate(torch.tensor([[5]]), max_new_tokens=2)
    hf_paged.disable(model)


def test_prefixes_are_found_by_later_calls():
    model = make_model("llama")
    shared = random_prompts([64])[0]
    hf_paged.enable(model)
    model.generate(torch.tensor([[*shared, 5]]), max_new_tokens=4, do_sample=False)
    assert hf_paged.stats(model).prefix_hit_tokens == 0
    with_hit = model.generate(torch.tensor([[*shared, 6]]), max_new_tokens=4, do_sample=False)
    assert hf_paged.stats(model).prefix_hit_tokens == 64
    hf_paged.invalidate(model)
    without = model.generate(torch.tensor([[*shared, 6]]), max_new_tokens=4, do_sample=False)
    assert hf_paged.stats(model).prefix_hit_tokens == 64
    assert torch.equal(with_hit, without)
    hf_paged.disable(model)
