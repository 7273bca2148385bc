"""The table of tiles, the bounds on splits, and the errors before a launch."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from hf_paged.kernels import triton_backend
from hf_paged.kernels.tiles import ARCHS, MAX_SPLITS, decode_splits, head_tile, lookup
from hf_paged.kernels.triton_checks import check_cache
from hf_paged.kernels.triton_launch import Gpu, gpu_of, recording
from hf_paged.kernels.triton_store_kv_rope import store_kv_rope
from tests.kernels.triton_support import DEVICE, make_step

FP8 = torch.float8_e4m3fn
#: A stage holds a tile of keys and one of values; a program may use this much shared memory.
SHARED_BYTES = {
    "sm_80": 163 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "gfx942": 64 * 1024,
    "interpreter": 1e9,
}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("op", ["decode", "prefill"])
def test_every_shape_has_a_tile_that_fits(arch, op):
    sizes = itertools.product(
        (1, 32, 64, 65, 80, 128, 129, 256), (1, 4, 8, 9, 16, 17, 48, 128), (2, 4), (1, 2)
    )
    for head_size, group, itemsize, cache_itemsize in sizes:
        tile = lookup(op, arch, head_size, group=group, itemsize=itemsize, cache_itemsize=cache_itemsize)
        assert tile.block_m >= 16
        assert tile.block_n >= 16
        assert all(x & (x - 1) == 0 for x in (tile.block_m, tile.block_n, tile.num_warps))
        assert tile.chunk % tile.block_n == 0
        assert (op == "decode") == (tile.chunk > 0)
        buffers = max(1, tile.num_stages - 1) * 2 * tile.block_n * head_tile(head_size) * itemsize
        assert buffers <= SHARED_BYTES[arch], (head_size, group, itemsize)
        if op == "decode" and itemsize == 2 and arch != "interpreter":
            assert tile.block_m >= min(group, 64), "a group shares one reading of its keys"


@pytest.mark.parametrize(
    "head_size, expected", [(1, 16), (16, 16), (17, 32), (64, 64), (80, 128), (96, 128), (256, 256)]
)
def test_head_tile(head_size, expected):
    assert head_tile(head_size) == expected


def test_splits_cover_a_gpu_with_one_sequence_and_stop_at_what_the_table_holds():
    tile = lookup("decode", "sm_90", 128, group=4)
    alone = decode_splits(tile, num_seqs=1, programs_per_seq=8, capacity=32768, num_sms=132)
    assert alone.max_splits == MAX_SPLITS
    assert alone.min_chunk < tile.chunk
    batch = decode_splits(tile, num_seqs=256, programs_per_seq=8, capacity=32768, num_sms=132)
    assert batch.max_splits == 8
    assert batch.min_chunk == tile.chunk
    assert decode_splits(tile, 256, 8, capacity=300, num_sms=132).max_splits == 2
    assert decode_splits(tile, 1, 8, capacity=16, num_sms=132).max_splits == 1
    assert decode_splits(tile, 0, 8, capacity=0, num_sms=132).max_splits == 1


def cache(dtype=torch.float32, head_size=16, device=DEVICE) -> torch.Tensor:
    return torch.zeros(2, 8, 1, head_size, dtype=dtype, device=device)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda: check_cache("op", cache(torch.float64), cache(torch.float64), None, None),
            "op: k_cache of dtype float64",
        ),
        (
            lambda: check_cache("op", cache(), cache(torch.float16), None, None),
            "must have one dtype, shape and set of",
        ),
        (
            lambda: check_cache("op", cache(), cache().transpose(0, 1), None, None),
            "must have one dtype, shape and set of",
        ),
        (
            lambda: check_cache("op", cache(head_size=257), cache(head_size=257), None, None),
            "head size 257; supported: 1 to",
        ),
        (
            lambda: check_cache("op", cache(torch.int8), cache(torch.int8), None, None),
            r"k_scales None .*\[2, 8, 1\]",
        ),
        (
            lambda: check_cache("op", cache(), cache(), torch.ones(1, device=DEVICE), None),
            "k_scales with a torch.float32",
        ),
        (lambda: check_cache("op", cache(), cache(device="meta"), None, None), "op: v_cache on 'meta'"),
        (
            lambda: gpu_of("op", torch.device("meta")),
            "op: tensors on 'meta'; the Triton kernels run on CUDA and ROCm",
        ),
        (
            lambda: triton_backend.copy_blocks(*[cache().transpose(1, 3)] * 2, *[torch.zeros(1)] * 2),
            "last dimension",
        ),
    ],
)
def test_errors_name_the_op_and_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_fp8_needs_a_gpu_that_has_it():
    one = torch.ones(1, device=DEVICE)
    with (
        recording(lambda *_: None, Gpu("sm_80", num_sms=108, has_fp8=False)),
        pytest.raises(
            ValueError, match="op: a float8_e4m3fn cache on sm_80; supported from sm_89, or use int8"
        ),
    ):
        check_cache("op", cache(FP8), cache(FP8), one, one)


def test_attention_errors_come_before_a_launch(monkeypatch):
    monkeypatch.setattr("hf_paged.kernels.triton_paged_decode.launch", None)
    step = make_step([1], [5], num_decodes=1)
    arguments = step.key, step.value, step.k_cache, step.v_cache, step.metadata
    with pytest.raises(ValueError, match="paged_attention: query of dtype float64; supported: float32"):
        triton_backend.paged_attention(step.query.double(), *arguments, scale=1.0)
    with pytest.raises(
        ValueError, match="paged_attention: query of 2 heads of size 8 over a cache of 1 heads of size 16"
    ):
        triton_backend.paged_attention(step.query[..., :8], *arguments, scale=1.0)
    with pytest.raises(ValueError, match="paged_attention: sinks on 'meta'"):
        triton_backend.paged_attention(step.query, *arguments, scale=1.0, sinks=torch.zeros(2, device="meta"))
    for plan in ({"split_chunk": 24}, {"max_splits": 0}):
        bad = dataclasses.replace(step, metadata=dataclasses.replace(step.metadata, plan=plan))
        with pytest.raises(ValueError, match="paged_decode: plan with max_splits"):
            triton_backend.attend(bad.query, bad.k_cache, bad.v_cache, bad.metadata, scale=1.0)


@pytest.mark.parametrize(
    "rotary, message", [(6, None), (5, "5 rotated elements"), (18, "18 rotated elements")]
)
def test_rope_errors(rotary, message):
    step = make_step([2], [2])
    angles = [torch.zeros(2, rotary, device=DEVICE)] * 2
    stores = step.key, step.value, *angles, step.k_cache, step.v_cache, step.metadata.slot_mapping
    if message is None:
        assert store_kv_rope(step.query, *stores).shape == step.query.shape
        return
    with pytest.raises(ValueError, match=f"store_kv_rope: {message}"):
        store_kv_rope(step.query, *stores)
