"""Random numbers of sampled rows: which exponential variates divide the probabilities of row r at step t.

`torch.multinomial(p, 1)` is bit for bit `argmax(p / empty_like(p).exponential_())`. So a draw is a row of
exponential variates, and it may be made before the probabilities of the row are known. Steps are counted per
row of a call: the draw of step t picks the (t + 1)-th generated token.

    draws = LockstepDraws(num_rows=4)    # what generate() does, from the global generator
    draws = SeededDraws(seed=0)          # independent of who else runs
    q = draws.exponential([0, 2], t=5, vocab=50257, dtype=torch.float32, device=torch.device("cpu"))
    tokens = (probs / q).argmax(-1)
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hf_paged.engine.host_copy import to_device
from hf_paged.engine.variates import exponential, exponential_rows

#: Half of the distance of two uniforms, and the least that one may be once it is negated: both exact in float32.
_HALF_STEP, _LEAST = 2.0**-33, 2.0**-24 - 1


class Draws(Protocol):
    """Where the random numbers of a call come from. Not thread-safe: one step at a time asks it."""

    def exponential(
        self, rows: list[int], t: int, vocab: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:  # [len(rows), vocab]
        """The variates of `rows` (distinct) at step `t`, not to be written to. A row asks once a step."""
        ...

    def peek(
        self, rows: list[int], t: int, vocab: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:  # [len(rows), vocab]
        """The variates `exponential` will give `rows` at step `t`, which it must not have done yet."""
        ...

    def release(self, row: int) -> None:
        """`row` will not ask again."""
        ...

    def finish(self, num_steps: int) -> None:
        """The call ran `num_steps` steps, its longest row's: puts generators where upstream's loop would."""
        ...


@dataclass
class _KeptStep:
    waiting: set[int]  # rows that have not asked for this step yet
    state: Tensor  # of the generator, before the draw
    variates: Tensor | None  # [num_rows, vocab]; None: to be drawn again from `state`


class LockstepDraws:
    """The draws of upstream's loop: one [num_rows, vocab] draw a step, from a generator others use too.

    The draw of step t is made when the first row reaches t; rows that lag (preempted, admitted later) find
    theirs kept, or redrawn from the kept generator state once more than `kept_bytes` are held.

    Args:
        num_rows: rows of the call, finished ones included: upstream draws for them too.
        generator: None for the default generator of the device of the probabilities.
        kept_bytes: bound on the variates kept for lagging rows; generator states (5 kB each on the CPU) come
            on top.
    """

    def __init__(
        self, num_rows: int, generator: torch.Generator | None = None, kept_bytes: int = 32 << 20
    ) -> None:
        self._num_rows = num_rows
        self._generator = generator
        self._kept_bytes = kept_bytes
        self._live = set(range(num_rows))
        self._kept: dict[int, _KeptStep] = {}
        self._num_drawn = 0
        #: States of the generator before steps that were only peeked at: it goes back if no row gets there.
        self._peeked: dict[int, Tensor] = {}
        self._vocab = 0  # 0: nothing was drawn yet
        self._dtype = torch.float32

    def exponential(
        self, rows: list[int], t: int, vocab: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:  # [len(rows), vocab]
        self._start(vocab, dtype, device)
        for step in range(self._num_drawn, t):
            self._draw(step, set())
        if self._peeked:
            self._peeked = {step: state for step, state in self._peeked.items() if step > t}
        if t == self._num_drawn and self._live <= set(rows) and len(rows) < self._num_rows:
            assert self._generator is not None
            self._num_drawn += 1  # nobody lags: rows that have ended need nothing of it
            return exponential_rows(rows, (self._num_rows, vocab), self._dtype, self._generator)
        if t == self._num_drawn:
            variates = self._draw(t, set(rows))
        else:
            variates = self._recall(t, set(rows))
        if len(rows) == self._num_rows and rows == list(range(self._num_rows)):
            return variates
        return variates[rows]

    def peek(
        self, rows: list[int], t: int, vocab: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:  # [len(rows), vocab]
        self._start(vocab, dtype, device)
        for step in range(self._num_drawn, t + 1):
            assert self._generator is not None
            self._peeked[step] = self._generator.get_state()
            self._draw(step, set())
        return self._kept_variates(t, set(rows))[rows]

    def _start(self, vocab: int, dtype: torch.dtype, device: torch.device) -> None:
        if not self._vocab:
            self._vocab, self._dtype = vocab, dtype
            self._generator = self._generator or default_generator(device)

    def release(self, row: int) -> None:
        self._live.discard(row)
        for t, kept in list(self._kept.items()):
            kept.waiting.discard(row)
            if not kept.waiting:
                del self._kept[t]

    def finish(self, num_steps: int) -> None:
        # Steps are drawn as rows reach them, so this finds work only where rows ended without being sampled.
        if self._vocab:
            self._live.clear()
            if num_steps in self._peeked:
                assert self._generator is not None
                self._generator.set_state(self._peeked[num_steps])
                self._peeked.clear()
            for step in range(self._num_drawn, num_steps):
                self._draw(step, set())
        self._kept.clear()

    def _draw(self, t: int, rows: set[int]) -> Tensor:
        assert self._generator is not None
        waiting = self._live - rows
        state = self._generator.get_state() if waiting else None
        variates = self._variates(self._generator)
        self._num_drawn = t + 1
        if state is not None:
            self._kept[t] = _KeptStep(waiting, state, variates)
            self._trim(newest=t)
        return variates

    def _recall(self, t: int, rows: set[int]) -> Tensor:
        variates = self._kept_variates(t, rows)
        kept = self._kept[t]
        kept.waiting -= rows
        if not kept.waiting:
            del self._kept[t]
        return variates

    def _kept_variates(self, t: int, rows: set[int]) -> Tensor:  # [num_rows, vocab]
        kept = self._kept.get(t)
        if kept is None or not rows <= kept.waiting:
            raise ValueError(f"the draw of step {t} was already given to rows {sorted(rows)}")
        if kept.variates is None:
            assert self._generator is not None
            generator = torch.Generator(device=self._generator.device)
            generator.set_state(kept.state)
            kept.variates = self._variates(generator)
            self._trim(newest=t)
        return kept.variates

    def _variates(self, generator: torch.Generator) -> Tensor:
        return exponential((self._num_rows, self._vocab), self._dtype, generator)

    def _trim(self, newest: int) -> None:
        """Forgets variates, the oldest steps' first, until `kept_bytes` are held; `newest` always stays."""
        held = [t for t, kept in self._kept.items() if kept.variates is not None and t != newest]
        step_bytes = self._num_rows * self._vocab * self._dtype.itemsize
        room = max(0, self._kept_bytes // step_bytes - 1)
        for t in held[: max(0, len(held) - room)]:
            self._kept[t].variates = None


class SeededDraws:
    """A counter-based stream: the draw of a row at a step depends on (seed, index, row, step) alone.

    The same whatever the batch, the process and the number of threads. The stream is Philox 4x64, the key
    (seed, index), the counter (step, row), two tokens a 64-bit word.

    Args:
        seed: any integer, taken modulo 2**64.
        index: which of several streams of one seed, e.g. the position in the list of `generate_many`.
    """

    def __init__(self, seed: int, index: int = 0) -> None:
        self.key = [seed % 2**64, index % 2**64]

    def exponential(
        self, rows: list[int], t: int, vocab: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:  # [len(rows), vocab]
        return seeded_exponential([(self, row, t) for row in rows], vocab, dtype, device)

    def place(self, row: int, t: int) -> list[int]:
        """Key, step and row as the kernel takes them: words of 64 bits as signed numbers."""
        return [word - 2**64 if word >= 2**63 else word for word in (*self.key, t, row)]

    #: A stream that is counted may be looked at as often as one likes.
    peek = exponential

    def release(self, row: int) -> None:
        pass

    def finish(self, num_steps: int) -> None:
        pass


def makes_on_device(device: torch.device) -> bool:
    """Whether variates of seeded streams are made there: 128,000 a row would keep the host from all else."""
    return device.type == "cuda" and importlib.util.find_spec("triton") is not None


def seeded_exponential(
    places: list[tuple[SeededDraws, int, int]], vocab: int, dtype: torch.dtype, device: torch.device
) -> Tensor:  # [len(places), vocab]
    """The variates of (draws, row, step) each, made in one go on `device` where that can.

    There their uniforms are bit for bit those made on the host; logarithms may differ in the last place.
    """
    if not makes_on_device(device):
        return torch.from_numpy(_exponential_of_bits(_philox(places, vocab))).to(device=device, dtype=dtype)
    from hf_paged.kernels.triton_seeded_uniform import seeded_uniform

    rows = torch.tensor([draws.place(row, t) for draws, row, t in places], dtype=torch.int64)
    uniform = seeded_uniform(to_device(rows, device), vocab)
    return uniform.neg_().sub_(_HALF_STEP).clamp_(min=_LEAST).log1p_().neg_().to(dtype)


def _philox(
    places: list[tuple[SeededDraws, int, int]], vocab: int
) -> np.ndarray:  # uint32 [len(places), vocab]
    """The random bits of each place."""
    num_words = (vocab + 1) // 2
    words = np.empty((len(places), num_words), dtype="<u8")
    # One generator that is put where each row begins: making one asks the system for entropy that is not wanted.
    generator = np.random.Philox(key=0)
    state: Any = generator.state
    key, counter = state["state"]["key"], state["state"]["counter"]
    for out, (draws, row, t) in zip(words, places, strict=True):
        key[:] = draws.key
        counter[:] = (0, t, row, 0)
        generator.state = state  # with nothing of the last row in its buffer
        out[:] = generator.random_raw(num_words)
    return words.view("<u4")[:, :vocab]


class PeekedDraws:
    """The draws of another call before it makes them: drafts chosen with them are mostly what it will choose.

    Choosing from two distributions with the same variates agrees in at least (1 - d) / (1 + d) of all cases, where
    d is their distance in total variation (Daliri et al., 2024, arXiv 2408.07978).
    """

    def __init__(self, draws: Draws) -> None:
        self._draws = draws

    def exponential(
        self, rows: list[int], t: int, vocab: int, dtype: torch.dtype, device: torch.device
    ) -> Tensor:  # [len(rows), vocab]
        return self._draws.peek(rows, t, vocab, dtype, device).to(device)

    peek = exponential

    def release(self, row: int) -> None:
        pass

    def finish(self, num_steps: int) -> None:
        pass


def default_generator(device: torch.device) -> torch.Generator:
    """The generator `torch.manual_seed` sets and `torch.multinomial` uses on `device`."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return torch.cuda.default_generators[index]
    return torch.default_generator


def multinomial_error(probs: Tensor) -> BaseException:
    """What `torch.multinomial` says to `probs` [vocab]. On the CPU: elsewhere it may kill the process."""
    try:
        torch.multinomial(probs.cpu(), 1)
    except RuntimeError as error:
        return error
    raise AssertionError("torch.multinomial accepted probabilities that are not numbers")


def _exponential_of_bits(bits: np.ndarray) -> np.ndarray:
    """Exponential variates, float32, from `bits`, uint32 of the same shape. All are finite and > 0.

    By numpy, whose logarithms are the same wherever a number stands: torch may split rows among threads, and its
    vector and scalar logarithms differ.
    """
    out = np.empty(bits.shape, dtype=np.float32)
    np.multiply(bits, np.float32(-(2.0**-32)), out=out, dtype=np.float32, casting="unsafe")
    out -= np.float32(_HALF_STEP)
    # Uniforms are negated here; -1 would give infinity, which divides every probability to the same 0.
    np.maximum(out, np.float32(_LEAST), out=out)
    np.log1p(out, out=out)
    np.negative(out, out=out)
    return out
