"""Float32 products by AMX are as exact as float32 sums, for every shape, and nobody's else are changed by them."""

from __future__ import annotations

import os
import re
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_paged.kernels import cpu_amx_linear, cpu_backend, cpu_linear, cpu_runtime
from hf_paged.kernels.cpu_amx_linear import amx_linear
from tests.kernels.test_cpu_linear import assert_native_tokens_are_equal, gpt2, llama

pytestmark = pytest.mark.skipif(cpu_amx_linear.missing() is not None, reason=str(cpu_amx_linear.missing()))

LAYOUTS = ["along", "across"]
#: Rows, columns, size: one, an edge and its neighbours of blocks (16), squares (64), depth (768) and chunks (256).
SHAPES = [
    (1, 1, 1), (1, 64, 64), (3, 5, 7), (15, 63, 31), (16, 64, 32), (17, 65, 33), (32, 128, 64), (33, 17, 65),
    (40, 200, 96), (48, 130, 768), (2, 64, 769), (31, 70, 800), (5, 33, 1600), (255, 96, 48), (256, 64, 64),
    (257, 67, 70), (530, 16, 100), (64, 1000, 16),
]  # fmt: skip


def weight_of(columns: int, size: int, layout: str) -> Tensor:
    weight = torch.randn(columns, size)
    return weight if layout == "along" else weight.t().contiguous().t()


def bound(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """How far a float32 sum in any order may be from the exact one: 24 bits for each product and addition, and six
    products for each that are zero below the least normal number."""
    total = F.linear(x.double().abs(), weight.double().abs(), None if bias is None else bias.double().abs())
    return total * (2 + weight.shape[1] ** 0.5) * 2**-24 + 6 * weight.shape[1] * 2**-126


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("with_bias", [False, True])
def test_products_are_exact_to_float32(layout, with_bias):
    torch.manual_seed(1)
    for rows, columns, size in SHAPES:
        x, weight = torch.randn(rows, size), weight_of(columns, size, layout)
        bias = torch.randn(columns) if with_bias else None
        output = amx_linear(x, weight, bias)
        exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert output is not None
        assert output.dtype is torch.float32
        assert bool(((output - exact).abs() <= bound(x, weight, bias)).all()), (rows, columns, size)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_errors_are_not_larger_than_the_librarys(layout):
    torch.manual_seed(2)
    x, weight = torch.randn(64, 3072), weight_of(256, 3072, layout)
    exact = F.linear(x.double(), weight.double())
    ours, theirs = (
        (output - exact).square().mean().sqrt()
        for output in (amx_linear(x, weight, None), F.linear(x, weight))
    )
    assert ours <= 2 * theirs  # theirs are many sums in parallel, added up


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1e-18, 1e-30, 1e15, 1e18])
def test_very_small_and_large_numbers(layout, scale):
    torch.manual_seed(3)
    x, weight = torch.randn(20, 100) * scale, weight_of(70, 100, layout)
    output = amx_linear(x, weight * min(scale, 1.0), None)
    exact = F.linear(x.double(), weight.double() * min(scale, 1.0))
    assert bool(((output - exact).abs() <= bound(x, weight * min(scale, 1.0), None)).all())


def test_integers_are_exact():
    x, weight = torch.randint(-4095, 4096, (20, 64)).float(), torch.randint(-15, 16, (70, 64)).float()
    assert torch.equal(amx_linear(x, weight, None), F.linear(x.double(), weight.double()).float())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_row_is_the_same_beside_any_others(layout):
    torch.manual_seed(4)
    x, weight = torch.randn(300, 800), weight_of(130, 800, layout)
    together = amx_linear(x, weight, None)
    for rows in (slice(0, 1), slice(7, 24), slice(255, 300), slice(0, 257)):
        assert torch.equal(amx_linear(x[rows].contiguous(), weight, None), together[rows])


@pytest.mark.parametrize("number", [float("inf"), float("-inf"), float("nan"), 3e38])
@pytest.mark.parametrize("place", ["x", "weight", "bias"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_finite_is_left_to_the_library(number, place, layout):
    torch.manual_seed(5)
    parts = {
        "x": torch.randn(20, 100).abs(),
        "weight": weight_of(70, 100, layout).abs() + 2,
        "bias": torch.randn(70),
    }
    parts[place][-1:] = number
    output = amx_linear(*parts.values())
    expected = F.linear(*parts.values())
    assert (output is None) == (not bool(expected.isfinite().all()))
    if output is not None:  # a bias of 3e38
        assert torch.allclose(output, expected)


def test_memory_beyond_edges_is_not_read():
    torch.manual_seed(6)
    for along in (True, False):
        wide, tall = torch.full((40, 200), float("nan")), torch.full((150, 150), float("nan"))
        weight = tall[:70, :100] if along else tall[:100, :70].t()
        weight.copy_(torch.randn(70, 100))
        wide[:33, :100] = torch.randn(33, 100)
        output = amx_linear(wide[:33, :100], weight, None)
        assert output is not None
        assert torch.allclose(output, F.linear(wide[:33, :100], weight), atol=1e-4)


def test_many_threads_at_once():
    torch.manual_seed(7)
    weights = [weight_of(300 + 10 * i, 400, LAYOUTS[i % 2]) for i in range(8)]
    x = torch.randn(50, 400)
    expected = [amx_linear(x, weight, None) for weight in weights]
    barrier = threading.Barrier(8)

    def run(i: int) -> bool:
        barrier.wait()
        return all(torch.equal(amx_linear(x, weights[i], None), expected[i]) for _ in range(20))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(run, range(8)))


def test_a_forked_child_computes_too():
    torch.manual_seed(8)
    x, weight = torch.randn(40, 300), weight_of(400, 300, "along")
    expected = amx_linear(x, weight, None)
    child = os.fork()
    if not child:
        os._exit(0 if torch.equal(amx_linear(x, weight, None), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_bfloat16_products_of_the_library_go_on_beside_them():
    """It uses the same registers, in another shape."""
    torch.manual_seed(9)
    x, weight = torch.randn(40, 512), weight_of(512, 512, "along")
    half = F.linear(x.bfloat16(), weight.bfloat16())
    for _ in range(5):
        amx_linear(x, weight, None)
        assert torch.equal(F.linear(x.bfloat16(), weight.bfloat16()), half)


@pytest.mark.parametrize(
    "x, weight, named",
    [
        (torch.ones(2, 8).bfloat16(), torch.ones(4, 8), "bfloat16"),
        (torch.ones(2, 8), torch.ones(4, 8).double(), "float64"),
        (torch.ones(2, 8), torch.ones(8, 16)[::2, ::2], "strides"),
    ],
)
def test_what_it_does_not_take_is_named(x, weight, named):
    with pytest.raises(ValueError, match=named):
        amx_linear(x, weight, None)


@pytest.mark.parametrize("bias", [torch.ones(8)[::2], torch.ones(3), torch.ones(1).expand(4)])
def test_a_bias_that_does_not_lie_in_a_row_is_not_read(bias):
    with pytest.raises(ValueError, match=re.escape(str(tuple(bias.shape)))):
        amx_linear(torch.ones(2, 8), torch.ones(4, 8), bias)


def test_a_users_default_dtype_is_not_that_of_its_memory(default_dtype):
    x, weight = torch.randn(200, 300, dtype=torch.float32), torch.randn(400, 300, dtype=torch.float32)
    output = amx_linear(x, weight, None)
    assert output.dtype is torch.float32
    assert bool(((output - F.linear(x.double(), weight.double())).abs() <= bound(x, weight, None)).all())


@pytest.fixture
def products(monkeypatch) -> list[tuple[int, int, int]]:
    """A process in which AMX is used: rows, columns and size of each product by it."""
    monkeypatch.setattr(cpu_linear, "onednn_is_faster", lambda: False)
    monkeypatch.setattr(cpu_linear, "amx_is_faster", lambda: True)
    cpu_backend.load_kernels(torch.float32)
    cpu_runtime.wait_for_loading()
    cpu_linear._compile_products()
    made: list[tuple[int, int, int]] = []

    original = cpu_amx_linear.multiply

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None, along: bool) -> Tensor | None:
        made.append((x.numel() // weight.shape[1], *weight.shape))
        return original(x, weight, bias, along)

    monkeypatch.setattr(cpu_amx_linear, "multiply", counted)
    monkeypatch.setattr(cpu_linear, "tiles_are_faster", lambda: False)
    return made


def test_few_rows_and_small_weights_are_not_for_it(products):
    for columns, size, layout, least in [
        (768, 768, "along", 8), (768, 768, "across", 17), (768, 256, "across", 17), (1024, 256, "along", 17),
    ]:  # fmt: skip
        weight = weight_of(columns, size, layout)
        assert cpu_linear.least_input(weight) <= least * size
        for rows in (least - 1, least, 300):
            products.clear()
            output = cpu_linear.linear(torch.randn(1, rows, size), weight, None)
            assert bool(products) == (rows >= least)
            assert output is None or output.shape == (1, rows, columns)
    for columns, size in [(128, 4096), (4096, 128), (256, 256)]:
        assert cpu_linear.linear(torch.randn(1, 300, size), weight_of(columns, size, "across"), None) is None
    assert products == [] or products[-1][0] >= 8


@pytest.mark.parametrize(
    "weight, bias",
    [
        (torch.ones(768, 1536)[:, ::2], None),
        (torch.ones(1, 1).expand(768, 768), None),
        (torch.ones(768, 768), torch.ones(1536)[::2]),
        (torch.ones(768, 768), torch.ones(1).expand(768)),
        (torch.ones(768, 768), torch.ones(768).double()),
        (torch.ones(768, 512), None),
    ],
    ids=["strided", "expanded", "strided_bias", "expanded_bias", "wide_bias", "other_size"],
)
def test_what_is_not_dense_goes_to_the_library(products, weight, bias):
    assert cpu_linear.linear(torch.ones(1, 64, 768), weight, bias) is None
    assert not products


def test_numba_may_be_told_of_a_lesser_processor(products, monkeypatch):
    """There LLVM would end the process."""
    jit = cpu_runtime.kernel_module("cpu_jit")
    assert jit.emits("avx512f", "amx-tile", "amx-bf16")
    monkeypatch.setattr(cpu_linear, "_amx_is_ready", threading.Event())
    monkeypatch.setattr(jit.numba.config, "CPU_FEATURES", "+avx512f,-amx-tile")
    assert jit.emits("avx512f")
    assert not jit.emits("avx512f", "amx-tile")
    cpu_linear._compile_products()
    assert cpu_linear.linear(torch.randn(1, 64, 768), weight_of(768, 768, "along"), None) is None
    assert not products


def test_infinity_goes_to_the_library(products):
    weight = weight_of(768, 768, "along")
    x = torch.randn(1, 20, 768)
    x[0, 3, 5] = float("inf")
    assert cpu_linear.linear(x, weight, None) is None
    assert products


@pytest.mark.parametrize("family, layers", [(gpt2, 4), (llama, 7)])
def test_a_model_gives_the_same_tokens(products, family, layers):
    torch.manual_seed(0)
    assert_native_tokens_are_equal(family().eval(), 20)
    assert len([made for made in products if made[0] == 20]) >= 11 * layers
