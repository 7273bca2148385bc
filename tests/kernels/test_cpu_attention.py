"""The CPU backend's attention against float64: rows over blocks, SDPA for long queries, and steps of both."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from hf_paged.kernels import cpu_backend, cpu_runtime, reference
from tests.kernels.paged_case import make_case, sdpa_error

#: Lengths around the borders of blocks (16), tiles (16), chunks (64) and several of them.
EDGES = [1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 129, 255, 256, 257]
#: Decodes, queries attended row by row, and longer ones: alone, in equal neighbours, and after cached tokens.
MIXED = [
    (1, 1),
    (1, 17),
    (1, 300),
    (1, 65),
    (3, 3),
    (8, 40),
    (32, 32),
    (33, 33),
    (40, 40),
    (40, 40),
    (20, 100),
    (64, 65),
]


@pytest.fixture(params=[1, 2, 5], ids="bins={}".format)
def bins(request, monkeypatch):
    """Cuts the rows' work into this many bins, whatever their size; two threads are enough to run them."""
    monkeypatch.setattr(cpu_backend, "num_bins", lambda work_bytes: request.param)
    monkeypatch.setattr(cpu_runtime, "_launch_parallel", run_bins)
    return request.param


def run_bins(kernel, bins, arguments):
    cpu_runtime.kernel_module("cpu_bins").run_bins(bins, kernel.address, arguments)


def assert_exact(case, **options):
    expected = case.truth(**options)
    before = case.copy()
    # Large scores cost any float32 attention digits: twice what the reference loses is allowed.
    lost = (
        (case.copy().run("reference", **options).double() - expected).abs().max().item()
        if case.lengths
        else 0
    )
    actual = case.run("cpu", **options)
    assert actual.dtype == case.query.dtype
    assert actual.is_contiguous()
    torch.testing.assert_close(actual.double(), expected, atol=max(1e-5, 2 * lost), rtol=0)
    # The step's keys and values are in their slots, and no other slot was touched.
    reference.store_kv(before.key, before.value, before.k_cache, before.v_cache, before.slot_mapping)
    for name in ("k_cache", "v_cache"):
        assert torch.equal(getattr(case, name).nan_to_num(9), getattr(before, name).nan_to_num(9))


@pytest.mark.parametrize("block_size", [8, 16, 128])
def test_decode_at_every_edge(block_size, bins):
    assert_exact(make_case([(1, length) for length in EDGES], block_size=block_size))


@pytest.mark.parametrize("length", EDGES)
def test_one_row_alone_cut_into_bins(length, bins):
    assert_exact(make_case([(1, length)], group=2))


@pytest.mark.parametrize("head_size", [32, 40, 64, 80, 128, 256])
@pytest.mark.parametrize("kv_heads, group", [(4, 1), (2, 3), (1, 8)], ids=["mha", "gqa", "mqa"])
def test_head_sizes_and_groups(head_size, kv_heads, group):
    assert_exact(make_case(MIXED, kv_heads=kv_heads, group=group, head_size=head_size))


def test_mixed_steps_cut_into_bins(bins):
    assert_exact(make_case(MIXED, group=2, block_size=8))


@pytest.mark.parametrize("group", [1, 3])
def test_heads_outermost_in_memory(group):
    assert_exact(make_case(MIXED, group=group, fused=False))


def test_shared_prefix_blocks(bins):
    assert_exact(make_case([(1, 50), (1, 49), (2, 90), (20, 60)], shared_blocks=2))


def test_several_tokens_of_one_sequence_read_each_other(bins):
    """Rows of one sequence need keys that other rows of the same step bring, maybe from another thread."""
    assert_exact(make_case([(8, 8), (8, 260), (2, 17), (5, 21)], block_size=16))


@pytest.mark.parametrize(
    "lengths", [[(1, 30), (1, 300)], [(3, 40), (16, 30), (40, 40)], MIXED], ids=["decode", "few", "mixed"]
)
@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 1},
        {"sliding_window": 13},
        {"sliding_window": 64},
        {"sliding_window": 10_000},
        {"softcap": 0.5},
        {"sinks": torch.tensor([0.5, -30.0, 30.0, 0.0])},
        {"sliding_window": 20, "softcap": 2.0, "sinks": torch.zeros(4)},
        {"scale": 3.0},
    ],
    ids=lambda options: "+".join(options),
)
@pytest.mark.parametrize("bins", [3], indirect=True, ids=["bins=3"])
def test_options(lengths, options, bins):
    assert_exact(make_case(lengths, group=2), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads, group, head_size", [(2, 1, 64), (2, 2, 80), (1, 6, 128)])
def test_half_precision_is_as_close_as_sdpa(dtype, kv_heads, group, head_size):
    case = make_case(MIXED, kv_heads=kv_heads, group=group, head_size=head_size, dtype=dtype)
    expected = case.truth()
    allowed = 2 * sdpa_error(case, expected) + torch.finfo(dtype).eps
    actual = case.run("cpu")
    assert actual.dtype == dtype
    assert (actual.double() - expected).abs().max().item() <= allowed


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("cache_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_query_and_cache_of_different_dtypes(query_dtype, cache_dtype):
    """As under autocast: the step and later steps must read the same rounded keys."""
    case = make_case(MIXED, group=2, dtype=query_dtype)
    case.k_cache, case.v_cache = case.k_cache.to(cache_dtype), case.v_cache.to(cache_dtype)
    expected = case.copy().run("reference")
    tolerance = 1e-5 if query_dtype == torch.float32 else 2e-2
    torch.testing.assert_close(case.run("cpu"), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("length", [5, 70])
def test_nan_in_a_key_in_use_comes_out(length):
    case = make_case([(1, length), (1, 12)])
    case.key[0, 0, 0] = float("nan")
    output = case.run("cpu")
    assert output[0, 0].isnan().all()
    assert not output[0, 1].isnan().any()
    assert not output[1].isnan().any()


def test_huge_scores_overflow_nothing():
    case = make_case([(1, 40), (1, 3), (20, 20)])
    assert_exact(case.copy(), scale=50.0)
    case.query *= 1e4
    assert case.run("cpu", scale=1.0).isfinite().all()


def test_layers_of_one_step_share_its_plan():
    case, metadata = make_case(MIXED, group=2), None
    metadata = case.metadata()
    for seed in range(3):
        layer = make_case(MIXED, group=2, seed=seed)
        # The same tables and slots as the first layer's, other numbers.
        layer.block_tables, layer.slot_mapping = case.block_tables, case.slot_mapping
        layer.k_cache, layer.v_cache = torch.randn(case.k_cache.shape), torch.randn(case.v_cache.shape)
        expected = layer.truth(sliding_window=None if seed else 9)
        actual = layer.run("cpu", metadata=metadata, sliding_window=None if seed else 9)
        torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0)


def test_without_kernels_sdpa_takes_every_sequence(monkeypatch):
    monkeypatch.setattr(cpu_runtime, "kernel_module", lambda name: None)
    cpu_runtime._has_kernels.cache_clear()
    try:
        assert_exact(make_case(MIXED, group=2))
        assert_exact(make_case(MIXED), sliding_window=7)
        assert_exact(make_case(MIXED), softcap=2.0)
    finally:
        monkeypatch.undo()
        cpu_runtime._has_kernels.cache_clear()


def test_an_empty_step():
    assert make_case([]).run("cpu").shape == (0, 2, 32)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("kv_heads, group", [(12, 1), (8, 4), (1, 48), (3, 3), (1, 1)])
def test_the_whole_grid(dtype, block_size, kv_heads, group):
    lengths = [(1, n) for n in EDGES] + [
        (q, n) for q, n in itertools.product([2, 16, 17, 32, 33, 63], EDGES) if n >= q
    ]
    for head_size in (32, 40, 64, 80, 96, 128, 256):
        case = make_case(
            lengths, kv_heads=kv_heads, group=group, head_size=head_size, block_size=block_size, dtype=dtype
        )
        if dtype == torch.float32:
            assert_exact(case)
            continue
        expected = case.truth()
        allowed = 2 * sdpa_error(case, expected) + torch.finfo(dtype).eps
        assert (case.run("cpu").double() - expected).abs().max().item() <= allowed


def rows_of(case, lengths, part):
    """The queries of `part` of each sequence's new tokens, in a step of their own, deterministic.

    The tokens before them are in the cache already.
    """
    starts = [0, *itertools.accumulate(new for new, _ in case.lengths)]
    chosen = torch.cat([torch.arange(starts[i] + a, starts[i] + b) for i, (a, b) in enumerate(part)])
    fields = ("query", "key", "value", "slot_mapping")
    step = replace(case, lengths=lengths, **{name: getattr(case, name)[chosen] for name in fields})
    metadata = step.metadata()
    metadata.deterministic = True
    return step.run("cpu", metadata=metadata)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_deterministic_row_is_the_same_in_prefill_chunk_and_decode(dtype, bins):
    totals = [300, 70, 33, 5]
    whole = make_case([(n, n) for n in totals], group=2, dtype=dtype)
    metadata = whole.metadata()
    metadata.deterministic = True
    expected = whole.run("cpu", metadata=metadata).split(totals)
    truth = whole.truth().split(totals)
    for mine, exact in zip(expected, truth, strict=True):
        torch.testing.assert_close(
            mine.double(), exact, atol=1e-5 if dtype == torch.float32 else 0.03, rtol=0
        )
    for size in (1, 3, 64):  # the last tokens of each, in one step: decodes, and chunks of two sizes
        counts = [min(size, n) for n in totals]
        got = rows_of(
            whole,
            [(count, n) for count, n in zip(counts, totals, strict=True)],
            [(n - count, n) for count, n in zip(counts, totals, strict=True)],
        )
        for mine, other in zip(got.split(counts), expected, strict=True):
            assert torch.equal(mine, other[len(other) - len(mine) :])


def test_other_rows_change_bits_where_bins_cut_them():
    # What the test above would miss, were the flag without effect.
    case = make_case([(1, 300), (1, 70), (1, 33), (1, 500)])
    with pytest.MonkeyPatch.context() as patch:
        results = []
        for count in (1, 2, 5):
            patch.setattr(cpu_backend, "num_bins", lambda work_bytes, count=count: count)
            patch.setattr(cpu_runtime, "_launch_parallel", run_bins)
            results.append(case.copy().run("cpu"))
    assert not all(torch.equal(result, results[0]) for result in results)
