"""Triton's sampler against upstream's warpers and a Philox of its own: the same tokens, not only the same odds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from hf_paged.kernels.triton_sample import Penalties, sample
from tests.kernels.triton_support import DEVICE, poison_new_tensors

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

#: Past one tile of 64 tokens in the interpreter, and no multiple of 4 or of it.
VOCAB = 131


@pytest.fixture(autouse=True)
def _nan_in_new_tensors(monkeypatch):
    poison_new_tensors(monkeypatch)


def philox(seed: int, tokens: np.ndarray, position: int) -> np.ndarray:
    """uint32 of Philox-4x32-10 for each token: counter (token // 4, position), word token % 4."""
    mask = np.uint64(0xFFFFFFFF)
    words = [np.unique(tokens // 4).astype(np.uint64)]
    words += [np.full_like(words[0], part) for part in (position & 0xFFFFFFFF, position >> 32, 0)]
    key = [seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF]
    for _ in range(10):
        high, low = np.uint64(0xCD9E8D57) * words[2], np.uint64(0xD2511F53) * words[0]
        words = [
            (high >> np.uint64(32)) ^ words[1] ^ np.uint64(key[0]),
            high & mask,
            (low >> np.uint64(32)) ^ words[3] ^ np.uint64(key[1]),
            low & mask,
        ]
        key = [(key[0] + 0x9E3779B9) & 0xFFFFFFFF, (key[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(words, axis=1).reshape(-1)[: len(tokens)]


def expected_draws(scores: torch.Tensor, seeds: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """argmax(p / exponential) over warped float64 scores, the exponentials by seed and position."""
    tokens = []
    for row, seed, position in zip(scores.double().cpu(), seeds.tolist(), positions.tolist(), strict=True):
        uniform = (philox(seed, np.arange(len(row)), position).astype(np.float64) + 0.5) / 2**32
        race = row.numpy() - np.log(-np.log1p(-uniform))
        tokens.append(int(race.argmax()))
    return torch.tensor(tokens)


def warp(logits, temperature, top_k=None, top_p=None, min_p=None) -> torch.Tensor:
    """Upstream's processors, row by row as their parameters are numbers."""
    rows = []
    for index, row in enumerate(logits.float().cpu()):
        scores = row[None] / float(temperature[index])
        if top_k is not None and top_k[index] > 0:
            scores = TopKLogitsWarper(int(top_k[index]))(None, scores)
        if top_p is not None and top_p[index] < 1:
            scores = TopPLogitsWarper(float(top_p[index]))(None, scores)
        if min_p is not None and min_p[index] > 0:
            scores = MinPLogitsWarper(float(min_p[index]))(None, scores)
        rows.append(scores[0])
    return torch.stack(rows)


def column(values, dtype=torch.float32) -> torch.Tensor:
    return torch.tensor(values, dtype=dtype, device=DEVICE)


def make_rows(count: int, seed: int = 0, dtype=torch.float32):
    """(logits cut from a wider tensor, seeds over 64 bits, positions)."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(count, VOCAB + 5, generator=generator) * 2).to(DEVICE, dtype)[:, :VOCAB]
    seeds = torch.randint(-(2**63), 2**63 - 1, (count,), generator=generator).to(DEVICE)
    return logits, seeds, torch.randint(0, 2**40, (count,), generator=generator).to(DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_greedy_takes_the_first_largest(dtype):
    logits, seeds, positions = make_rows(4, dtype=dtype)
    logits[1, 70] = logits[1, 130] = 50.0
    logits[2, :] = -1.0
    logits[3, :] = float("-inf")
    logits[3, 90] = -1e4
    tokens = sample(logits, column([0.0] * 4), seeds, positions)
    assert tokens.tolist() == [int(logits[0].float().argmax()), 70, 0, 90]


def test_draws_are_those_of_the_counter():
    logits, seeds, positions = make_rows(6)
    temperature = column([1.0, 0.5, 2.0, 1.0, 0.1, 10.0])
    actual = sample(logits, temperature, seeds, positions)
    assert actual.tolist() == expected_draws(warp(logits, temperature), seeds, positions).tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": [1, 5, 40, 0, VOCAB, 1000]},
        {"top_p": [0.0, 0.1, 0.5, 0.95, 0.999, 1.0]},
        {"min_p": [0.0, 0.02, 0.2, 0.5, 1.0, 0.1]},
        {
            "top_k": [3, 50, 0, 20, 2, 0],
            "top_p": [0.7, 0.6, 0.9, 1.0, 0.3, 0.5],
            "min_p": [0.0, 0.1, 0.0, 0.3, 0, 0.05],
        },
    ],
    ids=["top_k", "top_p", "min_p", "all"],
)
def test_truncated_draws_equal_upstreams_warpers(options):
    logits, seeds, positions = make_rows(6, seed=1)
    temperature = column([1.0, 0.7, 1.5, 1.0, 3.0, 1.0])
    columns = {
        name: column(values, torch.int32 if name == "top_k" else torch.float32)
        for name, values in options.items()
    }
    actual = sample(logits, temperature, seeds, positions, **columns)
    assert actual.tolist() == expected_draws(warp(logits, temperature, **columns), seeds, positions).tolist()


@pytest.mark.parametrize("option", ["top_k", "top_p"])
def test_what_a_truncation_keeps_is_what_upstream_keeps(option):
    """With odds that are nearly even, many draws show the whole set."""
    count, vocab = 20, 23
    logits = (make_rows(1, seed=3)[0][:, :vocab] * 1e-3).expand(count, vocab)
    seeds, positions = (
        torch.arange(count, device=DEVICE),
        torch.zeros(count, dtype=torch.int64, device=DEVICE),
    )
    columns = {
        "top_k": {"top_k": column([3] * count, torch.int32)},
        "top_p": {"top_p": column([2.5 / vocab] * count)},
    }[option]
    temperature = column([1.0] * count)
    scores = warp(logits[:1], temperature, **{name: values[:1] for name, values in columns.items()})
    allowed = scores[0].isfinite().nonzero()[:, 0].tolist()
    assert len(allowed) == 3
    assert sorted(set(sample(logits, temperature, seeds, positions, **columns).tolist())) == allowed


def test_ties_with_the_threshold_stay():
    count = 16
    logits = torch.full((count, 23), -5.0, device=DEVICE)
    logits[:, [7, 10, 22]] = 1.0
    seeds, positions = (
        torch.arange(count, device=DEVICE),
        torch.zeros(count, dtype=torch.int64, device=DEVICE),
    )
    top_k = column([2] * count, torch.int32)
    tokens = sample(logits, column([1.0] * count), seeds, positions, top_k=top_k)
    assert set(tokens.tolist()) == {7, 10, 22}


def test_masked_tokens_are_never_drawn():
    count = 10
    logits = torch.full((count, 80), float("-inf"), device=DEVICE)
    logits[:, [3, 70]] = column([0.0, -0.0])
    seeds, positions = (
        torch.arange(count, device=DEVICE),
        torch.zeros(count, dtype=torch.int64, device=DEVICE),
    )
    options = {"top_p": column([0.99] * count), "min_p": column([0.1] * count)}
    assert set(sample(logits, column([1.0] * count), seeds, positions, **options).tolist()) == {3, 70}


def test_a_row_does_not_depend_on_its_neighbours():
    logits, seeds, positions = make_rows(5, seed=2)
    temperature, top_p = column([1.0, 0.0, 2.0, 1.0, 0.8]), column([0.9, 0.9, 1.0, 0.5, 0.99])
    together = sample(logits, temperature, seeds, positions, top_p=top_p)
    for rows in ([3], [4, 2, 0]):
        alone = sample(logits[rows], temperature[rows], seeds[rows], positions[rows], top_p=top_p[rows])
        assert torch.equal(alone, together[rows])


def test_penalties_follow_their_formulas_and_count_the_choice():
    logits, seeds, positions = make_rows(4, seed=4)
    generator = torch.Generator().manual_seed(9)
    prompt = (torch.rand(6, VOCAB, generator=generator) < 0.3).to(DEVICE)
    counts = torch.randint(0, 3, (6, VOCAB), generator=generator, dtype=torch.int32).to(DEVICE)
    state_rows = column([5, 0, 2, 3], torch.int32)
    repetition, presence, frequency = (
        column([1.3, 1.0, 0.7, 1.0]),
        column([0.0, 0.5, 0.2, 0.0]),
        column([0.0, 0.1, -0.3, 0.0]),
    )
    temperature = column([1.0, 0.0, 0.0, 0.9])
    own_counts = counts[state_rows.long()]
    seen = prompt[state_rows.long()] | (own_counts > 0)
    penal = repetition[:, None]
    scores = torch.where(seen, torch.where(logits < 0, logits * penal, logits / penal), logits)
    scores = scores - frequency[:, None] * own_counts - presence[:, None] * (own_counts > 0)
    expected = expected_draws(warp(scores, column([1.0, 1.0, 1.0, 0.9])), seeds, positions)
    expected[1:3] = scores[1:3].argmax(1).cpu()
    before = counts.clone()
    penalties = Penalties(repetition, presence, frequency, prompt, counts, state_rows)
    actual = sample(logits, temperature, seeds, positions, penalties=penalties)
    assert actual.cpu().tolist() == expected.tolist()
    before[state_rows.long(), actual] += 1
    assert torch.equal(counts, before)


def test_state_rows_default_to_the_rows_own_numbers():
    logits, seeds, positions = make_rows(2, seed=5)
    zero, one = column([0.0, 0.0]), column([1.0, 1.0])
    counts = torch.zeros(2, VOCAB, dtype=torch.int32, device=DEVICE)
    prompt = torch.zeros(2, VOCAB, dtype=torch.bool, device=DEVICE)
    tokens = sample(logits, zero, seeds, positions, penalties=Penalties(one, zero, zero, prompt, counts))
    assert counts.nonzero().tolist() == [[0, int(tokens[0])], [1, int(tokens[1])]]


@pytest.mark.slow
def test_frequencies_of_draws():
    """A chi-square over 1,000 draws from eight tokens; the seed is fixed, so this passes always or never."""
    count = 1000
    logits = torch.linspace(-2.0, 1.5, 8, device=DEVICE).expand(count, 8)
    seeds, positions = torch.arange(count, device=DEVICE), torch.full((count,), 11, device=DEVICE)
    tokens = sample(logits, column([1.0] * count), seeds, positions)
    observed = torch.bincount(tokens.cpu(), minlength=8).double()
    expected = logits[0].cpu().double().softmax(0) * count
    assert (
        (observed - expected) ** 2 / expected
    ).sum() < 24.3  # 0.1 % of chi-square with 7 degrees of freedom


@pytest.mark.parametrize(
    "change, message",
    [
        ({"temperature": torch.ones(3)}, r"sample: temperature of shape \(3,\); must be \[2\]"),
        ({"top_k": torch.ones(2)}, "sample: top_k of dtype float32; supported: int32"),
        ({"seeds": torch.ones(2, dtype=torch.int32)}, "sample: seeds of dtype int32; supported: int64"),
        ({"logits": torch.zeros(2, VOCAB, dtype=torch.float64)}, "sample: logits of dtype float64"),
        ({"logits": torch.zeros(VOCAB)}, "sample: logits of shape"),
    ],
)
def test_errors_name_the_op_and_the_value(change, message):
    logits, seeds, positions = make_rows(2)
    arguments = {"logits": logits, "temperature": column([1.0, 1.0]), "seeds": seeds, "positions": positions}
    with pytest.raises(ValueError, match=message):
        sample(**arguments | {name: value.to(DEVICE) for name, value in change.items()})
