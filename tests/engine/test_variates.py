"""Variates of some rows are those of a whole draw, bit for bit, and leave the generator where that leaves it."""

from __future__ import annotations

import math

import pytest
import torch

from hf_paged.engine import variates


def generator(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 1024), (2, 50257)])
def test_rows_of_a_draw(shape: tuple[int, int]) -> None:
    theirs, ours, some = generator(), generator(), generator()
    rows = list(range(0, shape[0], 2))[::-1]
    for _ in range(2):
        whole = torch.empty(shape).exponential_(generator=theirs)
        assert torch.equal(variates.exponential(shape, torch.float32, ours), whole)
        assert torch.equal(variates.exponential_rows(rows, shape, torch.float32, some), whole[rows])
        assert torch.equal(ours.get_state(), theirs.get_state())
        assert torch.equal(some.get_state(), theirs.get_state())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_drawn_plainly(dtype: torch.dtype) -> None:
    whole = torch.empty((4, 9), dtype=dtype).exponential_(generator=generator())
    assert torch.equal(variates.exponential((4, 9), dtype, generator()), whole)
    assert torch.equal(variates.exponential_rows([3, 0], (4, 9), dtype, generator()), whole[[3, 0]])


def test_a_torch_that_makes_them_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.empty((4, 9)).exponential_(generator=generator())
    monkeypatch.setattr(variates, "uniform_rows", lambda rows, shape, generator: None)
    monkeypatch.setattr(variates, "_uniforms", lambda shape, generator: torch.zeros(shape).double())
    variates._makes_them_of_uniforms.cache_clear()
    try:
        assert not variates._makes_them_of_uniforms()
        assert torch.equal(variates.exponential_rows([1], (4, 9), torch.float32, generator()), whole[[1]])
    finally:
        variates._makes_them_of_uniforms.cache_clear()


@pytest.mark.parametrize("units", [-3, -1, 0, 1, 3])
def test_logarithms_that_are_a_little_off_round_to_the_same(units: int) -> None:
    """Near the middle between two float32 a unit in the last place of float64 decides."""
    source = torch.rand(200, generator=generator(), dtype=torch.float64) * 4 + 1e-3
    middles = (source.view(torch.int64) & ~((1 << 29) - 1) | (1 << 28)).view(torch.float64)
    uniforms = -torch.expm1(-middles)
    exact = torch.tensor([-math.log1p(-u) for u in uniforms.tolist()], dtype=torch.float64)
    off = (exact.view(torch.int64) + units).view(torch.float64)
    assert units in (-1, 0, 1) or (off.float() != exact.float()).any(), "nothing here is decided by a unit"
    assert torch.equal(variates._rounded(off[None], -uniforms[None])[0], exact.float())
