"""Linear layers whose rows do not depend on each other: near the truth, and the same bits in any company."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_paged.kernels import cpu_row_linear, cpu_runtime
from hf_paged.kernels.cpu_row_linear import row_linear
from tests.helpers import ROOT

#: dtype, and whether bfloat16 goes by the processor's instruction for pairs.
KINDS = [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True), (torch.float16, False)]
#: (K, N) around the borders of vectors (16), tiles (4 and 64 columns) and depths (512).
SHAPES = [(1, 1), (5, 3), (16, 4), (33, 37), (96, 64), (520, 80), (1030, 131)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_weight(size: int, columns: int, layout: str, dtype: torch.dtype) -> Tensor:
    """[N, K], as `nn.Linear` keeps it or as the transpose of what `Conv1D` keeps."""
    weight = random(columns, size, dtype=dtype, seed=1)
    return weight if layout == "linear" else weight.t().contiguous().t()


@pytest.fixture
def dtype(request, monkeypatch):
    dtype, in_pairs = request.param
    if in_pairs and not cpu_row_linear._adds_pairs():
        pytest.skip("this processor has no instruction for pairs")
    monkeypatch.setattr(cpu_row_linear, "_adds_pairs", lambda: in_pairs)
    return dtype


@pytest.fixture(params=[1, 2, 3], ids="bins={}".format)
def bins(request, monkeypatch):
    monkeypatch.setattr(cpu_row_linear, "num_bins", lambda work_bytes: request.param)
    monkeypatch.setattr(
        cpu_runtime,
        "_launch_parallel",
        lambda kernel, count, arguments: [kernel.run(i, count, arguments) for i in range(count)],
    )


@pytest.mark.parametrize("dtype", KINDS, indirect=True, ids=str)
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
def test_every_number_of_rows(layout, dtype):
    """A compiler may make a loop of its own for one of them."""
    weight, bias = make_weight(70, 150, layout, dtype), random(150).to(dtype)
    x = random(70, 70, dtype=dtype, seed=2)
    truth = F.linear(x.double(), weight.double(), bias.double())
    alone = torch.cat([row_linear(x[i : i + 1], weight, bias) for i in range(len(x))])
    assert (alone.double() - truth).abs().max() < (1e-4 if dtype is torch.float32 else 0.3)
    for rows in range(1, len(x) + 1):
        assert torch.equal(row_linear(x[:rows], weight, bias), alone[:rows]), rows


@pytest.mark.parametrize("dtype", KINDS, indirect=True, ids=str)
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("size, columns", SHAPES)
def test_near_the_truth(size, columns, layout, dtype, bins):
    x, weight, bias = (
        random(2, 5, size, dtype=dtype),
        make_weight(size, columns, layout, dtype),
        random(columns),
    )
    bias = bias.to(dtype)
    truth = F.linear(x.double(), weight.double(), bias.double())
    ours, theirs = row_linear(x, weight, bias), F.linear(x, weight, bias)
    assert ours.shape == theirs.shape
    assert ours.dtype == dtype
    scale = truth.abs().max()
    error, other = ((y.double() - truth).abs().max() / scale for y in (ours, theirs))
    assert error <= max(2 * other, size * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", KINDS, indirect=True, ids=str)
@pytest.mark.parametrize("layout", ["linear", "conv1d"])
@pytest.mark.parametrize("size, columns", SHAPES)
def test_a_row_is_the_same_alone_and_beside_any_others(size, columns, layout, dtype, bins):
    x, weight = random(135, size, dtype=dtype), make_weight(size, columns, layout, dtype)
    together = row_linear(x, weight, None)
    for first, end in [(0, 1), (134, 135), (3, 8), (7, 9), (63, 66), (1, 134)]:
        assert torch.equal(row_linear(x[first:end], weight, None), together[first:end])
    order = torch.randperm(135, generator=torch.Generator().manual_seed(2))
    assert torch.equal(row_linear(x[order], weight, None), together[order])


def test_threads_and_bins_change_no_bit(monkeypatch):
    x, weight = random(70, 520), make_weight(520, 200, "conv1d", torch.float32)
    results = []
    for count in (1, 2, 3, 7):
        monkeypatch.setattr(cpu_row_linear, "num_bins", lambda work_bytes, count=count: count)
        monkeypatch.setattr(
            cpu_runtime,
            "_launch_parallel",
            lambda kernel, count, arguments: [kernel.run(i, count, arguments) for i in range(count)],
        )
        results.append(row_linear(x, weight, None))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_users_default_dtype_is_not_that_of_its_memory(default_dtype):
    x, weight = (torch.randn(rows, 70, dtype=torch.float32) for rows in (9, 150))
    output = row_linear(x, weight, None)
    assert output.dtype is torch.float32
    assert torch.allclose(output.double(), F.linear(x.double(), weight.double()), atol=1e-4)


def test_torch_fails_the_same_check():
    # Else this machine's library would make the kernels needless, and the test above would show nothing.
    x, weight = random(135, 1030), make_weight(1030, 131, "linear", torch.float32)
    together = F.linear(x, weight)
    assert not all(torch.equal(F.linear(x[i : i + 1], weight), together[i : i + 1]) for i in range(135))


def test_no_rows_and_numbers_that_are_none():
    weight = make_weight(33, 37, "linear", torch.float32)
    assert row_linear(random(1, 0, 33), weight, None).shape == (1, 0, 37)
    x = random(6, 33)
    clean = row_linear(x, weight, None)
    x[2] = float("nan")
    assert torch.equal(row_linear(x, weight, None)[3:], clean[3:])
    assert row_linear(x, weight, None)[2].isnan().all()


@pytest.mark.parametrize(
    "x, weight, bias",
    [
        (random(2, 8), random(4, 8, dtype=torch.bfloat16), None),
        (random(2, 8), random(4, 8), random(4, dtype=torch.bfloat16)),
        (random(2, 8), random(8, 16)[::2, ::2], None),
        (random(2, 8, dtype=torch.float64), random(4, 8, dtype=torch.float64), None),
    ],
    ids=["dtypes", "bias", "strided", "float64"],
)
def test_what_is_not_taken_raises(x, weight, bias):
    with pytest.raises(ValueError, match="row_linear"):
        row_linear(x, weight, bias)


_CACHED = """
import sys, torch
from hf_paged.kernels import cpu_row_linear
from tests.kernels.test_cpu_row_linear import SHAPES, make_weight, random
sums = []
for dtype in (torch.float32, torch.bfloat16):
    for size, columns in [*SHAPES, (5, 2), (9, 4), (70, 66)]:
        for layout in ("linear", "conv1d"):
            x, weight = random(7, size, dtype=dtype), make_weight(size, columns, layout, dtype)
            result = cpu_row_linear.row_linear(x, weight, None)
            error = (result.double() - x.double() @ weight.double().t()).abs().max()
            assert error <= 0.01 * size, (dtype, size, columns, layout, error)
            sums.append(result.double().sum().item())
print(sums)
"""


def test_kernels_from_the_cache_are_the_kernels_that_were_compiled(tmp_path):
    # A helper that is not inlined exists twice, and the two processes would run one each.
    runs = [
        subprocess.run(
            [sys.executable, "-c", _CACHED],
            env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)},
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        for _ in range(2)
    ]
    assert [run.returncode for run in runs] == [0, 0], runs[-1].stderr
    assert runs[0].stdout == runs[1].stdout
    assert list(tmp_path.rglob("*.nbc"))
