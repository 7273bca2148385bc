"""The random numbers of sampled rows: upstream's sequence, and streams that depend on nothing else."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from hf_paged.engine.draws import LockstepDraws, SeededDraws, default_generator, seeded_exponential

CPU = torch.device("cpu")


def ask(draws: LockstepDraws | SeededDraws, rows: list[int], t: int, vocab: int = 50) -> torch.Tensor:
    return draws.exponential(rows, t, vocab, torch.float32, CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "rows, vocab", [(1, 2), (1, 50257), (2, 7), (3, 50257), (8, 1000), (17, 33), (64, 128)]
)
def test_multinomial_is_an_argmax_over_exponentials(rows: int, vocab: int, dtype: torch.dtype) -> None:
    """What everything here rests on; a new torch that does otherwise must show here."""
    probs = torch.softmax(4 * torch.randn(rows, vocab, dtype=dtype), dim=-1)
    probs[:, ::3] = 0
    torch.manual_seed(rows)
    drawn = torch.multinomial(probs, 1).squeeze(1)
    state = torch.get_rng_state()
    torch.manual_seed(rows)
    variates = LockstepDraws(rows).exponential(list(range(rows)), 0, vocab, dtype, CPU)
    assert torch.equal((probs / variates).argmax(-1), drawn)
    assert torch.equal(torch.get_rng_state(), state)


def steps_of_upstream(num_steps: int, num_rows: int, vocab: int = 50) -> list[torch.Tensor]:
    return [torch.empty(num_rows, vocab).exponential_() for _ in range(num_steps)]


@pytest.mark.parametrize("kept_bytes", [0, 3 * 5 * 50 * 4, 32 << 20])
@pytest.mark.parametrize("seed", range(4))
def test_rows_out_of_step_find_their_draws(seed: int, kept_bytes: int) -> None:
    num_rows, num_steps = 5, 12
    torch.manual_seed(seed)
    expected, after = steps_of_upstream(num_steps, num_rows), torch.get_rng_state()
    torch.manual_seed(seed)
    draws = LockstepDraws(num_rows, kept_bytes=kept_bytes)
    source, at = random.Random(seed), [0] * num_rows
    ends = [source.randint(1, num_steps) for _ in range(num_rows - 1)] + [num_steps]
    while running := [row for row in range(num_rows) if at[row] < ends[row]]:
        t = at[source.choice(running)]
        rows = [row for row in running if at[row] == t and source.random() < 0.6] or [running[0]]
        source.shuffle(rows)
        for row, variates in zip(rows, ask(draws, rows, at[rows[0]]), strict=True):
            assert torch.equal(variates, expected[at[row]][row])
            at[row] += 1
            if at[row] == ends[row]:
                draws.release(row)
    assert not draws._kept, "every row has asked or was released: nothing is to be kept"
    draws.finish(num_steps)
    assert torch.equal(torch.get_rng_state(), after)


def test_two_calls_after_one_seed() -> None:
    torch.manual_seed(1)
    expected = steps_of_upstream(3, 2) + steps_of_upstream(2, 4)
    torch.manual_seed(1)
    first, second = LockstepDraws(2), LockstepDraws(4)
    ours = [ask(first, [0, 1], t) for t in range(3)]
    first.finish(3)
    ours += [ask(second, [0, 1, 2, 3], t) for t in range(2)]
    assert all(map(torch.equal, ours, expected))


def test_finish_draws_what_no_row_asked_for() -> None:
    torch.manual_seed(1)
    steps_of_upstream(5, 2)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    draws = LockstepDraws(2)
    ask(draws, [1], 0)
    draws.finish(5)
    assert torch.equal(torch.get_rng_state(), after)


def test_variates_kept_are_bounded() -> None:
    step_bytes = 4 * 50 * 4
    draws = LockstepDraws(4, kept_bytes=3 * step_bytes)
    for t in range(50):
        ask(draws, [0], t)
    assert sum(kept.variates is not None for kept in draws._kept.values()) == 3
    for t in range(50):
        ask(draws, [2], t)
        assert sum(kept.variates is not None for kept in draws._kept.values()) <= 3


def test_a_draw_is_given_once() -> None:
    draws = LockstepDraws(2)
    ask(draws, [0], 0)
    with pytest.raises(ValueError, match="already given"):
        ask(draws, [0], 0)
    assert ask(draws, [1], 0).shape == (1, 50)


def test_a_generator_of_ones_own_leaves_the_global_alone() -> None:
    state = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    ours = ask(LockstepDraws(2, generator), [0, 1], 0)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(ours, torch.empty(2, 50).exponential_(generator=torch.Generator().manual_seed(3)))


def test_seeded_streams_depend_on_nothing_else() -> None:
    alone = ask(SeededDraws(7, index=3), [2], 5)
    together = ask(SeededDraws(7, index=3), [4, 2, 0], 5)
    assert torch.equal(alone[0], together[1])
    # The last two have words from 2**63 on.
    others = [SeededDraws(8, 3), SeededDraws(7, 4), SeededDraws(-5, 3), SeededDraws(-6, 3)]
    distinct = [alone, together[:1], ask(SeededDraws(7, 3), [2], 6), *(ask(d, [2], 5) for d in others)]
    assert len({tuple(x.flatten().tolist()) for x in distinct}) == len(distinct)


@pytest.mark.parametrize("vocab", [1, 2, 37, 1024])
def test_streams_of_many_calls_are_made_at_once_as_one_by_one(vocab: int) -> None:
    float32, cpu = torch.float32, torch.device("cpu")
    places = [(SeededDraws(-5 * i, 2**63 + i), i % 3, 7 * i) for i in range(5)]
    together = seeded_exponential(places, vocab, float32, cpu)
    for variates, (draws, row, t) in zip(together, places, strict=True):
        assert torch.equal(variates, draws.exponential([row], t, vocab, float32, cpu)[0])
        bits = np.random.Philox(
            key=np.array(draws.key, np.uint64), counter=np.array([0, t, row, 0], np.uint64)
        ).random_raw((vocab + 1) // 2)
        uniform = bits.view(np.uint32)[:vocab].astype(np.float64) / 2**32
        np.testing.assert_allclose(variates.numpy(), -np.log1p(-uniform), rtol=1e-3, atol=2e-7)


def test_seeded_streams_are_the_same_in_every_process() -> None:
    code = (
        "import torch, hashlib; torch.set_num_threads({threads});"
        "from hf_paged.engine.draws import SeededDraws;"
        "x = SeededDraws(-5, 2**65).exponential([0, 9], 1000, 50257, torch.float32, torch.device('cpu'));"
        "print(hashlib.sha256(x.numpy().tobytes()).hexdigest())"
    )
    digests = {
        subprocess.run(
            [sys.executable, "-c", code.format(threads=n)], capture_output=True, text=True, check=True
        ).stdout
        for n in (1, 2)
    }
    assert len(digests) == 1


def test_seeded_variates_are_exponential() -> None:
    from scipy import stats

    draws = SeededDraws(0)
    values = torch.cat([ask(draws, [0, 1], t, vocab=20011).flatten() for t in range(5)])
    assert torch.isfinite(values).all()
    assert (values > 0).all()
    assert stats.kstest(values.numpy().astype("f8"), "expon").pvalue > 1e-3
    # The small ones decide which improbable token wins: their logarithm must be resolved too.
    small = values[values < 1e-3].double() / 1e-3
    assert stats.kstest(small.numpy(), "uniform").pvalue > 1e-3


def test_the_extreme_bits_are_finite_and_positive() -> None:
    from hf_paged.engine.draws import _exponential_of_bits

    bits = np.array([0, 1, 2**31, 2**32 - 1], dtype=np.uint32)
    out = _exponential_of_bits(bits)
    assert np.isfinite(out).all()
    assert (np.diff(out) > 0).all()
    assert 0 < out[0] < 2e-10


@pytest.mark.gpu
def test_cuda_draws_are_upstreams() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    for rows, vocab in ((1, 50257), (5, 50257), (8, 128256), (64, 1000)):
        probs = torch.softmax(4 * torch.randn(rows, vocab, device=device), dim=-1)
        torch.manual_seed(rows)
        drawn = [torch.multinomial(probs, 1).squeeze(1) for _ in range(3)]
        state = torch.cuda.get_rng_state()
        torch.manual_seed(rows)
        draws = LockstepDraws(rows, kept_bytes=0)
        for t in range(3):
            draws.exponential([0], t, vocab, probs.dtype, device)
        for t in range(3):
            rest = (
                draws.exponential(list(range(1, rows)), t, vocab, probs.dtype, device) if rows > 1 else None
            )
            if rest is not None:
                assert torch.equal((probs[1:] / rest).argmax(-1), drawn[t][1:])
        assert torch.equal(default_generator(device).get_state(), state)
