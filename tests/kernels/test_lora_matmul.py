"""Grouped low-rank updates: every backend against the formula in float64, over ragged groups and ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hf_paged.kernels import cpu_jit, cpu_lora, cpu_runtime
from hf_paged.kernels.lora_matmul import LoraFacts, LoraGroup, lora_add_, lora_add_prepared_, prepare

ROWS, WIDTH, OUT = 23, 40, 56
KERNELS = cpu_lora._kernels
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
    total = output.to(torch.float64, copy=True)
    for first, end, a, b, bias, scaling, _ in groups:
        total[first:end] += (
            x[first:end].double() @ a.double().T @ b.double().T + (0 if bias is None else bias.double())
        ) * scaling
    return total


@pytest.fixture(params=["reference", "cpu", "products"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A backend to call; "products" is the CPU's without its kernels, "cpu" surely with them where there are any."""
    if request.param == "products":
        monkeypatch.setattr(cpu_lora, "_kernels", lambda *dtypes: None)
    elif request.param == "cpu":
        loaded(torch.float32, torch.float32)
    return "reference" if request.param == "reference" else "cpu"


def loaded(dtype: torch.dtype, adapter_dtype: torch.dtype) -> Any:
    """The kernels for these dtypes, once they are there; None for dtypes without any."""
    cpu_lora._kernels(dtype, adapter_dtype)
    cpu_runtime.wait_for_loading()
    return cpu_lora._kernels(dtype, adapter_dtype)


@pytest.mark.parametrize(
    "dtype, adapter_dtype, atol",
    [
        (torch.float32, torch.float32, 1e-3),
        (torch.float64, torch.float64, 1e-9),
        (torch.bfloat16, torch.float32, 8.0),
        (torch.bfloat16, torch.bfloat16, 16.0),
        (torch.float16, torch.float32, 2.0),
    ],
)
def test_equals_the_formula(
    backend: str, dtype: torch.dtype, adapter_dtype: torch.dtype, atol: float
) -> None:
    if backend == "cpu" and cpu_lora._kernels is KERNELS:
        has_kernels = dtype is not torch.float64 and cpu_jit.dtype_tag(dtype) is not None
        assert (loaded(dtype, adapter_dtype) is not None) is has_kernels
    output, x, groups = case(dtype, adapter_dtype)
    wanted = expected(output, x, groups)
    untouched = output[9:12].clone()
    assert lora_add_(output, x, groups, backend=backend) is output
    assert (output.double() - wanted).abs().max() < atol
    assert torch.equal(output[9:12], untouched)
    assert wanted.abs().max() > 100, "the updates are too small to be seen beside the tolerance"


def test_numbers_of_one_group_stay_in_it(backend: str) -> None:
    output, x, groups = case(torch.float32, torch.float32)
    groups[1].a.fill_(float("nan"))
    lora_add_(output, x, groups, backend=backend)
    bad = torch.isnan(output).any(dim=1)
    assert bad.tolist() == [1 <= row < 9 for row in range(ROWS)]


@pytest.mark.parametrize("share_rows", [True, False])
@pytest.mark.parametrize("rank", [1, 4, 7, 16, 48])
@pytest.mark.parametrize("width, columns", [(1, 1), (70, 16), (768, 83), (2500, 130)])
def test_kernels_of_every_shape(
    rank: int, width: int, columns: int, share_rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of tiles, chunks of rows and of the sum; strided rows; any number of threads, and either way to share out
    the work among them, gives the same numbers."""
    assert loaded(torch.float32, torch.float32)
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(120, width + 5, generator=generator)[:, :width]
    output = torch.randn(120, columns + 3, generator=generator)[:, :columns]
    a, b = torch.randn(rank, width, generator=generator), torch.randn(columns, rank, generator=generator)
    groups = [
        LoraGroup(0, 1, a, b, None, 0.5),
        LoraGroup(2, 100, a + 1, b, b[:, 0].clone(), 1.5),
        LoraGroup(100, 100, a, b, None, 1.5),
        # The second adapter of some rows.
        LoraGroup(30 if share_rows else 101, 120, a, b - 1, None, 1.0),
    ]
    assert (cpu_lora.table_of(groups).num_rows == 0) is share_rows
    wanted = expected(output, x, groups)
    before, results = torch.get_num_threads(), []
    try:
        for threads, least in ((1, 4), (2, 4), (3, 4), (3, 1 << 30)):
            torch.set_num_threads(threads)  # noqa: TID251
            monkeypatch.setattr(cpu_lora, "_ROWS_OF_PART", least)
            monkeypatch.setattr(cpu_lora, "_SMALL_BYTES", 0)
            actual = output.clone()
            assert cpu_lora._add_by_kernel(actual, x, groups)
            results.append(actual)
    finally:
        torch.set_num_threads(before)  # noqa: TID251
    assert (results[0].double() - wanted).abs().max() < 1e-5 * max(1.0, wanted.abs().max().item())
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_row_does_not_depend_on_what_else_is_in_the_step() -> None:
    assert loaded(torch.float32, torch.float32)
    output, x, groups = case(torch.float32, torch.float32)
    _, _, a, b, bias, scaling, _ = groups[4]
    alone = output[3:4].clone()
    cpu_lora._add_by_kernel(alone, x[3:4], [LoraGroup(0, 1, a, b, bias, scaling)])
    cpu_lora._add_by_kernel(output, x, [LoraGroup(1, 22, a, b, bias, scaling), groups[0]])
    assert torch.equal(output[3:4], alone)


def test_no_group_is_nothing_to_do() -> None:
    output, x, _ = case(torch.float32, torch.float32)
    before = output.clone()
    for backend in ("reference", "cpu", "triton"):
        assert torch.equal(lora_add_(output, x, [], backend=backend), before)


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
@pytest.mark.parametrize("known", [False, True])
def test_bad_groups_are_refused(change: dict, message: str, known: bool) -> None:
    output, x, groups = case(torch.float32, torch.float32)
    before = output.clone()
    group = groups[1]._replace(**change)
    if known:
        group = group._replace(facts=LoraFacts.of(group.a, group.b, group.bias))
    with pytest.raises(ValueError, match=message):
        lora_add_(output, x, [group], backend="cpu")
    assert torch.equal(output, before)


def test_unknown_backend_and_shapes_are_refused() -> None:
    output, x, groups = case(torch.float32, torch.float32)
    with pytest.raises(ValueError, match="backend"):
        lora_add_(output, x, groups, backend="cuda")
    with pytest.raises(ValueError, match=r"\[N, E_out\]"):
        lora_add_(output, x[:3], groups, backend="cpu")


def test_rows_that_come_later_are_looked_at() -> None:
    """What was made ready for takes the rows that it was made for, and leaves all others to the careful way."""
    assert loaded(torch.float32, torch.float32)
    output, x, groups = case(torch.float32, torch.float32)
    groups = [g._replace(facts=LoraFacts.of(g.a, g.b, g.bias)) for g in groups if g.first != 14]
    wanted = expected(output, x, groups)
    room: list[torch.Tensor] = []
    prepared = prepare(groups, backend="cpu", room=room)
    assert prepared.ready is not None
    wide = torch.zeros(ROWS, 2 * OUT)
    # Rows, as the layers give them; then a view, rows of another dtype, and more of them.
    for rows, into, taken in (
        (x.view(1, ROWS, WIDTH), output.clone().view(1, ROWS, OUT), True),
        (x.t().contiguous().t(), output.clone(), False),
        (x, wide[:, ::2].copy_(output), False),
        (x.double(), output.double(), False),
        (torch.cat([x, x]), torch.cat([output, output]), True),
    ):
        before = into.clone()
        assert cpu_lora.add_ready(into, rows, prepared.ready) is taken
        if not taken:
            assert torch.equal(into, before)
            lora_add_prepared_(into, rows, prepared, backend="cpu")
        got = into.reshape(-1, OUT)
        assert (got[:ROWS].double() - wanted).abs().max() < 1e-3
        assert torch.equal(got[ROWS:], before.reshape(-1, OUT)[ROWS:])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not cpu_lora.add_ready(output, x, prepared.ready)
    assert not cpu_lora.add_ready(output, x[: ROWS - 1].contiguous(), prepared.ready)
    for rows, into in ((x[:, :-1], output), (x, output[:, :-1]), (x[:5], output[:5])):
        with pytest.raises(ValueError, match=r"must be|rows"):
            lora_add_prepared_(into.contiguous(), rows.contiguous(), prepared, backend="cpu")


def test_groups_that_follow_one_another_share_their_scratch() -> None:
    assert loaded(torch.float32, torch.float32)
    output, x, groups = case(torch.float32, torch.float32)
    groups = [g._replace(facts=LoraFacts.of(g.a, g.b, g.bias)) for g in groups if g.first != 14]
    room: list[torch.Tensor] = []
    both = [prepare(some, backend="cpu", room=room) for some in (groups[-1:], groups[:1], groups)]
    assert len(room) <= 2
    actual = output.clone()
    for one in both:
        lora_add_prepared_(actual, x, one, backend="cpu")
    wanted = expected(expected(output, x, groups).float(), x, [groups[-1], groups[0]])
    assert (actual.double() - wanted).abs().max() < 1e-3
