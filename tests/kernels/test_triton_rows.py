"""Triton's row-wise ops against torch and upstream's modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from hf_paged.kernels.triton_activation import gelu, silu_mul
from hf_paged.kernels.triton_layer_norm import layer_norm
from hf_paged.kernels.triton_rms_norm import rms_norm
from tests.kernels.triton_support import DEVICE, assert_near, poison_new_tensors

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DTYPES = [torch.float32, torch.float16]
WIDTHS = [1, 16, 48, 768, 1600]


@pytest.fixture(autouse=True)
def _nan_in_new_tensors(monkeypatch):
    poison_new_tensors(monkeypatch)


def rows(width: int, dtype: torch.dtype, count: int = 3) -> list[torch.Tensor]:
    """Strided [count, width] tensors away from zero mean, cut from one."""
    torch.manual_seed(width)
    return list((torch.randn(count, 4 * width, device=DEVICE) * 2 + 1).to(dtype).chunk(4, dim=1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("with_residual", [False, True])
def test_rms_norm_matches_llama(dtype, width, with_residual):
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, residual, weights, _ = rows(width, dtype)
    module = LlamaRMSNorm(width, eps=1e-5).to(DEVICE, dtype)
    module.weight.data = weights[0].clone()
    total = x + residual if with_residual else x
    actual, actual_total = rms_norm(x, module.weight.data, 1e-5, residual if with_residual else None)
    assert_near(actual, module(total), dtype, factor=4)
    assert torch.equal(actual_total, total)
    assert (actual_total is x) is not with_residual


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("with_bias, with_residual", [(True, True), (True, False), (False, True)])
def test_layer_norm_matches_torch(dtype, width, with_bias, with_residual):
    x, residual, weights, biases = rows(width, dtype)
    weight, bias = weights[0], biases[0] if with_bias else None
    total = x + residual if with_residual else x
    actual, actual_total = layer_norm(x, weight, bias, 1e-5, residual if with_residual else None)
    expected = F.layer_norm(
        total.double(), (width,), weight.double(), None if bias is None else bias.double(), 1e-5
    )
    assert_near(actual, expected, dtype, factor=4)
    assert torch.equal(actual_total, total)


def test_layer_norm_of_rows_far_from_zero():
    """The variance of large numbers close together survives float32."""
    x = 1000.0 + torch.linspace(-0.5, 0.5, 64, device=DEVICE)[None]
    one = torch.ones(64, device=DEVICE)
    actual, _ = layer_norm(x, one, None, 1e-5)
    assert_near(actual, F.layer_norm(x.double(), (64,), eps=1e-5), torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 96, 1025, 3072])
def test_silu_mul_matches_torch(dtype, width):
    gate, up, _, _ = rows(width, dtype)
    gate[0, 0] = -120.0
    assert_near(silu_mul(gate, up), F.silu(gate) * up, dtype, factor=2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_gelu_matches_torch(dtype, approximate):
    x = torch.linspace(-60, 60, 1025, device=DEVICE).to(dtype).repeat(2, 2)[:, :1025]
    assert_near(gelu(x, approximate), F.gelu(x.double(), approximate=approximate), dtype)


def test_no_rows():
    x = torch.zeros(0, 16, device=DEVICE)
    weight = torch.ones(16, device=DEVICE)
    assert rms_norm(x, weight, 1e-5)[0].shape == (0, 16)
    assert layer_norm(x, weight, weight, 1e-5)[0].shape == (0, 16)
    assert silu_mul(x, x).shape == gelu(x).shape == (0, 16)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda x, w: rms_norm(x.double(), w, 1e-5),
            "rms_norm: x of dtype float64; supported: float32, bfloat16, float16",
        ),
        (lambda x, w: rms_norm(x, w[:3], 1e-5), r"rms_norm: weight of shape \(3,\); must be \[16\]"),
        (lambda x, w: layer_norm(x, w, w, 1e-5, x.half()), "layer_norm: residual torch.float16"),
        (lambda x, w: layer_norm(x[0], w, w, 1e-5), r"layer_norm: x of shape \(16,\)"),
        (lambda x, w: rms_norm(x.T, w[:2], 1e-5), "rms_norm: x with strides"),
        (lambda x, w: rms_norm(torch.zeros(1, 32769, device=DEVICE), w, 1e-5), "C from 1 to 32768"),
        (lambda x, w: silu_mul(x, x[:1]), "silu_mul: gate torch.float32"),
        (lambda x, w: gelu(x, "sigmoid"), "gelu: approximate='sigmoid'; supported: 'none' and 'tanh'"),
        (lambda x, w: gelu(x.to("meta")), "gelu: tensors on 'meta'; the Triton kernels run on CUDA and ROCm"),
        (lambda x, w: rms_norm(x, w.to("meta"), 1e-5), "rms_norm: weight on 'meta', others on"),
    ],
)
def test_errors_name_the_op_and_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.zeros(2, 16, device=DEVICE), torch.ones(16, device=DEVICE))
