"""`argmax_rows` is `torch.argmax`, bit for bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_paged.kernels.cpu_argmax import argmax_rows

INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (0, 7), (3, 5), (17, 4095), (5, 4096), (5, 4097), (70, 9001)])
def test_equals_torch(dtype, shape):
    logits = torch.randn(shape).to(dtype)
    assert torch.equal(argmax_rows(logits), logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "row",
    [
        [1.0, 2.0, 2.0],
        [-0.0, 0.0],
        [0.0, -0.0],
        [-INF, -INF],
        [INF, 3.0, INF],
        [1.0, NAN, INF, NAN],
        [INF, -NAN, NAN],
        [-1.0, -2.0, -0.5],
        [-INF, -65000.0],
    ],
)
def test_ties_zeros_infinities_and_nan(dtype, row):
    logits = torch.tensor([row, row[::-1]], dtype=dtype)
    assert torch.equal(argmax_rows(logits), logits.argmax(-1))


@given(st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=40), st.integers(0, 5000))
@settings(deadline=None, max_examples=60)
def test_any_row(values, lead):
    logits = torch.tensor([[-INF] * lead + values])
    assert torch.equal(argmax_rows(logits), logits.argmax(-1))


def test_strided_rows():
    logits = torch.randn(20, 300)
    assert torch.equal(argmax_rows(logits[::3]), logits[::3].argmax(-1))
    assert torch.equal(argmax_rows(logits[:, 10:90]), logits[:, 10:90].argmax(-1))
    assert torch.equal(argmax_rows(logits.t()), logits.t().argmax(-1))


def test_other_dtypes_are_torchs():
    logits = torch.randn(4, 50, dtype=torch.float64)
    assert torch.equal(argmax_rows(logits), logits.argmax(-1))


@pytest.mark.parametrize("shape", [(3,), (2, 0), (1, 2, 3)])
def test_wrong_shapes(shape):
    with pytest.raises(ValueError, match=r"argmax_rows: logits of shape"):
        argmax_rows(torch.zeros(shape))
