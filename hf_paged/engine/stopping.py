"""Upstream's stopping criteria, a row at a time: why a row stops after its last token, or None.

End-of-sequence tokens and lengths are looked up; stop strings and times ask upstream's own objects. Evaluation
harnesses bring a criterion of their own that waits until all rows have a stop sequence (`is_stop_sequence`):
here each row stops by itself.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers.generation import stopping_criteria as upstream

from hf_paged.engine.request import FinishReason, Sequence

if TYPE_CHECKING:
    from hf_paged.engine.sampling import SamplingSpec

#: Exactly these types; a subclass is user-made.
SUPPORTED = frozenset(
    {
        upstream.MaxLengthCriteria,
        upstream.MaxTimeCriteria,
        upstream.StopStringCriteria,
        upstream.EosTokenCriteria,
    }
)


def is_stop_sequence(criterion: Any) -> bool:
    """Whether this is the criterion of lm-evaluation-harness or lighteval for one stop sequence, by name and shape."""
    return (
        type(criterion).__name__ == "MultiTokenEOSCriteria"
        and isinstance(getattr(criterion, "sequence", None), str)
        and isinstance(getattr(criterion, "done_tracker", None), list)
        and isinstance(getattr(criterion, "initial_decoder_input_length", None), int)
        and isinstance(getattr(criterion, "sequence_id_len", None), int)
        and callable(getattr(getattr(criterion, "tokenizer", None), "batch_decode", None))
    )


@dataclass(frozen=True, eq=False)
class StopRules:
    """What the criteria of a call amount to."""

    eos_token_ids: frozenset[int] = frozenset()
    #: Upstream pads finished rows if any criterion has this attribute.
    has_eos: bool = False
    max_length: int | None = None  # padded prompt + generated
    stop_strings: tuple[Any, ...] = ()
    max_times: tuple[Any, ...] = ()
    #: Criteria that warn once a row is longer than the positions of the model.
    warn_beyond: tuple[Any, ...] = ()
    stop_sequences: tuple[Any, ...] = ()  # of `is_stop_sequence`
    #: Whether tokens and lengths alone decide.
    simple: bool = field(init=False)

    def __post_init__(self) -> None:
        asked = (self.stop_strings, self.max_times, self.warn_beyond, self.stop_sequences)
        object.__setattr__(self, "simple", not any(asked))

    @classmethod
    def of(cls, criteria: list[Any], stop_sequences: tuple[Any, ...] = ()) -> StopRules:
        lengths = [c for c in criteria if type(c) is upstream.MaxLengthCriteria]
        eos = [c for c in criteria if type(c) is upstream.EosTokenCriteria]
        return cls(
            eos_token_ids=frozenset(token for c in eos for token in c.eos_token_id.reshape(-1).tolist()),
            has_eos=any(hasattr(c, "eos_token_id") for c in criteria),
            max_length=min((c.max_length for c in lengths), default=None),
            stop_strings=tuple(c for c in criteria if type(c) is upstream.StopStringCriteria),
            max_times=tuple(c for c in criteria if type(c) is upstream.MaxTimeCriteria),
            warn_beyond=tuple(
                c
                for c in lengths
                if (limit := getattr(c, "max_position_embeddings", None)) and limit < c.max_length
            ),
            stop_sequences=stop_sequences,
        )


def stops(sequences: list[Sequence]) -> list[FinishReason | None]:
    """Why each of `sequences` stops after the last of its tokens; what was decided before stays decided.

    A stop token or string goes before the length, the length before the time. Criteria that raise, raise.
    """
    reasons: list[FinishReason | None] = []
    asking: list[int] = []
    for i, sequence in enumerate(sequences):
        spec: SamplingSpec = sequence.call.sampling
        rules = spec.stop_rules
        token_ids = sequence.token_ids
        num_generated = len(token_ids) - sequence.prompt_len
        if sequence.finish_reason is not None:
            reasons.append(sequence.finish_reason)
            continue
        if token_ids[-1] in rules.eos_token_ids:
            reasons.append(FinishReason.STOP)
        elif num_generated >= sequence.ends_at or (
            rules.max_length is not None and spec.prompt_width + num_generated >= rules.max_length
        ):
            reasons.append(FinishReason.LENGTH)
        else:
            reasons.append(None)
        if not rules.simple:
            asking.append(i)
    if asking:
        _ask(sequences, asking, reasons)
    return reasons


def _ask(sequences: list[Sequence], asking: list[int], reasons: list[FinishReason | None]) -> None:
    """Asks upstream's objects about the sequences at `asking`, and amends their `reasons`."""
    by_strings: dict[Hashable, list[tuple[int, Any, np.ndarray]]] = {}
    timed_out: dict[int, bool] = {}
    for i in asking:
        sequence = sequences[i]
        spec: SamplingSpec = sequence.call.sampling
        history = spec.history(sequence)
        for criterion in spec.stop_rules.warn_beyond:
            if reasons[i] is None and len(history) == criterion.max_position_embeddings + 1:
                criterion(torch.from_numpy(history[None]), None)
        for criterion in spec.stop_rules.stop_strings if reasons[i] is not FinishReason.STOP else ():
            tail = history[-criterion.maximum_token_len :]
            # Equal strings and tokenizer give the very same table: upstream caches them.
            key = (
                id(criterion.embedding_vec),
                criterion.maximum_token_len,
                criterion.num_stop_strings,
                len(tail),
            )
            by_strings.setdefault((*key, *criterion.target_lens.tolist()), []).append((i, criterion, tail))
        if reasons[i] is not FinishReason.STOP and _ends_a_stop_sequence(
            history, spec.stop_rules.stop_sequences
        ):
            reasons[i] = FinishReason.STOP
        if reasons[i] is None:
            call_id = sequence.call.call_id
            if call_id not in timed_out:
                ids = torch.from_numpy(history[None])
                timed_out[call_id] = any(bool(c(ids, None).any()) for c in spec.stop_rules.max_times)
            if timed_out[call_id]:
                reasons[i] = FinishReason.TIMEOUT
    for group in by_strings.values():
        ids = torch.from_numpy(np.stack([tail for _, _, tail in group]))
        stopped = group[0][1](ids, None).tolist()
        for (i, _, _), stop in zip(group, stopped, strict=True):
            if stop:
                reasons[i] = FinishReason.STOP


def _ends_a_stop_sequence(history: np.ndarray, criteria: tuple[Any, ...]) -> bool:
    """Whether one of `criteria` finds its sequence in the text of the last tokens, of as many as it would look at."""
    for criterion in criteria:
        tail = history[criterion.initial_decoder_input_length :][-criterion.sequence_id_len :]
        if criterion.sequence in criterion.tokenizer.batch_decode(torch.from_numpy(tail[None]))[0]:
            return True
    return False
