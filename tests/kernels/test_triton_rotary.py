"""Rotation, store and attention as one op: Triton's two launches against the reference."""

from __future__ import annotations

import pytest
import torch

from hf_paged.kernels import ops
from tests.kernels.triton_support import DEVICE, assert_near, make_step


@pytest.mark.parametrize("rotary", [32, 16])
def test_rotary_attention_matches_the_reference(rotary):
    lengths = {"query_lens": [1, 1, 7], "seq_lens": [5, 33, 20], "num_decodes": 2}
    steps = [make_step(**lengths, heads=4, kv_heads=2, head_size=32) for _ in range(2)]
    angles = torch.rand(9, rotary // 2, generator=torch.Generator().manual_seed(1)).repeat(1, 2) * 6
    cos, sin = angles.cos().to(DEVICE), angles.sin().to(DEVICE)
    actual, expected = (
        ops.rotary_paged_attention(
            *(step.query, step.key, step.value, cos, sin, step.k_cache, step.v_cache, step.metadata),
            scale=32**-0.5,
            backend=backend,
        )
        for step, backend in zip(steps, ("triton", "reference"), strict=True)
    )
    assert_near(actual, expected, torch.float32)
    torch.testing.assert_close(steps[0].k_cache, steps[1].k_cache, equal_nan=True)
    assert torch.equal(steps[0].v_cache.nan_to_num(), steps[1].v_cache.nan_to_num())
