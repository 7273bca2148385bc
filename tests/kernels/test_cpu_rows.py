"""The CPU kernels that work row by row, RMS norm and RoPE, against float64 and against what torch would do."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from hf_paged.kernels import cpu_norm, cpu_rope, cpu_runtime

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_no_worse(ours: Tensor, theirs: Tensor, truth: Tensor) -> None:
    assert ours.dtype == theirs.dtype
    size = truth.abs().max()
    error, other = ((x.double() - truth).abs().max() / size for x in (ours, theirs))
    assert error <= max(2 * other, torch.finfo(torch.float32).eps * 4)


@pytest.fixture(params=[1, 2], ids="bins={}".format, autouse=True)
def bins(request, monkeypatch):
    for module in (cpu_norm, cpu_rope):
        monkeypatch.setattr(
            module, "num_bins", lambda work_bytes: min(request.param, cpu_runtime._numba_threads())
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (1, 5, 96), (2, 33, 768)], ids=str)
def test_rms_norm(shape, dtype):
    x, weight = random(*shape, dtype=dtype), random(shape[-1], dtype=dtype, seed=1)
    wide = x.double()
    truth = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5) * weight.double()
    assert_no_worse(cpu_norm.rms_norm(x, weight, 1e-5), F.rms_norm(x, weight.shape, weight, 1e-5), truth)


def test_rms_norm_of_what_the_kernel_does_not_take():
    x, weight = random(6, 8).t(), random(6, seed=1)
    assert torch.equal(cpu_norm.rms_norm(x, weight, 1e-5), F.rms_norm(x, weight.shape, weight, 1e-5))
    assert cpu_norm.rms_norm(random(0, 6), weight, 1e-5).shape == (0, 6)
    assert cpu_norm.rms_norm(torch.full((2, 6), float("nan")), weight, 1e-5).isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens, heads, size", [(1, 1, 2), (5, 3, 32), (17, 8, 64)])
def test_rotate(tokens, heads, size, dtype):
    packed = random(tokens, heads + 3, size, dtype=dtype)
    query, key = packed[:, 1:-2], packed[:, -2:]  # heads inside a wider row
    angles = random(tokens, size // 2, seed=2).repeat(1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def upstream(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return apply_rotary_pos_emb(x[None], x[None], cos[None], sin[None], unsqueeze_dim=2)[0][0]

    both = cpu_rope.rotate(query, key, cos, sin)
    assert both is not None
    for x, ours in zip((query, key), both, strict=True):
        assert ours.is_contiguous()
        truth = upstream(x.double(), cos.double(), sin.double())
        assert_no_worse(ours, upstream(x, cos, sin), truth)


@pytest.mark.parametrize(
    "x, cos",
    [
        (random(4, 2, 7), random(4, 7)),  # an odd size has no halves
        (random(4, 2, 8), random(4, 4)),  # partial rotary
        (random(4, 2, 8), random(4, 8, dtype=torch.bfloat16)),
        (random(4, 8, 2).transpose(1, 2), random(4, 8)),
        (random(4, 2, 8, dtype=torch.float64), random(4, 8, dtype=torch.float64)),
    ],
    ids=["odd", "partial", "dtypes", "strided", "float64"],
)
def test_rotate_says_what_it_does_not_take(x, cos):
    assert cpu_rope.rotate(x, x, cos, cos) is None
