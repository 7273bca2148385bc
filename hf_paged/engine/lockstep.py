"""Lockstep calls: all rows take each step together, and the thread of the caller chooses their tokens.

Logits processors and stopping criteria that users made, and a few built-in ones, keep a state for each row of their
batch and are called once a step with all of it. So rows of such a call hand their logits over and wait. When
all have, the caller is woken; it runs the user's code in its own thread, outside of any step, and answers with a token
for each row. Steps of other requests go on meanwhile.

    rows computed --hand_over--> Lockstep ... complete --take--> the caller --take_answer--> rows go on
"""

from __future__ import annotations

import torch
from torch import Tensor

from hf_paged.engine.request import Call, FinishReason, Sequence


class Lockstep:
    """The logits of one step of a lockstep call (`Call.lockstep`), gathered from the steps its rows were in."""

    def __init__(self, num_rows: int) -> None:
        self._num_rows = num_rows
        self._rows: list[int] = []
        self._parts: list[Tensor] = []

    def add(self, rows: list[int], logits: Tensor) -> bool:
        """Takes `logits` [len(rows), vocab] of rows that were missing. Returns whether none is missing now."""
        self._parts.append(logits)
        self._rows += rows  # last: the caller looks at it from another thread
        return self.is_complete

    @property
    def is_complete(self) -> bool:
        """Whether the logits of all rows are there, and not taken yet."""
        return len(self._rows) == self._num_rows

    def take(self) -> Tensor:
        """The logits of all rows in their order, [rows, vocab] float32, the taker's own to write to."""
        if not self.is_complete:
            raise RuntimeError(f"{len(self._rows)} of {self._num_rows} rows have handed over their logits")
        rows, parts = self._rows, self._parts
        self._rows, self._parts = [], []
        logits = parts[0] if len(parts) == 1 else torch.cat(parts)
        if rows != list(range(self._num_rows)):
            order = sorted(range(self._num_rows), key=rows.__getitem__)
            logits = logits[torch.tensor(order, device=logits.device)]
        return logits.float()


def hand_over(logits: Tensor, sequences: list[Sequence]) -> tuple[Tensor, list[Sequence], list[Call]]:
    """Gives the rows of lockstep calls to those.

    Args:
        logits: [R, vocab] of a step, row i for `sequences[i]`.

    Returns:
        The other rows and their sequences, and the lockstep calls that are complete now: `attended`.
    """
    places: dict[Call, list[int]] = {}
    for i, sequence in enumerate(sequences):
        if sequence.call.lockstep is not None:
            places.setdefault(sequence.call, []).append(i)
    if not places:
        return logits, sequences, []
    complete = []
    for call, rows in places.items():
        for i in rows:
            sequences[i].handed_over = True
        # Indexing copies: the logits of the step belong to nobody.
        own = logits[torch.tensor(rows, device=logits.device)]
        if call.lockstep.add([sequences[i].row for i in rows], own):
            call.attended = True
            complete.append(call)
    others = [i for i, sequence in enumerate(sequences) if sequence.call.lockstep is None]
    left = logits[torch.tensor(others, device=logits.device)] if others else logits[:0]
    return left, [sequences[i] for i in others], complete


def take_answer(call: Call, tokens: list[int], reasons: list[FinishReason | None]) -> None:
    """Appends the tokens the caller has chosen, one a row, and ends the rows that have a reason and had none."""
    call.attended = False
    for sequence, token, reason in zip(call.sequences, tokens, reasons, strict=True):
        sequence.handed_over = False
        sequence.token_ids.append(token)
        if sequence.finish_reason is not None:
            continue
        if call.on_token is not None:
            call.on_token(sequence, token)
        if reason is not None:
            sequence.finish_reason = reason
            sequence.num_kept = sequence.num_generated
