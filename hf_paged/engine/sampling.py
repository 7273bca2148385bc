"""How the next tokens of a call are chosen: upstream's prepared processors and criteria, and what is
recorded.

A `SamplingSpec` is what the engine keeps opaque as `Call.sampling`; all rows of the call share it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from hf_paged.engine import processors as rules
from hf_paged.engine import stopping
from hf_paged.engine.draws import Draws, SeededDraws
from hf_paged.engine.request import Sequence


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities at one position, of the processed scores the token was chosen from."""

    token_id: int
    logprob: float
    top: list[tuple[int, float]]  # (token id, log-probability), the most probable first


class LogitsEdit(Protocol):
    """What a request changes of its own logits before the processors see them: a grammar's mask, a bias a token.

    Runs in the thread that turns the engine, once for each new token of its one row, so it must be quick. What
    it raises fails its request only.
    """

    def __call__(self, generated: list[int], logits: Tensor) -> None:
        """Edits `logits`, float32 [vocab], in place; `generated` are the new tokens so far, not to be kept."""
        ...


@dataclass(eq=False)
class SamplingSpec:
    """Shared by all rows of a call.

    Args:
        prompt_ids: [rows, padded prompt] int64 on the CPU, the very columns upstream shows, pads included.
        processors: upstream's prepared `LogitsProcessorList`; `unsupported` must have nothing against it.
        criteria: upstream's prepared `StoppingCriteriaList`.
        do_sample: False for the most probable token.
        draws: the random numbers of a call that samples; None if it does not.
        pad_token_id: what finished rows of a call that runs on get, if a criterion knows an end of sequence.
        logprobs: None for none, or how many of the most probable tokens to record besides the chosen one.
        raw_logprobs: take them from the model's logits, not from what edit and processors made of them.
        edit: changes the logits of the only row before the processors.
        stop_sequences: criteria of `stopping.is_stop_sequence`, besides those in `criteria`.
    """

    prompt_ids: Tensor
    processors: list[Any] = field(default_factory=list)
    criteria: list[Any] = field(default_factory=list)
    do_sample: bool = False
    draws: Draws | None = None
    pad_token_id: int | None = None
    output_scores: bool = False
    output_logits: bool = False
    logprobs: int | None = None
    raw_logprobs: bool = False
    edit: LogitsEdit | None = None
    beams: Any = None  # `beam_state.BeamOptions`; `draws` are then by prompt, [beams * vocab] each
    stop_sequences: tuple[Any, ...] = ()

    #: Records, [row][step]: float32 [vocab] on the device of the model; `token_logprobs` plain numbers.
    scores: list[list[Tensor]] = field(init=False)
    logits: list[list[Tensor]] = field(init=False)
    token_logprobs: list[list[TokenLogprobs]] = field(init=False)

    num_rows: int = field(init=False)
    prompt_width: int = field(init=False)  # columns of the padded prompt
    stop_rules: stopping.StopRules = field(init=False)
    #: Nothing but an argmax over the logits is asked for.
    plain: bool = field(init=False)
    #: Tokens can be chosen before the host knows those of the step before, and without a word to it.
    on_device: bool = field(init=False)
    #: Rows of calls with equal signatures are processed together.
    signature: Hashable = field(init=False)

    def __post_init__(self) -> None:
        if self.prompt_ids.dim() != 2 or self.prompt_ids.dtype != torch.int64:
            raise ValueError(
                f"prompt_ids must be [rows, width] int64, not {self.prompt_ids.shape} {self.prompt_ids.dtype}"
            )
        if self.do_sample != (self.draws is not None):
            raise ValueError(f"do_sample={self.do_sample} needs draws {'set' if self.do_sample else 'None'}")
        if reason := unsupported(self.processors, self.criteria):
            raise ValueError(f"cannot be run row by row: {reason}")
        self.num_rows, self.prompt_width = self.prompt_ids.shape
        if self.edit is not None and self.num_rows != 1:
            raise ValueError(f"edit needs a call of one row, not {self.num_rows}")
        self.scores = [[] for _ in range(self.num_rows)]
        self.logits = [[] for _ in range(self.num_rows)]
        self.token_logprobs = [[] for _ in range(self.num_rows)]
        self.stop_rules = stopping.StopRules.of(self.criteria, self.stop_sequences)
        self.plain = not (
            self.do_sample
            or self.processors
            or self.output_scores
            or self.output_logits
            or self.logprobs is not None
            or self.edit is not None
            or self.beams is not None
        )
        self.on_device = self.plain or not (
            (self.do_sample and not isinstance(self.draws, SeededDraws))
            or rules.need_history(self.processors)
            or self.output_scores
            or self.output_logits
            or self.edit is not None
            or self.beams is not None
        )
        self.signature = rules.Signature(self.do_sample, rules.signature(self.processors))
        self.processors = rules.prepare(self.processors)
        self._histories: dict[int, tuple[np.ndarray, int]] = {}

    @property
    def eos_token_ids(self) -> frozenset[int]:
        return self.stop_rules.eos_token_ids

    @property
    def has_eos(self) -> bool:
        """Whether upstream would give finished rows pads."""
        return self.stop_rules.has_eos

    @property
    def max_length(self) -> int | None:
        """Padded prompt + generated tokens at which a row ends."""
        return self.stop_rules.max_length

    def history(self, sequence: Sequence) -> np.ndarray:
        """The row of `sequence` as upstream's loop shows it: padded prompt + generated, [length] int64.

        A view, not to be written to, valid until the next call for the same row.
        """
        num_generated = sequence.num_generated
        length = self.prompt_width + num_generated
        ids, filled = self._histories.get(sequence.row) or (
            self.prompt_ids[sequence.row].numpy(),
            self.prompt_width,
        )
        if len(ids) < length:
            grown = np.empty(length + max(64, length // 2), dtype=np.int64)
            grown[:filled] = ids[:filled]
            ids = grown
        if filled < length:
            ids[filled:length] = sequence.token_ids[len(sequence.token_ids) - (length - filled) :]
        self._histories[sequence.row] = (ids, length)
        return ids[:length]

    def rewind(self, row: int, num_generated: int) -> None:
        """The generated tokens of `row` after this many are others now."""
        if row in self._histories:
            ids, filled = self._histories[row]
            self._histories[row] = (ids, min(filled, self.prompt_width + num_generated))

    def release(self, row: int) -> None:
        """`row` will not be sampled again."""
        self._histories.pop(row, None)
        if self.draws is not None:
            self.draws.release(row)

    def take_scores(self) -> tuple[Tensor, ...]:
        """`scores` as upstream returns them: one [rows, vocab] a step. Empties the record."""
        return _take(self.scores)

    def take_logits(self) -> tuple[Tensor, ...]:
        """`logits` as upstream returns them: one [rows, vocab] a step. Empties the record."""
        return _take(self.logits)


def unsupported(processors: list[Any], criteria: list[Any]) -> str | None:
    """Names the first processor or criterion that cannot be run row by row: user-made, or stateful."""
    for processor in processors:
        if rules.rule_of(processor) is None:
            return f"logits processor {type(processor).__name__}"
    for criterion in criteria:
        if type(criterion) not in stopping.SUPPORTED:
            return f"stopping criterion {type(criterion).__name__}"
    return None


def _take(records: list[list[Tensor]]) -> tuple[Tensor, ...]:
    steps = []
    for rows in records:
        rows.reverse()
    while records and all(records):
        steps.append(torch.stack([rows.pop() for rows in records]))
    if any(records):
        raise RuntimeError("rows have records of different numbers of steps: the call did not run on")
    return tuple(steps)
