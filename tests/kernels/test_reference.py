"""The reference against attention written out number by number, and the corners of its contract."""

from __future__ import annotations

import math

import pytest
import torch

from hf_paged.kernels import ops
from tests.kernels.paged_case import PagedCase, make_case


def attend_by_hand(case: PagedCase, scale: float, window=None, softcap=None, sinks=None) -> torch.Tensor:
    """[T, H, D] by loops over tokens, heads and keys; the caches must hold the new tokens already."""
    output = torch.zeros(case.query.shape, dtype=torch.float64)
    group = case.query.shape[1] // case.key.shape[1]
    block_size = case.k_cache.shape[1]
    token = 0
    for index, (new, total) in enumerate(case.lengths):
        for position in range(total - new, total):
            for head in range(case.query.shape[1]):
                first = 0 if window is None else max(0, position - window + 1)
                logits, values = [], []
                for seen in range(first, position + 1):
                    block = case.block_tables[index, seen // block_size]
                    key = case.k_cache[block, seen % block_size, head // group]
                    logit = float(case.query[token, head].double() @ key.double()) * scale
                    logits.append(logit if softcap is None else softcap * math.tanh(logit / softcap))
                    values.append(case.v_cache[block, seen % block_size, head // group].double())
                weights = [math.exp(logit) for logit in logits]
                total_weight = sum(weights) + (0.0 if sinks is None else math.exp(float(sinks[head])))
                output[token, head] = sum(w * v for w, v in zip(weights, values, strict=True)) / total_weight
            token += 1
    return output


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"sliding_window": 1},
        {"sliding_window": 4},
        {"softcap": 1.5},
        {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
        {"sliding_window": 3, "softcap": 2.0, "sinks": torch.zeros(4)},
    ],
)
def test_equals_attention_by_hand(options):
    case = make_case([(1, 1), (1, 9), (4, 4), (3, 7)], kv_heads=2, group=2, head_size=4, block_size=4)
    case = case.copy(torch.float64)
    actual = case.run("reference", scale=0.7, **options)
    renamed = {"window" if name == "sliding_window" else name: value for name, value in options.items()}
    torch.testing.assert_close(actual, attend_by_hand(case, 0.7, **renamed), atol=1e-12, rtol=0)


def test_float32_is_close_to_float64():
    case = make_case([(1, 40), (30, 50)], group=3)
    torch.testing.assert_close(case.run("reference").double(), case.truth(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_store_kv_skips_slot_minus_one_and_leaves_other_slots(backend):
    key, value = torch.randn(3, 2, 8), torch.randn(3, 2, 8)
    k_cache, v_cache = torch.full((2, 4, 2, 8), 7.0), torch.full((2, 4, 2, 8), 8.0)
    ops.store_kv(key, value, k_cache, v_cache, torch.tensor([6, -1, 1]), backend=backend)
    expected_k, expected_v = torch.full((8, 2, 8), 7.0), torch.full((8, 2, 8), 8.0)
    expected_k[[6, 1]], expected_v[[6, 1]] = key[[0, 2]], value[[0, 2]]
    assert torch.equal(k_cache.flatten(0, 1), expected_k)
    assert torch.equal(v_cache.flatten(0, 1), expected_v)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_store_kv_casts_to_the_cache_dtype(backend):
    key, value = torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    k_cache, v_cache = (torch.zeros(1, 4, 1, 8, dtype=torch.bfloat16) for _ in range(2))
    ops.store_kv(key, value, k_cache, v_cache, torch.tensor([0, 3]), backend=backend)
    assert torch.equal(k_cache[0, [0, 3]], key.bfloat16())
    assert torch.equal(v_cache[0, [0, 3]], value.bfloat16())


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_copy_blocks_reads_all_sources_before_writing(backend):
    k_cache, v_cache = torch.randn(5, 4, 1, 8), torch.randn(5, 4, 1, 8)
    k_before, v_before = k_cache.clone(), v_cache.clone()
    ops.copy_blocks(k_cache, v_cache, torch.tensor([0, 1, 1]), torch.tensor([1, 2, 4]), backend=backend)
    assert torch.equal(k_cache, k_before[[0, 0, 1, 3, 1]])
    assert torch.equal(v_cache, v_before[[0, 0, 1, 3, 1]])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_rows_without_keys_are_zero(backend):
    """Padding rows: a sequence of length 0 with slot -1, and tokens after the last sequence."""
    case = make_case([(1, 5), (1, 1)])
    case.lengths[1] = (1, 0)
    case.slot_mapping[1] = -1
    extra = torch.randn(1, 2, 32)
    case.query, case.key, case.value = (torch.cat([x, extra]) for x in (case.query, case.key, case.value))
    case.slot_mapping = torch.cat([case.slot_mapping, torch.tensor([-1])])
    output = case.run(backend)
    assert torch.equal(output[1:], torch.zeros(2, 2, 32))
    assert output[0].abs().min() > 0
