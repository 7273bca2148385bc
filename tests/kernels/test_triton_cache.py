"""Triton's writes to the cache: store_kv alone and with RoPE, quantised caches, copy_blocks."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hf_paged.kernels import ops, reference, triton_backend
from tests.kernels.triton_support import (
    DEVICE,
    assert_near,
    exact_attention,
    make_step,
    poison_new_tensors,
)

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FP8 = torch.float8_e4m3fn


@pytest.fixture(autouse=True)
def _nan_in_new_tensors(monkeypatch):
    poison_new_tensors(monkeypatch)


def nan_caches(*shape: int, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    k_cache, v_cache = torch.full((2, *shape), float("nan"), dtype=dtype, device=DEVICE)
    return k_cache, v_cache


def same(actual: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.equal(actual.nan_to_num(1e4), expected.nan_to_num(1e4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "kv_heads, head_size, block_size", [(1, 64, 16), (3, 80, 8), (25, 64, 12), (2, 256, 128)]
)
def test_store_kv_writes_exactly_what_the_reference_writes(dtype, kv_heads, head_size, block_size):
    torch.manual_seed(0)
    fused = torch.randn(5, 4 * kv_heads, head_size, device=DEVICE).to(dtype)
    key, value = fused[:, :kv_heads], fused[:, 2 * kv_heads : 3 * kv_heads]
    slots = torch.tensor([block_size - 1, -1, block_size, 3 * block_size - 1, 0], device=DEVICE)
    shape = (3, block_size, kv_heads, head_size)
    expected, actual = nan_caches(*shape, dtype=dtype), nan_caches(*shape, dtype=dtype)
    reference.store_kv(key, value, *expected, slots)
    triton_backend.store_kv(key, value, *actual, slots)
    assert same(actual[0], expected[0])
    assert same(actual[1], expected[1])


def test_store_kv_casts_to_the_cache():
    key, value = torch.randn(2, 3, 2, 16, device=DEVICE)
    expected, actual = (
        nan_caches(1, 8, 2, 16, dtype=torch.float16),
        nan_caches(1, 8, 2, 16, dtype=torch.float16),
    )
    slots = torch.arange(3, device=DEVICE)
    reference.store_kv(key, value, *expected, slots)
    triton_backend.store_kv(key, value, *actual, slots)
    assert same(actual[0], expected[0])
    assert same(actual[1], expected[1])


def test_store_kv_takes_no_tokens():
    caches = nan_caches(1, 8, 2, 16)
    nothing = torch.zeros(0, 2, 16, device=DEVICE)
    triton_backend.store_kv(nothing, nothing, *caches, torch.zeros(0, dtype=torch.int64, device=DEVICE))
    assert caches[0].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "heads, kv_heads, head_size, rotary", [(2, 2, 16, 16), (6, 2, 80, 80), (5, 1, 48, 20)]
)
def test_store_kv_rope_rotates_as_upstream(dtype, heads, kv_heads, head_size, rotary):
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    torch.manual_seed(0)
    fused = torch.randn(4, heads + 2 * kv_heads, head_size, device=DEVICE).to(dtype)
    query, key, value = fused.split([heads, kv_heads, kv_heads], dim=1)
    angles = torch.rand(4, rotary // 2, device=DEVICE).repeat(1, 2) * 6
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    slots = torch.tensor([5, -1, 0, 9], device=DEVICE)
    # [1, H, T, D], as upstream lays them out; the rest of a head is not rotated.
    parts = (x[..., :rotary].transpose(0, 1)[None] for x in (query, key))
    turned = apply_rotary_pos_emb(*parts, cos[None], sin[None])
    new_query, new_key = (
        torch.cat([part[0].transpose(0, 1), whole[..., rotary:]], dim=-1)
        for part, whole in zip(turned, (query, key), strict=True)
    )
    expected, actual = (nan_caches(2, 8, kv_heads, head_size, dtype=dtype) for _ in range(2))
    reference.store_kv(new_key, value, *expected, slots)
    before = fused.clone()
    rotated = triton_backend.store_kv_rope(query, key, value, cos, sin, *actual, slots)
    assert torch.equal(fused, before)
    assert_near(rotated, new_query, dtype)
    assert_near(actual[0].nan_to_num(1e4), expected[0].nan_to_num(1e4), dtype)
    assert same(actual[1], expected[1])


def int8_caches(*shape: int):
    caches = torch.full((2, *shape), 77, dtype=torch.int8, device=DEVICE)
    scales = torch.full((2, *shape[:3]), float("nan"), device=DEVICE)
    return *caches, {"k_scales": scales[0], "v_scales": scales[1]}


def test_int8_store_rounds_to_the_nearest_of_255_levels():
    torch.manual_seed(0)
    key, value = torch.randn(2, 4, 3, 24, device=DEVICE)
    key[1, 2] = 0.0
    k_cache, v_cache, scales = int8_caches(2, 8, 3, 24)
    slots = torch.tensor([3, 8, -1, 15], device=DEVICE)
    triton_backend.store_kv(key, value, k_cache, v_cache, slots, **scales)
    for new, cache, scale in ((key, k_cache, scales["k_scales"]), (value, v_cache, scales["v_scales"])):
        stored, written = slots >= 0, slots[slots >= 0]
        levels, factors = cache.flatten(0, 1)[written], scale.flatten(0, 1)[written]
        torch.testing.assert_close(factors, new[stored].abs().amax(-1) / 127)
        exact = new[stored] / factors.clamp_min(1e-30)[..., None]
        assert (levels - exact).abs().max() <= 0.5 + 1e-4
        untouched = torch.ones(16, dtype=torch.bool, device=DEVICE)
        untouched[written] = False
        assert (cache.flatten(0, 1)[untouched] == 77).all()
        assert scale.flatten(0, 1)[untouched].isnan().all()


def test_rope_store_quantises_like_the_plain_store():
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 3, 2, 16, device=DEVICE)
    slots = torch.tensor([0, 9, 4], device=DEVICE)
    no_turn = torch.ones(3, 16, device=DEVICE), torch.zeros(3, 16, device=DEVICE)
    plain, fused = int8_caches(2, 8, 2, 16), int8_caches(2, 8, 2, 16)
    triton_backend.store_kv(key, value, *plain[:2], slots, **plain[2])
    triton_backend.store_kv_rope(query, key, value, *no_turn, *fused[:2], slots, **fused[2])
    assert torch.equal(plain[0], fused[0])
    assert torch.equal(plain[1], fused[1])
    assert same(plain[2]["k_scales"], fused[2]["k_scales"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("options", [{}, {"sliding_window": 20, "softcap": 3.0}])
def test_attention_over_an_int8_cache(dtype, options):
    """Against the reference over what the cache says: quantisation is judged by the store's test."""
    options = {"scale": 0.25, **options}
    step = make_step([1, 1, 1, 18, 5], [40, 0, 17, 18, 37], num_decodes=3, heads=4, kv_heads=2, dtype=dtype)
    k_cache, v_cache, scales = int8_caches(*step.k_cache.shape)
    filled = ~step.k_cache[:, :, 0, 0].isnan()
    old = filled.flatten().nonzero()[:, 0]
    flat = step.k_cache.flatten(0, 1)[old], step.v_cache.flatten(0, 1)[old]
    triton_backend.store_kv(*flat, k_cache, v_cache, old, **scales)
    output = triton_backend.paged_attention(
        step.query, step.key, step.value, k_cache, v_cache, step.metadata, **options, **scales
    )
    wide = [cache * scales[name][..., None] for cache, name in ((k_cache, "k_scales"), (v_cache, "v_scales"))]
    assert_near(output, exact_attention(step, *wide, **options), dtype)
    assert_near(output, exact_attention(step, **options), torch.bfloat16, factor=3)


def test_the_front_door_passes_scales_and_stores_what_the_reference_does():
    step = make_step([1, 1, 18, 5], [40, 17, 18, 37], num_decodes=2, heads=4, kv_heads=2)
    step.key[1, 1] = 0.0
    step.key[20, 0, 3] = float("nan")
    step.value[21, 1] = 2.0**-110
    found = []
    for backend in ("reference", "triton"):
        k_cache, v_cache, scales = int8_caches(*step.k_cache.shape)
        for name in scales:
            scales[name].fill_(0.01)
        output = ops.paged_attention(
            step.query, step.key, step.value, k_cache, v_cache, dataclasses.replace(step.metadata, plan={}),
            scale=0.25, backend=backend, **scales,
        )  # fmt: skip
        found.append((output, k_cache, v_cache, scales))
    (expected, *stored), (actual, *others) = found
    assert expected.isnan().any()
    assert not expected.isnan().all()
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0, equal_nan=True)
    for cache, other in zip(stored[:2], others[:2], strict=True):
        assert torch.equal(cache, other)
    for name, scale in stored[2].items():
        assert same(scale, others[2][name])


def on_fp8_grid(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """The nearest normal e4m3 numbers times the heads' scales: the interpreter rounds others wrongly."""
    scales = scales[:, None].to(x.dtype)
    grid = (x / scales).clamp(-448, 448).to(FP8).to(x.dtype)
    return grid.where(grid.abs() >= 2**-6, torch.zeros_like(grid)) * scales


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_attention_over_an_fp8_cache(dtype):
    step = make_step([1, 1, 18, 5], [40, 17, 18, 37], num_decodes=2, heads=4, kv_heads=2, dtype=dtype)
    k_scales, v_scales = torch.tensor([[0.5, 2**-7], [2**-6, 1.0]], device=DEVICE)
    scales = {"k_scales": k_scales, "v_scales": v_scales}
    filled = ~step.k_cache.isnan()
    step = dataclasses.replace(
        step,
        **{"key": on_fp8_grid(step.key, k_scales), "value": on_fp8_grid(step.value, v_scales)},
        k_cache=on_fp8_grid(step.k_cache, k_scales).where(filled, step.k_cache),
        v_cache=on_fp8_grid(step.v_cache, v_scales).where(filled, step.v_cache),
    )
    k_cache, v_cache = torch.full((2, *step.k_cache.shape), float("nan"), device=DEVICE).to(FP8)
    old = filled[:, :, 0, 0].flatten().nonzero()[:, 0]
    flat = step.k_cache.flatten(0, 1)[old], step.v_cache.flatten(0, 1)[old]
    triton_backend.store_kv(*flat, k_cache, v_cache, old, **scales)
    for cache, scale, exact in ((k_cache, k_scales, flat[0]), (v_cache, v_scales, flat[1])):
        assert torch.equal(cache.float().flatten(0, 1)[old] * scale[:, None], exact.float())
    output = triton_backend.paged_attention(
        step.query, step.key, step.value, k_cache, v_cache, step.metadata, scale=0.25, **scales
    )
    assert_near(output, exact_attention(step, scale=0.25), dtype)


def test_fp8_store_saturates():
    key = torch.full((1, 1, 16), 1000.0, device=DEVICE)
    k_cache, v_cache = (torch.zeros(1, 8, 1, 16, dtype=FP8, device=DEVICE) for _ in "kv")
    one = torch.ones(1, device=DEVICE)
    slots = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    triton_backend.store_kv(key, -key, k_cache, v_cache, slots, k_scales=one, v_scales=one)
    assert (k_cache[0, 0].float() == 448).all()
    assert (v_cache[0, 0].float() == -448).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 8, 1, 16), (7, 16, 5, 80)])
def test_copy_blocks_reads_all_sources_first(dtype, shape):
    torch.manual_seed(0)
    expected = torch.randn(2, *shape, device=DEVICE).to(dtype)
    actual = expected.clone()
    src = torch.tensor([0, 2, 3, 2], device=DEVICE)
    dst = torch.tensor([3, 0, 2, 5], device=DEVICE)
    reference.copy_blocks(*expected, src, dst)
    triton_backend.copy_blocks(*actual, src, dst)
    assert torch.equal(actual, expected)


def test_copy_blocks_takes_scales_along():
    k_cache, v_cache, scales = int8_caches(3, 8, 2, 16)
    k_cache.copy_(torch.arange(3)[:, None, None, None])
    for name in scales:
        scales[name].copy_(torch.arange(3)[:, None, None])
    one, two = torch.tensor([1], device=DEVICE), torch.tensor([2], device=DEVICE)
    triton_backend.copy_blocks(k_cache, v_cache, one, two, **scales)
    assert (k_cache[2] == 1).all()
    assert (scales["k_scales"][2] == 1).all()
    assert (scales["v_scales"][0] == 0).all()


def test_copy_blocks_takes_an_empty_list():
    k_cache, v_cache = nan_caches(2, 8, 1, 16)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    triton_backend.copy_blocks(k_cache, v_cache, none, none)


def test_attend_reads_what_the_rope_store_wrote():
    step = make_step([1, 6], [20, 6], num_decodes=1)
    turn = torch.ones(7, 16, device=DEVICE), torch.zeros(7, 16, device=DEVICE)
    expected = exact_attention(step, scale=0.25)
    stores = step.key, step.value, *turn, step.k_cache, step.v_cache, step.metadata.slot_mapping
    query = triton_backend.store_kv_rope(step.query, *stores)
    output = triton_backend.attend(
        query, step.k_cache, step.v_cache, dataclasses.replace(step.metadata), scale=0.25
    )
    assert_near(output, expected, torch.float32)
