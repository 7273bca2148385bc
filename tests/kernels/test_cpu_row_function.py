"""Norms and activations row by row: near the truth, and the same bits wherever a row lies."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_paged.kernels.cpu_row_function import row_gelu_tanh, row_layer_norm, row_rms_norm, row_silu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 96, 771]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return (2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))).to(dtype)


def pair(name: str, size: int, dtype: torch.dtype):
    """Our function and torch's, of x alone."""
    weight, bias = random(size, dtype=dtype, seed=1), random(size, dtype=dtype, seed=2)
    wide = weight.double(), bias.double()
    return {
        "silu": (row_silu, F.silu),
        "gelu_tanh": (row_gelu_tanh, functools.partial(F.gelu, approximate="tanh")),
        "layer_norm": (
            lambda x: row_layer_norm(x, weight, bias, 1e-5),
            lambda x: F.layer_norm(x, (size,), *(wide if x.dtype == torch.float64 else (weight, bias)), 1e-5),
        ),
        "bare_norm": (
            lambda x: row_layer_norm(x, None, None, 1e-5),
            lambda x: F.layer_norm(x, (size,), None, None, 1e-5),
        ),
        "rms_norm": (
            lambda x: row_rms_norm(x, weight, 1e-5),
            lambda x: F.rms_norm(x, (size,), wide[0] if x.dtype == torch.float64 else weight, 1e-5),
        ),
    }[name]


NAMES = ["silu", "gelu_tanh", "layer_norm", "bare_norm", "rms_norm"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_near_the_truth(name, size, dtype):
    ours, theirs = pair(name, size, dtype)
    x = random(3, 11, size, dtype=dtype)
    truth = theirs(x.double())
    scale = truth.abs().max().clamp(min=1)
    error, other = ((y.double() - truth).abs().max() / scale for y in (ours(x), theirs(x)))
    assert ours(x).shape == x.shape
    assert ours(x).dtype == dtype
    assert error <= max(2 * other, 8 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", NAMES)
def test_a_row_is_the_same_wherever_it_lies(name, size, dtype):
    ours, _ = pair(name, size, dtype)
    x = random(600, size, dtype=dtype)
    together = ours(x)
    for first, end in [(0, 1), (1, 2), (5, 8), (299, 302), (599, 600), (1, 599)]:
        assert torch.equal(ours(x[first:end]), together[first:end])


def test_torch_fails_the_same_check():
    x = random(600, 771)
    together = F.silu(x)
    assert not all(torch.equal(F.silu(x[i : i + 1]), together[i : i + 1]) for i in range(600))


@pytest.mark.parametrize("function", [row_silu, row_gelu_tanh])
def test_extremes(function):
    x = torch.tensor([[0.0, -0.0, 1e30, -1e30, 88.0, -88.0, float("inf"), 1e-30]])
    expected = F.silu(x) if function is row_silu else F.gelu(x, approximate="tanh")
    torch.testing.assert_close(function(x), expected)
    assert function(torch.tensor([[float("nan")]])).isnan().all()
    assert function(torch.empty(1, 0, 8)).shape == (1, 0, 8)


def test_parameters_of_another_dtype_raise():
    with pytest.raises(ValueError, match="row kernels"):
        row_rms_norm(random(2, 8), random(8, dtype=torch.bfloat16), 1e-5)
