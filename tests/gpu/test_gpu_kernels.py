"""The Triton kernels compiled and run on the GPU that is here: low precision, real shapes, CUDA graphs.

`tests/kernels/test_triton_*.py` run on a GPU too; this file adds what the interpreter cannot show. Each test is a call
of a `check_` function, which `tests/kernels/test_triton_dry_run.py` calls on tiny shapes without a GPU.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from hf_paged.kernels import reference, triton_backend
from hf_paged.kernels.triton_activation import gelu, silu_mul
from hf_paged.kernels.triton_launch import gpu_of
from hf_paged.kernels.triton_layer_norm import layer_norm
from hf_paged.kernels.triton_rms_norm import rms_norm
from hf_paged.kernels.triton_sample import sample
from tests.kernels.triton_support import DEVICE, INTERPRETED, assert_near, exact_attention, make_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: nothing is compiled"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]

#: (heads, KV heads, head size) of the families.
SHAPES = [(12, 12, 64), (25, 25, 64), (16, 1, 128), (48, 1, 128), (32, 4, 64), (32, 8, 128), (32, 32, 128)]
#: Around every border of blocks, tiles and splits; the last row of a batch is padding.
LENGTHS = [1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 1023, 1025, 2048, 0]
QUERY_LENS = [1, 16, 127, 128, 129, 300, 64]
CONTEXTS = [0, 0, 0, 1, 63, 500, 1024]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
OPTIONS = {
    "plain": {},
    "window": {"sliding_window": 100},
    "softcap-sinks": {"softcap": 30.0, "sinks": True},
}


def shaped(shape, dtype, **more) -> dict:
    """`make_step`'s keywords for (heads, KV heads, head size)."""
    return dict(zip(("heads", "kv_heads", "head_size"), shape, strict=True), dtype=dtype, **more)


def attention_options(name: str, heads: int, head_size: int) -> dict:
    options = {"scale": head_size**-0.5, **OPTIONS[name]}
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-1.0, 2.0, heads, device=DEVICE)
    return options


def run(step, **options) -> torch.Tensor:
    """The backend on copies of the step's caches."""
    caches = step.k_cache.clone(), step.v_cache.clone()
    # Freed at once: the allocator hands the same memory out for the output.
    torch.full_like(step.query, float("nan"), memory_format=torch.contiguous_format)
    return triton_backend.paged_attention(step.query, step.key, step.value, *caches, step.metadata, **options)


def capture(work: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    """A callable that replays `work` as a CUDA graph (without a GPU: `work` itself)."""
    if DEVICE.type != "cuda":
        return work
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = work()

    def replay() -> torch.Tensor:
        output.fill_(float("nan") if output.is_floating_point() else -1)
        graph.replay()
        return output

    return replay


def check_decode(shape, dtype, lengths, option="plain", block_size=16):
    names = shaped(shape, dtype, block_size=block_size)
    step = make_step([1] * len(lengths), lengths, num_decodes=len(lengths), **names)
    options = attention_options(option, shape[0], shape[2])
    assert_near(run(step, **options), exact_attention(step, **options), dtype)


def check_prefill(shape, dtype, query_lens, contexts, option="plain", block_size=16):
    names = shaped(shape, dtype, block_size=block_size)
    step = make_step(query_lens, [new + old for new, old in zip(query_lens, contexts, strict=True)], **names)
    options = attention_options(option, shape[0], shape[2])
    assert_near(run(step, **options), exact_attention(step, **options), dtype)


def check_quantised(cache_dtype, shape, dtype, lengths, query_lens):
    """Attention over what the cache says equals the reference's; what it says is near what was stored."""
    kv_heads, head_size = shape[1:]
    query_lens, seq_lens = [1] * len(lengths) + query_lens, lengths + [new + 40 for new in query_lens]
    names = shaped(shape, dtype)
    step = make_step(query_lens, seq_lens, num_decodes=len(lengths), **names)
    caches = [torch.zeros(step.k_cache.shape, dtype=cache_dtype, device=DEVICE) for _ in range(2)]
    scale_shape = step.k_cache.shape[:3] if cache_dtype == torch.int8 else (kv_heads,)
    scales = {name: torch.full(scale_shape, 2**-6, device=DEVICE) for name in ("k_scales", "v_scales")}
    old = (~step.k_cache[:, :, 0, 0].isnan()).flatten().nonzero()[:, 0]
    flat = step.k_cache.flatten(0, 1)[old], step.v_cache.flatten(0, 1)[old]
    triton_backend.store_kv(*flat, *caches, old, **scales)
    options = {"scale": head_size**-0.5}
    qkv = step.query, step.key, step.value
    output = triton_backend.paged_attention(*qkv, *caches, step.metadata, **options, **scales)
    wide = [cache.float() * scale[..., None] for cache, scale in zip(caches, scales.values(), strict=True)]
    for stored, exact in zip(wide, flat, strict=True):
        error = (stored.flatten(0, 1)[old] - exact.float()).abs()
        bound = (
            exact.float().abs().amax(-1, keepdim=True) / 250
            if cache_dtype == torch.int8
            else exact.abs() / 15
        )
        assert (error <= bound + 2**-15).all()
    assert_near(output, exact_attention(step, *wide, **options), dtype)


def check_replay(shape, dtype, capacity, lengths):
    """A graph captured at length 1 replays with other lengths, tables and padding, and reads no host number."""
    names, head_size = shaped(shape, dtype), shape[2]
    static = make_step([1] * len(lengths), [capacity] * len(lengths), num_decodes=len(lengths), **names)
    options = {"scale": head_size**-0.5}
    blocks = static.k_cache.shape[0]
    static.metadata.seq_lens.fill_(1)
    static.metadata.seq_lens_list[:] = [1] * len(lengths)
    inputs = static.query, static.key, static.value, static.k_cache, static.v_cache
    replay = capture(lambda: triton_backend.paged_attention(*inputs, static.metadata, **options))
    for seed in (1, 2):
        order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
        step = make_step(
            [1] * len(lengths), [lengths[i] for i in order], num_decodes=len(lengths), seed=seed, **names
        )
        assert step.k_cache.shape[0] <= blocks
        for name in ("query", "key", "value"):
            getattr(static, name).copy_(getattr(step, name))
        for name in ("k_cache", "v_cache"):
            getattr(static, name).fill_(float("nan"))
            getattr(static, name)[: step.k_cache.shape[0]] = getattr(step, name)
        static.metadata.block_tables.zero_()
        static.metadata.block_tables[:, : step.metadata.block_tables.shape[1]] = step.metadata.block_tables
        static.metadata.seq_lens.copy_(step.metadata.seq_lens)
        static.metadata.slot_mapping.copy_(step.metadata.slot_mapping)
        assert_near(replay(), exact_attention(step, **options), dtype)


def check_batch_invariance(shape, dtype, lengths):
    """With fixed bounds on splits a row's output has the same bits alone and in a batch."""
    names, head_size = shaped(shape, dtype), shape[2]
    step = make_step([1] * len(lengths), lengths, num_decodes=len(lengths), **names)
    bounds = {"max_splits": 16, "split_chunk": 256}
    step.metadata.plan.update(bounds)
    together = run(step, scale=head_size**-0.5)
    for row in range(len(lengths)):
        rows = slice(row, row + 1)
        metadata = dataclasses.replace(
            step.metadata,
            slot_mapping=step.metadata.slot_mapping[rows],
            block_tables=step.metadata.block_tables[rows],
            seq_lens=step.metadata.seq_lens[rows],
            query_start_loc=step.metadata.query_start_loc[:2],
            num_decodes=1,
            query_lens_list=[1],
            seq_lens_list=[lengths[row]],
            plan=dict(bounds),
        )
        parts = {name: getattr(step, name)[rows] for name in ("query", "key", "value")}
        alone = run(dataclasses.replace(step, metadata=metadata, **parts), scale=head_size**-0.5)
        assert torch.equal(alone[0], together[row])


def check_rope_store(shape, dtype, tokens):
    heads, kv_heads, head_size = shape
    torch.manual_seed(0)
    fused = torch.randn(tokens, heads + 2 * kv_heads, head_size, device=DEVICE).to(dtype)
    query, key, value = fused.split([heads, kv_heads, kv_heads], dim=1)
    angles = torch.rand(tokens, head_size // 2, device=DEVICE).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def turn(x):
        wide = x.double()
        half = torch.cat([-wide[..., head_size // 2 :], wide[..., : head_size // 2]], dim=-1)
        return wide * cos.double()[:, None] + half * sin.double()[:, None]

    slots = torch.randperm(tokens + 16, device=DEVICE)[:tokens]
    slots[-1] = -1
    expected, actual = (
        torch.zeros(2, tokens // 16 + 2, 16, kv_heads, head_size, device=DEVICE) for _ in range(2)
    )
    actual = actual.to(dtype)
    reference.store_kv(turn(key).float(), value, *expected, slots)
    rotated = triton_backend.store_kv_rope(query, key, value, cos, sin, *actual, slots)
    assert_near(rotated, turn(query), dtype)
    assert_near(actual, expected, dtype)


def check_rows(width, dtype, rows):
    """The row-wise ops against float64, within the dtype's tolerance."""
    torch.manual_seed(0)
    x, residual, up = torch.randn(3, rows, width, device=DEVICE).to(dtype)
    weight, bias = torch.randn(2, width, device=DEVICE).to(dtype)
    total = (x + residual).double()
    normed = total * (total.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight.double()
    assert_near(rms_norm(x, weight, 1e-5, residual)[0], normed, dtype)
    exact = F.layer_norm(total, (width,), weight.double(), bias.double(), 1e-5)
    assert_near(layer_norm(x, weight, bias, 1e-5, residual)[0], exact, dtype)
    assert_near(silu_mul(x, up), F.silu(x.double()) * up.double(), dtype)
    for approximate in ("none", "tanh"):
        assert_near(gelu(x, approximate), F.gelu(x.double(), approximate=approximate), dtype)


def check_sampler(rows, vocab, dtype):
    """Greedy equals argmax; draws stay inside of what a sort keeps; a graph replays with other seeds and logits."""
    torch.manual_seed(0)
    logits = (torch.randn(rows, vocab, device=DEVICE) * 3).to(dtype)
    seeds, positions = torch.arange(rows, device=DEVICE), torch.zeros(rows, dtype=torch.int64, device=DEVICE)
    zero, one = torch.zeros(rows, device=DEVICE), torch.ones(rows, device=DEVICE)
    greedy = sample(logits, zero, seeds, positions)
    assert torch.equal(logits.gather(1, greedy[:, None])[:, 0], logits.amax(-1))
    top_k = torch.full((rows,), 7, dtype=torch.int32, device=DEVICE)
    top_p = torch.full((rows,), 0.6, device=DEVICE)
    replay = capture(lambda: sample(logits, one, seeds, positions, top_k=top_k, top_p=top_p))
    for seed in (1, 2):
        logits.copy_(logits.roll(seed, dims=1))
        seeds.add_(1000)
        first = sample(logits, one, seeds, positions, top_k=top_k, top_p=top_p)
        # Ties with the seventh stay, as upstream's top-k keeps them.
        values, _ = logits.float().sort(descending=True)
        odds = values.masked_fill(values < values[:, 6:7], float("-inf")).softmax(-1)
        kept = values.masked_fill(odds.cumsum(-1) - odds > 0.6 + 1e-4, float("inf")).amin(-1)
        assert (logits.float().gather(1, first[:, None])[:, 0] >= kept).all()
        assert torch.equal(replay(), first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(shape, dtype):
    check_decode(shape, dtype, LENGTHS)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill(shape, dtype):
    check_prefill(shape, dtype, QUERY_LENS, CONTEXTS)


@pytest.mark.parametrize("option", ["window", "softcap-sinks"])
@pytest.mark.parametrize("shape", [(12, 12, 64), (48, 1, 128), (32, 8, 128)])
def test_options(shape, option):
    check_decode(shape, torch.bfloat16, LENGTHS, option)
    check_prefill(shape, torch.bfloat16, QUERY_LENS, CONTEXTS, option)


@pytest.mark.parametrize("block_size", [8, 32, 48, 64, 128])
@pytest.mark.parametrize("shape", [(4, 4, 32), (8, 2, 80), (8, 1, 96), (4, 2, 256)])
def test_blocks_and_other_head_sizes(shape, block_size):
    check_decode(shape, torch.bfloat16, LENGTHS, block_size=block_size)
    check_prefill(shape, torch.bfloat16, QUERY_LENS, CONTEXTS, block_size=block_size)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache_dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("shape", [(12, 12, 64), (48, 1, 128), (32, 8, 128)])
def test_quantised_cache(cache_dtype, shape, dtype):
    if cache_dtype == torch.float8_e4m3fn and not gpu_of("test", DEVICE).has_fp8:
        pytest.skip("this GPU has no e4m3")
    check_quantised(cache_dtype, shape, dtype, [1, 64, 257, 1025], [3, 130])


@pytest.mark.parametrize("shape", [(12, 12, 64), (48, 1, 128), (32, 8, 128)])
def test_graph_replay_with_changed_lengths_and_tables(shape):
    check_replay(shape, torch.bfloat16, 2048, [1, 0, 16, 255, 256, 257, 2000, 0])


@pytest.mark.parametrize("shape", [(12, 12, 64), (48, 1, 128), (32, 8, 128)])
def test_rows_do_not_depend_on_the_batch(shape):
    check_batch_invariance(shape, torch.bfloat16, [1, 100, 256, 257, 1024, 2000])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(32, 4, 64), (32, 8, 128), (32, 32, 128)])
def test_rope_store(shape, dtype):
    check_rope_store(shape, dtype, 100)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [768, 1600, 4096, 11008])
def test_row_wise_ops(width, dtype):
    check_rows(width, dtype, 33)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab", [50257, 128256])
def test_sampler(vocab, dtype):
    check_sampler(64, vocab, dtype)


def test_a_decode_step_never_waits_for_the_host():
    step = make_step(
        [1] * 4, [100, 300, 17, 0], num_decodes=4, heads=8, kv_heads=2, head_size=64, dtype=torch.bfloat16
    )
    logits = torch.randn(4, 1000, device=DEVICE)
    row, longs = torch.ones(4, device=DEVICE), torch.arange(4, device=DEVICE)
    run(step, scale=0.125)
    sample(logits, row, longs, longs, top_p=row * 0.9)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(step, scale=0.125)
        sample(logits, row, longs, longs, top_p=row * 0.9)
    finally:
        torch.cuda.set_sync_debug_mode("default")
