"""Next tokens chosen on the device: launched, not waited for.

The arithmetic is that of `Sampler.sample`, operation by operation, for calls whose `SamplingSpec.on_device` says so:
upstream's processors, and the counted streams of calls that draw. What differs is what the host is told, and when:
tokens stay where they are, for the next step to go on with, and a copy of them is on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_paged.engine.draws import multinomial_error
from hf_paged.engine.host_copy import PendingCopy, to_device
from hf_paged.engine.request import Call, Sequence
from hf_paged.engine.sampler import divide_seeded, logprobs_of, most_logprobs, most_rows, process

__all__ = ["ChosenTokens", "choose"]

#: In place of a token: the probabilities of its row were not numbers.
_NOT_NUMBERS = -1


class ChosenTokens:
    """The tokens of a step.

    Args:
        tokens: [R] int64 on the device, each a token id whatever went wrong.
        told: the same, or `_NOT_NUMBERS`.
        errors: what rows fail with for other reasons.
        records: of some rows, what `sampler.logprobs_of` gives.
    """

    def __init__(
        self,
        tokens: Tensor,
        told: Tensor,
        errors: dict[int, BaseException],
        records: list[tuple[list[int], tuple[Tensor, ...]]],
    ) -> None:
        self.tokens = tokens
        self._copy = PendingCopy(told)
        self._records = [(rows, [PendingCopy(part) for part in parts]) for rows, parts in records]
        self._errors = errors

    @property
    def is_in_order(self) -> bool:
        """Whether what the calling thread launches now finds `tokens` made."""
        return self._copy.is_in_order

    def put(self, ids: Tensor, rows: list[int]) -> None:
        """Makes the token of row `rows[i]` the i-th of `ids` [T]; where that is -1 it stays."""
        tokens, count = self.tokens.to(ids.device), len(rows)
        if rows != list(range(len(tokens))):
            index = to_device(torch.tensor(rows), ids.device)
            tokens = torch.where(index < 0, ids[:count], tokens[index.clamp(min=0)])
        ids[:count].copy_(tokens)

    def of(self, row: int) -> Tensor:  # [1]
        return self.tokens[row : row + 1]

    def wait(self) -> list[int | BaseException]:
        """The token of each row, or what its call fails with. What went wrong on the device raises here."""
        told: list[int | BaseException] = [*self._copy.wait()]
        for row, token in enumerate(told):
            if token == _NOT_NUMBERS:
                told[row] = multinomial_error(torch.full((2,), float("nan")))
        for row, error in self._errors.items():
            told[row] = error
        return told

    def logprobs(self) -> dict[int, tuple[Any, ...]]:
        """By row, where they were asked for, what `sampler.note_logprobs` takes after the token."""
        found: dict[int, tuple[Any, ...]] = {}
        for rows, parts in self._records:
            found |= dict(zip(rows, zip(*(part.wait() for part in parts), strict=True), strict=True))
        return found


def choose(
    logits: Tensor,
    sequences: list[Sequence],
    argmax_rows: Callable[[Tensor], Tensor],
    newest: Mapping[Sequence, Tensor],
) -> ChosenTokens:
    """Launches the choice of a token for each of `sequences`, none of which has ended.

    Of no sequences there is nothing to choose, but a step to wait for.

    Args:
        logits: [R, vocab], row i for `sequences[i]`. Not written to.
        argmax_rows: as `Sampler` has it.
        newest: as in `sampler.process`.
    """
    if not sequences:
        nothing = torch.empty(0, dtype=torch.int64, device=logits.device)
        return ChosenTokens(nothing, nothing, {}, [])
    if logits.dtype is torch.float64:
        logits = logits.float()
    groups: dict[object, list[int]] = {}
    for i, sequence in enumerate(sequences):
        spec = sequence.call.sampling
        groups.setdefault(None if spec.plain else spec.signature, []).append(i)
    choosing = _Choosing(argmax_rows, newest)
    parts: list[tuple[Tensor, Tensor]] = []
    order: list[int] = []
    for key, indices in groups.items():
        chunk = len(indices) if key is None else most_rows(logits.shape[1])
        for start in range(0, len(indices), chunk):
            part = indices[start : start + chunk]
            order += part
            own = (
                logits
                if len(part) == len(sequences)
                else logits[to_device(torch.tensor(part), logits.device)]
            )
            if key is None:
                tokens = argmax_rows(own)
                parts.append((tokens, tokens))
            else:
                parts.append(choosing.choose(own.float(), [sequences[i] for i in part], part))
    tokens, told = parts[0]
    if len(parts) > 1:
        back = to_device(torch.tensor(order).argsort(), logits.device)
        tokens, told = (torch.cat(column)[back] for column in zip(*parts, strict=True))
    errors = {i: choosing.errors[s.call] for i, s in enumerate(sequences) if s.call in choosing.errors}
    return ChosenTokens(tokens, told, errors, choosing.records)


@dataclass
class _Choosing:
    """The choice of rows that want more than an argmax, and what comes of it besides tokens."""

    argmax_rows: Callable[[Tensor], Tensor]
    newest: Mapping[Sequence, Tensor]
    errors: dict[Call, BaseException] = field(default_factory=dict)
    records: list[tuple[list[int], tuple[Tensor, ...]]] = field(default_factory=list)

    def choose(self, logits: Tensor, sequences: list[Sequence], rows: list[int]) -> tuple[Tensor, Tensor]:
        """Tokens, and what to tell of them, of sequences of equal signature, which are `rows` of the step."""
        scores = process(logits, sequences, self.errors, self.newest)
        if sequences[0].call.sampling.do_sample:
            probs = torch.softmax(scores, dim=-1)
            bad = torch.isnan(probs[:, 0])  # a row that has one such probability has no other
            divide_seeded(probs, sequences, self.errors)
            tokens = self.argmax_rows(probs)
            told = tokens.masked_fill(bad, _NOT_NUMBERS)
        else:
            tokens = told = self.argmax_rows(scores.contiguous())
        wanted: dict[bool, list[int]] = {}
        for i, sequence in enumerate(sequences):
            if sequence.call.sampling.logprobs is not None:
                wanted.setdefault(sequence.call.sampling.raw_logprobs, []).append(i)
        for raw, places in wanted.items():
            index = to_device(torch.tensor(places), logits.device)
            width = most_logprobs([sequences[i] for i in places])
            found = logprobs_of((logits if raw else scores)[index], tokens[index], width)
            self.records.append(([rows[i] for i in places], found))
        return tokens, told
