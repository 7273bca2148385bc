"""The kernel's uniforms are torch's, bit for bit, wherever in its state the generator stands, and so is its state."""

from __future__ import annotations

import pytest
import torch

from hf_paged.kernels import cpu_uniform

pytest.importorskip("numba")


def pair(seed: int, moved: int) -> tuple[torch.Generator, torch.Generator]:
    made = (torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed))
    for generator in made:
        torch.empty(moved).uniform_(generator=generator)
    return made


# A state has 624 words, a number takes two: odd places are met too.
@pytest.mark.parametrize("moved", [0, 1, 623, 624, 625, 1000])
@pytest.mark.parametrize("shape", [(1, 1), (3, 312), (4, 7), (7, 1024)])
def test_rows_of_a_draw(shape: tuple[int, int], moved: int) -> None:
    ours, theirs = pair(moved, moved)
    for rows in ([0], list(range(shape[0]))[::-1], [shape[0] - 1]):
        whole = torch.empty(shape, dtype=torch.float64).uniform_(generator=theirs)
        made = cpu_uniform.uniform_rows(rows, shape, ours)
        assert made is not None
        assert torch.equal(made, whole[rows])
        assert torch.equal(ours.get_state(), theirs.get_state())


def test_a_normal_number_kept_for_later_stays() -> None:
    ours, theirs = pair(3, 0)
    for generator in (ours, theirs):
        torch.randn(1, generator=generator)
    torch.empty((2, 5), dtype=torch.float64).uniform_(generator=theirs)
    cpu_uniform.uniform_rows([1], (2, 5), ours)
    assert torch.equal(torch.randn(7, generator=ours), torch.randn(7, generator=theirs))


def test_another_generator_is_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_uniform, "_SIZE", 5064)
    cpu_uniform._is_known.cache_clear()
    try:
        generator = torch.Generator().manual_seed(3)
        before = generator.get_state()
        assert cpu_uniform.uniform_rows([0], (2, 5), generator) is None
        assert torch.equal(generator.get_state(), before)
    finally:
        cpu_uniform._is_known.cache_clear()


def test_float32_of_float64_and_what_is_near_the_middle_of_two() -> None:
    numbers = -torch.rand(1000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    numbers = (numbers.view(torch.int64) & ~(1 << 28)).view(
        torch.float64
    )  # far from the middle, or just above it
    numbers = (numbers.view(torch.int64) | (1 << 20)).view(torch.float64)
    made = cpu_uniform.negated_in_float32(numbers, 8)
    assert made is not None
    assert torch.equal(made, (-numbers).float())
    for units, is_near in ((-9, False), (-8, True), (0, True), (7, True), (8, False)):
        middle = torch.tensor([-1.0, -1.0 - 2.0**-24], dtype=torch.float64)
        one_off = (middle.view(torch.int64) + torch.tensor([1 << 20, units])).view(torch.float64)
        assert (cpu_uniform.negated_in_float32(one_off, 8) is None) == is_near
