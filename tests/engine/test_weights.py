"""The weights version: every change of a weight gives another one, and nothing else does."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from hf_paged.engine import weights
from hf_paged.engine.adapters import base_modules
from hf_paged.engine.weight_samples import Samples

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def weights_version(m: nn.Module, samples: Samples | None = None) -> bytes:
    return weights.weights_version(base_modules(m), samples)


def model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(40, 24), nn.Linear(24, 7), nn.BatchNorm1d(7)).to(dtype)


def set_data(m: nn.Sequential) -> None:
    m[1].weight.data = m[1].weight.data.clone()


def view_data(m: nn.Sequential) -> None:
    m[1].weight.data = m[1].weight.data[:3]


CHANGES: dict[str, Callable[[nn.Sequential], object]] = {
    "data copied into": lambda m: m[1].weight.data.copy_(m[1].weight.data + 1),
    "data scaled": lambda m: m[0].weight.data.mul_(2),
    "version raised": lambda m: m[1].bias.detach().add_(0),
    "storage replaced": set_data,
    "part of its storage": view_data,
    "parameter replaced": lambda m: setattr(m[1], "bias", nn.Parameter(m[1].bias.detach().clone())),
    "buffer": lambda m: m[2].running_mean.data.fill_(3),
    "layer replaced": lambda m: m.__setitem__(1, nn.Linear(24, 7)),
    "dtype": lambda m: m.half(),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_is_noticed(change, dtype):
    m, samples = model(dtype), Samples()
    before = weights_version(m, samples)
    assert weights_version(m, samples) == before == weights_version(m)
    change(m)
    after = weights_version(m, samples)
    # `half()` of halves is no change.
    assert (after == before) == (dtype is torch.float16 and change is CHANGES["dtype"])
    assert after == weights_version(m, samples) == weights_version(m)


def test_an_optimizer_step_is_noticed():
    from hf_paged.engine.weights import watch_optimizers

    watch_optimizers()
    m, samples = model(), Samples()
    optimizer = torch.optim.AdamW(m.parameters(), fused=True)
    before = weights_version(m, samples)
    m[1](torch.randn(2, 24)).sum().backward()
    optimizer.step()
    assert weights_version(m, samples) != before


@pytest.mark.parametrize(
    "weight",
    [
        torch.randn(6, 5).t(),
        torch.empty(0, 3),
        torch.zeros(1),
        torch.randn(4, 4).to_sparse(),
        torch.zeros(9, dtype=torch.uint8),
        torch.randn(12).to(torch.float8_e4m3fn),
        torch.randn(3, 3, device="meta"),
    ],
    ids=["transposed", "empty", "one", "sparse", "uint8", "float8", "meta"],
)
def test_any_tensor_has_a_version(weight):
    m = nn.Module()
    m.register_buffer("weight", weight)
    samples = Samples()
    assert weights_version(m, samples) == weights_version(m, samples)


def test_memory_of_a_dropped_tensor_is_neither_kept_nor_read():
    m, samples = model(), Samples()
    weights_version(m, samples)
    freed: list[bool] = []
    storage = m[0].weight.data.untyped_storage()
    size = storage.nbytes()
    m[0] = nn.Embedding(2, 3)
    del storage
    gc.collect()
    for _ in range(20):  # the allocator hands the memory out again
        freed.append(torch.empty(size, dtype=torch.uint8).fill_(1).sum().item() == size)
        weights_version(m, samples)
    assert all(freed)
    held = [id(tensor) for tensor in (*m.parameters(), *m.buffers())]
    assert samples._known[0][0] == held


def test_steps_of_another_models_optimizer_change_nothing():
    weights.watch_optimizers()
    m, other, samples = model(), model(), Samples()
    before = weights_version(m, samples)
    other[1](torch.randn(2, 24)).sum().backward()
    torch.optim.SGD(other.parameters(), 0.1).step()
    assert weights_version(m, samples) == before


def test_numbers_that_are_not_aligned_are_read():
    room = torch.zeros(4 * 12 + 1, dtype=torch.uint8)
    m, samples = nn.Module(), Samples()
    m.register_buffer("weight", torch.frombuffer(room.numpy()[1:], dtype=torch.float32))
    before = weights_version(m, samples)
    assert weights_version(m, samples) == before
    room[1:] = 63
    assert weights_version(m, samples) != before


def test_tensors_of_inference_mode_are_read():
    samples = Samples()
    with torch.inference_mode():
        m = model()
        before = weights_version(m, samples)
        assert weights_version(m, samples) == before
        m[1].weight.data.mul_(2)
    assert weights_version(m, samples) != before


def test_threads_that_share_what_is_known_agree():
    """Each has the version of the weights as they are, while others find out where they lie."""
    m = model()
    wanted = weights_version(m)
    for _ in range(50):
        samples = Samples()
        with ThreadPoolExecutor(4) as pool:
            found = [pool.submit(weights_version, m, samples) for _ in range(8)]
        assert {f.result() for f in found} == {wanted}


def test_complex_numbers_beside_tensors_of_inference_mode():
    m, samples = nn.Module(), Samples()
    m.register_buffer("a", torch.randn(5, dtype=torch.complex64))
    with torch.inference_mode():
        m.register_buffer("b", torch.randn(5))
    m.register_buffer("c", torch.randn(4, 4).to_sparse())
    before = weights_version(m, samples)
    assert weights_version(m, samples) == before
    m.a.mul_(2)
    assert weights_version(m, samples) != before
