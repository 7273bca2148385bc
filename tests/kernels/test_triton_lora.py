"""Triton's grouped low-rank updates against the formula in float64, and what a captured graph relies on."""

from __future__ import annotations

import pytest
import torch

from hf_paged.kernels import triton_lora
from hf_paged.kernels.lora_matmul import LoraGroup, lora_add_
from hf_paged.kernels.triton_launch import Gpu, recording
from hf_paged.kernels.triton_lora import LoraTable, lora_add_table_
from tests.kernels.triton_support import DEVICE, TOLERANCE, poison_new_tensors

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def _nan_in_new_tensors(monkeypatch):
    poison_new_tensors(monkeypatch)


def matrices(rank, width, columns, dtype, *, bias=False, seed=0):
    generator = torch.Generator().manual_seed(1000 * seed + rank)

    def draw(*shape):
        return (torch.randn(shape, generator=generator) / 4).to(DEVICE, dtype)

    return draw(rank, width), draw(columns, rank), draw(columns) if bias else None


def inputs(rows, width, columns, dtype):
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, width + 3, generator=generator).to(DEVICE, dtype)[:, :width]  # strided rows
    return torch.randn(rows, columns, generator=generator).to(DEVICE, dtype), x


def expected(output, x, groups):
    total = output.to(torch.float64, copy=True)
    for first, end, a, b, bias, scaling, _ in groups:
        more = x[first:end].double() @ a.double().T @ b.double().T
        total[first:end] += (more + (0 if bias is None else bias.double())) * scaling
    return total


def assert_updated(actual, output, x, groups, dtype):
    wanted = expected(output, x, groups)
    size = (wanted - output.double()).abs().max()
    assert size > 1, "the updates are too small to be seen beside the tolerance"
    assert (actual.double() - wanted).abs().max() < 2 * TOLERANCE[dtype] * max(size, wanted.abs().max())


@pytest.mark.parametrize("dtype, adapters", [
    (torch.float32, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float32),
])  # fmt: skip
@pytest.mark.parametrize("width, columns", [(64, 128), (1100, 200), (37, 5)])
def test_ragged_groups_and_ranks(dtype, adapters, width, columns):
    ranges = [(0, 1), (1, 18), (18, 18), (22, 23), (25, 60)]
    groups = [
        LoraGroup(*rows, *matrices(rank, width, columns, adapters, bias=i % 2 == 0, seed=i), 0.5 + i)
        for i, (rows, rank) in enumerate(zip(ranges, [1, 4, 8, 23, 64], strict=True))
    ]
    output, x = inputs(64, width, columns, dtype)
    actual = lora_add_(output.clone(), x, groups, backend="triton")
    assert_updated(actual, output, x, groups, dtype)
    rest = torch.tensor([i for i in range(64) if not any(g.first <= i < g.end for g in groups)])
    assert torch.equal(actual[rest], output[rest])


def test_long_groups_overlapping_groups_and_two_dtypes():
    """Tiles for prompts; rows with two adapters take two rounds, as do matrices of another dtype."""
    float32, float16 = torch.float32, torch.float16
    groups = [
        LoraGroup(0, 90, *matrices(16, 96, 80, float32, seed=1), 1.0),
        LoraGroup(80, 130, *matrices(8, 96, 80, float32, seed=2), 2.0),
        LoraGroup(0, 90, *matrices(24, 96, 80, float32, seed=3), 0.5),
        LoraGroup(90, 95, *matrices(8, 96, 80, float16, seed=4), 0.5),
    ]
    output, x = inputs(130, 96, 80, float32)
    assert_updated(lora_add_(output.clone(), x, groups, backend="triton"), output, x, groups, float16)


def test_numbers_that_are_none_stay_in_their_group():
    output, x = inputs(24, 64, 96, torch.float32)
    groups = [LoraGroup(i, i + 8, *matrices(8, 64, 96, torch.float32, seed=i), 1.0) for i in (0, 8, 16)]
    groups[1].a.fill_(float("nan"))
    lora_add_(output, x, groups, backend="triton")
    assert torch.isnan(output).any(dim=1).tolist() == [8 <= row < 16 for row in range(24)]


def test_a_row_does_not_depend_on_what_else_is_in_the_step():
    output, x = inputs(40, 700, 96, torch.float32)
    a, b, _ = matrices(16, 700, 96, torch.float32)
    other = matrices(64, 700, 96, torch.float32, seed=5)
    alone = lora_add_(output[3:4].clone(), x[3:4], [LoraGroup(0, 1, a, b, None, 1.0)], backend="triton")
    groups = [LoraGroup(0, 9, a, b, None, 1.0), LoraGroup(9, 40, *other, 1.0)]
    among = lora_add_(output.clone(), x, groups, backend="triton")[3:4]
    if DEVICE.type == "cuda":
        assert torch.equal(among, alone)
    else:  # numpy, which stands for the device in the interpreter, sums small products in its own ways
        torch.testing.assert_close(among, alone, rtol=1e-5, atol=1e-5)


def test_one_captured_launch_serves_other_mixes():
    """What a replay repeats, grids, tensors and constants, is the same for all a table can hold."""
    table = LoraTable.empty(4, 20, 16, torch.float32, DEVICE)
    output, x = inputs(30, 64, 96, torch.float32)
    mixes = [
        [LoraGroup(0, 1, *matrices(8, 64, 96, torch.float32), 1.0)],
        [
            LoraGroup(4, 24, *matrices(16, 64, 96, torch.float32, bias=True, seed=2), 2.0),
            LoraGroup(24, 30, *matrices(8, 64, 96, torch.float32, seed=3), 0.5),
            LoraGroup(1, 3, *matrices(16, 64, 96, torch.float32, seed=4), 0.5),
        ],
        [],
    ]
    seen, launches = [], []
    for groups in mixes:
        table.fill(groups)
        launches.clear()
        with recording(lambda *launch: launches.append(launch), Gpu("sm_90", 132, has_fp8=True)):
            lora_add_table_(output, x, table)
        seen.append([
            (grid, [v.shape if isinstance(v, torch.Tensor) else v for v in args], constants, options)
            for _, grid, args, constants, options in launches
        ])  # fmt: skip
        actual = output.clone()
        lora_add_table_(actual, x, table)
        if groups:
            assert_updated(actual, output, x, groups, torch.float32)
        else:
            assert torch.equal(actual, output)
    assert seen[0] == seen[1] == seen[2]


def test_tables_refuse_what_they_have_no_room_for():
    a, b, _ = matrices(8, 64, 96, torch.float32)
    table = LoraTable.empty(2, 4, 16, torch.float32, DEVICE)
    fine = LoraGroup(0, 4, a, b, None, 1.0)
    for groups, message in [
        ([fine._replace(end=5)], "5 rows of rank 8; at most 4 and 16"),
        ([fine, fine], "do not overlap"),
        ([fine._replace(first=i, end=i + 1) for i in range(3)], "3 groups; at most 2"),
        ([fine._replace(a=a[:3], b=b[:, :3].contiguous())], "multiples of 8"),
        ([fine._replace(a=a.half(), b=b.half())], "must be contiguous, aligned and torch.float32"),
        ([fine._replace(b=b.T.contiguous().T)], "must be contiguous"),
    ]:
        with pytest.raises(ValueError, match=message):
            table.fill(groups)


def test_what_the_kernels_cannot_read_goes_to_products(monkeypatch):
    """Float64, and matrices that are no plain rows, are rare and still right."""
    for dtype, turn in [(torch.float64, False), (torch.float32, True)]:
        output, x = inputs(8, 64, 96, dtype)
        a, b, _ = matrices(8, 64, 96, dtype)
        if turn:
            b = b.T.contiguous().T
        groups = [LoraGroup(0, 5, a, b, None, 1.0)]
        with monkeypatch.context() as patch:
            patch.setattr(triton_lora, "lora_add_table_", None)
            actual = lora_add_(output.clone(), x, groups, backend="triton")
        assert_updated(actual, output, x, groups, torch.float32)
