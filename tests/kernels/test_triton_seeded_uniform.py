"""The numbers of seeded streams made by the kernel are the host's, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hf_paged.engine import draws
from hf_paged.engine.draws import SeededDraws, seeded_exponential
from hf_paged.kernels.triton_seeded_uniform import seeded_uniform
from tests.kernels.triton_support import DEVICE

#: Seed, index, row, step: words with the highest bit set, and steps beyond 32 bits.
PLACES = [(0, 0, 0, 0), (-5, 2**65 + 3, 9, 1000), (2**63, 2**63 + 1, 1, 7), (12345, 6, 2, 2**40)]


def made_by_the_kernel(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """From now on on any device. Returns the numbers of rows of its launches."""
    counted: list[int] = []

    def counting(rows: torch.Tensor, vocab: int) -> torch.Tensor:
        counted.append(len(rows))
        return seeded_uniform(rows, vocab)

    monkeypatch.setattr(draws, "makes_on_device", lambda device: True)
    monkeypatch.setattr("hf_paged.kernels.triton_seeded_uniform.seeded_uniform", counting)
    return counted


@pytest.mark.parametrize("vocab", [1, 7, 300])
def test_uniforms_are_numpys_bit_for_bit(vocab):
    rows = [SeededDraws(seed, index).place(row, t) for seed, index, row, t in PLACES]
    actual = seeded_uniform(torch.tensor(rows, device=DEVICE), vocab).cpu().numpy()
    for found, (seed, index, row, t) in zip(actual, PLACES, strict=True):
        key = np.array([seed % 2**64, index % 2**64], np.uint64)
        stream = np.random.Philox(key=key, counter=np.array([0, t, row, 0], np.uint64))
        bits = stream.random_raw((vocab + 1) // 2).astype("<u8").view("<u4")[:vocab]
        assert np.array_equal(found, bits.astype(np.float32) * np.float32(2.0**-32))


def test_variates_are_the_hosts(monkeypatch):
    places = [(SeededDraws(seed, index), row, t) for seed, index, row, t in PLACES]
    host = torch.device("cpu")
    expected = [stream.exponential([row], t, 100, torch.float32, host)[0] for stream, row, t in places]
    launched = made_by_the_kernel(monkeypatch)
    actual = seeded_exponential(places, 100, torch.float32, DEVICE).cpu()
    assert launched == [len(PLACES)]
    for found, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=3e-7, atol=0)
    assert (actual > 0).all()


def test_the_smallest_and_largest_bits_are_finite(monkeypatch):
    made_by_the_kernel(monkeypatch)
    edges = torch.tensor([[0.0, 1.0, 2.0**-32]])
    monkeypatch.setattr("hf_paged.kernels.triton_seeded_uniform.seeded_uniform", lambda rows, vocab: edges)
    variates = seeded_exponential([(SeededDraws(0), 0, 0)], 3, torch.float32, torch.device("cpu"))
    assert torch.isfinite(variates).all()
    assert (variates > 0).all()


def test_samples_are_the_same_wherever_variates_are_made(monkeypatch):
    import hf_paged
    from tests.helpers import make_model, native_calls, random_prompts

    model, prompts = make_model("gpt2"), random_prompts([4, 7, 5])

    def sampled():
        with hf_paged.enabled(model), native_calls(model, 3):
            torch.manual_seed(3)
            results = hf_paged.generate_many(model, prompts, max_new_tokens=3, do_sample=True, top_k=20)
        return [r.token_ids for r in results]

    on_host = sampled()
    counted = made_by_the_kernel(monkeypatch)
    assert sampled() == on_host
    assert counted[0] == 3  # the rows of all calls of a step in one launch


@pytest.mark.parametrize(
    "rows, vocab, message",
    [
        (torch.zeros(2, 3, dtype=torch.int64), 5, r"places of shape \(2, 3\); must be contiguous \[n, 4\]"),
        (torch.zeros(2, 4), 5, "places of dtype float32; supported: int64"),
        (torch.zeros(2, 4, dtype=torch.int64), 0, "vocab=0; must be at least 1"),
    ],
)
def test_bad_places_are_named(rows, vocab, message):
    with pytest.raises(ValueError, match=f"seeded_uniform: {message}"):
        seeded_uniform(rows.to(DEVICE), vocab)


def test_a_cpu_makes_them_itself():
    assert not draws.makes_on_device(torch.device("cpu"))
    assert draws.makes_on_device(torch.device("cuda"))
