"""An int8 cache: what is stored, what is read, and the backends against each other.

The truth is float64 attention over the numbers that the cache stands for, so that the kernels are judged apart from
the quantisation; what that costs has a test of its own.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hf_paged.kernels import cpu_backend, cpu_runtime, ops, reference
from hf_paged.kernels.attention_weights import attention_weights
from hf_paged.kernels.quantised import dequantise, quantise, quantised
from tests.kernels.paged_case import make_case

#: Decodes, queries attended row by row, and longer ones: alone, in equal neighbours, and after cached tokens.
MIXED = [(1, 1), (1, 17), (1, 300), (3, 3), (8, 40), (33, 33), (40, 40), (40, 40), (20, 100), (64, 65)]
NAN = float("nan")


def int8_case(lengths, **options):
    """A case over an int8 cache: (case, its scales). Slots without a token have the scale NaN."""
    case = make_case(lengths, **options)
    (k_cache, k_scales), (v_cache, v_scales) = quantise(case.k_cache), quantise(case.v_cache)
    return replace(case, k_cache=k_cache, v_cache=v_cache), {"k_scales": k_scales, "v_scales": v_scales}


def clone(scales):
    return {name: tensor.clone() for name, tensor in scales.items()}


def truth(case, scales, **options):
    """Float64 attention over what the cache stands for, the step's own tokens quantised too."""
    case = replace(
        case,
        key=quantised(case.key, torch.int8),
        value=quantised(case.value, torch.int8),
        k_cache=dequantise(case.k_cache, scales["k_scales"]),
        v_cache=dequantise(case.v_cache, scales["v_scales"]),
    )
    return case.truth(**options)


def check(backend, case, scales, *, atol=1e-5, **options):
    expected = truth(case, scales, **options)
    stored = case.copy(), clone(scales)
    tensors = (stored[0].k_cache, stored[0].v_cache, case.slot_mapping)
    stored[0].k_cache.copy_(case.k_cache)
    reference.store_kv(case.key, case.value, *tensors, **stored[1])
    actual = case.run(backend, **options, **scales)
    assert actual.dtype == case.query.dtype
    torch.testing.assert_close(actual.double(), expected, atol=atol, rtol=0)
    # What is stored is bit for bit what the reference stores, and no other slot was touched.
    assert torch.equal(case.k_cache, stored[0].k_cache)
    assert torch.equal(case.v_cache, stored[0].v_cache)
    for name, tensor in scales.items():
        assert torch.equal(tensor.nan_to_num(-1), stored[1][name].nan_to_num(-1))


@pytest.fixture(params=[1, 3], ids="bins={}".format)
def bins(request, monkeypatch):
    monkeypatch.setattr(cpu_backend, "num_bins", lambda work_bytes: request.param)
    monkeypatch.setattr(
        cpu_runtime,
        "_launch_parallel",
        lambda kernel, bins, arguments: cpu_runtime.kernel_module("cpu_bins").run_bins(
            bins, kernel.address, arguments
        ),
    )
    return request.param


@pytest.mark.parametrize("kv_heads, group, head_size", [(4, 1, 64), (2, 3, 40), (1, 8, 80)])
def test_attention_at_every_edge(kv_heads, group, head_size, bins):
    sizes = {"kv_heads": kv_heads, "group": group, "head_size": head_size}
    check("cpu", *int8_case([(1, n) for n in (1, 3, 4, 5, 16, 17, 63, 64, 65, 257)], **sizes))
    check("cpu", *int8_case(MIXED, **sizes, block_size=8))


@pytest.mark.parametrize(
    "options",
    [
        {"sliding_window": 13},
        {"softcap": 0.5},
        {"sliding_window": 20, "softcap": 2.0, "sinks": torch.tensor([0.5, -30.0, 30.0, 0.0])},
    ],
    ids=lambda options: "+".join(options),
)
def test_options(options):
    check("cpu", *int8_case(MIXED, group=2), **options)
    check("reference", *int8_case([(1, 30), (5, 40)], group=2), **options)


def test_before_the_kernels_are_loaded(monkeypatch):
    monkeypatch.setattr(cpu_runtime, "is_loading", lambda key: key == torch.int8)
    check("cpu", *int8_case(MIXED, group=2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_queries(dtype):
    case, scales = int8_case(MIXED, group=2, dtype=dtype)
    check("cpu", case, scales, atol=2e-2 if dtype == torch.bfloat16 else 2e-3)


def test_float32_attention_is_near():
    """Half a step of 127 in each number of a key: what that does to a result is bounded, and small."""
    case, scales = int8_case(MIXED, kv_heads=4, head_size=64)
    case.key, case.value = case.key.clone(), case.value.clone()
    exact = make_case(MIXED, kv_heads=4, head_size=64).truth()
    output = case.run("cpu", **scales).double()
    assert (output - exact).abs().max() < 0.05
    assert ((output - exact).norm() / exact.norm()) < 0.01


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_row_has_the_same_bits_in_prefill_chunk_and_decode(deterministic, bins):
    """Deterministic; else the same numbers to a few last digits."""
    total = 70
    whole, scales = int8_case([(total, total)], group=2)
    metadata = whole.metadata()
    metadata.deterministic = deterministic
    expected = whole.run("cpu", metadata=metadata, **scales)
    for first, last in [(total - 1, total), (40, 60), (3, total)]:
        part = replace(
            whole,
            lengths=[(last - first, last)],
            **{n: getattr(whole, n)[first:last] for n in ("query", "key", "value", "slot_mapping")},
        )
        metadata = part.metadata()
        metadata.deterministic = deterministic
        output = part.run("cpu", metadata=metadata, **clone(scales))
        if deterministic:
            assert torch.equal(output, expected[first:last])
        else:
            torch.testing.assert_close(output, expected[first:last], atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_stored(backend, dtype):
    key = torch.randn(6, 3, 40).to(dtype)
    key[1, 2] = 0.0
    key[2, 0] = 2.0**-110
    key[3, 1, 5] = NAN
    key[4, 0, 0] = -torch.inf
    k_cache, v_cache = torch.full((2, 2, 8, 3, 40), 77, dtype=torch.int8)
    k_scales, v_scales = torch.full((2, 2, 8, 3), -7.0)
    slots = torch.tensor([3, 8, 0, 15, 9, -1])
    scales = {"k_scales": k_scales, "v_scales": v_scales}
    ops.store_kv(key, -key, k_cache, v_cache, slots, backend=backend, **scales)
    back = dequantise(k_cache.flatten(0, 1)[slots[:5]], k_scales.flatten(0, 1)[slots[:5]])
    step = key.float().abs().amax(-1, keepdim=True) / 127
    for token, head in [(0, 0), (0, 1), (1, 0), (1, 2), (2, 0), (3, 0), (4, 1)]:
        error = (back[token, head] - key[token, head].float()).abs()
        assert (error <= (0.5 + 1e-4) * step[token, head]).all() or error.max() < 2.0**-100
    assert back[3, 1].isnan().all()
    assert back[4, 0].isnan().all()
    assert (back[1, 2] == 0).all()
    assert torch.equal(v_cache.flatten(0, 1)[slots[:5]], -k_cache.flatten(0, 1)[slots[:5]])
    untouched = torch.ones(16, dtype=torch.bool)
    untouched[slots[:5]] = False
    assert (k_cache.flatten(0, 1)[untouched] == 77).all()
    assert (v_scales.flatten(0, 1)[untouched] == -7).all()


def test_ties_round_to_even_and_the_largest_is_127():
    x = torch.tensor([[127.0, 0.5, 1.5, -0.5, -2.5, -127.0]])
    integers, scales = quantise(x)
    assert (integers.tolist(), scales.tolist()) == ([[127, 0, 2, 0, -2, -127]], [1.0])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_copying_blocks_takes_scales_along(backend):
    case, scales = int8_case([(1, 60)])
    before = case.k_cache.clone(), scales["v_scales"].clone()
    src, dst = torch.tensor([0, 1]), torch.tensor([1, 2])
    ops.copy_blocks(case.k_cache, case.v_cache, src, dst, backend=backend, **scales)
    assert torch.equal(case.k_cache[[1, 2]], before[0][[0, 1]])
    assert torch.equal(scales["v_scales"][[1, 2]].nan_to_num(-1), before[1][[0, 1]].nan_to_num(-1))


def test_attention_weights_read_the_scales():
    case, scales = int8_case([(2, 20)], group=2)
    case.run("cpu", **scales)
    seen = attention_weights(
        case.query, case.k_cache, case.metadata(), 0, 2, scale=0.2, k_scales=scales["k_scales"]
    )
    wide = dequantise(case.k_cache, scales["k_scales"])
    expected = attention_weights(case.query, wide, case.metadata(), 0, 2, scale=0.2)
    torch.testing.assert_close(seen, expected)


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda s: s.pop("k_scales"), "k_scales none with a cache of torch.int8"),
        (lambda s: s.update(v_scales=s["v_scales"][:1]), "v_scales of dtype torch.float32 and shape"),
        (lambda s: s.update(v_scales=s["v_scales"].half()), "v_scales of dtype torch.float16"),
    ],
)
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_bad_scales_are_named(spoil, words, backend):
    case, scales = int8_case([(1, 20)])
    spoil(scales)
    with pytest.raises(ValueError, match=words):
        case.run(backend, **scales)


def test_scales_without_int8_and_a_cache_of_fp8_are_refused():
    case, scales = make_case([(1, 20)]), int8_case([(1, 20)])[1]
    with pytest.raises(ValueError, match=r"k_scales .* with a cache of torch\.float32; expected none"):
        case.run("cpu", **scales)
    case.k_cache, case.v_cache = (x.to(torch.float8_e4m3fn) for x in (case.k_cache, case.v_cache))
    with pytest.raises(ValueError, match=r"k_cache of dtype torch\.float8_e4m3fn; supported"):
        case.run("cpu", k_scales=torch.ones(2), v_scales=torch.ones(2))
