"""Grouped low-rank updates: every backend against the formula in float64, over ragged groups and ranks."""

from __future__ import annotations

import pytest
import torch

from hf_paged.kernels.lora_matmul import LoraGroup, lora_add_

ROWS, WIDTH, OUT = 23, 40, 56
#: Ranges of rows: neighbours, a gap, an empty one, one within another.
RANGES = [(0, 1), (1, 9), (9, 9), (12, 20), (14, 16), (20, 23)]
RANKS = [1, 4, 8, 7, 16, 64]


def case(
    dtype: torch.dtype, adapter_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, list[LoraGroup]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    groups = [
        LoraGroup(
            first,
            end,
            draw(rank, WIDTH).to(adapter_dtype),
            draw(OUT, rank).to(adapter_dtype),
            draw(OUT).to(adapter_dtype) if i % 2 else None,
            0.5 + i,
        )
        for i, ((first, end), rank) in enumerate(zip(RANGES, RANKS, strict=True))
    ]
    return draw(ROWS, OUT).to(dtype), draw(ROWS, WIDTH).to(dtype), groups


def expected(output: torch.Tensor, x: torch.Tensor, groups: list[LoraGroup]) -> torch.Tensor:
    total = output.double()
    for first, end, a, b, bias, scaling in groups:
        total[first:end] += (
            x[first:end].double() @ a.double().T @ b.double().T + (0 if bias is None else bias.double())
        ) * scaling
    return total


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize(
    "dtype, adapter_dtype, atol",
    [
        (torch.float32, torch.float32, 1e-3),
        (torch.float64, torch.float64, 1e-9),
        (torch.bfloat16, torch.float32, 8.0),
        (torch.bfloat16, torch.bfloat16, 16.0),
    ],
)
def test_equals_the_formula(
    backend: str, dtype: torch.dtype, adapter_dtype: torch.dtype, atol: float
) -> None:
    output, x, groups = case(dtype, adapter_dtype)
    wanted = expected(output, x, groups)
    untouched = output[9:12].clone()
    assert lora_add_(output, x, groups, backend=backend) is output
    assert (output.double() - wanted).abs().max() < atol
    assert torch.equal(output[9:12], untouched)
    assert wanted.abs().max() > 100, "the updates are too small to be seen beside the tolerance"


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_numbers_of_one_group_stay_in_it(backend: str) -> None:
    output, x, groups = case(torch.float32, torch.float32)
    groups[1].a.fill_(float("nan"))
    lora_add_(output, x, groups, backend=backend)
    bad = torch.isnan(output).any(dim=1)
    assert bad.tolist() == [1 <= row < 9 for row in range(ROWS)]


def test_under_autocast_products_are_in_its_dtype() -> None:
    output, x, groups = case(torch.float32, torch.float32)
    exact = expected(output, x, groups)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lora_add_(output, x, groups, backend="cpu")
    error = (output.double() - exact).abs().max()
    assert 1e-2 < error < 16


@pytest.mark.parametrize(
    "change, message",
    [
        ({"a": torch.zeros(4, WIDTH + 1)}, "must be"),
        ({"b": torch.zeros(OUT, 5)}, "must be"),
        ({"end": ROWS + 1}, "rows"),
        ({"first": -1}, "rows"),
    ],
)
def test_bad_groups_are_refused(change: dict, message: str) -> None:
    output, x, groups = case(torch.float32, torch.float32)
    before = output.clone()
    with pytest.raises(ValueError, match=message):
        lora_add_(output, x, [groups[1]._replace(**change)], backend="cpu")
    assert torch.equal(output, before)


def test_unknown_backend_and_shapes_are_refused() -> None:
    output, x, groups = case(torch.float32, torch.float32)
    with pytest.raises(ValueError, match="backend"):
        lora_add_(output, x, groups, backend="cuda")
    with pytest.raises(ValueError, match=r"\[N, E_out\]"):
        lora_add_(output, x[:3], groups, backend="cpu")
