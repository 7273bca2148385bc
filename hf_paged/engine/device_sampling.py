"""Next tokens chosen on the device: launched, not waited for.

The arithmetic is that of `Sampler.sample`, operation by operation, for calls whose `SamplingSpec.on_device` says so:
upstream's processors, and the counted streams of calls that draw. What differs is what the host is told, and when:
tokens stay where they are, for the next step to go on with, and a copy of them is on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from hf_paged.engine.draws import multinomial_error
from hf_paged.engine.host_copy import PendingCopy, to_device
from hf_paged.engine.request import Call, Sequence
from hf_paged.engine.sampler import divide_seeded, most_rows, process

__all__ = ["ChosenTokens", "choose"]

#: In place of a token: the probabilities of its row were not numbers.
_NOT_NUMBERS = -1


class ChosenTokens:
    """The tokens of a step.

    Args:
        tokens: [R] int64 on the device, each a token id whatever went wrong.
        told: the same, or `_NOT_NUMBERS`.
        errors: what rows fail with for other reasons.
    """

    def __init__(self, tokens: Tensor, told: Tensor, errors: dict[int, BaseException]) -> None:
        self.tokens = tokens
        self._copy = PendingCopy(told)
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


def choose(
    logits: Tensor,
    sequences: list[Sequence],
    argmax_rows: Callable[[Tensor], Tensor],
    newest: Mapping[Sequence, Tensor],
) -> ChosenTokens:
    """Launches the choice of a token for each of `sequences`, none of which has ended.

    Args:
        logits: [R, vocab], row i for `sequences[i]`. Not written to.
        argmax_rows: as `Sampler` has it.
        newest: as in `sampler.process`.
    """
    if logits.dtype is torch.float64:
        logits = logits.float()
    groups: dict[object, list[int]] = {}
    for i, sequence in enumerate(sequences):
        spec = sequence.call.sampling
        groups.setdefault(None if spec.plain else spec.signature, []).append(i)
    errors: dict[Call, BaseException] = {}
    parts: list[tuple[Tensor, Tensor]] = []
    order: list[int] = []
    for key, indices in groups.items():
        chunk = len(indices) if key is None else most_rows(logits.shape[1])
        for start in range(0, len(indices), chunk):
            part = indices[start : start + chunk]
            order += part
            whole = len(part) == len(sequences)
            own = logits if whole else logits[to_device(torch.tensor(part), logits.device)]
            if key is None:
                tokens = argmax_rows(own)
                parts.append((tokens, tokens))
            else:
                chosen = [sequences[i] for i in part]
                parts.append(_choose_special(own.float(), chosen, argmax_rows, newest, errors))
    tokens, told = parts[0]
    if len(parts) > 1:
        back = to_device(torch.tensor(order).argsort(), logits.device)
        tokens, told = (torch.cat(column)[back] for column in zip(*parts, strict=True))
    failed = {i: errors[s.call] for i, s in enumerate(sequences) if s.call in errors}
    return ChosenTokens(tokens, told, failed)


def _choose_special(
    logits: Tensor,
    sequences: list[Sequence],
    argmax_rows: Callable[[Tensor], Tensor],
    newest: Mapping[Sequence, Tensor],
    errors: dict[Call, BaseException],
) -> tuple[Tensor, Tensor]:
    """Tokens, and what to tell of them, of rows of equal signature; `errors` gets what processors raised."""
    scores = process(logits, sequences, errors, newest)
    if not sequences[0].call.sampling.do_sample:
        tokens = argmax_rows(scores.contiguous())
        return tokens, tokens
    probs = torch.softmax(scores, dim=-1)
    bad = torch.isnan(probs[:, 0])  # a row that has one such probability has no other
    divide_seeded(probs, sequences, errors)
    tokens = argmax_rows(probs)
    return tokens, tokens.masked_fill(bad, _NOT_NUMBERS)
